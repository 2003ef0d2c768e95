"""ViT-GPT2 captioning: transformers' ViT, and our GPT-2 (gpt2.py) that reads it by cross-attention.

The layout is that of transformers' VisionEncoderDecoderModel, as nlpconnect/vit-gpt2-image-captioning has it: encoder.*,
decoder.transformer.*, decoder.lm_head.weight (tied), and enc_to_dec_proj.* where the two towers differ in width. The
tests hold it equal. Parameter names are those transformers has in memory; its files know the vision tower by older ones,
see published_names().

Owns how the two towers meet. Does not own caches (cache.py), the search (raycap/decoding) or files (raycap/checkpoint).

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P prompt length,
V vocabulary, D width of the decoder, E width of the vision tower, T image tokens, S side of the image in pixels.
"""

import copy
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from raycap.models.cache import ImageState, TextState
from raycap.models.gpt2 import TIED_NAMES as GPT2_TIED_NAMES
from raycap.models.gpt2 import Gpt2
from raycap.models.loss import summed_token_loss

if TYPE_CHECKING:
    from transformers import VisionEncoderDecoderConfig

TIED_NAMES = {f"decoder.{second}": f"decoder.{first}" for second, first in GPT2_TIED_NAMES.items()}
# Name in memory -> name in files, by transformers' conversion_mapping.py ("ViTModel"); all other names are the same.
_PUBLISHED = (
    (re.compile(r"^encoder\.layers\."), "encoder.encoder.layer."),
    (re.compile(r"(?<=\.)attention\.q_proj\."), "attention.attention.query."),
    (re.compile(r"(?<=\.)attention\.k_proj\."), "attention.attention.key."),
    (re.compile(r"(?<=\.)attention\.v_proj\."), "attention.attention.value."),
    (re.compile(r"(?<=\.)attention\.o_proj\."), "attention.output.dense."),
    (re.compile(r"(?<=\.)mlp\.fc1\."), "intermediate.dense."),
    (re.compile(r"(?<=\.)mlp\.fc2\."), "output.dense."),
)


class VitGpt2(nn.Module):
    """The captioning model of raycap/decoding/protocol.py: see CaptionModel there for the contract of each method.

    Two fields of the configuration are ours, transformers keeps and ignores them. encoder.add_pooling_layer, True if it
    is missing: whether the weights hold encoder.pooler.*, which most published files do and no caption depends on; it
    is carried along and never trained. decoder.label_smoothing, 0 if it is missing.
    """

    counts_prompt = True

    def __init__(self, config: "VisionEncoderDecoderConfig") -> None:
        super().__init__()
        from transformers import GPT2Config, ViTConfig, ViTModel

        vision, text = config.encoder, config.decoder
        if not isinstance(vision, ViTConfig) or not isinstance(text, GPT2Config):
            types = " and ".join(repr(getattr(part, "model_type", None)) for part in (vision, text))
            raise ValueError(f"ViT-GPT2 is an encoder 'vit' and a decoder 'gpt2', the configuration has {types}")
        if not text.add_cross_attention:
            raise ValueError("ViT-GPT2 reads the image by cross-attention, the decoder has add_cross_attention=False")
        if getattr(text, "cross_attention_hidden_size", None) not in (None, text.n_embd):
            raise ValueError(
                f"GPT-2's cross-attention reads its own width {text.n_embd}, the decoder has "
                f"cross_attention_hidden_size={text.cross_attention_hidden_size}"
            )
        self.label_smoothing: float = getattr(text, "label_smoothing", 0.0)
        has_pooler = getattr(vision, "add_pooling_layer", True)
        vision = copy.deepcopy(vision)
        vision._attn_implementation = "sdpa"
        self.encoder = ViTModel(vision, add_pooling_layer=has_pooler)
        if self.encoder.pooler is not None:
            self.encoder.pooler.requires_grad_(False)
        self.decoder = Gpt2(text)
        self.enc_to_dec_proj: nn.Module = nn.Identity()
        if vision.hidden_size != text.n_embd:
            self.enc_to_dec_proj = nn.Linear(vision.hidden_size, text.n_embd)
            nn.init.normal_(self.enc_to_dec_proj.weight, std=text.initializer_range)
            nn.init.zeros_(self.enc_to_dec_proj.bias)

    def published_names(self) -> dict[str, str]:
        """The name of each entry of the state dict -> its name in a model.safetensors that transformers writes."""
        names = {}
        for name in self.state_dict():
            published = name
            if name.startswith("encoder."):
                for pattern, replacement in _PUBLISHED:
                    published = pattern.sub(replacement, published)
            names[name] = published
        return names

    def encode_image(self, pixel_values_B3SS: Tensor) -> ImageState:
        states_BTE = self.encoder(pixel_values_B3SS).last_hidden_state
        return ImageState(self.enc_to_dec_proj(states_BTE))

    def loss(self, state: ImageState, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        # Position l predicts the label of l + 1. Attention is causal, so padding on the right is seen by no target.
        hidden_NLD = self.decoder(self.decoder.embed(input_ids_NL[:, :-1]), image=state)
        return summed_token_loss(self.decoder.lm_head, hidden_NLD, labels_NL[:, 1:], self.label_smoothing)

    def forward(self, pixel_values_B3SS: Tensor, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.encode_image(pixel_values_B3SS), input_ids_NL, labels_NL)

    @torch.no_grad()
    def start(self, state: ImageState, prompt_ids_P: Tensor, beams: int = 1) -> TextState[ImageState]:
        text = TextState(state.for_beams(beams), self.decoder.num_layers)
        B = state.num_images
        if len(prompt_ids_P) > 1:
            self.decoder(self.decoder.embed(prompt_ids_P[:-1].expand(B, -1)), image=text.image, text=text)
        text.reorder(torch.arange(B, device=prompt_ids_P.device).repeat_interleave(beams))
        return text

    @torch.no_grad()
    def step(self, state: TextState[ImageState], ids_N: Tensor) -> Tensor:
        hidden_NLD = self.decoder(self.decoder.embed(ids_N[:, None]), image=state.image, text=state)
        logits_NV: Tensor = self.decoder.lm_head(hidden_NLD[:, 0])
        return logits_NV
