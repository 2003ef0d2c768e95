"""The endpoint on local Ray: what it answers, what it refuses, and what it costs, over real sockets."""

import re
import socket
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import ray
from clients import Got, ask, free_port, growth_during, raw, title, write_checkpoint
from tiny import png_images

from raycap.captioner import Captioner
from raycap.config import ServeConfig
from raycap.errors import CheckpointError, UserError
from raycap.schema import CaptionResult
from raycap.serving.run import start, stop

pytestmark = pytest.mark.ray
TIMEOUT_S = 5.0
MAX_QUEUE = 8
IMAGES = png_images(12)
MB = 2**20


@dataclass(frozen=True)
class Server:
    port: int
    checkpoint: str

    def post(self, body: object, query: str = "", **headers: str) -> Got:
        return ask(self.port, path=f"/v1/caption{query}", body=body, **headers)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "checkpoint")


@pytest.fixture(scope="module")
def server(ray_cluster: str, checkpoint: str) -> Iterator[Server]:
    config = ServeConfig(checkpoint=checkpoint, port=free_port(), request_timeout_s=TIMEOUT_S, max_queue=MAX_QUEUE)
    assert start(config) == f"http://127.0.0.1:{config.port}"
    yield Server(config.port, checkpoint)
    stop()
    with pytest.raises((ConnectionRefusedError, ConnectionResetError)):  # the second while the socket closes
        ask(config.port, "GET", "/healthz")


def test_a_caption_is_that_of_the_captioner_in_process(server: Server) -> None:
    captioner = Captioner.load(server.checkpoint)
    (expected,) = captioner.caption([IMAGES[0]])
    got = server.post(IMAGES[0], Content_Type="image/png")
    assert got.status == 200
    answer = got.json
    assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
    assert answer["log_prob"] == pytest.approx(expected.log_prob, abs=1e-4)
    assert answer | {"score": None, "log_prob": None} == {
        "caption": expected.caption,
        "score": None,
        "log_prob": None,
        "candidates": [],
        "match": None,
        "width": 40,
        "height": 50,
        "checkpoint": captioner.spec.fingerprint,
        "verified": True,
    }
    (model,) = ask(server.port, "GET", "/v1/models").json["models"]
    assert (model["fingerprint"], model["step"], model["image"]["size"]) == (captioner.spec.fingerprint, 3, 32)


@pytest.mark.parametrize("how", ["chunked", "declared", "one byte declared"])
def test_300_mb_are_refused_while_they_arrive_and_cost_little_memory(server: Server, how: str) -> None:
    chunk = b"x" * MB
    head = b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Type: image/jpeg\r\n%s\r\n\r\n"
    answers: list[bytes] = []

    def upload() -> None:
        if how == "chunked":
            pieces = [head % b"Transfer-Encoding: chunked", *[b"%x\r\n%s\r\n" % (MB, chunk)] * 300, b"0\r\n\r\n"]
        else:
            size = 300 * MB if how == "declared" else 1
            pieces = [head % b"Content-Length: %d" % size, *[chunk] * 300]
        answers.append(raw(server.port, *pieces))

    grown = growth_during(upload)
    print(f"300 MB, {how}: proxy and replicas grew by {grown / MB:.1f} MB at most")
    if how == "one byte declared":  # the rest is no request: the server says so, or just closes
        assert not answers[0].startswith(b"HTTP/1.1 200")
    else:
        assert answers[0].startswith(b"HTTP/1.1 413 ")
        assert b'"too_many_bytes"' in answers[0]
    assert grown < 64 * MB
    assert server.post(IMAGES[0]).status == 200


def test_requests_with_different_settings_at_once_get_what_each_gets_alone(server: Server) -> None:
    captioner = Captioner.load(server.checkpoint)
    settings = [{}, {"num_beams": 3}, {"max_new_tokens": 4}, {"num_beams": 3, "num_candidates": 2, "max_new_tokens": 6}]
    wanted = [(image, settings[n % 4]) for n, image in enumerate(IMAGES * 4)]

    def one(request: tuple[bytes, dict[str, int]]) -> Got:
        query = "&".join(f"{name}={value}" for name, value in request[1].items())
        while (got := server.post(request[0], f"?{query}" if query else "")).status == 429:
            time.sleep(0.05)
        return got

    with ThreadPoolExecutor(MAX_QUEUE) as threads:
        answers = list(threads.map(one, wanted))
    for got, (image, given) in zip(answers, wanted, strict=True):
        (expected,) = captioner.caption([image], captioner.spec.decode.override(**given))
        assert got.status == 200, got.body
        assert got.json["caption"] == expected.caption
        assert_candidates(got, expected)


def assert_candidates(got: Got, expected: CaptionResult) -> None:
    assert [c["caption"] for c in got.json["candidates"]] == [c.caption for c in expected.candidates]
    assert [c["score"] for c in got.json["candidates"]] == pytest.approx(
        [c.score for c in expected.candidates], abs=1e-5
    )


