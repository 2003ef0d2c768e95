"""raycap/data/prepare.py on Ray: the same bytes twice, after a killed driver and with fewer tasks too; a lost image is counted."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
from conftest import Demo

from raycap import storage
from raycap.data.pack import Packed
from raycap.data.prepare import prepare_shards
from raycap.data.spill import Unit
from raycap.data.tasks import own_errors, run_units
from raycap.errors import CheckpointError, RaycapError, StorageError, TrainingError
from raycap.image import decode_image
from raycap.schema import Sample
from raycap.shards import Manifest, read_manifest, read_run

pytestmark = pytest.mark.ray
NUM_IMAGES = 60
NUM_SHARDS = 9
DRIVER = """
import sys, ray
from raycap.data import prepare
prepare.IN_DRIVER = 0
ray.init(logging_level="ERROR", log_to_driver=False)
annotations, images, out = sys.argv[1:]
prepare.prepare_shards(annotations, images, out, samples_per_shard=7)
"""


@pytest.fixture(autouse=True)
def _by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycap.data.prepare.IN_DRIVER", 0)


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    (tmp_path / "images" / "a").mkdir(parents=True)
    names = [f"a/{i:04d}.jpg" for i in range(NUM_IMAGES)]
    for name in names:
        (tmp_path / "images" / name).write_bytes(name.encode() * 100)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(NUM_IMAGES)]
    (tmp_path / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    return tmp_path


def prepare(coco: Path, out: str, seed: int = 0) -> tuple[Manifest, list[str]]:
    lines: list[str] = []
    manifest = prepare_shards(
        f"{coco}/captions.json", f"{coco}/images", f"{coco}/{out}", samples_per_shard=7, seed=seed, report=lines.append
    )
    return manifest, lines


def bytes_below(root: Path) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{root}/{name}") for name in storage.list_files(str(root))}


def test_the_job_writes_the_same_bytes_twice_and_prints_its_own_lines_only(
    ray_cluster: str, coco: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    manifest, lines = prepare(coco, "one")
    assert manifest.fingerprint == read_manifest(f"{coco}/one").fingerprint
    assert (len(manifest.shards), manifest.num_samples) == (NUM_SHARDS, NUM_IMAGES)
    assert lines[-2].startswith(f"shards={NUM_SHARDS}/{NUM_SHARDS} rows={NUM_IMAGES}/{NUM_IMAGES} images_per_s=")
    assert lines[-1].startswith(f"{coco}/one holds {NUM_IMAGES} images in {NUM_SHARDS} shards; left out: none; ")
    prepare(coco, "two")
    assert bytes_below(coco / "one") == bytes_below(coco / "two")
    assert capfd.readouterr() == ("", "")


def test_another_seed_is_refused_and_gives_another_order_elsewhere(ray_cluster: str, coco: Path) -> None:
    first, _ = prepare(coco, "out")
    with pytest.raises(StorageError, match="was begun with seed=0 and this command has seed=1"):
        prepare(coco, "out", seed=1)
    other, _ = prepare(coco, "other", seed=1)
    assert other.fingerprint != first.fingerprint
    assert keys_of(other) != keys_of(first)
    assert sorted(keys_of(other)) == sorted(keys_of(first))


def test_a_driver_killed_halfway_is_continued_to_the_same_bytes(ray_cluster: str, coco: Path) -> None:
    prepare(coco, "whole")
    image = coco / "images" / "a" / "0011.jpg"
    data = image.read_bytes()
    image.unlink()
    os.mkfifo(image)  # whoever reads this image waits, so the driver cannot get further than all other shards
    command = [sys.executable, "-c", DRIVER, f"{coco}/captions.json", f"{coco}/images", f"{coco}/out"]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    deadline = time.monotonic() + 60
    while len(list(coco.glob("out/_index/shard-*.json"))) < NUM_SHARDS - 1 and time.monotonic() < deadline:
        assert driver.poll() is None
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in coco.glob("out/shard-*.tar")}
    assert len(done) == NUM_SHARDS - 1
    assert not (coco / "out" / "manifest.parquet").exists()

    image.unlink()
    image.write_bytes(data)
    _, lines = prepare(coco, "out")
    assert lines[-2].startswith(f"shards={NUM_SHARDS}/{NUM_SHARDS} rows={NUM_IMAGES}/{NUM_IMAGES} ")
    assert bytes_below(coco / "out") == bytes_below(coco / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # finished shards were not made again
    _, lines = prepare(coco, "out")
    assert lines[0] == f"finished_before=true shards={NUM_SHARDS} rows={NUM_IMAGES} out='{coco}/out'"


def test_one_task_at_a_time_makes_the_same_bytes(ray_cluster: str, coco: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(coco, "many")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 0.5})
    prepare(coco, "few")
    assert bytes_below(coco / "many") == bytes_below(coco / "few")


def test_images_that_are_lost_are_counted_and_a_run_with_too_many_of_them_ends_with_one_sentence(
    ray_cluster: str, coco: Path
) -> None:
    for i in (11, 12, 13):
        image = coco / "images" / "a" / f"{i:04d}.jpg"
        image.unlink()
        image.symlink_to(coco / "nowhere")  # the listing still shows it
    manifest, lines = prepare(coco, "out")  # 3 of 60 are the 5 % that may be
    assert manifest.num_samples == NUM_IMAGES - 3
    assert sorted(manifest.skipped) == [(f"a/00{i}", "unreadable") for i in (11, 12, 13)]
    assert "; left out: unreadable 3; " in lines[-1]
    (coco / "images" / "a" / "0014.jpg").write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        prepare(coco, "other")
    assert str(caught.value).startswith("4 of 60 samples cannot be packed into ")
    assert "unreadable 3, empty 1" in str(caught.value)


def test_a_failing_storage_and_a_dying_task_end_the_job_with_one_sentence(ray_cluster: str, coco: Path) -> None:
    (coco / "out").mkdir()
    (coco / "out" / "shard-00003.tar").write_bytes(b"of another run")
    with pytest.raises(StorageError, match=r"^cannot commit unit 'shard-00003\.tar': .* holds another run's"):
        prepare(coco, "out")

    units = iter([Unit("shard-00000", (), frozenset())])
    with pytest.raises(RaycapError, match=r"^packing shards broke off: .*; run the same command again$"):
        run_units(units, exit_process, print, "packing shards")


def exit_process(unit: Unit) -> Packed:
    os._exit(1)


@pytest.mark.parametrize(
    "error", [TrainingError("it diverged"), CheckpointError("it is damaged"), RaycapError("it broke")]
)
def test_an_error_comes_out_of_rays_tasks_with_its_class_and_so_with_its_exit_code(
    ray_cluster: str, error: RaycapError
) -> None:
    def fail(unit: object) -> Any:
        raise error

    with pytest.raises(type(error)) as of_task:
        run_units(iter([1]), fail, print, "packing shards")
    with pytest.raises(type(error)) as of_data, own_errors("captioning"):
        ray.data.range(1).map_batches(fail).materialize()
    for caught in (of_task.value, of_data.value):
        assert type(caught) is type(error)
        assert (str(caught), caught.exit_code) == (str(error), error.exit_code)


def test_shards_that_exist_are_packed_again_with_smaller_images(ray_cluster: str, demo: Demo, tmp_path: Path) -> None:
    shards = tmp_path / "source"
    shards.mkdir()
    for tar in Path(demo.train).glob("*.tar"):
        (shards / tar.name).symlink_to(tar)  # without the manifest, as img2dataset leaves its own
    lines: list[str] = []
    manifest = prepare_shards(
        "",
        str(shards),
        f"{tmp_path}/out",
        format="img2dataset",
        samples_per_shard=25,
        max_side=32,
        report=lines.append,
    )
    assert manifest.sizes.tolist() == [25, 15, 25, 15, 16]
    assert keys_of(manifest) == keys_of(read_manifest(demo.train))
    (sample,) = read_run(manifest, 0, 0, 1)
    assert isinstance(sample, Sample)
    assert decode_image(sample.image).shape == (32, 32, 3)
    assert lines[-1].startswith(f"{tmp_path}/out holds 96 images in 5 shards; left out: none; ")


def keys_of(manifest: Manifest) -> list[str]:
    runs = [read_run(manifest, i, 0, int(size)) for i, size in enumerate(manifest.sizes)]
    return [sample.key for samples in runs for sample in samples if isinstance(sample, Sample)]
