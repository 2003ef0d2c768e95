"""raycap/data/stream.py over S3: a slow read holds back its own samples alone."""

import time
from pathlib import Path

import pytest
import ray
from conftest import Demo, pack
from s3_server import BUCKET, faults
from test_batch import samples_of, source_of

from raycap import storage
from raycap.data import stream
from raycap.data.stream import iterate
from raycap.order import InOrder
from raycap.shards import read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROOT = f"s3://{BUCKET}/slow"
SLOW_S, RANGE_S = 4.0, 0.2


def test_while_one_read_is_slow_the_others_go_on_and_are_there_when_it_ends(
    ray_cluster: str, demo: Demo, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 reads on two CPUs, the fifth of them slow: the other CPU does the 19 behind it meanwhile, at least 3.8 s of reading."""
    monkeypatch.setattr(stream, "MIN_ROWS", 4)
    monkeypatch.setattr(stream, "MAX_ROWS", 4)
    storage.upload_folder(
        pack(str(tmp_path), samples_of(demo.train), samples_per_shard=4), ROOT, last="manifest.parquet"
    )
    manifest = read_manifest(ROOT)
    order = InOrder(shard_sizes=manifest.sizes, num_samples=96, global_batch_size=4)
    source, shared = source_of(demo), ray.put(manifest)
    list(iterate(order, 0, 1, manifest=shared, source=source, start=0, stop=4, num_cpus=2))  # processes start
    arrived = []
    with faults(s3_endpoint, slow=manifest.shards[4], slow_s=SLOW_S, range_s=RANGE_S) as done:
        for batch in iterate(order, 0, 1, manifest=shared, source=source, start=0, stop=24, num_cpus=2):
            assert batch.step == len(arrived)
            arrived.append(time.perf_counter())
    assert done["slowed"] == 1
    assert arrived[4] - arrived[2] > SLOW_S / 2
    assert (
        arrived[23] - arrived[4] < 19 * RANGE_S / 2 / 2
    )  # less than half of what two CPUs would need to read them now
