"""HTTP clients for the tests of the endpoint: http.client where a request is well formed, bare sockets where it is not."""

import http.client
import json
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from tiny import tiny_checkpoint

from raycap.checkpoint import export_weights, save_checkpoint


@dataclass
class Got:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def error_kind(self) -> str:
        assert set(self.json) == {"error_kind", "error"}
        assert self.headers["content-type"] == "application/json"
        assert len(self.headers["x-request-id"]) >= 1
        kind: str = self.json["error_kind"]
        return kind


def ask(
    port: int, method: str = "POST", path: str = "/v1/caption", body: Any = None, timeout: float = 60, **headers: str
) -> Got:
    """The answer to one request; body may be an iterable, which is sent in chunks."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, names, encode_chunked=not isinstance(body, bytes | None))
        return read(connection.getresponse())
    finally:
        connection.close()


def read(response: http.client.HTTPResponse) -> Got:
    headers = [(name.lower(), value) for name, value in response.getheaders()]
    assert len(dict(headers)) == len(headers), "a header came twice"
    return Got(response.status, dict(headers), response.read())


def raw(port: int, *pieces: bytes, timeout: float = 30) -> bytes:
    """What a socket gets back until the server closes it; sending ends early where the server resets it."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
            while part := connection.recv(65536):
                received += part
        except (ConnectionError, TimeoutError):
            pass
    return received


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_checkpoint(folder: Path, *, seed: int = 0) -> str:
    spec, model, _ = tiny_checkpoint(seed=seed)
    save_checkpoint(str(folder), export_weights(model), spec, {"step": 3})
    return str(folder)


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def growth_during(work: Callable[[], object]) -> int:
    """By how many bytes Serve's proxy and our two replicas grew together at most, by the kernel's own peak counters."""
    ours = [p for p in psutil.process_iter() if title(p).startswith(("ray::ProxyActor", "ray::ServeReplica:"))]
    assert len(ours) == 3
    before = {process.pid: process.memory_info().rss for process in ours}
    for pid in before:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts again from here
    work()
    peaks = {pid: re.search(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{pid}/status").read_text()) for pid in before}
    return sum(max(0, int(peak[1]) * 1024 - before[pid]) for pid, peak in peaks.items() if peak)
