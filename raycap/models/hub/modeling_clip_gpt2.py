"""CLIP-GPT2 for plain transformers: a thin shell over its vision towers and its GPT-2. Imports nothing of raycap.

Parameter names are those of raycap's own model (vision_tower.*, clip_project.*, gpt.*), so the weights are the same
file; the tests hold logits and captions equal. A text begins with a first token (bos), whose place the last visual
token takes: it is in input_ids, and is not read.

Shape suffixes: B images, N texts (as many as images), L text length, P visual tokens, V vocabulary, D width of GPT-2,
S side of the image in pixels.
"""

# mypy: allow-untyped-calls
# because transformers leaves some of what is called here without types

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationMixin, GPT2LMHeadModel, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_clip_gpt2 import ClipGpt2Config
from .prefix_clip_gpt2 import TransformerMapper, build_mapper, build_vision_tower, image_vector, normalized


class ClipGpt2ForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """model(pixel_values, input_ids, labels) -> logits and loss; model.generate(pixel_values, input_ids) -> captions."""

    config_class = ClipGpt2Config
    main_input_name = "pixel_values"
    _tied_weights_keys = {"gpt.lm_head.weight": "gpt.transformer.wte.weight"}  # noqa: RUF012  # transformers' own way
    _supports_sdpa = True

    def __init__(self, config: ClipGpt2Config) -> None:
        super().__init__(config)
        self.vision_tower = build_vision_tower(config.vision_config)
        self.clip_project = build_mapper(config)
        self.gpt: Any = GPT2LMHeadModel(config.text_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: torch.nn.Module) -> None:
        """The mapper stays as torch draws it; towers and GPT-2 have their own ways."""
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, TransformerMapper):
            torch.nn.init.normal_(module.prefix_const)

    def get_input_embeddings(self) -> Any:
        return self.gpt.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.gpt.lm_head

    def visual_tokens(self, pixel_values: Tensor) -> Tensor:
        """prefix_BPD: what GPT-2 reads in front of the text."""
        vector_BE = image_vector(self.vision_tower, pixel_values)
        prefix_BPD: Tensor = self.clip_project(normalized(vector_BE) if self.config.normalize_prefix else vector_BE)
        return prefix_BPD

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CausalLMOutput:
        """logits_NLV: at position l of input_ids, of the token behind it. labels: as input_ids, -100 is not learned.

        attention_mask: of input_ids, 0 at padding; the loss is the mean over the labels.
        """
        prefix_BPD = self.visual_tokens(pixel_values)
        output = self.gpt(**self._embedded(prefix_BPD, input_ids, attention_mask))
        logits_NLV = output.logits[:, prefix_BPD.shape[1] - 1 :]
        loss = None
        if labels is not None:
            smoothing = getattr(self.config.text_config, "label_smoothing", 0.0)
            loss = F.cross_entropy(logits_NLV[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
        return CausalLMOutput(loss=loss, logits=logits_NLV)

    @torch.no_grad()
    def generate(  # type: ignore[override, unused-ignore]  # the image comes first, as in transformers' own captioning models
        self,
        pixel_values: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Captions as token ids: input_ids, if there are any, and what comes behind them.

        input_ids: first token and prompt of each image; padding, behind the first token, has attention_mask 0. kwargs:
        settings in place of those of the generation_config, and what else GenerationMixin.generate() takes.
        """
        settings = copy.deepcopy(generation_config or self.generation_config)
        others = settings.update(**kwargs)
        prefix_BPD = self.visual_tokens(pixel_values)
        first_B1 = torch.full((len(prefix_BPD), 1), self.config.text_config.bos_token_id, device=prefix_BPD.device)
        inputs = self._embedded(prefix_BPD, first_B1 if input_ids is None else input_ids, attention_mask)
        # Generation goes on from the last position, so padding moves in front of the visual tokens.
        mask_BL = inputs["attention_mask"]
        order_BL = mask_BL.argsort(dim=1, stable=True)
        inputs["attention_mask"] = mask_BL.gather(1, order_BL)
        inputs["inputs_embeds"] = inputs["inputs_embeds"].take_along_dim(order_BL[:, :, None], dim=1)
        output = self.gpt.generate(**inputs, generation_config=settings, **others)
        new_ids = output if isinstance(output, Tensor) else output.sequences
        if input_ids is not None:
            prompts = input_ids.repeat_interleave(len(new_ids) // len(input_ids), dim=0)
            new_ids = torch.cat([prompts, new_ids], dim=1)
        if isinstance(output, Tensor):
            return new_ids
        output.sequences = new_ids
        return output

    def _embedded(
        self, prefix_BPD: Tensor, input_ids_NL: Tensor, attention_mask_NL: Tensor | None
    ) -> dict[str, Tensor]:
        """Visual tokens, and the text without its first token, as arguments of GPT-2."""
        text_NLD = self.get_input_embeddings()(input_ids_NL[:, 1:])
        mask_NL = torch.ones_like(input_ids_NL) if attention_mask_NL is None else attention_mask_NL
        mask_BP = mask_NL.new_ones(prefix_BPD.shape[:2])
        return {
            "inputs_embeds": torch.cat([prefix_BPD.to(text_NLD.dtype), text_NLD], dim=1),
            "attention_mask": torch.cat([mask_BP, mask_NL[:, 1:]], dim=1),
        }
