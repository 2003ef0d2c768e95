"""The captioning models. Each is an nn.Module that fits raycap/decoding/protocol.py without importing it."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from raycap.models import blip, clip_gpt2, vit_gpt2
from raycap.models.blip import Blip
from raycap.models.clip_gpt2 import ClipGpt2
from raycap.models.hub.registering import watch_imports
from raycap.models.vgg_lstm import VggLstm
from raycap.models.vit_gpt2 import VitGpt2

CaptionModel: TypeAlias = Blip | ClipGpt2 | VitGpt2 | VggLstm  # every kind there is
KINDS = ("blip", "clip_gpt2", "vision-encoder-decoder", "vgg_lstm")  # "model_type" in config.json
# Second name of a parameter -> its first, of those that a configuration may tie. Files know them by the same names.
TIED_NAMES = {
    "blip": blip.TIED_NAMES,
    "clip_gpt2": clip_gpt2.TIED_NAMES,
    "vision-encoder-decoder": vit_gpt2.TIED_NAMES,
    "vgg_lstm": {},
}
watch_imports()


@dataclass(frozen=True)
class ModelSizes:
    """What must fit the rest of a checkpoint. num_positions: text tokens the model reads, the first one included; None
    for a model without a bound. patch_size: the image size is a multiple of it.
    """

    vocab_size: int
    num_positions: int | None
    image_size: int
    patch_size: int


def build_model(kind: str, config: dict[str, Any]) -> CaptionModel:
    """A model with fresh weights, in float32 on the CPU. config: the contents of config.json."""
    match kind:
        case "blip":
            from transformers import BlipConfig

            return Blip(BlipConfig.from_dict(config))
        case "clip_gpt2":
            return ClipGpt2(config)
        case "vision-encoder-decoder":
            from transformers import VisionEncoderDecoderConfig

            return VitGpt2(VisionEncoderDecoderConfig.from_dict(config))
        case "vgg_lstm":
            return VggLstm(config)
        case _:
            raise ValueError(f"unknown model kind {kind!r}; known kinds: {', '.join(KINDS)}")


def model_sizes(kind: str, config: dict[str, Any]) -> ModelSizes:
    """Of a config that build_model takes; raises KeyError where it lacks a field."""
    match kind:
        case "blip":
            text, vision = config["text_config"], config["vision_config"]
            return _sizes(text["vocab_size"], text["max_position_embeddings"], vision)
        case "clip_gpt2":
            text = config["text_config"]
            # The last visual token stands in the place of the first text token.
            num_positions = text["n_positions"] - config["prefix_length"] + 1
            return _sizes(text["vocab_size"], num_positions, config["vision_config"])
        case "vision-encoder-decoder":
            text = config["decoder"]
            return _sizes(text["vocab_size"], text["n_positions"], config["encoder"])
        case "vgg_lstm":
            return _sizes(config["vocab_size"], None, {"image_size": config["image_size"], "patch_size": 32})
        case _:
            raise ValueError(f"unknown model kind {kind!r}; known kinds: {', '.join(KINDS)}")


def _sizes(vocab_size: int, num_positions: int | None, vision: dict[str, Any]) -> ModelSizes:
    return ModelSizes(vocab_size, num_positions, vision["image_size"], vision["patch_size"])
