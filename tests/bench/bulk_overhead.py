"""What a bulk run costs over reading and preparing alone: 2,000 small JPEGs, a model that does nothing.

The peer is a thread pool of two threads in one process that reads and prepares the same files. Start-up is left out: the
rate counts from the first committed unit to the last.
"""

import hashlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from raycap import cluster, storage
from raycap.bulk import plan
from raycap.bulk.progress import Progress
from raycap.bulk.run import run_units
from raycap.image import prepare_bytes
from raycap.schema import CaptionResult, DecodeSettings, ImageSpec
from raycap.storage import Entry

NUM_IMAGES, NUM_CHECKED, RUNS = 2000, 192, 3
UNIT_SIZE, SIZE = 64, 384


class Constant:
    """A model that does nothing."""

    def caption_prepared(self, pixel_values: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
        return [CaptionResult(caption="a picture", score=-1.0)] * len(pixel_values)


class Digest:
    """A model that says what it sees."""

    def caption_prepared(self, pixel_values: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
        return [CaptionResult(caption=digest(pixels), score=-1.0) for pixels in pixel_values]


def digest(pixels: Any) -> str:
    return hashlib.sha256(pixels.tobytes()).hexdigest()


def write_images(folder: Path, count: int) -> None:
    """JPEGs of about 5 KB, 128 x 128 pixels."""
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((128, 128), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        (folder / f"{number:05d}.jpg").write_bytes(buffer.getvalue())


def make_job(images: str, out: str) -> plan.Job:
    return plan.Job(
        images=images,
        out=out,
        unit_size=UNIT_SIZE,
        format="parquet",
        image=ImageSpec(size=SIZE),
        settings=DecodeSettings(),
        checkpoint="none",
        settings_id="none",
        verified=True,
        micro_batch_size=32,
        decode_timeout_s=10.0,
    )


class FirstToLast(Progress):
    """Notes when the first unit and the last were committed, and how many images lay between."""

    def __init__(self, num_images: int) -> None:
        super().__init__(num_images, 0)
        self.times: list[tuple[float, int]] = []

    def add(self, *, num_images: int, **about: Any) -> None:
        super().add(num_images=num_images, **about)
        self.times.append((time.perf_counter(), num_images))

    def ms_per_image(self) -> float:
        return 1000 * (self.times[-1][0] - self.times[0][0]) / sum(count for _, count in self.times[1:])


def in_bulk(images: str, entries: list[Entry], load: Callable[[], Any]) -> tuple[float, list[str]]:
    """ms per image of a bulk run, and its captions in order."""
    with tempfile.TemporaryDirectory() as out:
        job = make_job(images, out)
        manifest = plan.create_manifest(out, entries)
        seen = FirstToLast(len(entries))
        run_units(job, manifest, plan.pending_units(job, len(entries)), load, seen, cpus_for_data=2)
        names = storage.list_files(f"{out}/data")
        captions = [c for name in names for c in pq.read_table(f"{out}/data/{name}")["caption"].to_pylist()]
        print(seen.line(), file=sys.stderr)
    return seen.ms_per_image(), captions


def in_threads(images: str, entries: list[Entry], see: Callable[[Any], str]) -> tuple[float, list[str]]:
    """ms per image of a plain thread pool, and what `see` says of the images in order."""
    spec = ImageSpec(size=SIZE)

    def caption(entry: Entry) -> str:
        return see(prepare_bytes(storage.read_bytes(f"{images}/{entry.name}"), spec).pixels)

    begun = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:
        captions = list(pool.map(caption, entries))
    return 1000 * (time.perf_counter() - begun) / len(entries), captions


def measure() -> dict[str, Any]:
    """ms per image that bulk takes more than the thread pool; negative if it is faster."""
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), NUM_IMAGES)
        entries = storage.list_entries(folder)
        cluster.connect(num_cpus=3, need="the benchmark")
        _, bulk = in_bulk(folder, entries[:NUM_CHECKED], Digest)
        _, plain = in_threads(folder, entries[:NUM_CHECKED], digest)
        assert bulk == plain, "bulk and the thread pool see different images"
        ours, peers = [], []
        for _ in range(RUNS):
            peers.append(in_threads(folder, entries, lambda _: "a picture")[0])
            ours.append(in_bulk(folder, entries, Constant)[0])
    return {
        "name": "bulk_overhead",
        "values": [round(mine - peer, 3) for mine, peer in zip(ours, peers, strict=True)],
        "unit": "ms",
        "must": 5,
        "aim": 1,
        "bulk_ms": [round(value, 3) for value in ours],
        "threads_ms": [round(value, 3) for value in peers],
        "identical": True,
    }
