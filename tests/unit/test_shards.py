"""raycap/shards: samples survive the tar, a run of neighbours is one read, what is broken is counted and the rest is read."""

import io
import itertools
import json
import pickle
import random
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset

import raycap.shards.tar as tar_module
from raycap import storage
from raycap.errors import StorageError
from raycap.schema import Sample, SampleError, ShardIndex
from raycap.shards import (
    Manifest,
    check_shards,
    index_shard,
    index_tar,
    pack_shard,
    read_manifest,
    read_run,
    write_manifest,
)
from raycap.shards.tar import first_fault

ODD_KEYS = (
    *(
        "plain",
        "train2014/COCO_000000000009",
        "ü/é",
        "日本/写真",
        "a.b/c.d",
        ".hidden",
        "100%",
        "a%2Eb",
        "%25",
        "a//b",
        "./x",
    ),
    *(
        "../up",
        "/lead",
        "k" * 99,
        "k" * 150,
        "d/" + "é" * 200 + ".v2",
        "line\nbreak",
        "space end ",
        "tab\t",
        "%252E..",
        "json",
    ),
)


def sample(key: str, size: int = 700, ext: str = "jpg", image_id: int | str | None = None) -> Sample:
    captions = (f"caption of {key}", 'quotes " and ünïcode 🐈', "\ud800 half a surrogate")
    return Sample(key=key, image=key.encode()[:8] * (size // 8), ext=ext, captions=captions, image_id=image_id)


def tar(members: list[tuple[str | bytes, bytes]], format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name if isinstance(name, str) else name.decode("utf-8", "surrogateescape"))
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "someone"
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """One header that says so of its member, with the right checksum."""
    info = tarfile.TarInfo(name)
    info.size, info.type = max(size, 0), kind
    block = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if size < 0:
        block[124:136] = b"-%010o\0" % -size
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block) + bytes(2048)


def whole(key: str) -> list[tuple[str | bytes, bytes]]:
    """Two members that make a good sample."""
    return [(f"{key}.jpg", f"image {key}".encode()), (f"{key}.txt", f"about {key}".encode())]


def manifest_at(root: Path, data: bytes, name: str = "s.tar") -> Manifest:
    """The manifest of one file, indexed as it is."""
    storage.put(f"{root}/{name}", data)
    write_manifest(str(root / "index"), [index_shard(str(root), name, len(data))[0]])
    return read_manifest(str(root), str(root / "index"))


def read_all(manifest: Manifest) -> list[Sample | SampleError]:
    return [
        found for number, size in enumerate(manifest.sizes.tolist()) for found in read_run(manifest, number, 0, size)
    ]


def test_odd_keys_survive_and_every_run_of_neighbours_is_one_range_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples = [
        sample(key, size=8 * i * 40, ext=("JPG", "png")[i % 2], image_id=(i, f"id-{i}", None)[i % 3])
        for i, key in enumerate(ODD_KEYS)
    ]
    data, index = pack_shard("shard-00000.tar", samples)
    assert (index.keys, index.skipped) == (ODD_KEYS, ())
    storage.put(f"{tmp_path}/shard-00000.tar", data)
    manifest = write_manifest(str(tmp_path), [index])
    reads: list[tuple[int, int]] = []
    read_range = storage.read_range
    monkeypatch.setattr(storage, "read_range", lambda url, a, b: reads.append((a, b)) or read_range(url, a, b))
    for start, stop in itertools.combinations_with_replacement(range(len(samples) + 1), 2):
        reads.clear()
        assert read_run(manifest, 0, start, stop) == samples[start:stop]
        assert reads == ([(index.offsets[start], index.offsets[stop])] if start < stop else [])


def test_the_same_samples_give_the_same_bytes_with_nothing_of_the_machine_in_them() -> None:
    samples = [sample("a"), sample("ü" * 60)]
    data, index = pack_shard("s.tar", samples)
    assert (data, index) == pack_shard("s.tar", samples)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = archive.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {(0, 0, 0, "", "", 0o644)}
    assert [m.name for m in members] == ["a.jpg", "a.json", "ü" * 60 + ".jpg", "ü" * 60 + ".json"]
    # Pinned: shards of an earlier version must not be refused as another run's when it is continued.
    assert index.etag == "9f103c82a859a29b1bb979b79bfab1ce04b9620962254605f61d313e84f66811"


def test_the_index_of_a_foreign_tar_is_its_runs_of_neighbours(tmp_path: Path) -> None:
    facts = {"key": "000001", "url": "http://x", "status": "success", "caption": "a cat"}  # img2dataset's .json
    data = tar(
        [
            *(("000001.json", json.dumps(facts).encode()), ("000001.jpg", b"\xff\xd8one"), ("000001.txt", b" a cat\n")),
            *(("d/000002.txt", "ein Hündchen".encode()), ("d/000002.webp", b"two")),
            *(("000003.jpg", b""), ("000003.json", json.dumps(facts).encode())),  # a zero-byte image is a sample
            *(("000004.png", b"4"), ("000004.json", b'{"captions": ["x", " ", ""], "image_id": 7}')),
        ]
    )
    manifest = manifest_at(tmp_path, data)
    assert read_all(manifest) == [
        Sample(key="000001", image=b"\xff\xd8one", ext="jpg", captions=("a cat",)),
        Sample(key="d/000002", image=b"two", ext="webp", captions=("ein Hündchen",)),
        Sample(key="000003", image=b"", ext="jpg", captions=("a cat",)),
        Sample(key="000004", image=b"4", ext="png", captions=("x",), image_id=7),
    ]


BROKEN: list[tuple[list[tuple[str | bytes, bytes]], tuple[str, str]]] = [
    ([("x.jpg", b"1"), ("x.png", b"2"), ("x.txt", b"t")], ("x", "bad_sample")),
    ([("x.txt", b"only text")], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.json", b"{"), ("x.txt", b"t")], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.json", b'"text"')], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.txt", b"\xff")], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.json", b'{"captions": 5}')], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.json", b'{"caption": 3}')], ("x", "bad_sample")),
    ([("x.jpg", b"1"), ("x.txt", b" \n\t")], ("x", "no_caption")),
    ([("x.jpg", b"1"), ("x.txt", b""), ("x.json", b'{"caption": null}')], ("x", "no_caption")),
    ([("x.jpg", b"1"), ("x.json", b'{"captions": ["", " "]}')], ("x", "no_caption")),
    ([("x.jpg", b"1")], ("x", "no_caption")),
    ([(b"caf\xe9/x.jpg", b"1"), (b"caf\xe9/x.txt", b"t")], ("caf\\xe9/x", "bad_name")),
    (whole("a"), ("a", "duplicate_key")),
    (whole("0"), ("0", "duplicate_key")),  # behind the other: neighbours with doubled names
]


