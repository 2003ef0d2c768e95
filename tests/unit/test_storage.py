"""raycap/storage on local paths: what is listed, that nothing half-written shows, and what a user reads when it fails."""

import errno
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from raycap import storage
from raycap.errors import StorageError
from raycap.storage import files, local


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_importing_storage_loads_no_s3_library() -> None:
    code = "import sys, raycap.storage; print([m for m in ('boto3', 'botocore', 's3fs', 'fsspec') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_listing_is_recursive_sorted_and_filtered_by_suffix_in_any_case(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/x.JPG", "a/b/ü.png", "notes.txt", ".tmp-c.jpg-1234"):
        storage.put(f"{tmp_path}/{name}", b"x")
    assert storage.list_files(str(tmp_path)) == ["a/b/ü.png", "a/x.JPG", "b.jpg", "notes.txt"]
    assert storage.list_files(f"{tmp_path}/", (".jpg", ".png")) == ["a/b/ü.png", "a/x.JPG", "b.jpg"]


def test_listing_follows_a_link_to_a_folder_and_refuses_a_loop(tmp_path: Path) -> None:
    storage.put(f"{tmp_path}/data/x.jpg", b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "one").symlink_to(tmp_path / "data")
    (tmp_path / "root" / "two").symlink_to(tmp_path / "data")
    assert storage.list_files(f"{tmp_path}/root") == ["one/x.jpg", "two/x.jpg"]
    (tmp_path / "data" / "back").symlink_to(tmp_path / "root")
    with pytest.raises(StorageError, match="which contains it; remove that link"):
        storage.list_files(f"{tmp_path}/root")


def test_listing_refuses_a_missing_folder_and_a_name_that_is_not_utf8(tmp_path: Path) -> None:
    with pytest.raises(
        StorageError, match=r"^cannot list '.*/nothing': No such file or directory \(2\); check the path$"
    ):
        storage.list_files(f"{tmp_path}/nothing")
    with open(os.fsencode(tmp_path) + b"/caf\xe9.jpg", "wb"):
        pass
    with pytest.raises(StorageError, match="is not UTF-8; rename that file"):
        storage.list_files(str(tmp_path))


def test_entries_are_the_files_with_size_and_an_etag_that_changes_with_them(tmp_path: Path) -> None:
    for name, data in (("b", b"12"), ("a/x.jpg", b"123"), ("a b", b"")):
        storage.put(f"{tmp_path}/{name}", data)
    (tmp_path / "dangling").symlink_to("nowhere")
    first = storage.list_entries(str(tmp_path))
    assert [(entry.name, entry.num_bytes) for entry in first] == [("a b", 0), ("a/x.jpg", 3), ("b", 2), ("dangling", 0)]
    assert first == storage.list_entries(f"{tmp_path}/")
    storage.put(f"{tmp_path}/b", b"21")
    second = storage.list_entries(str(tmp_path))
    assert [one.name for one, other in zip(first, second, strict=True) if one != other] == ["b"]
    with pytest.raises(StorageError, match=r"cannot list '.*/nothing': No such file"):
        storage.list_entries(f"{tmp_path}/nothing")


def test_an_entry_is_read_as_it_was_listed_or_refused(tmp_path: Path) -> None:
    root = str(tmp_path)
    for name in ("same", "gone", "replaced", "longer", "folder"):
        storage.put(f"{root}/{name}", name.encode())
    (tmp_path / "dangling").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    entries = {entry.name: entry for entry in storage.list_entries(root)}
    for name in ("gone", "folder"):
        storage.remove(f"{root}/{name}")
    (tmp_path / "folder").mkdir()
    storage.put(f"{root}/replaced", b"REPLACED")
    with open(tmp_path / "longer", "ab") as f:
        f.write(b"!")
    assert storage.read_entry(root, entries["same"]) == b"same"
    for name, words in {
        "gone": r"it was listed but is gone \(No such file or directory, 2\)",
        "dangling": r"it was listed but is gone \(No such file or directory, 2\)",
        "replaced": "it was replaced since it was listed",
        "longer": "it was replaced since it was listed",
        "pipe": "it is no regular file",
        "folder": "it is no regular file",
    }.items():
        with pytest.raises(storage.EntryError, match=f"^cannot read '{root}/{name}': {words}"):
            storage.read_entry(root, entries[name])


def test_a_disk_that_fails_is_no_fault_of_the_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.put(f"{tmp_path}/x", b"x")
    (entry,) = storage.list_entries(str(tmp_path))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "open", broken)
    with pytest.raises(StorageError, match=r"^cannot read '.*/x': Input/output error \(5\)") as caught:
        storage.read_entry(str(tmp_path), entry)
    assert not isinstance(caught.value, storage.EntryError)


def test_a_folder_has_files_or_not_or_is_missing(tmp_path: Path) -> None:
    assert not storage.has_files(str(tmp_path))
    storage.put(f"{tmp_path}/x", b"")
    assert storage.has_files(str(tmp_path))
    with pytest.raises(StorageError, match="cannot list"):
        storage.has_files(f"{tmp_path}/nothing")


