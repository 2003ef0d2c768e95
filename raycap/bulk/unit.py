"""One unit of a bulk run, without Ray: its images read and prepared, captioned, and committed as one file.

The tasks and actors of raycap/bulk/run.py call these functions; tests call them directly.
"""

import functools
import io
import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from raycap import storage, units
from raycap.bulk.plan import Job, entries_of
from raycap.captioner import check_finite
from raycap.decode_pool import DecodePool
from raycap.errors import ErrorKind, ImageError, StorageError
from raycap.image import MAX_BYTES, Prepared
from raycap.schema import CaptionResult, DecodeSettings, caption_schema
from raycap.storage import Entry, EntryError

if TYPE_CHECKING:
    import pyarrow as pa

Pixels = npt.NDArray[np.uint8]
_READ_THREADS = 16  # of one task, and only for URLs: reading an object is mostly waiting
# What is read ahead while the images before are decoded: enough to hide a round trip, little enough for memory.
_SLICE_IMAGES, _SLICE_BYTES = 64, 64 * 2**20


class CaptionsPixels(Protocol):
    """What bulk asks of a model; a Captioner is one."""

    def caption_prepared(
        self, pixel_values: Pixels, settings: DecodeSettings | None = None
    ) -> Sequence[CaptionResult]: ...


@dataclass(kw_only=True)
class PreparedUnit:
    """Images of one unit before the model. rows: one per image, in order; those without error_kind own the rows of pixels.

    pixels: uint8 (number of rows without error, 3, S, S).
    """

    unit: int
    rows: list[dict[str, Any]]
    pixels: Pixels
    seconds: dict[str, float] = field(default_factory=dict)


def prepare_unit(job: Job, unit: int, rows: "pa.Table", pool: DecodePool) -> PreparedUnit:
    """The unit's images, read and prepared; one that cannot be becomes a row with its error.

    rows: the manifest's rows of the unit. Raises StorageError if the storage itself fails.
    """
    entries = entries_of(rows)
    prepared: list[Prepared | ImageError] = []
    decode_s = 0.0
    reader = _Reader(job.images)
    for data in reader.slices(entries):
        begun = time.perf_counter()
        found = [item for item in data if isinstance(item, bytes)]
        decoded = iter(pool.prepare_all(found, job.image))
        prepared += [next(decoded) if isinstance(item, bytes) else item for item in data]
        decode_s += time.perf_counter() - begun
    good = [item.pixels for item in prepared if isinstance(item, Prepared)]
    size = job.image.size
    return PreparedUnit(
        unit=unit,
        rows=[_row(entry, item) for entry, item in zip(entries, prepared, strict=True)],
        pixels=np.stack(good) if good else np.zeros((0, 3, size, size), np.uint8),
        seconds={"read": reader.read_s, "decode": decode_s},
    )


def caption_unit(job: Job, prepared: PreparedUnit, captioner: CaptionsPixels) -> "pa.Table":
    """The unit's rows by caption_schema, captioned in micro batches; the seconds are noted in `prepared`."""
    import pyarrow as pa

    begun = time.perf_counter()
    results: list[CaptionResult] = []
    for first in range(0, len(prepared.pixels), job.micro_batch_size):
        batch = prepared.pixels[first : first + job.micro_batch_size]
        results += captioner.caption_prepared(batch, job.settings)
    prepared.seconds["caption"] = time.perf_counter() - begun
    check_finite(result.error_kind for result in results)
    each = iter(results)
    constant = {"checkpoint": job.checkpoint, "settings": job.settings_id, "verified": job.verified}
    rows = [row | (_captioned(next(each)) if row["error_kind"] is None else {}) | constant for row in prepared.rows]
    assert next(each, None) is None, "more captions than images"
    return pa.Table.from_pylist(rows, schema=caption_schema())


def make_unit(job: Job, prepared: PreparedUnit, captioner: CaptionsPixels) -> bool:
    """Captions the unit and creates its file: True if this call did, False if another run or an attempt before had."""
    table = caption_unit(job, prepared, captioner)
    begun = time.perf_counter()
    created = units.commit_first(job.unit_url(prepared.unit), encode_rows(table, job.format))
    prepared.seconds["write"] = time.perf_counter() - begun
    return created


def encode_rows(table: "pa.Table", format_: str) -> bytes:
    """The bytes of a unit's file."""
    if format_ == "jsonl":
        return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in table.to_pylist())
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()