@pytest.mark.parametrize(("members", "skipped"), BROKEN)
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_one_broken_sample_is_left_out_and_named_and_its_neighbours_are_read(
    tmp_path: Path, members: list[tuple[str | bytes, bytes]], skipped: tuple[str, str], format: int
) -> None:
    manifest = manifest_at(tmp_path, tar([*whole("a"), *whole("0"), *members, *whole("z")], format))
    assert manifest.skipped == (skipped,)
    assert [(s.key, s.captions) for s in read_all(manifest) if isinstance(s, Sample)] == [
        (key, (f"about {key}",)) for key in "a0z"
    ]
    assert read_run(manifest, 0, 2, 3) == read_all(manifest)[2:]


READ: list[tuple[list[tuple[str, bytes]], tuple[str, ...]]] = [
    ([("x.jpg", b"1"), ("x.cls", b"3"), ("x.url", b"http"), ("x.mask.png", b"2"), ("x.txt", b"t")], ("t",)),
    ([("x.JPG", b"1"), ("x.TXT", b"t")], ("t",)),
    ([("x.jpg", b"1"), ("x.caption", b"t")], ("t",)),
    ([("x.jpg", b"1"), ("x.json", b'{"caption": ["a dog", "pet"]}')], ("a dog", "pet")),
    ([("x.jpg", b"1"), ("x.json", b'{"captions": "a dog"}')], ("a dog",)),
    ([("x.jpg", b"1"), ("x.json", b'{"captions": [], "caption": "a dog"}'), ("x.txt", b" ")], ("a dog",)),
    ([("x.jpg", b"1"), ("x.txt", b"\xef\xbb\xbfa dog")], ("a dog",)),
    ([("x.jpg", b"1"), ("x.json", '{"caption": "\ufeffa dog"}'.encode())], ("a dog",)),
]


