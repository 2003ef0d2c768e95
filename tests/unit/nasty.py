"""Image files as strangers send them, made in code: each with what must become of it."""

import base64
import gzip
import io
import random
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from raycap.errors import ErrorKind

OK = None
Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Nasty:
    """kind: the error, or None if it decodes; then pixels, uint8 (H, W, 3), is exact where it is given."""

    name: str
    data: bytes
    kind: ErrorKind | None
    pixels: Pixels | None = None


@cache
def nasty_files() -> tuple[Nasty, ...]:
    return (*_no_images(), *_cut(), *_bombs(), *_damaged_png(), *_damaged_others(), *_odd_but_fine())


def photo(width: int = 48, height: int = 40, seed: int = 0) -> Image.Image:
    """Smooth areas, edges and some noise, as a photograph has them."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + 5 * c) + c) + np.cos(y / (7 - c)) + (x > width / 3) for c in range(3)]
    pixels = 90 + 40 * np.stack(waves, axis=2) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, format_name: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_name, **options)
    return buffer.getvalue()


def rgb(image: Image.Image) -> Pixels:
    return np.asarray(image.convert("RGB"))


def chunk(name: bytes, body: bytes) -> bytes:
    """A chunk of a PNG (PNG specification, section 5.3)."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(
    width: int,
    height: int,
    depth: int,
    colour: int,
    rows: bytes,
    *,
    before: bytes = b"",
    interlace: int = 0,
) -> bytes:
    """A PNG of raw rows, each with its filter byte. colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace))
    return SIGNATURE + header + before + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


SIGNATURE = b"\x89PNG\r\n\x1a\n"


def tiff(tags: dict[int, tuple[int, int]], strip: bytes = b"", *, next_ifd: int = 0, begin: int = 8) -> bytes:
    """A little-endian TIFF of one IFD at byte 8, its strip behind it. tags: number -> (type, value); type 3 short, 4 long.

    273 (StripOffsets) is set to where the strip lies unless given.
    """
    place = 8 + 2 + 12 * (len(tags) + (273 not in tags)) + 4
    entries = sorted({273: (4, place), **tags}.items())
    ifd = struct.pack("<H", len(entries))
    for number, (kind, value) in entries:
        ifd += struct.pack("<HHII", number, kind, 1, value)
    return b"II*\0" + struct.pack("<I", begin) + ifd + struct.pack("<I", next_ifd) + strip


def grey_tiff(width: int, height: int, bits: int, strip: bytes, **more: tuple[int, int]) -> dict[int, tuple[int, int]]:
    """Tags of an uncompressed grey TIFF in one strip."""
    tags = {256: (4, width), 257: (4, height), 258: (3, bits), 259: (3, 1), 262: (3, 1), 277: (3, 1), 278: (4, height)}
    return {**tags, 279: (4, len(strip))}


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) >= 1, old
    return data.replace(old, new, 1)


def jpeg_size(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with another size in its frame header, SOF0 or SOF2."""
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    return data[: place + 5] + struct.pack(">HH", height, width) + data[place + 9 :]


def avif_size(data: bytes, width: int, height: int) -> bytes:
    """The AVIF with another size in its `ispe` box."""
    place = data.index(b"ispe") + 8
    return data[:place] + struct.pack(">II", width, height) + data[place + 8 :]


