"""raycap/captioner.py: one result per image, in order, whatever the images are and however they come together."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import assert_same_results, png_images, tiny_checkpoint, write_published
from torch import Tensor

from raycap.captioner import Captioner, check_finite
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.errors import CheckpointError, UserError
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


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_image_has_the_same_caption_in_any_batch(captioner: Captioner, num_beams: int) -> None:
    images = png_images(24)
    settings = replace(captioner.spec.decode, num_beams=num_beams, num_candidates=num_beams)
    alone = [captioner.caption([image], settings)[0] for image in images]
    assert len({result.caption for result in alone}) > 6
    for size in (2, 5, 24):
        batched = [r for first in range(0, 24, size) for r in captioner.caption(images[first : first + size], settings)]
        assert [result.caption for result in batched] == [result.caption for result in alone]
        assert [[c.caption for c in r.candidates] for r in batched] == [
            [c.caption for c in r.candidates] for r in alone
        ]
        assert [r.score for r in batched] == pytest.approx([r.score for r in alone], rel=1e-4)
    backwards = captioner.caption(images[::-1], settings)[::-1]
    assert [result.caption for result in backwards] == [result.caption for result in alone]


def test_settings_are_those_of_the_checkpoint_unless_given(captioner: Captioner) -> None:
    images = png_images(6)
    default = captioner.caption(images)
    assert default == captioner.caption(images, captioner.spec.decode)
    short = captioner.caption(images, DecodeSettings(max_new_tokens=1))
    assert short != default
    assert all(len((result.caption or "").split()) <= 1 for result in short)


def test_bytes_of_any_type_are_images_and_anything_else_is_refused_before_any_work(captioner: Captioner) -> None:
    image = png_images(1)[0]
    expected = captioner.caption([image])
    padded = memoryview(b"__" + image)[2:]
    assert [captioner.caption([data]) for data in (bytearray(image), memoryview(image), padded)] == [expected] * 3
    assert captioner.caption([bytearray(b"<html>")])[0].error_kind == "not_an_image"
    for wrong in ("cat.jpg", None, Path("cat.jpg"), torch.zeros(8, 8, 3)):
        with pytest.raises(
            TypeError, match=rf"image 1 of 2 is {type(wrong).__name__}, which no caption is made of; give"
        ):
            captioner.caption([b"", wrong])


def test_candidates_are_the_best_beams_best_first(captioner: Captioner) -> None:
    images = png_images(5)
    settings = DecodeSettings(max_new_tokens=12, num_beams=4, length_penalty=1.0)
    plain = captioner.caption(images, settings)
    assert all(result.candidates == () for result in plain)
    for num_candidates in (1, 3, 4):
        results = captioner.caption(images, replace(settings, num_candidates=num_candidates))
        for result, expected in zip(results, plain, strict=True):
            assert len(result.candidates) == num_candidates
            assert result.candidates[0] == (result.caption, result.score, result.log_prob, None)
            assert (result.caption, result.score) == (expected.caption, expected.score)
            scores = [candidate.score for candidate in result.candidates]
            assert scores == sorted(scores, reverse=True)  # the rank is the score at a length penalty of 1
    greedy = captioner.caption(images, DecodeSettings(max_new_tokens=12, num_candidates=1))
    assert all(result.candidates == ((result.caption, result.score, result.log_prob, None),) for result in greedy)
    better = [b.score > g.score for b, g in zip(plain, greedy, strict=True) if b.caption != g.caption]
    assert any(better)


def test_captions_longer_than_the_models_texts_are_refused_before_any_work(captioner: Captioner) -> None:
    image = png_images(1)
    longest = DecodeSettings(max_new_tokens=64, min_new_tokens=64)  # position 64 of 64 is the last that is read
    assert captioner.caption(image, longest)[0].caption
    sentence = r"max_new_tokens=65 behind the prompt '' \(tokens with the first: 1\) is more than the 64 text .*; give at most 64"
    for num_beams in (1, 2):
        settings = DecodeSettings(max_new_tokens=65, num_beams=num_beams)
        with pytest.raises(ValueError, match=sentence):
            captioner.caption([b"no image"], settings)
        with pytest.raises(ValueError, match=sentence):
            captioner.caption_prepared(np.zeros((1, 3, 32, 32), np.uint8), settings)
    prompted = Captioner(captioner.model, tiny_checkpoint(prompt="a picture of ")[0])
    assert prompted.caption(image, DecodeSettings(max_new_tokens=61, min_new_tokens=61))[0].caption
    with pytest.raises(ValueError, match="give at most 61"):
        prompted.caption(image, DecodeSettings(max_new_tokens=62))


def test_no_images_have_no_captions(captioner: Captioner) -> None:
    assert captioner.caption([]) == []
    assert captioner.caption_prepared(np.zeros((0, 3, 32, 32), np.uint8)) == []


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_broken_model_gives_errors_and_no_captions(num_beams: int) -> None:
    spec, model, _ = tiny_checkpoint()
    with torch.no_grad():
        model.vision_model.get_parameter("post_layernorm.bias")[0] = torch.inf
    settings = DecodeSettings(max_new_tokens=5, num_beams=num_beams)
    results = Captioner(model, spec).caption(png_images(2), settings)
    assert [(result.caption, result.score, result.error_kind) for result in results] == [(None, None, "not_finite")] * 2
    with pytest.raises(CheckpointError, match="infinite or NaN for all of 2 images"):
        check_finite(["truncated", *(result.error_kind for result in results)])
    check_finite(["not_finite", None, "not_finite"])
    check_finite(["not_finite", "truncated"])  # of a single image nothing is concluded


def test_bf16_computes_in_bf16_and_leaves_the_weights(captioner: Captioner) -> None:
    half = Captioner(captioner.model, captioner.spec, dtype="bf16")
    seen: list[torch.dtype] = []
    layer = captioner.model.vision_model.encoder.layers[0].mlp.fc1
    handle = layer.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    results = half.caption(png_images(8))
    captioner.caption(png_images(1))
    with torch.autocast("cpu", torch.bfloat16):  # as training validates
        in_context = captioner.caption(png_images(8))
    handle.remove()
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    assert in_context == results
    assert {parameter.dtype for parameter in captioner.model.parameters()} == {torch.float32}
    exact = captioner.caption(png_images(8))
    assert [r.score for r in results] != [r.score for r in exact]
    assert sum(a.caption == b.caption for a, b in zip(results, exact, strict=True)) >= 4
    with pytest.raises(ValueError, match="dtype is 'fp16'; give one of fp32, bf16"):
        Captioner(captioner.model, captioner.spec, dtype="fp16")


@pytest.mark.parametrize("device", ["cuda:99", "cud", "meta:x"])
def test_a_device_that_is_not_there_is_refused_before_the_checkpoint_is_read(device: str) -> None:
    with pytest.raises(UserError, match=rf"device '{device}' cannot be used on this machine \(.*\); give device='cpu'"):
        Captioner.load("/no/such/checkpoint", device=device)


def test_settings_override_each_other_by_values_that_are_not_zero() -> None:
    settings = DecodeSettings(max_new_tokens=12, min_new_tokens=4, num_beams=3, length_penalty=0.5)
    assert settings.override() == settings
    assert settings.override(max_new_tokens=4, num_candidates=3) == replace(
        settings, max_new_tokens=4, num_candidates=3
    )
    assert settings.override(num_beams=1).num_beams == 1
    for given, sentence in (
        ({"max_new_tokens": 3}, "min_new_tokens is 4 and max_new_tokens 3; give"),
        ({"num_candidates": 4}, "num_candidates is 4 and num_beams 3; a search"),
        ({"num_candidates": 2, "num_beams": 1}, "num_candidates is 2 and num_beams 1; a search"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"num_beams": -2}, "num_beams is -2"),
    ):
        with pytest.raises(ValueError, match=sentence):
            settings.override(**given)
    for length_penalty in (float("nan"), float("inf"), -11.0):
        with pytest.raises(ValueError, match=f"length_penalty is {length_penalty}; give one from -10 to 10"):
            DecodeSettings(length_penalty=length_penalty)


def test_read_only_arrays_are_captioned_as_they_are(captioner: Captioner) -> None:
    """Ray's object store hands out such arrays."""
    pixels = np.stack([prepare_image(decode_image(image), captioner.spec.image) for image in png_images(3)])
    pixels.flags.writeable = False
    results = captioner.caption_prepared(pixels)
    assert results == captioner.caption(png_images(3))
    assert all(isinstance(result, CaptionResult) for result in results)


