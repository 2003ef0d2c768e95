"""What a bulk run does before it captions: lists the images once, and fixes the plan that every later run must share.

Owns job.json, manifest.parquet and the names of units; not how a unit is captioned. Imports no Ray.
"""

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raycap import storage, units
from raycap.checkpoint import CheckpointSpec
from raycap.config import CaptionBucketConfig
from raycap.errors import StorageError, UserError
from raycap.schema import DecodeSettings, ImageSpec, bulk_manifest_schema
from raycap.storage import Entry, EntryError

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT_VERSION = 1
PLAN, MANIFEST, SUCCESS, DATA = "job.json", "manifest.parquet", "_SUCCESS.json", "data"
_UNIT = re.compile(r"unit-(\d{8})")
# Of macOS, Synology and QNAP stores, Jupyter, and file managers; their names say that nobody meant them as images.
_LEFTOVERS = {
    "__MACOSX",
    "@eaDir",
    "#recycle",
    "@Recycle",
    ".ipynb_checkpoints",
    ".thumbnails",
    ".Spotlight-V100",
    ".Trashes",
}
_PROBES = 16  # images that are read before a run starts: a bucket may be listed by more people than may read it


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every process of a run knows. checkpoint, settings_id: the fingerprints that each row carries."""

    images: str
    out: str
    unit_size: int
    format: str
    image: ImageSpec
    settings: DecodeSettings
    checkpoint: str
    settings_id: str
    verified: bool
    micro_batch_size: int
    decode_timeout_s: float

    def num_units(self, num_images: int) -> int:
        return -(-num_images // self.unit_size)

    def unit_name(self, unit: int) -> str:
        """Below out. Never made of keys, so that no key can collide with another or leave the folder."""
        return f"{DATA}/unit-{unit:08d}.{self.format}"

    def unit_url(self, unit: int) -> str:
        return storage.join(self.out, self.unit_name(unit))


def make_plan(
    config: CaptionBucketConfig, images: str, spec: CheckpointSpec, dtype: str, scorer: str = ""
) -> dict[str, Any]:
    """The values that decide which rows an output holds and what is in them, flat, for units.claim. scorer: its fingerprint.

    Not in it: what changes only the speed (concurrency, micro batches, device), and the places of checkpoint and scorer, which
    their fingerprints replace. dtype is in it: bf16 may choose another word. Without a scorer there is no word of one, as before
    there were any.
    """
    decode = json.loads(json.dumps(asdict(decode_settings(config, spec))))  # as it is read back: JSON has lists
    return {
        "format_version": FORMAT_VERSION,
        "images": images,
        "suffixes": ",".join(suffixes_of(config)),
        "unit_size": config.unit_size,
        "format": config.format,
        "checkpoint": spec.fingerprint,
        "verified": spec.verified,
        "prompt": spec.text.prompt,
        "dtype": dtype,
        **({"scorer": scorer} if scorer else {}),
        **({"leftovers": True} if config.leftovers else {}),
        **decode,
    }


def make_job(config: CaptionBucketConfig, images: str, spec: CheckpointSpec, dtype: str, scorer: str = "") -> Job:
    """The job of a plan."""
    settings = decode_settings(config, spec)
    values = {**asdict(settings), "prompt": spec.text.prompt, "dtype": dtype}
    said = json.dumps(values | ({"scorer": scorer} if scorer else {}), sort_keys=True)
    return Job(
        images=images,
        out=config.out,
        unit_size=config.unit_size,
        format=config.format,
        image=spec.image,
        settings=settings,
        checkpoint=spec.fingerprint,
        settings_id=hashlib.sha256(said.encode()).hexdigest()[:16],
        verified=spec.verified,
        micro_batch_size=config.micro_batch_size,
        decode_timeout_s=config.decode_timeout_s,
    )


def decode_settings(config: CaptionBucketConfig, spec: CheckpointSpec) -> DecodeSettings:
    """The checkpoint's own settings, with what the user asked for. Raises ValueError if the model, or a scorer, has no use for them."""
    return spec.settings(
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        num_candidates=config.num_candidates,
        others=config.decode_settings,
        for_scorer=bool(config.scorer),
    )


def read_plan(out: str) -> dict[str, Any]:
    """The plan that `out` was begun with; {} if there is none that could be read."""
    url = storage.join(out, PLAN)
    if not storage.exists(url):
        return {}
    try:
        plan = json.loads(storage.read_bytes(url))
    except ValueError:
        return {}
    return plan if isinstance(plan, dict) else {}


def suffixes_of(config: CaptionBucketConfig) -> list[str]:
    """Sorted, lower case, each with its dot; ["*"] takes every file."""
    given = {suffix.strip().lower() for suffix in config.suffixes.split(",")} - {""}
    return ["*"] if "*" in given else sorted(f".{suffix.removeprefix('.')}" for suffix in given)


def check_roots(images: str, out: str) -> None:
    """Raises UserError if the rows would lie among the images."""
    if f"{_real(images)}/".startswith(f"{_real(out)}/{DATA}/") or _real(images) == _real(out):
        raise UserError(
            f"--out {out!r} would write its rows among the images of {images!r}; give --out a folder of its own, which may "
            f"lie below --images"
        )


def is_leftover(name: str) -> bool:
    """Whether an operating system or program left this file beside the images: a copy of its resources, a deleted one, a preview."""
    *folders, file = name.split("/")
    return file.startswith("._") or any(folder in _LEFTOVERS or folder.startswith(".Trash") for folder in folders)


