"""Packs a captioned data set into shards with Ray Data. Owns which sample goes into which shard, and the job's life:

1. read the annotations; order the samples by a hash of (seed, key), so that neighbours in a shard are random
2. claim the output with the plan `_index/plan.json`; another data set, seed or shard size is refused
3. one Ray task per missing shard: read its images, pack, commit `shard-00000.tar`, then `_index/shard-00000.json`
4. gather the indexes and seal the folder with manifest.parquet

The bytes depend on the data set, seed and samples_per_shard alone. Killed anywhere and run again, the job makes the
shards that are missing and ends with the same bytes.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from raycap import storage, units
from raycap.data.ticker import ticking
from raycap.datasets.coco import read_coco
from raycap.errors import RaycapError, StorageError
from raycap.schema import Sample, SampleRef, ShardIndex
from raycap.shards import MANIFEST, Manifest, pack_shard, read_manifest, write_manifest

if TYPE_CHECKING:
    import pyarrow as pa

INDEX = "_index"
PLAN = f"{INDEX}/plan.json"
REPORT_S = 2.0
_READ_THREADS = 16  # of one task, and only for URLs: reading an object is mostly waiting
_MAX_RETRIES = 3  # of a task whose process died; Ray's own default repeats a shard that kills its worker for ever


def prepare_shards(
    annotations: str,
    images: str,
    out: str,
    *,
    samples_per_shard: int = 1000,
    seed: int = 0,
    report: Callable[[str], None] = print,
    connect: Callable[[], None] = lambda: None,
) -> Manifest:
    """Packs a data set of COCO captions into out and returns its manifest. Ray is connected by the caller, or by
    `connect` once the input is known to be good and there is work to do.

    annotations: path or URL of captions_*.json. images, out: folders or URLs. report gets a line of key=value at least
    every few seconds. An out that is finished is returned without any Ray work; one that was begun is continued.
    Raises UserError if the annotations hold no usable sample, StorageError if out was begun with another data set, seed
    or shard size, or if an image cannot be read; what is packed by then stays and is used by the next run.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, it must be at least 1")
    read = read_coco(annotations, images)
    for reason, count in read.skipped.items():
        report(f"skipped={count} reason={reason!r}")
    _claim(out, read.samples, images, samples_per_shard, seed)
    if storage.exists(storage.join(out, MANIFEST)):
        manifest = read_manifest(out)
        report(f"finished_before=true shards={len(manifest.shards)} rows={manifest.num_samples} out={out!r}")
        return manifest
    shards = plan_shards(read.samples, samples_per_shard, seed)
    # A tar alone may lack its index; an index alone has lost its tar.
    have = units.done(out, ".tar") & units.done(storage.join(out, INDEX), ".json")
    if shards.keys() - have:
        connect()
    with _progress(report, shards, have) as add:
        error = _run({name: refs for name, refs in shards.items() if name not in have}, out, add)
    if error:
        raise StorageError(error)
    return write_manifest(out, _read_indexes(out, list(shards)))


def plan_shards(samples: Sequence[SampleRef], samples_per_shard: int, seed: int) -> dict[str, list[SampleRef]]:
    """Shard name without suffix -> its samples, in order; the last one may be short. Independent of the order given."""

    def place(ref: SampleRef) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{ref.key}".encode(), digest_size=16).digest(), ref.key

    ordered = sorted(samples, key=place)
    firsts = range(0, len(ordered), samples_per_shard)
    return {f"shard-{i:05d}": ordered[first : first + samples_per_shard] for i, first in enumerate(firsts)}


def pack_unit(out: str, name: str, refs: Sequence[SampleRef]) -> None:
    """Makes one shard: `name`.tar, then its index, which marks it as done. Holds one shard in memory.

    Raises StorageError if an image cannot be read or if out holds other bytes under that name.
    """
    num_threads = _READ_THREADS if any(storage.is_url(ref.url) for ref in refs) else 1
    with ThreadPoolExecutor(num_threads) as pool:
        samples = list(pool.map(_read, refs))
    data, index = pack_shard(f"{name}.tar", samples)
    units.commit(storage.join(out, index.shard), data)
    units.commit(_index_url(out, name), json.dumps(asdict(index)).encode())


def _read(ref: SampleRef) -> Sample:
    return Sample(
        key=ref.key,
        image=storage.read_bytes(ref.url),
        ext=PurePosixPath(ref.url).suffix.removeprefix("."),
        captions=ref.captions,
        image_id=ref.image_id,
    )


