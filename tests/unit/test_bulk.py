"""raycap/bulk without Ray: what is listed and refused, one row per image whatever happens to it, what verification finds."""

import errno
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import png_images, tiny_checkpoint

from raycap import storage
from raycap.bulk import plan, progress, unit, verify
from raycap.bulk.caption import caption_bucket
from raycap.bulk.plan import Job
from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, open_checkpoint, save_checkpoint
from raycap.cluster import gpus_for
from raycap.config import CaptionBucketConfig
from raycap.decode_pool import DecodePool
from raycap.errors import EXIT_USER_MISTAKE, CheckpointError, StorageError, StorageOutage, UserError
from raycap.schema import Candidate, CaptionResult, DecodeSettings, ImageSpec, caption_schema

ODD_KEYS = ("a b+c%20d.png", "line\nbreak.png", "n\u0303o.png", "\u00f1o.png", "q?x#y.png", "ü/日本.PNG", "'\"\\.png")


class Says:
    """A model that names the pixels it sees, so that a caption tells which image it belongs to."""

    def caption_prepared(self, pixel_values: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
        return [CaptionResult(caption=f"sum {int(np.sum(p, dtype=np.int64))}", score=-0.1) for p in pixel_values]


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool() as pool:
        yield pool


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "images").mkdir()
    return Job(
        images=f"{tmp_path}/images",
        out=f"{tmp_path}/out",
        unit_size=4,
        format="parquet",
        image=ImageSpec(size=32),
        settings=DecodeSettings(max_new_tokens=6),
        checkpoint="c0ffee",
        settings_id="5e77",
        verified=True,
        micro_batch_size=3,
        decode_timeout_s=10.0,
    )


def write_images(job: Job, count: int = 10) -> list[str]:
    names = [f"{i % 2}/{i:02d}.png" for i in range(count)]
    for name, data in zip(names, png_images(count), strict=True):
        storage.put(storage.join(job.images, name), data)
    return sorted(names)


def make_manifest(job: Job) -> pa.Table:
    return plan.create_manifest(job.out, plan.list_images(job.images, job.out, ["*"])[0])


def make_units(job: Job, manifest: pa.Table, pool: DecodePool, model: Any = None) -> list[dict[str, Any]]:
    """All pending units, and the rows of the whole output."""
    for number in plan.pending_units(job, manifest.num_rows):
        rows = plan.rows_of(job, manifest, number)
        assert unit.make_unit(job, unit.prepare_unit(job, number, rows, pool), model or Says())
    return rows_below(job)


def rows_below(job: Job) -> list[dict[str, Any]]:
    names = storage.list_files(f"{job.out}/data")
    return [row for name in names for row in pq.read_table(f"{job.out}/data/{name}").to_pylist()]


# ---- listing


def test_images_are_listed_by_suffix_in_any_case_and_other_files_are_counted(job: Job) -> None:
    for name in ("b.JPG", "a/x.png", "notes.txt", "c.txt", "README", ".hidden/y.jpg"):
        storage.put(f"{job.images}/{name}", b"12")
    kept, others = plan.list_images(job.images, job.out, [".jpg", ".png"])
    assert [(entry.name, entry.num_bytes) for entry in kept] == [(".hidden/y.jpg", 2), ("a/x.png", 2), ("b.JPG", 2)]
    assert others == {".txt": 2, "no suffix": 1}
    assert plan.describe_counts(others) == ".txt 2, no suffix 1"
    assert len(plan.list_images(job.images, job.out, ["*"])[0]) == 6


def test_an_output_below_the_images_never_lists_itself(job: Job) -> None:
    for name in ("x.png", "out/status.json", "out/data/unit-00000000.parquet", "outside.png"):
        storage.put(f"{job.images}/{name}", b"x")
    kept, others = plan.list_images(job.images, f"{job.images}/out", ["*"])
    assert [entry.name for entry in kept] == ["outside.png", "x.png"]
    assert not others


