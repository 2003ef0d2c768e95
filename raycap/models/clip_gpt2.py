"""CLIP-GPT2 captioning as ClipCap does it (Mokady et al. 2021, arXiv:2111.09734; github rmokady/CLIP_prefix_caption).

A vision tower gives one vector per image, a mapper makes prefix_length visual tokens of it, and GPT-2 goes on from
these as if they were the beginning of a text. Owns how the parts are put together, what of them is frozen, and the
import of ClipCap's own weights. Does not own the parts (hub/prefix_clip_gpt2.py, gpt2.py) nor the configuration
(hub/configuration_clip_gpt2.py), which the model exported for plain transformers (hub/modeling_clip_gpt2.py) shares.

The last visual token takes the place of the first token of a text row: the caption's first token is predicted from it,
and the first token itself (bos) is never read. The vision pass and the pass over the visual tokens are done once per
image; its text rows (captions in training, beams in decoding) go on from the same keys and values.

Every parameter is used inside forward() of the module that owns it, and modules are only called, never reached into:
DeepSpeed ZeRO-3 gathers parameters in forward hooks.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P visual tokens
(prefix_length) or, of prompt_ids, prompt length, V vocabulary, D width of GPT-2, S side of the image in pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn

from raycap.models.cache import Prefix, TextState
from raycap.models.gpt2 import MASK_BUFFER, Gpt2
from raycap.models.gpt2 import TIED_NAMES as GPT2_TIED_NAMES
from raycap.models.hub.prefix_clip_gpt2 import build_mapper, build_vision_tower, image_vector, normalized
from raycap.models.loss import summed_token_loss

TIED_NAMES = {f"gpt.{second}": f"gpt.{first}" for second, first in GPT2_TIED_NAMES.items()}
TOKEN_EMBEDDINGS = "gpt.transformer.wte.weight"


@dataclass
class PrefixState:
    """The visual tokens of B images, and what GPT-2 makes of them: keys and values, and what the last one predicts from."""

    embeddings_BPD: Tensor
    # By grad mode: captions sampled under no_grad must not leave keys without a graph for a later loss.
    passes: dict[bool, tuple[Prefix, Tensor]] = field(default_factory=dict)

    @property
    def num_images(self) -> int:
        return len(self.embeddings_BPD)

    def read_by(self, gpt: Gpt2) -> tuple[Prefix, Tensor]:
        """Keys and values of the visual tokens, and the hidden state of the last one, (B, 1, D); one pass per grad mode."""
        grad_mode = torch.is_grad_enabled()
        if grad_mode not in self.passes:
            prefix = Prefix()
            hidden_BPD: Tensor = gpt(self.embeddings_BPD, text=prefix)
            self.passes[grad_mode] = (prefix, hidden_BPD[:, -1:])
        return self.passes[grad_mode]

    def select(self, images: Tensor) -> "PrefixState":
        return PrefixState(self.embeddings_BPD[images])


class DecodeState(TextState[PrefixState]):
    """The visual tokens and the text behind them, of N = B * beams rows.

    Each row has the keys and values of its visual tokens in its cache: these few positions, copied once, are cheaper than
    joining two caches in every layer of every step.
    """

    def __init__(self, image: PrefixState, gpt: Gpt2) -> None:
        super().__init__(image, gpt.num_layers)
        prefix, last_B1D = image.read_by(gpt)
        for layer, (keys, values) in enumerate(prefix.layers):
            self.append(layer, keys, values)
        self.length = prefix.length
        self.last_N1D: Tensor | None = last_B1D  # until the first token, which takes no room in the text, was asked for

    def reorder(self, index_N: Tensor) -> None:
        super().reorder(index_N)
        if self.last_N1D is not None:
            self.last_N1D = self.last_N1D[index_N]


class ClipGpt2(nn.Module):
    """The captioning model of raycap/decoding/protocol.py: see CaptionModel there for the contract of each method.

    config: the contents of config.json, see ClipGpt2Config. Raises ValueError, naming the field, for values that mean
    nothing. text_config.label_smoothing, 0 if it is missing, is a field of ours.

    Frozen modules get no gradients and stay in evaluation mode, as ClipCap's GPT-2 does where only the mapper is trained.
    """

    counts_prompt = False  # its prompt becomes vectors behind the visual tokens

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        from raycap.models.hub.configuration_clip_gpt2 import ClipGpt2Config  # loads transformers, which takes seconds

        checked = ClipGpt2Config.from_dict(dict(config), attn_implementation="sdpa")
        self.label_smoothing: float = getattr(checked.text_config, "label_smoothing", 0.0)
        self.normalize_prefix = checked.normalize_prefix
        self.vision_tower = build_vision_tower(checked.vision_config)
        self.clip_project = build_mapper(checked)
        self.gpt = Gpt2(checked.text_config)
        self.frozen = _frozen_modules(checked.freeze_vision, checked.freeze_text)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        for name, parameter in self.vision_tower.named_parameters():
            if name.endswith("mask_token"):  # DINOv2's, for a pretraining that is not ours: never read
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def encode_image(self, pixel_values_B3SS: Tensor) -> PrefixState:
        vector_BE = image_vector(self.vision_tower, pixel_values_B3SS)
        return PrefixState(self.clip_project(normalized(vector_BE) if self.normalize_prefix else vector_BE))

    def loss(self, state: PrefixState, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        # Position l predicts the label of l + 1, the last visual token that of position 1. Attention is causal, so padding
        # on the right is seen by no target.
        prefix, last_B1D = state.read_by(self.gpt)
        # One position at least, although nothing is predicted from it in a batch of empty captions: every rank of a
        # distributed run calls the same modules.
        text_NLD = self.gpt.embed(input_ids_NL[:, 1 : max(2, input_ids_NL.shape[1] - 1)])
        hidden_NLD = self.gpt(text_NLD, prefix=prefix)
        last_N1D = last_B1D.repeat_interleave(len(input_ids_NL) // state.num_images, dim=0)
        hidden_NLD = torch.cat([last_N1D, hidden_NLD], dim=1)[:, : labels_NL.shape[1] - 1]
        return summed_token_loss(self.gpt.lm_head, hidden_NLD, labels_NL[:, 1:], self.label_smoothing)

    def forward(self, pixel_values_B3SS: Tensor, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.encode_image(pixel_values_B3SS), input_ids_NL, labels_NL)

    @torch.no_grad()
    def start(self, state: PrefixState, prompt_ids_P: Tensor, beams: int = 1) -> DecodeState:
        text = DecodeState(state, self.gpt)
        B = state.num_images
        if len(prompt_ids_P) > 1:
            text.last_N1D = None
        if len(prompt_ids_P) > 2:
            self.gpt(self.gpt.embed(prompt_ids_P[1:-1].expand(B, -1)), text=text)
        text.reorder(torch.arange(B, device=prompt_ids_P.device).repeat_interleave(beams))
        return text

    @torch.no_grad()
    def step(self, state: DecodeState, ids_N: Tensor) -> Tensor:
        if state.last_N1D is not None:  # ids_N is the first token of the row
            hidden_N1D, state.last_N1D = state.last_N1D, None
        else:
            hidden_N1D = self.gpt(self.gpt.embed(ids_N[:, None]), text=state)
        logits_NV: Tensor = self.gpt.lm_head(hidden_N1D[:, 0])
        return logits_NV


def _frozen_modules(freeze_vision: bool, freeze_text: str | int) -> list[str]:
    names = ["vision_tower"] if freeze_vision else []
    if freeze_text == "all":
        return [*names, "gpt"]
    return names if freeze_text == "none" else [*names, *(f"gpt.transformer.h.{n}" for n in range(int(freeze_text)))]


def import_clipcap(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model that ClipCap's train.py saved, by the names of ClipGpt2: mapper and GPT-2.

    The vision tower is missing: ClipCap never had it in the model (ViT-B/32 of CLIP, or its RN50x4, which no tower here
    computes). Names are the same, so nothing is converted; causal masks kept as buffers are left out. Raises ValueError
    for other weights.
    """
    weights = {name: tensor for name, tensor in state_dict.items() if not MASK_BUFFER.search(name)}
    if "clip_project.weight" in weights:
        raise ValueError(
            "these weights have a mapper of a single linear layer (clip_project.weight), which raycap has no mapper for; "
            "choose weights with ClipCap's MLP or transformer"
        )
    other = [name for name in weights if not name.startswith(("clip_project.", "gpt."))]
    if other or TOKEN_EMBEDDINGS not in weights:
        what = f"{other[0]!r} is no part of it" if other else f"they have no {TOKEN_EMBEDDINGS}"
        raise ValueError(f"these are not the weights of a ClipCap model: {what}; give what its train.py saved")
    for second_name, name in TIED_NAMES.items():
        if second_name in weights and not torch.equal(weights[second_name], weights[name]):
            raise ValueError(
                f"{second_name} differs from {name}, which GPT-2 ties; choose weights of an unchanged ClipCap model"
            )
    return weights


def clipcap_layout(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What the shapes of ClipCap's weights say: mapper, prefix_length, and clip_length and num_mapper_layers of the
    transformer, as in ClipGpt2's configuration. The number of heads leaves no trace: ClipCap's is 8, our default.
    """
    width = weights[TOKEN_EMBEDDINGS].shape[1]
    if "clip_project.prefix_const" in weights:
        layers = {name.split(".")[3] for name in weights if name.startswith("clip_project.transformer.layers.")}
        return {
            "mapper": "transformer",
            "prefix_length": len(weights["clip_project.prefix_const"]),
            "clip_length": len(weights["clip_project.linear.bias"]) // width,
            "num_mapper_layers": len(layers),
        }
    if "clip_project.model.2.bias" in weights:
        return {"mapper": "mlp", "prefix_length": len(weights["clip_project.model.2.bias"]) // width}
    raise ValueError("these weights have no mapper of ClipCap's (clip_project.model.2 or clip_project.prefix_const)")
