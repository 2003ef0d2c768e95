"""Samples <-> WebDataset tars, and the manifest that numbers the samples of a folder of them.

Owns the bytes of a shard and of manifest.parquet. It does not decide which sample goes into which shard
(raycap/data/prepare.py), nor in which order they are read (raycap/order.py).

A sample is two neighbouring members, `<name>.<ext>` with the image and `<name>.json` with
{"captions": [...], "image_id": ...}; `<name>.txt` with one caption is read too, as img2dataset writes it.
WebDataset ends the name at the first dot of its last part, so a key such as `a.b/c.d` is stored as `a.b/c%2Ed`:
'.' and '%' in the last part of a key are percent-encoded, everything else is verbatim.
"""

import bisect
import hashlib
import io
import itertools
import json
import re
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from raycap import storage, units
from raycap.errors import StorageError
from raycap.schema import Sample, ShardIndex, manifest_schema

MANIFEST = "manifest.parquet"
_TEXT = ("json", "txt")


# ---- one shard


def pack_shard(name: str, samples: Sequence[Sample]) -> tuple[bytes, ShardIndex]:
    """The tar file `name` with these samples in this order, and its index. The same samples give the same bytes.

    Raises StorageError for a key that two samples share, or that a tar cannot hold.
    """
    buffer = io.BytesIO()
    # PAX is plain USTAR for short ASCII names and adds a header only where a name is longer or has other letters.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            _check(sample)
            facts = {"captions": list(sample.captions), "image_id": sample.image_id}
            _add(tar, f"{_encode(sample.key)}.{sample.ext}", sample.image)
            _add(tar, f"{_encode(sample.key)}.json", json.dumps(facts, sort_keys=True).encode())
    data = buffer.getvalue()
    index = index_shard(name, data)
    if len(index.keys) < len(samples):  # neighbours with one key look like one sample
        key, _ = Counter(sample.key for sample in samples).most_common(1)[0]
        raise StorageError(f"cannot pack shard {name!r}: two of its samples have the key {key!r}; rename one image")
    return data, index


def index_shard(name: str, data: bytes) -> ShardIndex:
    """The index of a whole tar file. Raises StorageError if it is no tar, has no samples or a key at two places."""
    groups = _groups(data, name)
    keys = [key for key, _ in groups]
    if not keys:
        raise StorageError(f"shard {name!r} holds no samples; leave it out")
    if len(set(keys)) < len(keys):
        key, _ = Counter(keys).most_common(1)[0]
        raise StorageError(f"shard {name!r} holds the key {key!r} at two places; give every sample a key of its own")
    offsets = [members[0].offset for _, members in groups]
    etag = hashlib.sha256(data).hexdigest()
    stop = _end(groups[-1][1][-1])
    return ShardIndex(shard=name, num_bytes=len(data), etag=etag, keys=tuple(keys), offsets=(*offsets, stop))


def parse_samples(data: bytes, where: str = "tar bytes") -> list[Sample]:
    """The samples of a tar, or of a run of neighbours cut out of one, in file order. where: for the error message.

    Members of a sample are neighbours, in any order. Raises StorageError if the bytes are no tar or a sample is not one
    image with at most one .json and one .txt.
    """
    tar_bytes = memoryview(data)
    return [
        _sample(
            key,
            [
                (m.name.rpartition("/")[2].partition(".")[2], bytes(tar_bytes[m.offset_data :][: m.size]))
                for m in members
            ],
            where,
        )
        for key, members in _groups(data, where)
    ]


def read_run(root: str, shard: ShardIndex, start: int, stop: int) -> list[Sample]:
    """Samples start .. stop - 1 of a shard below root, with one range read.

    Raises StorageError if the file is not the one that was indexed.
    """
    assert 0 <= start <= stop <= shard.num_samples, (start, stop)
    if start == stop:
        return []
    url = storage.join(root, shard.shard)
    samples = parse_samples(storage.read_range(url, shard.offsets[start], shard.offsets[stop]), url)
    if [sample.key for sample in samples] != list(shard.keys[start:stop]):
        raise StorageError(
            f"samples {start} to {stop} of {url!r} are not those that {MANIFEST} lists; the shard was replaced after "
            f"the manifest was written, prepare the shards again in another folder"
        )
    return samples


def _groups(data: bytes, where: str) -> list[tuple[str, list[tarfile.TarInfo]]]:
    """(key, members) of each sample, in file order."""
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            members = tar.getmembers()
    except (tarfile.TarError, ValueError) as e:
        raise StorageError(f"cannot read {where!r} as a tar: {e}; write that shard again") from e
    stop = _end(members[-1]) if members else 0
    # tarfile takes a damaged header in the middle for the end of the archive; only zeros may follow the real end.
    if stop > len(data) or data[stop:].strip(b"\0"):
        raise StorageError(f"cannot read {where!r} as a tar: it is damaged behind byte {stop}; write that shard again")
    files = [member for member in members if member.isfile()]
    return [(_decode(name), list(group)) for name, group in itertools.groupby(files, key=lambda m: _split(m.name))]


def _end(member: tarfile.TarInfo) -> int:
    """The offset behind a member, where the next header begins."""
    return member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _split(member: str) -> str:
    """The name of the sample a member belongs to: its path up to the first dot of the last part."""
    folder, slash, file = member.rpartition("/")
    return folder + slash + file.partition(".")[0]


def _encode(key: str) -> str:
    folder, slash, file = key.rpartition("/")
    return folder + slash + file.replace("%", "%25").replace(".", "%2E")


