"""What img2dataset writes is read as it is: its tars and Parquet files, its failures, and what is wrong with either."""

import hashlib
import io
import json
import shutil
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from img2dataset_output import BAD, LOST, NOT_FOUND, Tried, key_of, row_of, schema, write_parquet, write_tar

from raycap import storage
from raycap.data.index import index_unit, open_shards
from raycap.datasets.img2dataset import MAX_REASONS, UNREADABLE_TABLE, count_failures, find_shards, shorten
from raycap.errors import StorageError
from raycap.schema import Sample, SampleError
from raycap.shards import Manifest, check_shards, index_shard, read_manifest, read_run


def no_ray() -> None:
    raise AssertionError("Ray is not needed")


def index(root: Path, lines: list[str] | None = None) -> Manifest:
    """The manifest of the folder, its shards indexed here instead of by tasks."""
    into = f"{root}-index"
    for file in find_shards(str(root), storage.list_entries(str(root))):
        index_unit(str(root), into, file)
    return open_shards(str(root), into, report=(lines if lines is not None else []).append, connect=no_ray)


def read_all(manifest: Manifest) -> list[Sample | SampleError]:
    return [
        found for number, size in enumerate(manifest.sizes.tolist()) for found in read_run(manifest, number, 0, size)
    ]


def keys_of(manifest: Manifest) -> list[str]:
    return [sample.key for sample in read_all(manifest)]


def bytes_below(root: Path) -> dict[str, bytes]:
    return {name: storage.read_bytes(f"{root}/{name}") for name in storage.list_files(str(root))}


def many(n: int, name: str = "") -> list[Tried]:
    return [Tried(f" {name}caption {i}\n", b"%d " % i * 20) for i in range(n)]


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_a_folder_of_either_format_is_read_and_its_failures_are_counted(tmp_path: Path, write: type) -> None:
    root = tmp_path / "out"
    first, second = many(130), many(7)
    first[3], first[101], second[0], second[6] = LOST, LOST, BAD, Tried(caption="  ")
    write(root, 0, first)
    write(root, 2, second)  # no shard 1: a gap in the numbers
    before, lines = bytes_below(root), []
    manifest = index(root, lines)
    assert bytes_below(root) == before
    suffix = "tar" if write is write_tar else "parquet"
    assert manifest.shards == (f"00000.{suffix}", f"00002.{suffix}")
    assert (manifest.root, manifest.sizes.tolist()) == (str(root), [128, 5])
    assert manifest.skipped == ((key_of(2, 6), "no_caption"),)
    assert manifest.failures == {f"failed_to_download: {NOT_FOUND}": 2, "failed_to_resize: image too small": 1}
    expected = [
        Sample(key=key_of(shard, i), image=one.image or b"", ext="jpg", captions=(str(one.caption).strip(),))
        for shard, tried in ((0, first), (2, second))
        for i, one in enumerate(tried)
        if one.image is not None and str(one.caption).strip()
    ]
    assert read_all(manifest) == expected
    for start, stop in ((0, 1), (95, 100), (60, 128), (127, 128), (5, 5)):
        assert read_run(manifest, 0, start, stop) == expected[start:stop]
    check_shards(manifest)
    assert lines == [
        f"indexed shards=2 rows=133 skipped=1 (no_caption 1) not_downloaded=3 root='{root}'",
    ]
    again = read_manifest(str(root), f"{root}-index")
    assert (again.failures, again.skipped, again.fingerprint) == (
        manifest.failures,
        manifest.skipped,
        manifest.fingerprint,
    )


def test_members_are_found_in_any_order_and_the_table_beside_a_tar_is_never_taken_for_images(tmp_path: Path) -> None:
    import tarfile

    root = tmp_path / "out"
    write_tar(root, 0, many(3))
    members = {}
    with tarfile.open(root / "00000.tar") as archive:
        members = {m.name: archive.extractfile(m).read() for m in archive.getmembers()}  # type: ignore[union-attr]
    assert list(members)[:3] == [f"{key_of(0, 0)}.{suffix}" for suffix in ("jpg", "json", "txt")]
    with tarfile.open(root / "00001.tar", "w") as archive:
        for i in range(3):
            for suffix in ("txt", "jpg", "json"):
                info = tarfile.TarInfo(f"{key_of(1, i)}.{suffix}")
                data = members[f"{key_of(0, i)}.{suffix}"]
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    shutil.copy(root / "00000.parquet", root / "00009.parquet")  # its tar was removed
    manifest = index(root)
    assert manifest.shards == ("00000.tar", "00001.tar")
    by_shard = [[s for s in read_run(manifest, n, 0, 3) if isinstance(s, Sample)] for n in (0, 1)]
    assert [s.captions for s in by_shard[0]] == [s.captions for s in by_shard[1]]
    assert keys_of(manifest) == [key_of(shard, i) for shard in (0, 1) for i in range(3)]


