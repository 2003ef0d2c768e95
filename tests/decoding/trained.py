"""Tiny models of every family, trained for seconds so that they say diverse things, and what other code makes of their weights.

Shape suffixes: N text rows, L text length, V vocabulary.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import test_vgg_lstm
import tiny
import tiny_clip_gpt2
import tiny_gpt2
import torch
import torch.nn.functional as F
from test_clip_gpt2 import ClipCap
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from raycap.decoding import search
from raycap.decoding.greedy import Decoded
from raycap.models.vgg_lstm import VggLstm, import_torchvision
from raycap.schema import DecodeSettings

torch.set_num_threads(1)
TRANSFORMERS = ("blip", "vit_gpt2", "clip_gpt2")  # families that transformers has
VGG = ("vgg_lstm", "vgg_lstm_attention")
KINDS = (*TRANSFORMERS, *VGG)
NUM_IMAGES = 24
WORDS = range(5, 40)
Banned = tuple[tuple[int, ...], ...]
Change = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    """Ours, and the same weights in code that is not ours.

    logits: of images and one text each, (N, L, V), of the token behind each position; the first one is bos_id. generate: of
    images, prompt ids and options, as transformers returns it with its scores; the prompt is not in its sequences.
    """

    model: Any
    bos_id: int
    eos_id: int
    pixels: Tensor
    logits: Callable[[Tensor, Tensor], Tensor]
    generate: Callable[[Tensor, list[int], dict[str, Any]], Any] | None = None

    @torch.no_grad()
    def search(
        self,
        rows: list[int],
        prompt: list[int],
        settings: DecodeSettings,
        banned: Banned = (),
        *,
        model: Any = None,
        seeds: list[int] | None = None,
    ) -> list[list[Decoded]]:
        """Our captions of the images at these rows, by `model` in place of ours if it is given."""
        return search(
            model or self.model,
            self.model.encode_image(self.pixels[rows]),
            torch.tensor([self.bos_id, *prompt]),
            eos_id=self.eos_id,
            settings=settings,
            banned=banned,
            image_seeds=seeds or (),
        )

    def history(self, prompt: list[int]) -> list[int]:
        """Of the prompt, what rules look at."""
        return [self.bos_id, *prompt] if self.model.counts_prompt else []


class Changed:
    """A model whose logits go through change()."""

    def __init__(self, model: Any, change: Change) -> None:
        self.model, self.change = model, change
        self.counts_prompt = model.counts_prompt

    def start(self, *arguments: Any) -> Any:
        return self.model.start(*arguments)

    def step(self, state: Any, ids_N: Tensor) -> Tensor:
        return self.change(self.model.step(state, ids_N))


class Restated(PreTrainedModel, GenerationMixin):
    """transformers' generate() on logits that are written out, of a network that it has not."""

    def __init__(self, logits: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(PretrainedConfig())
        self.logits = logits
        self.no_weight = nn.Parameter(torch.zeros(1))  # tells its device

    def forward(self, input_ids: Tensor, images: Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits(images, input_ids))

    def prepare_inputs_for_generation(self, input_ids: Tensor, images: Tensor, **_: object) -> dict[str, Tensor]:
        return {"input_ids": input_ids, "images": images}


@cache
def family(kind: str, dtype: torch.dtype = torch.float32) -> Family:
    ours, theirs = _trained(kind)
    model = copy.deepcopy(ours).to(dtype)
    pixels = _pixels().to(dtype)
    asked = {"return_dict_in_generate": True, "output_scores": True}

    if kind in VGG:
        weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        bos_id, eos_id = test_vgg_lstm.BOS_ID, test_vgg_lstm.EOS_ID

        def logits(images: Tensor, ids: Tensor) -> Tensor:
            return test_vgg_lstm.restated_logits(weights, images, ids)

        restated = Restated(logits)

        def by_equations(images: Tensor, prompt: list[int], options: dict[str, Any]) -> Any:
            ids = torch.tensor([prompt]).repeat(len(images), 1)
            roles = {"eos_token_id": eos_id, "pad_token_id": 0, "use_cache": False}
            return _behind(len(prompt), restated.generate(ids, images=images, **roles, **asked, **options))

        return Family(model, bos_id, eos_id, pixels, logits, by_equations)

    if kind == "blip":
        blip = copy.deepcopy(theirs).to(dtype)

        def by_blip(images: Tensor, prompt: list[int], options: dict[str, Any]) -> Any:
            # transformers drops the last of input_ids, as its processor ends a prompt with [SEP]
            input_ids = torch.tensor([[*prompt, tiny.EOS_ID]]).repeat(len(images), 1)
            return _behind(len(prompt), blip.generate(images, input_ids, **asked, **options))

        return Family(model, 58, tiny.EOS_ID, pixels, lambda images, ids: blip(images, ids).logits, by_blip)

    if kind == "vit_gpt2":
        vit = copy.deepcopy(theirs).to(dtype)
        bos_id = tiny_gpt2.BOS_ID

        def by_vit(images: Tensor, prompt: list[int], options: dict[str, Any]) -> Any:
            ids = torch.tensor([prompt]).repeat(len(images), 1)
            roles = {"eos_token_id": bos_id, "pad_token_id": 0}
            return _behind(len(prompt), vit.generate(images, decoder_input_ids=ids, **roles, **asked, **options))

        return Family(
            model, bos_id, bos_id, pixels, lambda images, ids: vit(images, decoder_input_ids=ids).logits, by_vit
        )

    clipcap = ClipCap(model, tiny_clip_gpt2.tiny_config("mlp"))

    def by_clipcap(images: Tensor, prompt: list[int], options: dict[str, Any]) -> Any:
        text = clipcap.gpt.transformer.wte(torch.tensor(prompt[1:], dtype=torch.int64).expand(len(images), -1))
        inputs = torch.cat([clipcap.prefix(images), text], dim=1)
        roles = {"eos_token_id": tiny_clip_gpt2.EOS_ID, "pad_token_id": 0}
        mask = torch.ones(inputs.shape[:2], dtype=torch.int64)
        return clipcap.gpt.generate(inputs_embeds=inputs, attention_mask=mask, **roles, **asked, **options)

    return Family(model, tiny_clip_gpt2.BOS_ID, tiny_clip_gpt2.EOS_ID, pixels, clipcap.logits, by_clipcap)


def _behind(prompt_length: int, generated: Any) -> Any:
    generated.sequences = generated.sequences[:, prompt_length:]
    return generated


def _pixels() -> Tensor:
    """Large fields: noise would look the same to VGG16."""
    fields = 2 * torch.randn(NUM_IMAGES, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(fields, scale_factor=8)


@cache
def _trained(kind: str) -> tuple[Any, Any]:
    """Ours and transformers', if it has one of that family."""
    torch.manual_seed(0)  # of dropout
    theirs = None
    match kind:
        case "blip":
            ours, theirs = tiny.tiny_blip_pair(seed=3)
            _train(ours, 58, tiny.EOS_ID)
        case "vit_gpt2":
            ours, theirs = tiny_gpt2.tiny_vit_gpt2_pair()
            _train(ours, tiny_gpt2.BOS_ID, tiny_gpt2.BOS_ID)
        case "clip_gpt2":
            ours = tiny_clip_gpt2.tiny_clip_gpt2("mlp", seed=3)
            _train(ours, tiny_clip_gpt2.BOS_ID, tiny_clip_gpt2.EOS_ID)
        case _:
            ours = _vgg(attention=kind == "vgg_lstm_attention")
            _train(ours, test_vgg_lstm.BOS_ID, test_vgg_lstm.EOS_ID, num_steps=180, learning_rate=0.015)
    if theirs is not None:
        theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def _vgg(attention: bool) -> VggLstm:
    """With features as they are drawn, because VGG16 learns too slowly for a test."""
    sizes = {"vocab_size": 60, "image_size": 32, "hidden_size": 48, "embedding_size": 32, "vgg_fc_size": 32}
    model = VggLstm(test_vgg_lstm.tiny_config(attention, **sizes, freeze_vision=True, dropout=0.0))
    published = test_vgg_lstm.torchvision_state(test_vgg_lstm.TINY_CHANNELS, 32)
    model.load_state_dict(import_torchvision(published, attention=attention), strict=False)
    return model


def _train(model: Any, bos_id: int, eos_id: int, *, num_steps: int = 60, learning_rate: float = 3e-3) -> None:
    """Each image has three texts of 2 to 9 words, with repetitions; enough steps to have the lengths and some words."""
    generator = torch.Generator().manual_seed(5)
    rows, labels = [], []
    for _ in range(3 * NUM_IMAGES):
        num_words = int(torch.randint(2, 10, (1,), generator=generator))
        words = torch.randint(WORDS.start, WORDS.stop, (num_words,), generator=generator)
        text = [bos_id, *words.repeat_interleave(1 + (words % 3 == 0)).tolist()[:10], eos_id]
        rows.append(text + [0] * (12 - len(text)))
        labels.append([-100, *text[1:]] + [-100] * (12 - len(text)))
    ids, targets, pixels = torch.tensor(rows), torch.tensor(labels), _pixels()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss_sum, num_targets = model(pixels, ids, targets)
        (loss_sum / num_targets).backward()
        optimizer.step()
    model.eval()
