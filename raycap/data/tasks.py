"""Units of work that need no order, each in a Ray task of its own: few held at a time, the first failure ends the run."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from raycap.errors import RaycapError, StorageError

U = TypeVar("U")
R = TypeVar("R")

_MAX_RETRIES = 3  # of a task whose process died; more would repeat a unit that kills its worker for ever


def run_units(units: Iterator[U], work: Callable[[U], R], add: Callable[[R], None], doing: str) -> None:
    """Calls work(unit) for each unit, in a task with one CPU, and here add(result) as each is done, in any order.

    No more units are held than twice the CPUs of the cluster. Failures come back as values, because an exception in a task
    would reach the user as Ray's traceback. doing: such as "packing shards", for the sentence. Raises StorageError with the
    sentence of work's own RaycapError, or RaycapError if Ray broke off.
    """
    import ray
    import ray.exceptions

    # Any: Ray's types know no generic functions.
    task: Any = ray.remote(_attempt).options(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")
    working: list[ray.ObjectRef[R | _Failed]] = []
    try:
        while True:
            most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
            working += [task.remote(work, unit) for unit in itertools.islice(units, most - len(working))]
            if not working:
                return
            done, working = ray.wait(working)
            for result in ray.get(done):
                if isinstance(result, _Failed):
                    raise StorageError(result.sentence)
                add(result)
    except ray.exceptions.RayError as e:
        reason = str(e).strip().splitlines()[-1].rstrip(".")
        raise RaycapError(f"{doing} broke off: {reason}; run the same command to continue") from e


@dataclass(frozen=True, slots=True)
class _Failed:
    sentence: str


def _attempt(work: Callable[[U], R], unit: U) -> R | _Failed:
    try:
        return work(unit)
    except RaycapError as e:
        return _Failed(str(e))
