"""The units of a bulk run as a Ray Data job: tasks read and prepare, Captioner processes caption and commit.

The only file of the room that knows Ray. Everything exact lives elsewhere: a unit that is made twice, by a retry or by
two runs, is committed once by its name.
"""

import functools
import json
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
from ray.data import DataContext, ExecutionResources

from raycap import storage
from raycap.bulk.plan import Job, rows_of
from raycap.bulk.progress import Progress
from raycap.bulk.unit import CaptionsPixels, PreparedUnit, count_kinds, make_unit, prepare_unit
from raycap.data.actor_pool import map_in_actors
from raycap.data.batch import Columns
from raycap.data.stream import quiet_context
from raycap.data.tasks import own_errors
from raycap.decode_pool import DecodePool

if TYPE_CHECKING:
    import pyarrow as pa

# Ray's own default repeats for ever a unit that kills its worker. The process itself may be started again without bound:
# every restart but those of a constructor, which have a bound of their own, costs some unit one of its retries.
_MAX_RETRIES, _MAX_INIT_DEATHS = 3, 3
_UNITS_PER_PLAN = 5000  # of one data set, whose plan lies in the driver; longer runs chain data sets
_NO_PROGRESS_S = 6 * 3600.0  # a unit of beam search on one CPU may take longer than Ray's half hour


def run_units(
    job: Job,
    manifest: "pa.Table",
    pending: Sequence[int],
    load: Callable[[], CaptionsPixels],
    progress: Progress,
    *,
    concurrency: int = 1,
    cpus_for_data: int = 1,
    num_gpus: float = 0.0,
) -> None:
    """Makes the pending units. load: called in each captioner process, pickled; num_gpus: of each.

    Raises the RaycapError of a task, of its class, or RaycapError if workers died too often. What is committed by
    then stays.
    """
    shared = ray.put((job, manifest))
    for first in range(0, len(pending), _UNITS_PER_PLAN):
        part = pending[first : first + _UNITS_PER_PLAN]
        with own_errors(f"captioning into {job.out!r}"):
            _run(job, shared, part, load, progress, concurrency, cpus_for_data, num_gpus)


def _run(
    job: Job,
    shared: Any,
    pending: Sequence[int],
    load: Callable[[], CaptionsPixels],
    progress: Progress,
    concurrency: int,
    cpus_for_data: int,
    num_gpus: float,
) -> None:
    with DataContext.current(_context(job, concurrency, cpus_for_data)):
        prepared = ray.data.from_items(
            [{"unit": unit} for unit in pending], override_num_blocks=len(pending)
        ).map_batches(
            functools.partial(_prepare, shared=shared),
            batch_size=None,
            batch_format="numpy",
            compute=ray.data.TaskPoolStrategy(size=cpus_for_data),
            num_cpus=1,
            max_retries=_MAX_RETRIES,
        )
        rows = map_in_actors(
            prepared,
            _CaptionUnit,
            (job, load),
            concurrency=concurrency,
            num_gpus=num_gpus,
            max_retries=_MAX_RETRIES,
            max_in_flight=2,
        )
        for row in rows.iter_rows():
            progress.add(**json.loads(row["done"]))


def _context(job: Job, concurrency: int, cpus_for_data: int) -> DataContext:
    context = quiet_context()
    # It would tell the user to drop what fails; the sentence of the failure is raised.
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").setLevel(logging.CRITICAL)
    context.execution_no_progress_timeout_s = _NO_PROGRESS_S
    context.max_consecutive_actor_init_deaths = _MAX_INIT_DEATHS
    # Reading must not run away from the captioners: two units for each, those being made, and one to spare.
    unit_bytes = job.unit_size * 3 * job.image.size**2
    context.execution_options.resource_limits = ExecutionResources(
        cpu=concurrency + cpus_for_data,
        object_store_memory=(2 * concurrency + 2 * cpus_for_data + 1) * max(unit_bytes, 2**20),
    )
    return context


def _prepare(block: Columns, shared: Any) -> Columns:
    """One unit's number in; one row per image out, and none for a unit that another run has committed meanwhile."""
    (unit,) = block["unit"].tolist()
    job, manifest = ray.get(shared)
    rows = rows_of(job, manifest, unit)
    if storage.exists(job.unit_url(unit)):
        none = np.zeros((1, 3, job.image.size, job.image.size), np.uint8)
        return {"unit": np.array([unit]), "about": np.array([json.dumps(rows.num_rows)], object), "pixels": none}
    prepared = prepare_unit(job, unit, rows, _pool(job.decode_timeout_s))
    about = json.dumps([prepared.rows, prepared.seconds])
    # Arrow wants as many values in every column: the words stand in the first row, and a unit may be all errors.
    pixels = prepared.pixels if len(prepared.pixels) else np.zeros((1, *prepared.pixels.shape[1:]), np.uint8)
    return {
        "unit": np.full(len(pixels), unit),
        "about": np.array([about] + [""] * (len(pixels) - 1), object),
        "pixels": pixels,
    }


@functools.lru_cache(maxsize=1)
def _pool(timeout_s: float) -> DecodePool:
    """One for each worker process, which Ray uses for many tasks: its child need not be started for each unit."""
    return DecodePool(timeout_s=timeout_s)


class _CaptionUnit:
    """A Ray Data actor: a prepared unit in, committed; one small row out."""

    def __init__(self, job: Job, load: Callable[[], CaptionsPixels]) -> None:
        self._job = job
        self._captioner = load()

    def __call__(self, block: Columns) -> Columns:
        about = json.loads(str(block["about"][0]))
        if isinstance(about, int):
            return _done(num_images=about, made=False, errors={}, seconds={})
        rows, seconds = about
        good = sum(row["error_kind"] is None for row in rows)
        prepared = PreparedUnit(unit=int(block["unit"][0]), rows=rows, pixels=block["pixels"][:good], seconds=seconds)
        made = make_unit(self._job, prepared, self._captioner)
        errors = count_kinds([row["error_kind"] for row in rows])
        return _done(num_images=len(rows), made=made, errors=errors, seconds=prepared.seconds)


def _done(**counts: Any) -> Columns:
    return {"done": np.array([json.dumps(counts)], object)}