def test_the_cut_last_tar_of_a_run_that_was_killed_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_tar(root, 0, many(4))
    write_tar(root, 1, many(4))
    whole = index_shard(str(root), "00001.tar", (root / "00001.tar").stat().st_size)[0]
    data = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(data[: whole.offsets[2] + 1024 + 700])  # behind two headers, in the image
    (root / "00001_stats.json").unlink()
    (root / "00001.parquet").write_bytes((root / "00001.parquet").read_bytes()[:500])  # no footer yet
    manifest = index(root)
    assert manifest.sizes.tolist() == [4, 2]
    assert manifest.skipped == ((key_of(1, 2), "truncated_shard"),)
    assert manifest.failures == {UNREADABLE_TABLE: 1}
    assert keys_of(manifest)[4:] == [key_of(1, 0), key_of(1, 1)]


def test_a_parquet_file_that_was_cut_or_has_no_images_is_left_out_by_name(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_parquet(root, 0, many(3))
    write_parquet(root, 1, many(3))
    (root / "00001.parquet").write_bytes((root / "00001.parquet").read_bytes()[:-100])
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["x"]}), root / "urls.parquet")
    manifest = index(root)
    assert manifest.sizes.tolist() == [3, 0, 0]
    assert manifest.skipped == (("00001.parquet", "truncated_shard"), ("urls.parquet", "bad_sample"))