@pytest.mark.parametrize("call", [storage.read_bytes, storage.exists, storage.list_files, storage.remove])
@pytest.mark.parametrize("url", ["shards", "./shards", "gs://bucket/x", "s3:///x", "/a\0b", ""])
def test_anything_but_an_absolute_path_or_an_s3_url_is_refused(call: object, url: str) -> None:
    with pytest.raises(StorageError, match=r"neither an absolute path nor an s3:// URL|names no bucket"):
        call(url)  # type: ignore[operator]


def test_join_keeps_parts_verbatim() -> None:
    assert storage.join("s3://b/train/", "/x//y/") == "s3://b/train//x//y/"
    assert storage.join("/out", "_index", "a.json") == "/out/_index/a.json"


def test_a_range_is_exact_or_refused(tmp_path: Path) -> None:
    url = f"{tmp_path}/f"
    storage.put(url, b"0123456789")
    assert storage.read_range(url, 3, 7) == b"3456"
    assert storage.read_range(url, 10, 10) == b""
    with pytest.raises(StorageError, match=r"bytes 8 to 12 of '.*': got 2 bytes, not 4"):
        storage.read_range(url, 8, 12)


def test_a_file_is_created_once_and_never_changed_by_a_later_creation(tmp_path: Path) -> None:
    url = f"{tmp_path}/a/b/unit"
    assert storage.put_new(url, b"first")
    assert not storage.put_new(url, b"second")
    assert storage.read_bytes(url) == b"first"
    assert everything_below(tmp_path) == ["a/b/unit"]