def decode_rows(data: bytes, format_: str, columns: Sequence[str]) -> dict[str, list[Any]]:
    """Some columns of a unit's file. Raises ValueError (Arrow's errors are such) if it is not one."""
    if format_ == "jsonl":
        rows = [json.loads(line) for line in data.split(b"\n")[:-1]]
        if any(not isinstance(row, dict) or not row.keys() >= set(columns) for row in rows):
            raise ValueError("its lines are not caption rows")
        return {name: [row[name] for row in rows] for name in columns}
    import pyarrow as pa
    import pyarrow.parquet as pq

    result: dict[str, list[Any]] = pq.read_table(pa.BufferReader(data), columns=list(columns)).to_pydict()
    if missing := set(columns) - result.keys():
        raise ValueError(f"it has no column {missing.pop()!r}")
    return result


def count_kinds(error_kinds: Sequence[str | None]) -> Counter[str]:
    """Images by error kind; those with a caption are not in it."""
    return Counter(kind for kind in error_kinds if kind is not None)


def _row(entry: Entry, item: Prepared | ImageError) -> dict[str, Any]:
    row = {"key": entry.name, "num_bytes": entry.num_bytes, "etag": entry.etag, "error_kind": None}
    if isinstance(item, ImageError):
        return row | {"error_kind": item.kind.value, "error": str(item)}
    return row | {"width": item.width, "height": item.height}


def _captioned(result: CaptionResult) -> dict[str, Any]:
    return asdict(result) | {"candidates": [candidate._asdict() for candidate in result.candidates]}


class _Reader:
    """Reads a unit's images slice by slice, one slice ahead of its user. read_s: seconds that reading took."""

    def __init__(self, root: str) -> None:
        self.read_s = 0.0
        self._root = root
        self._looked = False  # whether the root was found well after an image could not be read
        self._access = storage.AccessWatch()

    def slices(self, entries: Sequence[Entry]) -> Iterator[list[bytes | ImageError]]:
        """Bytes or error of each image, in order, in slices."""
        num_threads = _READ_THREADS if storage.is_url(self._root) else 1
        with ThreadPoolExecutor(1) as ahead, ThreadPoolExecutor(num_threads) as threads:
            waiting = None
            for part in _cut(entries):
                following = ahead.submit(self._read_slice, part, threads)
                if waiting is not None:
                    yield waiting.result()
                waiting = following
            if waiting is not None:
                yield waiting.result()

    def _read_slice(self, entries: Sequence[Entry], threads: ThreadPoolExecutor) -> list[bytes | ImageError]:
        begun = time.perf_counter()
        each = threads.map(self._read, entries) if storage.is_url(self._root) else map(self._read, entries)
        result = list(each)
        self._access.check_all(len(result))
        self.read_s += time.perf_counter() - begun
        return result

    def _read(self, entry: Entry) -> bytes | ImageError:
        if entry.num_bytes > MAX_BYTES:
            message = f"the image holds {entry.num_bytes} bytes, more than {MAX_BYTES}"
            return ImageError(ErrorKind.TOO_MANY_BYTES, message)
        try:
            data = storage.read_entry(self._root, entry)
            self._access.worked(functools.partial(storage.read_entry, self._root, entry))
            return data
        except EntryError as error:
            self._look(error)
            self._access.check(error)
            return ImageError(ErrorKind.UNREADABLE, str(error))

    def _look(self, error: EntryError) -> None:
        """Raises StorageError if not this image but the whole root is gone: then no row must say "unreadable"."""
        if not self._looked and not storage.has_files(self._root):
            raise StorageError(
                f"{error}, and nothing is left below {self._root!r}; bring the images back and run the same command"
            ) from error
        self._looked = True


def _cut(entries: Sequence[Entry]) -> Iterator[Sequence[Entry]]:
    """Neighbours in slices of at most _SLICE_IMAGES images and, but for a single large image, _SLICE_BYTES bytes."""
    part: list[Entry] = []
    num_bytes = 0
    for entry in entries:
        if part and (len(part) == _SLICE_IMAGES or num_bytes + entry.num_bytes > _SLICE_BYTES):
            yield part
            part, num_bytes = [], 0
        part.append(entry)
        num_bytes += entry.num_bytes
    if part:
        yield part
