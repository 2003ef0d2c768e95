"""Training straight from what img2dataset wrote, and from shards with every defect: counted, listed, only read."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Demo, samples_of
from img2dataset_output import BAD, LOST, NOT_FOUND, Tried, key_of, write_parquet, write_tar
from nasty import encode, photo
from training_runs import SIZES, curve, small_run

from raycap import storage
from raycap.captioner import Captioner
from raycap.config import TrainConfig
from raycap.errors import TrainingError
from raycap.report import write_report
from raycap.training.driver import train_captioner
from raycap.training.loop import keys_digest

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
STEPS = 4
SMALL = {"epochs": 1, "eval_every": 4, "warmup_steps": 1}  # beside SIZES: four steps of 12 images
SHARDS = {0: 18, 1: 17, 3: 15}  # samples that img2dataset tried; shard 2 is a gap, and one of 0 and of 1 failed
LOST_AT, BAD_AT = (0, 4), (1, 16)
NOT_DOWNLOADED = {f"failed_to_download: {NOT_FOUND}": 1, "failed_to_resize: image too small": 1}
CUT = key_of(3, 15)  # begins in the last tar and is not whole


def drawn(seed: int) -> bytes:
    return encode(photo(96, 96, seed), "JPEG", quality=90)


def write_folder(root: Path, write: type, demo: Demo) -> set[str]:
    """Three shards with a gap in their numbers, two failed downloads and, where it is a tar, a last one that was cut.

    Returns the keys of its 48 samples.
    """
    captions = [sample.captions[0] for sample in samples_of(demo.train)]
    keys = set()
    for shard, num_tried in SHARDS.items():
        seeds = [shard * 20 + i for i in range(num_tried + 1)]
        tried = [Tried(captions[seed], drawn(seed)) for seed in seeds]
        tried = tried if shard == 3 and write is write_tar else tried[:-1]
        for (its_shard, i), failed in ((LOST_AT, LOST), (BAD_AT, BAD)):
            if shard == its_shard:
                tried[i] = failed
        write(root, shard, tried)
        keys |= {key_of(shard, i) for i in range(num_tried) if (shard, i) not in (LOST_AT, BAD_AT)}
    (root / "00003_stats.json").unlink()  # the run was killed
    if write is write_tar:
        (root / "00003.parquet").unlink()
        cut_in(root / "00003.tar", f"{CUT}.jpg")
    return keys


def cut_in(tar: Path, member: str) -> None:
    """Ends the tar behind the first bytes of this member."""
    with tarfile.open(tar) as opened:
        stop = opened.getmember(member).offset_data + 100
    os.truncate(tar, stop)


def seen_below(root: Path) -> dict[str, tuple[int, int, int]]:
    """name -> size and times of every file and folder."""
    about = {str(path.relative_to(root)): path.stat() for path in (root, *root.rglob("*"))}
    return {name: (found.st_size, found.st_mtime_ns, found.st_ctime_ns) for name, found in about.items()}


def flags(train: Path, val: Path, demo: Demo, out: Path, **changes: object) -> list[str]:
    """The command line of `run_of`."""
    roots = {"train_shards": train, "val_shards": val, "tokenizer": demo.tokenizer, "out": out}
    settings = roots | SIZES | SMALL | changes
    words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "jobs/train_blip.py", *words]


def run_of(train: str, val: str, demo: Demo, out: str) -> TrainConfig:
    """Four steps on two workers: each of the 48 samples once."""
    return replace(small_run(demo, out), train_shards=train, val_shards=val, **SMALL)  # type: ignore[arg-type]


def check_run(out: str, keys: set[str], left_out: dict[str, str]) -> None:
    """Four steps that saw each key once, and a report of what was not used."""
    records = [json.loads(line) for line in storage.read_bytes(f"{out}/metrics.jsonl").decode().splitlines()]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4]
    assert sum(record["batch_digest"] for record in steps) == keys_digest(tuple(keys))
    report = json.loads(storage.read_bytes(f"{out}/train.json"))
    assert (report["num_steps"], report["num_dropped_per_epoch"]) == (STEPS, 0)
    assert (report["left_out_keys"], report["skipped_keys"]) == (left_out, {})
    assert report["not_downloaded"] == NOT_DOWNLOADED
    assert Captioner.load(f"{out}/checkpoint").spec.verified


@pytest.fixture(scope="module")
def folder(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/ and val/ as img2dataset wrote them."""
    root = tmp_path_factory.mktemp("img2dataset")
    write_folder(root / "train", write_tar, demo)
    write_tar(root / "val", 0, [LOST, *(Tried("a cat", drawn(100 + i)) for i in range(6))])
    return root


