"""raycap/bulk on Ray: a whole run with broken files, kills of driver and workers at any moment, two drivers, refusals."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from tiny import png_images, tiny_checkpoint

from raycap import storage
from raycap.bulk import plan, run
from raycap.bulk.caption import caption_bucket
from raycap.bulk.progress import Progress
from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import CaptionBucketConfig
from raycap.errors import RaycapError, StorageError
from raycap.schema import CaptionResult, DecodeSettings, ImageSpec

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
NUM_IMAGES, UNIT_SIZE = 120, 2
BROKEN = {"cut.png": "truncated", "page.jpg": "not_an_image", "empty.gif": "empty"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint, another one, and a folder of images with three broken files and one that is no image."""
    root = tmp_path_factory.mktemp("bulk")
    for seed, name in ((3, "checkpoint"), (4, "other")):
        spec, model, _ = tiny_checkpoint(seed=seed)
        save_checkpoint(f"{root}/{name}", export_weights(model), spec, {"step": 0})
    images = png_images(45)
    for number in range(NUM_IMAGES):
        storage.put(f"{root}/images/{number % 3}/{number:03d}.png", images[number % len(images)])
    for name, data in (("cut.png", images[0][:100]), ("page.jpg", b"<html>"), ("empty.gif", b""), ("x.txt", b"")):
        storage.put(f"{root}/images/{name}", data)
    return root


def config(folder: Path, out: Path, **options: Any) -> CaptionBucketConfig:
    options = {"checkpoint": f"{folder}/checkpoint", "unit_size": UNIT_SIZE, **options}
    return CaptionBucketConfig(images=f"{folder}/images", out=str(out), **options)


def command(folder: Path, out: Path) -> list[str]:
    flags = {"checkpoint": folder / "checkpoint", "images": folder / "images", "out": out, "unit-size": UNIT_SIZE}
    return [sys.executable, "jobs/caption_bucket.py", *(str(w) for k, v in flags.items() for w in (f"--{k}", v))]


def rows_below(out: Path) -> list[dict[str, Any]]:
    names = storage.list_files(f"{out}/data")
    assert all(name.startswith("unit-") and name.endswith(".parquet") for name in names)
    return [row for name in names for row in pq.read_table(f"{out}/data/{name}").to_pylist()]


def without_score(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row | {"score": None, "log_prob": None} for row in rows]


