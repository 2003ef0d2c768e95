"""raycap/order.py: the plan is a permutation, the same for every world size, and frozen for good."""

import time

import numpy as np
import pytest

from raycap.order import Plan, deal, hash_text, pick, rows_per_rank

SIZES = (40, 0, 3, 57, 8, 1, 91)  # an empty shard, shards below run_length and no multiples of it


def plan(**changes: object) -> Plan:
    return Plan(**({"shard_sizes": SIZES, "global_batch_size": 12, "seed": 5} | changes))


def epoch_of(a_plan: Plan, epoch: int) -> list[int]:
    first = epoch * a_plan.steps_per_epoch
    return np.concatenate([a_plan.batch(step) for step in range(first, first + a_plan.steps_per_epoch)]).tolist()


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


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 12])
def test_a_global_batch_is_the_same_for_every_world_size_and_dealt_evenly(world: int) -> None:
    p = plan()
    for step in (0, 3, 15, 16, 40):
        shares = [p.share(step, rank, world) for rank in range(world)]
        assert np.concatenate(shares).tolist() == p.batch(step).tolist()
        lengths = [len(share) for share in shares]
        assert max(lengths) - min(lengths) <= 1
        assert max(lengths) == p.rows(world) == rows_per_rank(12, world)


def test_fewer_samples_than_ranks_leave_some_ranks_empty() -> None:
    shares = [deal(np.arange(2), rank, 5) for rank in range(5)]
    assert np.concatenate(shares).tolist() == [0, 1]
    assert {len(share) for share in shares} == {0, 1}
    assert rows_per_rank(2, 5) == 1


def test_epochs_and_seeds_differ() -> None:
    orders = [epoch_of(plan(seed=seed), epoch) for seed in (5, 6) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[:i]:
            assert np.mean(np.array(first) == np.array(second)) < 0.1  # a shuffle leaves about one of 200 in place


def test_neighbours_stay_together_in_runs_that_never_cross_a_shard() -> None:
    sizes = tuple(400 + 13 * (i % 5) for i in range(20))
    borders = np.cumsum(sizes)[:-1]
    p = Plan(shard_sizes=sizes, global_batch_size=sum(sizes), seed=0, run_length=8)
    for epoch in range(3):
        order = np.array(epoch_of(p, epoch))
        lengths = np.diff(np.flatnonzero(np.diff(order, prepend=-2, append=-2) != 1))
        assert 7.5 < lengths.mean() < 8.2  # shorter at the ends of shards
        assert np.mean(lengths <= 8) > 0.99  # two runs that are neighbours by chance count as one here
        place = np.argsort(order)
        assert np.sum(place[borders] == place[borders - 1] + 1) <= 1  # of 19; 7 of 8 if shards were one long file


def test_runs_begin_elsewhere_in_each_epoch_so_that_neighbours_part() -> None:
    p = Plan(shard_sizes=(800,), global_batch_size=800, seed=0, run_length=8)
    phases = set()
    for epoch in range(12):
        order = np.array(epoch_of(p, epoch))
        starts = order[np.diff(order, prepend=-2) != 1]
        phases.add(int(np.bincount(starts % 8).argmax()))
    assert len(phases) >= 4


def test_a_run_length_of_one_is_a_plain_shuffle_and_a_long_one_keeps_shards_whole() -> None:
    single = Plan(shard_sizes=(300, 300), global_batch_size=600, seed=1, run_length=1)
    assert np.mean(np.diff(epoch_of(single, 0)) == 1) < 0.02
    whole = Plan(shard_sizes=(5, 5, 5, 5), global_batch_size=20, seed=1, run_length=1000)
    rows = np.array(epoch_of(whole, 0)).reshape(4, 5)
    assert (np.diff(rows, axis=1) == 1).all()
    assert rows[:, 0].tolist() != [0, 5, 10, 15]


def test_the_order_is_frozen() -> None:
    """A resumed run, and a figure in the log, rely on these very numbers. If they change, every old run is cut off."""
    small = Plan(shard_sizes=(10, 0, 7, 23), global_batch_size=5, seed=3, run_length=4)
    assert [small.batch(step).tolist() for step in (0, 1, 7, 8, 80)] == [
        [8, 9, 0, 1, 2],
        [3, 4, 5, 6, 7],
        [39, 10, 11, 12, 13],
        [34, 35, 36, 37, 17],
        [35, 36, 37, 38, 0],
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


def test_the_order_is_writable_by_nobody() -> None:
    with pytest.raises(ValueError, match="read-only"):
        plan().batch(0)[0] = 1


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


def test_the_order_of_three_million_samples_takes_seconds_not_minutes() -> None:
    begun = time.perf_counter()
    p = Plan(shard_sizes=(1000,) * 3000, global_batch_size=256, seed=0)
    assert len(p.batch(0)) == 256
    first_s = time.perf_counter() - begun
    begun = time.perf_counter()
    for step in range(1, 500):
        p.batch(step)
    assert first_s < 2
    assert time.perf_counter() - begun < 1  # later steps come from the epoch's order, which is kept
