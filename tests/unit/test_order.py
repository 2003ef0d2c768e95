"""raycap/order.py: the plan is a permutation, the same for every number of workers, mixed well, and frozen for good."""

import hashlib
import itertools
import time
from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raycap.order import InOrder, Order, Plan, Read, hash_text, pick, rows_per_rank

SIZES = (40, 0, 3, 57, 8, 1, 91)  # an empty shard, shards below run_length and no multiples of it


def plan(**changes: Any) -> Plan:
    return Plan(**({"shard_sizes": SIZES, "global_batch_size": 12, "seed": 5, "run_length": 8} | changes))


def epoch_of(a_plan: Plan, epoch: int) -> list[int]:
    first = epoch * a_plan.steps_per_epoch
    return np.concatenate([a_plan.batch(step) for step in range(first, first + a_plan.steps_per_epoch)]).tolist()


def first_samples(order: Plan | InOrder) -> list[int]:
    return list(itertools.accumulate([0, *order.shard_sizes]))


def shares(order: Plan | InOrder, start: int, stop: int, rank: int, world: int) -> dict[int, list[int]]:
    """step -> sample numbers of one rank by row, put together from the reads of the rank."""
    rows: dict[int, dict[int, int]] = defaultdict(dict)
    for read in order.reads(start, stop, rank, world):
        first = first_samples(order)[read.shard]
        for index, step, row in zip(read.indices.tolist(), read.steps.tolist(), read.rows.tolist(), strict=True):
            assert row not in rows[step]
            rows[step][row] = first + index
    assert all(sorted(by_row) == list(range(len(by_row))) for by_row in rows.values())
    return {step: [by_row[row] for row in range(len(by_row))] for step, by_row in rows.items()}


def sequence(order: Plan, start: int, stop: int, world: int) -> list[int]:
    """Every sample of the steps, rank by rank, from the reads of all ranks."""
    ranks = [shares(order, start, stop, rank, world) for rank in range(world)]
    return [number for step in range(start, stop) for rank in ranks for number in rank.get(step, [])]


def digest(numbers: list[int]) -> str:
    """sha256 over a sequence of keys."""
    return hashlib.sha256("\n".join(f"key-{number:09d}" for number in numbers).encode()).hexdigest()


def test_every_epoch_is_a_permutation_over_its_full_batches() -> None:
    p = plan()
    assert (p.num_samples, p.steps_per_epoch, p.num_dropped) == (200, 16, 8)
    for epoch in range(5):
        order = epoch_of(p, epoch)
        assert len(set(order)) == len(order) == 192
        assert set(order) <= set(range(200))
        assert {p.epoch(step) for step in (16 * epoch, 16 * epoch + 15)} == {epoch}
    # What one epoch drops, others see: nobody is left out for good.
    assert set().union(*(epoch_of(p, epoch) for epoch in range(5))) == set(range(200))
    whole = plan(global_batch_size=20)
    assert whole.num_dropped == 0
    assert sorted(epoch_of(whole, 1)) == list(range(200))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_manifest_is_dealt_out_once_whatever_the_number_of_workers(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=8).filter(lambda sizes: sum(sizes) > 0))
    p = Plan(
        shard_sizes=sizes,
        global_batch_size=data.draw(st.integers(1, min(sum(sizes), 50))),
        seed=data.draw(st.integers(0, 2**63)),
        run_length=data.draw(st.sampled_from([1, 2, 5, 8, 32, 1000])),
    )
    start = data.draw(st.integers(0, 2 * p.steps_per_epoch))
    stop = start + data.draw(st.integers(1, 2 * p.steps_per_epoch))
    batches = {step: p.batch(step).tolist() for step in range(start, stop)}
    for first in range(0, stop, p.steps_per_epoch):
        seen = [number for step in range(first, first + p.steps_per_epoch) for number in batches.get(step, [])]
        assert len(seen) == len(set(seen))
    assert all(0 <= number < sum(sizes) for batch in batches.values() for number in batch)
    world = data.draw(st.integers(1, 6))
    by_rank = [shares(p, start, stop, rank, world) for rank in range(world)]
    for step, batch in batches.items():
        dealt = [ranks.get(step, []) for ranks in by_rank]
        assert [number for share in dealt for number in share] == batch
        assert [len(share) for share in dealt] == [p.share_size(step, rank, world) for rank in range(world)]
        assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
        assert max(map(len, dealt)) == p.rows(world) == rows_per_rank(p.global_batch_size, world)


