"""Weights whose names or shapes are not those of their config.json: refused from the header, before anything else starts."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file, save_file
from test_scorer import published
from tiny import png_images
from tiny_families import FAMILIES, write_family
from torch import Tensor

from raycap.bulk.caption import caption_bucket
from raycap.captioner import Captioner
from raycap.checkpoint import load_model, open_checkpoint, open_spec
from raycap.checkpoint.retrieval import open_scorer_spec
from raycap.config import CaptionBucketConfig
from raycap.errors import CheckpointError

__all__ = ["published"]  # the fixture: a scorer's folder
pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified", "ignore:generation_config.json")
# VGG with LSTM has no published layout: a folder of it is sealed, and its names are those that raycap wrote.
PUBLISHED = tuple(family for family in FAMILIES if family != "vgg_lstm")


def change(folder: Path, changed: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    path = folder / "model.safetensors"
    save_file(changed(load_file(path)), path, metadata={"format": "pt"})
    return folder


def below(prefix: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {prefix + name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("family", PUBLISHED)
@pytest.mark.parametrize("prefix", ["module.", "model.", "module._orig_mod."])
def test_the_prefix_of_a_wrapped_model_is_named_and_without_it_the_weights_fit(
    tmp_path: Path, family: str, prefix: str
) -> None:
    folder = write_family(tmp_path / "wrapped", family, sealed=False)
    before = [result.caption for result in Captioner.load(str(folder)).caption(png_images(2))]
    change(folder, below(prefix))
    sentence = f"wrapped' have {prefix!r} before every name, .* without it they fit .*removeprefix\\({prefix!r}\\)"
    with pytest.raises(CheckpointError, match=sentence):
        open_spec(str(folder))
    with pytest.raises(CheckpointError, match=sentence):
        load_model(*open_checkpoint(str(folder)), str(folder))
    # What the sentence says to do.
    change(folder, lambda weights: {name.removeprefix(prefix): tensor for name, tensor in weights.items()})
    assert [result.caption for result in Captioner.load(str(folder)).caption(png_images(2))] == before


def test_a_prefix_that_does_not_explain_everything_is_not_blamed(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "half", "blip", sealed=False)
    change(folder, lambda weights: below("module.")(dict(list(weights.items())[1:])))
    with pytest.raises(CheckpointError, match=r"half' do not fit its config\.json: \d+ missing, \d+ unknown"):
        open_spec(str(folder))


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_tensor_of_another_shape_is_found_from_the_header(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / "cut", family, sealed=False)
    name = max(load_file(folder / "model.safetensors").items(), key=lambda item: item[1].numel())[0]
    change(folder, lambda weights: {**weights, name: weights[name][:-1].clone()})
    with pytest.raises(
        CheckpointError, match=r"do not fit its config\.json: 0 missing, 0 unknown, \d of another shape"
    ):
        open_spec(str(folder))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_fits_is_opened_from_the_header_alone(tmp_path: Path, family: str) -> None:
    assert open_spec(str(write_family(tmp_path / family, family))).verified


def test_a_scorer_is_told_in_the_same_way(published: tuple[Path, torch.nn.Module]) -> None:
    folder = change(published[0], below("module."))
    with pytest.raises(CheckpointError, match=r"have 'module\.' before every name"):
        open_scorer_spec(str(folder))


def test_bulk_captioning_refuses_before_ray_starts_and_writes_nothing(tmp_path: Path) -> None:
    folder = change(write_family(tmp_path / "wrapped", "blip", sealed=False), below("module."))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png_images(1)[0])
    config = CaptionBucketConfig(checkpoint=str(folder), images=str(tmp_path / "images"), out=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"have 'module\.' before every name"):
        caption_bucket(config)
    assert not ray.is_initialized()
    assert not (tmp_path / "out").exists()
