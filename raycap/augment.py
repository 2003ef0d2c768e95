"""One image as training sees it: cropped, flipped and distorted at random, as BLIP was trained (salesforce/BLIP,
data/__init__.py, transform_train). Owns the draws and the operations; decoding is raycap/image.py's.

Every draw is a function of (seed, epoch, key) alone, so that a run that resumes, on any number of workers, sees the same
pixels. It neither reads nor changes the state of any random generator.

The laws of the operations are those of salesforce/BLIP, transform/randaugment.py, as salesforce/LAVIS carries it in
lavis/processors/randaugment.py: num_ops of the ten OPERATIONS are drawn with replacement, each is then applied with
probability 0.5, and a signed one turns either way. Its sharpness and its brightness have factor 1 at magnitude 5: there
they change nothing. Where it differs by a fraction of a pixel: it turns and shears with OpenCV, around a point half a
pixel away, and it resizes a crop that has been cut out, where here a crop's border sees its neighbours.
"""

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageOps

from raycap.errors import ErrorKind, ImageError
from raycap.image import load_rgb
from raycap.schema import ImageSpec

Flip = Literal["unsided", "always", "never"]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

# salesforce/BLIP, data/__init__.py, in its order
OPERATIONS = (
    "Identity",
    "AutoContrast",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
# randaugment.py: MAX_LEVEL, translate_const, replace_value, the factors of level_to_args, and get_random_ops' probability
MAX_MAGNITUDE = 10
MAX_SHEAR = 0.3
MAX_SHIFT = 10  # pixels of the resized image, whatever its size
MAX_DEGREES = 30
PROBABILITY = 0.5
GREY = (128, 128, 128)
# torchvision's RandomResizedCrop: the ratio of width to height, and how often a crop is drawn until one fits the image
MIN_RATIO, MAX_RATIO = 3 / 4, 4 / 3
NUM_TRIES = 10

# A word that begins with left or right, or does so behind a place as in "topleft", but those that never are sides.
_SIDE = re.compile(
    r"(?<![^\W_])(?:top|bottom|upper|lower|mid|middle|center|centre|front|back|rear|far)?"
    r"(?:left(?!overs?(?![^\W_]))|right(?!eous|ful|ly(?![^\W_])))",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentSpec:
    """How training images are changed at random. The defaults are BLIP's, but that it flips every second image.

    min_area: the smallest crop, as a share of the image; 1 gives nearly the whole image. flip: "unsided" mirrors every
    second image that no caption of names a side of, "always" every second image, "never" none. num_ops: how many
    operations are drawn for an image. magnitude: their strength, from 0 to 10. Raises ValueError for other values.
    """

    min_area: float = 0.5
    flip: Flip = "unsided"
    num_ops: int = 2
    magnitude: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= 1:  # nor NaN
            raise ValueError(f"min_area is {self.min_area}, a share of the image; give one above 0 and at most 1")
        if self.flip not in get_args(Flip):
            raise ValueError(f"flip is {self.flip!r}; give one of {', '.join(get_args(Flip))}")
        if self.num_ops < 0:
            raise ValueError(f"num_ops is {self.num_ops}; give 0 for no operation on the cropped image, or more")
        if not 0 <= self.magnitude <= MAX_MAGNITUDE:
            raise ValueError(f"magnitude is {self.magnitude}; give one from 0 to {MAX_MAGNITUDE}")


class Drawn(NamedTuple):
    """The draws of one image. box: the crop, within the image. operations: those to apply, in order, with their sign."""

    box: Box
    mirrored: bool
    operations: tuple[tuple[str, bool], ...]


def augment_bytes(
    data: bytes,
    spec: ImageSpec,
    augment: AugmentSpec,
    *,
    seed: int,
    epoch: int,
    key: str,
    captions: Sequence[str],
) -> npt.NDArray[np.uint8]:
    """uint8 (3, S, S), contiguous: the image in data as this epoch sees it. captions: all of the image's, whichever of
    them is trained on. The same arguments give the same pixels in every process. Raises ImageError.
    """
    try:
        image = load_rgb(data, smallest_side(spec.size, augment.min_area) if spec.decode == "fast" else None)
        drawn = draw_augmentation(augment, *image.size, seed=seed, epoch=epoch, key=key)
        image = image.resize((spec.size, spec.size), Image.Resampling[spec.resample.upper()], drawn.box)
        if drawn.mirrored and (augment.flip == "always" or not names_side(captions)):
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        for name, negative in drawn.operations:
            image = apply_operation(image, name, augment.magnitude, negative=negative)
        return np.stack([np.asarray(channel) for channel in image.split()])  # half the time of a transposed copy
    except MemoryError as error:
        raise ImageError(ErrorKind.DECODER_MEMORY, "there is not enough memory to augment the image") from error


def draw_augmentation(augment: AugmentSpec, width: int, height: int, *, seed: int, epoch: int, key: str) -> Drawn:
    """What happens to the image of this key, of width x height pixels, in this epoch."""
    num_before = 1 + 4 * NUM_TRIES
    draws = _draws(num_before + 3 * augment.num_ops, seed, epoch, key)
    operations = []
    for choice, applied, negative in zip(*(draws[num_before + i :: 3] for i in range(3)), strict=True):
        if applied < PROBABILITY:
            operations.append((OPERATIONS[int(choice * len(OPERATIONS))], negative < 0.5))
    mirrored = augment.flip != "never" and draws[0] < 0.5
    return Drawn(_crop(draws[1:num_before], width, height, augment.min_area), mirrored, tuple(operations))


def names_side(captions: Sequence[str]) -> bool:
    """Whether a mirrored image might not fit one of the captions, as it names left or right, in English.

    A word that begins with left or right counts ("left-hand", "rightmost", "top-right", "bottomleft"), also where it is
    none ("right now", "food left on a plate"), for an image too few is flipped cheaply and a captioner that takes left
    for right is not. Only what cannot be a side does not: "leftover", "rightful", "bright", "upright".
    """
    return any(_SIDE.search(caption) for caption in captions)


def smallest_side(size: int, min_area: float) -> int:
    """The shortest side an image may be reduced to, so that its smallest crop is still size pixels wide and high."""
    return math.ceil(size / math.sqrt(min_area * MIN_RATIO))


def apply_operation(image: Image.Image, name: str, magnitude: int, *, negative: bool) -> Image.Image:
    """The RGB image after one of OPERATIONS, of the same size; what comes from outside is GREY. negative: the other way,
    for those that have two. AutoContrast, Equalize and Identity have no strength.
    """
    level = magnitude / MAX_MAGNITUDE
    signed = -level if negative else level
    match name:
        case "Identity":
            return image
        case "AutoContrast":
            return ImageOps.autocontrast(image)
        case "Equalize":
            return ImageOps.equalize(image)
        case "Brightness" | "Sharpness":
            factor = level * 1.8 + 0.1
            if factor == 1:
                return image
            enhance = ImageEnhance.Brightness if name == "Brightness" else ImageEnhance.Sharpness
            return enhance(image).enhance(factor)
        case "ShearX":
            return _affine(image, (1, -signed * MAX_SHEAR, 0, 0, 1, 0))
        case "ShearY":
            return _affine(image, (1, 0, 0, -signed * MAX_SHEAR, 1, 0))
        case "TranslateX":
            return _shift(image, round(signed * MAX_SHIFT), 0)
        case "TranslateY":
            return _shift(image, 0, round(signed * MAX_SHIFT))
        case "Rotate":
            return image.rotate(signed * MAX_DEGREES, Image.Resampling.BILINEAR, fillcolor=GREY)
    raise AssertionError(name)


def _affine(image: Image.Image, matrix: tuple[float, float, float, float, float, float]) -> Image.Image:
    """matrix: from a pixel of the result to its place in the image."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR, fillcolor=GREY
    )


def _shift(image: Image.Image, right: int, down: int) -> Image.Image:
    shifted = Image.new("RGB", image.size, GREY)
    shifted.paste(image, (right, down))
    return shifted


def _crop(draws: Sequence[float], width: int, height: int, min_area: float) -> Box:
    """As torchvision's RandomResizedCrop draws it: the area evenly, the logarithm of the ratio evenly, again if that does
    not fit the image; and after NUM_TRIES the largest crop in the middle whose ratio is in its range.
    """
    for n in range(0, 4 * NUM_TRIES, 4):
        area = width * height * (min_area + (1 - min_area) * draws[n])
        ratio = MIN_RATIO * math.exp(math.log(MAX_RATIO / MIN_RATIO) * draws[n + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _box(int(draws[n + 2] * (width - w + 1)), int(draws[n + 3] * (height - h + 1)), w, h)
    w, h = min(width, round(height * MAX_RATIO)), min(height, round(width / MIN_RATIO))
    return _box((width - w) // 2, (height - h) // 2, w, h)


def _box(left: int, top: int, width: int, height: int) -> Box:
    return left, top, left + width, top + height


def _draws(count: int, seed: int, epoch: int, key: str) -> list[float]:
    """Even draws from [0, 1), of 53 bits each, the first of them the same whatever their count."""
    digest = hashlib.shake_256(f"{seed} {epoch} {key}".encode()).digest(8 * count)
    draws: list[float] = ((np.frombuffer(digest, "<u8") >> np.uint64(11)) * 2.0**-53).tolist()
    return draws
