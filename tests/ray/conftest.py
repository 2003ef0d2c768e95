"""Runs that several tests of this suite look at."""

from pathlib import Path

import pytest
from conftest import Demo
from runs import small_run

from raycap.config import TrainConfig


@pytest.fixture
def config(demo: Demo, tmp_path: Path) -> TrainConfig:
    """The small run, not started."""
    return small_run(demo, str(tmp_path / "run"))


@pytest.fixture(scope="session")
def undisturbed(demo: Demo, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The small run, run to its end."""
    from raycap.training.driver import train_blip

    config = small_run(demo, str(tmp_path_factory.mktemp("undisturbed") / "run"))
    train_blip(config)
    return config
