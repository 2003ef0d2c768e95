"""Samples <-> WebDataset tars and Parquet files, and the manifest that numbers the samples of a folder of them.

Owns the bytes of a shard and of manifest.parquet. It does not decide which sample goes into which shard
(raycap/data/prepare.py), nor in which order they are read (raycap/order.py), nor which files of a folder are shards
(raycap/datasets/img2dataset.py).

A sample in a tar is two or three neighbouring members in any order: `<name>.<ext>` with the image, `<name>.json` with
{"captions": [...], "image_id": ...}, or `<name>.txt` with one caption, as img2dataset writes it. WebDataset ends the name
at the first dot of its last part, so a key such as `a.b/c.d` is stored as `a.b/c%2Ed`: '.' and '%' in the last part of a
key are percent-encoded, everything else is verbatim.
"""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Iterator

from raycap import storage
from raycap.schema import Sample, SampleError, ShardIndex
from raycap.shards.manifest import MANIFEST, Manifest, check_shards, read_manifest, write_manifest
from raycap.shards.parquet import RangeFile, index_parquet, read_parquet_run
from raycap.shards.tar import index_tar, pack_shard, parse_run

__all__ = [
    "MANIFEST",
    "Manifest",
    "check_shards",
    "index_shard",
    "index_tar",
    "pack_shard",
    "read_manifest",
    "read_run",
    "write_manifest",
]

_PART_BYTES = 32 << 20  # of one range read while a shard is indexed


def read_run(manifest: Manifest, shard_number: int, start: int, stop: int) -> list[Sample | SampleError]:
    """Samples start .. stop - 1 of a shard, in order. A SampleError for one whose bytes are not those that were indexed.

    One range read of a tar; of a Parquet file the row groups that hold them. Raises StorageError if the file is missing or
    shorter than it was.
    """
    offsets, checksums = manifest.places(shard_number, start, stop)
    if not checksums:
        return []
    name = manifest.shards[shard_number]
    url, places = storage.join(manifest.root, name), [f"{name}[{i}]" for i in range(start, stop)]
    if name.endswith(".parquet"):
        return read_parquet_run(url, int(manifest.num_bytes[shard_number]), offsets[:-1], checksums, places)
    return parse_run(storage.read_range(url, offsets[0], offsets[-1]), offsets, checksums, url, places)


def index_shard(root: str, name: str, num_bytes: int) -> tuple[ShardIndex, Counter[str]]:
    """The index of the shard `name` below root, a tar or a Parquet file of num_bytes; and its images that were never
    downloaded, counted by reason, which only a Parquet file holds.

    Streams the file. Raises StorageError if it cannot be read; what is wrong in it is among the index's `skipped`.
    """
    url = storage.join(root, name)
    if not name.endswith(".parquet"):
        return index_tar(name, _parts(url, num_bytes)), Counter()
    digest = hashlib.sha256()
    with tempfile.TemporaryFile() as copy:  # Parquet is read from its end: this spares a second way over the network
        for part in _parts(url, num_bytes):
            digest.update(part)
            if storage.is_url(root):
                copy.write(part)
        copy.seek(0)
        file = copy if storage.is_url(root) else RangeFile(url, num_bytes)
        return index_parquet(name, file, num_bytes, digest.hexdigest())


def _parts(url: str, num_bytes: int) -> Iterator[bytes]:
    if not num_bytes:
        yield storage.read_bytes(url)  # says so if it is a link to nothing
    for start in range(0, num_bytes, _PART_BYTES):
        yield storage.read_range(url, start, min(start + _PART_BYTES, num_bytes))