@pytest.mark.parametrize(("members", "captions"), READ)
def test_what_lies_beside_the_image_is_ignored_and_captions_are_read_in_every_form(
    tmp_path: Path, members: list[tuple[str, bytes]], captions: tuple[str, ...]
) -> None:
    manifest = manifest_at(tmp_path, tar([*whole("a"), *members, *whole("z")]))
    assert manifest.skipped == ()
    _, sample, _ = read_all(manifest)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.image, sample.captions) == ("x", b"1", captions)


def test_members_without_a_name_are_passed_over_as_webdataset_does(tmp_path: Path) -> None:
    names = [f"{mark}{number:04d}.{ext}" for number in (1, 2) for ext in ("jpg", "txt") for mark in ("._", "")]
    members = [(name, b"\0\5" if name.startswith("._") else b"caption") for name in names]
    data = tar([(".DS_Store", b"x"), *members])
    manifest = manifest_at(tmp_path, data)
    samples = read_all(manifest)
    assert manifest.skipped == ()
    assert [(s.key, s.captions) for s in samples if isinstance(s, Sample)] == [
        ("0001", ("caption",)),
        ("0002", ("caption",)),
    ]
    (path,) = tmp_path.rglob("*.tar")
    assert [s["__key__"] for s in webdataset.WebDataset(str(path), shardshuffle=False)] == ["0001", "0002"]


def test_the_first_fault_of_a_shard_is_told_with_what_was_found_and_what_is_missing() -> None:
    nothing = first_fault(tar([("x.txt", b"t"), ("x.cls", b"1"), ("x.url", b"2")]), "s.tar")
    assert "has no image among its members .txt, .cls" in nothing
    several = first_fault(tar([("x.jpg", b"1"), ("x.png", b"2"), ("x.txt", b"t")]), "s.tar")
    assert "has several images among its members .jpg, .png, .txt" in several
    assert "has no caption in its members .jpg, .json" in first_fault(
        tar([("x.jpg", b"1"), ("x.json", b"{}")]), "s.tar"
    )
    assert first_fault(tar(whole("a")), "s.tar") == first_fault(b"", "s.tar") == ""


def test_the_headers_of_every_tar_are_read_as_the_standard_library_reads_them() -> None:
    draw = random.Random(0)
    for number in range(60):
        format = (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT)[number % 3]
        lengths = [3, 60, 80] if format == tarfile.USTAR_FORMAT else [3, 60, 99, 100, 101, 180, 300]
        names = {"".join(draw.choices("abé/写_-", k=draw.choice(lengths))) for _ in range(12)}
        if format == tarfile.USTAR_FORMAT:  # a long path in two fields, and letters of one byte
            names = {f"{'folder/' * draw.randrange(20)}{name.encode().hex()[:60]}" for name in names}
        members = [(f"{name.strip('/')}x.jpg", bytes(draw.randrange(1500))) for name in names]
        members = [m for name, image in members for m in ((name, image), (name[:-3] + "txt", b"t"))]
        data = tar(members, format)
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            expected = [(m.name[:-4], m.offset) for m in archive.getmembers()][::2]
        index = index_tar("s.tar", [data])
        assert list(zip(index.keys, index.offsets[:-1], strict=True)) == expected
        assert index.skipped == ()


