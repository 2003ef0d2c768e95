"""Units of work that need no order, each in a Ray task of its own: few held at a time, the first failure ends the run.

And how an error of raycap comes out of any work of Ray: as what it was.
"""

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from raycap import errors
from raycap.errors import RaycapError

U = TypeVar("U")
R = TypeVar("R")

_MAX_RETRIES = 3  # of a task whose process died; more would repeat a unit that kills its worker for ever


def run_units(units: Iterator[U], work: Callable[[U], R], add: Callable[[R], None], doing: str) -> None:
    """Calls work(unit) for each unit, in a task with one CPU, and here add(result) as each is done, in any order.

    No more units are held than twice the CPUs of the cluster. Failures come back as values, because an exception in a task
    would reach the user as Ray's traceback. doing: such as "packing shards", for the sentence. Raises work's own RaycapError,
    or RaycapError if Ray broke off.
    """
    import ray

    # Any: Ray's types know no generic functions.
    task: Any = ray.remote(_attempt).options(num_cpus=1, max_retries=_MAX_RETRIES, scheduling_strategy="SPREAD")
    working: list[ray.ObjectRef[R | RaycapError]] = []
    with own_errors(doing):
        while True:
            most = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
            working += [task.remote(work, unit) for unit in itertools.islice(units, most - len(working))]
            if not working:
                return
            done, working = ray.wait(working)
            for result in ray.get(done):
                if isinstance(result, RaycapError):
                    raise result
                add(result)


def run_here(units: Iterator[U], work: Callable[[U], R], add: Callable[[R], None], doing: str) -> None:  # noqa: ARG001
    """run_units in this process, one unit after the other: for less work than Ray takes to start."""
    for unit in units:
        add(work(unit))


def _attempt(work: Callable[[U], R], unit: U) -> R | RaycapError:
    try:
        return work(unit)
    except RaycapError as e:
        return e


def waiting_for() -> str:
    """What a job that uses Ray, and has nothing done yet, waits for: the end of its line of key=value."""
    import ray

    if not ray.is_initialized():
        return " waiting_for='Ray to start'"
    from raycap import cluster

    return f" waiting_for={cluster.waits_for()!r}"


@contextlib.contextmanager
def own_errors(doing: str) -> Iterator[None]:
    """Raises raycap's own error, of its class, where a task or an actor failed with one, and RaycapError if Ray broke off.

    Ray Data's exceptions carry the error of a task as text only, in a traceback. doing: such as "packing shards".
    """
    import ray.exceptions

    try:
        yield
    except ray.exceptions.RayError as error:
        raised = re.findall(r"^raycap\.errors\.(\w+): (.+)$", str(error), re.MULTILINE)
        if not raised:
            # Of a process that died Ray goes on with ids and with advice for its own developers.
            reason = re.split(r"\. (?:Worker exit|Owner Id)", str(error).strip().splitlines()[-1])[0].rstrip(".")
            raise RaycapError(f"{doing} broke off: {reason}; run the same command again") from error
        name, sentence = raised[-1]
        error_class: type[RaycapError] = getattr(errors, name)
        if issubclass(error_class, errors.ImageError):  # which one image may have, and no unit of work
            error_class = RaycapError
        raise error_class(sentence) from error
