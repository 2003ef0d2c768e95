"""One WebDataset tar: samples -> bytes, bytes -> samples, and its index, which leaves out what is broken and goes on."""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from raycap.errors import SampleErrorKind, StorageError
from raycap.schema import Sample, SampleError, ShardIndex
from raycap.shards.growing import GrowingIndex, changed
from raycap.shards.headers import Group, Member, decode_name, encode_key, group_checksum, scan_tar, show_name

_TEXT = ("json", "txt", "caption")  # suffixes, in any case
_IMAGES = {"jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"}
_MAX_SAMPLE_BYTES = 1 << 30  # the longest member that indexing holds; an image may have 64 MiB


# ---- samples -> bytes


def pack_shard(name: str, samples: Sequence[Sample]) -> tuple[bytes, ShardIndex]:
    """The tar file `name` with these samples in this order, and its index. The same samples give the same bytes.

    A sample without a caption is in the tar, but the index leaves it out. Raises StorageError for a key that two samples
    share, or that a tar cannot hold.
    """
    for key, count in Counter(sample.key for sample in samples).most_common(1):
        if count > 1:
            raise StorageError(f"cannot pack shard {name!r}: {count} samples have the key {key!r}; rename one image")
    buffer = io.BytesIO()
    # PAX is plain USTAR for short ASCII names and adds a header only where a name is longer or has other letters.
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for sample in samples:
            _check(sample)
            facts = {"captions": list(sample.captions), "image_id": sample.image_id}
            _add(tar, f"{encode_key(sample.key)}.{sample.ext}", sample.image)
            _add(tar, f"{encode_key(sample.key)}.json", json.dumps(facts, sort_keys=True).encode())
    data = buffer.getvalue()
    return data, index_tar(name, [data])


def _check(sample: Sample) -> None:
    if sample.key.endswith("/") or not sample.key or "\0" in sample.key:
        raise StorageError(f"cannot pack the key {sample.key!r}: it has no file name or a NUL byte; rename the image")
    if not re.fullmatch(r"[A-Za-z0-9]+", sample.ext) or sample.ext.lower() in _TEXT:
        raise StorageError(
            f"cannot pack the image {sample.key!r}: {sample.ext!r} is no suffix of an image; rename it, to .jpg say"
        )


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    # mtime, uid and gid are 0 and mode is 0644: nothing of this machine gets into the bytes
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


# ---- bytes -> index


def index_tar(name: str, parts: Iterable[bytes]) -> ShardIndex:
    """The index of the tar file whose bytes these are, one part after the other.

    Holds one part and one sample. Never raises for what is in the bytes: what makes no sample is among `skipped`, and a
    file that is cut or damaged is indexed up to there. Of samples with one key the first counts.
    """
    index, digest, num_bytes = GrowingIndex(name), hashlib.sha256(), 0
    held, base, pass_over = b"", 0, 0  # bytes not yet indexed; where they begin; bytes still to leave out
    scan = scan_tar(memoryview(held))
    for part in parts:
        digest.update(part)
        num_bytes += len(part)
        if scan.damaged:
            continue
        held += part[pass_over:]
        pass_over = max(0, pass_over - len(part))
        scan = scan_tar(memoryview(held), scan.ended)
        if scan.damaged:
            continue
        groups, begin = scan.groups, scan.at
        too_long = scan.partial is not None and scan.partial.size > _MAX_SAMPLE_BYTES
        if groups and not too_long:  # the last sample may go on in the next part
            *groups, last = groups
            begin = last.start
        _add_groups(index, held, groups, base)
        if scan.partial and too_long:
            index.skip(show_name(scan.partial.sample), SampleErrorKind.BAD_SAMPLE)
            begin, pass_over = scan.partial.stop, scan.partial.stop - len(held)
        held, base = held[begin:], base + begin
    if not scan.damaged:
        scan = scan_tar(memoryview(held), scan.ended)
    groups, lost = scan.groups, show_name(scan.partial.sample) if scan.partial else name
    if groups and not scan.whole and _is_cut(held, groups[-1], scan.partial):
        *groups, cut = groups
        lost = show_name(cut.name)
    _add_groups(index, held, groups, base)
    if not scan.whole:
        index.skip(lost, SampleErrorKind.TRUNCATED_SHARD)
    return index.build(num_bytes, digest.hexdigest())


def _add_groups(index: GrowingIndex, held: bytes, groups: Sequence[Group], base: int) -> None:
    """held: bytes of the file from `base` on, which the groups' offsets count from."""
    view = memoryview(held)
    for group in groups:
        index.add(_sample(view, group, ""), base + group.start, base + group.stop, group_checksum(view, group))


