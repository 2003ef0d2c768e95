"""What shorter runs cost and what they gain: reading alone, by run length, and how well batches of 256 mix sorted shards.

Variance: of a subject's share of a batch when every shard has a subject of its own, over the variance under a full
permutation, which is run length 1 in all but the window. Reading: one thread, from the page cache, and from an S3 server that
answers 30 ms after each request, a usual time to the first byte.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from raycap import storage
from raycap.order import Plan
from raycap.schema import Sample
from raycap.shards import Manifest, pack_shard, read_manifest, read_run, write_manifest
from tests.s3.s3_server import BUCKET, faults, run_s3_server

RUN_LENGTHS = (1, 8, 32, 128)
NUM_SHARDS, SAMPLES_PER_SHARD, IMAGE_BYTES, BATCH = 8, 500, 60_000, 256


def write_shards(root: str) -> None:
    image = np.random.default_rng(0).bytes(IMAGE_BYTES)
    indexes = []
    for shard in range(NUM_SHARDS):
        keys = (f"{shard:03d}-{i:04d}" for i in range(SAMPLES_PER_SHARD))
        data, index = pack_shard(
            f"shard-{shard:05d}.tar", [Sample(key=key, image=image, ext="jpg", captions=("a",)) for key in keys]
        )
        storage.put_new(storage.join(root, index.shard), data)
        indexes.append(index)
    write_manifest(root, indexes)


def ms_per_sample(manifest: Manifest, run_length: int, num_reads: int) -> float:
    plan = Plan(shard_sizes=manifest.sizes, global_batch_size=BATCH, seed=0, run_length=run_length)
    begun, count = time.perf_counter(), 0
    for read in islice(plan.reads(0, plan.steps_per_epoch, 0, 1), num_reads):
        read_run(manifest, read.shard, int(read.indices[0]), int(read.indices[-1]) + 1)
        count += len(read.indices)
    return round(1000 * (time.perf_counter() - begun) / count, 3)


def variance(run_length: int) -> float:
    """Over that of a full permutation; 200 shards of 500 samples."""
    num_shards, size = 200, 500
    plan = Plan(shard_sizes=np.full(num_shards, size), global_batch_size=BATCH, seed=0, run_length=run_length)
    ours = [np.bincount(plan.batch(step) // size, minlength=num_shards) for step in range(plan.steps_per_epoch)]
    order = np.random.default_rng(0).permutation(num_shards * size)[: plan.steps_per_epoch * BATCH].reshape(-1, BATCH)
    permuted = [np.bincount(batch // size, minlength=num_shards) for batch in order]
    return round(float(np.var(ours) / np.var(permuted)), 2)


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as root, run_s3_server() as endpoint:
        write_shards(str(Path(root)))
        local = read_manifest(root)
        ms_per_sample(local, 32, 1000)  # now in the page cache
        storage.upload_folder(root, f"s3://{BUCKET}/runs", last="manifest.parquet")
        remote = read_manifest(f"s3://{BUCKET}/runs")
        with faults(endpoint, range_s=0.03):
            table = {
                length: {
                    "variance": variance(length),
                    "local_ms": ms_per_sample(local, length, 4000),
                    "s3_ms": ms_per_sample(remote, length, 40),
                }
                for length in RUN_LENGTHS
            }
    return {
        "name": "shuffle_cost",
        "values": [table[32]["local_ms"]],
        "unit": "ms a sample read in runs of 32",
        "must": 1,
        "aim": 1,
        "by_run_length": table,
    }