def test_prompts_and_batches_of_the_wrong_kind_are_refused(captioner: Captioner) -> None:
    for prompts in ("abc", [None, "a", "b"]):
        with pytest.raises(TypeError, match=r"prompts is .*; give a list with a text for each image"):
            captioner.caption(png_images(3), prompts=prompts)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="micro_batch_size is -1; give at least 1"):
        captioner.caption(png_images(3), micro_batch_size=-1)
    with pytest.raises(ValueError, match="text tokens the model reads; give a shorter prompt"):
        captioner.caption(png_images(1), prompts=["dog " * 100])


def test_captioning_leaves_no_graph_and_the_model_as_it_was(captioner: Captioner) -> None:
    before = {name: tensor.clone() for name, tensor in captioner.model.state_dict().items()}
    seen: list[Tensor] = []
    handle = captioner.model.vision_model.register_forward_hook(lambda *args: seen.append(args[2]))
    captioner.caption(png_images(2))
    handle.remove()
    assert not seen[0].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in captioner.model.state_dict().items())


def test_a_loaded_captioner_is_the_saved_one(captioner: Captioner, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "c"), export_weights(captioner.model), captioner.spec, {})
    loaded = Captioner.load(str(tmp_path / "c"))
    assert not loaded.model.training
    assert (loaded.verified, loaded.fingerprint) == (True, loaded.spec.fingerprint)
    assert len(loaded.fingerprint) == 64
    assert_same_results(loaded.caption(png_images(5)), captioner.caption(png_images(5)))


