"""A run folder -> Report, the content of its page. Owns which images are shown and what is said of parts that are missing."""

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from raycap import storage, units
from raycap.errors import ImageError, StorageError
from raycap.image import decode_image
from raycap.report.chart import Chart, is_number, training_charts
from raycap.schema import SampleError
from raycap.shards import read_manifest, read_run

PER_IMAGE = "per_image.jsonl"
INDEX = "index/evaluation"  # below the run folder: of shards that have no manifest of their own
BULK = "captions"  # the folder of bulk output below a run
MAX_SAMPLES = 20  # of each gallery
MAX_ROWS = 20  # of failures, of each door
MAX_UNITS = 200  # bulk files that are searched for failures
THUMBNAIL_SIDE, THUMBNAIL_BYTES = 320, 20_000
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionedImage:
    """One card. thumbnail: a data: URL, or "" where the image could not be read. words: (word, is in some reference)."""

    key: str
    words: tuple[tuple[str, bool], ...]
    references: tuple[str, ...]
    cider: float
    thumbnail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Failures:
    """Images without a caption of one door. rows: the first of them as (key, kind, sentence)."""

    door: str
    by_kind: dict[str, int]
    rows: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """One page. validations: (step, loss, CIDEr, images) while training; notes: sentences on what could not be shown."""

    title: str
    unverified: bool = False
    facts: tuple[tuple[str, str], ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    charts: tuple[Chart, ...] = ()
    validations: tuple[tuple[str, ...], ...] = ()
    galleries: dict[str, tuple[CaptionedImage, ...]] = field(default_factory=dict)
    failures: tuple[Failures, ...] = ()
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_report(out: str) -> Report:
    """The report of a run folder. A part that is missing stays empty; one that is damaged becomes a note.

    Raises StorageError if there is no part at all.
    """
    notes: list[str] = []
    config, train, scored = (read_object(out, f"{name}.json", notes) for name in ("config", "train", "metrics"))
    bulk_root = storage.join(out, BULK)
    bulk = read_object(bulk_root, "_SUCCESS.json", notes)
    records = read_lines(out, "metrics.jsonl", notes)
    images = read_lines(out, PER_IMAGE, notes)
    if not (config or train or scored or bulk or records or images or notes):
        raise StorageError(
            f"nothing to report in {out!r}: it holds no metrics.jsonl, metrics.json, train.json, config.json or "
            f"{BULK}/_SUCCESS.json; give the --out of a job that has run"
        )
    failures = (
        _training_failures(train),
        _evaluation_failures(scored, images),
        _bulk_failures(bulk_root, bulk, notes),
    )
    if bulk and scored.get("checkpoint_fingerprint") not in (None, bulk.get("checkpoint")):
        notes.append(f"{BULK}/ was captioned with another checkpoint than the one that was evaluated.")
    return Report(
        title=out.rstrip("/").rpartition("/")[2] or out,
        unverified=False in (scored.get("verified"), bulk.get("verified")),
        facts=_facts(config, train, scored, bulk),
        scores={name: value for name, value in _object(scored.get("metrics")).items() if is_number(value)},
        charts=training_charts(records),
        validations=tuple(
            tuple(shown(record.get(name, "")) for name in ("step", "val_loss", "cider", "num_val_images"))
            for record in records
            if "val_loss" in record
        ),
        galleries=_galleries(out, scored, images, notes),
        failures=tuple(found for found in failures if found is not None),
        settings=_settings(config, scored, bulk),
        notes=tuple(notes),
    )


def read_object(root: str, name: str, notes: list[str]) -> Json:
    url = storage.join(root, name)
    if not storage.exists(url):
        return {}
    try:
        content = json.loads(storage.read_bytes(url))
    except ValueError as error:
        notes.append(f"{name} is not shown: it is no JSON ({error}).")
        return {}
    return _object(content)


def read_lines(out: str, name: str, notes: list[str]) -> list[Json]:
    """The objects of a JSON Lines file, without the lines that are none: a killed job may leave half a line."""
    url = storage.join(out, name)
    if not storage.exists(url):
        return []
    records, num_bad = [], 0
    for line in storage.read_bytes(url).splitlines():
        try:
            records.append(_object(json.loads(line)))
        except ValueError:
            num_bad += 1
    if num_bad:
        notes.append(f"{name}: {num_bad} of {len(records) + num_bad} lines are no JSON and not shown.")
    return records


def _object(content: Any) -> Json:
    return content if isinstance(content, dict) else {}


def as_list(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def _facts(config: Json, train: Json, scored: Json, bulk: Json) -> tuple[tuple[str, str], ...]:
    found: list[tuple[str, Any]] = [
        ("Checkpoint", scored.get("checkpoint")),
        ("Step", scored.get("checkpoint_step") if scored else train.get("best_step")),
        ("Evaluated on", scored.get("shards")),
        ("Images", scored.get("num_images")),
        ("Evaluated at", scored.get("evaluated_at")),
        ("Search", _search(_object(scored.get("decode")))),
        ("Chosen by", scored.get("scorer")),
        ("Trained on", config.get("train_shards")),
        (
            "Training in this folder",
            f"{train.get('num_steps')} steps in {train['wall_s']:.0f} s" if is_number(train.get("wall_s")) else "",
        ),
        ("Resumed from steps", ", ".join(str(step) for step in as_list(train.get("resumed_from")))),
        ("Bulk checkpoint", "" if scored else bulk.get("checkpoint")),
        ("Captioned in bulk", f"{bulk.get('num_captioned')} of {bulk['num_images']}" if "num_images" in bulk else ""),
    ]
    return tuple((name, str(value)) for name, value in found if value not in (None, ""))


def _search(decode: Json) -> str:
    if not decode:
        return ""
    beams = decode.get("num_beams", 1)
    how = "sampled" if decode.get("do_sample") else "greedy" if beams == 1 else f"{beams} beams"
    words = decode.get("required_words")
    return f"{how}, at most {decode.get('max_new_tokens')} tokens" + (
        f", every caption with {', '.join(map(str, words))}" if isinstance(words, list) and words else ""
    )


def _settings(config: Json, scored: Json, bulk: Json) -> dict[str, dict[str, str]]:
    decoding = _object(scored.get("decode")) | {
        k: scored[k] for k in ("prompt", "scorer_fingerprint", "data_fingerprint") if k in scored
    }
    found = {"Training": config, "Evaluation": decoding, "Bulk captioning": bulk}
    return {name: {k: shown(v) for k, v in values.items()} for name, values in found.items() if values}


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- samples


def _galleries(
    out: str, scored: Json, images: Sequence[Json], notes: list[str]
) -> dict[str, tuple[CaptionedImage, ...]]:
    """Random images, the same every time, and the worst and the best by their own CIDEr."""
    rows = [row for row in images if is_number(row.get("cider"))]
    if not rows:
        return {}
    ranked = sorted(rows, key=lambda row: (row["cider"], str(row.get("key"))))
    chosen = {
        "Random": random.Random(0).sample(rows, min(MAX_SAMPLES, len(rows))),
        "Worst": ranked[:MAX_SAMPLES],
        "Best": ranked[::-1][:MAX_SAMPLES],
    }
    keys = {str(row.get("key")) for part in chosen.values() for row in part}
    # An evaluation has one row per sample, in the order of the shards.
    numbers = {key: i for i, row in enumerate(images) if (key := str(row.get("key"))) in keys}
    shards, fingerprint = str(scored.get("shards", "")), str(scored.get("data_fingerprint", ""))
    pictures = thumbnails(shards, storage.join(out, INDEX), fingerprint, numbers, notes)
    return {name: tuple(_captioned(row, pictures) for row in part) for name, part in chosen.items()}


def _captioned(row: Json, pictures: Mapping[str, str]) -> CaptionedImage:
    key, references = str(row.get("key")), tuple(str(text) for text in as_list(row.get("references")))
    known = {_plain(word) for text in references for word in text.split()}
    words = str(row.get("caption")).split(" ")
    return CaptionedImage(
        key=key,
        words=tuple((word, _plain(word) in known) for word in words),
        references=references,
        cider=row["cider"],
        thumbnail=pictures.get(key, ""),
    )


def _plain(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def thumbnails(
    shards: str, index_root: str, fingerprint: str, numbers: Mapping[str, int], notes: list[str]
) -> dict[str, str]:
    """A data: URL for each key whose image can be read, each with one range read; what cannot becomes a note.

    index_root: where the manifest is if it is not beside the shards. numbers: of the samples, by key.
    """
    if not shards:
        notes.append("Images are not shown: there is no metrics.json that names the shards they lie in.")
        return {}
    try:
        manifest = read_manifest(shards, index_root)
    except StorageError as error:
        notes.append(f"Images are not shown: {error}.")
        return {}
    if manifest.fingerprint != fingerprint:
        notes.append(f"Images are not shown: the shards at {shards} are no longer those that were evaluated.")
        return {}
    found = {}
    for key, i in numbers.items():
        if i >= manifest.num_samples:
            notes.append(f"The image {key} is not shown: {shards} holds only {manifest.num_samples} samples.")
            continue
        number, index = manifest.locate(i)
        try:
            (sample,) = read_run(manifest, number, index, index + 1)
            if isinstance(sample, SampleError):
                notes.append(f"The image {key} is not shown: {sample.message}.")
            elif sample.key != key:
                notes.append(f"The image {key} is not shown: sample {i} of {shards} is {sample.key}.")
            else:
                found[key] = thumbnail(sample.image)
        except (StorageError, ImageError) as error:
            notes.append(f"The image {key} is not shown: {error}.")
    return found


def thumbnail(image: bytes) -> str:
    """A JPEG of at most THUMBNAIL_SIDE pixels and THUMBNAIL_BYTES bytes as a data: URL. Raises ImageError."""
    small = Image.fromarray(decode_image(image))
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    for quality in (85, 75, 60, 40, 20, 5):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality, optimize=True)
        if buffer.tell() <= THUMBNAIL_BYTES:
            break
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# ---- failures


def _training_failures(train: Json) -> Failures | None:
    left_out = {f"{kind} (left out)": count for kind, count in _object(train.get("left_out_by_kind")).items()}
    by_kind = _object(train.get("skipped_by_kind")) | left_out
    keys = _object(train.get("left_out_keys")) | _object(train.get("skipped_keys"))
    rows = [(str(key), str(kind), "") for key, kind in [*keys.items()][:MAX_ROWS]]
    return Failures(door="Training", by_kind=by_kind, rows=tuple(rows)) if train else None


def _evaluation_failures(scored: Json, images: Sequence[Json]) -> Failures | None:
    bad = [_failure(row) for row in images if row.get("error_kind")]
    if not scored:
        return None
    return Failures(door="Evaluation", by_kind=_object(scored.get("skipped_by_kind")), rows=tuple(bad[:MAX_ROWS]))


def _bulk_failures(root: str, success: Json, notes: list[str]) -> Failures | None:
    data = storage.join(root, "data")
    names = [name + ext for ext in (".parquet", ".jsonl") for name in sorted(units.done(data, ext))]
    if not success:
        if names:
            notes.append(
                f"Bulk captioning is not finished: {BULK}/ has no _SUCCESS.json, its files so far: {len(names)}."
            )
        return None
    by_kind = _object(success.get("errors"))
    rows: list[tuple[str, str, str]] = []
    for name in names[:MAX_UNITS] if by_kind else ():
        try:
            rows += [_failure(row) for row in _read_unit(storage.join(data, name)) if row.get("error_kind")]
        except (StorageError, ValueError, OSError) as error:  # pyarrow's exceptions are among the latter two
            notes.append(f"{BULK}/data/{name} is not shown: {error}.")
        if len(rows) >= MAX_ROWS:
            break
    return Failures(door="Bulk captioning", by_kind=by_kind, rows=tuple(rows[:MAX_ROWS]))


def _read_unit(url: str) -> list[Json]:
    data = storage.read_bytes(url)
    if url.endswith(".jsonl"):
        return [_object(json.loads(line)) for line in data.splitlines()]
    import pyarrow.parquet as pq

    file = pq.ParquetFile(io.BytesIO(data))
    columns = [name for name in ("key", "error_kind", "error") if name in file.schema_arrow.names]
    rows: list[Json] = file.read(columns).to_pylist()
    return rows


def _failure(row: Json) -> tuple[str, str, str]:
    return str(row.get("key")), str(row["error_kind"]), str(row.get("error") or "")
