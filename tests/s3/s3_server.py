"""An S3 server as its own process on a loopback port, with the environment that makes it "S3" for raycap.

Requests reach it through a proxy that fails or delays some of them when a test says so, see `faults`.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BUCKET = "raycap-test"
PAGE = 10


@contextlib.contextmanager
def run_s3_server() -> Iterator[str]:
    """Yields the endpoint. The bucket BUCKET exists, AWS_* name the server; both are gone afterwards.

    A page of a listing has PAGE keys, so that few keys make several pages.
    """
    endpoint, upstream = f"http://127.0.0.1:{free_port()}", str(free_port())
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in environment}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", upstream]
    settings = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(command, env=settings, **quiet)
    proxied = [str(Path(__file__).with_name("s3_proxy.py")), endpoint.rpartition(":")[2], upstream]
    proxy = subprocess.Popen([sys.executable, *proxied], **quiet)
    try:
        wait_until_it_answers(f"http://127.0.0.1:{upstream}", server)
        wait_until_it_answers(endpoint, proxy)
        os.environ.update(environment)
        client().create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        for process in (proxy, server):
            process.terminate()
            process.wait(10)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def faults(endpoint: str, **faults: object) -> Iterator[dict[str, float]]:
    """While open, the server behaves as s3_proxy.py says of these faults. Filled at the end: what was done to requests."""
    done: dict[str, float] = {}
    _set_faults(endpoint, faults)
    try:
        yield done
    finally:
        done.update(_set_faults(endpoint, {}))


def _set_faults(endpoint: str, faults: dict[str, object]) -> dict[str, float]:
    with urllib.request.urlopen(f"{endpoint}/_faults?{urllib.parse.urlencode(faults)}", timeout=10) as reply:
        done: dict[str, float] = json.load(reply)
        return done


def client() -> Any:
    """A client of the server that owes nothing to raycap."""
    import boto3.session

    return boto3.session.Session().client("s3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_it_answers(endpoint: str, server: subprocess.Popen[bytes]) -> None:
    host, _, port = endpoint.removeprefix("http://").partition(":")
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the S3 server ended with {server.returncode}"
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1):
            return
        time.sleep(0.05)
    raise AssertionError(f"no S3 server at {endpoint} after 30 s")
