"""raycap/shards.py: samples survive the tar, a run of neighbours is one read, and a manifest is what it says or refused."""

import io
import itertools
import json
import pickle
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raycap import storage
from raycap.errors import StorageError
from raycap.schema import Sample, ShardIndex
from raycap.shards import Manifest, index_shard, pack_shard, parse_samples, read_manifest, read_run, write_manifest

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


def tar(members: list[tuple[str, bytes]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uname = len(data), 1_700_000_000, "someone"
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def test_odd_keys_survive_and_every_run_of_neighbours_is_one_range_read(tmp_path: Path) -> None:
    samples = [
        sample(key, size=8 * i * 40, ext=("JPG", "png")[i % 2], image_id=(i, f"id-{i}", None)[i % 3])
        for i, key in enumerate(ODD_KEYS)
    ]
    data, index = pack_shard("shard-00000.tar", samples)
    assert parse_samples(data) == samples
    assert index.keys == ODD_KEYS
    storage.put(f"{tmp_path}/shard-00000.tar", data)
    for start, stop in itertools.combinations_with_replacement(range(len(samples) + 1), 2):
        assert read_run(str(tmp_path), index, start, stop) == samples[start:stop]


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
            ("000003.png", b"no caption"),
            *(("000004.jpg", b"four"), ("000004.txt", b"")),
        ]
    )
    index = index_shard("00000.tar", data)
    assert index.keys == ("000001", "d/000002", "000003", "000004")
    storage.put(f"{tmp_path}/00000.tar", data)
    captions = [s.captions for s in read_run(str(tmp_path), index, 0, 4)]
    assert captions == [("a cat",), ("ein Hündchen",), (), ()]
    assert read_run(str(tmp_path), index, 1, 2) == [
        Sample(key="d/000002", image=b"two", ext="webp", captions=("ein Hündchen",))
    ]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.jpg", b"1"), ("a.png", b"2")], r"has the members \.jpg, \.png; a sample is one image with one"),
        ([("a.txt", b"only text")], r"has the members \.txt;"),
        ([("a.jpg", b""), ("a.json", b"{"), ("a.txt", b"x")], "cannot read the captions of 'a'"),
        ([("a.jpg", b""), ("a.txt", b"\xff")], "cannot read the captions of 'a'"),
        ([("a.jpg", b""), ("a.json", b'{"caption": ["x"]}')], 'no list "captions" of strings'),
        ([("a.jpg", b""), ("a.json", b'{"captions": "x"}')], 'no list "captions" of strings'),
        ([("a.jpg", b""), ("a.json", b'["x"]')], 'no list "captions" of strings'),
    ],
)
def test_a_sample_that_is_not_one_image_with_its_captions_is_refused(
    members: list[tuple[str, bytes]], reason: str
) -> None:
    with pytest.raises(StorageError, match=reason):
        parse_samples(tar(members), "s3://b/00000.tar")


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
    with pytest.raises(StorageError, match="the key 'a'"):
        pack_shard("s.tar", [sample(key) for key in keys])


def test_damaged_bytes_are_refused_wherever_the_damage_is(tmp_path: Path) -> None:
    data, index = pack_shard("s.tar", [sample("a"), sample("b"), sample("c")])
    url = f"{tmp_path}/s.tar"
    for offset in index.offsets[:-1]:
        storage.put(url, data[:offset] + b"\xff" * 8 + data[offset + 8 :])  # a header that no longer adds up
        with pytest.raises(StorageError, match=r"as a tar"):
            parse_samples(storage.read_bytes(url), url)
        with pytest.raises(StorageError):
            read_run(str(tmp_path), index, 0, 3)
    storage.put(url, data[: index.offsets[2] - 100])
    with pytest.raises(StorageError, match="cut or replaced"):
        read_run(str(tmp_path), index, 0, 2)
    storage.put(url, pack_shard("s.tar", [sample("x"), sample("y"), sample("z")])[0])
    with pytest.raises(StorageError, match=r"are not those that manifest\.parquet lists"):
        read_run(str(tmp_path), index, 1, 3)
    for bad in (b"", b"\0" * 1024, b"no tar"):
        with pytest.raises(StorageError):
            index_shard("s.tar", bad)


def manifest_of(root: str, sizes: tuple[int, ...]) -> Manifest:
    shards = []
    for number, size in enumerate(sizes):
        data, index = pack_shard(f"shard-{number:05d}.tar", [sample(f"{number}-{i}", size=16) for i in range(size)])
        storage.put(storage.join(root, index.shard), data)
        shards.append(index)
    return write_manifest(root, shards)


def test_a_manifest_reads_as_it_was_written_and_numbers_samples_through(tmp_path: Path) -> None:
    written = manifest_of(f"{tmp_path}/out", (3, 1, 4))
    manifest = pickle.loads(pickle.dumps(read_manifest(f"{tmp_path}/out")))
    assert manifest == written
    assert manifest.num_samples == 8
    assert [manifest.locate(i) for i in range(8)] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1), (2, 2), (2, 3)]
    for outside in (-1, 8):
        with pytest.raises(IndexError):
            manifest.locate(outside)


def test_a_fingerprint_depends_on_the_shards_bytes_and_not_on_the_root(tmp_path: Path) -> None:
    here, there = (manifest_of(f"{tmp_path}/{name}", (2, 3)) for name in "ab")
    other = manifest_of(f"{tmp_path}/c", (3, 2))
    assert here.fingerprint == there.fingerprint != other.fingerprint
    files = [storage.read_bytes(f"{tmp_path}/{name}/manifest.parquet") for name in "ab"]
    assert files[0] == files[1]


def test_a_finished_folder_takes_no_other_manifest(tmp_path: Path) -> None:
    manifest = manifest_of(str(tmp_path), (2, 3))
    write_manifest(str(tmp_path), manifest.shards)
    with pytest.raises(StorageError, match="choose another --out"):
        write_manifest(str(tmp_path), manifest.shards[:1])


def test_what_is_no_manifest_is_refused_with_what_to_do(tmp_path: Path) -> None:
    url = f"{tmp_path}/manifest.parquet"
    with pytest.raises(StorageError, match=r"no shards at .*; run jobs/prepare_shards.py first$"):
        read_manifest(str(tmp_path))

    def parquet(**columns: list[object]) -> bytes:
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        return sink.getvalue()

    write_manifest(f"{tmp_path}/no_rows", [])
    broken = ShardIndex(shard="s.tar", num_bytes=1, etag="", keys=("a", "b"), offsets=(0, 1))
    write_manifest(f"{tmp_path}/offsets", [broken])
    for data in (
        *(b"", b"PAR1", b"text", parquet(key=["a"]), parquet()),
        *(storage.read_bytes(f"{tmp_path}/{name}/manifest.parquet") for name in ("no_rows", "offsets")),
    ):
        storage.put(url, data)
        with pytest.raises(StorageError, match=r"is not a manifest of shards: .*; run jobs/prepare_shards.py first$"):
            read_manifest(str(tmp_path))
