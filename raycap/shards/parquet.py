"""One Parquet file of images as img2dataset writes them: rows -> samples, and its index.

The image is in the one binary column, named after its encoding (`jpg`); `key` and `caption` are beside it, and `status`
and `error_message` of rows whose image could not be downloaded. A read touches only the row groups it needs.
"""

import io
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import IO, Any

from raycap import storage
from raycap.errors import SampleErrorKind
from raycap.schema import Sample, SampleError, ShardIndex
from raycap.shards.growing import GrowingIndex, changed

_ROWS_AT_ONCE = 100  # img2dataset's row group


def index_parquet(
    name: str, file: IO[bytes] | io.RawIOBase, num_bytes: int, etag: str
) -> tuple[ShardIndex, Counter[str]]:
    """The index of a Parquet file of images, and how many rows are without one, by reason.

    Never raises for what is in the bytes: a row that makes no sample is among `skipped`; so is the file itself if it is
    cut, which leaves nothing that can be read, or if it has no images.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    index, failures = GrowingIndex(name), Counter[str]()
    try:
        with pq.ParquetFile(file) as table:
            column = image_column(table.schema_arrow)
            if column is None:
                index.skip(name, SampleErrorKind.BAD_SAMPLE)
            else:
                columns = [*_columns(table.schema_arrow, column), "status", "error_message"]
                batches = table.iter_batches(_ROWS_AT_ONCE, columns=columns, use_threads=False)
                for number, row in enumerate(row for batch in batches for row in _rows(batch)):
                    if row[column] is None:
                        failures[failure_reason(_text(row.get("status")), _text(row.get("error_message")))] += 1
                    else:
                        sample = _sample(row, column, f"{name}[{number}]", name)
                        index.add(sample, number, number + 1, zlib.crc32(row[column]))
    except (pa.ArrowException, OSError):
        index.skip(name, SampleErrorKind.TRUNCATED_SHARD)
    return index.build(num_bytes, etag), failures


def read_parquet_run(
    url: str, num_bytes: int, rows: Sequence[int], checksums: Sequence[int], places: Sequence[str]
) -> list[Sample | SampleError]:
    """The samples at these rows of the file, ascending, one for each checksum. places: what each is called if it has no key.

    Raises StorageError if the file is missing or shorter than num_bytes.
    """
    import pyarrow as pa

    try:
        column, found = _read_rows(url, num_bytes, rows)
    except (pa.ArrowException, OSError, IndexError):
        return [changed(place, url) for place in places]
    samples: list[Sample | SampleError] = []
    for row, checksum, place in zip(found, checksums, places, strict=True):
        sample = _sample(row, column, place, url)
        intact = row[column] is not None and zlib.crc32(row[column]) == checksum
        samples.append(sample if intact else changed(sample.key, url))
    return samples


def image_column(schema: Any) -> str | None:
    """The name of the column of images; None if there is none: a table that only goes with images elsewhere."""
    import pyarrow as pa

    binary = [field.name for field in schema if pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)]
    return binary[0] if len(binary) == 1 else None


def failure_reason(status: str | None, message: str | None) -> str:
    """What a row of img2dataset without an image is counted as."""
    return f"{status or 'no image'}: {message}" if message else status or "no image"


def _columns(schema: Any, image: str) -> list[str]:
    return [name for name in ("key", "caption", image) if name in schema.names]


def _rows(table: Any) -> list[dict[str, Any]]:
    """The rows of a table or batch, text as bytes: a file may hold text that is not UTF-8."""
    import pyarrow as pa

    plain = {
        pa.string(): pa.binary(),
        pa.large_string(): pa.large_binary(),
        pa.list_(pa.string()): pa.list_(pa.binary()),
    }
    columns = [column.cast(plain.get(column.type, column.type)) for column in table.columns]
    rows = zip(*(column.to_pylist() for column in columns), strict=True)
    return [dict(zip(table.schema.names, row, strict=True)) for row in rows]


def _text(found: Any) -> str | None:
    return found.decode("utf-8", "backslashreplace") if isinstance(found, bytes) else None


def _sample(row: dict[str, Any], column: str, place: str, where: str) -> Sample | SampleError:
    """place: what the sample is called if it has no key."""

    def error(kind: SampleErrorKind, reason: str) -> SampleError:
        key = _text(row.get("key")) or place
        return SampleError(key=key, kind=kind, message=f"sample {key!r} in {where!r} {reason}")

    found = row.get("caption")
    try:
        key = (row.get("key") or b"").decode()
        captions = [text.decode().strip() for text in (found if isinstance(found, list) else [found or b""])]
    except UnicodeDecodeError:
        return error(SampleErrorKind.BAD_SAMPLE, "has a key or a caption that is not UTF-8; write that shard again")
    except AttributeError:
        return error(SampleErrorKind.BAD_SAMPLE, "has a key or a caption that is no text; write that shard again")
    if not key:
        return error(SampleErrorKind.BAD_NAME, "has no key; give every row one")
    if not any(captions):
        return error(SampleErrorKind.NO_CAPTION, "has no caption; add one, or leave it out")
    return Sample(key=key, image=row[column] or b"", ext=column, captions=tuple(text for text in captions if text))


def _read_rows(url: str, num_bytes: int, rows: Sequence[int]) -> tuple[str, list[dict[str, Any]]]:
    """The image column's name, and these rows. Raises IndexError if the file has fewer."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(RangeFile(url, num_bytes), metadata=_footer(url, num_bytes), pre_buffer=True) as table:
        column = image_column(table.schema_arrow)
        if column is None:
            raise IndexError("it has no images")
        groups: list[int] = []
        before = first_row = 0
        for number in range(table.num_row_groups):
            behind = before + table.metadata.row_group(number).num_rows
            if before <= rows[-1] and rows[0] < behind:
                first_row = first_row if groups else before
                groups.append(number)
            before = behind
        found = table.read_row_groups(groups, columns=_columns(table.schema_arrow, column), use_threads=False)
        found = found.take([row - first_row for row in rows])
        return column, _rows(found)


@lru_cache(maxsize=64)
def _footer(url: str, num_bytes: int) -> Any:
    """The table's metadata; a shard is read many times an epoch."""
    import pyarrow.parquet as pq

    return pq.read_metadata(RangeFile(url, num_bytes))


class RangeFile(io.RawIOBase):
    """A file in storage whose size is known; each read is one range read."""

    def __init__(self, url: str, num_bytes: int) -> None:
        self._url, self._num_bytes, self._at = url, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._num_bytes}[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        stop = self._num_bytes if size is None or size < 0 else min(self._at + size, self._num_bytes)
        data = storage.read_range(self._url, self._at, max(stop, self._at))
        self._at += len(data)
        return data