def test_folders_links_and_several_archives_in_one_file_do_not_disturb(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for type in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("d")
            info.type, info.linkname, info.size = type, "elsewhere", 700  # of the file it links to; no data follows
            archive.addfile(info)
        for name, data in whole("a"):
            info = tarfile.TarInfo(str(name))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    manifest = manifest_at(tmp_path, buffer.getvalue() + tar([*whole("b")]))
    assert [s.key for s in read_all(manifest)] == ["a", "b"]
    assert manifest.skipped == ()


def test_a_file_cut_at_any_byte_keeps_what_is_before_the_cut_and_counts_the_rest_once() -> None:
    data = tar([*whole("a"), *whole("b"), *whole("c")])
    index = index_tar("s.tar", [data])
    whole_at = [*index.offsets[1:]]  # where a, b and c end
    for cut in [*range(0, whole_at[-1] + 512, 128), *(end + d for end in whole_at[:2] for d in (-1, 0, 1))]:
        part = index_tar("s.tar", [data[:cut]])
        num_whole = sum(end <= cut for end in whole_at)
        # The last member's padding may be cut: then the sample is not there as a whole.
        assert part.keys == ("a", "b", "c")[:num_whole], cut
        (entry,) = part.skipped if cut < whole_at[-1] + 512 else [("s.tar", "truncated_shard")]
        assert entry[1] == "truncated_shard"
        assert entry[0] in {"s.tar", *("a", "b", "c")[num_whole:]}
        assert part.offsets[:num_whole] == index.offsets[:num_whole]
        assert part.num_bytes == cut
    assert index_tar("s.tar", [data[: whole_at[1] + 700]]).skipped == (("c", "truncated_shard"),)


def test_damage_in_the_middle_loses_what_is_behind_it_and_no_bytes_at_all_are_no_error() -> None:
    data, index = pack_shard("s.tar", [sample("a"), sample("b"), sample("c")])
    for number, offset in enumerate(index.offsets[:-1]):
        bad = index_tar("s.tar", [data[:offset] + b"\xff" * 8 + data[offset + 8 :]])
        assert (bad.keys, bad.skipped) == (index.keys[:number], (("s.tar", "truncated_shard"),))
        assert bad.num_bytes == len(data)
    for nothing in (b"", b"no tar", b"\xff" * 2000, header("a.jpg", -513), header("a.jpg", 1 << 40, b"x")):
        found = index_tar("s.tar", [nothing])
        assert (found.keys, found.offsets, found.skipped) == ((), (0,), (("s.tar", "truncated_shard"),))
    assert index_tar("s.tar", [b"\0" * 1024]).skipped == ()


def test_a_tar_in_parts_of_any_size_has_one_index_and_holds_one_sample_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tar([m for members, _ in BROKEN for m in members] + [m for i in range(20) for m in whole(str(i))])
    expected = index_tar("s.tar", [data])
    assert expected.num_samples == 21  # a, and the numbers

    def parts(size: int) -> Iterator[bytes]:
        for start in range(0, len(data), size):
            yield data[start : start + size]

    for size in (100, 512, 1024, 4096, 9999):
        assert index_tar("s.tar", parts(size)) == expected
    monkeypatch.setattr("raycap.shards._PART_BYTES", 3000)
    storage.put(f"{tmp_path}/s.tar", data)
    assert index_shard(str(tmp_path), "s.tar", len(data)) == (expected, Counter())


def test_a_member_too_long_to_hold_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar_module, "_MAX_SAMPLE_BYTES", 5000)
    data = tar([*whole("a"), ("film.mp4", bytes(50_000)), *whole("b")])
    index = index_tar("s.tar", (data[i : i + 1000] for i in range(0, len(data), 1000)))
    assert (index.keys, index.skipped) == (("a", "b"), (("film", "bad_sample"),))
    assert replace(index, skipped=()) == replace(index_tar("s.tar", [data]), skipped=())  # where, too