def test_rows_of_a_parquet_file_that_make_no_sample_are_left_out_one_by_one(tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    rows = [row_of(0, i, Tried()) | {"webp": b"image %d" % i} for i in range(7)]
    rows[1]["key"], rows[2]["caption"], rows[3]["key"] = None, None, rows[0]["key"]
    rows[5]["caption"], rows[6]["key"] = b"caf\xe9", b"\xff6"
    for row in rows:
        row["key"], row["caption"] = (v.encode() if isinstance(v, str) else v for v in (row["key"], row["caption"]))
    types = schema(webp=pa.binary())
    for name in ("key", "caption"):
        types = types.set(types.get_field_index(name), pa.field(name, pa.binary()))
    table = pa.Table.from_pylist(rows, schema=types)
    for name in ("key", "caption"):  # text that says it is UTF-8
        column = table[name].combine_chunks()
        text = pa.StringArray.from_buffers(len(column), column.buffers()[1], column.buffers()[2], column.buffers()[0])
        table = table.set_column(table.schema.get_field_index(name), name, text)
    pq.write_table(table, root / "00000.parquet")
    manifest = index(root)
    assert manifest.skipped == (
        ("00000.parquet[1]", "bad_name"),
        (key_of(0, 2), "no_caption"),
        (key_of(0, 0), "duplicate_key"),
        (key_of(0, 5), "bad_sample"),
        ("\\xff6", "bad_sample"),
    )
    assert [(s.key, s.ext, s.image) for s in read_all(manifest) if isinstance(s, Sample)] == [
        (key_of(0, 0), "webp", b"image 0"),
        (key_of(0, 4), "webp", b"image 4"),
    ]


def test_a_read_of_a_parquet_file_touches_only_the_row_groups_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "out"
    write_parquet(root, 0, [Tried("x", bytes([i]) * 4000) for i in range(200)] * 5)
    manifest = index(root)
    read_run(manifest, 0, 0, 1)  # reads the footer too, once
    read = []
    read_range = storage.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        read.append(stop - start)
        return read_range(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    assert [s.key for s in read_run(manifest, 0, 420, 440)] == [key_of(0, i) for i in range(420, 440)]
    one_group = sum(read)
    assert one_group < 100 * 4000 * 1.2
    assert len(read) == 1
    read.clear()
    assert len(read_run(manifest, 0, 490, 510)) == 20
    assert one_group < sum(read) < 2.2 * one_group


def test_a_parquet_file_that_changed_since_it_was_indexed_is_an_error_of_its_samples(tmp_path: Path) -> None:
    root = tmp_path / "out"
    images = [
        hashlib.sha512(bytes([i])).digest() for i in range(5)
    ]  # stored as they are, since nothing in them repeats
    write_parquet(root, 0, [Tried("x", image) for image in images])
    manifest, url = index(root), root / "00000.parquet"
    data = url.read_bytes()
    place = data.index(images[3][8:40])
    url.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    found = read_run(manifest, 0, 0, 5)
    assert [type(s) for s in found] == [Sample, Sample, Sample, SampleError, Sample]
    assert (found[3].key, getattr(found[3], "kind", None)) == (key_of(0, 3), "sample_changed")
    url.write_bytes(data[:50] + b"\0" * (len(data) - 50))
    kinds = [(s.key, s.kind) for s in read_run(manifest, 0, 1, 3) if isinstance(s, SampleError)]
    assert kinds == [("00000.parquet[1]", "sample_changed"), ("00000.parquet[2]", "sample_changed")]
    url.unlink()
    with pytest.raises(StorageError, match="No such file"):
        read_run(manifest, 0, 0, 5)


def test_a_key_in_two_shards_counts_once_and_what_lies_behind_a_sample_does_not_disturb_it(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_tar(root, 0, many(4))
    write_tar(root, 1, many(3))
    # The second part of a set that was downloaded twice: the same keys, other images.
    again = tmp_path / "again"
    write_tar(again, 0, [Tried("again", b"again")] * 6)
    shutil.copy(again / "00000.tar", root / "00002.tar")
    manifest = index(root)
    assert manifest.sizes.tolist() == [4, 3, 2]
    assert manifest.skipped == tuple((key_of(0, i), "duplicate_key") for i in range(4))
    assert Counter(keys_of(manifest)).most_common(1)[0][1] == 1
    assert all(isinstance(s, Sample) for s in read_all(manifest))
    # The other way round, repeated samples lie in the middle and at the end of a shard.
    (root / "00000.tar").rename(root / "00003.tar")
    manifest = index(root)
    assert manifest.shards == ("00001.tar", "00002.tar", "00003.tar")
    assert manifest.sizes.tolist() == [3, 6, 0]
    assert all(isinstance(s, Sample) for s in read_all(manifest))


def test_repeated_samples_between_others_leave_their_neighbours_readable(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_tar(root, 0, many(6))
    whole = index(root)
    head = (root / "00000.tar").read_bytes()
    offsets, _ = whole.places(0, 0, 6)
    middle = head[offsets[2] : offsets[4]] + bytes(1024)  # samples 2 and 3 alone
    (root / "0000.tar").write_bytes(middle)
    manifest = index(root)
    assert manifest.sizes.tolist() == [2, 4]
    assert keys_of(manifest) == [key_of(0, i) for i in (2, 3, 0, 1, 4, 5)]
    assert all(isinstance(s, Sample) for s in read_all(manifest))


def test_equal_hashes_of_different_keys_are_no_duplicates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "out"
    for shard in range(3):
        write_tar(root, shard, many(5))
    monkeypatch.setattr("raycap.data.index.hash", lambda key: len(key), raising=False)
    assert index(root).sizes.tolist() == [5, 5, 5]


def test_a_folder_is_indexed_once_and_only_what_changed_is_indexed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, lines = tmp_path / "out", []
    for shard in range(3):
        write_tar(root, shard, many(2 + shard))
    first = index(root, lines)
    units = storage.list_files(f"{root}-index/_index", (".tar.json", ".json"))
    assert len(units) == 4  # three shards and the plan
    lines.clear()
    assert open_shards(str(root), f"{root}-index", report=lines.append, connect=no_ray).fingerprint == first.fingerprint
    assert lines == []
    write_tar(root, 1, many(9))
    write_tar(root, 3, many(1))
    monkeypatch.setattr("raycap.data.index.IN_DRIVER", 0)  # so little would be done here
    with pytest.raises(AssertionError, match="Ray is not needed"):
        open_shards(str(root), f"{root}-index", report=lines.append, connect=no_ray)
    assert lines == [f"shards_changed=2 root='{root}' since they were indexed; indexing those again"]
    seen = []
    for file in find_shards(str(root), storage.list_entries(str(root))):
        if file.name in ("00001.tar", "00003.tar"):
            index_unit(str(root), f"{root}-index", file)
            seen.append(file.name)
    assert len(seen) == 2
    renewed = open_shards(str(root), f"{root}-index", report=lines.append, connect=no_ray)
    assert renewed.sizes.tolist() == [2, 9, 4, 1]
    assert renewed.fingerprint != first.fingerprint
    assert read_manifest(str(root), f"{root}-index").fingerprint == renewed.fingerprint


def test_a_folder_with_a_manifest_of_its_own_needs_no_index(tmp_path: Path) -> None:
    root = tmp_path / "out"
    write_tar(root, 0, many(2))
    indexed = index(root)
    shutil.copy(tmp_path / "out-index" / "manifest.parquet", root / "manifest.parquet")
    manifest = open_shards(str(root), str(tmp_path / "elsewhere"), connect=no_ray)
    assert manifest.fingerprint == indexed.fingerprint
    assert not (tmp_path / "elsewhere").exists()
    assert read_manifest(str(root), str(tmp_path / "elsewhere")).fingerprint == indexed.fingerprint


def test_what_holds_no_shards_is_refused_with_what_to_do(tmp_path: Path) -> None:
    def refusal(root: Path) -> str:
        with pytest.raises(StorageError) as caught:
            index(root)
        return str(caught.value)

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.md").write_text("x")
    assert refusal(tmp_path / "empty") == (
        f"no shards below '{tmp_path}/empty': of its 1 files none ends with .tar or .parquet; give the folder that "
        f"jobs/prepare_shards.py or img2dataset wrote"
    )
    files = tmp_path / "files" / "00000"  # img2dataset's output_format=files
    files.mkdir(parents=True)
    (files / "000000000.jpg").write_bytes(b"x")
    write_table = pa.Table.from_pylist([row_of(0, 0, Tried())], schema=schema())
    pq.write_table(write_table, tmp_path / "files" / "00000.parquet")
    said = refusal(tmp_path / "files")
    assert said.startswith(f"'{tmp_path}/files' holds images as files, '00000/000000000.jpg' say, and no shards; ")
    assert "a CSV with the header `image,caption`" in said
    assert "or run img2dataset with --output_format webdataset" in said
    write_tar(tmp_path / "silent", 0, many(3), captions=False)
    write_tar(tmp_path / "silent", 1, [LOST])
    said = refusal(tmp_path / "silent")
    assert said.startswith(
        f"none of the 2 shards below '{tmp_path}/silent' has a sample with an image and a caption (no_caption 3); "
    )
    assert "the first sample '000000000' in " in said
    assert "has no caption in its members .jpg, .json; add one in .json, .txt or .caption" in said
    assert said.endswith("(img2dataset writes captions with --caption_col)")
    assert not (tmp_path / "silent-index" / "manifest.parquet").exists()
    with pytest.raises(StorageError, match="No such file or directory"):
        open_shards(str(tmp_path / "gone"), str(tmp_path / "i"), connect=no_ray)
    for inside in ("silent", "silent/", "silent/index"):
        with pytest.raises(StorageError, match="which is inside; choose a folder elsewhere"):
            open_shards(str(tmp_path / "silent"), f"{tmp_path}/{inside}", connect=no_ray)
    write_tar(tmp_path / "files2", 0, many(1))
    with pytest.raises(StorageError, match=r"was begun with shards='.*/silent' and this command has .*/files2'"):
        open_shards(str(tmp_path / "files2"), str(tmp_path / "silent-index"), connect=no_ray)


def test_reasons_of_failed_downloads_that_name_hosts_stay_few(tmp_path: Path) -> None:
    tried = [Tried(image=None, status="failed_to_download", error=f"<urlopen error host {i}>") for i in range(150)]
    write_tar(tmp_path / "out", 0, [*tried, *[LOST] * 5, Tried(image=None, status="failed_to_download")])
    failures = shorten(count_failures(str(tmp_path / "out"), "00000.parquet"))
    assert failures.total() == 156
    assert failures[f"failed_to_download: {NOT_FOUND}"] == 5
    assert len(failures) == MAX_REASONS + 1
    assert failures["failed_to_download: other reasons"] == 52
    (tmp_path / "table.parquet").write_bytes(json.dumps({}).encode())
    assert count_failures(str(tmp_path), "table.parquet") == {UNREADABLE_TABLE: 1}