def _decode(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.replace("%2E", ".").replace("%25", "%")


def _check(sample: Sample) -> None:
    if sample.key.endswith("/") or not sample.key or "\0" in sample.key:
        raise StorageError(f"cannot pack the key {sample.key!r}: it has no file name or a NUL byte; rename the image")
    if not re.fullmatch(r"[A-Za-z0-9]+", sample.ext) or sample.ext.lower() in _TEXT:
        raise StorageError(
            f"cannot pack the image {sample.key!r}: {sample.ext!r} is no suffix of an image; rename it, to .jpg say"
        )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(
        name
    )  # mtime, uid and gid are 0 and mode is 0644: nothing of this machine gets into the bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _sample(key: str, members: list[tuple[str, bytes]], where: str) -> Sample:
    """members: (suffix, bytes)."""
    texts = {suffix: data for suffix, data in members if suffix in _TEXT}
    images = [(suffix, data) for suffix, data in members if suffix not in _TEXT]
    if len(images) != 1 or len(texts) + 1 != len(members):
        found = ", ".join(f".{suffix}" for suffix, _ in members)
        raise StorageError(
            f"sample {key!r} in {where!r} has the members {found}; a sample is one image with one .json or .txt"
        )
    captions, image_id = _captions(key, texts, where)
    return Sample(key=key, image=images[0][1], ext=images[0][0], captions=captions, image_id=image_id)


def _captions(key: str, texts: dict[str, bytes], where: str) -> tuple[tuple[str, ...], int | str | None]:
    """Captions and image id. img2dataset writes both files, its .json without `captions`. An image alone has none."""
    try:
        facts: Any = json.loads(texts.get("json", b"{}"))
        caption = texts.get("txt", b"").decode().strip()
    except ValueError as e:
        raise StorageError(f"cannot read the captions of {key!r} in {where!r}: {e}; write that shard again") from e
    captions = facts.get("captions") if isinstance(facts, dict) else None
    image_id = facts.get("image_id") if isinstance(facts, dict) else None
    if captions is None and ("txt" in texts or "json" not in texts):
        captions = [caption] if caption else []
    if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
        raise StorageError(
            f'sample {key!r} in {where!r} has no list "captions" of strings in its .json, and no .txt; add one of them'
        )
    return tuple(captions), image_id if isinstance(image_id, int | str) else None


# ---- the manifest


@dataclass(frozen=True)
class Manifest:
    """The shards of a folder, in order. Samples are numbered through: shard by shard, in file order."""

    root: str
    shards: tuple[ShardIndex, ...]

    @cached_property
    def _starts(self) -> list[int]:
        return list(itertools.accumulate((shard.num_samples for shard in self.shards), initial=0))

    @property
    def num_samples(self) -> int:
        return self._starts[-1]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the shards' etags in order, hex: the same for the same bytes at any root."""
        return hashlib.sha256("".join(shard.etag for shard in self.shards).encode()).hexdigest()

    def locate(self, i: int) -> tuple[int, int]:
        """(number of the shard, index in the shard) of sample i. Raises IndexError outside 0 .. num_samples - 1."""
        if not 0 <= i < self.num_samples:
            raise IndexError(f"sample {i} of {self.num_samples}")
        number = bisect.bisect_right(self._starts, i) - 1
        return number, i - self._starts[number]


def write_manifest(root: str, shards: Sequence[ShardIndex]) -> Manifest:
    """Seal root with the manifest of these shards, in this order. Raises StorageError if it has another manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {
        "shard": [s.shard for s in shards],
        "num_samples": [s.num_samples for s in shards],
        "num_bytes": [s.num_bytes for s in shards],
        "etag": [s.etag for s in shards],
        "keys": [s.keys for s in shards],
        "offsets": [s.offsets for s in shards],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(columns, schema=manifest_schema()), sink, compression="zstd")
    units.seal(root, MANIFEST, sink.getvalue())
    return Manifest(root, tuple(shards))


def read_manifest(root: str) -> Manifest:
    """The manifest of root. Raises StorageError if it is missing, empty, or not a manifest."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    url = storage.join(root, MANIFEST)
    if not storage.exists(url):
        raise StorageError(f"no shards at {root!r}: there is no {MANIFEST!r}; run jobs/prepare_shards.py first")
    data = storage.read_bytes(url)
    try:
        table = pq.read_table(io.BytesIO(data))
        if table.schema != manifest_schema():
            raise ValueError(f"its columns are {', '.join(table.column_names) or 'none'}")
        rows = table.to_pylist()
        shards = tuple(_shard_index(row) for row in rows)
        if not shards:
            raise ValueError("it lists no shards")
    except (ValueError, TypeError, OSError, pa.ArrowException) as e:
        raise StorageError(f"{url!r} is not a manifest of shards: {e}; run jobs/prepare_shards.py first") from e
    return Manifest(root, shards)


def check_shards(manifest: Manifest) -> None:
    """Raises StorageError, with one listing, if a shard that the manifest names is not there."""
    there = set(storage.list_files(manifest.root, (".tar",)))
    missing = [shard.shard for shard in manifest.shards if shard.shard not in there]
    if missing:
        raise StorageError(
            f"{len(missing)} of {len(manifest.shards)} shards that the manifest of {manifest.root!r} names are missing (first: "
            f"{missing[0]!r}); copy them again, or run jobs/prepare_shards.py into another folder"
        )


def _shard_index(row: dict[str, Any]) -> ShardIndex:
    keys, offsets = tuple(row["keys"]), tuple(row["offsets"])
    if not row["num_samples"] == len(keys) == len(offsets) - 1 or not keys:
        raise ValueError(f"shard {row['shard']!r} has {len(keys)} keys and {len(offsets)} offsets")
    return ShardIndex(shard=row["shard"], num_bytes=row["num_bytes"], etag=row["etag"], keys=keys, offsets=offsets)
