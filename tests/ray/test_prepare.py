"""raycap/data/prepare.py on Ray: the same bytes twice, after a killed driver too; other data is refused, a lost image named."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raycap import storage
from raycap.data.prepare import prepare_shards
from raycap.errors import StorageError
from raycap.shards import Manifest, read_manifest

pytestmark = pytest.mark.ray
NUM_IMAGES = 60
NUM_SHARDS = 9
DRIVER = """
import sys, ray
from raycap.data.prepare import prepare_shards
ray.init(logging_level="ERROR", log_to_driver=False)
annotations, images, out = sys.argv[1:]
prepare_shards(annotations, images, out, samples_per_shard=7)
"""


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
    assert manifest == read_manifest(f"{coco}/one")
    assert (len(manifest.shards), manifest.num_samples) == (NUM_SHARDS, NUM_IMAGES)
    assert lines[-1].startswith(f"shards={NUM_SHARDS}/{NUM_SHARDS} rows={NUM_IMAGES}/{NUM_IMAGES} images_per_s=")
    prepare(coco, "two")
    assert bytes_below(coco / "one") == bytes_below(coco / "two")
    assert capfd.readouterr() == ("", "")


def test_another_seed_is_refused_and_gives_another_order_elsewhere(ray_cluster: str, coco: Path) -> None:
    first, _ = prepare(coco, "out")
    with pytest.raises(StorageError, match="was begun with seed=0 and this command has seed=1"):
        prepare(coco, "out", seed=1)
    other, _ = prepare(coco, "other", seed=1)
    assert other.fingerprint != first.fingerprint
    assert sorted(k for s in other.shards for k in s.keys) == sorted(k for s in first.shards for k in s.keys)


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
    assert lines[-1].startswith(f"shards={NUM_SHARDS}/{NUM_SHARDS} rows={NUM_IMAGES}/{NUM_IMAGES} ")
    assert bytes_below(coco / "out") == bytes_below(coco / "whole")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # finished shards were not made again
    _, lines = prepare(coco, "out")
    assert lines == [f"finished_before=true shards={NUM_SHARDS} rows={NUM_IMAGES} out='{coco}/out'"]


def test_an_image_that_disappears_ends_the_job_with_one_sentence_and_its_return_completes_it(
    ray_cluster: str, coco: Path
) -> None:
    image = coco / "images" / "a" / "0011.jpg"
    data = image.read_bytes()
    image.unlink()
    image.symlink_to(coco / "nowhere")  # the listing still shows it
    with pytest.raises(StorageError) as caught:
        prepare(coco, "out")
    assert str(caught.value) == f"cannot read '{image}': No such file or directory (2); check the path"
    image.unlink()
    image.write_bytes(data)
    manifest, _ = prepare(coco, "out")
    assert manifest.num_samples == NUM_IMAGES