def _is_cut(held: bytes, last: Group, partial: Member | None) -> bool:
    """Whether the last sample goes on where the file ends. Where nothing tells, one that has all it needs is taken for whole."""
    if partial:
        return partial.sample == last.name
    return isinstance(_sample(memoryview(held), last, ""), SampleError)


# ---- bytes -> samples


def parse_run(
    data: bytes, offsets: Sequence[int], checksums: Sequence[int], where: str, places: Sequence[str]
) -> list[Sample | SampleError]:
    """The samples in bytes offsets[0] .. offsets[-1] of a tar, one for each checksum. Behind a sample may lie what the
    index left out. where: the file, for messages. places: what each is called if its name cannot be read.
    """
    view, base = memoryview(data), offsets[0]
    found: list[Sample | SampleError] = []
    for i, checksum in enumerate(checksums):
        part = view[offsets[i] - base : offsets[i + 1] - base]
        group = next(iter(scan_tar(part).groups), None)
        if group is None or group_checksum(part, group) != checksum:
            found.append(changed(places[i] if group is None else show_name(group.name), where))
        else:
            found.append(_sample(part, group, where))
    return found


def _sample(view: memoryview, group: Group, where: str) -> Sample | SampleError:
    def error(kind: SampleErrorKind, reason: str) -> SampleError:
        return SampleError(
            key=show_name(group.name), kind=kind, message=f"sample {show_name(group.name)!r} in {where!r} {reason}"
        )

    try:
        key = decode_name(group.name.decode())
    except UnicodeDecodeError:
        return error(
            SampleErrorKind.BAD_NAME, "has a name that is not UTF-8; rename its files and write that shard again"
        )
    if not key or key.endswith("/"):
        return error(SampleErrorKind.BAD_NAME, "has no name before the first dot; rename its files")
    texts = {s.lower(): bytes(view[start:stop]) for s, start, stop in group.members if s.lower() in _TEXT}
    others = [member for member in group.members if member[0].lower() not in _TEXT]
    # Masks, classes and links beside the image are not read. A suffix that is no image's is one where nothing else is there.
    images = [member for member in others if member[0].lower() in _IMAGES] or (others if len(others) == 1 else [])
    found = ", ".join(f".{suffix}" for suffix, _, _ in group.members)
    if len(images) != 1:
        lack = "several images" if images else "no image"
        reason = (
            f"has {lack} among its members {found}; a sample is one image with its captions in .json, .txt or .caption"
        )
        return error(SampleErrorKind.BAD_SAMPLE, reason)
    try:
        captions, image_id = _captions(texts)
    except (ValueError, RecursionError) as e:
        return error(SampleErrorKind.BAD_SAMPLE, f"has captions that cannot be read: {e}; write that shard again")
    if not captions:
        reason = f"has no caption in its members {found}; add one in .json, .txt or .caption, or leave it out"
        return error(SampleErrorKind.NO_CAPTION, reason)
    ((ext, start, stop),) = images
    return Sample(key=key, image=bytes(view[start:stop]), ext=ext, captions=captions, image_id=image_id)


def _captions(texts: dict[str, bytes]) -> tuple[tuple[str, ...], int | str | None]:
    """Captions that are not blank, and image id. Ours are a list in the .json; img2dataset's, if it has one, is in the .txt
    and in the .json as `caption`. Either key may hold one text or a list of them. Raises ValueError.
    """
    facts: Any = json.loads(texts.get("json", b"{}"))
    if not isinstance(facts, dict):
        raise ValueError("the .json is no object")
    text = texts.get("txt", texts.get("caption"))
    sources = (facts.get("captions"), None if text is None else text.decode("utf-8-sig").strip(), facts.get("caption"))
    captions: list[str] = []
    for found in sources:  # the first that says something
        given = [found] if isinstance(found, str) else [] if found is None else found
        if not isinstance(given, list) or not all(isinstance(c, str) for c in given):
            raise ValueError('"captions" or "caption" in the .json is no text and no list of texts')
        captions = captions or [c for c in (caption.removeprefix("\ufeff") for caption in given) if c.strip()]
    image_id = facts.get("image_id")
    return tuple(captions), image_id if isinstance(image_id, int | str) else None


def first_fault(data: bytes, where: str) -> str:
    """Why the first sample in these first bytes of a tar is none, as a sentence; "" if it is one, or not whole."""
    view = memoryview(data)
    group = next(iter(scan_tar(view).groups), None)
    sample = _sample(view, group, where) if group else None
    return sample.message if isinstance(sample, SampleError) else ""