@pytest.fixture(scope="module")
def undisturbed(folder: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The rows of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    summary = caption_bucket(config(folder, out, unit_size=50))
    assert summary["num_images"] == NUM_IMAGES + len(BROKEN)
    return rows_below(out)


def test_a_run_has_one_row_per_image_and_says_what_it_did(
    undisturbed: list[dict[str, Any]], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    summary = caption_bucket(config(folder, out, unit_size=50))
    printed = capfd.readouterr()
    assert "other files below" in printed.out
    assert ".txt 1" in printed.out
    assert "123 images in 3 units; 0 done before, 3 to do" in printed.out
    assert "rows=123/123 images_per_s=" in printed.out
    assert "captioned                  120" in printed.out
    assert "unverified" not in printed.out
    # Ray itself prints one line of its own there for every pool of actors.
    assert [line for line in printed.err.splitlines() if "core_worker.cc" not in line] == []
    rows = rows_below(out)
    assert rows == undisturbed
    names = [name for name in storage.list_files(f"{folder}/images") if name != "x.txt"]
    assert [row["key"] for row in rows] == names
    assert {row["key"]: row["error_kind"] for row in rows if row["error_kind"]} == BROKEN
    expected = Captioner.load(f"{folder}/checkpoint").caption(
        [storage.read_bytes(f"{folder}/images/{n}") for n in names]
    )
    assert [row["caption"] for row in rows] == [result.caption for result in expected]
    assert (summary["num_captioned"], summary["errors"]) == (120, dict.fromkeys(BROKEN.values(), 1))
    assert summary == json.loads((out / "_SUCCESS.json").read_text())
    before = {name: storage.read_bytes(f"{out}/{name}") for name in storage.list_files(str(out))}
    assert caption_bucket(config(folder, out, unit_size=50, concurrency=2, micro_batch_size=5)) == summary
    assert "this run is finished" in capfd.readouterr().out
    assert {name: storage.read_bytes(f"{out}/{name}") for name in storage.list_files(str(out))} == before


def test_another_checkpoint_or_other_settings_are_refused_and_change_nothing(
    undisturbed: list[dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    caption_bucket(config(folder, out, unit_size=50))
    before = {name: storage.read_bytes(f"{out}/{name}") for name in storage.list_files(str(out))}
    for options, difference in (
        ({"checkpoint": f"{folder}/other"}, "checkpoint="),
        ({"max_new_tokens": 5}, "begun with max_new_tokens=12 and this command has max_new_tokens=5;"),
        ({"unit_size": 51}, "begun with unit_size=50 and this command has unit_size=51;"),
        ({"dtype": "bf16"}, "begun with dtype='fp32' and this command has dtype='bf16';"),
        ({"prompt": "a picture of"}, "prompt='' and this command has prompt='a picture of'"),
        ({"suffixes": "png"}, "suffixes='.png'"),
    ):
        with pytest.raises(StorageError, match=rf"^cannot continue the output of .*{difference}"):
            caption_bucket(config(folder, out, **{"unit_size": 50, **options}))
    storage.remove(f"{out}/_SUCCESS.json")
    with pytest.raises(StorageError, match="cannot continue the output of"):
        caption_bucket(config(folder, out, unit_size=51))
    assert before.keys() - storage.list_files(str(out)) == {"_SUCCESS.json"}


def test_a_run_with_units_and_marker_missing_makes_these_alone(
    undisturbed: list[dict[str, Any]], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    caption_bucket(config(folder, out, unit_size=50))
    storage.remove(f"{out}/_SUCCESS.json")
    storage.remove(f"{out}/data/unit-00000001.parquet")
    others = {path: path.stat().st_mtime_ns for path in (out / "data").iterdir()}
    capfd.readouterr()
    caption_bucket(config(folder, out, unit_size=50, dtype="fp32"))
    assert "123 images in 3 units; 2 done before, 1 to do" in capfd.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in others} == others
    assert rows_below(out) == undisturbed


def test_two_drivers_at_once_both_succeed_without_a_duplicate(
    undisturbed: list[dict[str, Any]], ray_cluster: str, folder: Path, tmp_path: Path
) -> None:
    drivers = [
        subprocess.Popen(
            command(folder, tmp_path / "out"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    for driver in drivers:
        printed, errors = driver.communicate(timeout=200)
        assert driver.returncode == 0, errors
        assert "wrote 123 rows" in printed
    assert without_score(rows_below(tmp_path / "out")) == without_score(undisturbed)


# ---- kills


class Dies:
    """A model that kills its process."""

    def caption_prepared(self, pixels: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
        os.kill(os.getpid(), signal.SIGKILL)
        return []


def test_a_unit_that_kills_its_captioner_ends_the_run_with_a_sentence(
    ray_cluster: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "_MAX_RETRIES", 1)
    job = plan.Job(
        images=f"{folder}/images",
        out=str(tmp_path / "out"),
        unit_size=50,
        format="parquet",
        image=ImageSpec(size=32),
        settings=DecodeSettings(),
        checkpoint="x",
        settings_id="x",
        verified=True,
        micro_batch_size=8,
        decode_timeout_s=10.0,
    )
    manifest = plan.create_manifest(job.out, plan.list_images(job.images, job.out, ["*"])[0])
    with pytest.raises(RaycapError, match=r"^captioning into '.*/out' broke off: .*; run the same command again"):
        run.run_units(job, manifest, [0], Dies, Progress(124, 0))


def kill_a_worker(moments: random.Random) -> bool:
    """Kills the captioner or a process that prepares images, whichever is drawn; false if there is none any more."""
    captioners, preparers = [], []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or ())
        if "MapBatches(_CaptionUnit)" in words:
            captioners.append(process)
        elif words.endswith("raycap.decode_child 1073741824 10") and (parent := process.parent()):
            preparers.append(parent)
    drawn = (captioners, preparers) if moments.random() < 0.5 else (preparers, captioners)
    for process in [*drawn[0], *drawn[1]]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            return True
    return False


def wait_for_units(driver: subprocess.Popen[bytes], out: Path, more: int) -> bool:
    """Waits until so many units more are committed; false if the driver ended before."""
    have = len(list(out.glob("data/unit-*")))
    deadline = time.monotonic() + 60
    while len(list(out.glob("data/unit-*"))) < have + more:
        if driver.poll() is not None:
            return False
        assert time.monotonic() < deadline, "no unit is committed any more"
        time.sleep(0.003)
    return True


def test_ten_kills_of_driver_and_workers_leave_every_row_exactly_once(
    undisturbed: list[dict[str, Any]], ray_cluster: str, folder: Path, tmp_path: Path
) -> None:
    out, moments, kills = tmp_path / "out", random.Random(20), {"worker": 0, "driver": 0}
    for attempt in range(9):
        with open(tmp_path / f"{attempt}.log", "wb") as log:
            driver = subprocess.Popen(command(folder, out), cwd=ROOT, stdout=log, stderr=log)
        if sum(kills.values()) >= 10:
            break
        # Each driver lives to see its worker die, and dies itself a moment later, restart or new work under way.
        if wait_for_units(driver, out, moments.randint(1, 3)):
            kills["worker"] += kill_a_worker(moments)
            if moments.random() < 0.5:
                wait_for_units(driver, out, moments.randint(1, 3))
            time.sleep(moments.uniform(0, 0.1))
            if driver.poll() is None and attempt == 0:  # once politely, as `ray job stop` does
                driver.terminate()
                assert driver.wait(60) == 130
                assert "run the same command again to go on" in json.loads((out / "status.json").read_text())["error"]
            elif driver.poll() is None:
                driver.kill()
                kills["driver"] += 1
        driver.wait()
    assert driver.wait(100) == 0, Path(log.name).read_text()
    assert min(kills.values()) >= 5, kills
    rows = rows_below(out)
    assert [row["key"] for row in rows] == [row["key"] for row in undisturbed]
    assert without_score(rows) == without_score(undisturbed)
    assert json.loads((out / "_SUCCESS.json").read_text())["num_images"] == len(rows)
