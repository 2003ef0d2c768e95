"""Encoded bytes -> uint8 RGB -> uint8 (3, S, S): the one way an image is decoded and resized, for every door.

Owns no batching and no normalisation (that happens on the model's device, see `normalize`).
"""

import contextlib
import ctypes
import io
import struct
import warnings
import zlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import simplejpeg
from cykooz_resizer import FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from raycap.errors import ErrorKind, ImageError
from raycap.schema import ImageSpec

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
EncodedImage = bytes | bytearray | memoryview

# The plugins of FORMATS, in their order. They are imported here because Image.open imports every one of Pillow for a missing one.
PLUGINS = (
    JpegImagePlugin,
    PngImagePlugin,
    WebPImagePlugin,
    GifImagePlugin,
    BmpImagePlugin,
    TiffImagePlugin,
    AvifImagePlugin,
)
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # a 10.8 KB PNG can claim 88 million; Pillow refuses only above 179 million
MAX_ASPECT = 100
MAX_VECTOR_PIXELS = (
    2**22
)  # beyond, decoding takes most of the time, and a decoder's process lacks the memory for 16-bit pixels
# Pillow refuses twice this, and that before WebP's decoder takes memory for its canvas, which _check_dimensions cannot.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
# The doors decode many images at once, and the memory of a decoder must not depend on the machine's cores.
AvifImagePlugin.DEFAULT_MAX_THREADS = 1

# What Pillow and its decoders raise of damaged bytes, as tests/fuzz finds. Anything else is a fault of the image too, for one
# image never ends a run, but its message says that it was not expected.
DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    RuntimeError,  # AVIF's decoder
    struct.error,
    zlib.error,
)
UNEXPECTED = "of an unexpected"

# Pillow warns of oddities that do not change the pixels. Once at import: warnings.catch_warnings is not safe between threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_FILTERS = {  # as Pillow's of these names; bicubic with a = -0.5
    "bicubic": ResizeOptions(ResizeAlg.convolution(FilterType.catmull_rom), use_alpha=False),
    "bilinear": ResizeOptions(ResizeAlg.convolution(FilterType.bilinear), use_alpha=False),
}

# What else lies in folders of images, by its first bytes: told apart from what is no image, never parsed.
_OTHER_FORMATS = {
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"8BPS": "PSD",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    **{b"P%d%c" % (number, space): "PNM" for number in range(1, 7) for space in b" \t\r\n"},
}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"mif1", b"msf1")  # of a file of ISO 23008-12, which may hold AVIF as well


@dataclass(frozen=True, slots=True)
class Prepared:
    """An image as the model takes it. pixels: uint8 (3, S, S). width, height: of the upright decoded image, in pixels."""

    pixels: Pixels
    width: int
    height: int


def prepare_given(image: EncodedImage | Pixels, spec: ImageSpec) -> Pixels:
    """uint8 (3, S, S) of encoded bytes or of a uint8 RGB array. Raises ImageError.

    For programs, whose memory it keeps as the jobs' processes do: see keep_freed_memory.
    """
    keep_freed_memory()
    return prepare_image(image, spec) if isinstance(image, np.ndarray) else prepare_bytes(bytes(image), spec).pixels


def prepare_bytes(data: bytes, spec: ImageSpec) -> Prepared:
    """The image in data, decoded and prepared in this process. Raises ImageError.

    With spec.decode "exact": prepare_image(decode_image(data), spec), without a copy between. With "fast": of
    load_rgb(data, spec.shorter_side or spec.size) instead, resized with weights of fewer bits: seen to be 2 levels off at
    most.
    """
    try:
        at_least = (spec.shorter_side or spec.size) if spec.decode == "fast" else None
        image, (width, height) = _decode(data, at_least)
        return Prepared(_square(image, spec, exact=spec.decode == "exact"), width, height)
    except MemoryError as error:
        raise _out_of_memory() from error


def decode_image(data: bytes) -> Pixels:
    """uint8 RGB (H, W, 3) of the first frame, upright by its EXIF orientation, transparency on white.

    The content decides the format, never a suffix. Colour profiles are not applied; a CMYK JPEG is taken to be inverted,
    as Adobe writes it and browsers read it. 16-bit colours keep their upper byte. Raises ImageError.
    """
    try:
        return np.asarray(_decode(data, None)[0])
    except MemoryError as error:
        raise _out_of_memory() from error


def load_rgb(data: bytes, at_least: int | None = None) -> Image.Image:
    """What decode_image returns, as an image of mode RGB. Raises ImageError.

    at_least: a JPEG may be decoded at 1/2, 3/8, 1/4 or 1/8 of its size, as long as neither side falls below so many
    pixels: several times faster, and close to, not equal to, the whole image reduced.
    """
    try:
        return _decode(data, at_least)[0]
    except MemoryError as error:
        raise _out_of_memory() from error


