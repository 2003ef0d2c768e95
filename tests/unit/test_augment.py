"""raycap/augment.py: the published augmentation, with draws that depend on (seed, epoch, key) alone."""

import math
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nasty import encode, photo
from PIL import Image

from raycap.augment import (
    GREY,
    OPERATIONS,
    AugmentSpec,
    Drawn,
    apply_operation,
    augment_bytes,
    draw_augmentation,
    names_side,
    smallest_side,
)
from raycap.errors import ErrorKind, ImageError
from raycap.image import prepare_bytes
from raycap.schema import ImageSpec

Pixels = npt.NDArray[np.uint8]
SPEC = ImageSpec(size=32)
CROP_ALONE = AugmentSpec(flip="never", num_ops=0)


def draw(n: int, augment: AugmentSpec = AugmentSpec(), width: int = 640, height: int = 427) -> Drawn:  # noqa: B008
    return draw_augmentation(augment, width, height, seed=7, epoch=1, key=f"train/{n}")


def augmented(data: bytes, augment: AugmentSpec = AugmentSpec(), **changes: Any) -> Pixels:  # noqa: B008
    given: dict[str, Any] = {"seed": 7, "epoch": 1, "key": "a", "captions": ("a dog",)}
    return augment_bytes(data, SPEC, augment, **given | changes)


# ---- the draws


def test_the_same_arguments_give_the_same_pixels_whatever_the_random_generators_do() -> None:
    data = encode(photo(60, 45))
    random.seed(1)
    np.random.seed(1)
    first = augmented(data)
    states = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index, union-attr]
    second = augmented(data)
    assert states == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index, union-attr]
    random.seed(2)
    np.random.seed(2)
    for again in (second, augmented(data)):
        assert np.array_equal(first, again)


@pytest.mark.parametrize("changes", [{"seed": 8}, {"epoch": 2}, {"key": "b"}, {"key": "a "}, {"seed": 71, "epoch": 0}])
def test_another_seed_epoch_or_key_gives_other_pixels(changes: dict[str, Any]) -> None:
    data = encode(photo(60, 45))
    assert not np.array_equal(augmented(data), augmented(data, **changes))


def test_draws_are_the_same_in_every_version_and_on_every_machine() -> None:
    """Written down once: a run that resumes with a later raycap must see the same pixels."""
    written = [
        Drawn(box=(151, 24, 608, 406), mirrored=False, operations=()),
        Drawn(box=(127, 6, 593, 390), mirrored=False, operations=(("ShearX", True),)),
        Drawn(box=(0, 1, 423, 399), mirrored=True, operations=(("Rotate", True),)),
    ]
    assert [draw_augmentation(AugmentSpec(), 640, 427, seed=3, epoch=n, key="übung/1") for n in range(3)] == written


def test_seed_epoch_and_key_do_not_run_into_each_other() -> None:
    drawn = [
        draw_augmentation(AugmentSpec(), 640, 427, seed=seed, epoch=epoch, key=key)
        for seed, epoch, key in ((71, 1, "a"), (7, 11, "a"), (7, 1, "1a"), (7, 1, "1 a"))
    ]
    assert len(set(drawn)) == 4


def test_the_crop_and_the_flip_stay_when_the_operations_change() -> None:
    for n in range(20):
        few, many = draw(n, AugmentSpec(num_ops=0)), draw(n, AugmentSpec(num_ops=9, magnitude=9))
        assert few[:2] == many[:2]
        assert few.operations == ()


def ratio_of(drawn: Drawn) -> float:
    left, top, right, bottom = drawn.box
    return (right - left) / (bottom - top)


def area_of(drawn: Drawn) -> int:
    left, top, right, bottom = drawn.box
    return (right - left) * (bottom - top)


def distance_to_even(values: list[float], low: float, high: float) -> float:
    """Kolmogorov's distance between the values and the even distribution from low to high, times the root of their
    number; above 1.95 for one in a thousand samples of that distribution.
    """
    places = (np.sort(values) - low) / (high - low)
    steps = np.arange(len(places) + 1) / len(places)
    distance = max(np.abs(places - steps[1:]).max(), np.abs(places - steps[:-1]).max())
    return float(distance * math.sqrt(len(places)))


