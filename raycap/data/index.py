"""Shards that have no manifest, img2dataset's above all, are indexed once, with Ray, into another folder:

1. one listing says which files are shards; a folder without any is refused
2. one Ray task per shard, or this process where they are small, reads it, and commits `_index/<shard>.<version>.json`
   below the index folder
3. the indexes become manifest.parquet there: of samples with one key in two shards the later one is left out

Killed anywhere and run again, it indexes the shards that are missing. The folder of shards is only read.
"""

import contextlib
import functools
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt

from raycap import storage, units
from raycap.data.tasks import run_here, run_units, waiting_for
from raycap.data.ticker import pace, ticking
from raycap.datasets.img2dataset import ShardFile, count_failures, find_shards, shorten
from raycap.errors import SampleErrorKind, StorageError
from raycap.schema import ShardIndex
from raycap.shards import MANIFEST, Manifest, index_shard, read_manifest
from raycap.shards.manifest import ShardArrays, build_manifest, manifest_bytes, without_keys
from raycap.shards.tar import first_fault

IN_DRIVER = 64 * 2**20  # bytes of shards: some seconds of work, where Ray takes ten to start
INDEX = "_index"
PLAN = f"{INDEX}/plan.json"
REPORT_S = 2.0
_FORMAT = 2  # of an index file; another one is another unit


def open_shards(
    root: str,
    index_root: str,
    *,
    report: Callable[[str], None] = print,
    connect: Callable[[], object] = lambda: None,
) -> Manifest:
    """The manifest of the shards below root: its own, else the one in index_root, which is made or renewed if need be.

    Afterwards read_manifest(root, index_root) gives the same anywhere. connect: called before Ray is needed. report: gets a
    line of key=value at least every few seconds while shards are indexed, and at the end a line with what was left out.
    Raises StorageError if there are no shards, if none of them has a sample with a caption, if one cannot be read, or if
    index_root holds the index of another folder.
    """
    if storage.exists(storage.join(root, MANIFEST)):
        return read_manifest(root)
    if storage.join(index_root, "").startswith(storage.join(root, "")):
        raise StorageError(f"cannot index {root!r} into {index_root!r}, which is inside; choose a folder elsewhere")
    files = find_shards(root, storage.list_entries(root))
    claim = functools.partial(units.claim, storage.join(index_root, PLAN), {"shards": root.removesuffix("/")})
    if storage.exists(storage.join(index_root, PLAN)):
        claim()  # the index of another folder is refused before Ray is started
    if storage.exists(storage.join(index_root, MANIFEST)):
        manifest = read_manifest(root, index_root)
        then = dict(zip(manifest.shards, manifest.num_bytes.tolist(), strict=True))
        now = {file.name: file.num_bytes for file in files}
        if then == now:
            return manifest
        num_changed = len(dict(now.items() ^ then.items()))
        report(f"shards_changed={num_changed} root={root!r} since they were indexed; indexing those again")
    have = units.done(storage.join(index_root, INDEX), ".json")
    missing = [file for file in files if _unit(file) not in have]
    uses_ray = sum(file.num_bytes for file in missing) > IN_DRIVER
    if uses_ray:
        connect()
    claim()  # after Ray is there: what keeps it from starting leaves nothing behind
    if missing:
        with _progress(report, len(files), len(files) - len(missing), uses_ray) as add:
            index = functools.partial(index_unit, root, index_root)
            run = run_units if uses_ray else run_here
            run(iter(missing), index, add, f"indexing the shards of {root!r}")
    manifest = _gather(root, index_root, files)
    report(_last_line(manifest))
    return manifest


def index_unit(root: str, index_root: str, file: ShardFile) -> int:
    """Indexes one shard, commits what was found, and returns its samples. Raises StorageError if it cannot be read."""
    index, failures = index_shard(root, file.name, file.num_bytes)
    if file.table:
        failures += count_failures(root, file.table)
    facts = {"index": asdict(index), "failures": dict(sorted(shorten(failures).items()))}
    units.commit(_unit_url(index_root, file), json.dumps(facts).encode())
    return index.num_samples


def _unit(file: ShardFile) -> str:
    """The name of a shard's index: another one when the shard changes."""
    version = hashlib.blake2b(f"{_FORMAT}-{file.version}".encode(), digest_size=6).hexdigest()
    return f"{file.name}.{version}"


def _unit_url(index_root: str, file: ShardFile) -> str:
    return storage.join(index_root, INDEX, f"{_unit(file)}.json")


# ---- the manifest