@pytest.mark.parametrize("kill", range(1, 40, 2))
def test_a_run_killed_anywhere_goes_on_with_what_is_left_on_any_number_of_workers(kill: int) -> None:
    p = plan()  # 16 steps an epoch: 40 steps cross two ends of epochs
    undisturbed = digest([number for step in range(40) for number in p.batch(step)])
    for before, after in itertools.product((1, 2, 3), repeat=2):
        assert digest(sequence(p, 0, kill, before) + sequence(p, kill, 40, after)) == undisturbed


def test_a_chain_of_twenty_kills_and_worker_counts_sees_the_same_keys_in_the_same_order() -> None:
    p = plan()
    kills = [0, *range(1, 40, 2), 40]
    worlds = itertools.cycle((1, 2, 1, 3))
    chained = [n for start, stop in itertools.pairwise(kills) for n in sequence(p, start, stop, next(worlds))]
    assert digest(chained) == digest([number for step in range(40) for number in p.batch(step)])


def test_fewer_samples_than_ranks_leave_some_ranks_empty() -> None:
    p = Plan(shard_sizes=(2,), global_batch_size=2, seed=0)
    assert sorted(len(shares(p, 0, 1, rank, 5).get(0, [])) for rank in range(5)) == [0, 0, 0, 1, 1]
    assert p.rows(5) == 1


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_of(plan(seed=seed), epoch) for seed in (5, 6) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(np.array(first) == np.array(second)) < 0.1  # a shuffle leaves about one of 200 in place


# ---- reads


def spans(reads: list[Read]) -> tuple[list[int], list[int]]:
    """How many samples each read needs, and how many it passes over to get them."""
    return [len(r.indices) for r in reads], [int(r.indices[-1] - r.indices[0]) + 1 for r in reads]


@pytest.mark.parametrize(("global_batch_size", "world"), [(256, 1), (256, 8), (32, 2), (12, 2), (2048, 64)])
def test_reads_are_long_and_read_little_twice(global_batch_size: int, world: int) -> None:
    p = Plan(shard_sizes=(1000,) * 64, global_batch_size=global_batch_size, seed=0)
    needed, passed = spans([r for rank in range(world) for r in p.reads(3, p.steps_per_epoch, rank, world)])
    assert np.mean(needed) > 0.85 * 32
    assert sum(passed) < 1.08 * sum(needed)
    assert max(passed) <= 32


def test_a_read_stays_in_its_shard_and_is_ascending() -> None:
    for read in plan().reads(0, 40, 1, 3):
        assert (np.diff(read.indices) > 0).all()
        assert 0 <= read.indices[0] <= read.indices[-1] < SIZES[read.shard]
        assert read.indices[-1] - read.indices[0] < 8


