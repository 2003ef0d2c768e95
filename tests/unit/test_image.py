"""raycap/image.py: every kind of image file becomes the pixels a viewer shows, and bad ones an ImageError with a kind."""

import io
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from cykooz_resizer import Resizer
from nasty import Nasty, encode, nasty_files, photo, png
from PIL import Image, ImageFile, ImageOps
from transformers import BitImageProcessorPil, BlipImageProcessorPil, CLIPImageProcessorPil, ViTImageProcessorPil

from raycap.errors import ErrorKind, ImageError
from raycap.image import (
    DAMAGE,
    FORMATS,
    MAX_PIXELS,
    PLUGINS,
    UNEXPECTED,
    decode_image,
    load_rgb,
    normalize,
    prepare_bytes,
    prepare_image,
)
from raycap.schema import ImageSpec

WHITE = [255, 255, 255]
RED = (200, 30, 40)


pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest undoes the filter that raycap.image sets


def kind_of(data: bytes) -> ErrorKind:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    return caught.value.kind


# ---- what is decoded


@pytest.mark.parametrize("format_name", ["PNG", "BMP", "TIFF", "GIF", "JPEG", "WEBP", "AVIF"])
def test_every_format_gives_rgb_bytes_of_its_size(format_name: str) -> None:
    image = photo(64, 48)
    lossless = {"PNG": {}, "BMP": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}
    decoded = decode_image(encode(image, format_name, **lossless.get(format_name, {})))
    assert (decoded.shape, decoded.dtype) == ((48, 64, 3), np.uint8)
    difference = np.abs(decoded.astype(int) - np.asarray(image).astype(int)).mean()
    assert difference == 0 if format_name in lossless else difference < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stands_upright_by_its_exif_orientation(orientation: int) -> None:
    upright = np.asarray(photo(16, 8))
    # What a camera stores for each value (EXIF 2.3, tag 0x0112): the inverse of what a viewer does.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(Image.fromarray(np.ascontiguousarray(stored)), exif=exif)
    assert np.array_equal(decode_image(data), upright)


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encode(photo(), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xee" * 40)
    assert np.array_equal(decode_image(data), decode_image(encode(photo(), "JPEG")))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "YCbCr", "LAB"])
