"""The three doors as README.md shows them: its snippet and its commands, run as they stand but for their paths."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Demo
from s3_server import free_port

from raycap.config import TrainConfig

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]


def blocks(language: str, heading: str = "Three doors") -> list[str]:
    """The code blocks of a section, in order."""
    section = (ROOT / "README.md").read_text().partition(f"## {heading}")[2].partition("\n## ")[0]
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", section, re.S)
    return found


@pytest.fixture(scope="module")
def paths(undisturbed: TrainConfig, demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the README's paths stand for here: a trained checkpoint, a folder of the test images, a place to write."""
    folder = tmp_path_factory.mktemp("doors")
    shutil.copytree(f"{demo.coco}/images/test", folder / "bucket")
    (folder / "bucket" / "page.jpg").write_bytes(b"<html>")
    return {
        "runs/demo/checkpoint": f"{undisturbed.out}/checkpoint",
        "runs/demo/data/bucket": str(folder / "bucket"),
        "/tmp/captions": str(folder / "captions"),
        ":8000/": f":{free_port()}/",
    }


def with_paths(text: str, paths: dict[str, str]) -> str:
    for shown, real in paths.items():
        text = text.replace(shown, real)
    return text


def in_program(paths: dict[str, str], heading: str = "Three doors") -> list[str]:
    (snippet,) = blocks("python", heading)
    done = subprocess.run(
        [sys.executable, "-c", with_paths(snippet, paths)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_snippet_prints_a_caption_and_an_error_kind(paths: dict[str, str]) -> None:
    caption, error = in_program(paths)
    assert caption.endswith(" None")
    assert len(caption.split()) > 2
    assert error == "None not_an_image"
    shown = blocks("text")[0].splitlines()
    assert shown[1] == error
    assert shown[0].endswith(" None")


def test_the_snippet_on_settings_prints_two_beams_and_two_draws(paths: dict[str, str]) -> None:
    lines = in_program(paths, "How a caption is found")
    assert len(lines) == 4
    means, sums = ([float(line.split()[place]) for line in lines] for place in (-2, -1))
    for line, mean, log_prob in zip(lines, means, sums, strict=True):
        num_words = len(line.split()) - 2
        assert log_prob <= mean * max(1, num_words) + 1e-6 < 1e-6  # a caption has at least as many tokens as words
    assert not any("photo" in line for line in lines)


def test_the_bulk_command_writes_one_row_per_file(ray_cluster: str, paths: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    command = shlex.split(with_paths(blocks("bash")[0], paths))
    done = subprocess.run(
        [sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = pq.read_table(Path(paths["/tmp/captions"]) / "data").to_pylist()
    assert sorted(row["key"] for row in rows) == sorted(
        path.name for path in Path(paths["runs/demo/data/bucket"]).iterdir()
    )
    assert [row["error_kind"] for row in rows if row["caption"] is None] == ["not_an_image"]


def test_the_endpoint_answers_the_curl_line_with_what_the_snippet_printed(
    ray_cluster: str, paths: dict[str, str]
) -> None:
    serve, curl = (with_paths(block, paths).strip() for block in blocks("bash")[1:3])
    url = shlex.split(curl)[-1]
    port = url.rpartition(":")[2].partition("/")[0]
    server = subprocess.Popen(
        [sys.executable, *shlex.split(serve)[1:], "--port", port], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout
        assert any(line.startswith("serving ") for line in server.stdout), "the server ended"
        answer = json.loads(subprocess.run(shlex.split(curl), capture_output=True, check=True, timeout=60).stdout)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
    assert server.returncode == 0
    assert f"{answer['caption']} None" == in_program(paths)[0]
    assert answer.keys() == json.loads(blocks("text")[2]).keys()
