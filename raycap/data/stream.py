"""A plan, executed by Ray Data: what each rank's training or evaluation loop iterates over.

A task executes a few reads of the plan, each a run of neighbours in a shard, and yields them as one block of uint8 pixels
and token ids. Blocks arrive in plan order and are put together to batches here, so the stream is exactly the plan for any
number of workers and from any step. Each rank runs its own streaming executor, because Ray Data's splitting may give ranks
unequal counts; raycap/DECISIONS.md has the comparison with one executor per node.
"""

import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import ray
import ray.data
from ray.data import DataContext, Dataset, ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from raycap.data.batch import Batch, Columns, Source, assemble, load_reads
from raycap.data.tasks import own_errors
from raycap.image import keep_freed_memory
from raycap.order import Indices, Order, Read
from raycap.shards import Manifest

MAX_ROWS = 128  # of a task: Ray Data costs about 35 ms of CPU a task, so it should work for a quarter of a second
MIN_ROWS = 16
MAX_READS = 8_000  # of one data set; longer runs chain data sets, because planning one takes a millisecond a task
_UNLIMITED = 2**50  # bytes; infinity would not stay a number under Ray Data's arithmetic
T = TypeVar("T")


def iterate(
    order: Order,
    rank: int,
    world: int,
    *,
    manifest: "ray.ObjectRef[Manifest]",
    source: Source,
    start: int,
    stop: int,
    num_cpus: int = 1,
    store_bytes: int | None = None,
) -> Iterator[Batch]:
    """Batches of steps start .. stop - 1 for one rank, in order.

    num_cpus: Ray CPUs that are there for this rank's reads. store_bytes: this rank's share of Ray's shared memory, which
    bounds how far ahead is read; without it half of all there is.
    """
    blocks = _blocks(order.reads(start, stop, rank, world), manifest, source, num_cpus, store_bytes)
    return assemble(blocks, order, source, start=start, stop=stop, rank=rank, world=world)


def _blocks(
    reads: Iterator[Read],
    manifest: "ray.ObjectRef[Manifest]",
    source: Source,
    num_cpus: int,
    store_bytes: int | None,
) -> Iterator[Columns]:
    """The blocks of the data sets of MAX_READS reads; the next one starts while the last blocks of one are waited for."""

    # With several tasks in flight, Ray Data looks for finished ones every 0.1 s only. Ray runs no more than there are CPUs, so
    # the spare ones wait for a CPU that becomes free. Not more of them: ranks would starve each other.
    num_tasks = num_cpus + num_cpus // 2

    def start() -> tuple[int, Iterator[Columns]] | None:
        if not (part := list(itertools.islice(reads, MAX_READS))):
            return None
        tasks = _Tasks.of(part, num_cpus)
        data = _dataset(tasks, manifest, source, num_tasks, store_bytes)
        blocks = iter(data.iterator().iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1))
        return len(tasks), itertools.chain([next(blocks)], blocks)

    with ThreadPoolExecutor(1) as ahead, own_errors("reading the shards"):
        coming: Future[tuple[int, Iterator[Columns]] | None] = ahead.submit(start)
        while (data_set := coming.result()) is not None:
            num_blocks, blocks = data_set
            for number, block in enumerate(blocks):
                if number == max(0, num_blocks - 1 - num_tasks):
                    coming = ahead.submit(start)
                yield block


def reads_dataset(
    reads: Sequence[Read], manifest: "ray.ObjectRef[Manifest]", source: Source, *, num_cpus: int
) -> Dataset:
    """A lazy data set of blocks of whole reads, in order; `load_reads` says what is in them.

    num_cpus: of all that is run on it, actors included.
    """
    return _dataset(_Tasks.of(reads, num_cpus), manifest, source, 2 * num_cpus, None)


def _dataset(
    tasks: "_Tasks", manifest: "ray.ObjectRef[Manifest]", source: Source, num_tasks: int, store_bytes: int | None
) -> Dataset:
    context = quiet_context()
    context.execution_options.preserve_order = True
    _limit(context, num_tasks, store_bytes)
    options = {"tasks": ray.put(tasks), "manifest": manifest, "source": ray.put(source)}
    with DataContext.current(context):
        numbers = ray.data.range(len(tasks), override_num_blocks=len(tasks))
    return numbers.map_batches(_load, batch_size=None, fn_kwargs=options, num_cpus=1)  # type: ignore[arg-type]  # its types know no fn_kwargs