@pytest.mark.parametrize(
    ("images", "out"), [("/a", "/a"), ("/a/data", "/a"), ("/a/data/b", "/a"), ("s3://b/x/data", "s3://b/x")]
)
def test_rows_among_the_images_are_refused(images: str, out: str) -> None:
    with pytest.raises(UserError, match="would write its rows among the images"):
        plan.check_roots(images, out)


@pytest.mark.parametrize(("images", "out"), [("/a", "/a/out"), ("/a/dataset", "/a"), ("/a/images", "/a"), ("/a", "/b")])
def test_an_output_beside_above_or_below_the_images_is_fine(images: str, out: str) -> None:
    plan.check_roots(images, out)


def test_a_root_without_images_is_refused_with_what_is_there(job: Job) -> None:
    with pytest.raises(UserError, match=r"^there are no files below '.*/images'; check --images$"):
        plan.list_images(job.images, job.out, [".jpg"])
    storage.put(f"{job.images}/a.txt", b"")
    with pytest.raises(UserError, match=r"none of the 1 files below '.*' ends with one of .jpg \(there are .txt 1\)"):
        plan.list_images(job.images, job.out, [".jpg"])
    with pytest.raises(StorageError, match=r"cannot list '.*/nowhere': No such file or directory") as caught:
        plan.list_images(f"{job.images}/nowhere", job.out, ["*"])
    assert caught.value.exit_code == EXIT_USER_MISTAKE


def test_suffixes_may_be_written_with_and_without_dots() -> None:
    assert plan.suffixes_of(CaptionBucketConfig(suffixes="PNG, .jpg,")) == [".jpg", ".png"]
    assert plan.suffixes_of(CaptionBucketConfig(suffixes=".jpg,*")) == ["*"]
    with pytest.raises(ValueError, match="--suffixes is empty"):
        CaptionBucketConfig(suffixes=" , ")


def test_a_root_that_can_be_listed_but_not_read_is_refused_at_once(job: Job) -> None:
    write_images(job, 3)
    entries, _ = plan.list_images(job.images, job.out, ["*"])
    plan.check_readable(job.images, entries)
    for entry in entries[:2]:
        storage.remove(f"{job.images}/{entry.name}")
    plan.check_readable(job.images, entries)
    storage.remove(f"{job.images}/{entries[2].name}")
    with pytest.raises(
        UserError, match=r"none of 3 images .* can be read, the first: cannot read .*it was listed but is"
    ):
        plan.check_readable(job.images, entries)


LEFTOVERS = (
    "._a.jpg",
    "x/._b.png",
    "__MACOSX/a.jpg",
    "a/@eaDir/c.jpg",
    ".Trash-1000/files/d.jpg",
    ".ipynb_checkpoints/e.png",
)


def test_what_programs_leave_beside_images_gets_no_row_unless_it_is_asked_for(job: Job) -> None:
    for name in (*LEFTOVERS, "a.jpg", ".b.jpg", "my__MACOSX/c.jpg"):
        storage.put(f"{job.images}/{name}", b"12")
    kept, others = plan.list_images(job.images, job.out, [".jpg", ".png"])
    assert [entry.name for entry in kept] == [".b.jpg", "a.jpg", "my__MACOSX/c.jpg"]
    assert others.total() == len(LEFTOVERS)
    assert "left by programs" in plan.describe_counts(others)
    assert len(plan.list_images(job.images, job.out, [".jpg", ".png"], leftovers=True)[0]) == len(LEFTOVERS) + 3


def test_a_link_to_itself_is_a_row_with_its_error(job: Job, pool: DecodePool) -> None:
    names = write_images(job, 3)
    Path(job.images, "self.jpg").symlink_to("self.jpg")
    rows = make_units(job, make_manifest(job), pool)
    assert [row["key"] for row in rows] == sorted([*names, "self.jpg"])
    (bad,) = [row for row in rows if row["error_kind"]]
    assert (bad["key"], bad["error_kind"]) == ("self.jpg", "unreadable")


def refuse_reads(monkeypatch: pytest.MonkeyPatch, refuses: Callable[[str], bool]) -> None:
    """Reading a file that `refuses` says yes to fails as for want of rights, which root has for all files."""
    real = os.open

    def fail(path: Any, *args: Any, **kwargs: Any) -> int:
        if refuses(str(path)):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", fail)


