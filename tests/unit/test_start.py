"""raycap/training/start.py: what a run starts from."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Demo

from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import TRAIN_PRESETS, TrainConfig
from raycap.errors import CheckpointError, UserError
from raycap.training.start import ARCHITECTURES, build_start


@pytest.fixture(scope="module")
def fresh(demo: Demo) -> TrainConfig:
    return replace(
        TRAIN_PRESETS["demo"], train_shards=demo.train, val_shards=demo.val, tokenizer=demo.tokenizer, image_size=32
    )


def test_the_seed_decides_the_fresh_weights(fresh: TrainConfig) -> None:
    first, again, other = (build_start(replace(fresh, seed=seed))[1].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_a_fresh_vision_tower_sees(fresh: TrainConfig) -> None:
    """transformers' default initialisation of BLIP's vision tower, 1e-10, would leave it blind for hundreds of steps."""
    _, model = build_start(fresh)
    assert 0.01 < float(model.vision_model.embeddings.patch_embedding.weight.detach().std()) < 0.05


def test_init_from_a_checkpoint_of_ours_goes_on_with_its_weights_and_the_given_prompt(
    fresh: TrainConfig, tmp_path: Path
) -> None:
    spec, model = build_start(fresh)
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model.state_dict()), spec, {"step": 1})
    config = replace(
        fresh, tokenizer="", init_from=str(tmp_path / "checkpoint"), prompt="a ", label_smoothing=0.1, seed=9
    )
    started, loaded = build_start(config)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
    assert (started.text.prompt, started.text.max_tokens) == ("a ", config.max_tokens)
    assert loaded.label_smoothing == 0.1


def test_an_image_size_that_the_start_weights_do_not_have_is_refused(fresh: TrainConfig, tmp_path: Path) -> None:
    spec, model = build_start(fresh)
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model.state_dict()), spec, {"step": 1})
    with pytest.raises(UserError, match=r"--image-size 64 does not fit .* give --image-size 32"):
        build_start(replace(fresh, tokenizer="", init_from=str(tmp_path / "checkpoint"), image_size=64))


def test_an_image_size_that_no_patches_fill_is_refused(fresh: TrainConfig) -> None:
    with pytest.raises(UserError, match="--image-size 40 is no multiple of the patch size 16"):
        build_start(replace(fresh, image_size=40))


def test_a_start_folder_that_is_not_there_is_refused(fresh: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint folder at"):
        build_start(replace(fresh, tokenizer="", init_from=str(tmp_path / "nothing")))


def test_base_is_blips_vit_b() -> None:
    from transformers import BlipConfig

    published = BlipConfig()
    base = ARCHITECTURES["base"]
    assert base["width"] == published.vision_config.hidden_size == published.text_config.hidden_size
    assert base["vision_layers"] == published.vision_config.num_hidden_layers
    assert base["text_layers"] == published.text_config.num_hidden_layers
    assert base["patch_size"] == published.vision_config.patch_size