def _claim(out: str, samples: Sequence[SampleRef], images: str, samples_per_shard: int, seed: int) -> None:
    digest = hashlib.sha256()
    for ref in sorted(samples, key=lambda ref: ref.key):
        digest.update(json.dumps([ref.key, ref.url, ref.captions, ref.image_id]).encode() + b"\n")
    plan = {
        "samples_fingerprint": digest.hexdigest(),
        "num_samples": len(samples),
        "images": images,
        "samples_per_shard": samples_per_shard,
        "seed": seed,
    }
    if storage.exists(storage.join(out, MANIFEST)) and not storage.exists(storage.join(out, PLAN)):
        raise StorageError(f"cannot prepare shards in {out!r}: its {MANIFEST} was made otherwise; choose another --out")
    units.claim(storage.join(out, PLAN), plan)


def _index_url(out: str, name: str) -> str:
    return storage.join(out, INDEX, f"{name}.json")


def _read_indexes(out: str, names: Sequence[str]) -> list[ShardIndex]:
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        rows = [json.loads(data) for data in pool.map(lambda name: storage.read_bytes(_index_url(out, name)), names)]
    return [ShardIndex(**{**row, "keys": tuple(row["keys"]), "offsets": tuple(row["offsets"])}) for row in rows]


# ---- Ray


def _run(pending: dict[str, list[SampleRef]], out: str, add: Callable[[int], None]) -> str | None:
    """Packs the pending shards, one task each. The first failure ends the run: its sentence, or None.

    Failures come back as rows, because an exception in a task would reach the user as Ray's traceback. The caller
    raises them when this frame, and with it the data set that still runs, is gone.
    """
    if not pending:
        return None
    import ray.data
    import ray.exceptions

    from raycap.data.stream import quiet_context

    # JSON, because Arrow knows no column of ids that are sometimes numbers and sometimes strings.
    items = [{"name": name, "refs": json.dumps([asdict(ref) for ref in refs])} for name, refs in pending.items()]
    try:
        with ray.data.DataContext.current(quiet_context()):
            pack = functools.partial(_pack_block, out=out)
            tasks = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
                pack, batch_size=None, batch_format="pyarrow", max_retries=_MAX_RETRIES
            )
            for row in tasks.iter_rows():
                if row["error"]:
                    return str(row["error"])
                add(row["num_samples"])
    except ray.exceptions.RayError as e:
        reason = str(e).strip().splitlines()[-1].rstrip(".")
        raise RaycapError(f"packing shards into {out!r} broke off: {reason}; run the same command to continue") from e
    return None


def _pack_block(block: "pa.Table", out: str) -> "pa.Table":
    """One unit in, one row out: num_samples, and error, a sentence or ''."""
    import pyarrow as pa

    (unit,) = block.to_pylist()
    refs = [SampleRef(**{**row, "captions": tuple(row["captions"])}) for row in json.loads(unit["refs"])]
    error = ""
    try:
        pack_unit(out, unit["name"], refs)
    except RaycapError as e:
        error = str(e)
    return pa.table({"num_samples": [len(refs)], "error": [error]})


@contextlib.contextmanager
def _progress(
    report: Callable[[str], None], shards: dict[str, list[SampleRef]], have: set[str]
) -> Iterator[Callable[[int], None]]:
    """Reports a line every REPORT_S and at the end. Yields add(num_samples), to be called for each finished shard."""
    total = sum(len(refs) for refs in shards.values())
    first_rows = sum(len(refs) for name, refs in shards.items() if name in have)
    counts: dict[str, Any] = {"shards": len(shards.keys() & have), "rows": first_rows}
    start = time.monotonic()

    def add(num_samples: int) -> None:
        counts["shards"] += 1
        counts["rows"] += num_samples

    def line() -> str:
        seconds = time.monotonic() - start
        rate = (counts["rows"] - first_rows) / seconds if seconds else 0.0
        eta = f"{(total - counts['rows']) / rate:.0f}" if rate else "unknown"
        return (
            f"shards={counts['shards']}/{len(shards)} rows={counts['rows']}/{total} images_per_s={rate:.0f} "
            f"eta_s={eta} elapsed_s={seconds:.0f}"
        )

    with ticking(line, report, REPORT_S):
        yield add