def test_what_is_needed_first_is_read_first() -> None:
    p = plan()
    firsts = [int(read.steps.min()) for read in p.reads(0, 16, 0, 2)]
    windows = p.runs_per_window * p.run_length // p.global_batch_size
    assert firsts[0] == 0
    assert all(b >= a or b // windows == a // windows for a, b in itertools.pairwise(firsts))


def test_runs_begin_elsewhere_in_each_epoch_so_that_neighbours_part() -> None:
    p = Plan(shard_sizes=(800,), global_batch_size=800, seed=0, run_length=8)
    phases = set()
    for epoch in range(12):
        begins = {int(read.indices[0]) for read in p.reads(epoch, epoch + 1, 0, 1)} - {0}  # one run goes on at 0
        assert len({begin % 8 for begin in begins}) == 1
        phases |= {begin % 8 for begin in begins}
    assert len(phases) >= 4


def test_a_pass_in_order_covers_each_sample_once() -> None:
    for num_samples, size, world in ((200, 6, 3), (200, 5, 2), (17, 16, 4), (1, 4, 2), (43, 64, 1)):
        order = InOrder(shard_sizes=SIZES, global_batch_size=size, num_samples=num_samples)
        ranks = [shares(order, 0, order.num_steps, rank, world) for rank in range(world)]
        steps = [[rank.get(step, []) for rank in ranks] for step in range(order.num_steps)]
        assert [number for step in steps for share in step for number in share] == list(range(num_samples))
        for step, by_rank in enumerate(steps):
            assert [len(share) for share in by_rank] == [order.share_size(step, rank, world) for rank in range(world)]
            assert max(map(len, by_rank)) <= order.rows(world)


# ---- how well it is mixed


def shard_shares(order: list[int], size: int, num_shards: int, batch: int) -> np.ndarray:
    """(num_batches, num_shards): how many samples of each batch are of each shard."""
    rows = np.array(order[: len(order) // batch * batch]).reshape(-1, batch) // size
    return np.stack([np.bincount(row, minlength=num_shards) for row in rows])


@pytest.mark.parametrize(("batch", "worse"), [(32, 1.3), (256, 9.5)])
def test_batches_mix_shards_nearly_as_a_full_permutation_does(batch: int, worse: float) -> None:
    """For a data set whose shards are sorted by subject: the variance of a subject's share of a batch, over a permutation's.

    A batch of 32 has one sample each of 32 runs: as good as a permutation. One of 256 has eight each of 32 runs.
    """
    num_shards, size = 100, 500
    p = Plan(shard_sizes=(size,) * num_shards, global_batch_size=batch, seed=1)
    ours = shard_shares(epoch_of(p, 0), size, num_shards, batch)
    permuted = shard_shares(np.random.default_rng(0).permutation(num_shards * size).tolist(), size, num_shards, batch)
    assert ours.var() < worse * permuted.var()
    assert (ours > 0).sum(axis=1).mean() > 0.85 * min(batch, 32)  # different shards in a batch
    alone = Plan(shard_sizes=(size,) * num_shards, global_batch_size=256, seed=1, run_length=1)
    assert shard_shares(epoch_of(alone, 0), size, num_shards, 256).var() < 1.1 * permuted.var() * 256 / batch


def test_every_place_in_a_shard_is_as_likely_anywhere_in_an_epoch() -> None:
    """Nothing of a shard, its ends neither, tends to the end of an epoch, where batches are dropped."""
    p = Plan(shard_sizes=(45,) * 40, global_batch_size=36, seed=3, run_length=8)
    places = np.zeros((45, 0))
    for epoch in range(30):
        place = np.argsort(epoch_of(p, epoch)) / p.num_samples
        places = np.concatenate([places, place.reshape(40, 45).T], axis=1)
    assert abs(places.mean(axis=1) - 0.5).max() < 0.04  # of 1,200 draws a standard deviation is 0.008


def test_the_order_is_frozen() -> None:
    """A resumed run, and a figure in the log, rely on these very numbers. If they change, every old run is cut off."""
    small = Plan(shard_sizes=(10, 0, 7, 23), global_batch_size=5, seed=3, run_length=4)
    assert [small.batch(step).tolist() for step in (0, 1, 7, 8, 80)] == [
        [19, 8, 25, 16, 29],
        [5, 35, 38, 12, 27],
        [3, 34, 39, 11, 26],
        [20, 32, 39, 13, 31],
        [19, 28, 15, 25, 11],
    ]
    assert [pick(7, epoch, key, 5, 3) for epoch in (0, 1) for key in ("COCO_val2014_000000391895", "a/b")] == [
        [1, 4, 2],
        [1, 2, 3],
        [0, 4, 1],
        [1, 4, 2],
    ]
    assert [hash_text(text) for text in ("", "a photo", "日本")] == [
        7347990519673328018,
        7017721054659137180,
        652669117952288584,
    ]


def test_too_few_samples_are_refused() -> None:
    message = "the training shards hold 200 samples, fewer than one global batch of 201; lower --global-batch-size or add shards"
    with pytest.raises(ValueError, match=message):
        plan(global_batch_size=201)
    with pytest.raises(ValueError, match="hold 0 samples"):
        plan(shard_sizes=(0, 0))
    assert plan(global_batch_size=200).steps_per_epoch == 1


def test_picked_captions_are_distinct_and_depend_on_seed_epoch_and_key() -> None:
    assert pick(1, 2, "key", 5, 3) == pick(1, 2, "key", 5, 3)
    for num_choices, k in ((5, 3), (5, 5), (3, 5), (1, 2), (0, 2)):
        chosen = pick(1, 2, "key", num_choices, k)
        assert len(set(chosen)) == len(chosen) == min(num_choices, k)
        assert set(chosen) <= set(range(num_choices))
    for other in (pick(2, 2, "key", 50, 5), pick(1, 3, "key", 50, 5), pick(1, 2, "kez", 50, 5)):
        assert other != pick(1, 2, "key", 50, 5)
    counts = np.bincount([pick(0, epoch, f"image-{i}", 5, 1)[0] for epoch in range(20) for i in range(100)])
    assert counts.min() > 320  # 2,000 draws of 5: 400 each, and four standard deviations below


def test_the_order_of_ten_million_samples_is_made_as_it_is_needed() -> None:
    begun = time.perf_counter()
    p = Plan(shard_sizes=(1000,) * 10_000, global_batch_size=256, seed=0)
    assert len(p.batch(0)) == 256
    assert next(p.reads(30_000, 30_001, 3, 8)).epoch == 0
    assert time.perf_counter() - begun < 2


def test_an_order_is_all_that_a_rank_needs_to_know() -> None:
    orders: list[Order] = [plan(), InOrder(shard_sizes=SIZES, global_batch_size=12, num_samples=100)]
    assert [order.rows(5) for order in orders] == [3, 3]
