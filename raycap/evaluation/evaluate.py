"""Captions of a split -> scores, captions and report.html, as a Ray Data job with Captioner processes."""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch

from raycap import cluster, storage, units
from raycap.captioner import Captioner, check_finite
from raycap.checkpoint import SEAL, CheckpointSpec, open_spec
from raycap.config import EvaluateConfig, default_root
from raycap.data.actor_pool import map_in_actors
from raycap.data.batch import Columns, Source
from raycap.data.demo import demo_shards, given_or_demo
from raycap.data.index import open_shards
from raycap.data.stream import reads_dataset
from raycap.data.tasks import own_errors, waiting_for
from raycap.data.ticker import pace, ticking
from raycap.errors import UserError
from raycap.metrics.coco import coco_scores
from raycap.order import InOrder
from raycap.report import write_report
from raycap.report.read import INDEX, PER_IMAGE
from raycap.schema import DecodeSettings
from raycap.scorer import chosen_by, scorer_fingerprint
from raycap.shards import MANIFEST, Manifest, check_shards

REPORT_S = 5.0
MAX_RETRIES = 3  # of a block whose captioner died
Row = dict[str, Any]  # of one image: key, image_id, caption, references, error_kind


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Corpus metrics of a checkpoint on a split; what is written below config.out is in `_write`."""
    checkpoint, shards = _inputs(config)
    spec = open_spec(checkpoint, prompt=config.prompt)
    spec = replace(spec, decode=_settings(config, spec))
    scorer = scorer_fingerprint(config.scorer, spec.image, checkpoint)
    manifest = open_shards(shards, storage.join(config.out, INDEX), connect=lambda: _connect(config))
    check_shards(manifest)
    num_images = min(config.max_images or manifest.num_samples, manifest.num_samples)
    use_gpu = _connect(config)
    unverified = "" if spec.verified else " (unverified: no raycap.json vouches for it)"
    choice = f", {chosen_by(config.scorer)}" if scorer else ""
    print(f"captioning {num_images} images of {shards} with {checkpoint}{unverified}{choice}", flush=True)
    captions = _caption_rows(config, checkpoint, spec, manifest, num_images, use_gpu)
    rows = list(_report_progress(_check_keys(captions, manifest.root), num_images))
    check_finite(row["error_kind"] for row in rows)
    captioned = [row for row in rows if not row["error_kind"]]
    errors = Counter(row["error_kind"] for row in rows if row["error_kind"])
    errors.update(kind for _, kind in manifest.skipped)  # what was known before anything was read
    if not captioned:
        raise UserError(
            f"none of the {num_images} images in {shards!r} could be decoded ({dict(errors)}); check the shards"
        )
    print(f"captioned {len(captioned)} images; scoring", flush=True)
    scores = asdict(
        coco_scores({r["key"]: r["caption"] for r in captioned}, {r["key"]: r["references"] for r in captioned})
    )
    cider_by_key = scores.pop("cider_by_key")
    about = {
        "metrics": scores,
        "num_images": len(captioned),
        "skipped_by_kind": dict(errors),
        "checkpoint": checkpoint,
        "checkpoint_step": spec.info.get("step"),
        "checkpoint_fingerprint": spec.fingerprint,
        "verified": spec.verified,
        "shards": shards,
        "data_fingerprint": manifest.fingerprint,
        "decode": asdict(spec.decode),
        "prompt": spec.text.prompt,
        **({"scorer": config.scorer, "scorer_fingerprint": scorer} if scorer else {}),
        "evaluated_at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
    }
    _write(config.out, rows, cider_by_key, about)
    return scores


def _settings(config: EvaluateConfig, spec: CheckpointSpec) -> DecodeSettings:
    return spec.settings(
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        others=config.decode_settings,
        for_scorer=bool(config.scorer),
    )


def _write(out: str, rows: list[Row], cider_by_key: dict[str, float], about: dict[str, Any]) -> None:
    """The four files of an evaluation.

    captions.json: COCO's results format. per_image.jsonl: every image, a skipped one with its error kind. metrics.json:
    the scores and what they are of. report.html: all of it for people, with what training left in the folder.
    """
    captioned = [row for row in rows if not row["error_kind"]]
    results = [
        {"image_id": row["key"] if row["image_id"] is None else row["image_id"], "caption": row["caption"]}
        for row in captioned
    ]
    lines = (json.dumps(row | {"cider": cider_by_key.get(row["key"])}) + "\n" for row in rows)
    storage.put(storage.join(out, "captions.json"), (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    storage.put(storage.join(out, PER_IMAGE), "".join(lines).encode())
    said = "Captions of a split beside their references, scored by raycap."
    units.describe(out, PER_IMAGE, "test", said, per_image_schema(rows), renew=True)
    storage.put(storage.join(out, "metrics.json"), (json.dumps(about, indent=2) + "\n").encode())
    for name, value in about["metrics"].items():
        print(f"{name:<8} {value:.4f}")
    print(f"wrote {out}/metrics.json, captions.json and {PER_IMAGE}", flush=True)
    print(f"report: {write_report(out)}", flush=True)


def per_image_schema(rows: list[Row]) -> pa.Schema:
    """Of per_image.jsonl; the ids of a data set are numbers or texts."""
    is_text = any(isinstance(row["image_id"], str) for row in rows)
    names = ("key", "image_id", "caption", "references", "error_kind", "cider")
    types = (
        pa.string(),
        pa.string() if is_text else pa.int64(),
        pa.string(),
        pa.list_(pa.string()),
        pa.string(),
        pa.float64(),
    )
    return pa.schema(list(zip(names, types, strict=True)))


def _connect(config: EvaluateConfig) -> bool:
    """Connects to Ray and checks its size. Whether the captioners use GPUs."""
    cluster.connect(
        num_cpus=config.concurrency + 1,
        num_gpus=config.concurrency if config.device == "cuda" else 0,
        need=f"--concurrency {config.concurrency} captioners + 1 for reading",
    )
    return cluster.use_gpus(config.device, config.concurrency, "--concurrency")


def _report_progress(rows: Iterator[Row], num_images: int) -> Iterator[Row]:
    """The rows, with a line every REPORT_S seconds; rates leave out the start of the processes."""
    number, begun = 0, time.perf_counter()

    def line() -> str:
        rate, times = pace(number, num_images - number, time.perf_counter() - begun)
        return f"images={number}/{num_images} images_per_s={rate:.1f} {times}{'' if number else waiting_for()}"

    with ticking(line, partial(print, flush=True), REPORT_S, at_end=False):
        for row in rows:
            begun = begun if number else time.perf_counter()
            number += 1
            yield row


def _inputs(config: EvaluateConfig) -> tuple[str, str]:
    """Checkpoint and shards, the demo's where none are given. Raises UserError if the demo is not there."""
    demo, words = default_root("demo"), {"to": "evaluate", "flags": "--checkpoint and --shards"}
    return (
        given_or_demo(config.checkpoint, storage.join(demo, "checkpoint"), SEAL, **words),
        given_or_demo(config.shards, demo_shards(demo).test, MANIFEST, **words),
    )


