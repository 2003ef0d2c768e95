"""raycap/data/prepare.py without Ray: which sample goes where, and the same bytes however often the job is killed.

Run as a program, `test_prepare_units.py COCO ROOT`, this file does the killing: a clean process forks the jobs that die,
because pytest's own process may hold Ray's threads.
"""

import functools
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, JpegImagePlugin

from raycap import storage
from raycap.config import PrepareConfig
from raycap.data import index, prepare, spill
from raycap.data.pack import Packed, Shrink, pack_unit, shrink_image
from raycap.data.spill import SortedRefs, Unit
from raycap.data.ticker import pace
from raycap.errors import ErrorKind, ImageError, StorageError, UserError
from raycap.schema import Sample, SampleRef
from raycap.shards import pack_shard, read_run, write_manifest
from raycap.storage import local

NUM_IMAGES = 10
SAMPLES_PER_SHARD = 4
NUM_COMMITS = 10  # the plan, three tars with their indexes, the report, the README, the manifest


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


def in_sequence(units: Iterator[Any], work: Callable[[Any], Any], add: Callable[[Any], None], doing: str) -> None:
    """Stands in for Ray: the same units, one after the other."""
    for unit in units:
        add(work(unit))


def run(coco: str, out: str, report: Callable[[str], None] = print, **options: Any) -> None:
    options = {"samples_per_shard": SAMPLES_PER_SHARD, **options}
    prepare.prepare_shards(f"{coco}/captions.json", f"{coco}/images", out, report=report, **options)


def bytes_below(root: str) -> dict[str, bytes]:
    return {name: storage.read_bytes(storage.join(root, name)) for name in storage.list_files(root)}


def samples_of(out: str) -> dict[str, Sample]:
    manifest = prepare.read_manifest(out)
    runs = [read_run(manifest, i, 0, int(size)) for i, size in enumerate(manifest.sizes)]
    return {sample.key: sample for samples in runs for sample in samples if isinstance(sample, Sample)}


def facts_of(out: str) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads(storage.read_bytes(f"{out}/report.json"))
    return facts


@pytest.fixture
def coco(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(prepare, "IN_DRIVER", 0)
    monkeypatch.setattr(prepare, "run_units", in_sequence)
    return str(write_coco(tmp_path / "coco"))


def test_every_sample_is_packed_once_with_its_captions(coco: str, tmp_path: Path) -> None:
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append)
    assert prepare.read_manifest(f"{tmp_path}/out").sizes.tolist() == [4, 4, 2]
    samples = samples_of(f"{tmp_path}/out")
    assert sorted(samples) == sorted(["a/x.y", *(f"a/{i:04d}" for i in range(1, NUM_IMAGES))])
    assert samples["a/x.y"].captions == ("caption 0", "caption 10")
    assert samples["a/x.y"].image == b"bytes of 0 " * 50
    assert samples["a/0007"].image_id == 7
    assert lines[-2].startswith("shards=3/3 rows=10/10 images_per_s=")
    assert lines[-1] == (
        f"{tmp_path}/out holds 10 images in 3 shards; left out: none; skipped in the annotations: none; exact duplicates: 0; "
        f"keys in {tmp_path}/out/report.json"
    )
    assert facts_of(f"{tmp_path}/out") == {
        "samples": 10,
        "packed": 10,
        "shards": 3,
        "skipped": {},
        "skipped_keys": [],
        "reader": {"skipped": {}, "first_keys": []},
        "duplicate_images": 0,
        "duplicate_groups": [],
    }


def test_the_order_of_the_annotations_does_not_matter(coco: str, tmp_path: Path) -> None:
    run(coco, f"{tmp_path}/one")
    document = json.loads(storage.read_bytes(f"{coco}/captions.json"))
    for entries in document.values():
        random.Random(1).shuffle(entries)
    storage.put(f"{coco}/captions.json", json.dumps(document).encode())
    run(coco, f"{tmp_path}/two")
    assert bytes_below(f"{tmp_path}/one") == bytes_below(f"{tmp_path}/two")