def test_every_refusal_has_its_status_and_the_one_shape(server: Server) -> None:
    port = server.port
    form = b'--b\r\nContent-Disposition: form-data; name="%s"; filename="a.png"\r\n\r\n' + IMAGES[0] + b"\r\n--b--\r\n"
    multipart = "multipart/form-data; boundary=b"
    for got, status, kind in [
        (server.post(b""), 422, "empty"),
        (server.post(b"<!doctype html><html>", Content_Type="image/jpeg"), 422, "not_an_image"),
        (server.post(IMAGES[0][: len(IMAGES[0]) // 2]), 422, None),
        (server.post(b"<html>", Content_Type="text/html"), 415, "unsupported_media_type"),
        (server.post(IMAGES[0], Content_Type="application/x-www-form-urlencoded"), 415, "unsupported_media_type"),
        (server.post(IMAGES[0], "?num_beams=11"), 400, "bad_request"),
        (server.post(IMAGES[0], "?max_new_tokens=4000"), 400, "bad_request"),
        (server.post(form % b"photo", Content_Type=multipart), 400, "bad_request"),
        (ask(port, "GET"), 405, "method_not_allowed"),
        (ask(port, "GET", "/v2"), 404, "not_found"),
        (server.post(b"x" * (20 * MB + 1)), 413, "too_many_bytes"),
    ]:
        assert got.status == status, got
        assert kind in (None, got.error_kind)
    assert server.post(form % b"image", Content_Type=multipart).status == 200
    assert ask(port, "GET", "/healthz").json == {"status": "ok"}
    assert ask(port, "GET", "/readyz").json == {"status": "ready"}
    assert "/v1/caption" in ask(port, "GET", "/openapi.json").json["paths"]


def test_the_largest_body_passes_and_its_content_decides(server: Server) -> None:
    padded = IMAGES[0] + b"\0" * (20 * MB - len(IMAGES[0]))  # decoders stop at the end of the image
    assert server.post(padded).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models"])
def test_monitors_may_ask_with_head(server: Server, path: str) -> None:
    got = ask(server.port, "HEAD", path)
    assert (got.status, got.body) == (200, b"")


def test_a_kept_connection_serves_again_and_again(server: Server) -> None:
    request = b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n%s\r\n" + IMAGES[1]
    size = len(IMAGES[1])
    answers = raw(server.port, request % (size, b"") * 3 + request % (size, b"Connection: close\r\n"))
    assert answers.count(b"HTTP/1.1 200 OK") == 4


def test_a_body_that_drips_ends_at_the_deadline_with_408(server: Server) -> None:
    head = b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    begun = time.monotonic()
    received = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(head)
        connection.settimeout(0.2)
        while not received.endswith(b"}"):
            connection.sendall(b"x")
            try:
                received += connection.recv(65536)
            except TimeoutError:
                assert time.monotonic() - begun < 4 * TIMEOUT_S
    assert TIMEOUT_S - 1 < time.monotonic() - begun < TIMEOUT_S + 5
    assert received.startswith(b"HTTP/1.1 408 ")
    assert b'"timeout"' in received


GARBAGE = {
    "a header name of bytes": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nx-\xff\xfe: 1\r\nContent-Length: 0\r\n\r\n",
    "a header value of bytes": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nserve_multiplexed_model_id: \xff\r\nContent-Length: 0\r\n\r\n",
    "a header of 1 MB": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nA: " + b"a" * MB + b"\r\nContent-Length: 0\r\n\r\n",
    "10,000 headers": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 10_000 + b"Content-Length: 0\r\n\r\n",
    "two lengths": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nxx",
    "a length and chunks": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a negative length": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    "a length that is no number": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: ten\r\n\r\n",
    "a chunk that is none": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 100,
    "a time-out of the client's own": b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nx-request-timeout-seconds: 0\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_refused_and_the_next_request_is_answered(server: Server, case: str) -> None:
    received = raw(server.port, GARBAGE[case], timeout=2)
    assert not received or re.match(rb"HTTP/1.1 4\d\d ", received), received[:200]
    assert server.post(IMAGES[0]).status == 200


def test_100_connections_at_once_get_captions_or_429_and_all_are_answered(server: Server) -> None:
    barrier = threading.Barrier(100)

    def one(n: int) -> Got:
        barrier.wait(60)
        return server.post(IMAGES[n % 12])

    with ThreadPoolExecutor(100) as threads:
        answers = list(threads.map(one, range(100)))
    statuses = {got.status for got in answers}
    assert statuses == {200, 429}
    for got in answers:
        if got.status == 429:
            assert (got.error_kind, got.headers["retry-after"]) == ("overloaded", "1")
    assert server.post(IMAGES[0]).status == 200


def test_of_12_large_uploads_at_once_those_that_fit_are_served(server: Server) -> None:
    body, barrier = b"x" * (19 * MB), threading.Barrier(12)

    def one(_: int) -> int:
        barrier.wait(60)
        return server.post(body).status

    with ThreadPoolExecutor(12) as threads:
        statuses = list(threads.map(one, range(12)))
    assert set(statuses) <= {422, 429}
    assert statuses.count(422) >= 8, statuses
    assert server.post(IMAGES[0]).status == 200


def test_a_client_that_goes_away_in_the_middle_is_only_counted(server: Server) -> None:
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(b"POST /v1/caption HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\nxxx")
    assert server.post(IMAGES[0]).status == 200


def test_a_request_id_comes_back_and_is_made_up_where_there_is_none(server: Server) -> None:
    assert server.post(IMAGES[0], X_Request_ID="mine-1").headers["x-request-id"] == "mine-1"
    made_up = {server.post(b"").headers["x-request-id"] for _ in range(2)}
    assert len(made_up) == 2


def test_a_captioner_that_is_killed_under_load_comes_back_and_clients_get_json_throughout(server: Server) -> None:
    done = threading.Event()
    answers: list[Got] = []

    def load() -> None:
        while not done.is_set():
            answers.append(server.post(IMAGES[0]))

    clients = [threading.Thread(target=load) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        while len(answers) < 8:
            time.sleep(0.01)
        (victim,) = [p for p in psutil.process_iter() if title(p).startswith("ray::ServeReplica:raycap:captioner")]
        victim.kill()
        killed = time.monotonic()
        before = len(answers)
        while time.monotonic() - killed < 60:
            time.sleep(0.05)
            if [got.status for got in answers[before + 8 :]][-8:] == [200] * 8 and ready(server):
                break
    finally:
        done.set()
        for client in clients:
            client.join()
    counts = Counter(got.status for got in answers)
    print(f"all well {time.monotonic() - killed:.1f} s after the kill; answers by status: {dict(counts)}")
    assert answers[-1].status == 200
    for got in answers:
        assert got.status in (200, 429, 503, 504), got
        assert got.status == 200 or got.error_kind in ("overloaded", "unavailable", "timeout")


def ready(server: Server) -> bool:
    return ask(server.port, "GET", "/readyz").status == 200


def test_a_second_server_on_the_cluster_is_refused_with_what_to_do(server: Server) -> None:
    with pytest.raises(UserError, match=rf"already runs on 127\.0\.0\.1:{server.port}"):
        start(ServeConfig(checkpoint=server.checkpoint, port=server.port))
    with pytest.raises(UserError, match=rf"already listens on 127\.0\.0\.1:{server.port} .*--port {server.port}"):
        start(ServeConfig(checkpoint=server.checkpoint, port=free_port()))
    assert server.post(IMAGES[0]).status == 200


def test_a_checkpoint_that_is_missing_or_damaged_is_refused_before_ray(checkpoint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        start(ServeConfig(checkpoint=str(tmp_path / "nowhere")))
    damaged = write_checkpoint(tmp_path / "damaged")
    path = Path(damaged) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        start(ServeConfig(checkpoint=damaged))


def test_captions_longer_than_the_model_reads_are_refused_before_ray(checkpoint: str) -> None:
    with pytest.raises(ValueError, match=r"max_new_tokens=1000 behind the prompt .* give at most"):
        start(ServeConfig(checkpoint=checkpoint, max_new_tokens=1000))


def test_more_captioners_than_cpus_are_refused(server: Server) -> None:
    with pytest.raises(UserError, match=r"needs 13 CPUs .*--num-replicas 12 .* has 8"):
        start(ServeConfig(checkpoint=server.checkpoint, num_replicas=12))


def test_the_metrics_port_of_the_node_counts_requests_and_seconds(server: Server) -> None:
    server.post(b"no image")
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    wanted = [
        r'ray_raycap_serve_requests_total\{.*path="/v1/caption".*status="200".*\} [1-9]',
        r'ray_raycap_serve_requests_total\{.*error_kind="not_an_image".*status="422".*\} [1-9]',
        r'ray_raycap_serve_requests_total\{.*error_kind="overloaded".*status="429".*\} [1-9]',
        r'ray_raycap_serve_requests_total\{.*error_kind="too_many_bytes".*status="413".*\} [1-9]',
        r'ray_raycap_serve_requests_total\{.*status="499".*\} [1-9]',
        r"ray_raycap_serve_request_seconds_bucket\{.*\} [1-9]",
        r"ray_raycap_serve_decode_seconds_count\{.*\} [1-9]",
        r"ray_raycap_serve_model_seconds_count\{.*\} [1-9]",
        r"ray_raycap_serve_batch_size_sum\{.*\} [1-9]",
        r"ray_raycap_serve_queue_length\{.*\} ",
    ]
    deadline = time.monotonic() + 40  # processes report every 10 s
    while True:
        with urllib.request.urlopen(url, timeout=10) as response:
            text = response.read().decode()
        missing = [pattern for pattern in wanted if not re.search(pattern, text)]
        if not missing or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    assert not missing, [line for line in text.splitlines() if "raycap" in line]
