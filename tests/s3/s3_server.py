"""An S3 server as its own process on a loopback port, with the environment that makes it "S3" for raycap."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

BUCKET = "raycap-test"
PAGE = 10


@contextlib.contextmanager
def run_s3_server() -> Iterator[str]:
    """Yields the endpoint. The bucket BUCKET exists, AWS_* name the server; both are gone afterwards.

    A page of a listing has PAGE keys, so that few keys make several pages.
    """
    endpoint = f"http://127.0.0.1:{free_port()}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    before = {name: os.environ.get(name) for name in environment}
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", endpoint.rpartition(":")[2]]
    settings = {**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(PAGE)}
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=settings)
    try:
        wait_until_it_answers(endpoint, server)
        os.environ.update(environment)
        client().create_bucket(Bucket=BUCKET)
        yield endpoint
    finally:
        server.terminate()
        server.wait(10)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