def test_of_many_threads_that_create_one_file_exactly_one_wins(tmp_path: Path) -> None:
    for round_ in range(20):
        url, wins, barrier = f"{tmp_path}/{round_}", [], threading.Barrier(8)

        def create(i: int, url: str = url, wins: list[int] = wins, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            if storage.put_new(url, b"%d" % i):
                wins.append(i)

        threads = [threading.Thread(target=create, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(wins) == 1
        assert storage.read_bytes(url) == b"%d" % wins[0]
    assert everything_below(tmp_path) == sorted(str(round_) for round_ in range(20))


def test_creating_a_file_removes_what_a_killed_writer_of_it_left(tmp_path: Path) -> None:
    (tmp_path / ".tmp-unit-0123456789ab").write_bytes(b"half of a fi")
    (tmp_path / ".tmp-unit2-0123456789ab").write_bytes(b"of another file")
    storage.put_new(f"{tmp_path}/unit", b"whole")
    assert everything_below(tmp_path) == [".tmp-unit2-0123456789ab", "unit"]
    (tmp_path / ".tmp-unit-0123456789ab").hardlink_to(tmp_path / "unit")  # killed right after the file got its name
    assert not storage.put_new(f"{tmp_path}/unit", b"whole")
    assert everything_below(tmp_path) == [".tmp-unit2-0123456789ab", "unit"]


def test_replacing_leaves_the_old_bytes_when_the_disk_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{tmp_path}/f"
    storage.put(url, b"old")

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    message = f"cannot write '{url}': No space left on device (28); free space or choose another --out"
    with pytest.raises(StorageError) as caught:
        storage.put(url, b"new")
    assert str(caught.value) == message
    with pytest.raises(StorageError):
        storage.put_new(f"{tmp_path}/g", b"new")
    assert storage.read_bytes(url) == b"old"
    assert everything_below(tmp_path) == ["f"]


def test_writing_below_a_file_says_so_in_one_sentence(tmp_path: Path) -> None:
    storage.put(f"{tmp_path}/f", b"")
    with pytest.raises(StorageError, match=r"^cannot write '.*/f/g': .*(20|17)\); choose another --out$"):
        storage.put_new(f"{tmp_path}/f/g", b"x")


def test_removing_twice_is_fine_and_a_folder_is_no_file(tmp_path: Path) -> None:
    url = f"{tmp_path}/a/f"
    storage.put(url, b"")
    assert storage.exists(url)
    assert not storage.exists(f"{tmp_path}/a")
    storage.remove(url)
    storage.remove(url)
    assert not storage.exists(url)


def test_a_folder_is_copied_with_its_marker_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("raycap.json", "model.safetensors", "sub/z.json"):
        storage.put(f"{tmp_path}/from/{name}", name.encode())
    storage.put(f"{tmp_path}/to/raycap.json", b"of an older upload")
    order = []
    copy = local.copy

    def watched(source: Path, target: Path) -> None:
        order.append((target.name, storage.exists(f"{tmp_path}/to/raycap.json")))
        copy(source, target)

    monkeypatch.setattr(local, "copy", watched)
    storage.upload_folder(f"{tmp_path}/from", f"{tmp_path}/to", last="raycap.json")
    assert order == [("model.safetensors", False), ("z.json", False), ("raycap.json", False)]
    storage.download_folder(f"{tmp_path}/to", f"{tmp_path}/back")
    assert everything_below(tmp_path / "back") == everything_below(tmp_path / "from")
    assert storage.read_bytes(f"{tmp_path}/back/sub/z.json") == b"sub/z.json"


def test_copying_a_folder_without_its_marker_or_without_files_is_refused(tmp_path: Path) -> None:
    storage.put(f"{tmp_path}/from/x", b"")
    with pytest.raises(StorageError, match=r"there is no 'raycap.json' among its 1 files"):
        storage.upload_folder(f"{tmp_path}/from", f"{tmp_path}/to", last="raycap.json")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StorageError, match=r"^no files below '.*/empty' to download"):
        storage.download_folder(f"{tmp_path}/empty", f"{tmp_path}/to")


def test_removing_a_folder_takes_all_below_it_and_nothing_beside_it(tmp_path: Path) -> None:
    for name in ("a/x", "a/sub/y", "ab/z"):
        storage.put(f"{tmp_path}/{name}", b"1")
    storage.remove_folder(f"{tmp_path}/a")
    storage.remove_folder(f"{tmp_path}/a")  # not there any more
    assert [path.name for path in tmp_path.iterdir()] == ["ab"]


def test_lines_are_cut_at_their_ends_alone_wherever_a_chunk_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = b"\xef\xbb\xbfone\r\n\ntwo \x0b\xc2\x85three\rfour\nlast"
    (tmp_path / "f").write_bytes(content)
    for size in range(1, len(content) + 2):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        if size >= 3:  # a byte order mark is in one chunk
            assert list(storage.read_lines(f"{tmp_path}/f")) == [b"one", b"", b"two \x0b\xc2\x85three\rfour", b"last"]
    assert storage.read_head(f"{tmp_path}/f", 6) == b"one"


def test_names_that_are_not_utf8_are_listed_and_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / os.fsdecode(b"caf\xe9.jpg")).touch()
    assert list(storage.iter_names(str(tmp_path))) == [os.fsdecode(b"a/caf\xe9.jpg")]
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(StorageError, match="remove that link"):
        list(storage.iter_names(str(tmp_path)))


def test_names_stream_in_and_are_those_of_the_listing(tmp_path: Path) -> None:
    for name in ("b.jpg", "a/x.JPG", "a/b/ü.png", ".tmp-c.jpg-1234"):
        storage.put(f"{tmp_path}/{name}", b"x")
    names = storage.iter_names(str(tmp_path))
    assert iter(names) is names
    assert sorted(names) == ["a/b/ü.png", "a/x.JPG", "b.jpg"]
    with pytest.raises(
        StorageError, match=r"^cannot list '.*/nothing': No such file or directory \(2\); check the path$"
    ):
        list(storage.iter_names(f"{tmp_path}/nothing"))


def test_many_files_are_read_in_the_order_of_their_names_and_a_few_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    urls = [f"{tmp_path}/{i}" for i in range(10)]
    for i, url in enumerate(urls):
        storage.put(url, b"%d" % i)
    assert list(storage.read_each(urls[::-1])) == [b"%d" % i for i in range(9, -1, -1)]
    assert list(storage.read_each([])) == []
    monkeypatch.setattr(files, "_READ_AHEAD", 3)
    found = storage.read_each(urls)
    assert [next(found) for _ in range(6)] == [b"%d" % i for i in range(6)]
    storage.remove(urls[8])  # not read yet
    with pytest.raises(StorageError, match=r"^cannot read '.*/8': No such file"):
        list(found)


def test_a_failed_read_says_whether_that_one_file_is_at_fault(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    storage.put(f"{tmp_path}/file", b"")
    for name in ("gone", "folder", "loop", "file/below", "n" * 300):
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(f"{tmp_path}/{name}")
        assert storage.is_fault_of_file(caught.value), name
    for number, at_fault in ((errno.EIO, True), (errno.EACCES, True), (errno.ESTALE, False), (errno.EMFILE, False)):
        with pytest.raises(StorageError) as caught, local.errors("read", "/x"):
            raise OSError(number, os.strerror(number))
        assert storage.is_fault_of_file(caught.value) == at_fault, number
    (tmp_path / "loop").unlink()
    (entry,) = [entry for entry in storage.list_entries(str(tmp_path)) if entry.name == "file"]
    storage.put(f"{tmp_path}/file", b"replaced")
    with pytest.raises(storage.EntryError) as caught:
        storage.read_entry(str(tmp_path), entry)
    assert storage.is_fault_of_file(caught.value)
    assert not storage.is_fault_of_file(StorageError("the storage itself"))


def test_what_killed_processes_left_in_the_temporary_folder_is_swept_and_what_living_ones_use_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    nobody = int(Path("/proc/sys/kernel/pid_max").read_text()) + 1
    kept = {
        f"raycap-state-{os.getpid()}-abc",
        "raycap-state-abc",
        f"raycap-other-{nobody}-abc",
        f"raycap-state-{nobody}-new",
    }
    for name in (f"raycap-state-{nobody}-abc", *kept):
        (tmp_path / name / "x").mkdir(parents=True)
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    with storage.temporary_folder("state") as folder:
        assert {path.name for path in tmp_path.iterdir()} == {*kept, folder.name}
        (folder / "x").write_bytes(b"1")
    assert {path.name for path in tmp_path.iterdir()} == kept
