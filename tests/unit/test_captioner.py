"""raycap/captioner.py: one result per image, in order, whatever the images are and however they come together."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import png_images, tiny_checkpoint
from torch import Tensor

from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.image import decode_image, prepare_image
from raycap.schema import CaptionResult, DecodeSettings

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def captioner() -> Captioner:
    spec, model, _ = tiny_checkpoint()
    return Captioner(model, spec)


def test_bytes_and_arrays_give_results_in_order_with_the_broken_ones_named(captioner: Captioner) -> None:
    good = png_images(4)
    images = [good[0], b"<html>404</html>", decode_image(good[1]), good[2], good[3][:-30]]
    results = captioner.caption(images)
    assert [result.error_kind for result in results] == [None, "not_an_image", None, None, "truncated"]
    alone = captioner.caption([good[0], good[1], good[2]])
    assert [results[i].caption for i in (0, 2, 3)] == [result.caption for result in alone]
    assert len({result.caption for result in alone}) == 3
    for result in results:
        assert (result.caption is None) == (result.error_kind is not None) == (result.error is not None)
        assert (result.score is None) == (result.caption is None)
    assert all(result.score is not None and result.score < 0 for result in alone)


def test_no_bad_image_raises(captioner: Captioner) -> None:
    bad = [
        b"",
        b"\xff\xd8\xff" + b"\0" * 50,
        b"P6 1 1 255 abc",
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 0, 3), np.uint8),
    ]
    results = captioner.caption(bad)
    kinds = ["empty", "corrupt", "unsupported_format", "unsupported_mode", "unsupported_mode", "bad_dimensions"]
    assert [result.error_kind for result in results] == kinds
    assert all(result.caption is None and result.error for result in results)
    assert captioner.caption([]) == []


def test_an_image_has_the_same_caption_in_any_batch(captioner: Captioner) -> None:
    images = png_images(24)
    alone = [captioner.caption([image])[0] for image in images]
    assert len({result.caption for result in alone}) > 6
    for size in (2, 5, 24):
        batched = [r for first in range(0, 24, size) for r in captioner.caption(images[first : first + size])]
        assert [result.caption for result in batched] == [result.caption for result in alone]
        assert [r.score for r in batched] == pytest.approx([r.score for r in alone], rel=1e-4)
    backwards = captioner.caption(images[::-1])[::-1]
    assert [result.caption for result in backwards] == [result.caption for result in alone]


def test_settings_are_those_of_the_checkpoint_unless_given(captioner: Captioner) -> None:
    images = png_images(6)
    default = captioner.caption(images)
    assert default == captioner.caption(images, captioner.spec.decode)
    short = captioner.caption(images, DecodeSettings(max_new_tokens=1))
    assert short != default
    assert all(len((result.caption or "").split()) <= 1 for result in short)


def test_read_only_arrays_are_captioned_as_they_are(captioner: Captioner) -> None:
    """Ray's object store hands out such arrays."""
    pixels = np.stack([prepare_image(decode_image(image), captioner.spec.image) for image in png_images(3)])
    pixels.flags.writeable = False
    results = captioner.caption_prepared(pixels)
    assert results == captioner.caption(png_images(3))
    assert all(isinstance(result, CaptionResult) for result in results)


def test_captioning_leaves_no_graph_and_the_model_as_it_was(captioner: Captioner) -> None:
    before = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}
    seen: list[Tensor] = []
    handle = captioner.model.vision_model.register_forward_hook(lambda *args: seen.append(args[2]))
    captioner.caption(png_images(2))
    handle.remove()
    assert not seen[0].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in captioner.model.state_dict().items())


def test_a_loaded_captioner_is_the_saved_one(captioner: Captioner, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "c"), export_weights(captioner.model.state_dict()), captioner.spec, {})
    loaded = Captioner.load(str(tmp_path / "c"))
    assert not loaded.model.training
    assert loaded.caption(png_images(5)) == captioner.caption(png_images(5))
