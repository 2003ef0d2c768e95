"""A run folder with every part that a report reads, made of a demo split; and the same with text that wants to do harm."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from conftest import samples_of

from raycap.shards import read_manifest

LONG = "/endless" * 40
NASTY = (
    "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> \x1b[31mred\x00 \u202eevil\u2066 \ud800 {{ 7*7 }} & — "
    + LONG
)
STEPS = [{"step": step, "loss": 5 / step, "lr": 1e-3} for step in range(10, 210, 10)]
VALIDATIONS = [
    {"step": step, "val_loss": 6 / step, "cider": step / 100, "num_val_images": 12, "samples": []}
    for step in (100, 200)
]
SHOWN = (
    "<script>alert(1)</script> \"'><img src=x onerror=alert(1)> ⟨U+001B⟩[31mred⟨U+0000⟩ ⟨U+202E⟩evil⟨U+2066⟩ ⟨U+D800⟩ {{ 7*7 }} & — "
    + LONG
)


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    lines = content if isinstance(content, list) else None
    text = "".join(json.dumps(line) + "\n" for line in lines) if lines is not None else json.dumps(content)
    (folder / name).write_text(text)


def rows_of(shards: str) -> list[dict[str, Any]]:
    return [
        {"key": s.key, "caption": f"a guess {i}", "references": s.captions, "cider": i / 4, "error_kind": None}
        for i, s in enumerate(samples_of(shards))
    ]


def write_run(folder: Path, shards: str, rows: list[dict[str, Any]]) -> str:
    """A run folder with every part; the evaluation is of these rows."""
    write(folder, "config.json", {"train_shards": "/data/train", "lr": 1e-3, "prompt": ""})
    train = {"num_steps": 200, "best_step": 200, "wall_s": 61.5, "resumed_from": [40]}
    write(
        folder,
        "train.json",
        train | {"skipped_by_kind": {"corrupt": 2}, "skipped_keys": {"bad-one": "corrupt", "bad-two": "corrupt"}},
    )
    write(folder, "metrics.jsonl", [*STEPS, *VALIDATIONS])
    scores = {
        "metrics": {"bleu_4": 0.25, "cider": 1.2346},
        "num_images": len(rows),
        "skipped_by_kind": {"truncated": 1},
    }
    about = {"checkpoint": "/runs/it/checkpoint", "checkpoint_step": 200, "verified": True, "shards": shards}
    decode = {"decode": {"num_beams": 3, "max_new_tokens": 20}, "evaluated_at": "2026-01-02 03:04:05 UTC"}
    fingerprint = {"data_fingerprint": read_manifest(shards).fingerprint, "checkpoint_fingerprint": "c0ffee"}
    write(folder, "metrics.json", scores | about | decode | fingerprint)
    skipped = {"key": "cut", "caption": None, "references": ["x"], "cider": None, "error_kind": "truncated"}
    write(folder, "per_image.jsonl", [*rows, skipped])
    bulk = {"num_images": 500, "num_captioned": 497, "errors": {"empty": 3}, "checkpoint": "c0ffee"}
    write(folder, "captions/_SUCCESS.json", bulk | {"verified": True})
    failures = {
        "key": ["a/1.jpg", "a/2.jpg"],
        "caption": ["fine", None],
        "error_kind": [None, "empty"],
        "error": [None, "no bytes"],
    }
    sink = io.BytesIO()
    pq.write_table(pa.table(failures | {"width": [1, 2]}), sink)
    (folder / "captions/data").mkdir()
    (folder / "captions/data/unit-00000.parquet").write_bytes(sink.getvalue())
    return str(folder)


def poison(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: poison(content) for name, content in value.items()}
    if isinstance(value, list):
        return [poison(content) for content in value]
    return NASTY if isinstance(value, str) else value


def poison_run(run: Path) -> None:
    """Every string of every file becomes NASTY, names of settings and kinds included; keys and shards still lead to images."""
    for name in ("config.json", "train.json", "captions/_SUCCESS.json"):
        write(run, name, poison(json.loads((run / name).read_text())) | {NASTY: NASTY})
    metrics = json.loads((run / "metrics.json").read_text())
    kept = {"shards": metrics["shards"], "data_fingerprint": metrics["data_fingerprint"]}
    metrics["metrics"][NASTY] = 0.5
    write(run, "metrics.json", poison(metrics) | kept | {"skipped_by_kind": {NASTY: 1}})
    rows = [json.loads(line) for line in (run / "per_image.jsonl").read_text().splitlines()]
    write(run, "per_image.jsonl", [poison(row) | {"key": row["key"]} for row in rows])
    write(run, "metrics.jsonl", [poison(r) | {"val_loss": NASTY} for r in [*STEPS, *VALIDATIONS]])
    (run / "captions/data/unit-00001.jsonl").write_text(json.dumps({"key": NASTY, "error_kind": NASTY, "error": NASTY}))