def test_areas_are_even_ratios_even_in_their_logarithm_and_places_even() -> None:
    """Of a square image, a crop of at most 3/4 of its area fits with every ratio, so that none of those is drawn again."""
    side = 10_000
    drawn = [draw(n, width=side, height=side) for n in range(6000)]
    fitting = [d for d in drawn if area_of(d) <= 0.75 * side**2]
    assert len(fitting) > 2500
    assert distance_to_even([area_of(d) / side**2 for d in fitting], 0.5, 0.75) < 1.95
    assert distance_to_even([math.log(ratio_of(d)) for d in fitting], math.log(3 / 4), math.log(4 / 3)) < 1.95
    for first, last in ((0, 2), (1, 3)):
        places = [d.box[first] / (side - (d.box[last] - d.box[first])) for d in fitting]
        assert distance_to_even(places, 0, 1) < 1.95


@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (2, 2), (2, 3), (2, 200), (200, 2), (37, 100)])
@pytest.mark.parametrize("min_area", [0.08, 0.5, 1])
def test_every_crop_lies_within_the_image_and_has_an_allowed_area_and_ratio(
    width: int, height: int, min_area: float
) -> None:
    for n in range(300):
        drawn = draw(n, AugmentSpec(min_area=min_area), width, height)
        left, top, right, bottom = drawn.box
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        if min(width, height) > 100 and min_area < 1:
            assert 0.99 * min_area <= area_of(drawn) / (width * height) <= 1
            assert 0.99 * 3 / 4 <= ratio_of(drawn) <= 1.01 * 4 / 3


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [(300, 100, (83, 0, 216, 100)), (90, 400, (0, 140, 90, 260)), (640, 480, (0, 0, 640, 480))],
)
def test_an_image_that_no_crop_fits_gives_the_middle_of_the_widest_ratio(
    width: int, height: int, box: tuple[int, int, int, int]
) -> None:
    """torchvision's fallback. A crop of the whole area never fits the first two, and nearly never the last."""
    boxes = Counter(draw(n, AugmentSpec(min_area=1), width, height).box for n in range(50))
    assert boxes.most_common(1)[0][0] == box
    assert boxes[box] == 50 or width == 640


def test_half_of_the_images_are_flipped_and_every_operation_is_drawn_as_often_as_the_others() -> None:
    drawn = [draw(n) for n in range(5000)]
    assert abs(sum(d.mirrored for d in drawn) / 5000 - 0.5) < 0.02
    assert not any(draw(n, AugmentSpec(flip="never")).mirrored for n in range(50))
    counts = Counter(operation for d in drawn for operation in d.operations)
    # 10,000 draws; half of them are applied, to one of ten operations, either way: 250 each, with a deviation of 15.6.
    assert set(counts) == {(name, negative) for name in OPERATIONS for negative in (True, False)}
    assert all(abs(count - 250) < 5 * 15.6 for count in counts.values()), counts
    lengths = Counter(len(d.operations) for d in drawn)
    assert [abs(lengths[n] / 5000 - share) < 0.03 for n, share in enumerate((0.25, 0.5, 0.25))] == [True] * 3
    names = Counter(tuple(name for name, _ in d.operations) for d in drawn if len(d.operations) == 2)
    assert any(first == second for first, second in names)  # drawn with replacement


# ---- sides


