"""The plan: which samples make up global batch k, as a pure function of (seed, epoch, manifest, global batch size).

Owns the order, and how it is cut into reads. It neither reads samples nor knows processes; raycap/data executes it.

Training step s (counted over the whole run, from 0) consumes global batch s % steps_per_epoch of epoch
s // steps_per_epoch. The order of an epoch is made in three moves, so that reads are long and batches are mixed:

1. every shard is cut into runs of run_length neighbours, at other places in each epoch; what is left of the shards is joined
2. the runs of all shards are shuffled, and taken a window at a time: WINDOW samples, or two global batches if that is more
3. within a window each run is shuffled, and the runs take turns: a global batch has equal pieces of many runs

A worker's part of a batch is contiguous, so that in a window most runs are a single worker's: one read each. The hash is
our own (splitmix64), because numpy promises no stable random stream between its versions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
WINDOW = (
    1024  # samples that are mixed with each other: what the workers together hold decoded in memory, and a little ahead
)
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)


@dataclass(frozen=True, kw_only=True, eq=False)
class Read:
    """Neighbours of one shard that one task loads for one rank; all arrays (n,).

    indices: within the shard, ascending. steps, rows: where each goes, as the step it belongs to and its row in the
    rank's share of that step.
    """

    epoch: int
    shard: int
    indices: Indices
    steps: Indices
    rows: Indices


class Order(Protocol):
    """Which samples each rank reads at each step."""

    def reads(self, start: int, stop: int, rank: int, world: int) -> Iterator[Read]:
        """What steps start .. stop - 1 of one rank consist of, in the order in which it is needed."""
        ...

    def share_size(self, step: int, rank: int, world: int) -> int:
        """Samples of one rank at a step; they differ by at most one between ranks."""
        ...

    def rows(self, world: int) -> int:
        """Rows that every rank's share is padded to."""
        ...


