"""raycap/storage and units.py on S3: one winner of every race, keys verbatim, sentences instead of stack traces."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, PAGE, client, faults, free_port, run_s3_server

from raycap import storage, units
from raycap.data import prepare
from raycap.data.pack import Packed
from raycap.data.spill import Unit
from raycap.errors import StorageError, StorageOutage
from raycap.shards import read_manifest, read_run
from raycap.storage import files, folders, s3

pytestmark = pytest.mark.s3
ROOT = f"s3://{BUCKET}"
ODD_KEYS = (
    "a//b.jpg",
    "./x.jpg",
    "../y.jpg",
    "/lead.jpg",
    "trail/",
    "ü/日本.JPG",
    "a b+c%20d.jpg",
    "q?versionId=1&x#y.jpg",
)


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with run_s3_server() as endpoint:
        yield endpoint


def test_keys_are_listed_and_read_verbatim(endpoint: str) -> None:
    root = f"{ROOT}/odd"
    for key in ODD_KEYS:
        client().put_object(Bucket=BUCKET, Key=f"odd/{key}", Body=key.encode())
    client().put_object(Bucket=BUCKET, Key="odd/", Body=b"")
    storage.put(f"{ROOT}/odd2/not-below", b"")
    for spelling in (root, root + "/"):
        names = storage.list_files(spelling)
        assert names == sorted(ODD_KEYS)
        assert [storage.read_bytes(storage.join(spelling, name)).decode() for name in names] == names
    assert storage.list_files(root, (".jpg",)) == sorted(key for key in ODD_KEYS if key != "trail/")
    for key in ODD_KEYS:
        assert not storage.put_new(storage.join(root, key), b"again")
        storage.remove(storage.join(root, key))
        assert not storage.exists(storage.join(root, key))


def test_a_listing_goes_on_after_its_first_page(endpoint: str) -> None:
    for i in range(2 * PAGE + 3):
        storage.put(f"{ROOT}/many/{i:05d}", b"")
    assert len(client().list_objects_v2(Bucket=BUCKET, Prefix="many/")["Contents"]) == PAGE
    assert storage.list_files(f"{ROOT}/many") == [f"{i:05d}" for i in range(2 * PAGE + 3)]


def test_names_are_asked_for_page_by_page(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    class Counts:
        """A client that counts its listings, and is busy once after the first."""

        def __init__(self, inner: Any) -> None:
            self.inner, self.pages, self.busy = inner, 0, 1

        def list_objects_v2(self, **request: Any) -> Any:
            if self.pages == 1 and self.busy:
                self.busy = 0
                raise ClientError({"Error": {"Code": "SlowDown", "Message": ""}}, "ListObjectsV2")
            self.pages += 1
            return self.inner.list_objects_v2(**request)

    for i in range(2 * PAGE + 3):
        storage.put(f"{ROOT}/pages/{i:05d}", b"")
    counting = Counts(s3._client())
    monkeypatch.setattr(s3, "_client", lambda: counting)
    monkeypatch.setattr(s3, "_BUSY_DELAYS_S", (0.0,))
    names, seen = storage.iter_names(f"{ROOT}/pages/"), []
    for i, name in enumerate(names):
        seen.append(name)
        assert counting.pages == i // PAGE + 1
    assert (counting.pages, seen) == (3, [f"{i:05d}" for i in range(2 * PAGE + 3)])


def test_a_server_that_repeats_a_page_ends_the_listing(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def list_objects_v2(self, **request: Any) -> Any:  # noqa: ARG002
            return {"Contents": [], "KeyCount": 0, "IsTruncated": True, "NextContinuationToken": "same"}

    monkeypatch.setattr(s3, "_client", Stuck)
    with pytest.raises(StorageError, match=rf"^cannot list '{ROOT}/x': the server answers with the same page again"):
        storage.list_files(f"{ROOT}/x")


def test_nothing_below_a_prefix_is_an_empty_list_and_a_missing_bucket_is_an_error(endpoint: str) -> None:
    assert storage.list_files(f"{ROOT}/nothing/here") == []
    assert units.done(f"{ROOT}/nothing/here", ".json") == set()
    for call in (storage.list_files, storage.read_bytes, lambda url: storage.put_new(url, b"")):
        with pytest.raises(StorageError, match=f"bucket 'no-such-bucket' does not exist at {endpoint}; create it"):
            call("s3://no-such-bucket/x")
    with pytest.raises(StorageError, match=rf"^cannot read '{ROOT}/gone': bucket '{BUCKET}' has no such key"):
        storage.read_bytes(f"{ROOT}/gone")


def test_a_range_is_exact_or_refused(endpoint: str) -> None:
    url = f"{ROOT}/range"
    storage.put(url, b"0123456789")
    assert storage.read_range(url, 3, 7) == b"3456"
    for start, stop in ((8, 12), (10, 11)):
        with pytest.raises(StorageError, match=r"cannot read"):
            storage.read_range(url, start, stop)


def test_lines_are_read_in_pieces_of_any_size(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = "\ufeffone\r\n\nzwei ü\nlast".encode()
    storage.put(f"{ROOT}/lines.tsv", content)
    for size in (3, 5, 7, len(content), 1000):
        monkeypatch.setattr(files, "CHUNK_BYTES", size)
        assert list(storage.read_lines(f"{ROOT}/lines.tsv")) == [b"one", b"", "zwei ü".encode(), b"last"]
    assert storage.read_head(f"{ROOT}/lines.tsv", 6) == b"one"
    storage.put(f"{ROOT}/empty.tsv", b"")
    assert list(storage.read_lines(f"{ROOT}/empty.tsv")) == []
    with pytest.raises(StorageError, match=r"cannot read '.*/gone\.tsv': bucket '.*' has no such key"):
        list(storage.read_lines(f"{ROOT}/gone.tsv"))


def test_an_object_that_is_gone_is_at_fault_and_a_server_or_bucket_that_is_gone_is_not(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(url: str) -> bool:
        with pytest.raises(StorageError) as caught:
            storage.read_bytes(url)
        return storage.is_fault_of_file(caught.value)

    storage.put(f"{ROOT}/fault", b"1")
    entry = next(entry for entry in storage.list_entries(ROOT) if entry.name == "fault")
    storage.put(f"{ROOT}/fault", b"2")
    with pytest.raises(storage.EntryError) as caught:
        storage.read_entry(ROOT, entry)
    assert storage.is_fault_of_file(caught.value)
    assert fault(f"{ROOT}/gone")
    assert not fault("s3://no-such-bucket/x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert not fault(f"{ROOT}/gone")


def test_of_eight_threads_that_create_one_object_exactly_one_wins(endpoint: str) -> None:
    for round_ in range(4):
        url, wins, barrier = f"{ROOT}/race/{round_}", [], threading.Barrier(8)

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


FORKS = """
import os, sys
from raycap import storage
from raycap.storage import s3
url = sys.argv[1]
storage.put(url + "-parent", b"the parent has a client, a lock and an open connection before it forks")
s3._clients_lock.acquire()  # as if another thread of the parent made a client right now
children = []
for i in range(8):
    if (pid := os.fork()) == 0:
        os._exit(10 + storage.put_new(url, b"%d" % i))
    children.append(pid)
