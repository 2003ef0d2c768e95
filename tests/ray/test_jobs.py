"""The jobs as users start them: python, ray job submit in its three forms, and the mistakes that end with exit code 2."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from conftest import Demo
from ray.util.placement_group import placement_group, remove_placement_group
from training_runs import curve, small_run_flags

from raycap.config import TrainConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def run(command: list[str], timeout: float = 240, **environment: str) -> subprocess.CompletedProcess[str]:
    """The finished command, started in the repository with its Python environment active."""
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def submit(*arguments: str) -> list[str]:
    return [RAY, "job", "submit", "--address", os.environ["RAYCAP_TEST_DASHBOARD"], *arguments]


def status(out: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / "status.json").read_text())
    return content


def coco(demo: Demo, split: str) -> list[str]:
    return [
        "--annotations",
        f"{demo.coco}/annotations/captions_{split}.json",
        "--images",
        f"{demo.coco}/images/{split}",
    ]


def test_prepare_shards_as_a_python_script_and_again_and_as_a_submitted_module_of_the_working_dir(
    ray_cluster: str, demo: Demo, tmp_path: Path
) -> None:
    first = run([sys.executable, "jobs/prepare_shards.py", *coco(demo, "test"), "--out", str(tmp_path / "a")])
    assert first.returncode == 0, first.stderr
    assert "shards=1/1" in first.stdout
    assert status(tmp_path / "a") == {"job": "prepare_shards", "state": "succeeded", "exit_code": 0, "error": None}
    again = run(
        submit(
            "--working-dir",
            ".",
            "--",
            "python",
            "jobs/prepare_shards.py",
            *coco(demo, "test"),
            "--out",
            str(tmp_path / "a"),
        )
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "finished_before=true" in again.stdout


def test_train_blip_submitted_with_its_working_dir_and_evaluated_by_the_bare_submit(
    ray_cluster: str, demo: Demo, tmp_path: Path
) -> None:
    trained = run(
        submit("--working-dir", ".", "--", "jobs/train_blip.py", *small_run_flags(demo, str(tmp_path / "run")))
    )
    assert trained.returncode == 0, trained.stdout + trained.stderr
    for word in (
        "loss=",
        "lr=",
        "images_per_s=",
        "captions_per_s=",
        "data_wait_percent=",
        "eta_s=",
        "val_loss=",
        "cider=",
    ):
        assert word in trained.stdout
    assert status(tmp_path / "run")["exit_code"] == 0
    evaluated = run(
        submit(
            "--",
            "jobs/evaluate.py",
            "--checkpoint",
            str(tmp_path / "run/checkpoint"),
            "--shards",
            demo.test,
            "--out",
            str(tmp_path),
        )
    )
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider"}
    results = json.loads((tmp_path / "captions.json").read_text())
    annotations = json.loads(Path(demo.coco, "annotations/captions_test.json").read_text())
    assert sorted(r["image_id"] for r in results) == sorted(image["id"] for image in annotations["images"])
    assert all(isinstance(r["image_id"], int) and isinstance(r["caption"], str) for r in results)


def test_a_driver_killed_in_the_middle_goes_on_with_the_same_command_to_the_same_curve(
    undisturbed: TrainConfig, demo: Demo, tmp_path: Path
) -> None:
    command = [sys.executable, "jobs/train_blip.py", *small_run_flags(demo, str(tmp_path / "killed"))]
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while not (metrics.exists() and '"step": 9,' in metrics.read_text()):
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    again = run(command)
    assert again.returncode == 0, again.stderr
    # Step 8's checkpoint counts once Ray's controller has heard of it, which on a fast machine may be after the kill.
    assert "resuming from step 8" in again.stdout or "resuming from step 4" in again.stdout
    assert curve(str(tmp_path / "killed")) == curve(undisturbed.out)


def test_a_demo_of_a_few_images_runs_from_artwork_to_metrics(ray_cluster: str, tmp_path: Path) -> None:
    size = ["--num-train", "24", "--num-val", "4", "--num-test", "4", "--epochs", "1"]
    result = run([sys.executable, "jobs/demo.py", *size], RAYCAP_RUNS=str(tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "the demo data set: 24 + 4 + 4 images" in result.stdout
    for name in ("checkpoint/raycap.json", "metrics.json", "captions.json", "train.json", "status.json"):
        assert (tmp_path / "demo" / name).is_file()
    other = run([sys.executable, "jobs/demo.py", "--num-train", "30"], RAYCAP_RUNS=str(tmp_path))
    assert other.returncode == 2
    assert "was written with {'format': 1, 'train': 24," in other.stderr
    assert "CC BY-SA 4.0" in (tmp_path / "demo/data/coco/LICENSE.txt").read_text()


MISTAKES = {
    "a missing data root": (
        ["jobs/prepare_shards.py", "--annotations", "/nowhere/a.json", "--images", "/nowhere", "--out", "{tmp}/o"],
        r"'/nowhere",
    ),
    "shards that are not there": (
        [
            "jobs/train_blip.py",
            "--train-shards",
            "/nowhere/t",
            "--val-shards",
            "/nowhere/v",
            "--tokenizer",
            "{tokenizer}",
            "--out",
            "{tmp}/o",
        ],
        r"/nowhere/t",
    ),
    "a folder that is no checkpoint": (
        ["jobs/evaluate.py", "--checkpoint", "{tmp}", "--shards", "{shards}", "--out", "{tmp}/o"],
        r"no checkpoint folder",
    ),
    "an unknown flag": (["jobs/evaluate.py", "--chekpoint", "/x"], r"--chekpoint"),
    "no demo to evaluate": (["jobs/evaluate.py"], r"run make demo"),
    "more workers than CPUs": (
        [
            "jobs/train_blip.py",
            "--train-shards",
            "{shards}",
            "--val-shards",
            "{shards}",
            "--tokenizer",
            "{tokenizer}",
            "--num-workers",
            "12",
            "--global-batch-size",
            "12",
            "--out",
            "{tmp}/o",
        ],
        r"needs 24 CPUs .* has 8",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2_within_seconds(
    ray_cluster: str, demo: Demo, tmp_path: Path, mistake: str
) -> None:
    template, expected = MISTAKES[mistake]
    words = {"tmp": str(tmp_path), "shards": demo.test, "tokenizer": demo.tokenizer}
    begun = time.monotonic()
    result = run([sys.executable, *(word.format(**words) for word in template)], RAYCAP_RUNS=str(tmp_path / "runs"))
    assert time.monotonic() - begun < 30
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert re.search(expected, result.stderr.replace("\n", " ")), result.stderr
    if (
        tmp_path / "o"
    ).exists():  # the output root resolved: the code is also in status.json, and nothing else is there
        assert status(tmp_path / "o")["exit_code"] == 2
        assert [p.name for p in (tmp_path / "o").iterdir()] == ["status.json"]


def test_annotations_without_their_images_are_refused_before_anything_is_written(
    ray_cluster: str, demo: Demo, tmp_path: Path
) -> None:
    images = tmp_path / "images"
    shutil.copytree(f"{demo.coco}/images/test", images)
    removed = sorted(images.iterdir())[:2]
    for path in removed:
        path.unlink()
    annotations = f"{demo.coco}/annotations/captions_test.json"
    out = tmp_path / "out"
    result = run(
        [
            sys.executable,
            "jobs/prepare_shards.py",
            "--annotations",
            annotations,
            "--images",
            str(images),
            "--out",
            str(out),
        ]
    )
    assert result.returncode == 2
    assert removed[0].name in result.stderr
    assert [p.name for p in out.iterdir()] == ["status.json"]


def test_an_address_that_nothing_answers_is_reported_within_seconds(tmp_path: Path) -> None:
    begun = time.monotonic()
    result = run([sys.executable, "jobs/prepare_shards.py", "--out", str(tmp_path / "o")], RAY_ADDRESS="127.0.0.1:9")
    assert time.monotonic() - begun < 15
    assert result.returncode == 2
    assert "no Ray cluster answers at RAY_ADDRESS='127.0.0.1:9'" in result.stderr
    assert status(tmp_path / "o")["exit_code"] == 2


def test_a_job_says_that_it_waits_for_cpus_that_others_use(ray_cluster: str) -> None:
    script = "from raycap import cluster; cluster.connect(num_cpus=2, need='a test'); print(cluster.waits_for())"
    taken = placement_group([{"CPU": 7.5}])
    ray.get(taken.ready())
    try:
        waiting = run([sys.executable, "-c", script])
    finally:
        remove_placement_group(taken)
    assert waiting.stdout.splitlines() == [
        "the job needs 2 CPUs at once (a test), and 0.5 of 8 are free now; it may wait until other work on the Ray cluster ends",
        "free CPUs (0.5 of 8)",
    ], waiting.stderr


def test_a_relative_path_in_a_submitted_job_is_refused_with_a_sentence(ray_cluster: str, demo: Demo) -> None:
    result = run(
        submit("--working-dir", ".", "--", "python", "jobs/prepare_shards.py", *coco(demo, "test"), "--out", "shards")
    )
    assert result.returncode == 1  # ray job submit turns every failure into 1
    assert "relative path 'shards' for --out in a submitted Ray job" in result.stdout + result.stderr
    assert not (ROOT / "shards").exists()


def test_a_local_start_has_enough_logical_cpus_and_leaves_no_token_behind(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    script = (
        "from raycap.cluster import connect; connect(num_cpus=7, need='a test'); import ray, os; "
        "print(ray.cluster_resources()['CPU'], os.environ['RAY_AUTH_MODE'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "RAY_AUTH_MODE"}
    environment |= {"RAY_ADDRESS": "local", "HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True, timeout=90
    )
    assert result.stdout.split() == ["7.0", "token"]
    assert not (tmp_path / "home" / ".ray").exists()