@cache
def keep_freed_memory() -> None:
    """Lets this process reuse the memory of one image for the next, for the price of up to 64 MB that it holds.

    By default glibc may give some megabytes back to the kernel after each image, and page faults then cost more than
    decoding: 3.7 of 7.5 ms for a photograph at 384 pixels in a Ray worker. Without glibc nothing is done.
    """
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def check_bytes(data: bytes, max_bytes: int = MAX_BYTES) -> None:
    """Raises ImageError if data holds no bytes, or more than max_bytes."""
    if not data:
        raise ImageError(ErrorKind.EMPTY, "the image holds no bytes")
    if len(data) > max_bytes:
        raise ImageError(ErrorKind.TOO_MANY_BYTES, f"the image holds {len(data)} bytes, more than {max_bytes}")


def _decode(data: bytes, at_least: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """What load_rgb returns, and (width, height) of the whole image, upright. Raises ImageError, and MemoryError."""
    check_bytes(data, MAX_BYTES)
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_dimensions(*image.size)
            rgb = _decode_jpeg(data, image, at_least)
            if rgb is None:
                image.load()
                vars(image).pop("_decoder", None)  # WebP's holds two more copies of the pixels; done with it
                rgb = _to_rgb(image)
            width, height = image.size
            orientation = _orientation(
                image
            )  # asked last, for some plugins load to answer, and TIFF's turns when it loads
        method = _UPRIGHT.get(orientation)
        if method is None:
            return rgb, (width, height)
        return rgb.transpose(method), (height, width) if orientation >= 5 else (width, height)
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        message = str(error).partition(", could")[0]  # Pillow goes on with a guess about attacks
        raise ImageError(ErrorKind.TOO_MANY_PIXELS, message) from error
    except DAMAGE as error:
        if "out of memory" in str(error).lower():
            raise _out_of_memory() from error
        kind = ErrorKind.TRUNCATED if "truncated" in str(error).lower() else ErrorKind.CORRUPT
        raise ImageError(kind, f"the image cannot be decoded: {error}") from error
    except Exception as error:
        message = f"the image cannot be decoded, {UNEXPECTED} {type(error).__qualname__}: {error}"
        raise ImageError(ErrorKind.CORRUPT, message) from error


def _decode_jpeg(data: bytes, header: Image.Image, at_least: int | None) -> Image.Image | None:
    """The pixels of an ordinary JPEG, not yet upright, as Pillow decodes them; None of what Pillow has to decode itself.

    Both use libjpeg-turbo, but simplejpeg gives it the whole file at once and takes a scaled size. What it refuses or
    warns of is left to Pillow, whose tolerance and messages are those of every other format.
    """
    if header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return None
    least = at_least or 0
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(data)
        if (width, height) != header.size:
            return None  # the file holds several headers, and the dimensions of another one were checked
        # With a factor below 2, as 7/8, libjpeg-turbo has no vector code and is slower than for the whole image.
        rgbx = simplejpeg.decode_jpeg(data, "RGBX", min_height=least, min_width=least, min_factor=2)
    except (ValueError, RuntimeError):
        return None
    height, width, _ = rgbx.shape
    # Pillow holds RGB with a fourth byte too, so it can look at these pixels where they lie.
    padded = Image.frombuffer("RGBX", (width, height), rgbx, "raw", "RGBX", 0, 1)
    return Image.fromarrow(padded, "RGB", (width, height))


def _out_of_memory() -> ImageError:
    return ImageError(ErrorKind.DECODER_MEMORY, "there is not enough memory to decode the image")


def _unidentified(data: bytes) -> ImageError:
    """What to say of bytes that no decoder takes: a damaged header, a format that is not read, or no image at all."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS and b"avi" not in data[16:64]:
        return _unsupported("HEIC")  # asked first, for Pillow takes some of them for AVIF
    for name in FORMATS:
        _, accepts = Image.OPEN[name]
        if accepts and accepts(data[:16]):
            return ImageError(ErrorKind.CORRUPT, f"the image begins as {name} but its header cannot be read")
    for start, name in _OTHER_FORMATS.items():
        if data.startswith(start):
            return _unsupported(name)
    if data.lstrip().startswith((b"<svg", b"<?xml")) and b"<svg" in data[:1000]:
        return _unsupported("SVG")
    return ImageError(ErrorKind.NOT_AN_IMAGE, f"no image of the formats {', '.join(FORMATS)}")


def _unsupported(name: str) -> ImageError:
    return ImageError(ErrorKind.UNSUPPORTED_FORMAT, f"{name} is not read; convert it to one of {', '.join(FORMATS)}")


def _check_dimensions(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(ErrorKind.TOO_MANY_PIXELS, f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if min(width, height) < 2 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(ErrorKind.BAD_DIMENSIONS, f"{width} x {height} pixels: too thin to describe")


def _to_rgb(image: Image.Image) -> Image.Image:
    """In the image's own orientation. Raises ImageError."""
    if image.mode == "F":
        raise ImageError(ErrorKind.UNSUPPORTED_MODE, "floating-point pixels have no defined range")
    if image.mode == "I":
        raise ImageError(ErrorKind.UNSUPPORTED_MODE, "32-bit integer pixels have no defined range")
    if image.mode.startswith("I;16"):
        return _sixteen_bit_grey(image)
    if image.mode == "P" and image.palette is None:
        raise ImageError(ErrorKind.CORRUPT, "the image cannot be decoded: its palette is missing")
    if image.has_transparency_data:
        return _on_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        return orientation if isinstance(orientation, int) else 1
    except MemoryError:
        raise
    except Exception:  # broken EXIF says nothing about the pixels
        return 1


def _sixteen_bit_grey(image: Image.Image) -> Image.Image:
    """Scaled to 8 bits: convert("RGB") would clip it to white. The transparent shade of a PNG is laid on white."""
    shades = np.asarray(image)
    highest, white_is_zero = 65_535, False
    if isinstance(image, TiffImagePlugin.TiffImageFile):  # Pillow leaves both to its user
        bits = image.tag_v2.get(TiffImagePlugin.BITSPERSAMPLE, (16,))
        highest = 2 ** bits[0] - 1
        white_is_zero = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0
    grey = (np.minimum(shades, highest).astype(np.uint32) * 255 // highest).astype(np.uint8)
    if white_is_zero:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[shades == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _on_white(image: Image.Image) -> Image.Image:
    """By strips of a million pixels: whole, it takes four copies of the image, more than a decoder's process may use."""
    rgb = Image.new("RGB", image.size)
    rows = max(1, 2**20 // image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height))).convert("RGBA")
        white = Image.new("RGBA", strip.size, (255, 255, 255, 255))
        rgb.paste(Image.alpha_composite(white, strip).convert("RGB"), (0, top))
    return rgb


def prepare_image(image: Pixels, spec: ImageSpec) -> Pixels:
    """uint8 (3, S, S) of a uint8 RGB (H, W, 3) image, resized and fitted as the spec says.

    Raises ImageError for another array, and for one that decode_image would call too thin or too large.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(
            ErrorKind.UNSUPPORTED_MODE,
            f"an array of {image.dtype} {image.shape} is no uint8 RGB image (height, width, 3); convert it",
        )
    _check_dimensions(image.shape[1], image.shape[0])
    return _square(Image.fromarray(image), spec)


def _square(image: Image.Image, spec: ImageSpec, *, exact: bool = True) -> Pixels:
    """uint8 (3, S, S), contiguous, of an RGB image: within one level of Pillow's resize, the same anywhere.

    Not exact: in half the time, and one value in a thousand differs from that, seen by 2 levels at most.

    Resized in vector code with weights of 15 bits, where Pillow's have 22. Pillow rounds to uint8 after the first of its
    two passes; ours computes that one with 16-bit pixels and weights to match, so what the second pass reads is the same,
    and its error, below 0.1, can only tip the last rounding.
    """
    (width, height), size = image.size, spec.size
    wide, high = size, size
    if spec.fit == "crop":  # as transformers' CLIPImageProcessor: the longer side is rounded down
        short = spec.shorter_side or size
        wide, high = (short, short * height // width) if width <= height else (short * width // height, short)
    left, top = (wide - size) // 2, (high - size) // 2
    if width * height > MAX_VECTOR_PIXELS:
        resized = image.resize((wide, high), Image.Resampling[spec.resample.upper()])
        cropped = resized.crop((left, top, left + size, top + size))
        return np.ascontiguousarray(np.asarray(cropped).transpose(2, 0, 1))
    vector = _FILTERS[spec.resample]
    # What Pillow 13 does: the height first where it is reduced by much more.
    between = (width, high) if height - high > max(0, 2 * (width - wide)) else (wide, height)
    # With a fourth byte: so Pillow holds them, and so vector code is fastest.
    rgbx = image.tobytes("raw", "RGBX")
    if exact:
        sixteen = np.frombuffer(rgbx, np.uint8).astype(np.uint16).tobytes()
        once = np.frombuffer(_resize(sixteen, image.size, between, PixelType.U16x4, vector), np.uint16)
        whole = once.astype(np.uint8)
        whole |= -(once > 255).view(np.uint8)  # overshoot becomes 255, as np.minimum does in three times the time
        rgbx = whole.tobytes()
    else:
        rgbx = _resize(rgbx, image.size, between, PixelType.U8x4, vector)
    twice = np.frombuffer(_resize(rgbx, between, (wide, high), PixelType.U8x4, vector), "<u4").reshape(high, wide)
    middle = twice[top : top + size, left : left + size]
    pixels = np.empty((3, size, size), np.uint8)
    for channel, shift in enumerate((0, 8, 16)):
        np.right_shift(middle, shift, out=pixels[channel], casting="unsafe")  # the lowest byte of what is left
    return pixels


def _resize(
    pixels: bytes, size: tuple[int, int], new_size: tuple[int, int], kind: PixelType, options: ResizeOptions
) -> bytes:
    target = ImageData(*new_size, kind)
    # A Resizer keeps memory of its own, so threads cannot share one; it costs nothing to make.
    Resizer().resize(ImageData(*size, kind, pixels), target, options)
    resized: bytes = target.get_buffer()
    return resized


def normalize(pixels: "torch.Tensor", spec: ImageSpec) -> "torch.Tensor":
    """float32 (B, 3, S, S) of uint8 (B, 3, S, S), on the device it lies on: scaled to [0, 1], then (x - mean) / std."""
    import torch

    mean = torch.tensor(spec.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