def test_a_finished_output_is_returned_without_work(coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[str] = []
    run(coco, f"{tmp_path}/out", before.append)
    monkeypatch.setattr(prepare, "run_units", None)
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append)
    assert lines == [f"finished_before=true shards=3 rows=10 out='{tmp_path}/out'", before[-1]]


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"seed": 1}, "seed=0 and this command has seed=1"),
        ({"samples_per_shard": 5}, "has samples_per_shard=5"),
        ({"max_side": 64}, "with max_side=0, quality=None and this command has max_side=64, quality=95"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_seed_or_shard_or_image_size_is_refused(
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

    def slow(*args: Any) -> None:
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        in_sequence(*args)

    monkeypatch.setattr(prepare, "run_units", slow)
    monkeypatch.setattr(prepare, "REPORT_S", 0.02)
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    run(coco, f"{tmp_path}/out", lines.append)
    assert lines[0].startswith("shards=0/3 rows=0/10 images_per_s=0 eta_s=unknown elapsed_s=")
    assert lines[0].endswith(" waiting_for='Ray to start'")
    assert "waiting_for" not in lines[-1]


def test_a_small_data_set_is_packed_without_ray_to_the_same_bytes(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connected: list[bool] = []
    connect = functools.partial(connected.append, True)
    run(coco, f"{tmp_path}/with", connect=connect)
    assert connected
    monkeypatch.setattr(prepare, "run_units", None)
    monkeypatch.setattr(prepare, "IN_DRIVER", NUM_IMAGES)
    connected.clear()
    run(coco, f"{tmp_path}/without", connect=connect)
    assert not connected
    assert bytes_below(f"{tmp_path}/without") == bytes_below(f"{tmp_path}/with")


def test_a_small_folder_of_shards_is_indexed_without_ray_to_the_same_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_img2dataset(source)
    monkeypatch.setattr(index, "run_units", in_sequence)
    connected: list[bool] = []
    for out, most in (("with", 0), ("without", index.IN_DRIVER)):
        connected.clear()
        monkeypatch.setattr(index, "IN_DRIVER", most)
        index.open_shards(str(source), f"{tmp_path}/{out}", connect=functools.partial(connected.append, True))
        assert bool(connected) == (out == "with")
    assert bytes_below(f"{tmp_path}/without") == bytes_below(f"{tmp_path}/with")


def test_a_ray_that_does_not_start_leaves_nothing_in_the_output(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise UserError("cannot start Ray")

    with pytest.raises(UserError, match="cannot start Ray"):
        run(coco, f"{tmp_path}/out", connect=refuse)
    assert not (tmp_path / "out").exists()
    write_img2dataset(tmp_path / "source")
    monkeypatch.setattr(index, "IN_DRIVER", 0)
    with pytest.raises(UserError, match="cannot start Ray"):
        index.open_shards(str(tmp_path / "source"), f"{tmp_path}/index", connect=refuse)
    assert not (tmp_path / "index").exists()


def test_the_pace_tells_the_time_that_is_left_once_something_is_done() -> None:
    assert pace(30, 60, 10.4) == (30 / 10.4, "eta_s=21 elapsed_s=10")
    assert pace(0, 60, 10.0) == (0.0, "eta_s=unknown elapsed_s=10")
    assert pace(0, 60, 0.0) == (0.0, "eta_s=unknown elapsed_s=0")


def test_no_usable_caption_is_a_mistake_of_the_user(coco: str, tmp_path: Path) -> None:
    storage.put(f"{coco}/captions.json", b'{"images": [], "annotations": []}')
    with pytest.raises(UserError):
        run(coco, f"{tmp_path}/out")
    with pytest.raises(ValueError, match="samples_per_shard is 0"):
        run(coco, f"{tmp_path}/out", samples_per_shard=0)


# ---- the order


def units_of(refs: list[SampleRef], samples_per_shard: int, seed: int) -> list[Unit]:
    with SortedRefs(iter(refs), seed) as ordered:
        units = list(ordered.units(samples_per_shard))
        assert ordered.sizes(samples_per_shard) == {unit.name: len(unit.refs) for unit in units}
        assert list(ordered.units(samples_per_shard)) == units  # it may be read again
        return units


def keys_of(units: list[Unit]) -> list[str]:
    return [ref.key for unit in units for ref in unit.refs]


@pytest.mark.parametrize("spool_bytes", [100, 256 * 1024])
def test_the_order_depends_on_seed_and_keys_alone(monkeypatch: pytest.MonkeyPatch, spool_bytes: int) -> None:
    monkeypatch.setattr(spill, "_SPOOL_BYTES", spool_bytes)
    refs = [SampleRef(key=f"k{i}", url=f"/x/k{i}.jpg", captions=(f"c{i}",), image_id=i) for i in range(600)]
    units = units_of(refs, 7, seed=1)
    assert [unit.name for unit in units] == [f"shard-{i:05d}" for i in range(86)]
    assert units == units_of(random.Random(0).sample(refs, 600), 7, seed=1)
    assert keys_of(units) != keys_of(units_of(refs, 7, seed=2))
    assert sorted((ref for unit in units for ref in unit.refs), key=lambda r: r.key) == sorted(
        refs, key=lambda r: r.key
    )
    assert not any(unit.repeated for unit in units)
    # It is the order of the hashes, and a key that leaves the data set leaves the others in theirs.
    assert keys_of(units) == sorted((ref.key for ref in refs), key=lambda key: spill.place(1, key))
    assert keys_of(units_of(refs[1:], 7, seed=1)) == [key for key in keys_of(units) if key != "k0"]


def test_the_fingerprint_is_that_of_all_samples_in_no_order() -> None:
    refs = [SampleRef(key=f"k{i}", url="/x", captions=("a", "b")) for i in range(20)]
    first = SortedRefs(refs, 0).fingerprint
    assert len(first) == 64
    assert SortedRefs(reversed(refs), 0).fingerprint == first
    others = [
        refs[1:],
        [*refs, refs[0]],
        [*refs[1:], SampleRef(key="k0", url="/x", captions=("b", "a"))],
        [*refs[1:], SampleRef(key="k0", url="/x", captions=("a", "b"), image_id=0)],
    ]
    assert len({first, *(SortedRefs(other, 0).fingerprint for other in others)}) == 5


def test_of_samples_with_one_key_the_first_is_the_same_in_any_order() -> None:
    refs = [SampleRef(key=f"k{i % 5}", url=f"/x/{i}", captions=("a",)) for i in range(15)]
    units = units_of(refs, 2, seed=0)
    assert units == units_of(refs[::-1], 2, seed=0)
    first = [ref.url for unit in units for i, ref in enumerate(unit.refs) if i not in unit.repeated]
    assert sorted(first) == ["/x/0", "/x/1", "/x/12", "/x/13", "/x/14"]  # in the order of their bytes
    assert sum(len(unit.repeated) for unit in units) == 10


def test_sorting_holds_a_small_part_of_the_samples_in_memory() -> None:
    def peak(num_samples: int) -> int:
        refs = (SampleRef(key=f"{i:06d}", url="/x", captions=("c" * 1000,)) for i in range(num_samples))
        tracemalloc.start()
        try:
            with SortedRefs(refs, 0) as ordered:
                assert sum(len(unit.refs) for unit in ordered.units(10)) == num_samples
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)
    before = spill._SPOOL_BYTES
    spill._SPOOL_BYTES = 2000
    try:
        small, large = peak(1000), peak(8000)
    finally:
        spill._SPOOL_BYTES = before
    assert (large - small) / 7000 < 100  # of 1100 bytes each on disk; one file of 128 is in memory, and its rows


def test_a_full_disk_for_temporary_files_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spill, "_SPOOL_BYTES", 10)
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")
    with pytest.raises(StorageError, match=r"cannot sort the samples in '/nowhere': No such file .*; set TMPDIR"):
        SortedRefs([SampleRef(key="k", url="/x", captions=("a",))], 0)


# ---- what is left out


def jpeg(width: int, height: int, seed: int = 0, **options: Any) -> bytes:
    image = Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(3 * width * height))
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "JPEG"), **options)
    return buffer.getvalue()


