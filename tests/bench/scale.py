"""How the data path scales: planning, opening a manifest, ranks side by side, and what a sample takes in shared memory."""

import io
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from PIL import Image

from raycap import cluster, storage
from raycap.data.batch import Source
from raycap.data.stream import iterate, reads_dataset
from raycap.order import InOrder, Plan
from raycap.schema import ImageSpec, Sample
from raycap.shards import MANIFEST, Manifest, pack_shard, read_manifest, write_manifest
from raycap.shards.manifest import ShardArrays, manifest_bytes
from raycap.text import text_spec, train_wordpiece
from tests.s3.s3_server import BUCKET, faults, run_s3_server

CAPTION = "a small picture of nothing"


def write_shards(root: str, num_shards: int, samples_per_shard: int, size: int) -> Manifest:
    """One small JPEG of `size` pixels, many times."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(buffer, "JPEG")
    indexes = []
    for shard in range(num_shards):
        first = shard * samples_per_shard
        samples = [
            Sample(key=f"{first + i:09d}", image=buffer.getvalue(), ext="jpg", captions=(CAPTION,))
            for i in range(samples_per_shard)
        ]
        data, index = pack_shard(f"shard-{shard:05d}.tar", samples)
        storage.put_new(storage.join(root, index.shard), data)
        indexes.append(index)
    write_manifest(root, indexes)
    return read_manifest(root)


def source(size: int) -> Source:
    tokenizer = train_wordpiece([CAPTION])
    return Source(
        image=ImageSpec(size=size),
        text=text_spec(tokenizer),
        tokenizer=tokenizer.to_str(),
        captions_per_image=1,
        seed=0,
    )


# ---- planning


def write_large_manifest(url: str, num_shards: int, samples_per_shard: int) -> None:
    """A manifest as prepare_shards writes it, of shards that are not there."""
    rng = np.random.default_rng(0)
    parts = [
        ShardArrays(
            shard=f"shard-{i:05d}.tar",
            num_bytes=61_440 * samples_per_shard,
            etag=f"{i:064x}",
            offsets=np.concatenate([[0], np.cumsum(rng.integers(80, 160, samples_per_shard) * 512)]),
            checksums=rng.integers(0, 2**32, samples_per_shard, np.uint32),
            skipped=(),
        )
        for i in range(num_shards)
    ]
    Path(url).write_bytes(manifest_bytes(parts))


OPEN = """
import sys, time
from raycap.shards import read_manifest
import pyarrow.parquet, numpy
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
before, begun = peak(), time.perf_counter()
manifest = read_manifest(sys.argv[1])
print(time.perf_counter() - begun, peak() - before, manifest.num_samples)
"""


def measure_plan() -> dict[str, Any]:
    """An epoch of 10,000 shards of 1,000 samples, planned to its last read, as the sum over eight ranks."""
    num_shards, world = 10_000, 8
    times = []
    for seed in range(3):
        begun = time.perf_counter()
        plan = Plan(shard_sizes=np.full(num_shards, 1000), global_batch_size=256, seed=seed)
        num_samples = sum(len(read.indices) for read in plan.reads(0, plan.steps_per_epoch, seed, world))
        times.append(1000 * (time.perf_counter() - begun) / num_shards)
        assert num_samples == plan.steps_per_epoch * 256 // world
    with tempfile.TemporaryDirectory() as root:
        write_large_manifest(str(Path(root, MANIFEST)), num_shards, 1000)
        opened = [
            subprocess.run([sys.executable, "-c", OPEN, root], check=True, stdout=subprocess.PIPE).stdout.split()
            for _ in range(3)
        ]
        size = Path(root, MANIFEST).stat().st_size
    assert {int(number) for *_, number in opened} == {10_000_000}
    return {
        "name": "plan_shards",
        "values": times,
        "unit": "ms a shard, one rank of eight",
        "must": 1,
        "aim": 1,
        "open_s": round(statistics.median(float(seconds) for seconds, *_ in opened), 2),
        "open_s_must": 2,
        "open_mb": round(statistics.median(float(mb) for _, mb, _ in opened)),
        "open_mb_must": 200,
        "file_mb": round(size / 1e6),
    }


# ---- ranks


ROWS = 128  # of a step of one rank: one read, one task


@ray.remote(num_cpus=1)
class Rank:
    """A training worker that only takes batches."""

    def run(self, rank: int, world: int, shared: list[Any], steps: int) -> int:
        """The samples that were seen."""
        (manifest,) = shared
        sizes = ray.get(manifest).sizes
        order = InOrder(shard_sizes=sizes, num_samples=int(sizes.sum()), global_batch_size=ROWS * world)
        stream = iterate(order, rank, world, manifest=manifest, source=source(16), start=0, stop=steps)
        return sum(batch.num_images for batch in stream)


def measure_ranks() -> dict[str, Any]:
    """Reads that sleep 2 s on the server's side, one CPU for each rank's data: 16 ranks' samples/s over 16 times one rank's.

    The server's clock counts, from the first read of any rank to the last one's end: late ranks and idle CPUs cost.
    """
    steps, range_s, worlds = 24, 2.0, (1, 2, 4, 8, 16)
    rates, at_once = {}, {}
    with run_s3_server() as endpoint:
        manifest = write_shards(f"s3://{BUCKET}/ranks", worlds[-1], ROWS * steps, 16)
        for world in worlds:
            cluster.connect(num_cpus=2 * world, need="each rank and its data")
            shared = ray.put(manifest)
            ranks = [Rank.remote() for _ in range(world)]  # type: ignore[attr-defined]
            ray.get([rank.run.remote(i, world, [shared], 4) for i, rank in enumerate(ranks)])
            with faults(endpoint, range_s=range_s) as done:
                samples = sum(ray.get([rank.run.remote(i, world, [shared], steps) for i, rank in enumerate(ranks)]))
            rates[world] = samples / (done["last_s"] - done["first_s"])
            at_once[world] = done["most_at_once"]
            ray.shutdown()
    return {
        "name": "rank_scaling",
        "values": [rates[16] / rates[1] / 16],
        "unit": "of linear",
        "must": 0.9,
        "aim": 0.9,
        "ideal_per_s": ROWS / range_s,
        "samples_per_s": {world: round(rate, 1) for world, rate in rates.items()},
        "reads_at_once": at_once,
    }


# ---- memory


def measure_store() -> dict[str, Any]:
    """Bytes of blocks in Ray's shared memory for an image of 384 pixels, over those of its pixels; and peak memory of two runs."""
    cluster.connect(num_cpus=3, need="2 for reading")
    with tempfile.TemporaryDirectory() as folder:
        manifest = write_shards(str(Path(folder, "few")), 1, 512, 384)
        order = InOrder(shard_sizes=manifest.sizes, num_samples=512, global_batch_size=32)
        reads = list(order.reads(0, order.num_steps, 0, 1))
        data = reads_dataset(reads, ray.put(manifest), source(384), num_cpus=2)
        bundles = list(data.iter_internal_ref_bundles())
        size = sum(bundle.size_bytes() for bundle in bundles) / sum(bundle.num_rows() or 0 for bundle in bundles)
        peaks = {
            num_samples: peak_mb(str(Path(folder, str(num_samples))), num_samples) for num_samples in (1_000, 100_000)
        }
    return {
        "name": "store_bytes",
        "values": [size / (3 * 384**2)],
        "unit": "of 3 S^2",
        "must": 1.02,
        "aim": 1.02,
        "peak_mb": peaks,
    }


def peak_mb(root: str, num_samples: int) -> float:
    """The most private memory of this process and Ray's workers, and of the shared memory in use, during one pass."""
    manifest = write_shards(root, num_samples // 500, 500, 32)
    plan = Plan(shard_sizes=manifest.sizes, global_batch_size=100, seed=0)
    stream = iterate(
        plan, 0, 1, manifest=ray.put(manifest), source=source(32), start=0, stop=plan.steps_per_epoch, num_cpus=2
    )
    here, peak, looked = psutil.Process(), 0.0, 0.0
    for _ in stream:
        if time.perf_counter() - looked > 0.5:
            looked = time.perf_counter()
            members = [here, *(p for p in here.children(recursive=True) if "ray::" in " ".join(p.cmdline()))]
            peak = max(peak, sum(member.memory_full_info().uss for member in members) / 2**20)
    return round(peak, 1)
