"""One shard of a data set, without Ray: its images read, made smaller if asked, packed, and committed with its index."""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
from PIL import Image

from raycap import storage, units
from raycap.data.spill import Unit
from raycap.datasets.dataset import is_unicode, printable
from raycap.errors import ErrorKind, ImageError, SampleErrorKind, StorageError
from raycap.image import check_bytes, decode_image
from raycap.schema import Sample, SampleRef, ShardIndex
from raycap.shards import Manifest, pack_shard, read_run

INDEX = "_index"
READ_THREADS = 16  # of one task, and only for URLs: reading an object is mostly waiting

# Of files whose name has no suffix of an image, by their first bytes.
_SUFFIXES = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"RIFF": "webp", b"BM": "bmp"}

Skip = tuple[str, str]  # key, ErrorKind or SampleErrorKind


@dataclass(frozen=True, slots=True)
class Shrink:
    """Images whose longer side has more than max_side pixels are resized to it and written as JPEG of this quality."""

    max_side: int
    quality: int


@dataclass(frozen=True, slots=True)
class Packed:
    """What one task did: samples in the shard, and what it left out."""

    num_samples: int
    skipped: tuple[Skip, ...]


@dataclass(frozen=True, slots=True)
class PackedShard:
    """A finished shard: its index, whose shard is no file if none of its samples could be packed; and for each sample a
    hash of its image's bytes, uint64 (num_samples,): the first 8 bytes of their sha256. suffixes: of its images, lower case."""

    index: ShardIndex
    image_hashes: npt.NDArray[np.uint64]
    suffixes: tuple[str, ...]
    has_text_ids: bool


@dataclass(frozen=True, slots=True)
class RunUnit:
    """Neighbours of a shard that exists, to be packed again. source: the manifest of that shard alone."""

    name: str
    source: Manifest
    start: int
    stop: int


def pack_unit(out: str, unit: Unit | RunUnit, shrink: Shrink | None = None) -> Packed:
    """Makes one shard: `name`.tar, then its index, which marks it as done. It leaves out: an image that is missing,
    forbidden, without bytes or, with shrink, undecodable; a key that another sample has, or that no tar can hold.

    Holds one shard in memory. Without samples there is an index and no tar. Raises StorageError if the storage, and not
    one image, is at fault, or if out holds other bytes under that name.
    """
    read = _read_again(unit, shrink) if isinstance(unit, RunUnit) else _read_unit(unit, shrink)
    samples = [sample for sample in read if isinstance(sample, Sample)]
    skipped = tuple(skip for skip in read if not isinstance(skip, Sample))
    name = f"{unit.name}.tar"
    if samples:
        data, index = pack_shard(name, samples)
        units.commit(storage.join(out, name), data)
    else:
        index = ShardIndex(shard=name, num_bytes=0, etag="", keys=(), offsets=(0,), checksums=())
    index = replace(index, skipped=(*index.skipped, *skipped))
    images = {sample.key: sample.image for sample in samples}
    hashes = "".join(hashlib.sha256(images[key]).hexdigest()[:16] for key in index.keys)
    facts = {
        **asdict(index),
        "image_hashes": hashes,
        "suffixes": sorted({sample.ext for sample in samples}),
        "has_text_ids": any(isinstance(sample.image_id, str) for sample in samples),
    }
    units.commit(_index_url(out, unit.name), json.dumps(facts).encode())
    return Packed(index.num_samples, index.skipped)


def packed_before(out: str, names: Iterable[str]) -> set[str]:
    """Which of these shards are done."""
    tars, indexes = units.done(out, ".tar"), units.done(storage.join(out, INDEX), ".json")
    # A tar alone may lack its index; an index alone has lost its tar, or says that it needs none.
    have = {name for name in names if name in indexes}
    alone = sorted(have - tars)
    return have - {
        name for name, shard in zip(alone, read_packed(out, alone), strict=True) if shard.index.num_samples > 0
    }


