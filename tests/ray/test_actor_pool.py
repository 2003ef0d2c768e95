"""raycap/data/actor_pool.py: a process that holds a model starts again from what it was given, without Ray's shared memory."""

import os
import signal
from pathlib import Path

import pytest
import ray.data
from ray.data import DataContext

from raycap.data.actor_pool import map_in_actors
from raycap.data.batch import Columns
from raycap.data.stream import quiet_context

pytestmark = pytest.mark.ray


class DiesOnce:
    """Adds a number; the first process of all is killed by its first block."""

    def __init__(self, mark: Path, number: int) -> None:
        self.mark, self.number = mark, number

    def __call__(self, block: Columns) -> Columns:
        if not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"id": block["id"] + self.number}


def test_actors_start_again_by_arguments_that_lie_in_no_object_store(
    ray_cluster: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with DataContext.current(quiet_context()):
        numbers = ray.data.range(8, override_num_blocks=4)
        added = map_in_actors(numbers, DiesOnce, (tmp_path / "mark", 100), concurrency=1, num_gpus=0, max_retries=3)
    assert sorted(row["id"] for row in added.iter_rows()) == list(range(100, 108))
    assert (tmp_path / "mark").exists()
    printed = "".join(capfd.readouterr())
    assert "constructor arguments in the object store" not in printed
