"""raycap/data/prepare.py without Ray: which sample goes where, and the same bytes however often the job is killed.

Run as a program, `test_prepare_units.py COCO ROOT`, this file does the killing: a clean process forks the jobs that die,
because pytest's own process may hold Ray's threads.
"""

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raycap import storage
from raycap.data import prepare
from raycap.errors import StorageError, UserError
from raycap.schema import SampleRef
from raycap.shards import read_run

NUM_IMAGES = 10
SAMPLES_PER_SHARD = 4
NUM_COMMITS = 8  # the plan, three tars with their indexes, the manifest


def write_coco(folder: Path, num_images: int = NUM_IMAGES) -> Path:
    """A data set with images in a subfolder, one of them with an odd name; the bytes need not be images to be packed."""
    names = ["a/x.y.jpg", *(f"a/{i:04d}.jpg" for i in range(1, num_images))]
    for i, name in enumerate(names):
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"bytes of {i} ".encode() * 50)
    images = [{"id": i, "file_name": name} for i, name in enumerate(names)]
    captions = [{"id": i, "image_id": i % num_images, "caption": f"caption {i}"} for i in range(2 * num_images)]
    storage.put(f"{folder}/captions.json", json.dumps({"images": images, "annotations": captions}).encode())
    return folder


def in_sequence(pending: dict[str, list[SampleRef]], out: str, add: Callable[[int], None]) -> str | None:
    """Stands in for the Ray job: the same units, one after the other."""
    for name, refs in pending.items():
        prepare.pack_unit(out, name, refs)
        add(len(refs))
    return None


def run(coco: str, out: str, report: Callable[[str], None] = print, **options: Any) -> None:
    options = {"samples_per_shard": SAMPLES_PER_SHARD, **options}
    prepare.prepare_shards(f"{coco}/captions.json", f"{coco}/images", out, report=report, **options)


def bytes_below(root: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_files(root)}


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(prepare, "_run", in_sequence)
    return str(write_coco(tmp_path / "coco"))


def test_every_sample_is_packed_once_with_its_captions(coco: str, tmp_path: Path) -> None:
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append)
    manifest = prepare.read_manifest(f"{tmp_path}/out")
    assert [shard.num_samples for shard in manifest.shards] == [4, 4, 2]
    samples = {s.key: s for shard in manifest.shards for s in read_run(manifest.root, shard, 0, shard.num_samples)}
    assert sorted(samples) == sorted(["a/x.y", *(f"a/{i:04d}" for i in range(1, NUM_IMAGES))])
    assert samples["a/x.y"].captions == ("caption 0", "caption 10")
    assert samples["a/x.y"].image == b"bytes of 0 " * 50
    assert samples["a/0007"].image_id == 7
    assert lines[-1].startswith("shards=3/3 rows=10/10 images_per_s=")


def test_the_order_depends_on_seed_and_keys_alone() -> None:
    refs = [SampleRef(key=f"k{i}", url=f"/x/k{i}.jpg", captions=()) for i in range(100)]
    plan = prepare.plan_shards(refs, 7, seed=1)
    assert list(plan) == [f"shard-{i:05d}" for i in range(15)]
    assert plan == prepare.plan_shards(random.Random(0).sample(refs, 100), 7, seed=1)
    assert plan != prepare.plan_shards(refs, 7, seed=2)
    ordered = [ref.key for unit in plan.values() for ref in unit]
    assert sorted(ordered) == sorted(ref.key for ref in refs)
    # A key that leaves the data set leaves the others in their order.
    without = prepare.plan_shards(refs[1:], 7, seed=1)
    assert [ref.key for unit in without.values() for ref in unit] == [key for key in ordered if key != "k0"]


def test_a_finished_output_is_returned_without_work(coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(coco, f"{tmp_path}/out")
    monkeypatch.setattr(prepare, "_run", None)
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append)
    assert lines == [f"finished_before=true shards=3 rows=10 out='{tmp_path}/out'"]


