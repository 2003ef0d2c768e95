"""The spine with every root on S3: shards, training output with resume state, checkpoint, metrics."""

import json
from dataclasses import replace

import pytest
from conftest import Demo
from s3_server import BUCKET, faults
from training_runs import curve, small_run

from raycap import storage
from raycap.captioner import Captioner
from raycap.config import EvaluateConfig, TrainConfig
from raycap.evaluation.evaluate import evaluate
from raycap.training.driver import train_captioner

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROOT = f"s3://{BUCKET}/spine"


def test_a_run_on_an_s3_that_fails_is_the_run_on_a_local_folder_and_its_checkpoint_is_evaluated_there(
    undisturbed: TrainConfig, demo: Demo, s3_endpoint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, folder in (("train", demo.train), ("val", demo.val), ("test", demo.test)):
        storage.upload_folder(folder, f"{ROOT}/{name}", last="manifest.parquet")
    config = replace(small_run(demo, f"{ROOT}/run"), train_shards=f"{ROOT}/train", val_shards=f"{ROOT}/val")
    with faults(s3_endpoint, fail_every=20) as done:  # one request in twenty
        train_captioner(config)
    assert done["failed"] >= 10
    records = [json.loads(line) for line in storage.read_bytes(f"{ROOT}/run/metrics.jsonl").decode().splitlines()]
    assert [(r["step"], r["batch_digest"], r["loss"]) for r in records if "loss" in r] == curve(undisturbed.out)

    names = storage.list_files(f"{ROOT}/run")
    assert {name.split("/")[1] for name in names if name.startswith("checkpoints/")} == {
        "step-00000020",
        "step-00000024",
    }
    assert any(name.startswith("state/checkpoint_") for name in names)
    assert Captioner.load(f"{ROOT}/run/checkpoint").spec.verified

    metrics = evaluate(EvaluateConfig(checkpoint=f"{ROOT}/run/checkpoint", shards=f"{ROOT}/test", out=f"{ROOT}/run"))
    assert json.loads(storage.read_bytes(f"{ROOT}/run/metrics.json"))["metrics"] == metrics
    train_captioner(config)
    assert "this run is finished" in capsys.readouterr().out