def _no_images() -> Iterator[Nasty]:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"/>'
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("photo.png", encode(photo()))
    page = b"<!DOCTYPE html>\n<html><head><title>404</title></head><body><svg></svg></body></html>"
    for name, data in {
        "one byte": b"x",
        "zeros": b"\0" * 1000,
        "an HTML page as a JPEG": page,
        "an HTML page with a byte order mark": b"\xef\xbb\xbf" + page,
        "JSON": b'{"error": "rate limited"}',
        "text": b"Not Found",
        "random bytes": random.Random(0).randbytes(1000),
        "a PNG in base64": base64.b64encode(encode(photo())),
        "a data URL": b"data:image/png;base64," + base64.b64encode(encode(photo())),
        "a PNG, gzipped": gzip.compress(encode(photo()), mtime=0),
        "a zip of a PNG": archive.getvalue(),
        "a byte before a JPEG": b"\n" + encode(photo(), "JPEG"),
        "a WAV": b"RIFF\x24\0\0\0WAVEfmt " + b"\0" * 40,
        "a movie": b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2mp41" + b"\0" * 100,
    }.items():
        yield Nasty(name, data, ErrorKind.NOT_AN_IMAGE)
    yield Nasty("no bytes", b"", ErrorKind.EMPTY)
    for name, data in {
        "SVG": svg,
        "SVG with a declaration": b'<?xml version="1.0"?>\n' + svg,
        "SVG that reads a file": b'<?xml version="1.0"?><!DOCTYPE s [<!ENTITY x SYSTEM "file:///etc/passwd">]>' + svg,
        "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100,
        "HEIF": b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + b"\0" * 100,
        "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n",
        "PDF": b"%PDF-1.7\n1 0 obj\n",
        "PSD": b"8BPS\0\1" + b"\0" * 30,
        "ICO": encode(photo(), "ICO"),
        "PPM": encode(photo(), "PPM"),
        "JPEG 2000": encode(photo(), "JPEG2000"),
        "JPEG XL": b"\xff\x0a" + b"\0" * 30,
        "JPEG XL in a container": b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 30,
    }.items():
        yield Nasty(name, data, ErrorKind.UNSUPPORTED_FORMAT)


