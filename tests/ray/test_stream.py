"""raycap/data/stream.py: Ray Data hands each rank exactly its part of the plan, in order, from any step."""

import numpy as np
import pytest
from conftest import Demo, pack

from raycap.data.batch import Batch, InOrder, Source, iterate_local
from raycap.data.stream import iterate
from raycap.errors import StorageError
from raycap.order import Plan
from raycap.schema import ImageSpec, Sample
from raycap.shards import Manifest, parse_samples, read_manifest
from raycap.storage import join, read_bytes
from raycap.text import TextSpec, load_tokenizer, role_ids

pytestmark = pytest.mark.ray


def source_of(demo: Demo, root: str) -> Source:
    tokenizer = load_tokenizer(demo.tokenizer)
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    return Source(
        manifest=read_manifest(root),
        image=ImageSpec(size=32),
        text=TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=24),
        tokenizer=tokenizer.to_str(),
        captions_per_image=2,
        seed=3,
    )


def plan_of(manifest: Manifest, global_batch_size: int) -> Plan:
    return Plan(shard_sizes=tuple(s.num_samples for s in manifest.shards), global_batch_size=global_batch_size, seed=3)


def same(a: Batch, b: Batch) -> bool:
    arrays = [(a.pixel_values, b.pixel_values), (a.input_ids, b.input_ids), (a.labels, b.labels)]
    return (a.step, a.keys, a.captions, a.errors) == (b.step, b.keys, b.captions, b.errors) and all(
        np.array_equal(x, y) for x, y in arrays
    )


@pytest.mark.parametrize(("rank", "world"), [(0, 1), (1, 3)])
def test_the_stream_is_the_plan_of_each_rank_in_order_across_epochs(
    ray_cluster: str, demo: Demo, rank: int, world: int
) -> None:
    source = source_of(demo, demo.train)
    plan = plan_of(source.manifest, 10)
    steps = 2 * plan.steps_per_epoch
    streamed = list(iterate(plan, rank, world, source=source, start=0, stop=steps))
    planned = list(iterate_local(plan, source, 0, steps, rank, world))
    assert len(streamed) == steps
    assert all(same(a, b) for a, b in zip(streamed, planned, strict=True))


def test_a_stream_from_the_middle_is_the_rest_of_the_whole_stream(ray_cluster: str, demo: Demo) -> None:
    source = source_of(demo, demo.train)
    plan = plan_of(source.manifest, 8)
    rest = list(iterate(plan, 0, 2, source=source, start=13, stop=20))
    assert [batch.step for batch in rest] == list(range(13, 20))
    assert all(same(a, b) for a, b in zip(rest, iterate_local(plan, source, 13, 20, 0, 2), strict=True))


def test_evaluation_sees_each_sample_once_on_three_ranks_in_equal_steps(ray_cluster: str, demo: Demo) -> None:
    source = source_of(demo, demo.test)
    order = InOrder(num_samples=source.manifest.num_samples, global_batch_size=6)
    ranks = [list(iterate(order, rank, 3, source=source, start=0, stop=order.num_steps)) for rank in range(3)]
    assert {len(batches) for batches in ranks} == {order.num_steps}
    assert {len(batch.keys) for batches in ranks for batch in batches} == {2}
    keys = [key for batches in ranks for batch in batches for key in batch.keys if key]
    assert sorted(keys) == sorted(key for shard in source.manifest.shards for key in shard.keys)


def test_a_bad_image_is_a_counted_row_of_weight_zero(
    ray_cluster: str, demo: Demo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    manifest = read_manifest(demo.test)
    samples = parse_samples(read_bytes(join(demo.test, manifest.shards[0].shard)))
    samples[3] = Sample(key="bad", image=samples[3].image[:100], ext="png", captions=samples[3].captions, image_id=None)
    samples[5] = Sample(key="page", image=b"<html>", ext="jpg", captions=samples[5].captions, image_id=None)
    source = source_of(demo, pack(str(tmp_path_factory.mktemp("bad")), samples))
    order = InOrder(num_samples=len(samples), global_batch_size=len(samples))
    (batch,) = iterate(order, 0, 1, source=source, start=0, stop=1)
    assert dict(batch.errors) == {"bad": "truncated", "page": "not_an_image"}
    assert batch.num_images == len(samples) - 2
    assert (batch.labels[[3, 5]] == -100).all()
    assert batch.num_tokens == int((np.delete(batch.labels, [3, 5], axis=0)[:, :, 1:] != -100).sum())


def test_a_shard_that_vanished_is_named_in_one_sentence(
    ray_cluster: str, demo: Demo, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("vanished")
    samples = parse_samples(read_bytes(join(demo.test, read_manifest(demo.test).shards[0].shard)))
    source = source_of(demo, pack(str(root), samples))
    (root / "shard-00000.tar").unlink()
    order = InOrder(num_samples=len(samples), global_batch_size=4)
    with pytest.raises(StorageError, match=r"^cannot read '.*shard-00000\.tar': No such file or directory"):
        list(iterate(order, 0, 1, source=source, start=0, stop=order.num_steps))