def _gather(root: str, index_root: str, files: Sequence[ShardFile]) -> Manifest:
    """Writes the manifest of all shards into index_root. Holds the keys of a few shards and 8 bytes of all others."""
    parts: list[ShardArrays] = []
    hashes: list[npt.NDArray[np.int64]] = []
    failures: Counter[str] = Counter()
    for facts in _read_units(index_root, files):
        index = ShardIndex.from_dict(facts["index"])
        parts.append(without_keys(index))
        hashes.append(np.fromiter(map(hash, index.keys), np.int64, len(index.keys)))
        failures += Counter(facts["failures"])
    for number, repeated in _find_repeated(index_root, files, hashes).items():
        parts[number] = _leave_out(parts[number], repeated)
    failures = shorten(failures)
    if not any(len(part.checksums) for part in parts):
        kinds = Counter(kind for part in parts for _, kind in part.skipped)
        url = storage.join(root, files[0].name)
        fault = first_fault(storage.read_head(url, 2**22), url) if url.endswith(".tar") else ""
        raise StorageError(
            f"none of the {len(files)} shards below {root!r} has a sample with an image and a caption ({_counts(kinds)}); "
            + (f"the first {fault}" if fault else "give shards with captions")
            + (" (img2dataset writes captions with --caption_col)" if kinds.keys() <= {"no_caption"} else "")
        )
    storage.put(storage.join(index_root, MANIFEST), manifest_bytes(parts, dict(failures)))
    return build_manifest(root, parts, dict(failures))


def _read_units(index_root: str, files: Sequence[ShardFile]) -> Iterator[dict[str, Any]]:
    return map(json.loads, storage.read_each([_unit_url(index_root, file) for file in files]))


def _find_repeated(
    index_root: str, files: Sequence[ShardFile], hashes: Sequence[npt.NDArray[np.int64]]
) -> dict[int, dict[int, str]]:
    """Number of a shard -> index in it -> key, of samples whose key an earlier shard has.

    hashes: of each shard's keys. Keys are compared only where hashes are equal.
    """
    together = np.concatenate(hashes)
    ordered = np.sort(together)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    places = np.flatnonzero(np.isin(together, repeated)) if len(repeated) else repeated
    shards = np.searchsorted(np.cumsum([len(part) for part in hashes]), places, "right")
    numbers = np.unique(shards).tolist()
    seen: set[str] = set()
    found: dict[int, dict[int, str]] = {}
    for number, facts in zip(numbers, _read_units(index_root, [files[number] for number in numbers]), strict=True):
        keys = facts["index"]["keys"]
        for i in np.flatnonzero(np.isin(hashes[number], repeated)).tolist():
            if keys[i] in seen:
                found.setdefault(number, {})[i] = keys[i]
            seen.add(keys[i])
    return found


def _leave_out(part: ShardArrays, repeated: dict[int, str]) -> ShardArrays:
    """The shard without the samples of these indices; their bytes then lie behind the sample before them."""
    indices = list(repeated)
    skipped = tuple((key, SampleErrorKind.DUPLICATE_KEY.value) for key in repeated.values())
    return part._replace(
        offsets=np.delete(part.offsets, indices),
        checksums=np.delete(part.checksums, indices),
        skipped=(*part.skipped, *skipped),
    )


def _last_line(manifest: Manifest) -> str:
    skipped = Counter(kind for _, kind in manifest.skipped)
    return (
        f"indexed shards={len(manifest.shards)} rows={manifest.num_samples} skipped={skipped.total()} "
        f"({_counts(skipped)}) not_downloaded={sum(manifest.failures.values())} root={manifest.root!r}"
    )


def _counts(kinds: Counter[str]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items())) or "none"


@contextlib.contextmanager
def _progress(
    report: Callable[[str], None], num_shards: int, num_done: int, uses_ray: bool
) -> Iterator[Callable[[int], None]]:
    """Reports a line every REPORT_S and at the end. Yields add(num_samples), to be called for each finished shard."""
    counts = {"shards": num_done, "rows": 0}
    start = time.monotonic()

    def add(num_samples: int) -> None:
        counts["shards"] += 1
        counts["rows"] += num_samples

    def line() -> str:
        seconds = time.monotonic() - start
        _, times = pace(counts["shards"] - num_done, num_shards - counts["shards"], seconds)
        done = f"indexed_shards={counts['shards']}/{num_shards} new_rows={counts['rows']}"
        waiting = waiting_for() if uses_ray and counts["shards"] == num_done else ""
        return f"{done} rows_per_s={counts['rows'] / max(seconds, 1e-9):.0f} {times}{waiting}"

    with ticking(line, report, REPORT_S):
        yield add
