"""Thousands of damaged images through the decoder processes: each gives pixels or an error of a known kind, none a surprise.

RAYCAP_FUZZ_IMAGES says how many (5,000 unless set). Image n is a function of n alone: `mutated(n)` makes it again.
"""

import os
import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from functools import cache

import pytest
from nasty import avif_size, encode, jpeg_size, photo
from PIL import Image

from raycap.decode_pool import DecodePool
from raycap.errors import ErrorKind, ImageError
from raycap.image import UNEXPECTED, Prepared
from raycap.schema import ImageSpec

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

NUM_IMAGES = int(os.environ.get("RAYCAP_FUZZ_IMAGES", "5000"))
SPEC = ImageSpec(size=16)
EXTREMES = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\0\0\0\1", b"\1\0\0\0", b"\0\1\0\0")
SIDES = (0, 1, 2, 3, 39, 41, 47, 49, 100, 2000, 7000, 16_383, 32_768, 65_535)


@cache
def seeds() -> tuple[bytes, ...]:
    """Small images of every format and of the modes and options that take another way through its decoder."""
    image = photo()
    grey = image.convert("L")
    rgba = image.copy()
    rgba.putalpha(grey)
    palette = image.quantize(32)
    sixteen = Image.frombytes("I;16", (48, 40), bytes(range(256)) * 15)
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "a camera"
    more = {"save_all": True, "append_images": [photo(seed=1), photo(seed=2)]}
    return (
        encode(image, "JPEG", exif=exif),
        encode(image, "JPEG", progressive=True, subsampling=0),
        encode(grey, "JPEG", restart_marker_blocks=2),
        encode(image.convert("CMYK"), "JPEG"),
        encode(image, "MPO", **more),
        encode(image, exif=exif),
        encode(rgba),
        encode(palette, transparency=3, bits=8),
        encode(rgba.convert("LA")),
        encode(grey.convert("1")),
        encode(sixteen),
        encode(image, **more),
        encode(image, "WEBP", exif=exif),
        encode(rgba, "WEBP", lossless=True),
        encode(image, "WEBP", **more),
        encode(palette, "GIF", transparency=3),
        encode(image, "GIF", **more),
        encode(image, "BMP"),
        encode(palette, "BMP"),
        encode(image, "TIFF", exif=exif),
        encode(image, "TIFF", compression="tiff_lzw"),
        encode(image, "TIFF", compression="jpeg"),
        encode(rgba, "TIFF", compression="tiff_adobe_deflate"),
        encode(sixteen, "TIFF", compression="packbits"),
        encode(grey.convert("1"), "TIFF", compression="group4"),
        encode(image.convert("CMYK"), "TIFF"),
        encode(photo(), "TIFF", save_all=True, append_images=[photo(seed=1)]),  # a JPEG's options stay with an image
        encode(image, "AVIF", exif=exif),
        encode(rgba, "AVIF"),
        encode(image, "AVIF", **more),
    )


def mutated(n: int) -> bytes:
    """The n-th damaged image."""
    rng = random.Random(n)
    data = bytearray(rng.choice(seeds()))
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if data:
            rng.choice(MUTATIONS)(data, rng)
    if rng.random() < 0.7:
        _repair_png(data)
    return bytes(data)


def _place(data: bytearray, rng: random.Random) -> int:
    """Half of the time in the beginning, where headers and their parsers are."""
    return rng.randrange(min(len(data), rng.choice((64, 1 << 20))))


def _flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 1, 8, 64))):
        data[_place(data, rng)] ^= 1 << rng.randrange(8)


