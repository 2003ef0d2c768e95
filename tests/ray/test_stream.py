"""raycap/data/stream.py: Ray Data hands each rank exactly its part of the plan, in order, from any step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from conftest import Demo, pack
from test_batch import samples_of, source_of

from raycap.data import stream
from raycap.data.batch import Batch, Source, iterate_local
from raycap.errors import StorageError
from raycap.order import InOrder, Order, Plan
from raycap.shards import Manifest, read_manifest

pytestmark = pytest.mark.ray


def plan_of(manifest: Manifest, global_batch_size: int) -> Plan:
    return Plan(shard_sizes=manifest.sizes, global_batch_size=global_batch_size, seed=3, run_length=8)


def iterate(order: Order, rank: int, world: int, manifest: Manifest, source: Source, **more: int) -> Iterator[Batch]:
    return stream.iterate(order, rank, world, manifest=ray.put(manifest), source=source, **more)


def same(a: Batch, b: Batch) -> bool:
    arrays = [(a.pixel_values, b.pixel_values), (a.input_ids, b.input_ids), (a.labels, b.labels)]
    return (a.step, a.keys, a.captions, a.errors) == (b.step, b.keys, b.captions, b.errors) and all(
        np.array_equal(x, y) for x, y in arrays
    )


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_the_stream_is_the_plan_of_each_rank_in_order_across_epochs(
    ray_cluster: str, demo: Demo, rank: int, world: int
) -> None:
    source, manifest = source_of(demo), read_manifest(demo.train)
    plan = plan_of(manifest, 10)
    steps = 2 * plan.steps_per_epoch
    streamed = list(iterate(plan, rank, world, manifest, source, start=0, stop=steps))
    planned = list(iterate_local(plan, manifest, source, 0, steps, rank, world))
    assert len(streamed) == steps
    assert all(same(a, b) for a, b in zip(streamed, planned, strict=True))


def test_a_stream_of_several_data_sets_has_no_seam(
    ray_cluster: str, demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "MAX_READS", 7)
    monkeypatch.setattr(stream, "MIN_ROWS", 8)
    source, manifest = source_of(demo), read_manifest(demo.train)
    plan = plan_of(manifest, 10)
    streamed = list(iterate(plan, 0, 1, manifest, source, start=2, stop=12))
    planned = iterate_local(plan, manifest, source, 2, 12, 0, 1)
    assert all(same(a, b) for a, b in zip(streamed, planned, strict=True))


def test_a_stream_from_the_middle_is_the_rest_of_the_whole_stream(ray_cluster: str, demo: Demo) -> None:
    source, manifest = source_of(demo), read_manifest(demo.train)
    plan = plan_of(manifest, 8)
    rest = list(iterate(plan, 0, 2, manifest, source, start=13, stop=20))
    assert [batch.step for batch in rest] == list(range(13, 20))
    whole = list(iterate_local(plan, manifest, source, 0, 20, 0, 2))
    assert all(same(a, b) for a, b in zip(rest, whole[13:], strict=True))


def test_evaluation_sees_each_sample_once_on_three_ranks_in_equal_steps(ray_cluster: str, demo: Demo) -> None:
    source, manifest = source_of(demo), read_manifest(demo.test)
    order = InOrder(shard_sizes=manifest.sizes, num_samples=manifest.num_samples, global_batch_size=6)
    with ThreadPoolExecutor(3) as pool:  # side by side, as ranks are
        ranks = list(
            pool.map(
                lambda rank: list(iterate(order, rank, 3, manifest, source, start=0, stop=order.num_steps)), range(3)
            )
        )
    assert {len(batches) for batches in ranks} == {order.num_steps}
    assert {len(batch.keys) for batches in ranks for batch in batches} == {2}
    keys = [key for batches in ranks for batch in batches for key in batch.keys if key]
    assert sorted(keys) == sorted(sample.key for sample in samples_of(demo.test))


def test_a_bad_image_is_a_counted_row_of_weight_zero(ray_cluster: str, demo: Demo, tmp_path: Path) -> None:
    samples = samples_of(demo.test)
    samples[3] = replace(samples[3], key="bad", image=samples[3].image[:100])
    samples[5] = replace(samples[5], key="page", image=b"<html>")
    manifest = read_manifest(pack(str(tmp_path), samples))
    order = InOrder(shard_sizes=manifest.sizes, num_samples=len(samples), global_batch_size=len(samples))
    (batch,) = iterate(order, 0, 1, manifest, source_of(demo), start=0, stop=1)
    assert dict(batch.errors) == {"bad": "truncated", "page": "not_an_image"}
    assert batch.num_images == len(samples) - 2
    bad = [batch.keys.index(key) for key in ("bad", "page")]
    assert (batch.labels[bad] == -100).all()
    assert batch.num_tokens == int((np.delete(batch.labels, bad, axis=0)[:, :, 1:] != -100).sum())


def test_a_shard_that_vanished_is_named_in_one_sentence(ray_cluster: str, demo: Demo, tmp_path: Path) -> None:
    manifest = read_manifest(pack(str(tmp_path), samples_of(demo.test)))
    (tmp_path / "shard-00000.tar").unlink()
    order = InOrder(shard_sizes=manifest.sizes, num_samples=manifest.num_samples, global_batch_size=4)
    with pytest.raises(StorageError, match=r"^cannot read '.*shard-00000\.tar': No such file or directory"):
        list(iterate(order, 0, 1, manifest, source_of(demo), start=0, stop=order.num_steps))