def _limit(context: DataContext, num_tasks: int, store_bytes: int | None) -> None:
    """Sets how many tasks of one CPU may be in flight, running or waiting for a CPU, and how much shared memory they may fill.

    Ray Data takes the lesser of resource_limits and of the CPUs it has heard are free, then subtracts exclude_resources. It
    hears of none in the first second, and would never hand out more tasks than CPUs. So all of the limit is put into what is
    excluded, with its sign reversed. Actors behind the tasks count as tasks; their GPUs are not limited.
    """
    if store_bytes is None:
        store_bytes = int(ray.cluster_resources()["object_store_memory"] / 2)  # type: ignore[no-untyped-call]
    context.execution_options.resource_limits = ExecutionResources(cpu=0, gpu=0, object_store_memory=0, memory=0)
    context.execution_options.exclude_resources = ExecutionResources(
        cpu=-num_tasks, gpu=-_UNLIMITED, object_store_memory=-store_bytes, memory=-_UNLIMITED
    )


def quiet_context() -> DataContext:
    """Settings for a pipeline of whole units: a block is what its task made, and only raycap reports progress."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # nothing merges or splits blocks
    # Ray is to drop arguments such as max_retries, and exclude_resources, and names nothing that does the same. The version
    # is bounded in pyproject.toml.
    for name in ("ray_remote_args", "ExecutionOptions.exclude_resources"):
        warnings.filterwarnings("ignore", f"`{name}` is deprecated", RayDeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
    return context


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tasks:
    """Reads as flat arrays, which every process of a node sees without a copy.

    cuts: where each read begins in indices, steps and rows, (num_reads + 1,). firsts: the first read of each task, and
    behind the last, (num_tasks + 1,).
    """

    epochs: Indices
    shards: Indices
    cuts: Indices
    indices: Indices
    steps: Indices
    rows: Indices
    firsts: Indices

    @classmethod
    def of(cls, reads: Sequence[Read], num_cpus: int) -> "_Tasks":
        """Neighbouring reads of up to MAX_ROWS rows a task; of less where that would leave CPUs without one."""
        cuts = np.cumsum([0, *(len(read.indices) for read in reads)])
        rows = min(MAX_ROWS, max(MIN_ROWS, int(cuts[-1]) // (4 * num_cpus)))
        firsts = [0]
        for number in range(1, len(reads)):
            if cuts[number + 1] - cuts[firsts[-1]] > rows:
                firsts.append(number)
        return cls(
            epochs=np.array([read.epoch for read in reads]),
            shards=np.array([read.shard for read in reads]),
            cuts=cuts,
            indices=np.concatenate([read.indices for read in reads]),
            steps=np.concatenate([read.steps for read in reads]),
            rows=np.concatenate([read.rows for read in reads]),
            firsts=np.array([*firsts, len(reads)]),
        )

    def __len__(self) -> int:
        return len(self.firsts) - 1

    def __getitem__(self, number: int) -> list[Read]:
        return [self._read(i) for i in range(int(self.firsts[number]), int(self.firsts[number + 1]))]

    def _read(self, number: int) -> Read:
        part = slice(int(self.cuts[number]), int(self.cuts[number + 1]))
        return Read(
            epoch=int(self.epochs[number]),
            shard=int(self.shards[number]),
            indices=self.indices[part],
            steps=self.steps[part],
            rows=self.rows[part],
        )


def _load(
    block: Columns,
    tasks: "ray.ObjectRef[_Tasks]",
    manifest: "ray.ObjectRef[Manifest]",
    source: "ray.ObjectRef[Source]",
) -> Columns:
    keep_freed_memory()
    (number,) = block["id"].tolist()
    return load_reads(_fetch(tasks)[number], _fetch(manifest), _fetch(source))


_fetched: dict[str, Any] = {}
_MAX_FETCHED = 64  # a process works for all ranks of its node


def _fetch(ref: "ray.ObjectRef[T]") -> T:
    """The object of a reference, fetched once per process; its arrays are views of Ray's shared memory."""
    if ref.hex() not in _fetched:
        while len(_fetched) >= _MAX_FETCHED:
            _fetched.pop(next(iter(_fetched)))
        _fetched[ref.hex()] = ray.get(ref)
    result: T = _fetched[ref.hex()]
    return result
