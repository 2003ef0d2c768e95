"""raycap/config.py: presets are valid, and a value that cannot work is refused by the name of its flag."""

import dataclasses
from typing import Any

import pytest

from raycap.config import (
    CLIP_GPT2_PRESETS,
    TRAIN_PRESETS,
    VGG_LSTM_PRESETS,
    VIT_GPT2_PRESETS,
    DemoConfig,
    EvaluateConfig,
    PrepareConfig,
    TrainConfig,
    default_root,
)

SHARDS = {"train_shards": "/t", "val_shards": "/v"}
POSITIVE = [
    "image_size",
    "max_tokens",
    "epochs",
    "global_batch_size",
    "micro_batch_size",
    "captions_per_image",
    "num_workers",
    "cpus_per_worker",
    "run_length",
    "eval_every",
    "eval_images",
    "max_new_tokens",
    "checkpoint_every",
    "log_every",
]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


ALL_PRESETS = {
    f"{job}-{name}": preset
    for job, presets in (
        ("blip", TRAIN_PRESETS),
        ("clip_gpt2", CLIP_GPT2_PRESETS),
        ("vit_gpt2", VIT_GPT2_PRESETS),
        ("vgg_lstm", VGG_LSTM_PRESETS),
    )
    for name, preset in presets.items()
}


@pytest.mark.parametrize("preset", ALL_PRESETS.values(), ids=ALL_PRESETS)
def test_presets_are_valid_and_divide_evenly(preset: TrainConfig) -> None:
    assert dataclasses.replace(preset) == preset  # __post_init__ again
    assert preset.global_batch_size % preset.num_workers == 0
    assert preset.global_batch_size // preset.num_workers % preset.micro_batch_size == 0
    assert preset.warmup_steps < preset.eval_every * 4
    assert preset.max_new_tokens <= preset.max_tokens


def test_the_first_preset_is_the_demo_and_every_job_runs_without_flags() -> None:
    assert next(iter(TRAIN_PRESETS)) == "demo"
    outs = [presets["demo"].out for presets in (TRAIN_PRESETS, CLIP_GPT2_PRESETS, VIT_GPT2_PRESETS, VGG_LSTM_PRESETS)]
    assert len(set(outs)) == 4
    for config in (DemoConfig(), PrepareConfig(), EvaluateConfig(), TRAIN_PRESETS["demo"]):
        assert config.out == default_root("demo")


@pytest.mark.parametrize("config", [DemoConfig, PrepareConfig, TrainConfig, EvaluateConfig])
def test_every_config_is_frozen_and_its_roots_are_its_fields(config: type[Any]) -> None:
    names = {field.name for field in dataclasses.fields(config)}
    assert set(config.ROOTS) <= names
    assert "out" in config.ROOTS
    assert len(names) <= 35  # about 30 flags a job
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().out = "/x"


def test_the_default_root_is_below_raycap_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCAP_RUNS", "/data/runs")
    assert default_root("demo") == "/data/runs/demo"
    monkeypatch.setenv("RAYCAP_RUNS", "")
    assert default_root("demo").endswith("/raycap-runs/demo")
    assert default_root("demo").startswith("/")


@pytest.mark.parametrize("name", POSITIVE)
def test_a_training_value_below_one_is_refused_by_its_flag(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{flag(name)} must be at least 1, got 0$"):
        TrainConfig(**{name: 0})


@pytest.mark.parametrize("name", ["warmup_steps", "weight_decay", "clip_norm", "max_failures"])
def test_a_negative_training_value_is_refused_by_its_flag(name: str) -> None:
    assert getattr(TrainConfig(**{name: 0}), name) == 0
    with pytest.raises(ValueError, match=f"^{flag(name)} must not be negative, got -1$"):
        TrainConfig(**{name: -1})


@pytest.mark.parametrize(
    ("config", "values", "flags"),
    [
        (TrainConfig, {"lr": 0.0}, ["--lr"]),
        (TrainConfig, {"lr": float("nan")}, ["--lr"]),
        (TrainConfig, {"label_smoothing": 1.0}, ["--label-smoothing"]),
        (TrainConfig, {"label_smoothing": -0.1}, ["--label-smoothing"]),
        (TrainConfig, {"global_batch_size": 3, "num_workers": 4}, ["--global-batch-size 3", "4 workers"]),
        (TrainConfig, {"train_shards": "/t", "tokenizer": "/k"}, ["--train-shards", "--val-shards"]),
        (TrainConfig, {"val_shards": "/v"}, ["--train-shards", "--val-shards"]),
        (TrainConfig, {**SHARDS, "init_from": "a/b", "tokenizer": "/k"}, ["--tokenizer", "--init-from"]),
        (TrainConfig, SHARDS, ["--tokenizer", "--init-from"]),
        (DemoConfig, {"epochs": -1}, ["--epochs"]),
        (DemoConfig, {"num_val": 1}, ["--num-train", "--num-val", "--num-test"]),
        (PrepareConfig, {"annotations": "/a.json"}, ["--annotations", "--images"]),
        (PrepareConfig, {"annotations": "/a.json", "images": "/i"}, ["--images", "--out"]),
        (PrepareConfig, {"samples_per_shard": 0}, ["--samples-per-shard"]),
        (TrainConfig, {"run_length": 129}, ["--run-length", "128"]),
        (TrainConfig, {"max_error_rate": 1.5}, ["--max-error-rate"]),
        (EvaluateConfig, {"micro_batch_size": 0}, ["--micro-batch-size"]),
        (EvaluateConfig, {"concurrency": 0}, ["--concurrency"]),
        (EvaluateConfig, {"max_images": -1}, ["--max-images"]),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_the_names_of_its_flags(
    config: type[Any], values: dict[str, Any], flags: list[str]
) -> None:
    with pytest.raises(ValueError, match="--") as caught:
        config(**values)
    for name in flags:
        assert name in str(caught.value)


def test_what_belongs_together_is_accepted_together() -> None:
    assert TrainConfig(**SHARDS, tokenizer="/k").tokenizer == "/k"
    assert TrainConfig(**SHARDS, init_from="a/b").init_from == "a/b"
    assert PrepareConfig(annotations="/a.json", images="/i", out="/o").out == "/o"
    assert TrainConfig(global_batch_size=4, num_workers=4).num_workers == 4
