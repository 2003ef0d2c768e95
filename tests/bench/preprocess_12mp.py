"""As preprocess_coco, of a camera's 4000 x 3000 JPEG, which decode="fast" decodes at a quarter of its size."""

from typing import Any

from raycap.schema import ImageSpec
from tests.bench.preprocess_coco import SIZE, compare, photo_like


def measure() -> dict[str, Any]:
    images = [photo_like(4000, 3000, seed) for seed in range(2)]
    return compare("preprocess_12mp", images, ImageSpec(size=SIZE, decode="fast"), within=3, must=8, aim=11)
