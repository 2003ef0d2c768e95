"""raycap/cluster.py: whatever keeps a job from its Ray is one sentence, at once."""

import contextlib
import http.server
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycap import cluster
from raycap.errors import UserError


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(cluster, "_ADDRESS", "local")
    monkeypatch.setattr(
        cluster.ray, "is_initialized", lambda: False
    )  # another suite may have its cluster in this process


def refusal() -> str:
    with pytest.raises(UserError) as caught:
        cluster.connect(num_cpus=1, need="the test")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_session_folder_that_cannot_be_written_is_refused_before_ray_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    reasons = {
        f"{tmp_path}/file": "Not a directory",
        "/proc/nowhere": "No such file or directory",
        "relative": "not an absolute path",
    }
    for folder, reason in reasons.items():
        monkeypatch.setenv("RAY_TMPDIR", folder)
        said = refusal()
        assert said.startswith(f"cannot start Ray, which keeps its sockets and logs in '{folder}/ray': {reason}; ")
        assert "RAY_TMPDIR" in said
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(cluster, "_SESSION_BYTES", 2**62)  # more than any disk has
    assert refusal().startswith("cannot start Ray, which keeps its sockets and logs in ")
    assert not list((tmp_path / "ray").iterdir())


def test_whatever_ray_raises_when_it_starts_is_one_sentence(tmp_path: Path) -> None:
    script = """
from raycap import cluster
from raycap.errors import UserError
try:
    cluster.connect(num_cpus=1, need="the test")
except UserError as error:
    print(error)
"""
    # An OSError: longer than a socket's path may be.
    environment = {
        **os.environ,
        "RAY_TMPDIR": str(tmp_path / ("long" * 20)),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    said = done.stdout.strip()
    assert "\n" not in said
    assert said.startswith("cannot start Ray on this machine: ")
    assert "107 bytes" in said


@contextlib.contextmanager
def http_server() -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def test_an_address_that_is_none_of_a_ray_cluster_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with http_server() as port:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
        assert f"what answers at RAY_ADDRESS='127.0.0.1:{port}' is no Ray cluster; " in refusal()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        assert f"no Ray cluster answers at RAY_ADDRESS={address!r} within 3 s " in refusal()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:head")
    assert "which is not host:port" in refusal()
    assert "rpc_client" not in capfd.readouterr().err
