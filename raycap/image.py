"""Encoded bytes -> uint8 RGB -> uint8 (3, S, S): the one way an image is decoded and resized, for every door.

Owns no batching and no normalisation (that happens on the model's device, see `normalize`).
"""

import contextlib
import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from raycap.errors import ErrorKind, ImageError
from raycap.schema import ImageSpec

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_BYTES = 64 * 2**20
MAX_PIXELS = 50_000_000  # a 10.8 KB PNG can claim 88 million; Pillow refuses only above 179 million
MAX_ASPECT = 100
Image.MAX_IMAGE_PIXELS = MAX_PIXELS

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
    **{b"ftyp" + brand: "HEIC" for brand in (b"heic", b"heix", b"mif1", b"msf1")},
}


def decode_image(data: bytes) -> Pixels:
    """uint8 RGB (H, W, 3) of the first frame, upright by its EXIF orientation, transparency on white.

    The content decides the format, never a suffix. Raises ImageError.
    """
    if not data:
        raise ImageError(ErrorKind.EMPTY, "the image holds no bytes")
    if len(data) > MAX_BYTES:
        raise ImageError(ErrorKind.TOO_MANY_BYTES, f"the image holds {len(data)} bytes, more than {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of oddities that do not change the pixels
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_dimensions(*image.size)
            image.load()
            return _to_rgb(image)
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise _unidentified(data) from error
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorKind.TOO_MANY_PIXELS, str(error)) from error
    except Exception as error:  # Pillow's plugins raise a dozen types on damaged bytes, AVIF's a bare RuntimeError
        kind = ErrorKind.TRUNCATED if "truncated" in str(error).lower() else ErrorKind.CORRUPT
        raise ImageError(kind, f"the image cannot be decoded: {error}") from error


def _unidentified(data: bytes) -> ImageError:
    """What to say of bytes that no decoder takes: a damaged header, a format that is not read, or no image at all."""
    for name in FORMATS:
        _, accepts = Image.OPEN[name]
        if accepts and accepts(data[:16]):
            return ImageError(ErrorKind.CORRUPT, f"the image begins as {name} but its header cannot be read")
    for start, name in _OTHER_FORMATS.items():
        if data.startswith(start) or (name == "HEIC" and data[4:].startswith(start)):
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


def _to_rgb(image: Image.Image) -> Pixels:
    with contextlib.suppress(Exception):  # broken EXIF says nothing about the pixels
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ImageError(ErrorKind.UNSUPPORTED_MODE, "floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # 16-bit greyscale: convert("RGB") would clip it to white
        grey = np.clip(np.asarray(image, dtype=np.int64) // 257, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba)
    return np.asarray(image.convert("RGB"))


def prepare_image(image: Pixels, spec: ImageSpec) -> Pixels:
    """uint8 (3, S, S) of a uint8 RGB (H, W, 3) image: bicubic to a square, as BLIP's own preprocessing squeezes it.

    Raises ImageError for another array, and for one that decode_image would call too thin or too large.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ImageError(
            ErrorKind.UNSUPPORTED_MODE,
            f"an array of {image.dtype} {image.shape} is no uint8 RGB image (height, width, 3); convert it",
        )
    _check_dimensions(image.shape[1], image.shape[0])
    if image.shape[:2] != (spec.size, spec.size):
        resized = Image.fromarray(image).resize((spec.size, spec.size), Image.Resampling.BICUBIC)
        image = np.asarray(resized)
    return np.ascontiguousarray(image.transpose(2, 0, 1))


def normalize(pixels: "torch.Tensor", spec: ImageSpec) -> "torch.Tensor":
    """float32 (B, 3, S, S) of uint8 (B, 3, S, S), on the device it lies on: scaled to [0, 1], then (x - mean) / std."""
    import torch

    mean = torch.tensor(spec.mean, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(spec.std, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std
