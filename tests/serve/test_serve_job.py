"""jobs/serve.py as users start and stop it, the token, other applications beside it, and the way of a Serve config file."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import ray
from clients import ask, free_port, growth_during, write_checkpoint
from ray import serve
from ray.serve import Application
from tiny import png_images

from raycap.errors import UserError
from raycap.serving.app import build

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
TOKEN = "only-for-this-test-7d1f"
IMAGE = png_images(1)[0]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("served") / "checkpoint")


def run(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "jobs/serve.py", *flags]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120, check=False
    )


@contextmanager
def job(*flags: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The running job and the lines it printed until it was ready."""
    process = subprocess.Popen(
        [sys.executable, "jobs/serve.py", *flags],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    lines: list[str] = []
    try:
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            if line.startswith("metrics "):
                break
        assert process.poll() is None, "".join(lines)
        yield process, lines
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def other_application() -> Application:
    @serve.deployment(name="other", ray_actor_options={"num_cpus": 0})
    class Other:
        def __call__(self) -> str:
            return "other"

    application: Application = Other.bind()  # type: ignore[attr-defined]
    return application


def test_any_address_but_loopback_needs_a_token_before_anything_starts(checkpoint: str) -> None:
    begun = time.monotonic()
    result = run("--checkpoint", checkpoint, "--host", "0.0.0.0", RAYCAP_TOKEN="", RAY_ADDRESS="127.0.0.1:9")
    assert result.returncode == 2, result.stderr
    assert "host '0.0.0.0' is not loopback" in result.stderr
    assert "RAYCAP_TOKEN" in result.stderr
    assert time.monotonic() - begun < 60


def test_a_port_in_use_is_named_with_what_to_do(ray_cluster: str, checkpoint: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run("--checkpoint", checkpoint, "--port", str(port))
    assert result.returncode == 2, result.stderr
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in result.stderr
    assert "--port" in result.stderr
    assert serve.status().proxies == {}


@pytest.fixture
def clean_serve(ray_cluster: str) -> Iterator[None]:
    yield
    serve.shutdown()


def test_a_job_with_a_token_serves_beside_another_application_and_stops_alone_on_sigterm(
    clean_serve: None, checkpoint: str
) -> None:
    port = free_port()
    flags = ["--checkpoint", checkpoint, "--port", str(port)]
    with job(*flags, RAYCAP_TOKEN=TOKEN) as (process, lines):
        assert f"serving http://127.0.0.1:{port}\n" in lines
        assert any(line.startswith("try     curl ") and "$RAYCAP_TOKEN" in line for line in lines)
        assert ask(port, body=IMAGE, Authorization=f"Bearer {TOKEN}").status == 200
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}):
            for method, path in (
                ("POST", "/v1/caption"),
                ("GET", "/v1/models"),
                ("GET", "/openapi.json"),
                ("GET", "/"),
            ):
                refused = ask(port, method, path, **headers)
                assert (refused.status, refused.error_kind) == (401, "unauthorized")
        assert ask(port, "GET", "/healthz").status == ask(port, "GET", "/readyz").status == 200
        assert ask(port, body=b"", Authorization=f"Bearer {TOKEN}", X_Request_ID="find-me").status == 422
        assert nowhere(TOKEN, lines)
        (line,) = logged("find-me")
        assert (line["status"], line["error_kind"], line["path"]) == (422, "empty", "/v1/caption")

        serve.run(other_application(), name="other", route_prefix="/other")
        assert ask(port, "GET", "/other").body == b"other"

        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        print(f"stopped {time.monotonic() - begun:.1f} s after SIGTERM")
        assert process.stdout
        assert "stopping" in process.stdout.read()
    assert set(serve.status().applications) == {"other"}
    assert ask(port, "GET", "/other").body == b"other"
    gone = ask(port, body=IMAGE, Authorization=f"Bearer {TOKEN}")
    assert (gone.status, gone.error_kind) == (503, "unavailable")


def logs() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs"


def logged(request_id: str) -> list[dict[str, object]]:
    """The lines of JSON about a request in the logs of Serve's processes."""
    lines = [line for log in (logs() / "serve").glob("*.log") for line in log.read_text().splitlines()]
    return [json.loads(line[line.index("{") :]) for line in lines if f'"{request_id}"' in line]


def nowhere(token: str, lines: list[str]) -> bool:
    """Whether the token is in nothing that was printed, logged, passed as an argument or told by Serve's status."""
    for log in logs().rglob("*"):
        assert not log.is_file() or token.encode() not in log.read_bytes(), log
    for process in psutil.process_iter():
        try:
            assert token not in " ".join(process.cmdline())
        except psutil.Error:
            continue
    assert token not in "".join(lines)
    return token not in str(serve.status())


@pytest.mark.parametrize("to_all", [False, True], ids=["Ctrl-C", "SIGTERM to the whole group"])
def test_a_signal_ends_the_job_with_0_and_ray_with_it(checkpoint: str, to_all: bool) -> None:
    port = free_port()
    with job("--checkpoint", checkpoint, "--port", str(port), RAY_ADDRESS="local") as (process, _):
        assert ask(port, body=IMAGE).status == 200
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) > 3
        if to_all:  # as timeout and service managers do: Ray gets it too
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive


def test_the_builder_of_a_config_file_serves_with_the_replicas_limits_alone(clean_serve: None, checkpoint: str) -> None:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})  # as `serve deploy` does: a proxy without our Door
    serve.run(build({"checkpoint": checkpoint, "max_body_bytes": 1_000_000, "num_beams": 2}), name="from-a-file")
    assert ask(port, body=IMAGE).status == 200
    (model,) = ask(port, "GET", "/v1/models").json["models"]
    assert model["decode"]["num_beams"] == 2
    refused = ask(port, body=[b"x" * 100_000] * 11)
    assert (refused.status, refused.error_kind) == (413, "too_many_bytes")
    assert ask(port, body=b"x" * 1_000_001).error_kind == "too_many_bytes"
    grown = growth_during(lambda: ask(port, body=[b"x" * 2**20] * 300))
    print(f"300 MB, chunked, without a Door in the proxy: proxy and replicas grew by {grown / 2**20:.1f} MB at most")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"chekpoint": "/x"}, "'chekpoint', which is no setting; did you mean 'checkpoint'"),
        ({"zzz": 1}, "there are checkpoint, scorer, host, port"),
        ({"checkpoint": "/x", "max_queue": 0}, "--max-queue must be at least 1, got 0"),
        ({"checkpoint": "/x", "max_queue": "many"}, "max_queue='many'"),
        ({"checkpoint": "/x", "device": "gpu"}, "device='gpu'"),
        ({"checkpoint": "/x", "host": "0.0.0.0"}, "host '0.0.0.0' is not loopback, so requests need a token"),
    ],
)
def test_args_of_a_config_file_that_are_unknown_or_wrong_are_named(args: dict[str, object], says: str) -> None:
    with pytest.raises(UserError) as raised:
        build(args)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)
