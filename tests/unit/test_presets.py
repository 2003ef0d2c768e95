"""raycap/models/presets.py: the published architectures have the published numbers of parameters."""

from typing import Any

import pytest
import torch

from raycap.models import build_model, model_sizes
from raycap.models import presets as p


def count(config: dict[str, Any], below: str = "") -> int:
    """Parameters, each shared one once."""
    with torch.device("meta"):
        model: torch.nn.Module = build_model(config["model_type"], config)
    return sum(t.numel() for name, t in model.named_parameters() if name.startswith(below))


@pytest.mark.parametrize(
    ("name", "below", "number"),
    [
        # Salesforce/blip-image-captioning-base; 247,414,076 is the same model with its tied head counted twice.
        ("blip_base_384", "", 223_971_644),
        ("blip_base_384", "vision_model.", 86_090_496),  # timm's vit_base_patch16_384 without its classifier
        ("blip_large_384", "", 446_290_492),  # ViT-L's 24 layers of 1,024, the same decoder over wider images
        ("vit_gpt2", "", 239_195_904),  # transformers' VisionEncoderDecoderModel of the same config
        ("clip_gpt2_mlp", "gpt.", 124_439_808),  # gpt2's card says 124 M
        ("clip_gpt2_mlp", "clip_project.", 512 * 3840 + 3840 + 3840 * 7680 + 7680),  # 31.5 M
        (
            "clip_gpt2_mlp",
            "vision_tower.",
            87_849_216,
        ),  # openai/clip-vit-base-patch32's vision model with its projection
        ("vgg_lstm", "features.", 14_714_688),  # torchvision's vgg16().features
    ],
)
def test_a_published_architecture_has_its_published_number_of_parameters(name: str, below: str, number: int) -> None:
    assert count(p.PRESETS[name], below) == number


def test_the_mapper_of_clipcaps_transformer_has_some_41_7_million_parameters() -> None:
    assert round(count(p.CLIP_GPT2_TRANSFORMER, "clip_project.") / 1e6, 1) == 41.7


@pytest.mark.parametrize("name", p.PRESETS)
def test_every_preset_can_be_built_and_has_sizes_that_fit(name: str) -> None:
    config = p.PRESETS[name]
    assert count(config) > 0
    sizes = model_sizes(config["model_type"], config)
    assert sizes.image_size % sizes.patch_size == 0
    assert sizes.num_positions is None or sizes.num_positions > 40


def test_every_tiny_preset_has_less_than_three_million_parameters() -> None:
    for name, config in p.PRESETS.items():
        if name.endswith("_tiny"):
            assert count(config) < 3e6, name