def test_what_cannot_be_packed_is_counted_listed_and_not_fatal_below_the_rate(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = Path(coco) / "images"
    document = json.loads(storage.read_bytes(f"{coco}/captions.json"))
    document["images"].append({"id": 100, "file_name": "a/0009.jpg"})  # a second time
    document["images"].append({"id": 101, "file_name": os.fsdecode(b"caf\xe9.jpg")})
    document["images"].append({"id": 102, "file_name": "silent.jpg"})
    document["annotations"] += [{"image_id": i, "caption": " " if i == 102 else "c"} for i in (100, 101, 102)]
    (images / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"x")
    storage.put(f"{coco}/captions.json", json.dumps(document).encode())
    (images / "a/0001.jpg").write_bytes(b"")
    (images / "a/0002.jpg").unlink()
    (images / "a/0002.jpg").symlink_to(images / "nowhere")  # a listing shows it
    (images / "a/0003.jpg").unlink()
    (images / "a/0003.jpg").mkdir()
    (images / "a/0003.jpg" / "x").touch()
    monkeypatch.setattr(storage, "iter_names", lambda _: [e["file_name"] for e in document["images"]])
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append, max_error_rate=0.45)
    assert sorted(samples_of(f"{tmp_path}/out")) == ["a/0004", *(f"a/000{i}" for i in range(5, 10)), "a/x.y"]
    facts = facts_of(f"{tmp_path}/out")
    assert facts["skipped_keys"] == [
        ["a/0001", "empty"],
        ["a/0002", "unreadable"],
        ["a/0003", "unreadable"],
        ["a/0009", "duplicate_key"],
        ["caf\\udce9", "bad_name"],
    ]
    assert facts["skipped"] == {"empty": 1, "unreadable": 2, "duplicate_key": 1, "bad_name": 1}
    assert facts["reader"]["skipped"] == {"annotation without caption": 1, "image without captions": 1}
    assert ["silent", "image without captions"] in facts["reader"]["first_keys"]
    assert (facts["samples"], facts["packed"]) == (12, 7)
    assert "left out: unreadable 2, bad_name 1, duplicate_key 1, empty 1; skipped in the annotations:" in lines[-1]
    assert "image without captions: 1" in lines[-1]
    assert sorted(prepare.read_manifest(f"{tmp_path}/out").skipped) == [tuple(e) for e in facts["skipped_keys"]]
    run(coco, f"{tmp_path}/again", max_error_rate=0.45)
    assert bytes_below(f"{tmp_path}/out") == bytes_below(f"{tmp_path}/again")


