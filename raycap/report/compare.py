"""Several run folders -> Comparison: one table of their figures, and the same images with each one's caption."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from raycap import storage
from raycap.errors import StorageError
from raycap.report.chart import is_number
from raycap.report.read import INDEX, PER_IMAGE, Json, as_list, read_lines, read_object, shown, thumbnails

NUM_IMAGES = 12
# Of config.json: what tells the compared runs apart on purpose.
COMPARED = ("architecture", "init_from", "out")
COLUMNS = {"CIDEr": "cider", "BLEU-4": "bleu_4", "METEOR": "meteor", "ROUGE-L": "rouge_l"}
TRAINED = ("num_parameters", "num_trained_parameters", "num_steps", "wall_s")  # of train.json


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run. report: its page, relative to the comparison's. Figures that the folder lacks are None."""

    name: str
    report: str
    architecture: str
    num_parameters: int | None
    num_trained_parameters: int | None
    num_steps: int | None
    wall_s: float | None
    val_loss: float | None
    scores: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class ComparedImage:
    """captions: (name of the run, caption, its CIDEr or None)."""

    key: str
    thumbnail: str
    references: tuple[str, ...]
    captions: tuple[tuple[str, str, float | None], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """One page. common: settings that all runs share; differing: (setting, the runs' values) beyond what is compared."""

    title: str
    rows: tuple[Row, ...]
    common: dict[str, str]
    differing: tuple[tuple[str, tuple[str, ...]], ...]
    images: tuple[ComparedImage, ...]
    notes: tuple[str, ...]


def read_comparison(out: str, names: Sequence[str]) -> Comparison:
    """The runs `names`, folders below `out`, each trained and evaluated. Raises StorageError for one that is not."""
    notes: list[str] = []
    configs = [_required(out, name, "config.json", notes) for name in names]
    scored = [_required(out, name, "metrics.json", notes) for name in names]
    if len({(about.get("data_fingerprint"), about.get("num_images")) for about in scored}) > 1:
        notes.append("The runs were evaluated on different images: their scores cannot be compared.")
    settings = {key for config in configs for key in config if key not in COMPARED}
    values = {key: tuple(shown(config.get(key, "")) for config in configs) for key in sorted(settings)}
    return Comparison(
        title=out.rstrip("/").rpartition("/")[2] or out,
        rows=tuple(_row(out, *found, notes) for found in zip(names, configs, scored, strict=True)),
        common={key: found[0] for key, found in values.items() if len(set(found)) == 1},
        differing=tuple((key, found) for key, found in values.items() if len(set(found)) > 1),
        images=_images(out, names, scored[0], notes),
        notes=tuple(notes),
    )


def _required(out: str, name: str, file: str, notes: list[str]) -> Json:
    found = read_object(storage.join(out, name), file, notes)
    if not found:
        raise StorageError(
            f"nothing to compare in {storage.join(out, name)!r}: it holds no {file}; train and evaluate it first"
        )
    return found


def _row(out: str, name: str, config: Json, scored: Json, notes: list[str]) -> Row:
    root = storage.join(out, name)
    train = read_object(root, "train.json", notes)
    losses = [r["val_loss"] for r in read_lines(root, "metrics.jsonl", notes) if is_number(r.get("val_loss"))]
    counts = {name: train[name] if is_number(train.get(name)) else None for name in TRAINED}
    scores = scored.get("metrics")
    return Row(
        name=name,
        report=f"{name}/report.html",
        architecture=str(config.get("init_from") or config.get("architecture")),
        **counts,
        val_loss=losses[-1] if losses else None,
        scores={k: v for k, v in scores.items() if is_number(v)} if isinstance(scores, dict) else {},
    )


def _images(out: str, names: Sequence[str], scored: Json, notes: list[str]) -> tuple[ComparedImage, ...]:
    """Random images, the same every time, of those that every run captioned."""
    by_run = [{str(row.get("key")): row for row in read_lines(storage.join(out, n), PER_IMAGE, notes)} for n in names]
    order = list(by_run[0])
    captioned = [key for key in order if all(is_number(rows.get(key, {}).get("cider")) for rows in by_run)]
    keys = random.Random(0).sample(captioned, min(NUM_IMAGES, len(captioned)))
    shards, fingerprint = str(scored.get("shards", "")), str(scored.get("data_fingerprint", ""))
    numbers = {key: order.index(key) for key in keys}
    pictures = thumbnails(shards, storage.join(out, names[0], INDEX), fingerprint, numbers, notes)
    return tuple(_compared(key, pictures.get(key, ""), names, [rows[key] for rows in by_run]) for key in keys)


def _compared(key: str, thumbnail: str, names: Sequence[str], rows: Sequence[Json]) -> ComparedImage:
    return ComparedImage(
        key=key,
        thumbnail=thumbnail,
        references=tuple(str(text) for text in as_list(rows[0].get("references"))),
        captions=tuple((name, str(row.get("caption")), row["cider"]) for name, row in zip(names, rows, strict=True)),
    )


def as_json(comparison: Comparison) -> str:
    """The table for programs: a JSON list of the rows."""
    fields = ("name", "architecture", *TRAINED, "val_loss", "scores")
    rows: list[dict[str, Any]] = [{field: getattr(row, field) for field in fields} for row in comparison.rows]
    return json.dumps(rows, indent=2) + "\n"


def as_text(comparison: Comparison) -> str:
    """The table for a terminal and for Markdown."""
    header = ["family", "parameters", "steps", "training", "val. loss", *COLUMNS]
    rows = [
        [
            row.name,
            "" if row.num_parameters is None else f"{row.num_parameters:,}",
            "" if row.num_steps is None else str(row.num_steps),
            "" if row.wall_s is None else f"{row.wall_s:.0f} s",
            "" if row.val_loss is None else f"{row.val_loss:.3f}",
            *(f"{row.scores[name]:.3f}" if name in row.scores else "" for name in COLUMNS.values()),
        ]
        for row in comparison.rows
    ]
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    lines = [header, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(f"{v:<{w}}" for v, w in zip(line, widths, strict=True)) + " |" for line in lines)
