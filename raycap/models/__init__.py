"""The captioning models. Each is an nn.Module that fits raycap/decoding/protocol.py without importing it."""

from typing import Any, TypeAlias

from raycap.models.blip import Blip

CaptionModel: TypeAlias = Blip  # every kind there is, as a union
KINDS = ("blip",)  # "model_type" in a Hugging Face config.json


def build_model(kind: str, config: dict[str, Any]) -> CaptionModel:
    """A model with fresh weights, in float32 on the CPU. config: the contents of a Hugging Face config.json."""
    match kind:
        case "blip":
            from transformers import BlipConfig

            return Blip(BlipConfig.from_dict(config))
        case _:
            raise ValueError(f"unknown model kind {kind!r}; known kinds: {', '.join(KINDS)}")