@pytest.mark.parametrize(
    ("options", "difference"),
    [({"seed": 1}, "seed=0 and this command has seed=1"), ({"samples_per_shard": 5}, "has samples_per_shard=5")],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_seed_or_shard_size_is_refused(
    coco: str, tmp_path: Path, options: dict[str, int], difference: str, finished: bool
) -> None:
    run(coco, f"{tmp_path}/out")
    if not finished:
        storage.remove(f"{tmp_path}/out/manifest.parquet")
    before = bytes_below(f"{tmp_path}/out")
    with pytest.raises(StorageError, match=difference):
        run(coco, f"{tmp_path}/out", **options)
    assert bytes_below(f"{tmp_path}/out") == before


def test_other_captions_and_a_folder_of_other_shards_are_refused(coco: str, tmp_path: Path) -> None:
    run(coco, f"{tmp_path}/out")
    document = storage.read_bytes(f"{coco}/captions.json")
    storage.put(f"{coco}/captions.json", document.replace(b"caption 3", b"another 3"))
    with pytest.raises(StorageError, match=r"was begun with samples_fingerprint="):
        run(coco, f"{tmp_path}/out")
    storage.remove(f"{tmp_path}/out/_index/plan.json")
    with pytest.raises(StorageError, match=r"its manifest\.parquet was made otherwise; choose another --out"):
        run(coco, f"{tmp_path}/out")


def test_an_image_that_disappears_fails_the_unit_with_its_name(tmp_path: Path) -> None:
    url = f"{write_coco(tmp_path)}/images/a/0003.jpg"
    refs = [SampleRef(key="a/0003", url=url, captions=("x",))]
    storage.remove(url)
    with pytest.raises(StorageError, match=r"^cannot read '.*/images/a/0003\.jpg': No such file or directory"):
        prepare.pack_unit(f"{tmp_path}/out", "shard-00000", refs)
    assert not (tmp_path / "out").exists()


def test_an_index_whose_shard_is_gone_is_made_again(coco: str, tmp_path: Path) -> None:
    run(coco, f"{tmp_path}/out")
    whole = bytes_below(f"{tmp_path}/out")
    storage.remove(f"{tmp_path}/out/manifest.parquet")
    storage.remove(f"{tmp_path}/out/shard-00001.tar")
    run(coco, f"{tmp_path}/out")
    assert bytes_below(f"{tmp_path}/out") == whole


def test_a_slow_shard_still_reports_every_few_seconds(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []

    def slow(pending: dict[str, list[SampleRef]], out: str, add: Callable[[int], None]) -> str | None:
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        return in_sequence(pending, out, add)

    monkeypatch.setattr(prepare, "_run", slow)
    monkeypatch.setattr(prepare, "REPORT_S", 0.02)
    run(coco, f"{tmp_path}/out", lines.append)
    assert lines[0].startswith("shards=0/3 rows=0/10 images_per_s=0 eta_s=unknown elapsed_s=")


def test_no_usable_caption_is_a_mistake_of_the_user(coco: str, tmp_path: Path) -> None:
    storage.put(f"{coco}/captions.json", b'{"images": [], "annotations": []}')
    with pytest.raises(UserError):
        run(coco, f"{tmp_path}/out")
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        run(coco, f"{tmp_path}/out", samples_per_shard=0)


# ---- kills


def test_killed_at_every_commit_point_and_at_random_moments_the_job_ends_with_the_same_bytes(tmp_path: Path) -> None:
    coco = str(write_coco(tmp_path / "coco"))
    done = subprocess.run([sys.executable, __file__, coco, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["different"] == []
    assert report["killed"]["at_points"] == 3 * NUM_COMMITS, report
    assert report["killed"]["at_random"] >= 10, report


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(point: int, moment: str) -> None:
    """From now on this process dies at its point-th creation: before it, between bytes and name, or after it."""
    link, count = Path.hardlink_to, 0
    create = storage.put_new

    def dying_link(self: Path, target: Path) -> None:
        if moment == "between" and count == point:
            die()
        link(self, target)

    def dying_create(url: str, data: bytes) -> bool:
        nonlocal count
        if moment == "before" and count == point:
            die()
        created = create(url, data)
        if moment == "after" and count == point:
            die()
        count += 1
        return created

    Path.hardlink_to = dying_link  # type: ignore[method-assign, assignment]
    storage.put_new = dying_create


def forked(prepare_to_die: Callable[[], None], coco: str, out: str, kill_after_s: float | None = None) -> bool:
    """Runs the job in a child process; whether it was killed. The parent never runs it: pyarrow's threads do not fork."""
    pid = os.fork()
    if pid == 0:
        try:
            prepare_to_die()
            run(coco, out, report=silent)
            os._exit(0)
        finally:
            os._exit(1)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(pid, signal.SIGKILL)  # still ours: a child that has ended keeps its id until waitpid
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, out
    return os.WIFSIGNALED(status)


def silent(line: str) -> None:
    pass


def kill_often(coco: str, root: str) -> None:
    """Prints, as JSON, how often the job was killed and the outputs that then ended with other bytes."""
    import pandas  # noqa: F401 (pyarrow wants it; once here, not in each of the hundred children)
    import pyarrow.parquet  # noqa: F401

    prepare._run = in_sequence
    os.fsync = int  # does nothing: it is for a power cut, which is not tested here, and would take most of the time
    start = time.monotonic()
    forked(lambda: None, coco, f"{root}/whole")
    whole_s = time.monotonic() - start
    whole = bytes_below(f"{root}/whole")
    killed = {"at_points": 0, "at_random": 0}
    different = []

    def resume(out: str) -> None:
        forked(lambda: None, coco, out)
        # A second name of a finished file, from a kill between the two names, takes no space.
        leftovers = [path.name for path in Path(out).rglob(".tmp-*") if path.stat().st_nlink == 1]
        if bytes_below(out) != whole or leftovers:
            different.append([out, leftovers])

    for point in range(NUM_COMMITS + 1):
        for moment in ("before", "between", "after"):
            out = f"{root}/{point}-{moment}"
            killed["at_points"] += forked(functools.partial(die_at, point, moment), coco, out)
            resume(out)
    random_ = random.Random(0)
    for attempt in range(60):
        out, kills = f"{root}/random-{attempt}", 0
        while kills < 4 and forked(lambda: None, coco, out, random_.uniform(0, whole_s)):
            kills += 1  # and again where it has resumed
        resume(out)
        killed["at_random"] += kills
        whole_s *= 1 if kills else 0.8  # the machine has become faster than at the first run
        if killed["at_random"] >= 10:
            break
    print(json.dumps({"killed": killed, "different": different}))


if __name__ == "__main__":
    kill_often(*sys.argv[1:])
