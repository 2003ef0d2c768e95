"""Ray's own processes killed under a training job with a Ray of its own: a sentence, a true status, and nothing left running."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import Demo
from training_runs import small_run_flags

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.parametrize("victim", ["ray::TrainController", "raylet/raylet"])
def test_a_killed_process_of_ray_ends_a_run_with_one_sentence_and_leaves_none_behind(
    victim: str, demo: Demo, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "jobs/train_blip.py", *small_run_flags(demo, str(out)), "--num-workers", "1"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "RAYCAP_"))}
    with (tmp_path / "stdout").open("w") as stdout, (tmp_path / "stderr").open("w") as stderr:
        job = subprocess.Popen(
            command, cwd=ROOT, env=environment | {"RAY_ADDRESS": "local"}, stdout=stdout, stderr=stderr
        )
        deadline = time.monotonic() + 120
        while not ((out / "metrics.jsonl").exists() and '"step": 5,' in (out / "metrics.jsonl").read_text()):
            assert job.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = psutil.Process(job.pid).children(recursive=True)
        (killed,) = [process for process in started if victim in title(process).split(" --")[0]]
        killed.send_signal(signal.SIGKILL)
        code = job.wait(90)
    assert code == 1
    said = (tmp_path / "stderr").read_text()
    # Ray's own log of a lost node stands beside it.
    (sentence,) = [line for line in said.splitlines() if not re.match(r"\[\d{4}-\d\d-\d\d ", line)]
    assert re.fullmatch(
        r"error: training broke off: The actor is dead because its [a-z ]+; run the same command again", sentence
    ), said
    status = json.loads((out / "status.json").read_text())
    assert status == {
        "job": "train_blip",
        "state": "failed",
        "exit_code": 1,
        "error": sentence.removeprefix("error: "),
    }
    _, left = psutil.wait_procs(started, timeout=20)
    assert not left, [title(process) for process in left]