class _Window(NamedTuple):
    """Part of an order. numbers: of samples, through the manifest; places: in the step's global batch; runs: which are read together."""

    epoch: int
    numbers: Indices
    steps: Indices
    places: Indices
    runs: Indices


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The order of a whole training run. Samples are numbered through the manifest: shard by shard, in file order.

    shard_sizes: samples of each shard. run_length: longest read, in samples; shorter ones mix better.
    """

    shard_sizes: Indices | Sequence[int]
    global_batch_size: int
    seed: int
    run_length: int = 32

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise ValueError(
                f"the training shards hold {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}; lower --global-batch-size or add shards"
            )

    @cached_property
    def num_samples(self) -> int:
        return int(np.sum(self.shard_sizes, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in one epoch; the incomplete last one is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """Samples that one epoch leaves out because they do not fill a global batch; others in each epoch."""
        return self.num_samples - self.steps_per_epoch * self.global_batch_size

    @cached_property
    def piece_length(self) -> int:
        """Samples of one run in a global batch: as few as the window allows that divide the batch, if there are any."""
        size, runs = self.global_batch_size, max(1, max(WINDOW, 2 * self.global_batch_size) // self.run_length)
        least = -(-size // runs)
        return next((piece for piece in range(least, 2 * least) if size % piece == 0), least)

    @cached_property
    def runs_per_window(self) -> int:
        """A whole number of global batches takes turns in them, so that a worker's part is whole runs."""
        runs_per_batch = -(-self.global_batch_size // self.piece_length)
        return runs_per_batch * max(1, WINDOW // (runs_per_batch * self.run_length))

    def batch(self, step: int) -> Indices:
        """Sample numbers of the global batch of a step, (global_batch_size,), the same for every number of workers."""
        return np.concatenate([window.numbers for window in self._windows(step, step + 1)])

    def epoch(self, step: int) -> int:
        """The epoch a step belongs to."""
        return step // self.steps_per_epoch

    def reads(self, start: int, stop: int, rank: int, world: int) -> Iterator[Read]:
        first_samples = _firsts(self.shard_sizes)
        low, high = _bounds(self.global_batch_size, rank, world)
        for window in self._windows(start, stop):
            yield from _reads(window, low, high, first_samples, self.run_length)

    def share_size(self, step: int, rank: int, world: int) -> int:  # noqa: ARG002  # every training batch is full
        low, high = _bounds(self.global_batch_size, rank, world)
        return high - low

    def rows(self, world: int) -> int:
        return rows_per_rank(self.global_batch_size, world)

    def _windows(self, start: int, stop: int) -> Iterator[_Window]:
        """The parts of the windows that steps start .. stop - 1 fall into, in order."""
        size, step = self.global_batch_size, start
        while step < stop:
            epoch = self.epoch(step)
            first_step = epoch * self.steps_per_epoch
            last = min(stop, first_step + self.steps_per_epoch)
            low, high = (step - first_step) * size, (last - first_step) * size
            samples = self.runs_per_window * self.run_length
            for number in range(low // samples, -(-high // samples)):
                begin = number * samples
                numbers, run_of = _mixed_window(self, epoch, number)
                part = slice(max(low - begin, 0), high - begin)
                positions = begin + np.arange(len(numbers))[part]
                yield _Window(epoch, numbers[part], first_step + positions // size, positions % size, run_of[part])
            step = last


@dataclass(frozen=True, kw_only=True, eq=False)
class InOrder:
    """Each of the first num_samples once, in file order, for evaluation: global_batch_size a step, the last step short."""

    shard_sizes: Indices | Sequence[int]
    global_batch_size: int
    num_samples: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def reads(self, start: int, stop: int, rank: int, world: int) -> Iterator[Read]:
        first_samples = _firsts(self.shard_sizes)
        for step in range(start, stop):
            numbers = np.arange(step * self.global_batch_size, step * self.global_batch_size + self._size(step))
            places = np.arange(len(numbers))
            runs = np.searchsorted(first_samples, numbers, "right")
            window = _Window(0, numbers, np.full(len(numbers), step), places, runs)
            yield from _reads(window, *_bounds(len(numbers), rank, world), first_samples, self.global_batch_size)

    def share_size(self, step: int, rank: int, world: int) -> int:
        low, high = _bounds(self._size(step), rank, world)
        return high - low

    def rows(self, world: int) -> int:
        return rows_per_rank(self.global_batch_size, world)

    def _size(self, step: int) -> int:
        return min(self.global_batch_size, self.num_samples - step * self.global_batch_size)


def rows_per_rank(global_batch_size: int, world: int) -> int:
    """The most samples one of `world` ranks gets of a global batch: what every rank pads its own part to."""
    return -(-global_batch_size // world)


def pick(seed: int, epoch: int, key: str, num_choices: int, k: int) -> list[int]:
    """k of num_choices, distinct, in an order that depends on (seed, epoch, key) alone; all of them if there are fewer."""
    salt = int.from_bytes(key.encode()[-8:].rjust(8, b"\0"), "big") ^ hash_text(key)
    values = _mix(np.arange(num_choices, dtype=np.uint64), seed, epoch, salt)
    return [int(i) for i in np.argsort(values, kind="stable")[:k]]


def hash_text(text: str) -> int:
    """A 63-bit hash of a string, the same in every process (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in text.encode():
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value >> 1


def _bounds(size: int, rank: int, world: int) -> tuple[int, int]:
    """The contiguous part of a batch for one of `world` ranks, as even as possible."""
    return size * rank // world, size * (rank + 1) // world


def _firsts(shard_sizes: Indices | Sequence[int]) -> Indices:
    """The number of each shard's first sample."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(shard_sizes, dtype=np.int64)[:-1]])


def _reads(window: _Window, low: int, high: int, first_samples: Indices, run_length: int) -> Iterator[Read]:
    """One Read for each run that has samples at places low .. high - 1, or two where it goes on at another place.

    The samples that are needed first come first.
    """
    own = np.flatnonzero((low <= window.places) & (window.places < high))
    if not len(own):
        return
    shards = np.searchsorted(first_samples, window.numbers[own], "right") - 1
    by_run = np.lexsort((window.numbers[own], shards, window.runs[own]))
    own, shards = own[by_run], shards[by_run]
    # A run that goes on at its shard's beginning is two ranges of bytes; so is a gap as long as a read.
    gaps = np.diff(window.numbers[own]) > run_length
    parts = np.split(
        np.arange(len(own)), np.flatnonzero(gaps | (np.diff(window.runs[own]) != 0) | (np.diff(shards) != 0)) + 1
    )
    for part in sorted(parts, key=lambda part: int(own[part].min())):
        shard = int(shards[part[0]])
        part = own[part]
        numbers = window.numbers[part]
        yield Read(
            epoch=window.epoch,
            shard=shard,
            indices=numbers - first_samples[shard],
            steps=window.steps[part],
            rows=window.places[part] - low,
        )


class _Epoch(NamedTuple):
    """How one epoch cuts its shards. All arrays but `shuffled` have one entry a shard.

    first: number of the shard's first sample. offset: where its first run begins; runs go on behind its end at its
    beginning. full: number of its runs of full length, before_full: those of the shards before it. What is left of each
    shard is joined to runs too, in the order `rests` of shards; before_rest: samples in the rests before it. shuffled: the
    order of all full-length runs, those of rests numbered last; a last run that is shorter stays behind them.
    """

    sizes: Indices
    first: Indices
    offset: Indices
    before_full: Indices
    num_full: int
    rests: Indices
    before_rest: Indices
    shuffled: Indices


@lru_cache(maxsize=3)
def _cut(plan: Plan, epoch: int) -> _Epoch:
    sizes, length = np.asarray(plan.shard_sizes, np.int64), plan.run_length
    full = sizes // length
    shards = np.arange(len(sizes), dtype=np.uint64)
    offset = (_mix(shards, plan.seed, epoch, 1) % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64)
    rests = np.argsort(_mix(shards, plan.seed, epoch, 2), kind="stable")
    rests = rests[(sizes % length)[rests] > 0]
    num_runs = -(-plan.num_samples // length)
    num_shuffled = plan.num_samples // length
    shuffled = np.argsort(_mix(np.arange(num_shuffled, dtype=np.uint64), plan.seed, epoch, 3), kind="stable")
    return _Epoch(
        sizes=sizes,
        first=_firsts(sizes),
        offset=offset,
        before_full=np.cumsum(full) - full,
        num_full=int(full.sum()),
        rests=rests,
        before_rest=np.cumsum((sizes % length)[rests]) - (sizes % length)[rests],
        shuffled=np.append(shuffled, np.arange(num_shuffled, num_runs)),
    )


@lru_cache(maxsize=3)
def _mixed_window(plan: Plan, epoch: int, number: int) -> tuple[Indices, Indices]:
    """(sample numbers, run of each) of a window, in order."""
    cut, length = _cut(plan, epoch), plan.run_length
    runs = cut.shuffled[number * plan.runs_per_window : (number + 1) * plan.runs_per_window]
    sizes = np.minimum(length, plan.num_samples - runs * length)
    run_of = np.repeat(np.arange(len(runs)), sizes)
    within = np.arange(len(run_of)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    numbers = _numbers(cut, runs[run_of] * length + within, length)
    # Each run in an order of its own; `within` is then the turn of a sample among those of its run.
    numbers = numbers[np.lexsort((_mix(numbers.astype(np.uint64), plan.seed, epoch, 4), run_of))]
    turns = np.argsort((within // plan.piece_length) * len(runs) + run_of, kind="stable")
    numbers, run_of = numbers[turns], run_of[turns]
    for array in (numbers, run_of):
        array.flags.writeable = False  # shared by every caller of the cache
    return numbers, run_of


def _numbers(cut: _Epoch, places: Indices, length: int) -> Indices:
    """Sample numbers of places in the concatenation of all runs: the full ones shard by shard, then the joined rests."""
    behind = places - cut.num_full * length
    shard = np.searchsorted(cut.before_full * length, places, "right") - 1
    within = places - cut.before_full[shard] * length
    in_rest = behind >= 0
    if in_rest.any():
        rest = np.searchsorted(cut.before_rest, behind[in_rest], "right") - 1
        shard[in_rest] = cut.rests[rest]
        full = cut.sizes[cut.rests[rest]] // length
        within[in_rest] = behind[in_rest] - cut.before_rest[rest] + full * length
    circular = np.mod(cut.offset[shard] + within, cut.sizes[shard])
    numbers: Indices = cut.first[shard] + circular
    return numbers


def _mix(values: npt.NDArray[np.uint64], *salts: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of each value under the given salts, vectorised."""
    mask = 0xFFFFFFFFFFFFFFFF
    for salt in salts:
        values = values + np.uint64(((salt & mask) * _GOLDEN + _GOLDEN) & mask)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
