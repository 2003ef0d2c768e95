"""raycap/data/index.py on Ray: an img2dataset folder becomes a manifest, after a killed driver too; what cannot is one sentence."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from img2dataset_output import LOST, Tried, key_of, write_parquet, write_tar

from raycap import storage
from raycap.data.index import open_shards
from raycap.errors import StorageError
from raycap.schema import Sample
from raycap.shards import read_manifest, read_run

pytestmark = pytest.mark.ray
NUM_SHARDS = 9
DRIVER = """
import sys, ray
from raycap.data import index
index.IN_DRIVER = 0
ray.init(logging_level="ERROR", log_to_driver=False)
index.open_shards(*sys.argv[1:])
"""


@pytest.fixture(autouse=True)
def _by_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raycap.data.index.IN_DRIVER", 0)


def tried(shard: int) -> list[Tried]:
    return [LOST, *(Tried(f"caption {shard} {i}", b"%d-%d" % (shard, i)) for i in range(1, 3 + shard)), Tried(None)]


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_a_folder_is_indexed_by_tasks_with_lines_of_its_own_only_and_once(
    ray_cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], write: type
) -> None:
    root, lines, connected = tmp_path / "out", [], []
    for shard in range(NUM_SHARDS):
        write(root, shard, tried(shard))
    (root / "00003_stats.json").unlink()

    def open_it() -> object:
        return open_shards(
            str(root), f"{tmp_path}/index", report=lines.append, connect=lambda: connected.append("connected")
        )

    manifest = open_it()
    assert connected == ["connected"]
    rows = sum(2 + shard for shard in range(NUM_SHARDS))
    assert lines[-2].startswith(f"indexed_shards={NUM_SHARDS}/{NUM_SHARDS} new_rows={rows} rows_per_s=")
    assert lines[-1] == (
        f"indexed shards={NUM_SHARDS} rows={rows} skipped={NUM_SHARDS} (no_caption {NUM_SHARDS}) "
        f"not_downloaded={NUM_SHARDS} root='{root}'"
    )
    assert capfd.readouterr() == ("", "")
    lines.clear()
    again = open_it()
    assert (lines, connected) == ([], ["connected"])
    worker = read_manifest(str(root), f"{tmp_path}/index")
    assert manifest.fingerprint == again.fingerprint == worker.fingerprint
    assert read_run(worker, 4, 0, 1) == [
        Sample(key=key_of(4, 1), image=b"4-1", ext="jpg", captions=("caption 4 1",)),
    ]


def test_a_driver_killed_halfway_is_continued_where_it_stopped(ray_cluster: str, tmp_path: Path) -> None:
    root, index = tmp_path / "out", tmp_path / "index"
    for shard in range(NUM_SHARDS):
        write_tar(root, shard, tried(shard))
    whole = open_shards(str(root), f"{tmp_path}/whole", report=lambda _: None)
    table = root / "00004.parquet"
    data = table.read_bytes()
    table.unlink()
    os.mkfifo(table)  # whoever reads this table waits, so the driver cannot get further than all other shards
    command = [sys.executable, "-c", DRIVER, str(root), str(index)]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    deadline = time.monotonic() + 60
    while len(list(index.glob("_index/0*.json"))) < NUM_SHARDS - 1 and time.monotonic() < deadline:
        assert driver.poll() is None
        time.sleep(0.02)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    done = {path: path.stat().st_mtime_ns for path in index.glob("_index/0*.json")}
    assert len(done) == NUM_SHARDS - 1
    assert not (index / "manifest.parquet").exists()

    table.unlink()
    table.write_bytes(data)
    lines: list[str] = []
    manifest = open_shards(str(root), str(index), report=lines.append)
    assert lines[-2].startswith(f"indexed_shards={NUM_SHARDS}/{NUM_SHARDS} new_rows=6 ")
    assert {path: path.stat().st_mtime_ns for path in done} == done  # finished shards were not indexed again
    assert manifest.fingerprint == whole.fingerprint
    assert storage.read_bytes(f"{index}/manifest.parquet") == storage.read_bytes(f"{tmp_path}/whole/manifest.parquet")


def test_a_shard_that_cannot_be_read_ends_the_job_with_one_sentence_and_its_return_completes_it(
    ray_cluster: str, tmp_path: Path
) -> None:
    root, tar = tmp_path / "out", tmp_path / "out" / "00001.tar"
    for shard in range(3):
        write_tar(root, shard, tried(shard))
    data = tar.read_bytes()
    tar.unlink()
    tar.symlink_to(tmp_path / "nowhere")  # the listing still shows it
    with pytest.raises(StorageError) as caught:
        open_shards(str(root), f"{tmp_path}/index", report=lambda _: None)
    assert str(caught.value) == f"cannot read '{tar}': No such file or directory (2); check the path"
    tar.unlink()
    tar.write_bytes(data)
    assert open_shards(str(root), f"{tmp_path}/index", report=lambda _: None).sizes.tolist() == [2, 3, 4]