def _set_bytes(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    run = rng.randrange(1, 9)
    data[place : place + run] = rng.choice((rng.randbytes(run), bytes(run), b"\xff" * run))


def _truncate(data: bytearray, rng: random.Random) -> None:
    del data[_place(data, rng) :]


def _cut_out(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    del data[place : place + rng.choice((1, 2, 4, 100))]


def _splice(data: bytearray, rng: random.Random) -> None:
    """Put a piece of another image in, or in the place of as many bytes."""
    other = rng.choice(seeds())
    begin = rng.randrange(len(other))
    piece = other[begin : begin + rng.choice((4, 32, 500, len(other)))]
    place = _place(data, rng)
    data[place : place + rng.choice((0, len(piece)))] = piece


def _repeat(data: bytearray, rng: random.Random) -> None:
    place = _place(data, rng)
    data[place:place] = data[place : place + rng.choice((2, 16, 200))] * rng.choice((1, 2, 50))


def _set_length(data: bytearray, rng: random.Random) -> None:
    """Something that may be the length of a chunk, a box or a segment becomes an extreme."""
    before = (b"IDAT", b"tRNS", b"PLTE", b"eXIf", b"acTL", b"fcTL", b"mdat", b"meta", b"iloc", b"ispe", b"ftyp")
    behind = (b"VP8 ", b"VP8L", b"VP8X", b"ANMF")
    places = [data.find(mark) - 4 for mark in before] + [data.find(mark) + 4 for mark in behind]
    places += [data.find(bytes((0xFF, mark))) + 2 for mark in (0xC0, 0xC2, 0xC4, 0xDA, 0xDB, 0xE1, 0xE2)]
    place = rng.choice([place for place in places if place > 3] or [_place(data, rng)])
    size = rng.choice((2, 4))
    data[place : place + size] = rng.choice(EXTREMES)[-size:]


def _set_size(data: bytearray, rng: random.Random) -> None:
    """Another width and height in the header."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    whole = bytes(data)
    if whole.startswith(b"\x89PNG"):
        data[16:24] = struct.pack(">II", width, height)
    elif whole.startswith(b"GIF8"):
        data[6:10] = struct.pack("<HH", width, height)
    elif whole.startswith(b"BM"):
        data[18:26] = struct.pack("<ii", width, rng.choice((1, -1)) * height)
    elif whole.startswith(b"\xff\xd8") and (b"\xff\xc0" in whole or b"\xff\xc2" in whole):
        data[:] = jpeg_size(whole, width, height)
    elif b"ispe" in whole:
        data[:] = avif_size(whole, width, height)
    elif whole.startswith(b"II*\0"):
        for tag in (256, 257, 277, 278, 258, 322, 323):  # a size, bits, samples or strips and tiles
            place = whole.find(struct.pack("<H", tag))
            if place > 0 and rng.random() < 0.5:
                data[place + 8 : place + 12] = struct.pack("<I", rng.choice(SIDES))
    elif b"VP8X" in whole[:16]:
        data[24:30] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    else:
        data[26:30] = struct.pack("<HH", width, height)


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    _flip_bits,
    _set_bytes,
    _truncate,
    _cut_out,
    _splice,
    _repeat,
    _set_length,
    _set_size,
)


def _repair_png(data: bytearray) -> None:
    """Checksums of a PNG's chunks made right again, so that what is wrong in them is read."""
    place = 8
    while data.startswith(b"\x89PNG") and place + 12 <= len(data):
        (length,) = struct.unpack(">I", data[place : place + 4])
        end = place + 8 + length
        if end + 4 > len(data):
            break
        data[end : end + 4] = struct.pack(">I", zlib.crc32(data[place + 4 : end]))
        place = end + 4


def test_damaged_images_give_pixels_or_an_error_of_a_known_kind() -> None:
    kinds: Counter[str] = Counter()
    surprises = []
    with DecodePool(2) as pool:
        for first in range(0, NUM_IMAGES, 250):
            numbers = range(first, min(first + 250, NUM_IMAGES))
            for n, result in zip(numbers, pool.prepare_all([mutated(n) for n in numbers], SPEC), strict=True):
                kinds[result.kind if isinstance(result, ImageError) else "ok"] += 1
                if isinstance(result, Prepared):
                    assert (result.pixels.shape, result.pixels.dtype) == ((3, 16, 16), "uint8")
                elif result.kind in (ErrorKind.DECODER_CRASH, ErrorKind.DECODER_TIMEOUT, ErrorKind.DECODER_MEMORY) or (
                    UNEXPECTED in str(result)
                ):
                    surprises.append(f"mutated({n}): {result.kind}: {result}")
    assert not surprises, "\n".join(surprises[:50])
    print(kinds)
    assert kinds.total() == NUM_IMAGES
    for kind in ("ok", "truncated", "corrupt", "not_an_image", "too_many_pixels", "bad_dimensions"):
        assert kinds[kind] > NUM_IMAGES / 500, (kind, kinds)  # the mutations reach every part of the decoder
