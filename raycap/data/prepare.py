"""Packs a captioned data set into shards with Ray. Owns the job's life; spill.py owns the order, pack.py one shard:

1. read the annotations; order the samples by a hash of (seed, key), so that neighbours in a shard are random
2. claim the output with the plan `_index/plan.json`; another data set, seed, shard or image size is refused
3. one Ray task per missing shard, or this process where few samples are missing: read its images, pack, commit
   `shard-00000.tar`, then `_index/shard-00000.json`
4. gather the indexes, write report.json, and seal the folder with manifest.parquet

The bytes depend on the data set and on the plan alone: not on the order of the annotations, nor on how many tasks work.
Killed anywhere and run again, the job makes the shards that are missing and ends with the same bytes. What cannot be packed
is left out, counted and listed in report.json; the job fails when that is more than a share of the samples.

Memory grows by 40 bytes a sample when the manifest is made, and by no more: of millions, the refs are sorted
through temporary files, and the tasks are fed as they finish.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from raycap import storage, units
from raycap.config import DatasetFormat
from raycap.data.index import open_shards
from raycap.data.pack import INDEX, Packed, RunUnit, Shrink, Skip, describe_kinds, pack_unit, packed_before, read_packed
from raycap.data.spill import SortedRefs, Unit
from raycap.data.tasks import run_here, run_units, waiting_for
from raycap.data.ticker import pace, ticking
from raycap.datasets.dataset import DatasetRead
from raycap.datasets.read import read_dataset
from raycap.errors import StorageError, UserError
from raycap.shards import MANIFEST, Manifest, read_manifest
from raycap.shards.manifest import ShardArrays, build_manifest, manifest_bytes, without_keys

PLAN = f"{INDEX}/plan.json"
REPORT = "report.json"
REPORT_S = 2.0
IN_DRIVER = 300  # samples: some seconds of work, where Ray takes ten to start
_MAX_GROUPS = 100  # of images with the same bytes, listed in the report

Pack = Callable[[Unit | RunUnit], Packed]


def prepare_shards(
    annotations: str,
    images: str,
    out: str,
    *,
    format: DatasetFormat = "auto",
    split: str = "",
    samples_per_shard: int = 1000,
    seed: int = 0,
    max_side: int = 0,
    quality: int = 95,
    max_error_rate: float = 0.05,
    report: Callable[[str], None] = print,
    connect: Callable[[], None] = lambda: None,
) -> Manifest:
    """Packs a data set into out and returns its manifest. Ray is connected by the caller, or by `connect` once the input is
    known to be good and there is more to do than a few seconds of work.

    annotations, images, format, split: see raycap.datasets.read. Format img2dataset takes the shards that img2dataset wrote
    to images, or any others, and packs runs of samples_per_shard of their neighbours again, in order: there are no
    annotations, and seed has no meaning. out: folder or URL. max_side: images with a longer side,
    in pixels, are resized to it and written as JPEG of this quality; 0 packs every image's own bytes, undecoded.
    max_error_rate: the share of the samples that may be left out; what the reader counts as skipped is not among them.
    report gets a line of key=value at least every few seconds, and last a sentence with what was left out. An out that is
    finished is returned without any Ray work; one that was begun is continued.
    Raises UserError if the annotations hold no usable sample, StorageError if out was begun with another plan, if too many
    samples are left out, or if the storage fails; what is packed by then stays and is used by the next run.
    """
    if samples_per_shard < 1:
        raise ValueError(f"samples_per_shard is {samples_per_shard}, it must be at least 1")
    shrink = Shrink(max_side, quality) if max_side else None
    pack = partial(pack_unit, out, shrink=shrink)
    sides = {"max_side": max_side, "quality": quality} if shrink else {"max_side": 0}
    plan = {"images": images, "samples_per_shard": samples_per_shard, "seed": seed, **sides}
    if format == "img2dataset":
        source = open_shards(images, storage.join(out, INDEX, "source"), report=report, connect=connect)
        plan |= {"samples_fingerprint": source.fingerprint, "num_samples": source.num_samples}
        failures = DatasetRead(samples=(), skipped=Counter(source.failures))
        work = Work(_run_sizes(source, samples_per_shard), _runs(source, samples_per_shard), pack, source.skipped)
        return _prepare(out, plan, work, failures, max_error_rate, report, connect)
    read = read_dataset(annotations, images, format=format, split=split)
    with SortedRefs(read.samples, seed) as refs:
        refuse_unusable(read, refs.num_captions, annotations, max_error_rate)
        plan |= {"samples_fingerprint": refs.fingerprint, "num_samples": refs.num_samples}
        work = Work(refs.sizes(samples_per_shard), refs.units(samples_per_shard), pack, ())
        return _prepare(out, plan, work, read, max_error_rate, report, connect)


def refuse_unusable(read: DatasetRead, num_captions: int, annotations: str, max_error_rate: float) -> None:
    """Raises UserError if more rows of the annotations than this share are of no use to the reader, though not empty."""
    num_unusable = read.unusable.total()
    num_rows = num_captions + num_unusable
    if num_unusable > max_error_rate * num_rows:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in sorted(read.unusable.items()) if count)
        some = ", ".join(f"'{key}'" for key, reason in read.skipped_keys if read.unusable[reason])
        raise UserError(
            f"{num_unusable} of {num_rows} rows of '{annotations}' cannot be used, more than --max-error-rate {max_error_rate} ({reasons}; "
            f"such as {some[:100]}); mend them, pass another --format, or raise --max-error-rate"
        )


@dataclass(frozen=True)
class Work:
    """The shards that an output is to have. sizes: name -> samples that go into it. units: in order, each made by pack.
    skipped: what is left out before any is packed."""

    sizes: dict[str, int]
    units: Iterable[Unit | RunUnit]
    pack: Pack
    skipped: tuple[Skip, ...]


def _run_sizes(source: Manifest, samples_per_shard: int) -> dict[str, int]:
    """Name of each run of neighbours, in order -> its samples; the last one of a shard may be short."""
    runs = ((size, start) for size in source.sizes.tolist() for start in range(0, size, samples_per_shard))
    return {f"shard-{i:05d}": min(samples_per_shard, size - start) for i, (size, start) in enumerate(runs)}


def _runs(source: Manifest, samples_per_shard: int) -> Iterator[RunUnit]:
    names = iter(_run_sizes(source, samples_per_shard).items())
    for i, size in enumerate(source.sizes.tolist()):
        offsets, checksums = source.places(i, 0, size)
        part = ShardArrays(
            source.shards[i], int(source.num_bytes[i]), "", np.array(offsets), np.array(checksums, np.uint32), ()
        )
        alone = build_manifest(source.root, [part], {})
        for start in range(0, size, samples_per_shard):
            name, length = next(names)
            yield RunUnit(name, alone, start, start + length)


def _prepare(
    out: str,
    plan: dict[str, Any],
    work: Work,
    read: DatasetRead,
    max_error_rate: float,
    report: Callable[[str], None],
    connect: Callable[[], None],
) -> Manifest:
    """Steps 2 to 4."""
    if storage.exists(storage.join(out, PLAN)) or storage.exists(storage.join(out, MANIFEST)):
        _claim(out, plan)  # another plan is refused before Ray is started
    if storage.exists(storage.join(out, MANIFEST)):
        manifest = read_manifest(out)
        report(f"finished_before=true shards={len(manifest.shards)} rows={manifest.num_samples} out={out!r}")
    else:
        num_samples = sum(work.sizes.values()) + len(work.skipped)
        limit = Limit(num_samples, max_error_rate, out)
        limit.add(Packed(0, work.skipped))
        have = packed_before(out, work.sizes)
        uses_ray = sum(size for name, size in work.sizes.items() if name not in have) > IN_DRIVER
        with _progress(report, work.sizes, have, uses_ray) as add:
            if uses_ray:
                connect()
            _claim(out, plan)  # after Ray is there: what keeps it from starting leaves nothing behind
            run = run_units if uses_ray else run_here
            pending = (unit for unit in work.units if unit.name not in have)
            run(pending, work.pack, _each(limit.add, add), "packing shards")
        manifest = _gather(out, work, read, Limit(num_samples, max_error_rate, out))
    report(_last_line(out))
    return manifest


class Limit:
    """Counts what is left out, and raises StorageError when it is more than the share of num_samples that may be."""

    def __init__(self, num_samples: int, max_error_rate: float, out: str) -> None:
        self.num_samples = num_samples
        self.kinds: Counter[str] = Counter()
        self._first: list[Skip] = []
        self._max_error_rate = max_error_rate
        self._out = out

    def add(self, packed: Packed) -> None:
        """Counts what one shard leaves out."""
        self.kinds.update(kind for _, kind in packed.skipped)
        self._first = sorted({*self._first, *packed.skipped})[:5]
        if self.num_samples and self.kinds.total() / self.num_samples > self._max_error_rate:
            some = ", ".join(f"{key!r} {kind}" for key, kind in self._first)
            raise StorageError(
                f"{self.kinds.total()} of {self.num_samples} samples cannot be packed into {self._out!r}, more than "
                f"--max-error-rate {self._max_error_rate}: {describe_kinds(self.kinds)} (such as {some}); mend them and "
                f"choose another --out, or raise --max-error-rate"
            )


def _each(*actions: Callable[[Packed], None]) -> Callable[[Packed], None]:
    def act(packed: Packed) -> None:
        for action in actions:
            action(packed)

    return act


def _claim(out: str, plan: dict[str, Any]) -> None:
    if storage.exists(storage.join(out, MANIFEST)) and not storage.exists(storage.join(out, PLAN)):
        raise StorageError(f"cannot prepare shards in {out!r}: its {MANIFEST} was made otherwise; choose another --out")
    units.claim(storage.join(out, PLAN), plan)


# ---- the end


def _gather(out: str, work: Work, read: DatasetRead, limit: Limit) -> Manifest:
    """Writes report.json, then manifest.parquet."""
    names = list(work.sizes)
    limit.add(Packed(0, work.skipped))
    parts: list[ShardArrays] = []
    hashes: list[npt.NDArray[np.uint64]] = []
    suffixes: set[str] = set()
    has_text_ids = False
    skipped = list(work.skipped)
    lost = work.skipped
    for packed in read_packed(out, names):
        limit.add(Packed(packed.index.num_samples, packed.index.skipped))
        skipped += packed.index.skipped
        suffixes.update(packed.suffixes)
        has_text_ids = has_text_ids or packed.has_text_ids
        if packed.index.num_samples:
            parts.append(without_keys(replace(packed.index, skipped=(*lost, *packed.index.skipped))))
            hashes.append(packed.image_hashes)
            lost = ()
        else:
            lost = (*lost, *packed.index.skipped)  # of a shard without a file: listed with the next shard
    if not parts:
        raise StorageError(f"none of {limit.num_samples} samples can be packed into {out!r}; check --images")
    parts[-1] = parts[-1]._replace(skipped=(*parts[-1].skipped, *lost))
    num_packed = sum(len(part.checksums) for part in parts)
    num_duplicates, groups = _duplicates(out, names, hashes)
    facts = {
        "samples": limit.num_samples,
        "packed": num_packed,
        "shards": len(parts),
        "skipped": dict(limit.kinds),
        "skipped_keys": sorted(skipped),
        "reader": {"skipped": read.skipped, "first_keys": read.skipped_keys},
        "duplicate_images": num_duplicates,
        "duplicate_groups": groups,
    }
    units.commit(storage.join(out, REPORT), (json.dumps(facts, indent=1, sort_keys=True) + "\n").encode())
    about = f"{num_packed} images with captions in WebDataset tars, packed by raycap."
    units.describe(out, "*.tar", "train", about, _schema(suffixes, has_text_ids))
    units.seal(out, MANIFEST, manifest_bytes(parts))
    return build_manifest(out, parts, {})


def _schema(suffixes: set[str], has_text_ids: bool) -> pa.Schema:
    """Of the rows that `datasets` makes of the tars: a column of images for each suffix."""
    facts = pa.struct([("captions", pa.list_(pa.string())), ("image_id", pa.string() if has_text_ids else pa.int64())])
    texts = [(name, pa.string()) for name in ("__key__", "__url__")]
    return pa.schema([*((suffix, pa.binary()) for suffix in sorted(suffixes)), ("json", facts), *texts])


def _duplicates(
    out: str, names: Sequence[str], hashes: Sequence[npt.NDArray[np.uint64]]
) -> tuple[int, list[list[str]]]:
    """How many samples have the image bytes of one counted before, and the keys of some groups of them, sorted."""
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    num_duplicates = int((counts - 1).sum())
    keys: dict[int, list[str]] = {value: [] for value in values[counts > 1][:_MAX_GROUPS].tolist()}
    for packed in read_packed(out, names) if keys else ():
        for i in np.flatnonzero(np.isin(packed.image_hashes, list(keys))).tolist():
            keys[int(packed.image_hashes[i])].append(packed.index.keys[i])
    return num_duplicates, sorted(sorted(group) for group in keys.values())


def _last_line(out: str) -> str:
    url = storage.join(out, REPORT)
    facts = json.loads(storage.read_bytes(url))
    by_reader = ", ".join(f"{reason}: {count}" for reason, count in sorted(facts["reader"]["skipped"].items()))
    return (
        f"{out} holds {facts['packed']} images in {facts['shards']} shards; left out: "
        f"{describe_kinds(Counter(facts['skipped']))}; skipped in the annotations: {by_reader or 'none'}; exact duplicates: "
        f"{facts['duplicate_images']}; keys in {url}"
    )


@contextlib.contextmanager
def _progress(
    report: Callable[[str], None], sizes: dict[str, int], have: set[str], uses_ray: bool
) -> Iterator[Callable[[Packed], None]]:
    """Reports a line every REPORT_S and at the end. Yields add(packed), to be called for each finished shard."""
    total, first_rows = sum(sizes.values()), sum(sizes[name] for name in have)
    shards, rows = len(have), first_rows
    start = time.monotonic()

    def add(packed: Packed) -> None:
        nonlocal shards, rows
        shards += 1
        rows += packed.num_samples + len(packed.skipped)

    def line() -> str:
        rate, times = pace(rows - first_rows, total - rows, time.monotonic() - start)
        waiting = waiting_for() if uses_ray and shards == len(have) < len(sizes) else ""
        return f"shards={shards}/{len(sizes)} rows={rows}/{total} images_per_s={rate:.0f} {times}{waiting}"

    with ticking(line, report, REPORT_S):
        yield add