print(sorted(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children))
"""


def test_of_eight_forked_processes_that_create_one_object_exactly_one_wins(endpoint: str) -> None:
    command = [sys.executable, "-c", FORKS, f"{ROOT}/forked"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == str([10] * 7 + [11]), done.stderr


def test_a_large_body_is_created_once_too(endpoint: str) -> None:
    url, size = f"{ROOT}/large", 60 * 2**20
    assert storage.put_new(url, b"1" * size)
    assert not storage.put_new(url, b"2" * size)
    assert storage.read_range(url, size - 3, size) == b"111"
    storage.remove(url)


def test_a_reply_that_got_lost_is_resolved_by_comparing(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from botocore.exceptions import ClientError

    class LosesTheFirstReply:
        def __init__(self, inner: Any) -> None:
            self.inner, self.puts = inner, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

        def put_object(self, **request: Any) -> Any:
            answer = self.inner.put_object(**request)
            self.puts += 1
            if self.puts == 1:
                raise ClientError({"Error": {"Code": "503", "Message": "after the object was stored"}}, "PutObject")
            return answer

    lossy = LosesTheFirstReply(s3._client())
    monkeypatch.setattr(s3, "_client", lambda: lossy)
    monkeypatch.setattr(s3, "_BUSY_DELAYS_S", (0.01,))
    assert not units.commit(f"{ROOT}/lost", b"ours")
    assert storage.read_bytes(f"{ROOT}/lost") == b"ours"
    with pytest.raises(StorageError, match="holds another run's 'lost'"):
        units.commit(f"{ROOT}/lost", b"theirs")


def test_a_busy_server_is_asked_again_and_a_broken_one_is_reported(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    monkeypatch.setattr(s3, "_BUSY_DELAYS_S", (0.0, 0.0))
    answers = ["SlowDown", "SlowDown", "ok", "SlowDown", "SlowDown", "SlowDown", "Teapot"]

    def request(client: object) -> str:
        if (code := answers.pop(0)) != "ok":
            raise ClientError({"Error": {"Code": code, "Message": ""}}, "GetObject")
        return code

    assert s3.call("read", f"{ROOT}/x", request) == "ok"
    for code in ("SlowDown", "Teapot"):
        with pytest.raises(StorageError, match=f"^cannot read '{ROOT}/x': {endpoint} answers {code} "):
            s3.call("read", f"{ROOT}/x", request)
    assert answers == []


def test_a_folder_goes_up_and_comes_back_with_its_marker_last(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"raycap.json": b"{}", "sub/z.json": b"z", "model.safetensors": os.urandom(9 * 2**20)}  # two parts
    for name, data in files.items():
        storage.put(f"{tmp_path}/from/{name}", data)
    url, order, upload = f"{ROOT}/checkpoint", [], folders._upload
    storage.put(f"{url}/raycap.json", b"of an older upload")

    def watched(source: str, target: str) -> None:
        order.append((target.removeprefix(url + "/"), storage.exists(f"{url}/raycap.json")))
        upload(source, target)

    monkeypatch.setattr(folders, "_upload", watched)
    storage.upload_folder(f"{tmp_path}/from", url, last="raycap.json")
    assert order == [("model.safetensors", False), ("sub/z.json", False), ("raycap.json", False)]
    storage.download_folder(url, f"{tmp_path}/back")
    assert {name: storage.read_bytes(f"{tmp_path}/back/{name}") for name in files} == files
    storage.put(f"{url}/../escape", b"")
    with pytest.raises(StorageError, match="is no file name; rename the key"):
        storage.download_folder(url, f"{tmp_path}/back")
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        storage.upload_folder(f"{tmp_path}/from", "s3://no-such-bucket/x", last="raycap.json")


def test_removing_a_folder_takes_all_keys_below_it_and_none_beside_it(endpoint: str) -> None:
    root = f"{ROOT}/remove"
    for name in ("a/x", "a/sub/y", "ab/z"):
        storage.put(f"{root}/{name}", b"1")
    storage.remove_folder(f"{root}/a")
    storage.remove_folder(f"{root}/a")  # not there any more
    assert storage.list_files(root) == ["ab/z"]


def test_an_endpoint_that_refuses_connections_fails_within_seconds(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", dead)
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"nothing answers at {dead} .*check AWS_ENDPOINT_URL and the network"):
        storage.list_files(f"{ROOT}/x")
    assert time.monotonic() - start < 12


def test_an_endpoint_that_drops_connections_fails_after_its_attempts(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert s3._ATTEMPTS * s3._CONNECT_TIMEOUT_S + 1 + 2 < 12  # with standard mode's longest backoff
    monkeypatch.setattr(s3, "_CONNECT_TIMEOUT_S", 0.2)
    with socket.socket() as full:  # its queue holds one connection; further ones get no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        queued = [socket.socket() for _ in range(2)]
        for waiting in queued:
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{full.getsockname()[1]}")
        with pytest.raises(StorageError, match=r"nothing answers at http://127.0.0.1:\d+ \(ConnectTimeoutError\)"):
            storage.exists(f"{ROOT}/x")
        for waiting in queued:
            waiting.close()


def test_a_storage_that_stops_answering_is_waited_for_and_then_an_outage(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_BUSY_DELAYS_S", (0.5, 0.5, 0.5, 0.5))
    storage.put(f"{ROOT}/there", b"1")
    with faults(endpoint, down_s=1.5):  # longer than botocore's own attempts
        assert storage.read_bytes(f"{ROOT}/there") == b"1"
    monkeypatch.setattr(s3, "_BUSY_DELAYS_S", (0.01,))
    with faults(endpoint, down_s=60), pytest.raises(StorageOutage, match="has stopped answering") as caught:
        storage.read_bytes(f"{ROOT}/there")
    assert caught.value.exit_code == 75


def test_an_endpoint_without_a_scheme_is_refused_with_the_url_to_write(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "localhost:9000")
    with pytest.raises(
        StorageError, match="AWS_ENDPOINT_URL is 'localhost:9000', which is no URL; write http://localhost:9000"
    ):
        storage.list_files(f"{ROOT}/x")


def test_public_and_requester_pays_buckets_are_read_by_a_setting(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client().put_object(Bucket=BUCKET, Key="public", Body=b"1", ACL="public-read")
    sent: list[Any] = []
    monkeypatch.setenv("RAYCAP_S3_REQUESTER_PAYS", "1")
    s3._client().meta.events.register("before-send.s3", lambda request, **_: sent.append(request.headers))
    assert storage.read_bytes(f"{ROOT}/public") == b"1"
    assert storage.list_files(ROOT)
    assert {headers["x-amz-request-payer"] for headers in sent} == {b"requester"}
    monkeypatch.delenv("RAYCAP_S3_REQUESTER_PAYS")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAYCAP_S3_ANONYMOUS", "1")
    s3._client().meta.events.register("before-send.s3", lambda request, **_: sent.append(request.headers))
    sent.clear()
    assert storage.read_bytes(f"{ROOT}/public") == b"1"
    assert all("Authorization" not in headers for headers in sent)


def test_a_worker_without_credentials_says_that_the_node_lacks_them(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "_IN_WORKER", True)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(
        StorageError, match=r"set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY on the Ray node '.*', and start Ray"
    ):
        storage.read_bytes(f"{ROOT}/x")


def test_missing_credentials_are_named(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(StorageError, match=r"there are no credentials for .*; set AWS_ACCESS_KEY_ID"):
        storage.read_bytes(f"{ROOT}/x")


def test_shards_prepared_on_s3_are_the_bytes_of_local_ones(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_sequence(units: Iterator[Unit], pack: Callable[[Unit], Packed], add: Any, doing: str) -> None:
        for unit in units:
            add(pack(unit))

    monkeypatch.setattr(prepare, "run_units", in_sequence)
    images = [{"id": i, "file_name": f"a/{i}.ü.jpg"} for i in range(30)]
    captions = [{"id": i, "image_id": i, "caption": f"caption {i}"} for i in range(30)]
    document = json.dumps({"images": images, "annotations": captions}).encode()
    for root in (str(tmp_path), f"{ROOT}/coco"):
        storage.put(f"{root}/captions.json", document)
        for i in range(30):
            storage.put(f"{root}/images/a/{i}.ü.jpg", b"image %d" % i * 100)
        prepare.prepare_shards(f"{root}/captions.json", f"{root}/images", f"{root}/out", samples_per_shard=8)
    names = storage.list_files(f"{tmp_path}/out")
    assert names == storage.list_files(f"{ROOT}/coco/out")
    plan = "_index/plan.json"  # names the images' root
    assert all(
        storage.read_bytes(f"{tmp_path}/out/{name}") == storage.read_bytes(f"{ROOT}/coco/out/{name}")
        for name in names
        if name != plan
    )
    manifest = read_manifest(f"{ROOT}/coco/out")
    local = read_manifest(f"{tmp_path}/out")
    assert manifest.fingerprint == local.fingerprint
    assert read_run(manifest, 1, 2, 5) == read_run(local, 1, 2, 5)
    with pytest.raises(StorageError, match=r"no shards at .*; run jobs/prepare_shards.py first"):
        read_manifest(f"{ROOT}/coco")
