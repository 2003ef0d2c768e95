"""CPU time from the bytes of a 640 x 480 JPEG to what the model is given at 384 pixels, against transformers' processor.

Ours ends with uint8, for normalisation happens on the model's device; the peer's ends with normalised float32, which is
what its users have. One thread, the CPU time of the process, sides in turn. Freed memory is kept, as where ours runs; the
peer profits from that too.
"""

import io
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from transformers import BlipImageProcessorPil

from raycap.image import keep_freed_memory, prepare_bytes
from raycap.schema import ImageSpec

SIZE, NUM_IMAGES, ROUNDS = 384, 16, 9

Values = npt.NDArray[Any]


def photo_like(width: int, height: int, seed: int) -> bytes:
    """A JPEG of quality 90 with the spectrum of photographs: amplitudes fall with the frequency, down to faint noise."""
    rng = np.random.default_rng(seed)
    pixels = np.full((height, width, 3), 120.0, np.float32)
    side = 4
    while side < width // 2:
        octave = rng.normal(0, 1, (side * height // width + 2, side, 3)) * np.float32([1, 1, 1])
        octave = (
            0.7 * octave.mean(axis=2, keepdims=True) + 0.3 * octave
        )  # photographs vary more in light than in colour
        levels = Image.fromarray((octave * 30 + 128).clip(0, 255).astype(np.uint8))
        fine = np.asarray(levels.resize((width, height), Image.Resampling.BICUBIC)).astype(np.float32) - 128
        pixels += fine * (60 / side**0.6)
        side *= 2
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def by_transformers(processor: BlipImageProcessorPil, data: bytes) -> Values:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    values: Values = np.asarray(processor(image, return_tensors="np")["pixel_values"][0])
    return values


def levels(values: Values, spec: ImageSpec) -> Values:
    """The grey levels, 0..255, whose normalised values these (3, S, S) are."""
    mean, std = (np.array(triple)[:, None, None] for triple in (spec.mean, spec.std))
    return np.rint((values * std + mean) * 255)


def cpu_ms(side: Callable[[bytes], object], images: list[bytes]) -> float:
    """Per image."""
    begun = time.process_time()
    for data in images:
        side(data)
    return 1000 * (time.process_time() - begun) / len(images)


def compare(
    name: str, images: list[bytes], spec: ImageSpec, *, within: float, must: float, aim: float
) -> dict[str, Any]:
    """The result line; asserts first that the mean difference of each image is at most `within` levels."""
    os.environ["TQDM_DISABLE"] = "1"
    keep_freed_memory()
    processor = BlipImageProcessorPil(size={"height": spec.size, "width": spec.size})
    differences = []
    for data in images:
        theirs = levels(by_transformers(processor, data), spec)
        differences.append(np.abs(theirs - prepare_bytes(data, spec).pixels))
    mean = max(float(difference.mean()) for difference in differences)
    largest = max(float(difference.max()) for difference in differences)
    assert mean <= within, f"{name}: the pixels differ by {mean} levels"
    ours, peers = [], []
    for _ in range(ROUNDS):
        peers.append(cpu_ms(lambda data: by_transformers(processor, data), images))
        ours.append(cpu_ms(lambda data: prepare_bytes(data, spec), images))
    ratio = statistics.median(peers) / statistics.median(ours)
    return {
        "name": name,
        "values": [round(value, 3) for value in ours],
        "peer": round(statistics.median(peers), 3),
        "unit": "ms",
        "ratio": round(ratio, 2),
        "must": must,
        "aim": aim,
        "identical": largest <= 1,
        "largest_difference": largest,
        "mean_difference": round(mean, 3),
        "image_kb": round(statistics.mean(map(len, images)) / 1000),
    }


def measure() -> dict[str, Any]:
    images = [photo_like(640, 480, seed) for seed in range(NUM_IMAGES)]
    result = compare("preprocess_coco", images, ImageSpec(size=SIZE), within=1, must=2.5, aim=3)
    assert result["identical"], f"the pixels differ by {result['largest_difference']} levels"
    return result
