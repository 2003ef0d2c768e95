"""Captions of a split -> metrics.json and captions.json, as a Ray Data job with Captioner processes."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import ray
import torch

from raycap import cluster, storage
from raycap.captioner import Captioner
from raycap.checkpoint import CheckpointSpec, load_checkpoint
from raycap.config import EvaluateConfig, default_root
from raycap.data.batch import Batch, Columns, InOrder, Source, split_steps
from raycap.data.demo import demo_shards
from raycap.data.stream import own_errors, steps_dataset
from raycap.errors import UserError
from raycap.metrics.coco import coco_scores
from raycap.shards import Manifest, check_shards, read_manifest

REPORT_S = 5.0


def evaluate(config: EvaluateConfig) -> dict[str, float]:
    """Corpus metrics of a checkpoint on a split; writes metrics.json and captions.json below config.out."""
    checkpoint, shards = _inputs(config)
    spec, _ = load_checkpoint(checkpoint)
    manifest = read_manifest(shards)
    check_shards(manifest)
    num_images = min(config.max_images or manifest.num_samples, manifest.num_samples)
    num_gpus = config.concurrency if config.device == "cuda" else 0
    cluster.connect(
        num_cpus=config.concurrency + 1,
        num_gpus=num_gpus,
        need=f"--concurrency {config.concurrency} captioners + 1 for reading",
    )
    use_gpu = cluster.use_gpus(config.device, config.concurrency, "--concurrency")
    print(f"captioning {num_images} images of {shards} with {checkpoint}", flush=True)

    captions: dict[str, str] = {}
    references: dict[str, tuple[str, ...]] = {}
    image_ids: dict[str, Any] = {}
    errors: Counter[str] = Counter()
    begun = reported = 0.0
    for row in _caption_rows(config, checkpoint, spec, manifest, num_images, use_gpu):
        begun = begun or time.perf_counter()  # rates leave out the start of the processes
        if row["error_kind"]:
            errors[row["error_kind"]] += 1
            continue
        captions[row["key"]], references[row["key"]] = row["caption"], tuple(row["captions"])
        image_ids[row["key"]] = row["image_id"] if row["image_id"] is not None else row["key"]
        if time.perf_counter() - max(reported, begun) > REPORT_S:
            reported = time.perf_counter()
            rate = len(captions) / (reported - begun)
            left = (num_images - len(captions)) / rate
            print(f"images={len(captions)}/{num_images} images_per_s={rate:.1f} eta_s={left:.0f}", flush=True)
    if not captions:
        raise UserError(
            f"none of the {num_images} images in {shards!r} could be decoded ({dict(errors)}); check the shards"
        )
    print(f"captioned {len(captions)} images; scoring", flush=True)
    metrics = asdict(coco_scores(captions, references))
    del metrics["cider_by_key"]
    report = {
        "metrics": metrics,
        "num_images": len(captions),
        "skipped_by_kind": dict(errors),
        "checkpoint": checkpoint,
        "checkpoint_step": spec.info.get("step"),
        "shards": shards,
        "data_fingerprint": manifest.fingerprint,
        "decode": asdict(spec.decode),
        "prompt": spec.text.prompt,
    }
    results = [{"image_id": image_ids[key], "caption": caption} for key, caption in captions.items()]
    storage.put(
        storage.join(config.out, "captions.json"), (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode()
    )
    storage.put(storage.join(config.out, "metrics.json"), (json.dumps(report, indent=2) + "\n").encode())
    for name, value in metrics.items():
        print(f"{name:<8} {value:.4f}")
    print(f"wrote {config.out}/metrics.json and {config.out}/captions.json", flush=True)
    return metrics


def _inputs(config: EvaluateConfig) -> tuple[str, str]:
    """Checkpoint and shards, the demo's where none are given. Raises UserError if the demo is not there."""
    demo = default_root("demo")
    checkpoint, shards = config.checkpoint or storage.join(demo, "checkpoint"), config.shards or demo_shards(demo).test
    for given, file in (
        (config.checkpoint, storage.join(checkpoint, "raycap.json")),
        (config.shards, storage.join(shards, "manifest.parquet")),
    ):
        if not given and not storage.exists(file):
            raise UserError(
                f"no demo to evaluate: {file!r} does not exist; run make demo, or give --checkpoint and --shards"
            )
    return checkpoint, shards


class _CaptionBlock:
    """A Ray Data actor: a block of prepared rows in, one caption or error kind per image out."""

    def __init__(self, checkpoint: str, device: str, micro_batch_size: int) -> None:
        torch.set_num_threads(1)
        self._captioner = Captioner.load(checkpoint, device=device)
        self._size = micro_batch_size

    def __call__(self, block: Columns) -> Columns:
        rows = [row for batch in split_steps(block) for row in self._rows(batch)]
        return {"row": np.array([json.dumps(row) for row in rows], dtype=object)}

    def _rows(self, batch: Batch) -> Iterator[dict[str, Any]]:
        kinds = dict(batch.errors)
        for first in range(0, len(batch.keys), self._size):
            part = slice(first, first + self._size)
            results = self._captioner.caption_prepared(np.ascontiguousarray(batch.pixel_values[part]))
            about = zip(batch.keys[part], batch.image_ids[part], batch.captions[part], results, strict=True)
            for key, image_id, references, result in about:
                if key:
                    kind = kinds.get(key, "")
                    yield {
                        "key": key,
                        "image_id": image_id,
                        "captions": references,
                        "caption": result.caption,
                        "error_kind": kind,
                    }


def _caption_rows(
    config: EvaluateConfig, checkpoint: str, spec: CheckpointSpec, manifest: Manifest, num_images: int, use_gpu: bool
) -> Iterator[dict[str, Any]]:
    order = InOrder(num_samples=num_images, global_batch_size=config.micro_batch_size)
    source = Source(
        manifest=manifest,
        image=spec.image,
        text=spec.text,
        tokenizer=spec.tokenizer.to_str(),
        captions_per_image=1,
        seed=0,
    )
    blocks = steps_dataset(
        ray.put((order, source)), 0, order.num_steps, 1, 0, 1, num_cpus=config.concurrency + 1
    ).map_batches(
        _CaptionBlock,
        fn_constructor_args=(checkpoint, "cuda" if use_gpu else "cpu", config.micro_batch_size),
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(size=config.concurrency),
        num_cpus=1,
        num_gpus=1 if use_gpu else 0,
    )
    with own_errors():
        for row in blocks.iter_rows():
            yield json.loads(row["row"])
