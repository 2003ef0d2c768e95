"""The end of a bulk run: every unit is read back and compared with the manifest, then the marker is written."""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from raycap import storage, units
from raycap.bulk.plan import FORMAT_VERSION, SUCCESS, Job, rows_of
from raycap.bulk.unit import count_kinds, decode_rows
from raycap.errors import ErrorKind, StorageError

if TYPE_CHECKING:
    import pyarrow as pa

_READ_THREADS = 16
_COLUMNS = ("key", "etag", "error_kind", "checkpoint", "settings")


def verify_units(job: Job, manifest: "pa.Table") -> Counter[str]:
    """Images by error kind over all units, each of which holds exactly its rows of the manifest, in order.

    Raises StorageError naming the first unit that does not.
    """
    total: Counter[str] = Counter()
    numbers = range(job.num_units(manifest.num_rows))
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for counts in pool.map(lambda unit: _verify_unit(job, manifest, unit), numbers):
            total += counts
    return total


def check_unreadable(errors: Counter[str], num_images: int, max_error_rate: float, out: str) -> None:
    """Raises StorageError if more images than this share could not be read. Those that can be read and are broken are no fault."""
    num_unreadable = errors[ErrorKind.UNREADABLE]
    if num_unreadable > max_error_rate * num_images:
        raise StorageError(
            f"{num_unreadable} of {num_images} images could not be read, more than --max-error-rate {max_error_rate}; their rows in "
            f"{out!r} say why: bring the images back and choose another --out, or give a higher rate to keep these rows"
        )


def seal(job: Job, num_images: int, errors: Counter[str], seconds: float) -> dict[str, Any]:
    """Creates _SUCCESS.json and returns what is in it: this run's totals, or those of the run that was faster."""
    summary = {
        "format_version": FORMAT_VERSION,
        "num_images": num_images,
        "num_captioned": num_images - errors.total(),
        "errors": dict(sorted(errors.items())),
        "checkpoint": job.checkpoint,
        "settings": job.settings_id,
        "verified": job.verified,
        "seconds": round(seconds, 1),
    }
    units.commit_first(storage.join(job.out, SUCCESS), (json.dumps(summary, indent=1) + "\n").encode())
    return read_summary(job.out)


def read_summary(out: str) -> dict[str, Any]:
    """What _SUCCESS.json says. Raises StorageError if it is none."""
    url = storage.join(out, SUCCESS)
    try:
        summary = json.loads(storage.read_bytes(url))
    except ValueError as error:
        raise StorageError(
            f"{url!r} cannot be read ({error}); delete it and run the same command to verify the rows again"
        ) from error
    if not isinstance(summary, dict) or not {"num_images", "num_captioned", "errors"} <= summary.keys():
        raise StorageError(
            f"{url!r} does not hold the totals of a run; delete it and run the same command to verify the rows again"
        )
    return summary


def _verify_unit(job: Job, manifest: "pa.Table", unit: int) -> Counter[str]:
    expected = rows_of(job, manifest, unit)
    url = job.unit_url(unit)
    try:
        found = decode_rows(storage.read_bytes(url), job.format, _COLUMNS)
    except ValueError as error:
        raise _damaged(url, f"it cannot be read ({str(error).splitlines()[0]})") from error
    if found["key"] != expected["key"].to_pylist() or found["etag"] != expected["etag"].to_pylist():
        raise _damaged(
            url, f"its {len(found['key'])} rows are not the {expected.num_rows} that the manifest has for it"
        )
    if set(found["checkpoint"]) != {job.checkpoint} or set(found["settings"]) != {job.settings_id}:
        raise _damaged(url, "its rows come from another checkpoint or other settings")
    return count_kinds(found["error_kind"])


def _damaged(url: str, reason: str) -> StorageError:
    return StorageError(f"{url!r} is not the unit this run wrote: {reason}; delete it and run the same command")
