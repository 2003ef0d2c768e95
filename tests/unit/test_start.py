"""raycap/training/start.py: what step 0 is, from scratch and from a folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Demo
from tiny import tiny_checkpoint

from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import TrainConfig
from raycap.errors import CheckpointError, UserError
from raycap.models.blip import Blip
from raycap.schema import DecodeSettings
from raycap.text import role_ids
from raycap.training.start import build_start

torch.set_num_threads(1)


def fresh(demo: Demo, **changes: Any) -> TrainConfig:
    fields = {"train_shards": demo.train, "val_shards": demo.val, "tokenizer": demo.tokenizer, "image_size": 32}
    return TrainConfig(**fields | changes)


def test_a_fresh_model_sees_its_images_from_the_first_step(demo: Demo) -> None:
    """Hugging Face's default would draw the vision tower's weights with a deviation of 1e-10."""
    _, model = build_start(fresh(demo))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    states = model.encode_image(images).states_BTE
    assert (states[0] - states[1]).abs().mean() > 0.1
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "embeddings.position" not in name:
            assert 0.015 < parameter.std() < 0.03, name


def test_the_start_depends_on_the_seed_alone(demo: Demo) -> None:
    torch.manual_seed(1)
    first, second, other = (build_start(fresh(demo, seed=seed))[1].state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    name = "vision_model.embeddings.patch_embedding.weight"
    assert not torch.equal(first[name], other[name])


def test_a_fresh_spec_takes_sizes_from_the_config_and_roles_from_the_tokenizer(demo: Demo) -> None:
    config = fresh(demo, prompt="a photo of ", max_tokens=90, max_new_tokens=30, image_size=48, label_smoothing=0.1)
    spec, model = build_start(config)
    text = spec.model_config["text_config"]
    assert (spec.text.bos_id, spec.text.eos_id, spec.text.pad_id) == role_ids(spec.tokenizer)
    assert (text["bos_token_id"], text["sep_token_id"], text["pad_token_id"]) == role_ids(spec.tokenizer)
    assert text["vocab_size"] == spec.tokenizer.get_vocab_size()
    assert text["max_position_embeddings"] == 120
    assert (spec.text.prompt, spec.text.max_tokens, spec.image.size) == ("a photo of ", 90, 48)
    assert spec.decode == DecodeSettings(max_new_tokens=30)
    assert model.label_smoothing == 0.1
    assert isinstance(model, Blip)
    assert model.vision_model.embeddings.image_size == 48


def test_an_image_size_that_the_patches_do_not_fill_is_refused(demo: Demo) -> None:
    with pytest.raises(
        UserError, match=r"--image-size 40 is no multiple of the patch size 16 of --architecture blip_tiny"
    ):
        build_start(fresh(demo, image_size=40))


def test_a_start_from_a_folder_has_its_weights_and_the_runs_settings(demo: Demo, tmp_path: Path) -> None:
    given, model, _ = tiny_checkpoint()
    save_checkpoint(str(tmp_path / "c"), export_weights(model), given, {})
    changes = {"tokenizer": "", "init_from": str(tmp_path / "c"), "prompt": "two ", "max_tokens": 30}
    spec, loaded = build_start(fresh(demo, **changes, max_new_tokens=7, label_smoothing=0.2))
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert (spec.text.prompt, spec.text.max_tokens, spec.decode.max_new_tokens) == ("two ", 30, 7)
    assert loaded.label_smoothing == spec.model_config["text_config"]["label_smoothing"] == 0.2
    assert spec.verified
    with pytest.raises(UserError, match=r"--image-size 64 does not fit --init-from .* give --image-size 32"):
        build_start(fresh(demo, **changes, image_size=64))
    with pytest.raises(CheckpointError, match="it does not exist"):
        build_start(fresh(demo, **changes | {"init_from": str(tmp_path / "nowhere")}))
