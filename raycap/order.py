"""The plan: which samples make up global batch k, as a pure function of (seed, epoch, manifest, global batch size).

Owns the order alone. It neither reads samples nor knows workers' processes; raycap/data executes it.

Training step s (counted over the whole run, from 0) consumes global batch s % steps_per_epoch of epoch
s // steps_per_epoch. Samples are shuffled by runs of neighbours, so that one read stays long; a run never crosses a
shard. The hash is our own (splitmix64), because numpy promises no stable random stream between its versions.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of a whole training run. Samples are numbered through the manifest: shard by shard, in file order."""

    shard_sizes: tuple[int, ...]
    global_batch_size: int
    seed: int
    run_length: int = 8

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch_size:
            raise ValueError(
                f"the training shards hold {self.num_samples} samples, fewer than one global batch of "
                f"{self.global_batch_size}; lower --global-batch-size or add shards"
            )

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        """Full global batches in one epoch; the incomplete last one is dropped."""
        return self.num_samples // self.global_batch_size

    @property
    def num_dropped(self) -> int:
        """Samples that one epoch leaves out because they do not fill a global batch; others in each epoch."""
        return self.num_samples - self.steps_per_epoch * self.global_batch_size

    def batch(self, step: int) -> Indices:
        """Sample numbers of the global batch of a step, (global_batch_size,), the same for every number of workers."""
        epoch, k = divmod(step, self.steps_per_epoch)
        return _epoch_order(self, epoch)[k * self.global_batch_size : (k + 1) * self.global_batch_size]

    def epoch(self, step: int) -> int:
        """The epoch a step belongs to."""
        return step // self.steps_per_epoch

    def rows(self, world: int) -> int:
        """Rows that every rank's share is padded to."""
        return rows_per_rank(self.global_batch_size, world)

    def share(self, step: int, rank: int, world: int) -> Indices:
        """The part of a step's global batch that one rank reads; parts differ in length by at most one."""
        return deal(self.batch(step), rank, world)


def deal(indices: Indices, rank: int, world: int) -> Indices:
    """The contiguous part of `indices` for one of `world` ranks, as even as possible."""
    n = len(indices)
    return indices[n * rank // world : n * (rank + 1) // world]


def rows_per_rank(global_batch_size: int, world: int) -> int:
    """The longest part `deal` makes: what every rank pads its own part to."""
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


@lru_cache(maxsize=3)
def _epoch_order(plan: Plan, epoch: int) -> Indices:
    """All sample numbers in the order of one epoch. Where runs begin differs by epoch, so that neighbours part."""
    starts_of_runs, first = [], 0
    for shard, size in enumerate(plan.shard_sizes):
        phase = int(_mix(np.array([shard], dtype=np.uint64), plan.seed, epoch, 1)[0] % plan.run_length)
        begins = np.arange(phase, size, plan.run_length, dtype=np.int64)
        if phase and size:
            begins = np.concatenate([np.zeros(1, np.int64), begins])
        starts_of_runs.append(begins + first)
        first += size
    starts = np.concatenate(starts_of_runs)
    stops = np.append(starts[1:], first)
    shuffled = np.argsort(_mix(np.arange(len(starts), dtype=np.uint64), plan.seed, epoch, 2), kind="stable")
    lengths = (stops - starts)[shuffled]
    within = np.arange(first, dtype=np.int64) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    order: Indices = np.repeat(starts[shuffled], lengths) + within
    order.flags.writeable = False  # shared by every caller of the cache
    return order


def _mix(values: npt.NDArray[np.uint64], *salts: int) -> npt.NDArray[np.uint64]:
    """splitmix64 of each value under the given salts, vectorised."""
    mask = 0xFFFFFFFFFFFFFFFF
    for salt in salts:
        values = values + np.uint64(((salt & mask) * _GOLDEN + _GOLDEN) & mask)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        values = values ^ (values >> np.uint64(31))
    return values
