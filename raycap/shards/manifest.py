"""The manifest of a folder of shards: how many samples each has and where they lie. Keys come with the samples."""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from raycap import storage, units
from raycap.errors import StorageError
from raycap.schema import ShardIndex, manifest_schema

MANIFEST = "manifest.parquet"
_ROWS_PER_GROUP = 64  # shards that are decoded at once
_METADATA = b"raycap"

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Manifest:
    """The shards of a folder, in order. Samples are numbered through: shard by shard, in file order.

    shards: file names below root. sizes: int64 (num_shards,), samples of each. num_bytes: int64 (num_shards,), of the files.
    offsets: int64 (num_samples + num_shards,), those of each shard, as in ShardIndex, below each other. checksums: uint32
    (num_samples,). skipped: (key, SampleErrorKind) of what was left out. failures: counts of what was not downloaded,
    by reason. fingerprint: sha256 over the shards' etags in order, hex: the same for the same bytes at any root.
    """

    root: str
    shards: tuple[str, ...]
    sizes: Int64s
    num_bytes: Int64s
    offsets: Int64s
    checksums: npt.NDArray[np.uint32]
    fingerprint: str
    skipped: tuple[tuple[str, str], ...] = ()
    failures: dict[str, int] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        return len(self.checksums)

    @cached_property
    def first_samples(self) -> Int64s:
        """The number of each shard's first sample, int64 (num_shards,)."""
        return np.cumsum(self.sizes) - self.sizes

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the shard, index in the shard) of sample i. Raises IndexError outside 0 .. num_samples - 1."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        number = int(np.searchsorted(self.first_samples, i, "right")) - 1
        return number, i - int(self.first_samples[number])

    def places(self, shard_number: int, start: int, stop: int) -> tuple[list[int], list[int]]:
        """(offsets, stop - start + 1 of them; checksums) of samples start .. stop - 1 of a shard."""
        assert 0 <= start <= stop <= self.sizes[shard_number], (shard_number, start, stop)
        first = int(self.first_samples[shard_number])
        offsets = self.offsets[first + shard_number + start : first + shard_number + stop + 1]
        return offsets.tolist(), self.checksums[first + start : first + stop].tolist()


class ShardArrays(NamedTuple):
    """A ShardIndex without its keys, as arrays: what a manifest is made of."""

    shard: str
    num_bytes: int
    etag: str
    offsets: Int64s
    checksums: npt.NDArray[np.uint32]
    skipped: tuple[tuple[str, str], ...]


def without_keys(index: ShardIndex) -> ShardArrays:
    """The index as a manifest keeps it."""
    offsets, checksums = np.array(index.offsets, np.int64), np.array(index.checksums, np.uint32)
    return ShardArrays(index.shard, index.num_bytes, index.etag, offsets, checksums, index.skipped)


def write_manifest(root: str, shards: Iterable[ShardIndex]) -> Manifest:
    """Seal root with the manifest of these shards, in this order. Raises StorageError if it has another manifest."""
    parts = [without_keys(index) for index in shards]
    units.seal(root, MANIFEST, manifest_bytes(parts))
    return build_manifest(root, parts, {})


