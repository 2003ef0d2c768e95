"""A stage of a Ray Data pipeline in processes that hold a model: what it is built from travels to them by value.

Ray Data hands its actors their arguments as objects in shared memory, and a handle of an actor of its own. A restart then
needs objects that may be lost, and Ray's core says so as an error, for each pool of each job. The version of Ray is bounded
in pyproject.toml.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any

import ray
import ray.data
from ray.data import Dataset
from ray.data._internal.execution.node_trackers.actor_location import get_or_create_actor_location_tracker
from ray.data._internal.execution.operators import actor_pool_map_operator
from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

_TRACKER = "ActorLocationTracker"  # Ray Data's own actor; its name and namespace


def map_in_actors(
    data: Dataset,
    actor_class: Callable[..., Any],
    args: tuple[Any, ...],
    *,
    concurrency: int,
    num_gpus: float,
    max_retries: int,
    max_in_flight: int | None = None,
) -> Dataset:
    """The blocks of data, each through a call of one of `concurrency` actors: actor_class(*args), with one CPU.

    args: some KB, pickled; all that is large is loaded from its path. max_retries: of a block whose actor died; the process is
    started again without bound. max_in_flight: blocks that an actor has or waits for.
    """
    _pass_by_value()
    return data.map_batches(
        actor_class,
        fn_constructor_args=args,
        batch_size=None,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=concurrency, max_tasks_in_flight_per_actor=max_in_flight),
        num_cpus=1,
        num_gpus=num_gpus,
        max_restarts=-1,
        max_task_retries=max_retries,
    )


class _Tracker:
    """In the place of a handle, which holds a reference to it: becomes the handle where it arrives."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return ray.get_actor, (_TRACKER, _TRACKER)


@functools.cache
def _pass_by_value() -> None:
    def tracker() -> _Tracker:
        get_or_create_actor_location_tracker()  # type: ignore[no-untyped-call]  # Ray's; so that there is one
        return _Tracker()

    actor_pool_map_operator.get_or_create_actor_location_tracker = tracker  # type: ignore[attr-defined]  # imported there
    for name, value in (("_map_transformer_ref", "_map_transformer"), ("_data_context_ref", "data_context")):
        setattr(ActorPoolMapOperator, name, property(operator.attrgetter(value)))