def test_above_the_rate_the_job_fails_with_counts_and_keys_and_is_not_sealed(coco: str, tmp_path: Path) -> None:
    for i in (1, 2):
        storage.put(f"{coco}/images/a/{i:04d}.jpg", b"")
    for _ in range(2):  # the second time all shards are there
        with pytest.raises(StorageError) as caught:
            run(coco, f"{tmp_path}/out", max_error_rate=0.1)
        assert "2 of 10 samples cannot be packed" in str(caught.value)
        assert "more than --max-error-rate 0.1: empty 2 (such as 'a/0001' empty, 'a/0002' empty)" in str(caught.value)
    assert not storage.exists(f"{tmp_path}/out/manifest.parquet")
    run(coco, f"{tmp_path}/out", max_error_rate=0.2)
    assert len(samples_of(f"{tmp_path}/out")) == 8


def test_a_shard_of_which_nothing_is_left_has_no_file_and_its_keys_are_in_the_manifest(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def in_sequence_noted(units: Iterator[Unit], pack: Any, add: Callable[[Packed], None], doing: str) -> None:
        for unit in units:
            made.append(unit.name)
            add(pack(unit))

    monkeypatch.setattr(prepare, "run_units", in_sequence_noted)
    run(coco, f"{tmp_path}/whole")
    manifest = prepare.read_manifest(f"{tmp_path}/whole")
    for number in (0, 2):  # the first and the last
        emptied = [s.key for s in read_run(manifest, number, 0, int(manifest.sizes[number])) if isinstance(s, Sample)]
        for key in emptied:
            storage.put(f"{coco}/images/{key}.jpg", b"")
        out = f"{tmp_path}/out-{number}"
        run(coco, out, max_error_rate=0.9)
        assert not storage.exists(f"{out}/shard-{number:05d}.tar")
        assert f"shard-{number:05d}.tar" not in prepare.read_manifest(out).shards
        assert {key for key, _ in prepare.read_manifest(out).skipped} >= set(emptied)
        whole = bytes_below(out)
        storage.remove(f"{out}/manifest.parquet")
        storage.remove(f"{out}/shard-00001.tar")
        made.clear()
        run(coco, out, max_error_rate=0.9)  # the index without tar is no unfinished shard
        assert made == ["shard-00001"]
        assert bytes_below(out) == whole
    for key in samples_of(f"{tmp_path}/whole"):
        storage.put(f"{coco}/images/{key}.jpg", b"")
    with pytest.raises(StorageError, match=r"10 of 10 samples cannot be packed"):
        run(coco, f"{tmp_path}/none", max_error_rate=0.9)


def test_a_storage_that_fails_is_not_taken_for_bad_images(
    coco: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = storage.read_bytes

    def stale(url: str) -> bytes:
        if url.endswith("0003.jpg"):
            with local.errors("read", url):
                raise OSError(116, "Stale file handle")
        return read(url)

    monkeypatch.setattr(storage, "read_bytes", stale)
    with pytest.raises(StorageError, match=r"^cannot read '.*/images/a/0003\.jpg': Stale file handle"):
        run(coco, f"{tmp_path}/out", max_error_rate=0.9)


def test_exact_duplicates_are_counted_and_named_and_stay(coco: str, tmp_path: Path) -> None:
    for i in (2, 5, 9):
        storage.put(f"{coco}/images/a/{i:04d}.jpg", b"the same")
    for i in (3, 4):
        storage.put(f"{coco}/images/a/{i:04d}.jpg", b"the other")
    lines: list[str] = []
    run(coco, f"{tmp_path}/out", lines.append)
    facts = facts_of(f"{tmp_path}/out")
    assert facts["duplicate_images"] == 3
    assert facts["duplicate_groups"] == [["a/0002", "a/0005", "a/0009"], ["a/0003", "a/0004"]]
    assert len(samples_of(f"{tmp_path}/out")) == 10
    assert "; exact duplicates: 3; " in lines[-1]


def test_an_image_without_suffix_is_named_by_its_content(tmp_path: Path) -> None:
    (tmp_path / "7_1").write_bytes(jpeg(20, 10, format="PNG"))
    (tmp_path / "8_1").write_bytes(b"no image")
    refs = tuple(SampleRef(key=name, url=f"{tmp_path}/{name}", captions=("x",)) for name in ("7_1", "8_1"))
    packed = pack_unit(f"{tmp_path}/out", Unit("shard-00000", refs, frozenset()))
    assert packed == Packed(1, (("8_1", "bad_name"),))
    assert b"7_1.png\0" in storage.read_bytes(f"{tmp_path}/out/shard-00000.tar")


# ---- smaller images


def test_larger_images_are_resized_and_others_keep_their_bytes(coco: str, tmp_path: Path) -> None:
    names = ["a/x.y", *(f"a/{i:04d}" for i in range(1, NUM_IMAGES))]
    sizes = [(200, 100), (100, 200), (64, 64), (64, 20), (65, 64), (10, 9), (300, 40), (64, 65), (30, 30), (90, 60)]
    images = {name: jpeg(*size, seed=i) for i, (name, size) in enumerate(zip(names, sizes, strict=True))}
    images["a/0009"] = jpeg(90, 60, format="PNG")
    for name, data in images.items():
        storage.put(f"{coco}/images/{name}.jpg", data)
    storage.put(f"{coco}/images/a/0008.jpg", images["a/0008"][:300])  # cut off
    run(coco, f"{tmp_path}/out", max_side=64, max_error_rate=0.1)
    samples = samples_of(f"{tmp_path}/out")
    opened = {name: Image.open(io.BytesIO(sample.image)) for name, sample in samples.items()}
    expected = [(64, 32), (32, 64), (64, 64), (64, 20), (64, 63), (10, 9), (64, 9), (63, 64), None, (64, 43)]
    assert [opened[name].size if name in opened else None for name in names] == expected
    kept = [name for name in names if name in samples and samples[name].image == images[name]]
    assert kept == ["a/0002", "a/0003", "a/0005"]
    assert opened["a/0009"].format == "JPEG"
    assert samples["a/0009"].ext == "jpg"
    assert facts_of(f"{tmp_path}/out")["skipped_keys"] == [["a/0008", "truncated"]]
    run(coco, f"{tmp_path}/again", max_side=64, max_error_rate=0.1)
    assert bytes_below(f"{tmp_path}/out") == bytes_below(f"{tmp_path}/again")


def test_a_resized_image_is_upright_and_the_quality_is_as_asked() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = jpeg(200, 100, exif=exif)
    small = shrink_image(data, Shrink(64, 95))
    assert small is not None
    with Image.open(io.BytesIO(small)) as image:
        assert image.size == (32, 64)
        assert not image.getexif()
        assert JpegImagePlugin.get_sampling(image) == 2  # 4:2:0
    assert small == shrink_image(data, Shrink(64, 95))
    smaller = shrink_image(data, Shrink(64, 50))
    assert smaller is not None
    assert len(smaller) < 0.7 * len(small)


def test_an_image_that_is_no_image_is_refused_even_where_nothing_is_resized() -> None:
    with pytest.raises(ImageError) as caught:
        shrink_image(b"no image", Shrink(64, 95))
    assert caught.value.kind is ErrorKind.NOT_AN_IMAGE
    assert shrink_image(jpeg(64, 64), Shrink(64, 95)) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"annotations": "/a", "images": ""}, "--annotations and --images go together"),
        ({"images": "/i"}, "--annotations and --images go together"),
        ({"format": "img2dataset"}, "--format img2dataset takes --images, the folder that img2dataset wrote, and no"),
        ({"format": "img2dataset", "images": "/i", "annotations": "/a"}, "--format img2dataset takes --images"),
        (
            {"format": "img2dataset", "images": "/i", "out": "/o", "seed": 1},
            "--seed 1 has no meaning with --format img2",
        ),
        ({"format": "img2dataset", "images": "/i"}, "--images needs an --out of its own"),
        ({"annotations": "/a", "images": "/i"}, "--images needs an --out of its own"),
        ({"max_side": 31}, "--max-side must be 0 or at least 32 pixels, got 31"),
        ({"max_side": 64, "quality": 96}, r"--quality must be in \[1, 95\], got 96"),
        ({"quality": 90}, "--quality is for images that are resized; give --max-side too"),
        ({"max_error_rate": 1.0}, r"--max-error-rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        PrepareConfig(**{"out": "/o", **flags} if "its own" not in says else flags)


# ---- img2dataset's output


def write_tar(path: Path, keys: list[str], captions: dict[str, str], cut: str = "") -> None:
    """As img2dataset writes it: .jpg, .json and .txt of each sample. cut: the member that the file ends in."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for key in keys:
            caption = captions.get(key, f"caption of {key}")
            facts = {"caption": caption, "key": key, "status": "success", "sha256": "0"}
            members = {"jpg": jpeg(80, 40, seed=int(key)), "json": json.dumps(facts).encode(), "txt": caption.encode()}
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    data = buffer.getvalue()
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        path.write_bytes(data[: tar.getmember(cut).offset_data + 10] if cut else data)


def write_img2dataset(root: Path) -> None:
    """Two tars with a gap between their numbers: a caption of spaces, a key of the first again, and a second one that is cut;
    beside the first the table of what was tried."""
    first = [f"00000000{i}" for i in range(7)]
    write_tar(root / "00000.tar", first, {"000000003": "  "})
    table = {"key": first, "status": ["success"] * 7, "error_message": [None] * 7}
    for column, failed in (("key", "000000007"), ("status", "failed_to_download"), ("error_message", "HTTP Error 404")):
        table[column].append(failed)
    pq.write_table(pa.table(table), root / "00000.parquet")
    (root / "00000_stats.json").write_text("{}")
    write_tar(root / "00002.tar", ["000000004", "000020000", "000020001", "000020002"], {}, cut="000020002.jpg")


def run_again(source: Path, out: Path, report: Callable[[str], None] = print, **options: Any) -> None:
    options = {"samples_per_shard": SAMPLES_PER_SHARD, "max_error_rate": 0.5, **options}
    prepare.prepare_shards("", str(source), str(out), format="img2dataset", report=report, **options)


def test_shards_of_img2dataset_are_packed_again_in_order_with_smaller_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    write_img2dataset(source)
    before = bytes_below(str(source))
    lines: list[str] = []
    run_again(source, tmp_path / "out", lines.append, max_side=64)
    out = str(tmp_path / "out")
    assert bytes_below(str(source)) == before
    manifest = prepare.read_manifest(out)
    samples = samples_of(out)
    assert list(samples) == [*(f"00000000{i}" for i in (0, 1, 2, 4, 5, 6)), "000020000", "000020001"]
    assert manifest.sizes.tolist() == [4, 2, 2]
    assert samples["000000005"].captions == ("caption of 000000005",)
    with Image.open(io.BytesIO(samples["000000005"].image)) as image:
        assert image.size == (64, 32)
    facts = facts_of(out)
    assert facts["skipped_keys"] == [
        ["000000003", "no_caption"],
        ["000000004", "duplicate_key"],
        ["000020002", "truncated_shard"],
    ]
    assert sorted(manifest.skipped) == [tuple(entry) for entry in facts["skipped_keys"]]
    assert facts["reader"]["skipped"] == {"failed_to_download: HTTP Error 404": 1}
    assert facts["samples"] == facts["packed"] + 3
    assert (
        "left out: duplicate_key 1, no_caption 1, truncated_shard 1; skipped in the annotations: failed_to_"
        in lines[-1]
    )
    run_again(source, tmp_path / "again", max_side=64)
    mine, again = bytes_below(out), bytes_below(f"{tmp_path}/again")
    assert mine == again

    monkeypatch.setattr(prepare, "run_units", None)
    lines.clear()
    run_again(source, tmp_path / "out", lines.append, max_side=64)
    assert lines[0].startswith("finished_before=true")
    with pytest.raises(StorageError, match="was begun with max_side=64"):
        run_again(source, tmp_path / "out")
    with pytest.raises(StorageError, match=r"3 of .* samples cannot be packed into"):
        run_again(source, tmp_path / "strict", max_error_rate=0.05)


def test_images_that_cannot_be_decoded_are_left_out_of_repacked_shards_only_if_images_are_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = str(tmp_path / "source")
    data, shard = pack_shard(
        "a.tar",
        [Sample(key=str(i), image=b"no image" if i == 1 else jpeg(9, 9), ext="jpg", captions=("c",)) for i in range(3)],
    )
    storage.put(f"{source}/a.tar", data)
    write_manifest(source, [shard])
    run_again(Path(source), tmp_path / "as-they-are")
    assert list(samples_of(f"{tmp_path}/as-they-are")) == ["0", "1", "2"]
    assert facts_of(f"{tmp_path}/as-they-are")["duplicate_groups"] == [["0", "2"]]
    run_again(Path(source), tmp_path / "resized", max_side=64)
    assert facts_of(f"{tmp_path}/resized")["skipped_keys"] == [["1", "not_an_image"]]


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

    prepare.run_units = in_sequence
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


def test_rows_that_a_reader_cannot_use_count_against_the_rate_and_empty_ones_do_not(tmp_path: Path) -> None:
    write_coco(tmp_path)
    path = tmp_path / "captions.json"
    document = json.loads(path.read_text())
    good = len(document["annotations"])
    document["annotations"] += [{"image_id": 0, "caption": ""}] * 50
    path.write_text(json.dumps(document))
    run = functools.partial(prepare.prepare_shards, str(path), str(tmp_path / "images"), report=lambda _: None)
    document["annotations"] += [{"image_id": "nobody", "caption": "a dog"}] * 2
    path.write_text(json.dumps(document))
    with pytest.raises(
        UserError, match=rf"2 of {good + 2} rows of .* cannot be used, more than --max-error-rate 0.05 \(annotation of"
    ):
        run(str(tmp_path / "out"), max_error_rate=0.05)
    assert not (tmp_path / "out").exists()
    document["annotations"] = document["annotations"][:-2]
    path.write_text(json.dumps(document))
    read = prepare.read_dataset(str(path), str(tmp_path / "images"))
    prepare.refuse_unusable(read, good, str(path), 0.0)


if __name__ == "__main__":
    kill_often(*sys.argv[1:])