@pytest.fixture(scope="module")
def from_tars(folder: Path, demo: Demo, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The run on them, finished."""
    out = tmp_path_factory.mktemp("from_tars") / "run"
    config = run_of(f"{folder}/train", f"{folder}/val", demo, str(out))
    before = seen_below(folder)
    train_captioner(config)
    assert seen_below(folder) == before
    return config


def test_four_steps_from_tars_with_a_gap_failures_and_a_cut_end_and_again(
    from_tars: TrainConfig, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = {key_of(shard, i) for shard, n in SHARDS.items() for i in range(n)} - {key_of(*LOST_AT), key_of(*BAD_AT)}
    check_run(from_tars.out, keys, {CUT: "truncated_shard"})
    made = seen_below(Path(from_tars.out, "index"))
    assert {"train/manifest.parquet", "val/manifest.parquet"} <= made.keys()
    before = seen_below(folder)
    train_captioner(from_tars)
    said = capsys.readouterr().out
    assert said.startswith(f"this run is finished ({STEPS} steps)")
    assert "index" not in said
    assert seen_below(Path(from_tars.out, "index")) == made
    assert seen_below(folder) == before


def test_the_same_images_as_parquet_lose_what_those_in_tars_lose(
    from_tars: TrainConfig, folder: Path, demo: Demo, tmp_path: Path
) -> None:
    keys = write_folder(tmp_path / "data", write_parquet, demo)
    before = seen_below(tmp_path / "data")
    config = replace(run_of(f"{tmp_path}/data", f"{folder}/val", demo, f"{tmp_path}/run"), num_workers=1)
    train_captioner(config)
    check_run(config.out, keys, {})
    expected, seen = curve(from_tars.out), curve(config.out)
    assert [(step, digest) for step, digest, _ in seen] == [(step, digest) for step, digest, _ in expected]
    assert [loss for *_, loss in seen] == pytest.approx([loss for *_, loss in expected], abs=1e-5)
    assert seen_below(tmp_path / "data") == before


def test_a_driver_killed_while_it_indexes_goes_on_beside_another_run_on_the_same_folder(
    from_tars: TrainConfig, folder: Path, demo: Demo, tmp_path: Path
) -> None:
    killed, other = tmp_path / "killed", tmp_path / "other"
    command = flags(folder / "train", folder / "val", demo, killed)
    # The last shard has no table: so little is indexed by the driver, one shard after the other.
    table = folder / "train/00003.parquet"
    os.mkfifo(table)  # whoever reads this table waits
    driver = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(done := list(killed.glob("index/train/_index/0*.json"))) < len(SHARDS) - 1:
        assert driver.poll() is None, "the driver ended before it was killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    driver.kill()
    driver.wait()
    table.unlink()
    times = {path: path.stat().st_mtime_ns for path in done}

    before = seen_below(folder)
    longer = flags(folder / "train", folder / "val", demo, other, epochs=2, num_workers=1)
    commands = {killed: command, other: longer}
    runs = {
        out: subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for out, words in commands.items()
    }
    said = {}
    for out, run in runs.items():
        said[out], errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    assert "indexed_shards=3/3 new_rows=15 " in said[killed]
    assert {path: path.stat().st_mtime_ns for path in done} == times
    assert curve(str(killed)) == curve(from_tars.out)
    assert "indexed_shards=3/3 new_rows=48 " in said[other]
    assert [step for step, *_ in curve(str(other))] == list(range(1, 2 * STEPS + 1))
    assert [digest for _, digest, _ in curve(str(other))[:STEPS]] == [d for _, d, _ in curve(from_tars.out)]
    assert seen_below(folder) == before


# ---- defects


def write_members(path: Path, members: list[tuple[bytes, bytes]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def sample(key: bytes, seed: int, caption: str, image: bytes | None = None) -> list[tuple[bytes, bytes]]:
    return [(key + b".jpg", drawn(seed) if image is None else image), (key + b".txt", caption.encode())]


LEFT_OUT = {
    "a05": "no_caption",
    "caf\\xe9": "bad_name",
    "b02": "duplicate_key",
    "a00": "duplicate_key",  # of another shard
    "c16": "truncated_shard",
}


def write_defects(root: Path, demo: Demo) -> None:
    """48 samples, of which the image of a03 is empty, and LEFT_OUT."""
    captions = [sample.captions[0] for sample in samples_of(demo.train)]
    a, b, c = (
        [sample(b"%s%02d" % (letter, i), n * 20 + i, captions[n * 20 + i]) for i in range(num_samples)]
        for n, (letter, num_samples) in enumerate(((b"a", 17), (b"b", 16), (b"c", 17)))
    )
    a[3] = sample(b"a03", 0, captions[0], image=b"")
    a[5] = sample(b"a05", 5, " \t ")
    b += [sample(b"b02", 90, captions[90]), sample(b"a00", 91, captions[91]), sample(b"caf\xe9", 92, captions[92])]
    for name, samples in (("a", a), ("b", b[7:] + b[:7]), ("c", c)):
        write_members(root / f"{name}.tar", [member for one in samples for member in one])
    cut_in(root / "c.tar", "c16.jpg")
    assert len(a) + len(b) + len(c) == 48 + len(LEFT_OUT)


def change_image(tar: Path, member: str) -> None:
    """Other bytes of the same length, where they were."""
    with tarfile.open(tar) as opened:
        at = opened.getmember(member).offset_data + 300
    with tar.open("r+b") as file:
        file.seek(at)
        old = file.read(50)
        file.seek(at)
        file.write(bytes(255 - byte for byte in old))


def test_every_defect_is_refused_above_the_rate_and_listed_by_key_below_it(
    ray_cluster: str, demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = tmp_path / "data", tmp_path / "run"
    write_defects(data, demo)
    before = seen_below(data)
    command = flags(data, Path(demo.val), demo, out, num_workers=1)
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr == (
        f"error: 5 of the 53 samples in '{data}' cannot be used (no_caption: 1, bad_name: 1, duplicate_key: 2, "
        f"truncated_shard: 1; first: {', '.join(LEFT_OUT)}), more than --max-error-rate 0.05; mend the shards or give a "
        f"higher one\n"
    )
    assert sorted(path.name for path in out.iterdir()) == ["index", "status.json"]  # no worker was started
    assert seen_below(data) == before

    change_image(data / "a.tar", "a07.jpg")  # after it was indexed
    before = seen_below(data)
    config = replace(run_of(str(data), demo.val, demo, str(out)), num_workers=1, max_error_rate=0.1)
    train_captioner(config)
    assert seen_below(data) == before
    report = json.loads((out / "train.json").read_text())
    assert report["left_out_keys"] == LEFT_OUT
    assert report["left_out_by_kind"] == Counter(LEFT_OUT.values())
    assert report["skipped_keys"] == {"a03": "empty", "a07": "sample_changed"}
    assert report["skipped_by_kind"] == {"empty": 1, "sample_changed": 1}
    last = capsys.readouterr().out.splitlines()[-1]
    assert "'empty': 1" in last
    assert "'sample_changed': 1" in last
    assert f"left out: {report['left_out_by_kind']}" in last

    page = Path(write_report(str(out))).read_text()
    for key, kind in (LEFT_OUT | report["skipped_keys"]).items():
        assert re.search(rf"{re.escape(key)}\W.{{0,80}}{kind}", page, re.DOTALL), (key, kind)


def test_more_bad_images_than_the_rate_end_the_steps_with_their_keys(
    ray_cluster: str, demo: Demo, tmp_path: Path
) -> None:
    captions = [sample.captions[0] for sample in samples_of(demo.train)]
    data, bad = tmp_path / "data", ("k01", "k02", "k03")
    samples = [sample(b"k%02d" % i, i, captions[i], b"" if f"k{i:02d}" in bad else None) for i in range(48)]
    write_members(data / "0.tar", [member for one in samples for member in one])
    config = replace(run_of(str(data), demo.val, demo, f"{tmp_path}/run"), num_workers=1)
    expected = (
        r"3 of the 48 samples of 1 epochs could not be used by step \d \(empty: 3; first: (.*)\), more than --max-"
    )
    with pytest.raises(TrainingError, match=expected) as error:
        train_captioner(config)
    found = re.search(expected, str(error.value))
    assert found is not None
    assert sorted(found[1].split(", ")) == list(bad)
    assert not Path(config.out, "train.json").exists()