def list_images(
    images: str, out: str, suffixes: Sequence[str], *, leftovers: bool = False
) -> tuple[list[Entry], Counter[str]]:
    """The images below the root, sorted by key, and how many other files there are by suffix. One listing.

    leftovers: whether what is_leftover says is among the images.
    What lies below `out` is not counted: an output inside the images' root never lists itself. Raises StorageError if
    the root cannot be listed, UserError if there is no image.
    """
    own = f"{_real(out)}/".removeprefix(f"{_real(images)}/")
    kept, others = [], Counter[str]()
    for entry in storage.list_entries(images):
        if entry.name.startswith(own):
            continue
        if not leftovers and is_leftover(entry.name):
            others["left by programs (._*, __MACOSX, .Trash and the like)"] += 1
        elif "*" in suffixes or entry.name.lower().endswith(tuple(suffixes)):
            kept.append(entry)
        else:
            others[Path(entry.name).suffix.lower() or "no suffix"] += 1
    if not kept and not others:
        raise UserError(f"there are no files below {images!r}; check --images")
    if not kept:
        raise UserError(
            f"none of the {others.total()} files below {images!r} ends with one of {', '.join(suffixes)} (there are "
            f"{describe_counts(others)}); check --images or give --suffixes"
        )
    return kept, others


def describe_counts(counts: Counter[str], most: int = 6) -> str:
    """`.txt 12, .json 3`, the most frequent first."""
    said = [f"{name} {count}" for name, count in counts.most_common(most)]
    return ", ".join([*said, "..."] if len(counts) > most else said)


def check_readable(images: str, entries: Sequence[Entry]) -> None:
    """Reads a few images from all over the listing. Raises UserError if none can be read."""
    few = list(entries[:: max(1, len(entries) // _PROBES)])[:_PROBES]

    def problem(entry: Entry) -> str:
        try:
            storage.read_entry(images, entry)
        except EntryError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(_PROBES) as pool:
        problems = list(pool.map(problem, few))
    if few and all(problems):
        raise UserError(
            f"none of {len(few)} images below {images!r} can be read, the first: {problems[0]}; check the permissions"
        )


# ---- the manifest


def create_manifest(out: str, entries: Sequence[Entry]) -> "pa.Table":
    """manifest.parquet of the entries, or the one that is there already: the first listing is what all runs share."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = ([e.name for e in entries], [e.num_bytes for e in entries], [e.etag for e in entries])
    table = pa.table(dict(zip(("key", "num_bytes", "etag"), columns, strict=True)), schema=bulk_manifest_schema())
    sink = io.BytesIO()
    pq.write_table(table, sink)
    if units.commit_first(storage.join(out, MANIFEST), sink.getvalue()):
        return table
    return read_manifest(out)


def read_manifest(out: str) -> "pa.Table":
    """The rows of manifest.parquet. Raises StorageError if it is not one."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    url = storage.join(out, MANIFEST)
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(url)))
    except pa.ArrowException as error:
        raise StorageError(f"{url!r} is no listing of images ({error}); choose another --out") from error
    if table.schema.names != bulk_manifest_schema().names:
        raise StorageError(
            f"{url!r} has the columns {table.schema.names}, not {bulk_manifest_schema().names}; choose another --out"
        )
    return table


def entries_of(table: "pa.Table") -> list[Entry]:
    """Rows of a manifest as a listing's entries."""
    return [Entry(**row) for row in table.rename_columns(["name", "num_bytes", "etag"]).to_pylist()]


def pending_units(job: Job, num_images: int) -> list[int]:
    """Numbers of the units that do not exist yet."""
    names = units.done(storage.join(job.out, DATA), f".{job.format}")
    have = {int(match[1]) for match in map(_UNIT.fullmatch, names) if match}
    return [unit for unit in range(job.num_units(num_images)) if unit not in have]


def check_drift(job: Job, manifest: "pa.Table", now: Sequence[Entry], pending: Sequence[int]) -> str:
    """How the images changed since the manifest was made, as words; "" if they did not.

    Raises UserError if every image that is left was replaced or is gone: then the folder is another one, or not mounted.
    """
    listed = {entry.name: entry.etag for entry in entries_of(manifest)}
    found = {entry.name: entry.etag for entry in now}
    gone = listed.keys() - found.keys()
    replaced = {name for name in listed.keys() & found.keys() if listed[name] != found[name]}
    left = {key for unit in pending for key in rows_of(job, manifest, unit)["key"].to_pylist()}
    if left and left <= gone | replaced:
        raise UserError(
            f"all {len(left)} images left to caption below {job.images!r} are gone or were replaced since they were listed in "
            f"{storage.join(job.out, MANIFEST)!r}; bring them back or choose another --out"
        )
    new = found.keys() - listed.keys()
    parts = [
        f"{len(new)} new (not captioned here; another --out lists again)" if new else "",
        f"{len(gone)} gone" if gone else "",
        f"{len(replaced)} replaced" if replaced else "",
    ]
    return ", ".join(part for part in parts if part)


def rows_of(job: Job, manifest: "pa.Table", unit: int) -> "pa.Table":
    """The manifest's rows of one unit."""
    return manifest.slice(unit * job.unit_size, job.unit_size)


def _real(root: str) -> str:
    return root.rstrip("/") if storage.is_url(root) else str(Path(root).resolve())