def read_packed(out: str, names: Sequence[str]) -> Iterator[PackedShard]:
    """What is known of these shards, in order; a few at a time."""
    for data in storage.read_each([_index_url(out, name) for name in names]):
        facts = json.loads(data)
        hashes = np.frombuffer(bytes.fromhex(facts.pop("image_hashes")), dtype=">u8")
        suffixes, has_text_ids = tuple(facts.pop("suffixes", ())), facts.pop("has_text_ids", False)
        yield PackedShard(ShardIndex.from_dict(facts), hashes.astype(np.uint64), suffixes, has_text_ids)


def shrink_image(data: bytes, shrink: Shrink) -> bytes | None:
    """The image as a JPEG whose longer side is max_side, or None if it is no larger. The same bytes for the same image.

    Lanczos, upright by EXIF, transparency on white, 4:2:0. Raises ImageError if it cannot be decoded, smaller ones too.
    """
    pixels = decode_image(data)
    height, width, _ = pixels.shape
    scale = shrink.max_side / max(width, height)
    if scale >= 1:
        return None
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    buffer = io.BytesIO()
    resized = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)
    resized.save(buffer, "JPEG", quality=shrink.quality, subsampling="4:2:0")
    return buffer.getvalue()


def describe_kinds(kinds: Counter[str]) -> str:
    """`unreadable 2, empty 1`, the most frequent first; 'none' of none."""
    return ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items(), key=lambda e: (-e[1], e[0]))) or "none"


def _read_unit(unit: Unit, shrink: Shrink | None) -> list[Sample | Skip]:
    num_threads = READ_THREADS if any(storage.is_url(ref.url) for ref in unit.refs) else 1
    access = storage.AccessWatch()
    with ThreadPoolExecutor(num_threads) as pool:
        numbers = range(len(unit.refs))
        found = list(pool.map(lambda i: _read(unit.refs[i], i in unit.repeated, shrink, access), numbers))
    access.check_all(len(found))
    return found


def _read_again(unit: RunUnit, shrink: Shrink | None) -> list[Sample | Skip]:
    found = read_run(unit.source, 0, unit.start, unit.stop)
    return [_finish(s, shrink) if isinstance(s, Sample) else (printable(s.key), s.kind) for s in found]


def _read(ref: SampleRef, repeated: bool, shrink: Shrink | None, access: storage.AccessWatch) -> Sample | Skip:
    key = printable(ref.key)
    if repeated:
        return key, SampleErrorKind.DUPLICATE_KEY
    if not ref.key or ref.key.endswith("/") or "\0" in ref.key or not is_unicode(ref.key):
        return key, SampleErrorKind.BAD_NAME
    if not any(caption.strip() for caption in ref.captions):
        return key, SampleErrorKind.NO_CAPTION
    try:
        data = storage.read_bytes(ref.url)
        access.worked(partial(storage.read_range, ref.url, 0, min(1, len(data))))
    except StorageError as error:
        if not storage.is_fault_of_file(error):
            raise
        access.check(error)
        return key, ErrorKind.UNREADABLE
    ext = PurePosixPath(ref.url).suffix.removeprefix(".")
    return _finish(Sample(key=ref.key, image=data, ext=ext, captions=ref.captions, image_id=ref.image_id), shrink)


def _finish(sample: Sample, shrink: Shrink | None) -> Sample | Skip:
    """The sample as it is packed: with a suffix of an image, and no larger than asked."""
    try:
        check_bytes(sample.image)
        smaller = shrink_image(sample.image, shrink) if shrink else None
    except ImageError as error:
        return printable(sample.key), error.kind
    if smaller:
        return replace(sample, image=smaller, ext="jpg")
    ext = _suffix(sample.ext, sample.image)
    return replace(sample, ext=ext) if ext else (printable(sample.key), SampleErrorKind.BAD_NAME)


def _suffix(suffix: str, data: bytes) -> str | None:
    if re.fullmatch(r"[A-Za-z0-9]+", suffix) and suffix.lower() not in ("json", "txt"):
        return suffix.lower()  # `datasets` makes a column of each
    return next((ext for start, ext in _SUFFIXES.items() if data.startswith(start)), None)


def _index_url(out: str, name: str) -> str:
    return storage.join(out, INDEX, f"{name}.json")
