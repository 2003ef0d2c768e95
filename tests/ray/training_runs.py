"""A training run of seconds, as a config and as flags, and how its records are read."""

import json
from pathlib import Path
from typing import Any

from conftest import Demo

from raycap.config import TrainConfig

SIZES = {
    "image_size": 32,
    "max_tokens": 20,
    "max_new_tokens": 6,
    "epochs": 3,
    "global_batch_size": 12,
    "micro_batch_size": 3,
    "captions_per_image": 2,
    "lr": 3e-3,
    "warmup_steps": 3,
    "eval_every": 12,
    "checkpoint_every": 4,
    "log_every": 1,
}


def small_run(demo: Demo, out: str) -> TrainConfig:
    """96 images, 12 to a step, 8 steps an epoch, two micro steps on each of two workers; 24 steps in all."""
    return TrainConfig(train_shards=demo.train, val_shards=demo.val, tokenizer=demo.tokenizer, out=out, **SIZES)  # type: ignore[arg-type]


def small_run_flags(demo: Demo, out: str) -> list[str]:
    """The same run as command line flags."""
    sizes = [word for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return ["--train-shards", demo.train, "--val-shards", demo.val, "--tokenizer", demo.tokenizer, "--out", out, *sizes]


def records_of(out: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def curve(out: str) -> list[tuple[int, int, float]]:
    """(step, digest of the batch's keys, loss) of every step."""
    return [(r["step"], r["batch_digest"], r["loss"]) for r in records_of(out) if "loss" in r]