@pytest.mark.parametrize("key", ["", "folder/", "a\0b"])
def test_a_key_that_no_tar_can_hold_is_refused(key: str) -> None:
    with pytest.raises(StorageError, match="cannot pack the key"):
        pack_shard("s.tar", [sample(key)])


@pytest.mark.parametrize("ext", ["", "json", "TXT", "a.b", "jp/g"])
def test_a_suffix_that_no_image_has_is_refused(ext: str) -> None:
    with pytest.raises(StorageError, match="no suffix of an image"):
        pack_shard("s.tar", [sample("a", ext=ext)])


@pytest.mark.parametrize("keys", ["aab", "aba"])
def test_a_key_that_two_samples_share_is_refused(keys: str) -> None:
    with pytest.raises(StorageError, match="2 samples have the key 'a'"):
        pack_shard("s.tar", [sample(key) for key in keys])


def test_bytes_that_changed_since_they_were_indexed_are_an_error_of_their_sample_alone(tmp_path: Path) -> None:
    samples = [sample("a"), sample("b"), sample("c")]
    data, index = pack_shard("s.tar", samples)
    url = f"{tmp_path}/s.tar"
    storage.put(url, data)
    manifest = write_manifest(str(tmp_path), [index])
    for place in range(index.offsets[1], index.offsets[2], 97):
        storage.put(url, data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        first, bad, last = read_run(manifest, 0, 0, 3)
        assert (first, last) == (samples[0], samples[2])
        assert isinstance(bad, SampleError)
        assert bad.kind == "sample_changed"
        if place > index.offsets[1] + 512:
            assert bad.key == "b"
            assert bad.message.startswith(
                f"the bytes of sample 'b' in '{url}' are not those that were indexed; restore"
            )
    storage.put(url, data[: index.offsets[1]] + bytes(index.offsets[2] - index.offsets[1]) + data[index.offsets[2] :])
    assert [found.key for found in read_run(manifest, 0, 0, 3)] == ["a", "s.tar[1]", "c"]
    storage.put(url, pack_shard("s.tar", [sample(key) for key in "xyz"])[0])
    assert [found.kind for found in read_run(manifest, 0, 1, 3) if isinstance(found, SampleError)] == [
        "sample_changed",
        "sample_changed",
    ]
    storage.put(url, data[: index.offsets[2] - 100])
    with pytest.raises(StorageError, match="cut or replaced"):
        read_run(manifest, 0, 0, 2)
    Path(url).unlink()
    with pytest.raises(StorageError, match="No such file"):
        read_run(manifest, 0, 0, 2)


# ---- the manifest


def manifest_of(root: str, sizes: tuple[int, ...]) -> tuple[Manifest, list[ShardIndex]]:
    shards = []
    for number, size in enumerate(sizes):
        data, index = pack_shard(f"shard-{number:05d}.tar", [sample(f"{number}-{i}", size=16) for i in range(size)])
        storage.put(storage.join(root, index.shard), data)
        shards.append(index)
    return write_manifest(root, shards), shards


def fields(manifest: Manifest) -> dict[str, Any]:
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in vars(manifest).items()
        if name != "first_samples"
    }


def test_a_manifest_reads_as_it_was_written_and_numbers_samples_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raycap.shards.manifest._ROWS_PER_GROUP", 2)
    sizes = (3, 1, 0, 4)
    written, shards = manifest_of(f"{tmp_path}/out", sizes)
    shards[1] = replace(shards[1], skipped=(("ü\\xff", "bad_name"), ("b", "no_caption")))
    written = write_manifest(f"{tmp_path}/again", shards)
    manifest = read_manifest(f"{tmp_path}/again")
    assert fields(manifest) == fields(written)
    assert manifest.skipped == shards[1].skipped
    assert manifest.num_samples == 8
    assert manifest.num_bytes.tolist() == [index.num_bytes for index in shards]
    places = [(number, i) for number, size in enumerate(sizes) for i in range(size)]
    assert [manifest.locate(i) for i in range(8)] == places
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            manifest.locate(outside)
    for number, index in enumerate(shards):
        assert manifest.places(number, 0, index.num_samples) == ([*index.offsets], [*index.checksums])
    keys = [s.key for s in read_all(read_manifest(f"{tmp_path}/out"))]
    assert keys == [f"{number}-{i}" for number, i in places]