@pytest.mark.parametrize(
    "caption",
    [
        "a dog left of a cat",
        "The LEFT one",
        "Right: a cat",
        "on the right-hand side",
        "her lefthand glove",
        "the rightmost man",
        "a left-handed player",
        "two men (left) wave",
        "turning right.",
        "the man's right",
        "left/right",
        "cats at top-right",
        "logo_left",
        "a sign bottomleft",
        "the upperright corner",
        "facing leftwards",
        "right now a man runs",  # no side, but who can tell
        "food left on a plate",
    ],
)
def test_captions_that_name_a_side(caption: str) -> None:
    assert names_side(["a dog", caption])


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a dog",
        "a bright light",
        "leftover pizza",
        "Leftovers on a plate",
        "an upright piano, copyright 2014",
        "a frightened cat on an alright day",
        "a cleft in a rock, theft",
        "the righteous and their rightful king, rightly",
        "he wrote a letter, lifted",
        "birthright",
    ],
)
def test_captions_that_name_none(caption: str) -> None:
    assert not names_side(["a dog", caption])


def test_an_image_is_flipped_unless_one_of_its_captions_names_a_side() -> None:
    data = encode(photo(60, 45))
    num_flipped = 0
    for n in range(12):
        plain = augmented(data, CROP_ALONE, key=str(n))
        for flip, captions, may_flip in (
            ("always", ("a dog on the left",), True),
            ("unsided", ("a dog", "a cat"), True),
            ("unsided", ("a dog", "a dog on the left"), False),
            ("unsided", (), True),
        ):
            pixels = augmented(data, AugmentSpec(flip=flip, num_ops=0), key=str(n), captions=captions)  # type: ignore[arg-type]
            flipped = not np.array_equal(pixels, plain)
            assert not flipped or (may_flip and np.array_equal(pixels, plain[:, :, ::-1]))
            num_flipped += flipped
            assert flipped == (
                may_flip and draw_augmentation(AugmentSpec(), 60, 45, seed=7, epoch=1, key=str(n)).mirrored
            )
    assert 0 < num_flipped < 36


# ---- the operations, against their definitions written out again


def contrasted(pixels: Pixels) -> Pixels:
    result = pixels.copy()
    for c in range(3):
        low, high = int(pixels[..., c].min()), int(pixels[..., c].max())
        if high > low:
            scale = 255 / (high - low)
            result[..., c] = np.clip(pixels[..., c] * scale - low * scale, 0, 255).astype(np.uint8)
    return result


