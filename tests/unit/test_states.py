"""The states below a run's state/: those that Ray Train lists stay, and all of them where its list cannot be read."""

import json
from pathlib import Path

from raycap.training.driver import SNAPSHOT, _drop_unlisted_states


def states(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_states_that_ray_does_not_list_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("checkpoint_old", "checkpoint_known", "checkpoint_new", "other"):
        (tmp_path / name / "deepspeed").mkdir(parents=True)
        (tmp_path / name / "deepspeed" / "x.pt").write_bytes(b"1")
    _drop_unlisted_states(str(tmp_path / "nowhere"))
    (tmp_path / SNAPSHOT).write_text('{"checkpoint_results": [{"checkpoint_dir')
    _drop_unlisted_states(str(tmp_path))
    assert states(tmp_path) == ["checkpoint_known", "checkpoint_new", "checkpoint_old", "other"]
    (tmp_path / SNAPSHOT).write_text(json.dumps({"checkpoint_results": [{"checkpoint_dir_name": "checkpoint_known"}]}))
    _drop_unlisted_states(str(tmp_path))
    assert states(tmp_path) == ["checkpoint_known", "other"]