def test_a_pickled_manifest_shares_its_arrays_with_the_reader(tmp_path: Path) -> None:
    manifest_of(str(tmp_path), (3, 200))
    manifest = read_manifest(str(tmp_path))
    buffers: list[pickle.PickleBuffer] = []
    data = pickle.dumps(manifest, protocol=5, buffer_callback=buffers.append)
    assert len(data) < 1500
    copy = pickle.loads(data, buffers=buffers)
    assert fields(copy) == fields(manifest)
    assert np.shares_memory(copy.offsets, manifest.offsets)
    assert np.shares_memory(copy.checksums, manifest.checksums)


def test_a_fingerprint_depends_on_the_shards_bytes_and_not_on_the_root(tmp_path: Path) -> None:
    here, there = (manifest_of(f"{tmp_path}/{name}", (2, 3))[0] for name in "ab")
    other, _ = manifest_of(f"{tmp_path}/c", (3, 2))
    assert here.fingerprint == there.fingerprint != other.fingerprint
    assert read_manifest(f"{tmp_path}/a").fingerprint == here.fingerprint
    files = [storage.read_bytes(f"{tmp_path}/{name}/manifest.parquet") for name in "ab"]
    assert files[0] == files[1]


def test_a_finished_folder_takes_no_other_manifest(tmp_path: Path) -> None:
    _, shards = manifest_of(str(tmp_path), (2, 3))
    write_manifest(str(tmp_path), shards)
    with pytest.raises(StorageError, match="choose another --out"):
        write_manifest(str(tmp_path), shards[:1])


def test_what_is_no_manifest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    url = f"{tmp_path}/manifest.parquet"
    with pytest.raises(StorageError, match=r"no shards at .*; run jobs/prepare_shards.py first$"):
        read_manifest(str(tmp_path))

    def parquet(**columns: list[object]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()

    write_manifest(f"{tmp_path}/no_rows", [])
    good = ShardIndex(shard="s.tar", num_bytes=1, etag="", keys=("a", "b"), offsets=(0, 1, 2), checksums=(1, 2))
    write_manifest(f"{tmp_path}/offsets", [replace(good, offsets=(0, 1))])
    old = parquet(shard=["s.tar"], num_samples=[1], num_bytes=[1], etag=["e"], keys=[["a"]], offsets=[[0, 1]])
    for data in (
        *(b"", b"PAR1", b"text", parquet(key=["a"]), parquet(), old),
        *(storage.read_bytes(f"{tmp_path}/{name}/manifest.parquet") for name in ("no_rows", "offsets")),
    ):
        storage.put(url, data)
        with pytest.raises(StorageError, match=r"is not a manifest of shards: .*; run jobs/prepare_shards.py first$"):
            read_manifest(str(tmp_path))
    storage.put(url, old)
    with pytest.raises(StorageError, match="it was written by an earlier version, with the keys in it"):
        read_manifest(str(tmp_path))


def test_shards_that_are_missing_or_of_another_size_are_found_with_one_listing(tmp_path: Path) -> None:
    manifest, shards = manifest_of(str(tmp_path), (2, 3, 4))
    check_shards(manifest)
    storage.put(f"{tmp_path}/shard-00001.tar", b"short")
    with pytest.raises(StorageError) as caught:
        check_shards(manifest)
    assert str(caught.value).startswith(
        f"1 of 3 shards below '{tmp_path}' are not as the manifest names them, first: 'shard-00001.tar' has 5 bytes, not "
        f"{shards[1].num_bytes}; copy them again"
    )
    Path(tmp_path, "shard-00000.tar").unlink()
    with pytest.raises(StorageError, match=r"2 of 3 shards .* first: 'shard-00000.tar' is missing;"):
        check_shards(manifest)