def _check_keys(rows: Iterator[Row], root: str) -> Iterator[Row]:
    """The rows. Raises UserError when two have a key in common: scores are by key, so one of them would count for both."""
    seen = set()
    for row in rows:
        if row["key"] in seen:
            raise UserError(
                f"2 images in {root!r} have the key {row['key']!r}; prepare the shards again with a key for each image"
            )
        seen.add(row["key"])
        yield row


class _CaptionBlock:
    """A Ray Data actor: a block of prepared rows in, one caption or error kind per image out."""

    def __init__(self, load: Callable[[], Captioner], settings: DecodeSettings, micro_batch_size: int) -> None:
        torch.set_num_threads(1)
        self._captioner = load()
        self._settings, self._size = settings, micro_batch_size

    def __call__(self, block: Columns) -> Columns:
        return {"row": np.array([json.dumps(row) for row in self._rows(block)], dtype=object)}

    def _rows(self, block: Columns) -> Iterator[Row]:
        for first in range(0, len(block["key"]), self._size):
            part = slice(first, first + self._size)
            results = self._captioner.caption_prepared(
                np.ascontiguousarray(block["pixel_values"][part]), self._settings
            )
            columns = (block[name][part] for name in ("key", "error_kind", "about"))
            for key, kind, about, result in zip(*columns, results, strict=True):
                facts = json.loads(about)
                yield {
                    "key": key,
                    "image_id": facts["image_id"],
                    "caption": None if kind else result.caption,
                    "references": facts["captions"],
                    "error_kind": kind or result.error_kind,
                }


def _caption_rows(
    config: EvaluateConfig, checkpoint: str, spec: CheckpointSpec, manifest: Manifest, num_images: int, use_gpu: bool
) -> Iterator[Row]:
    device = "cuda" if use_gpu else "cpu"
    load = partial(Captioner.load, checkpoint, device=device, prompt=config.prompt, scorer=config.scorer)
    order = InOrder(shard_sizes=manifest.sizes, num_samples=num_images, global_batch_size=config.micro_batch_size)
    source = Source(
        image=spec.image,
        text=spec.text,
        tokenizer=spec.tokenizer.to_str(),
        captions_per_image=1,
        seed=0,
    )
    reads = list(order.reads(0, order.num_steps, rank=0, world=1))
    blocks = map_in_actors(
        reads_dataset(reads, ray.put(manifest), source, num_cpus=config.concurrency + 1),
        _CaptionBlock,
        (load, spec.decode, config.micro_batch_size),
        concurrency=config.concurrency,
        num_gpus=1 if use_gpu else 0,
        max_retries=MAX_RETRIES,
    )
    with own_errors("captioning"):
        for block_row in blocks.iter_rows():
            yield json.loads(block_row["row"])