def _cut() -> Iterator[Nasty]:
    for format_name in ("JPEG", "PNG", "GIF", "BMP", "TIFF"):
        data = encode(photo(), format_name)
        yield Nasty(f"half a {format_name}", data[: len(data) // 2], ErrorKind.TRUNCATED)
    for format_name in ("WEBP", "AVIF"):
        data = encode(photo(), format_name)
        yield Nasty(f"half a {format_name}", data[: len(data) // 2], ErrorKind.CORRUPT)
    jpeg, progressive = encode(photo(), "JPEG"), encode(photo(), "JPEG", progressive=True)
    yield Nasty("a JPEG of two bytes", jpeg[:2], ErrorKind.NOT_AN_IMAGE)
    yield Nasty("a JPEG cut in its tables", jpeg[:60], ErrorKind.TRUNCATED)
    yield Nasty("a progressive JPEG cut in a late scan", progressive[: len(progressive) * 9 // 10], ErrorKind.TRUNCATED)
    yield Nasty("a JPEG without its last marker", jpeg[:-2], ErrorKind.TRUNCATED)
    data = encode(photo())
    yield Nasty("a PNG of its signature", SIGNATURE, ErrorKind.CORRUPT)
    yield Nasty("a PNG without its end", data[:-12], OK, rgb(photo()))
    yield Nasty("a GIF of its header", encode(photo(), "GIF")[:13], ErrorKind.CORRUPT)
    yield Nasty("a BMP of its header", encode(photo(), "BMP")[:54], ErrorKind.TRUNCATED)


def _bombs() -> Iterator[Nasty]:
    many = ErrorKind.TOO_MANY_PIXELS
    side = 9400
    yield Nasty("a PNG of 88 million black pixels", png(side, side, 1, 0, bytes(side * (1 + (side + 7) // 8))), many)
    for width, height in ((65_535, 65_535), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)):
        yield Nasty(f"a PNG that claims {width} x {height}", png(width, height, 8, 2, bytes(100)), many)
    jpeg = encode(photo(), "JPEG")
    yield Nasty("a JPEG that claims 65500 x 65500", jpeg_size(jpeg, 65_500, 65_500), many)
    yield Nasty("a JPEG that claims 7072 x 7072", jpeg_size(jpeg, 7072, 7072), many)
    gif = encode(photo(), "GIF")
    yield Nasty("a GIF that claims 65535 x 65535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:], many)
    bmp = encode(photo(), "BMP")
    yield Nasty("a BMP that claims 30000 x 30000", bmp[:18] + struct.pack("<ii", 30_000, 30_000) + bmp[26:54], many)
    canvas = struct.pack("<I", 16_382)[:3] + struct.pack("<I", 5999)[:3]
    body = b"VP8X" + struct.pack("<II", 10, 0x10) + canvas + encode(photo(), "WEBP", lossless=True)[12:]
    webp = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    yield Nasty("a WebP that claims a canvas of 98 million pixels", webp, many)
    yield Nasty("a TIFF that claims 100000 x 100000", tiff(grey_tiff(100_000, 100_000, 8, b"")), many)
    yield Nasty("an AVIF that claims 12000 x 8000", avif_size(encode(photo(), "AVIF"), 12_000, 8000), many)
    yield Nasty(
        "an AVIF that claims 30000 x 30000", avif_size(encode(photo(), "AVIF"), 30_000, 30_000), ErrorKind.CORRUPT
    )
    gif = encode(Image.new("P", (8, 8), 3), "GIF")
    frame = gif.index(b",\0\0\0\0")
    far = gif[: frame + 1] + struct.pack("<HH", 60_000, 60_000) + gif[frame + 5 :]
    yield Nasty("a GIF with a frame far outside its screen", far, many)
    thin = ErrorKind.BAD_DIMENSIONS
    for width, height in ((1, 65_000), (65_000, 1), (1, 1), (401, 4)):
        yield Nasty(f"a PNG of {width} x {height}", encode(Image.new("RGB", (width, height))), thin)
    profile = chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(20 * 2**20), 9))
    rows = b"\0" + bytes(3 * 8)
    yield Nasty("a PNG with a profile of 20 MB", png(8, 8, 8, 2, rows * 8, before=profile), ErrorKind.CORRUPT)
    text = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(20 * 2**20), 9))
    yield Nasty("a PNG with a text of 20 MB", png(8, 8, 8, 2, rows * 8, before=text), ErrorKind.CORRUPT)
    texts = chunk(b"zTXt", b"x\0\0" + zlib.compress(bytes(1_000_000), 9)) * 80
    yield Nasty("a PNG with 80 texts of 1 MB", png(8, 8, 8, 2, rows * 8, before=texts), ErrorKind.CORRUPT)
    overflow = png(8, 8, 8, 2, rows * 8 + bytes(20 * 2**20))
    yield Nasty("a PNG with 20 MB behind its rows", overflow, OK, np.zeros((8, 8, 3), np.uint8))


def _damaged_png() -> Iterator[Nasty]:
    corrupt = ErrorKind.CORRUPT
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    good = png(8, 8, 8, 2, rows)
    yield Nasty("a PNG of 0 x 0", png(0, 0, 8, 2, b""), corrupt)
    yield Nasty("a PNG whose header has a wrong checksum", good[:29] + b"\0\0\0\0" + good[33:], corrupt)
    body = good.index(b"IDAT")
    end = good.index(b"IEND") - 4
    # The compressed stream has a checksum of its own; whole pixels are not refused for what is around them.
    yield Nasty("a PNG whose pixels have a wrong checksum", good[: end - 4] + b"\0\0\0\0" + good[end:], OK, pixels)
    for length in (0xFFFFFFFF, 0x7FFFFFFF, 100_000):
        data = good[: body - 4] + struct.pack(">I", length) + good[body:]
        yield Nasty(f"a PNG with a chunk that claims {length} bytes", data, OK, pixels)
    yield Nasty("a PNG with a chunk that claims 3 bytes", good[: body - 4] + b"\0\0\0\3" + good[body:], corrupt)
    half = pixels.copy()
    half[4:] = 0
    yield Nasty("a PNG with half of its rows", png(8, 8, 8, 2, rows[: len(rows) // 2]), OK, half)
    yield Nasty("a PNG with a filter that does not exist", png(8, 8, 8, 2, b"\x09" + rows[1:]), corrupt)
    garbage = good[: body - 4] + chunk(b"IDAT", b"\xff" * 40) + chunk(b"IEND", b"")
    yield Nasty("a PNG whose pixels are not compressed data", garbage, corrupt)
    yield Nasty("a PNG without pixels", good[: body - 4] + chunk(b"IEND", b""), corrupt)
    yield Nasty("a PNG of 3 bits a pixel", png(8, 8, 3, 0, rows), corrupt)
    yield Nasty("a palette PNG without its palette", png(8, 8, 8, 3, (b"\0" + bytes(8)) * 8), corrupt)
    short = chunk(b"PLTE", bytes((10, 20, 30)))
    past = png(8, 8, 8, 3, (b"\0" + b"\x07" * 8) * 8, before=short)
    yield Nasty("a palette PNG with colours that are not there", past, OK, np.zeros((8, 8, 3), np.uint8))


def _damaged_others() -> Iterator[Nasty]:
    corrupt, truncated = ErrorKind.CORRUPT, ErrorKind.TRUNCATED
    jpeg = encode(photo(), "JPEG")
    table = jpeg.index(b"\xff\xdb") + 2
    yield Nasty("a JPEG whose table claims 65535 bytes", jpeg[:table] + b"\xff\xff" + jpeg[table + 2 :], truncated)
    yield Nasty("a JPEG of height 0", jpeg_size(jpeg, 48, 0), corrupt)
    yield Nasty("a JPEG of 12 bits a channel", replaced(jpeg, b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), corrupt)
    yield Nasty("a JPEG without tables", jpeg[:2] + jpeg[jpeg.index(b"\xff\xc0") :], corrupt)
    gif = encode(photo(), "GIF")
    frame = gif.index(b",\0\0\0\0")
    yield Nasty("a GIF without frames", gif[:frame] + b";", corrupt)
    yield Nasty("a GIF whose code size is 200", gif[: frame + 10] + b"\xc8" + gif[frame + 11 :], corrupt)
    yield Nasty("a BMP of 7 bits a pixel", replaced(encode(photo(), "BMP"), b"\1\0\x18\0", b"\1\0\x07\0"), corrupt)
    yield Nasty("a BMP with a header of 5 bytes", replaced(encode(photo(), "BMP"), b"\x28\0\0\0", b"\5\0\0\0"), corrupt)
    webp = encode(photo(), "WEBP")
    yield Nasty("a WebP without a key frame", webp[:23] + b"\0\0\0" + webp[26:], corrupt)
    avif = encode(photo(), "AVIF")
    body = avif.index(b"mdat") + 4
    yield Nasty("an AVIF with ones for pixels", avif[:body] + b"\xff" * (len(avif) - body), corrupt)
    strip = bytes(64)
    tags = grey_tiff(8, 8, 8, strip)
    yield Nasty("a TIFF whose directory lies behind its end", tiff(tags, strip, begin=10_000), corrupt)
    yield Nasty("a TIFF whose pixels lie behind its end", tiff({**tags, 273: (4, 10_000)}, strip), truncated)
    yield Nasty("a TIFF without a size", tiff({k: v for k, v in tags.items() if k != 256}, strip), corrupt)
    yield Nasty("a TIFF of 77 bits a pixel", tiff({**tags, 258: (3, 77)}, strip), corrupt)
    yield Nasty("a TIFF with an unknown compression", tiff({**tags, 259: (3, 999)}, strip), corrupt)
    yield Nasty("a TIFF that claims LZW and is not", tiff({**tags, 259: (3, 5)}, b"\xff" * 64), corrupt)
    yield Nasty("a TIFF of floats", encode(Image.new("F", (8, 8), float("nan")), "TIFF"), ErrorKind.UNSUPPORTED_MODE)
    yield Nasty("a TIFF of 32-bit integers", encode(Image.new("I", (8, 8), 7), "TIFF"), ErrorKind.UNSUPPORTED_MODE)


def _odd_but_fine() -> Iterator[Nasty]:
    image = photo()
    pixels = rgb(image)
    jpeg = encode(image, "JPEG")
    decoded = rgb(Image.open(io.BytesIO(jpeg)))
    archive = io.BytesIO(jpeg)
    with zipfile.ZipFile(archive, "a") as z:
        z.writestr("payload.js", "alert(1)")
    yield Nasty("a JPEG that is a zip as well", archive.getvalue(), OK, decoded)
    yield Nasty("a JPEG with a page behind it", jpeg + b"<script>alert(1)</script>", OK, decoded)
    bad_exif = b"Exif\0\0MM\0*\xff\xff\xff\xff" + b"\xee" * 40
    yield Nasty("a JPEG with broken EXIF", encode(image, "JPEG", exif=bad_exif), OK, decoded)
    for value in (0, 9, 99):
        exif = Image.Exif()
        exif[0x0112] = value
        yield Nasty(f"a JPEG of the orientation {value}", encode(image, "JPEG", exif=exif), OK, decoded)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield Nasty("a JPEG that lies on its side", encode(image, "JPEG", exif=exif), OK, np.rot90(decoded, -1))
    yield Nasty("a PNG that lies on its side", encode(image, exif=exif), OK, np.rot90(pixels, -1))
    yield Nasty("a TIFF that lies on its side", encode(image, "TIFF", exif=exif), OK, np.rot90(pixels, -1))
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>'
    yield Nasty("a JPEG on its side by its XMP", encode(image, "JPEG", xmp=xmp), OK, np.rot90(decoded, -1))

    cmyk = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=100)  # no ink but magenta and yellow
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (16, 16, 3))
    yield Nasty("a CMYK JPEG", cmyk, OK, red)
    adobe = cmyk.index(b"\xff\xee")
    bare = cmyk[:adobe] + cmyk[adobe + 16 :]
    yield Nasty("a CMYK JPEG without Adobe's marker", bare, OK, red)  # browsers take it for inverted too
    yield Nasty("a CMYK TIFF", encode(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"), OK, red)

    rows = b"".join(b"\0" + bytes((0x80, 0xFF, 0x10, 0x01, 0xFE, 0xFF) * 4) for _ in range(4))
    sixteen = np.broadcast_to(np.array([0x80, 0x10, 0xFE], np.uint8), (4, 4, 3))
    yield Nasty("a PNG of 16-bit RGB", png(4, 4, 16, 2, rows), OK, sixteen)
    rows = b"".join(b"\0" + bytes((0x80, 0x80, 0xFF, 0xFF) * 4) for _ in range(4))
    yield Nasty("a PNG of 16-bit grey and alpha", png(4, 4, 16, 4, rows), OK, np.full((4, 4, 3), 0x80, np.uint8))
    rows = b"".join(b"\0" + struct.pack(">4H", 0, 257, 0x8080, 65_535) for _ in range(4))
    grey = np.broadcast_to(np.array([0, 1, 0x80, 255], np.uint8)[None, :, None], (4, 4, 3))
    yield Nasty("a PNG of 16-bit grey", png(4, 4, 16, 0, rows), OK, grey)
    clear = grey.copy()
    clear[:, 1] = 255
    before = chunk(b"tRNS", struct.pack(">H", 257))
    yield Nasty("a PNG of 16-bit grey, one shade transparent", png(4, 4, 16, 0, rows, before=before), OK, clear)
    strip = struct.pack("<4H", 0, 257, 0x8080, 65_535) * 4
    yield Nasty("a TIFF of 16-bit grey", tiff(grey_tiff(4, 4, 16, strip), strip), OK, grey)
    white_is_zero = {**grey_tiff(4, 4, 16, strip), 262: (3, 0)}
    yield Nasty("a TIFF of 16-bit grey, white is zero", tiff(white_is_zero, strip), OK, 255 - grey)
    strip = bytes((0x00, 0x08, 0x00, 0xFF, 0xF0, 0x10)) * 4  # 0, 2048, 4095, 16
    twelve = np.broadcast_to(np.array([0, 127, 255, 0], np.uint8)[None, :, None], (4, 4, 3))
    yield Nasty("a TIFF of 12-bit grey", tiff(grey_tiff(4, 4, 12, strip), strip), OK, twelve)
    bits = np.array([[0, 255] * 4, [255, 0] * 4] * 4, np.uint8)[:, :, None].repeat(3, 2)
    rows = b"\0\x55\0\xaa" * 4
    yield Nasty("a PNG of 1 bit", png(8, 8, 1, 0, rows), OK, bits)
    clear = np.full((8, 8, 3), 255, np.uint8)
    yield Nasty("a PNG of 1 bit, black transparent", png(8, 8, 1, 0, rows, before=chunk(b"tRNS", b"\0\0")), OK, clear)
    palette = chunk(b"PLTE", bytes((10, 20, 30, 200, 100, 0))) + chunk(b"tRNS", bytes((255, 0)))
    laid = np.full((8, 8, 3), 255, np.uint8)
    laid[bits[:, :, 0] == 0] = (10, 20, 30)
    yield Nasty("a palette PNG, one colour transparent", png(8, 8, 1, 3, rows, before=palette), OK, laid)
    half = chunk(b"PLTE", bytes((0, 0, 0, 200, 100, 0))) + chunk(b"tRNS", bytes((128,)))
    laid = np.full((8, 8, 3), (200, 100, 0), np.uint8)
    laid[bits[:, :, 0] == 0] = 127
    yield Nasty("a palette PNG, one colour half transparent", png(8, 8, 1, 3, rows, before=half), OK, laid)

    frames = [Image.new("RGB", (8, 8), colour) for colour in ((200, 30, 40), (0, 255, 0), (0, 0, 255))]
    first = rgb(frames[0])
    for format_name, options in (("GIF", {}), ("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True})):
        data = encode(frames[0], format_name, save_all=True, append_images=frames[1:], **options)
        yield Nasty(f"an animated {format_name}", data, OK, first)
    yield Nasty("an animated AVIF", encode(frames[0], "AVIF", save_all=True, append_images=frames[1:]), OK)
    data = encode(frames[0], "GIF", save_all=True, append_images=[frames[1], frames[0]] * 1000)
    yield Nasty("a GIF of 2001 frames", data, OK, first)
    yield Nasty("two JPEGs in an MPO", encode(image, "MPO", save_all=True, append_images=[image]), OK, decoded)
    strip = bytes(range(64))
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8)[:, :, None].repeat(3, 2)
    yield Nasty("a TIFF whose pages go round", tiff(grey_tiff(8, 8, 8, strip), strip, next_ifd=8), OK, ramp)
    bmp = encode(image, "BMP")
    flipped = bmp[:22] + struct.pack("<i", -image.height) + bmp[26:]
    yield Nasty("a BMP from top to bottom", flipped, OK, pixels[::-1])
    gif = encode(Image.new("P", (8, 8), 3), "GIF")
    frame = gif.index(b",\0\0\0\0")
    outside = gif[: frame + 1] + struct.pack("<HH", 4, 4) + gif[frame + 5 :]
    yield Nasty("a GIF whose frame lies outside its screen", outside, OK)
    yield Nasty("a WebP whose size is wrong", replaced_size(encode(image, "WEBP", lossless=True)), ErrorKind.CORRUPT)


def replaced_size(webp: bytes) -> bytes:
    return webp[:4] + struct.pack("<I", 2**31) + webp[8:]


@cache
def scan_bomb() -> bytes:
    """A progressive JPEG of 2 million pixels whose last scan comes 20,000 times: 250 KB, minutes to decode, no error."""
    image = Image.new("L", (1600, 1280), 90)
    data = encode(image, "JPEG", progressive=True, quality=50)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * 20_000 + data[-2:]