def manifest_bytes(parts: list[ShardArrays], failures: dict[str, int] | None = None) -> bytes:
    """The content of manifest.parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def lists(arrays: list[Any], kind: Any) -> Any:
        ends = np.cumsum([0, *(len(array) for array in arrays)], dtype=np.int32)
        values = np.concatenate(arrays) if arrays else np.zeros(0)
        return pa.ListArray.from_arrays(ends, pa.array(values, kind))

    columns = {
        "shard": [part.shard for part in parts],
        "num_samples": [len(part.checksums) for part in parts],
        "num_bytes": [part.num_bytes for part in parts],
        "etag": [part.etag for part in parts],
        "offsets": lists([part.offsets for part in parts], pa.int64()),
        "checksums": lists([part.checksums for part in parts], pa.uint32()),
        "skipped": [[{"key": key, "kind": kind} for key, kind in part.skipped] for part in parts],
    }
    about = {_METADATA: json.dumps({"failures": failures or {}}, sort_keys=True).encode()}
    sink = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=manifest_schema().with_metadata(about)),
        sink,
        compression="zstd",
        row_group_size=_ROWS_PER_GROUP,
        use_dictionary=False,
        column_encoding={"offsets.list.element": "DELTA_BINARY_PACKED"},
    )
    return sink.getvalue()


def build_manifest(root: str, parts: list[ShardArrays], failures: dict[str, int]) -> Manifest:
    """The manifest of these shards below root."""
    return Manifest(
        root=root,
        shards=tuple(part.shard for part in parts),
        sizes=np.array([len(part.checksums) for part in parts], np.int64),
        num_bytes=np.array([part.num_bytes for part in parts], np.int64),
        offsets=np.concatenate([np.zeros(0, np.int64), *(part.offsets for part in parts)]),
        checksums=np.concatenate([np.zeros(0, np.uint32), *(part.checksums for part in parts)]),
        fingerprint=_fingerprint(part.etag for part in parts),
        skipped=tuple(skipped for part in parts for skipped in part.skipped),
        failures=failures,
    )


def read_manifest(root: str, index_root: str | None = None) -> Manifest:
    """The manifest of the shards below root: the one beside them, else the one that indexing them left in index_root.

    Raises StorageError if it is missing, empty, or not a manifest.
    """
    import pyarrow as pa

    url = storage.join(root, MANIFEST)
    if index_root is not None and not storage.exists(url):
        url = storage.join(index_root, MANIFEST)
    if not storage.exists(url):
        raise StorageError(f"no shards at {root!r}: there is no {MANIFEST!r}; run jobs/prepare_shards.py first")
    try:
        with tempfile.TemporaryFile() as copy:  # so that a large one is not in memory beside what it says
            copy.write(storage.read_bytes(url))
            copy.seek(0)
            return _parse(copy, root)
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as e:
        raise StorageError(f"{url!r} is not a manifest of shards: {e}; run jobs/prepare_shards.py first") from e


def _parse(copy: IO[bytes], root: str) -> Manifest:
    """Decodes the long columns a few shards at a time into arrays of their final size: no second copy of them exists."""
    import pyarrow.parquet as pq

    file = pq.ParquetFile(copy)
    schema = file.schema_arrow
    if "keys" in schema.names:
        raise ValueError("it was written by an earlier version, with the keys in it")
    if not schema.equals(manifest_schema()):
        raise ValueError(f"its columns are {', '.join(schema.names) or 'none'}")
    if not file.metadata.num_rows:
        raise ValueError("it lists no shards")
    about = file.read(["shard", "num_samples", "num_bytes", "etag", "skipped"], use_threads=False)
    sizes = about["num_samples"].to_numpy()
    num_samples = int(sizes.sum())
    offsets, checksums = np.empty(num_samples + len(sizes), np.int64), np.empty(num_samples, np.uint32)
    row = first = 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, ["offsets", "checksums"], use_threads=False).combine_chunks()
        its_sizes = sizes[row : row + len(table)]
        for target, at, name, lengths in (
            (offsets, first + row, "offsets", its_sizes + 1),
            (checksums, first, "checksums", its_sizes),
        ):
            column = table[name].chunk(0)
            if not np.array_equal(column.value_lengths(), lengths):
                raise ValueError(f"its {name} are not those of {num_samples} samples")
            target[at : at + int(lengths.sum())] = column.flatten()
        row, first = row + len(table), first + int(its_sizes.sum())
    skipped = (entry for entries in about["skipped"].to_pylist() for entry in entries)
    return Manifest(
        root=root,
        shards=tuple(about["shard"].to_pylist()),
        sizes=sizes,
        num_bytes=about["num_bytes"].to_numpy(),
        offsets=offsets,
        checksums=checksums,
        fingerprint=_fingerprint(about["etag"].to_pylist()),
        skipped=tuple((entry["key"], entry["kind"]) for entry in skipped),
        failures=json.loads(schema.metadata[_METADATA])["failures"],
    )


def check_shards(manifest: Manifest) -> None:
    """Raises StorageError, with one listing, if a shard that the manifest names is not there or has another size."""
    there = {entry.name: entry.num_bytes for entry in storage.list_entries(manifest.root)}
    wrong = [
        (name, there.get(name), size)
        for name, size in zip(manifest.shards, manifest.num_bytes.tolist(), strict=True)
        if there.get(name) != size
    ]
    if wrong:
        name, found, size = wrong[0]
        reason = "is missing" if found is None else f"has {found} bytes, not {size}"
        raise StorageError(
            f"{len(wrong)} of {len(manifest.shards)} shards below {manifest.root!r} are not as the manifest names them, first: "
            f"{name!r} {reason}; copy them again, or run jobs/prepare_shards.py into another folder"
        )


def _fingerprint(etags: Iterable[str]) -> str:
    return hashlib.sha256("".join(etags).encode()).hexdigest()
