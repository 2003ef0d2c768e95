"""cluster/serve.yaml through Ray Serve's own command line, as an operator deploys it: one caption over HTTP, then gone."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import _free_port
from tiny import png_images, tiny_checkpoint

from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, save_checkpoint

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
TOKEN = "a-token-of-this-test"
START_S = 240.0  # two cores that everything shares


def serve_cli(*arguments: str) -> str:
    """What `serve ...` printed, addressed to the test's cluster."""
    done = subprocess.run(
        [str(Path(sys.executable).with_name("serve")), *arguments, "--address", os.environ["RAYCAP_TEST_DASHBOARD"]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def ask(url: str, body: bytes | None = None, token: str = "") -> tuple[int, dict[str, Any]]:
    """Status and JSON of a request; 0 while nobody listens."""
    headers = {"Content-Type": "image/png"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
    except OSError:
        return 0, {}


@pytest.fixture
def checkpoint(tmp_path: Path) -> str:
    spec, model, _ = tiny_checkpoint()
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model), spec, {})
    return str(tmp_path / "checkpoint")


def config_for_test(checkpoint: str, port: int) -> dict[str, Any]:
    """cluster/serve.yaml with what an operator edits, and the token that on a cluster Ray's own environment holds."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster" / "serve.yaml").read_text())
    (application,) = config["applications"]
    application["args"] |= {"checkpoint": checkpoint, "port": port}
    config["http_options"]["port"] = port
    config["controller_options"]["runtime_env"]["env_vars"]["RAYCAP_TOKEN"] = TOKEN
    application["runtime_env"] = {"env_vars": {"RAYCAP_TOKEN": TOKEN}}
    return config


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_S
    while ask(f"{url}/readyz")[0] != 200:
        assert time.monotonic() < deadline, serve_cli("status")
        time.sleep(0.5)


def test_the_config_deploys_answers_as_the_library_does_and_is_gone_after_shutdown(
    ray_cluster: str, checkpoint: str, tmp_path: Path
) -> None:
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    file = tmp_path / "serve.yaml"
    file.write_text(yaml.safe_dump(config_for_test(checkpoint, port)))
    serve_cli("shutdown", "-y")  # whoever starts Serve chooses its address, so no other test's may run
    serve_cli("deploy", str(file))
    try:
        wait_until_ready(url)
        status = yaml.safe_load(serve_cli("status"))
        assert {name: app["status"] for name, app in status["applications"].items()} == {"raycap": "RUNNING"}

        (image,) = png_images(1)
        (expected,) = Captioner.load(checkpoint, device="cpu").caption([image])
        assert expected.caption
        code, answer = ask(f"{url}/v1/caption", image, TOKEN)
        assert (code, answer.get("caption")) == (200, expected.caption), answer

        code, answer = ask(f"{url}/v1/caption", image)
        assert (code, answer.get("error_kind")) == (401, "unauthorized"), answer
    finally:
        serve_cli("shutdown", "-y")
    assert ask(f"{url}/readyz")[0] == 0
