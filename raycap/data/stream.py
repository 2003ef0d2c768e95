"""A plan, executed by Ray Data: what each rank's training or evaluation loop iterates over.

One task loads a few consecutive steps of one rank and yields them as one block; blocks arrive in plan order, so the stream
is exactly the plan for any number of workers and from any step. Each rank runs its own streaming executor, bounded to its
own share of CPUs, because Ray Data's splitting may give ranks unequal counts.
"""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import ray.data
from ray.data import DataContext, Dataset, ExecutionResources
from ray.util.annotations import RayDeprecationWarning

from raycap.data.batch import Batch, Columns, Order, Source, load_steps, split_steps
from raycap.errors import StorageError

BLOCK_BYTES = (
    16 * 2**20
)  # pixels of one task's block: long enough to hide Ray's cost per task, short enough to start soon
MAX_STEPS_PER_TASK = 8
MAX_TASKS = 2000  # of one data set; longer runs chain data sets, so that planning stays short


def iterate(
    order: Order, rank: int, world: int, *, source: Source, start: int, stop: int, num_cpus: int = 1
) -> Iterator[Batch]:
    """Batches of steps start .. stop - 1 for one rank, in order. num_cpus: Ray CPUs that loading may use at once."""
    if start >= stop:
        return
    shared = ray.put((order, source))
    size = _steps_per_task(order, source, world)
    for first in range(start, stop, size * MAX_TASKS):
        last = min(first + size * MAX_TASKS, stop)
        blocks = steps_dataset(shared, first, last, size, rank, world, num_cpus=num_cpus)
        with own_errors():
            for block in blocks.iterator().iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=2):
                yield from split_steps(block)


def steps_dataset(
    shared: "ray.ObjectRef[tuple[Order, Source]]",
    start: int,
    stop: int,
    size: int,
    rank: int,
    world: int,
    *,
    num_cpus: int,
) -> Dataset:
    """A lazy data set of one block per task, `size` steps in each, in order."""
    context = quiet_context()
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ExecutionResources(cpu=num_cpus)
    num_tasks = -(-(stop - start) // size)
    options = {"shared": shared, "start": start, "stop": stop, "size": size, "rank": rank, "world": world}
    with DataContext.current(context):
        numbers = ray.data.range(num_tasks, override_num_blocks=num_tasks)
    return numbers.map_batches(_load, batch_size=None, fn_kwargs=options, num_cpus=1)  # type: ignore[arg-type]  # its types know no fn_kwargs


@contextmanager
def own_errors() -> Iterator[None]:
    """Raises raycap's own error where a task failed with one; Ray's exception carries it as text only."""
    try:
        yield
    except ray.exceptions.RayError as error:
        sentences = re.findall(r"^raycap\.errors\.\w+: (.+)$", str(error), re.MULTILINE)
        if not sentences:
            raise
        raise StorageError(sentences[-1]) from error


def quiet_context() -> DataContext:
    """Settings for a pipeline of whole units: a block is what its task made, and only raycap reports progress."""
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.target_max_block_size = None  # nothing merges or splits blocks
    # Ray 2.64 wants to drop arguments such as max_retries and names no other way to bound retries.
    warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated", RayDeprecationWarning)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that its bars are off
    return context


def _load(
    block: Columns,
    shared: "ray.ObjectRef[tuple[Order, Source]]",
    start: int,
    stop: int,
    size: int,
    rank: int,
    world: int,
) -> Columns:
    (number,) = block["id"].tolist()
    first = start + number * size
    order, source = _fetch(shared)
    return load_steps(order, source, range(first, min(first + size, stop)), rank, world)


_fetched: dict[str, Any] = {}


def _fetch(shared: "ray.ObjectRef[tuple[Order, Source]]") -> tuple[Order, Source]:
    """The shared order and source, deserialised once per process: a manifest of millions of keys is not small."""
    if shared.hex() not in _fetched:
        _fetched.clear()
        _fetched[shared.hex()] = ray.get(shared)
    result: tuple[Order, Source] = _fetched[shared.hex()]
    return result


def _steps_per_task(order: Order, source: Source, world: int) -> int:
    step_bytes = order.rows(world) * 3 * source.image.size**2
    return max(1, min(MAX_STEPS_PER_TASK, BLOCK_BYTES // step_bytes))