def test_published_weights_are_captioned_with_and_named_unverified(tmp_path: Path) -> None:
    write_published(tmp_path / "published")
    with pytest.warns(UserWarning, match="published' is unverified: no raycap.json vouches for its files"):
        captioner = Captioner.load(tmp_path / "published", prompt="two dogs", dtype="bf16")
    assert (captioner.verified, captioner.spec.text.prompt, captioner.dtype) == (False, "two dogs", "bf16")
    results = captioner.caption(png_images(3))
    assert [result.error_kind for result in results] == [None] * 3
    assert len({result.score for result in results}) == 3


def test_images_are_captioned_a_few_at_a_time_and_in_order(captioner: Captioner) -> None:
    images = png_images(7)
    images[4] = b"no image"
    together = captioner.caption(images)
    apart = captioner.caption(images, micro_batch_size=2)
    assert [(r.caption, r.error_kind) for r in apart] == [(r.caption, r.error_kind) for r in together]


@pytest.mark.parametrize("images", [png_images(1)[0], "photo.jpg", None, np.zeros((40, 40, 3), np.uint8)])
def test_what_is_no_list_of_images_is_refused(captioner: Captioner, images: object) -> None:
    with pytest.raises(
        TypeError, match=rf"images is {type(images).__name__}; give a list of images, also for a single"
    ):
        captioner.caption(images)  # type: ignore[arg-type]


@pytest.mark.parametrize("pixels", [np.zeros((1, 3, 32, 32), np.float32), np.zeros((1, 32, 32, 3), np.uint8)])
def test_prepared_pixels_of_another_type_or_shape_are_refused(
    captioner: Captioner, pixels: np.ndarray[Any, Any]
) -> None:
    with pytest.raises(ValueError, match=r"not uint8 \(images, 3, 32, 32\); prepare images with"):
        captioner.caption_prepared(pixels)