def test_access_that_is_lost_half_way_ends_the_run_and_a_few_refused_images_are_rows(
    job: Job, pool: DecodePool, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = write_images(job, 10)
    manifest = make_manifest(job)
    refuse_reads(monkeypatch, lambda path: path.endswith(names[3]))
    rows = unit.prepare_unit(job, 0, plan.rows_of(job, manifest, 0), pool).rows
    assert [row["error_kind"] for row in rows] == [None, None, None, "unreadable"]
    before: list[str] = []

    def after_two(path: str) -> bool:
        if path.endswith(tuple(names)):
            before.append(path)
        return len(before) > 2 and path.endswith(tuple(names))

    refuse_reads(monkeypatch, after_two)
    with pytest.raises(
        StorageError, match=r"access to it is refused .*, and so is access to other files there; restore it"
    ):
        unit.prepare_unit(job, 0, plan.rows_of(job, manifest, 0), pool)
    refuse_reads(monkeypatch, lambda path: path.endswith(tuple(names)))
    with pytest.raises(StorageError, match="access to other files there"):
        unit.prepare_unit(job, 1, plan.rows_of(job, manifest, 1), pool)


@pytest.mark.parametrize("change", ["gone", "replaced"])
def test_an_image_that_is_no_longer_there_does_not_make_a_refused_one_lost_access(
    job: Job, pool: DecodePool, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    names = write_images(job, 4)
    manifest = make_manifest(job)

    def refuse_last(path: str) -> bool:
        refuses = path.endswith(names[3])
        if refuses and change == "gone":
            Path(job.images, names[2]).unlink(missing_ok=True)
        elif refuses:
            Path(job.images, names[2]).write_bytes(b"another")
        return refuses

    refuse_reads(monkeypatch, refuse_last)
    rows = unit.prepare_unit(job, 0, plan.rows_of(job, manifest, 0), pool).rows
    assert [row["error_kind"] for row in rows] == [None, None, None, "unreadable"]


def test_a_storage_that_stops_answering_after_a_refused_file_is_an_outage_and_no_lost_access(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(job, 1)
    (entry,) = storage.list_entries(job.images)
    refuse_reads(monkeypatch, lambda path: path.endswith(entry.name))
    with pytest.raises(storage.EntryError) as refused:
        storage.read_entry(job.images, entry)

    def stop() -> bytes:
        raise StorageOutage("the storage stopped answering")

    watch = storage.AccessWatch()
    watch.worked(stop)
    with pytest.raises(StorageOutage, match="stopped answering"):
        watch.check(refused.value)


def test_more_unreadable_images_than_the_rate_allows_are_no_success() -> None:
    errors = Counter(unreadable=6, not_an_image=90)
    verify.check_unreadable(errors, 100, 0.06, "/out")
    with pytest.raises(StorageError, match=r"6 of 100 images could not be read, more than --max-error-rate 0.05"):
        verify.check_unreadable(errors, 100, 0.05, "/out")


# ---- manifest and plan


def test_the_first_manifest_is_what_every_run_shares(job: Job) -> None:
    names = write_images(job, 5)
    first = make_manifest(job)
    storage.put(f"{job.images}/new.png", b"")
    assert first["key"].to_pylist() == names
    assert make_manifest(job) == first == plan.read_manifest(job.out)


@pytest.mark.parametrize("content", [b"", b"garbage", b"PAR1"])
def test_a_manifest_that_is_none_is_refused(job: Job, content: bytes) -> None:
    storage.put(f"{job.out}/manifest.parquet", content)
    with pytest.raises(StorageError, match="is no listing of images"):
        plan.read_manifest(job.out)


def test_the_manifest_of_something_else_is_refused(job: Job) -> None:
    Path(job.out).mkdir()
    pq.write_table(pa.table({"shard": ["x"]}), f"{job.out}/manifest.parquet")
    with pytest.raises(StorageError, match=r"has the columns \['shard'\]"):
        plan.read_manifest(job.out)


def test_pending_are_the_units_that_do_not_exist(job: Job) -> None:
    assert plan.pending_units(job, 9) == [0, 1, 2]
    for name in ("unit-00000001.parquet", "unit-00000000.jsonl", "unit-2.parquet", "old/unit-00000002.parquet"):
        storage.put(f"{job.out}/data/{name}", b"")
    assert plan.pending_units(job, 9) == [0, 2]
    assert plan.pending_units(replace(job, format="jsonl"), 9) == [1, 2]


def test_what_changed_since_the_listing_is_told_and_another_folder_is_refused(job: Job) -> None:
    names = write_images(job, 5)
    manifest = make_manifest(job)

    def now() -> list[storage.Entry]:
        return plan.list_images(job.images, job.out, ["*"])[0]

    assert plan.check_drift(job, manifest, now(), [0, 1]) == ""
    storage.put(f"{job.images}/new.png", b"")
    storage.remove(f"{job.images}/{names[0]}")
    storage.put(f"{job.images}/{names[1]}", b"other")
    changed = plan.check_drift(job, manifest, now(), [0, 1])
    assert changed == "1 new (not captioned here; another --out lists again), 1 gone, 1 replaced"
    storage.remove(f"{job.images}/{names[4]}")
    with pytest.raises(UserError, match=r"all 1 images left to caption .* are gone or were replaced since they were"):
        plan.check_drift(job, manifest, now(), [1])


# ---- one unit


def test_rows_are_what_the_captioner_says_of_each_image_in_order(job: Job, pool: DecodePool) -> None:
    spec, model, _ = tiny_checkpoint(seed=3)
    captioner = Captioner(model, spec)
    names = write_images(job)
    rows = make_units(job, make_manifest(job), pool, captioner)
    assert [row["key"] for row in rows] == names
    expected = captioner.caption([storage.read_bytes(f"{job.images}/{name}") for name in names], job.settings)
    assert [row["caption"] for row in rows] == [result.caption for result in expected]
    assert [row["score"] for row in rows] == pytest.approx([result.score for result in expected], abs=1e-5)
    assert len({row["caption"] for row in rows}) > 3
    first = rows[0]
    assert (first["width"], first["height"], first["num_bytes"]) == (
        40,
        50,
        Path(job.images, names[0]).stat().st_size,
    )
    assert (first["checkpoint"], first["settings"], first["verified"]) == ("c0ffee", "5e77", True)
    assert (first["error_kind"], first["error"], first["candidates"]) == (None, None, [])
    assert pq.read_schema(f"{job.out}/data/unit-00000000.parquet") == caption_schema()


def test_candidates_are_written_with_their_scores(job: Job, pool: DecodePool) -> None:
    class Two:
        def caption_prepared(self, pixels: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
            return [
                CaptionResult(
                    caption="a",
                    score=-1.0,
                    log_prob=-3.0,
                    candidates=(Candidate("a", -1.0, -3.0), Candidate("b", -2.5, -5.0)),
                )
            ] * len(pixels)

    write_images(job, 2)
    rows = make_units(job, make_manifest(job), pool, Two())
    assert rows[1]["candidates"] == [
        {"caption": "a", "score": -1.0, "log_prob": -3.0, "match": None},
        {"caption": "b", "score": -2.5, "log_prob": -5.0, "match": None},
    ]


def test_whatever_happens_to_an_image_it_has_one_row(job: Job, pool: DecodePool) -> None:
    names = write_images(job, 11)
    root = Path(job.images)
    (root / names[1]).write_bytes((root / names[1]).read_bytes()[:60])
    (root / names[2]).write_bytes(b"<html>404</html>")
    (root / names[3]).write_bytes(b"")
    with open(root / names[4], "wb") as large:
        large.truncate(2**40)  # a terabyte of zeros, that must not be read
    (root / names[5]).unlink()
    (root / names[5]).symlink_to("nowhere")
    (root / names[6]).unlink()
    os.mkfifo(root / names[6])
    manifest = make_manifest(job)
    (root / names[7]).unlink()
    (root / names[8]).write_bytes(b"another image")
    rows = make_units(job, manifest, pool)
    kinds = [row["error_kind"] for row in rows]
    assert kinds == [None, "truncated", "not_an_image", "empty", "too_many_bytes", *["unreadable"] * 4, None, None]
    assert [row["caption"] is None for row in rows] == [kind is not None for kind in kinds]
    sentences = [str(row["error"]) for row in rows]
    for number, words in (
        (5, "listed but is gone"),
        (6, "no regular file"),
        (7, "but is gone"),
        (8, "was replaced since"),
    ):
        assert sentences[number].startswith(f"cannot read '{job.images}/{names[number]}': it ")
        assert words in sentences[number]
    # Captions after a bad image still belong to their images.
    pixels = pool.prepare_all([(root / names[9]).read_bytes()], job.image)[0]
    assert rows[9]["caption"] == f"sum {int(np.sum(pixels.pixels, dtype=np.int64))}"
    errors = verify.verify_units(job, manifest)
    assert errors == {"truncated": 1, "not_an_image": 1, "empty": 1, "too_many_bytes": 1, "unreadable": 4}


def test_a_unit_of_nothing_but_errors_is_written(job: Job, pool: DecodePool) -> None:
    for name in "abc":
        storage.put(f"{job.images}/{name}", b"no image")
    rows = make_units(job, make_manifest(job), pool)
    assert [row["error_kind"] for row in rows] == ["not_an_image"] * 3


def test_images_that_are_all_gone_end_the_run_instead_of_becoming_rows(job: Job, pool: DecodePool) -> None:
    write_images(job, 3)
    manifest = make_manifest(job)
    Path(job.images).rename(f"{job.images}-away")
    Path(job.images).mkdir()  # as when a volume is not mounted any more
    with pytest.raises(StorageError, match=r"and nothing is left below '.*/images'; bring the images back"):
        make_units(job, manifest, pool)
    Path(job.images).rmdir()
    with pytest.raises(StorageError, match=r"cannot list '.*/images': No such file or directory"):
        make_units(job, manifest, pool)
    assert rows_below(job) == [] if Path(job.out, "data").exists() else True


def test_odd_keys_are_kept_verbatim_in_both_formats(job: Job, pool: DecodePool) -> None:
    for key, data in zip(ODD_KEYS, png_images(len(ODD_KEYS)), strict=True):
        storage.put(f"{job.images}/{key}", data)
    manifest = make_manifest(job)
    rows = make_units(job, manifest, pool)
    assert [row["key"] for row in rows] == sorted(ODD_KEYS)
    assert all(row["caption"] for row in rows)
    assert storage.list_files(f"{job.out}/data") == ["unit-00000000.parquet", "unit-00000001.parquet"]
    lines = replace(job, format="jsonl")
    for number in (0, 1):
        unit.make_unit(lines, unit.prepare_unit(job, number, plan.rows_of(job, manifest, number), pool), Says())
    read = [
        json.loads(line)
        for number in (0, 1)
        for line in storage.read_bytes(lines.unit_url(number)).decode().split("\n")[:-1]
    ]
    assert read == rows
    assert verify.verify_units(lines, manifest) == verify.verify_units(job, manifest)


def test_slices_bound_what_is_read_ahead() -> None:
    entries = [storage.Entry(str(i), size, "") for i, size in enumerate([10] * 70 + [60 * 2**20, 2**23, 2**40, 1])]
    parts = list(unit._cut(entries))
    assert [len(part) for part in parts] == [64, 7, 1, 1, 1]
    assert [entry for part in parts for entry in part] == entries


# ---- commit and verification


def test_a_unit_made_twice_stays_as_it_was_first_made(job: Job, pool: DecodePool) -> None:
    write_images(job, 4)
    manifest = make_manifest(job)
    prepared = unit.prepare_unit(job, 0, manifest, pool)
    assert unit.make_unit(job, prepared, Says())
    before = storage.read_bytes(job.unit_url(0))

    class Rounds(Says):
        def caption_prepared(self, pixels: Any, settings: object = None) -> list[CaptionResult]:  # noqa: ARG002
            return [replace(result, score=-0.1000001) for result in super().caption_prepared(pixels)]

    assert not unit.make_unit(job, prepared, Rounds())
    assert storage.read_bytes(job.unit_url(0)) == before


def spoil(job: Job, how: str) -> None:
    url = job.unit_url(1)
    rows = pq.read_table(url)
    if how == "is gone":
        storage.remove(url)
    elif how == "is cut":
        storage.put(url, storage.read_bytes(url)[:-100])
    elif how == "lacks a row":
        storage.put(url, unit.encode_rows(rows.slice(1), "parquet"))
    elif how == "is another unit's":
        storage.put(url, storage.read_bytes(job.unit_url(0)))
    elif how == "is of other settings":
        column = pa.array(["ffff"] * rows.num_rows)
        storage.put(
            url,
            unit.encode_rows(rows.set_column(rows.schema.get_field_index("settings"), "settings", column), "parquet"),
        )
    elif how == "is another table":
        pq.write_table(pa.table({"key": ["x"]}), url)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("is gone", "No such file or directory"),
        ("is cut", "it cannot be read"),
        ("lacks a row", "its 3 rows are not the 4"),
        ("is another unit's", "its 4 rows are not the 4"),
        ("is of other settings", "another checkpoint or other settings"),
        ("is another table", "it cannot be read"),
    ],
)
def test_verification_finds_a_unit_that(job: Job, pool: DecodePool, how: str, words: str) -> None:
    write_images(job, 9)
    manifest = make_manifest(job)
    make_units(job, manifest, pool)
    verify.verify_units(job, manifest)
    spoil(job, how)
    with pytest.raises(StorageError, match=words) as caught:
        verify.verify_units(job, manifest)
    assert "unit-00000001.parquet" in str(caught.value)


def test_the_marker_of_the_faster_run_stays(job: Job) -> None:
    first = verify.seal(job, 10, Counter(empty=2), 1.5)
    assert first == verify.seal(job, 10, Counter(empty=2), 99.0) == verify.read_summary(job.out)
    assert (first["num_images"], first["num_captioned"], first["errors"], first["seconds"]) == (
        10,
        8,
        {"empty": 2},
        1.5,
    )
    assert progress.table(first).split() == ["captioned", "8", "empty", "2"]


@pytest.mark.parametrize("content", [b"", b"[]", b"{}"])
def test_a_marker_that_is_none_is_refused(job: Job, content: bytes) -> None:
    storage.put(f"{job.out}/_SUCCESS.json", content)
    with pytest.raises(StorageError, match="delete it and run the same command to verify the rows again"):
        verify.read_summary(job.out)


def test_the_progress_line_says_what_a_run_spends_its_time_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    seen = progress.Progress(100, 20)
    assert seen.line().startswith("rows=20/100 images_per_s=0.0 errors=0 eta_s=unknown elapsed_s=0 read_s=0.0")
    assert seen.line().endswith(" write_s=0.0 waiting_for='Ray to start'")
    for second, images in ((10.0, 8), (12.0, 16)):
        now[0] = second
        seen.add(num_images=images, made=True, errors={"empty": 1}, seconds={"read": 0.5, "decode": 1.0, "write": 0.25})
        if second == 10.0:
            assert " images_per_s=4.6 errors=1 eta_s=16 " in seen.line()
    # Of the ten seconds until the first unit it took 1.75; the others were the start of processes.
    assert seen.line() == (
        "rows=44/100 images_per_s=6.4 errors=2 eta_s=9 elapsed_s=12 read_s=1.0 decode_s=2.0 caption_s=0.0 write_s=0.5"
    )


def test_a_line_comes_while_nothing_is_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "REPORT_S", 0.01)
    lines: list[str] = []
    with progress.reporting(progress.Progress(1, 0), lines.append):
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
    assert len(lines) >= 2


# ---- the run, as far as it goes without Ray


@pytest.fixture
def config(job: Job, tmp_path: Path) -> CaptionBucketConfig:
    spec, model, _ = tiny_checkpoint(seed=3)
    save_checkpoint(f"{tmp_path}/checkpoint", export_weights(model), spec, {"step": 0})
    write_images(job, 2)
    return CaptionBucketConfig(checkpoint=f"{tmp_path}/checkpoint", images=job.images, out=job.out)


def test_the_plan_holds_what_decides_the_rows_and_nothing_that_only_decides_the_speed(
    config: CaptionBucketConfig,
) -> None:
    spec = open_checkpoint(config.checkpoint)[0]
    begun = plan.make_plan(config, config.images, spec, "fp32")
    speed = replace(
        config, concurrency=3, micro_batch_size=5, cpus_for_data=2, device="cpu", num_gpus=0.5, checkpoint="/x"
    )
    assert plan.make_plan(speed, config.images, spec, "fp32") == begun
    for options in ({"unit_size": 3}, {"format": "jsonl"}, {"suffixes": "*"}, {"max_new_tokens": 3}):
        other = replace(config, **options)  # type: ignore[arg-type]
        assert plan.make_plan(other, config.images, spec, "fp32") != begun
    assert plan.make_plan(config, config.images, spec, "bf16") != begun
    assert begun["checkpoint"] == spec.fingerprint != ""
    ids = {
        plan.make_job(replace(config, max_new_tokens=tokens), config.images, spec, dtype).settings_id
        for tokens in (0, 3)
        for dtype in ("fp32", "bf16")
    }
    assert len(ids) == 4


def test_a_damaged_checkpoint_is_refused_before_anything_is_written(config: CaptionBucketConfig) -> None:
    weights = Path(config.checkpoint, "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: 'model.safetensors'"):
        caption_bucket(config)
    assert not Path(config.out).exists()


def test_settings_that_clash_with_the_checkpoints_are_refused(config: CaptionBucketConfig) -> None:
    with pytest.raises(ValueError, match="num_candidates"):
        caption_bucket(replace(config, num_candidates=2))
    with pytest.raises(ValueError, match=r"max_new_tokens=1000 behind the prompt .* give at most"):
        caption_bucket(replace(config, max_new_tokens=1000))
    assert not Path(config.out).exists()


def test_an_output_begun_otherwise_is_refused_and_a_finished_one_returned_before_ray_starts(
    config: CaptionBucketConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = open_checkpoint(config.checkpoint)[0]
    begun = plan.make_plan(config, config.images, spec, "bf16")
    storage.put(f"{config.out}/job.json", (json.dumps(begun, indent=1, sort_keys=True) + "\n").encode())
    with pytest.raises(StorageError, match=r"begun with unit_size=256 and this command has unit_size=3;"):
        caption_bucket(replace(config, unit_size=3))
    with pytest.raises(StorageError, match=r"begun with dtype='bf16' and this command has dtype='fp32';"):
        caption_bucket(replace(config, dtype="fp32"))
    summary = verify.seal(plan.make_job(config, config.images, spec, "bf16"), 2, Counter(), 1.0)
    assert caption_bucket(config) == summary
    assert "this run is finished" in capsys.readouterr().out
    storage.remove(f"{config.out}/job.json")
    with pytest.raises(StorageError, match=r"has a _SUCCESS.json but no job.json, so another program wrote it"):
        caption_bucket(config)


def test_without_a_demo_the_job_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCAP_RUNS", str(tmp_path))
    with pytest.raises(UserError, match=r"no demo to caption: '.*/demo/checkpoint' is not there; run make demo"):
        caption_bucket(CaptionBucketConfig(out=f"{tmp_path}/out"))


@pytest.mark.parametrize(("processes", "each", "gpus"), [(3, 1.0, 3), (3, 0.5, 2), (4, 0.3, 2), (2, 2.0, 4)])
def test_a_gpu_is_shared_by_as_many_captioners_as_fit_on_it_whole(processes: int, each: float, gpus: int) -> None:
    assert gpus_for(processes, each) == gpus
    with pytest.raises(ValueError, match="--num-gpus must be whole or below 1"):
        CaptionBucketConfig(num_gpus=1.5)