def test_other_colour_spaces_become_rgb_as_pillow_converts_them(mode: str) -> None:
    image = photo().convert(mode) if mode != "LAB" else Image.new("LAB", (8, 8), (128, 128, 128))
    data = encode(image, "TIFF")
    assert np.array_equal(decode_image(data), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("file", nasty_files(), ids=lambda file: file.name)
def test_nasty_files_give_their_pixels_or_their_kind(file: Nasty) -> None:
    if file.kind is None:
        decoded = decode_image(file.data)
        assert (decoded.dtype, decoded.shape[2:]) == (np.uint8, (3,))
        assert file.pixels is None or np.array_equal(decoded, file.pixels)
    else:
        with pytest.raises(ImageError) as caught:
            decode_image(file.data)
        assert caught.value.kind == file.kind
        assert UNEXPECTED not in str(caught.value)


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    decoded = decode_image(
        encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    )  # no ink but magenta and yellow
    assert decoded[8, 8, 0] > 240
    assert decoded[8, 8, 1:].max() < 15


def test_transparency_is_laid_on_white() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([*RED, 0, 0, 255])
    palette.putpixel((0, 0), 0)
    decoded = decode_image(encode(palette, transparency=0))
    assert decoded[0, 0].tolist() == WHITE
    assert decoded[1, 1].tolist() == [0, 0, 255]

    rgb = Image.new("RGB", (4, 4), (0, 0, 255))
    rgb.putpixel((0, 0), RED)
    decoded = decode_image(encode(rgb, transparency=RED))
    assert decoded[0, 0].tolist() == WHITE
    assert decoded[1, 1].tolist() == [0, 0, 255]

    rgba = Image.new("RGBA", (4, 4), (*RED, 0))
    rgba.putpixel((1, 1), (*RED, 255))
    rgba.putpixel((2, 2), (0, 0, 0, 128))
    decoded = decode_image(encode(rgba))
    assert [decoded[i, i].tolist() for i in range(3)] == [WHITE, list(RED), [127, 127, 127]]

    grey = Image.new("LA", (4, 4), (0, 0))
    grey.putpixel((1, 1), (100, 255))
    decoded = decode_image(encode(grey))
    assert [decoded[i, i].tolist() for i in range(2)] == [WHITE, [100, 100, 100]]


@pytest.mark.parametrize("format_name", ["PNG", "TIFF"])
def test_sixteen_bit_grey_keeps_its_shades(format_name: str) -> None:
    shades = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    decoded = decode_image(encode(Image.fromarray(shades), format_name))
    assert np.array_equal(decoded[:, :, 0].ravel(), np.arange(256))
    assert np.array_equal(decoded[:, :, 0], decoded[:, :, 2])


@pytest.mark.parametrize("format_name", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_is_its_first_frame(format_name: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if format_name == "WEBP" else {}
    decoded = decode_image(encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options))
    assert decoded.shape == (8, 8, 3)
    assert (decoded == RED).all()


def test_the_content_decides_and_trailing_bytes_do_not_matter() -> None:
    image = photo()
    assert np.array_equal(decode_image(encode(image) + b"appended by a camera"), np.asarray(image))


# ---- JPEG, which another library decodes


def by_pillow(data: bytes) -> np.ndarray | str:
    """The pixels as Pillow alone decodes a file, or what it says of it."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            image.load()
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:
        return str(error)


def assert_as_by_pillow(data: bytes) -> str:
    """Returns what became of the file: "decoded" or the kind of its error."""
    expected = by_pillow(data)
    try:
        decoded = decode_image(data)
    except ImageError as error:
        if error.kind in (ErrorKind.BAD_DIMENSIONS, ErrorKind.TOO_MANY_PIXELS):
            return error.kind
        if not isinstance(expected, str):
            pytest.fail(f"Pillow decodes what is refused here: {error}")
        if expected not in str(error) and "cannot identify" not in expected:
            pytest.fail(f"Pillow says {expected!r}, not {str(error)!r}")
        return error.kind
    assert not isinstance(expected, str), f"Pillow refuses it: {expected}"
    assert np.array_equal(decoded, expected)
    return "decoded"


@pytest.mark.parametrize("size", [(64, 48), (65, 47), (17, 33), (2, 2), (3, 200)], ids=str)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_a_jpeg_of_any_subsampling_has_the_pixels_that_pillow_decodes(subsampling: str, size: tuple[int, int]) -> None:
    for quality in (30, 75, 90, 100):
        pixels = np.asarray(photo(*size, seed=quality))
        pixels = (
            pixels if subsampling != "Gray" else np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None].copy()
        )
        space = "GRAY" if subsampling == "Gray" else "RGB"
        data = simplejpeg.encode_jpeg(
            np.ascontiguousarray(pixels), quality, colorspace=space, colorsubsampling=subsampling
        )
        assert assert_as_by_pillow(data) == "decoded"
        again = encode(Image.open(io.BytesIO(data)), "JPEG", quality="keep", progressive=True)
        assert assert_as_by_pillow(again) == "decoded"


JPEG_KINDS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "restart markers": {"restart_marker_blocks": 2},
    "restart rows, progressive": {"restart_marker_rows": 1, "progressive": True},
    "optimised, no subsampling": {"optimize": True, "subsampling": 0},
    "RGB, not YCbCr": {"keep_rgb": True},
    "with a comment and a profile": {"comment": b"x" * 999, "icc_profile": b"profile" * 2000},
}


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS.keys())
def test_a_jpeg_of_any_kind_is_decoded_without_pillows_decoder_and_to_its_pixels(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    for mode in ("RGB", "L"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = encode(photo(61, 40).convert(mode), "JPEG", quality=90, exif=exif, **options)
            expected = by_pillow(data)
            with monkeypatch.context() as context:
                context.delattr(ImageFile.ImageFile, "load")
                decoded = decode_image(data)
            assert np.array_equal(decoded, expected)


@pytest.mark.parametrize("mode", ["CMYK", "MPO"])
def test_other_jpegs_are_left_to_pillow(mode: str) -> None:
    if mode == "MPO":
        data = encode(photo(), "MPO", save_all=True, append_images=[photo(seed=3)])
    else:
        data = encode(photo().convert(mode), "JPEG")
    assert assert_as_by_pillow(data) == "decoded"


@pytest.mark.parametrize("options", JPEG_KINDS.values(), ids=JPEG_KINDS.keys())
def test_damaged_jpegs_have_the_pixels_or_the_error_of_pillow(options: dict[str, object]) -> None:
    rng = random.Random(4)
    whole = encode(photo(48, 40), "JPEG", **options)
    outcomes = [assert_as_by_pillow(whole[:length]) for length in range(2, len(whole), max(1, len(whole) // 60))]
    for _ in range(150):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(data))
            match rng.randrange(4):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.choice((0, 0xFF, 0xD9, 0xDA, 0xC0))
                case 2:
                    del data[place : place + rng.randrange(1, 40)]
                case 3:
                    data[place:place] = rng.choice((b"\xff\xd9", b"\xff\xd0", rng.randbytes(3)))
        outcomes.append(assert_as_by_pillow(bytes(data)))
    assert {"decoded", "truncated"} <= set(outcomes)


def test_a_jpeg_with_two_headers_cannot_claim_one_size_and_be_decoded_at_another() -> None:
    small, large = encode(photo(32, 16), "JPEG"), encode(photo(320, 160), "JPEG")
    frame = large.index(b"\xff\xc0")
    end = frame + 2 + int.from_bytes(large[frame + 2 : frame + 4], "big")
    before = small.index(b"\xff\xc0")
    for data in (small[:before] + large[frame:end] + small[before:], small[:2] + large[frame:end] + small[2:]):
        assert_as_by_pillow(data)


# ---- JPEG at a fraction of its size


def soft_photo(width: int, height: int) -> Image.Image:
    """Like a camera's image, which has little in single pixels."""
    return photo(40, 30).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize(
    ("size", "at_least", "decoded"),
    [
        ((1200, 900), 100, (150, 113)),  # 1/8, rounded up
        ((1200, 900), 113, (150, 113)),
        ((1200, 900), 114, (300, 225)),  # 1/4
        ((1200, 900), 300, (450, 338)),  # 3/8
        ((1200, 900), 450, (600, 450)),  # 1/2
        ((1200, 900), 451, (1200, 900)),
        ((640, 480), 384, (640, 480)),  # 7/8 would do, but costs more than all of it
        ((100, 80), 384, (100, 80)),
    ],
)
def test_a_jpeg_is_decoded_at_the_smallest_fraction_that_is_large_enough(
    size: tuple[int, int], at_least: int, decoded: tuple[int, int]
) -> None:
    data = encode(soft_photo(*size), "JPEG", quality=90)
    image = load_rgb(data, at_least)
    assert (image.mode, image.size) == ("RGB", decoded)
    assert load_rgb(data).size == size
    nearby = np.asarray(load_rgb(data).resize(decoded, Image.Resampling.BOX)).astype(int)
    assert np.abs(np.asarray(image).astype(int) - nearby).mean() < 2


def test_only_jpegs_are_decoded_at_a_fraction() -> None:
    for image, format_name in ((photo(400, 300), "PNG"), (photo(400, 300).convert("CMYK"), "JPEG")):
        data = encode(image, format_name)
        assert load_rgb(data, 20).size == (400, 300)
        exact, fast = (prepare_bytes(data, ImageSpec(size=20, decode=decode)) for decode in ("exact", "fast"))
        assert np.abs(exact.pixels.astype(int) - fast.pixels).max() <= 2  # resized with fewer bits


def test_fast_resizing_is_within_two_levels_of_exact_and_mostly_equal() -> None:
    for width, height in ((640, 427), (427, 640), (300, 200), (1200, 900)):
        data = encode(photo(width, height), "PNG")
        exact, fast = (prepare_bytes(data, ImageSpec(size=224, decode=decode)) for decode in ("exact", "fast"))
        difference = np.abs(exact.pixels.astype(int) - fast.pixels)
        assert 0 < difference.max() <= 2
        assert difference.mean() < 0.01


@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_fast_preparation_is_close_to_exact_and_says_the_size_of_the_whole_image(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(soft_photo(1203, 901), "JPEG", quality=90, exif=exif)
    exact, fast = (prepare_bytes(data, ImageSpec(size=96, decode=decode)) for decode in ("exact", "fast"))
    size = (901, 1203) if orientation == 6 else (1203, 901)
    assert (fast.width, fast.height) == (exact.width, exact.height) == size
    difference = np.abs(fast.pixels.astype(int) - exact.pixels).mean()
    assert 0 < difference < 2
    cut = data[: len(data) * 2 // 3]
    errors = []
    for decode in ("exact", "fast"):
        with pytest.raises(ImageError) as caught:
            prepare_bytes(cut, ImageSpec(size=96, decode=decode))
        errors.append((caught.value.kind, str(caught.value)))
    assert errors[0] == errors[1]
    assert errors[0][0] == ErrorKind.TRUNCATED


def test_how_an_image_is_decoded_is_stored_and_was_exact_before_it_was() -> None:
    spec = ImageSpec(size=8, decode="fast")
    assert ImageSpec.from_dict(spec.to_dict()) == spec
    stored = ImageSpec(size=8).to_dict()
    del stored["decode"]
    assert ImageSpec.from_dict(stored).decode == "exact"
    with pytest.raises(ValueError, match="decode of an image is 'exact' or 'fast', not 'quick'; give one of the two"):
        ImageSpec.from_dict(spec.to_dict() | {"decode": "quick"})


def test_the_shorter_side_decides_the_fraction_that_a_jpeg_is_decoded_at() -> None:
    data = encode(soft_photo(600, 400), "JPEG", quality=90)
    spec = ImageSpec(size=140, fit="crop", shorter_side=200, decode="fast")
    assert (load_rgb(data, 140).height, load_rgb(data, 200).height) == (150, 200)
    fast = prepare_bytes(data, spec).pixels.astype(int)
    assert np.abs(fast - prepare_image(np.asarray(load_rgb(data, 200)), spec)).max() <= 2
    assert np.abs(fast - prepare_image(np.asarray(load_rgb(data, 140)), spec)).max() > 2


def test_a_shorter_side_is_stored_where_there_is_one_and_goes_with_a_crop() -> None:
    spec = ImageSpec(size=224, fit="crop", shorter_side=256)
    assert ImageSpec.from_dict(spec.to_dict()) == spec
    without = ImageSpec(size=224, fit="crop").to_dict()
    assert list(without) == ["size", "mean", "std", "decode", "resample", "fit"]  # as in the seals of older checkpoints
    assert ImageSpec.from_dict(without) == ImageSpec(size=224, fit="crop")
    for fit, side in (("squash", 256), ("crop", 223), ("crop", 449), ("crop", -1)):
        with pytest.raises(
            ValueError, match=f"shorter_side of an image is {side}, its size 224 .* from size to twice size"
        ):
            replace(spec, fit=fit, shorter_side=side)


# ---- what is refused


def test_bytes_that_are_no_image() -> None:
    assert kind_of(b"") == ErrorKind.EMPTY
    page = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body><svg></svg></body></html>"
    for data in (page, b"\0" * 1000, b"{}", b"x", random.Random(0).randbytes(1000)):
        assert kind_of(data) == ErrorKind.NOT_AN_IMAGE


def test_known_formats_that_are_not_read_are_named() -> None:
    with pytest.raises(ImageError, match="PNM is not read; convert it to one of JPEG, PNG"):
        decode_image(encode(photo(), "PPM"))
    others = [encode(photo(), name) for name in ("PPM", "EPS", "ICO", "JPEG2000", "PDF")]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
    others += [svg, b'<?xml version="1.0"?>\n' + svg, b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"]
    assert {kind_of(data) for data in others} == {ErrorKind.UNSUPPORTED_FORMAT}
    assert kind_of(encode(Image.new("F", (8, 8)), "TIFF")) == ErrorKind.UNSUPPORTED_MODE


def test_a_file_that_was_cut_is_told_from_one_that_is_no_image() -> None:
    for format_name in ("JPEG", "PNG", "BMP", "GIF"):
        data = encode(photo(), format_name)
        assert kind_of(data[: len(data) * 2 // 3]) == ErrorKind.TRUNCATED, format_name
    for format_name in FORMATS:
        data = encode(photo(), format_name)
        for length in (16, 20, 40, len(data) // 2):
            assert kind_of(data[:length]) in (ErrorKind.TRUNCATED, ErrorKind.CORRUPT), (format_name, length)


def test_a_small_file_that_claims_eighty_eight_million_pixels_is_refused_before_decoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    side = 9400
    data = png(side, side, 1, 0, bytes(side * (1 + (side + 7) // 8)))  # 1 bit a pixel
    assert len(data) < 12_000
    loaded = []
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: loaded.append(self))
    with pytest.raises(ImageError, match=rf"\(88360000 pixels\) exceeds limit of {MAX_PIXELS}") as caught:
        decode_image(data)
    assert caught.value.kind == ErrorKind.TOO_MANY_PIXELS
    assert not loaded


def test_too_many_bytes_and_too_thin_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ((1, 1), (1, 50), (401, 4)):
        assert kind_of(encode(Image.new("RGB", size))) == ErrorKind.BAD_DIMENSIONS
    assert decode_image(encode(Image.new("RGB", (400, 4)))).shape == (4, 400, 3)
    data = encode(photo())
    monkeypatch.setattr("raycap.image.MAX_BYTES", len(data) - 1)
    assert kind_of(data) == ErrorKind.TOO_MANY_BYTES


def test_a_damaged_avif_is_an_image_error() -> None:
    """Its decoder raises a bare RuntimeError, other than every other plugin of Pillow."""
    data = encode(photo(), "AVIF")
    body = data.index(b"mdat") + 4
    assert kind_of(data[:body] + b"\xff" * (len(data) - body)) == ErrorKind.CORRUPT


def test_five_hundred_mutations_raise_nothing_but_image_errors() -> None:
    rng = random.Random(20)
    seeds = [encode(photo(24, 16), name) for name in FORMATS]
    kinds: set[str] = set()
    for n in range(500):
        data = bytearray(seeds[n % len(seeds)])
        for _ in range(rng.choice((1, 1, 2, 8))):
            # Headers, where the parsers are, are at the beginning: half of the hits go there.
            place = rng.randrange(min(len(data), rng.choice((64, 4096))))
            match rng.randrange(5):
                case 0:
                    data[place] ^= 1 << rng.randrange(8)
                case 1:
                    data[place] = rng.randrange(256)
                case 2:
                    del data[place : place + rng.randrange(1, 9)]
                case 3:
                    data[place:place] = rng.randbytes(rng.randrange(1, 9))
                case 4:
                    data[place : place + 4] = rng.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"))
        try:
            decoded = decode_image(bytes(data))
        except ImageError as error:
            kinds.add(error.kind)
        else:
            kinds.add("decoded")
            assert decoded.dtype == np.uint8
            assert decoded.shape[2:] == (3,)
    assert kinds >= {"decoded", "corrupt", "truncated", "not_an_image"}


def test_an_error_that_no_decoder_is_known_to_raise_is_the_images_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object) -> None:
        raise ArithmeticError("seven")

    monkeypatch.setattr(PLUGINS[1].PngImageFile, "load", fail)
    with pytest.raises(ImageError, match="cannot be decoded, of an unexpected ArithmeticError: seven") as caught:
        decode_image(encode(photo()))
    assert caught.value.kind == ErrorKind.CORRUPT
    assert isinstance(caught.value.__cause__, ArithmeticError)
    assert not isinstance(caught.value.__cause__, DAMAGE)


@pytest.mark.parametrize("where", ["load", "getexif", "transpose", "resize"])
def test_memory_that_runs_out_is_an_error_of_its_own_wherever_it_does(
    where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(photo(), exif=exif)
    for owner in (PLUGINS[1].PngImageFile, Image.Image) if where != "resize" else (Resizer,):
        monkeypatch.setattr(owner, where, fail)
    with pytest.raises(ImageError, match="there is not enough memory") as caught:
        prepare_bytes(data, ImageSpec(size=8))
    assert caught.value.kind == ErrorKind.DECODER_MEMORY


def test_the_limit_on_pixels_holds_whatever_others_do_to_that_of_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = png(9400, 9400, 1, 0, b"")
    for limit in (None, 10**12):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ImageError, match=f"9400 x 9400 pixels are more than {MAX_PIXELS}") as caught:
            decode_image(bomb)
        assert caught.value.kind == ErrorKind.TOO_MANY_PIXELS


def test_no_image_processor_resets_the_limit_of_pillow() -> None:
    """A model's processor that set it to None once opened a server to bombs (CVE-2026-109229)."""
    from transformers import CLIPImageProcessor, ViTImageProcessor

    import raycap.captioner  # noqa: F401  all that a door loads

    for processor in (BlipImageProcessorPil, CLIPImageProcessor, ViTImageProcessor):
        processor()(photo(), return_tensors="np")
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS // 2


def test_only_the_plugins_of_the_formats_that_are_read_are_loaded() -> None:
    """Pillow itself adds PPM's, and MPO's for a JPEG of several; an image cannot reach any other."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from raycap.image import *\n"
        "for data in (b'no image', b'%!PS-Adobe-3.0 EPSF-3.0'):\n"
        "    try: decode_image(data)\n"
        "    except ImageError: pass\n"
        "print(*sorted(n[4:-11] for n in sys.modules if n.endswith('ImagePlugin')))"
    )
    done = subprocess.run([sys.executable, "-c", code, "."], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["Avif", "Bmp", "Gif", "Jpeg", "Png", "Ppm", "Tiff", "WebP"], done.stderr


def test_an_odd_image_warns_nobody_in_any_thread() -> None:
    """In a process of its own, for pytest sets filters of warnings for each test; -W error would turn one into an error."""
    code = (
        "import sys, threading; sys.path.insert(0, sys.argv[1]); from nasty import *; import raycap.image as i\n"
        "data = encode(photo(), 'JPEG', exif=b'Exif\\0\\0MM\\0*\\0\\0\\0\\x08\\0\\x05\\xff')\n"
        "large = encode(Image.new('1', (6000, 5000)))\n"
        "work = lambda: sys.stdout.write(f'{i.decode_image(data).shape} {i.decode_image(large).shape}\\n')\n"
        "threads = [threading.Thread(target=work) for _ in range(3)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; work()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines() == ["(40, 48, 3) (5000, 6000, 3)"] * 4, done.stderr
    assert not done.stderr


# ---- what the model sees


def test_bytes_are_prepared_as_their_decoded_image_is() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for size in (1, 8, 30):
        for data in (encode(photo(30, 20), exif=exif), encode(photo(30, 30)), encode(photo(41, 20).convert("LA"))):
            spec = ImageSpec(size=size)
            decoded = decode_image(data)
            prepared = prepare_bytes(data, spec)
            assert np.array_equal(prepared.pixels, prepare_image(decoded, spec))
            assert (prepared.height, prepared.width) == decoded.shape[:2]
            assert prepared.pixels.flags.c_contiguous


def test_a_prepared_image_is_a_bicubic_square_with_channels_first() -> None:
    image = photo(90, 41)
    prepared = prepare_image(np.asarray(image), ImageSpec(size=32))
    assert (prepared.shape, prepared.dtype) == ((3, 32, 32), np.uint8)
    assert prepared.flags.c_contiguous
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(prepared.astype(int) - expected).max() <= 1
    small = np.asarray(photo(32, 32))
    assert np.array_equal(prepare_image(small, ImageSpec(size=32)), small.transpose(2, 0, 1))


def test_arrays_that_are_no_rgb_image_are_image_errors() -> None:
    for array, kind in (
        (np.zeros((8, 8), np.uint8), ErrorKind.UNSUPPORTED_MODE),
        (np.zeros((8, 8, 4), np.uint8), ErrorKind.UNSUPPORTED_MODE),
        (np.zeros((8, 8, 3), np.float32), ErrorKind.UNSUPPORTED_MODE),
        (np.zeros((0, 8, 3), np.uint8), ErrorKind.BAD_DIMENSIONS),
        (np.zeros((2, 500, 3), np.uint8), ErrorKind.BAD_DIMENSIONS),
    ):
        with pytest.raises(ImageError) as caught:
            prepare_image(array, ImageSpec(size=8))
        assert caught.value.kind == kind


@pytest.mark.parametrize(("width", "height", "size"), [(640, 480, 384), (427, 640, 384), (64, 64, 96), (32, 32, 32)])
def test_pixel_values_equal_those_of_the_published_processor(width: int, height: int, size: int) -> None:
    """Within one grey level, 0.015, and nearly all within the rounding of the normalisation. The torchvision-backed
    processor resizes by other code, off by a level or two; BLIP was trained with Pillow.
    """
    image = photo(width, height, seed=1)
    published = BlipImageProcessorPil(size={"height": size, "width": size})
    expected = torch.as_tensor(np.asarray(published(image, return_tensors="np")["pixel_values"]))
    spec = ImageSpec(size=size, mean=tuple(published.image_mean), std=tuple(published.image_std))
    assert spec == ImageSpec(size=size)  # our defaults are the published ones
    prepared = prepare_image(decode_image(encode(image)), spec)
    ours = normalize(torch.from_numpy(prepared)[None], spec)
    assert ours.dtype == torch.float32
    difference = (ours - expected).abs()
    assert difference.max() < 1.001 / 255 / min(spec.std)
    assert (difference > 1e-5).float().mean() < 0.01


@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (224, 300), (333, 999), (100, 60), (64, 64)])
def test_cropped_and_bilinear_pixels_equal_those_of_clips_and_vits_processors(width: int, height: int) -> None:
    """CLIP's resizes the shorter side and keeps the middle; ViT's squeezes, bilinear."""
    image = photo(width, height, seed=2)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    vit = ViTImageProcessorPil(size={"height": 64, "width": 64})
    assert (int(clip.resample), int(vit.resample)) == (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    for processor, spec in (
        (clip, ImageSpec(size=64, fit="crop")),
        (vit, ImageSpec(size=64, resample="bilinear")),
    ):
        expected = processor(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
        exact = prepare_image(np.asarray(image), spec)
        fast = prepare_bytes(encode(image, "PNG"), replace(spec, decode="fast")).pixels
        for prepared, levels in ((exact, 1), (fast, 2)):
            assert (prepared.shape, prepared.flags.c_contiguous) == ((3, 64, 64), True)
            difference = np.abs(prepared.astype(int) - np.asarray(expected).astype(int))
            assert difference.max() <= levels
            assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize(("shorter_side", "size"), [(256, 224), (97, 64), (64, 63), (65, 65), (126, 63)])
@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (333, 999), (257, 256), (101, 67), (64, 64)])
def test_a_shorter_side_beyond_the_crop_gives_the_pixels_of_dinov2s_and_clips_processors(
    width: int, height: int, shorter_side: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = photo(width, height, seed=3)
    settings = {"size": {"shortest_edge": shorter_side}, "crop_size": {"height": size, "width": size}}
    spec = ImageSpec(size=size, fit="crop", shorter_side=shorter_side)
    exact = prepare_image(np.asarray(image), spec)
    fast = prepare_bytes(encode(image, "PNG"), replace(spec, decode="fast")).pixels
    monkeypatch.setattr("raycap.image.MAX_VECTOR_PIXELS", 0)
    large = prepare_image(np.asarray(image), spec)
    for processor in (BitImageProcessorPil(**settings), CLIPImageProcessorPil(**settings)):
        expected = processor(image, do_normalize=False, do_rescale=False, return_tensors="np")["pixel_values"][0]
        for prepared, levels in ((exact, 1), (fast, 2), (large, 0)):
            assert (prepared.shape, prepared.flags.c_contiguous) == ((3, size, size), True)
            difference = np.abs(prepared.astype(int) - np.asarray(expected).astype(int))
            assert difference.max() <= levels
            assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("size", [24, 96, 384])
def test_resized_pixels_are_within_one_level_of_pillows(size: int) -> None:
    """Noise of black and white is the worst case: every sum overshoots."""
    rng = np.random.default_rng(3)
    for width, height in (
        (size, size),
        (size, 50),
        (31, size),
        (200, 300),
        (300, 201),
        (97, 500),
        (640, 480),
        (2, 150),
    ):
        extremes = rng.integers(0, 2, (height, width, 3), np.uint8) * np.uint8(255)
        for image in (photo(width, height), soft_photo(width, height), Image.fromarray(extremes)):
            prepared = prepare_image(np.asarray(image), ImageSpec(size=size))
            expected = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
            difference = np.abs(prepared.astype(int) - expected)
            assert difference.max() <= 1, (width, height)
            assert (difference > 0).mean() < 0.02, (width, height)


def test_large_images_are_resized_by_pillow_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photo(60, 50)
    expected = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    monkeypatch.setattr("raycap.image.MAX_VECTOR_PIXELS", 60 * 50 - 1)
    assert np.array_equal(prepare_image(np.asarray(image), ImageSpec(size=32)), expected)


def test_the_coco_sample_has_the_pixels_of_the_published_processor() -> None:
    folder = os.environ.get("RAYCAP_TEST_COCO")
    if not folder:
        pytest.skip("RAYCAP_TEST_COCO names no folder of COCO images")
    files = sorted(Path(folder).rglob("*.jpg"))
    assert files
    published = BlipImageProcessorPil(do_rescale=False, do_normalize=False)
    for file in files:
        expected = published(Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"][0]
        exact = prepare_bytes(file.read_bytes(), ImageSpec(size=384)).pixels
        assert np.abs(exact.astype(int) - np.asarray(expected).astype(int)).max() <= 1, file.name


PREPARED_IN_A_PROGRAM = """
import resource, sys
from raycap.image import prepare_given
from raycap.schema import ImageSpec

data = sys.stdin.buffer.read()
for n in range(30):
    if n == 10:
        begun = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    prepare_given(data, ImageSpec(size=384))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begun) // 20)
"""


def test_a_program_reuses_the_memory_of_one_image_for_the_next() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), np.uint8)
    done = subprocess.run(
        [sys.executable, "-c", PREPARED_IN_A_PROGRAM], input=encode(Image.fromarray(noise), "JPEG"), capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100  # page faults an image: 1,854 where glibc gives memory back after each