def equalized(pixels: Pixels) -> Pixels:
    result = pixels.copy()
    for c in range(3):
        counts = np.bincount(pixels[..., c].ravel(), minlength=256)
        step = (counts.sum() - counts[np.flatnonzero(counts)[-1]]) // 255
        if step:
            below = np.concatenate([[0], np.cumsum(counts)[:-1]])
            result[..., c] = np.minimum((below + step // 2) // step, 255).astype(np.uint8)[pixels[..., c]]
    return result


def brightened(factor: float) -> Callable[[Pixels], Pixels]:
    return lambda pixels: np.clip(pixels * np.float64(factor), 0, 255).astype(np.uint8)


def sharpened(factor: float) -> Callable[[Pixels], Pixels]:
    def sharpen(pixels: Pixels) -> Pixels:
        values = pixels.astype(np.float64)
        height, width = pixels.shape[:2]
        around = sum(values[y : height - 2 + y, x : width - 2 + x] for y in range(3) for x in range(3))
        smooth = np.floor((around + 4 * values[1:-1, 1:-1]) / 13 + 0.5)
        values[1:-1, 1:-1] = smooth + factor * (values[1:-1, 1:-1] - smooth)
        return np.clip(values, 0, 255).astype(np.uint8)

    return sharpen


def moved(place: Callable[[Any, Any], tuple[Any, Any]]) -> Callable[[Pixels], Pixels]:
    """The pixels at place(x, y) of the image, between pixels by bilinear interpolation, grey outside the image."""

    def move(pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        y, x = np.mgrid[:height, :width] + 0.5  # the middles of pixels
        from_x, from_y = place(x, y)
        inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
        x0, y0 = np.floor(from_x - 0.5).astype(int), np.floor(from_y - 0.5).astype(int)
        dx, dy = (from_x - 0.5 - x0)[..., None], (from_y - 0.5 - y0)[..., None]

        def at(row: Any, column: Any) -> Any:
            return pixels[row.clip(0, height - 1), column.clip(0, width - 1)].astype(float)

        top = at(y0, x0) * (1 - dx) + at(y0, x0 + 1) * dx
        bottom = at(y0 + 1, x0) * (1 - dx) + at(y0 + 1, x0 + 1) * dx
        return np.where(inside[..., None], top * (1 - dy) + bottom * dy, GREY).astype(np.uint8)

    return move


def turned(degrees: float) -> Callable[[Pixels], Pixels]:
    def turn(pixels: Pixels) -> Pixels:
        middle_y, middle_x = (side / 2 for side in pixels.shape[:2])
        cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
        return moved(
            lambda x, y: (
                cos * (x - middle_x) - sin * (y - middle_y) + middle_x,
                sin * (x - middle_x) + cos * (y - middle_y) + middle_y,
            )
        )(pixels)

    return turn


@pytest.mark.parametrize("side", [2, 3, 24])
@pytest.mark.parametrize(
    ("name", "magnitude", "negative", "expected"),
    [
        ("Identity", 5, False, lambda pixels: pixels),
        ("AutoContrast", 5, True, contrasted),
        ("Equalize", 5, False, equalized),
        ("Brightness", 5, False, brightened(1)),
        ("Brightness", 9, True, brightened(1.72)),
        ("Brightness", 0, False, brightened(0.1)),
        ("Sharpness", 5, False, sharpened(1)),
        ("Sharpness", 10, False, sharpened(1.9)),
        ("Sharpness", 1, True, sharpened(0.28)),
        ("ShearX", 5, False, moved(lambda x, y: (x - 0.15 * y, y))),
        ("ShearX", 10, True, moved(lambda x, y: (x + 0.3 * y, y))),
        ("ShearY", 5, False, moved(lambda x, y: (x, y - 0.15 * x))),
        ("ShearY", 10, True, moved(lambda x, y: (x, y + 0.3 * x))),
        ("TranslateX", 5, False, moved(lambda x, y: (x - 5, y))),
        ("TranslateX", 10, True, moved(lambda x, y: (x + 10, y))),
        ("TranslateY", 5, False, moved(lambda x, y: (x, y - 5))),
        ("TranslateY", 3, True, moved(lambda x, y: (x, y + 3))),
        ("Rotate", 5, False, turned(15)),
        ("Rotate", 10, True, turned(-30)),
    ],
)
def test_an_operation_is_what_its_definition_says(
    name: str, magnitude: int, negative: bool, expected: Callable[[Pixels], Pixels], side: int
) -> None:
    for image in (photo(side, side, seed=3), Image.new("RGB", (side, side), (9, 200, 77))):
        result = apply_operation(image, name, magnitude, negative=negative)
        assert (result.mode, result.size) == ("RGB", image.size)
        # A value that is whole but for rounding may be cut to the one below.
        difference = np.asarray(result).astype(int) - expected(np.asarray(image))
        assert np.abs(difference).max() <= (
            1 if name in ("Sharpness", "ShearX", "ShearY", "Rotate", "AutoContrast") else 0
        )
        assert np.abs(difference).mean() < 0.05


def test_every_operation_but_those_without_effect_changes_a_photo() -> None:
    image = photo(24, 24)
    unchanged = {name for name in OPERATIONS if apply_operation(image, name, 5, negative=False) == image}
    assert unchanged == {"Identity", "Brightness", "Sharpness"}  # factor 1 at magnitude 5, as published
    assert {name for name in OPERATIONS if apply_operation(image, name, 6, negative=False) == image} == {"Identity"}


# ---- images


def test_the_crop_is_resized_as_it_lies_in_the_image() -> None:
    image = photo(90, 70)
    for n in range(5):
        left, top, right, bottom = draw_augmentation(CROP_ALONE, 90, 70, seed=7, epoch=1, key=str(n)).box
        pixels = augmented(encode(image), CROP_ALONE, key=str(n))
        assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 32, 32), np.uint8, True)
        cut = image.crop((left, top, right, bottom)).resize((32, 32), Image.Resampling.BICUBIC)
        difference = np.abs(pixels.transpose(1, 2, 0).astype(int) - np.asarray(cut))
        assert difference[3:-3, 3:-3].max() <= 1  # where the neighbours of the crop do not count


def test_operations_follow_each_other_in_the_order_they_were_drawn() -> None:
    data = encode(photo(60, 45))
    augment = AugmentSpec(flip="never", num_ops=4)
    for n in range(10):
        image = Image.fromarray(augmented(data, CROP_ALONE, key=str(n)).transpose(1, 2, 0))
        for name, negative in draw_augmentation(augment, 60, 45, seed=7, epoch=1, key=str(n)).operations:
            image = apply_operation(image, name, 5, negative=negative)
        assert np.array_equal(augmented(data, augment, key=str(n)), np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("size", [(2, 2), (2, 150), (32, 32), (200, 3)])
def test_an_image_of_any_size_becomes_a_square(size: tuple[int, int]) -> None:
    for n in range(8):
        pixels = augmented(encode(photo(*size)), AugmentSpec(num_ops=3), key=str(n))
        assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous) == ((3, 32, 32), np.uint8, True)


def test_an_image_that_is_not_cropped_is_what_the_other_doors_see() -> None:
    data = encode(photo(40, 30))
    keys = (str(n) for n in range(2000))
    whole = AugmentSpec(min_area=1, flip="never", num_ops=0)
    key = next(k for k in keys if draw_augmentation(whole, 40, 30, seed=7, epoch=1, key=k).box == (0, 0, 40, 30))
    difference = augmented(data, whole, key=key).astype(int) - prepare_bytes(data, SPEC).pixels
    assert abs(difference).max() <= 1  # Pillow crops and resizes at once; the other doors resize with another library


def test_bytes_that_are_no_image_are_an_image_error() -> None:
    jpeg = encode(photo(), "JPEG")
    for data, kind in ((b"", ErrorKind.EMPTY), (b"{}", ErrorKind.NOT_AN_IMAGE), (jpeg[:-200], ErrorKind.TRUNCATED)):
        with pytest.raises(ImageError) as caught:
            augmented(data)
        assert caught.value.kind == kind


def test_memory_that_runs_out_is_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    data = encode(photo())
    monkeypatch.setattr(Image.Image, "resize", fail)
    with pytest.raises(ImageError, match="not enough memory to augment") as caught:
        augmented(data)
    assert caught.value.kind == ErrorKind.DECODER_MEMORY


def test_a_jpeg_that_is_decoded_fast_keeps_enough_pixels_for_its_smallest_crop() -> None:
    for size, min_area in ((384, 0.5), (224, 0.08), (32, 1)):
        side = smallest_side(size, min_area)
        for n in range(200):
            left, top, right, bottom = draw(n, AugmentSpec(min_area=min_area), side, side).box
            assert min(right - left, bottom - top) >= size
    data = encode(photo(16, 12).resize((800, 600), Image.Resampling.BICUBIC), "JPEG", quality=95)
    exact, fast = (
        augment_bytes(data, spec, CROP_ALONE, seed=7, epoch=1, key="a", captions=())
        for spec in (SPEC, ImageSpec(size=32, decode="fast"))
    )
    assert not np.array_equal(exact, fast)
    assert np.abs(exact.astype(int) - fast).mean() < 3


# ---- the settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_area": 0}, "min_area is 0, a share of the image"),
        ({"min_area": 1.5}, "min_area is 1.5"),
        ({"min_area": float("nan")}, "min_area is nan"),
        ({"flip": "sometimes"}, "flip is 'sometimes'; give one of unsided, always, never"),
        ({"num_ops": -1}, "num_ops is -1"),
        ({"magnitude": 11}, "magnitude is 11; give one from 0 to 10"),
        ({"magnitude": -1}, "magnitude is -1"),
    ],
)
def test_settings_without_a_meaning_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AugmentSpec(**changes)
