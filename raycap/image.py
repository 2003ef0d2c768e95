"""Encoded bytes -> uint8 RGB -> uint8 (3, S, S): the one way an image is decoded and resized, for every door.

Owns no batching and no normalisation (that happens on the model's device, see `normalize`).
"""

import contextlib
import io
import struct
import warnings
import zlib
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

# What Pillow's plugins let through on damaged files, beside OSError.
_DAMAGE = (OSError, ValueError, SyntaxError, TypeError, IndexError, KeyError, EOFError, OverflowError, MemoryError)


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
        raise ImageError(ErrorKind.NOT_AN_IMAGE, f"no image of the formats {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ImageError(ErrorKind.TOO_MANY_PIXELS, str(error)) from error
    except (*_DAMAGE, struct.error, zlib.error) as error:
        kind = ErrorKind.TRUNCATED if "truncated" in str(error).lower() else ErrorKind.CORRUPT
        raise ImageError(kind, f"the image cannot be decoded: {error}") from error


def _check_dimensions(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise ImageError(ErrorKind.TOO_MANY_PIXELS, f"{width} x {height} pixels are more than {MAX_PIXELS}")
    if min(width, height) < 2 or max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(ErrorKind.BAD_DIMENSIONS, f"{width} x {height} pixels: too thin to describe")


def _to_rgb(image: Image.Image) -> Pixels:
    with contextlib.suppress(*_DAMAGE):  # broken EXIF says nothing about the pixels
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
    """uint8 (3, S, S) of a uint8 RGB (H, W, 3) image: bicubic to a square, as BLIP's own preprocessing squeezes it."""
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
