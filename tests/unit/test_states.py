"""The states below a run's state/: verified, listed for Ray Train, and never removed on the word of a list."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import _CheckpointManagerState

from raycap import storage
from raycap.errors import CheckpointError, StorageError
from raycap.training import states as states_module
from raycap.training.states import POSITION, SNAPSHOT, list_states, seal_state


def write_state(root: Path, step: int, *, world: int = 2, sealed: bool = True) -> Path:
    """As the ranks of a run leave it: each its own files, rank 0 the position too."""
    folder = root / f"checkpoint_2026-01-01_00-00-{step:02d}.000000"
    for rank in range(world):
        part = root / f"rank {rank}"
        (part / "deepspeed").mkdir(parents=True)
        torch.save({"rank": rank, "values": torch.arange(1000)}, part / "deepspeed" / f"rank_{rank}.pt")
        if rank == 0:
            (part / POSITION).write_text(json.dumps({"step": step} | ({"num_workers": world} if sealed else {})))
        if sealed:
            seal_state(part, rank)
        shutil.copytree(part, folder, dirs_exist_ok=True)
        shutil.rmtree(part)
    return folder


def states(root: Path) -> list[int]:
    return sorted(int(path.name[-9:-7]) for path in root.iterdir() if path.is_dir())


def listed(root: Path) -> list[int]:
    """The steps that Ray Train reads from the list, the last one being where it goes on."""
    content = _CheckpointManagerState.parse_obj(json.loads((root / SNAPSHOT).read_text()))
    assert content.latest_checkpoint_result == content.checkpoint_results[-1]
    assert len(content.checkpoint_report_indices) == len(content.checkpoint_results)
    return [int(result.metrics["step"]) for result in content.checkpoint_results]


@pytest.mark.parametrize("content", [None, "", "[]", '{"checkpoint_results": [{"checkpoint_dir', "null", "{}"])
def test_a_list_that_is_missing_or_broken_is_written_anew_and_no_state_is_lost(
    tmp_path: Path, content: str | None
) -> None:
    write_state(tmp_path, 4)
    write_state(tmp_path, 8)
    if content is not None:
        (tmp_path / SNAPSHOT).write_text(content)
    assert list_states(str(tmp_path)) == []
    assert (states(tmp_path), listed(tmp_path)) == ([4, 8], [4, 8])


def test_only_the_last_two_states_stay_and_other_folders_are_left_alone(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write_state(tmp_path, step)
    (tmp_path / "other").mkdir()
    list_states(str(tmp_path))
    shutil.rmtree(tmp_path / "other")
    assert (states(tmp_path), listed(tmp_path)) == ([8, 12], [8, 12])


@pytest.mark.parametrize("damage", ["cut", "flipped", "missing", "no position"])
def test_a_damaged_state_is_named_and_the_one_before_it_is_used(tmp_path: Path, damage: str) -> None:
    write_state(tmp_path, 4)
    newest = write_state(tmp_path, 8)
    file = newest / "deepspeed" / "rank_1.pt"
    match damage:
        case "cut":
            file.write_bytes(file.read_bytes()[:-100])
        case "flipped":
            data = bytearray(file.read_bytes())
            data[700] ^= 1
            file.write_bytes(data)
        case "missing":
            file.unlink()
        case _:
            (newest / POSITION).write_text('{"st')
    (sentence,) = list_states(str(tmp_path))
    assert str(newest if damage == "no position" else file) in sentence
    assert "not used" in sentence
    assert (states(tmp_path), listed(tmp_path)) == ([4], [4])


def test_a_run_whose_only_state_is_damaged_is_refused_and_nothing_is_removed(tmp_path: Path) -> None:
    file = write_state(tmp_path, 4) / "deepspeed" / "rank_0.pt"
    file.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot be resumed: .*rank_0.pt' has 0 bytes.*--init-from"):
        list_states(str(tmp_path))
    assert states(tmp_path) == [4]


def test_a_state_that_was_cut_off_while_it_was_saved_counts_as_never_saved(tmp_path: Path) -> None:
    half = write_state(tmp_path, 4)
    (half / "files-1.json").unlink()
    assert list_states(str(tmp_path)) == [f"{str(half)!r} was not saved to its end: it is removed"]
    assert states(tmp_path) == []
    assert not (tmp_path / SNAPSHOT).exists()
    write_state(tmp_path, 8)
    (write_state(tmp_path, 12) / POSITION).unlink()
    assert len(list_states(str(tmp_path))) == 1
    assert (states(tmp_path), listed(tmp_path)) == ([8], [8])


def test_states_from_before_the_seals_are_used_if_their_files_are_whole(tmp_path: Path) -> None:
    write_state(tmp_path, 4, sealed=False)
    file = write_state(tmp_path, 8, sealed=False) / "deepspeed" / "rank_1.pt"
    list_states(str(tmp_path))
    assert listed(tmp_path) == [4, 8]
    file.write_bytes(file.read_bytes()[:-100])
    (sentence,) = list_states(str(tmp_path))
    assert "rank_1.pt" in sentence
    assert listed(tmp_path) == [4]


def test_a_run_that_has_not_begun_has_no_states(tmp_path: Path) -> None:
    assert list_states(str(tmp_path / "nowhere")) == []
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("lost", ["files-0.json", POSITION])
def test_several_states_without_what_ends_a_saving_are_refused_and_stay(tmp_path: Path, lost: str) -> None:
    for step in (4, 8):
        (write_state(tmp_path, step) / lost).unlink()
    with pytest.raises(CheckpointError, match=r"cannot be resumed: .* was not saved to its end, and no other state"):
        list_states(str(tmp_path))
    assert states(tmp_path) == [4, 8]


@pytest.mark.parametrize(
    "error", [StorageError("cannot read 'x': Input/output error"), OSError(5, "Input/output error")]
)
def test_a_state_that_cannot_be_read_now_is_not_called_damaged_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write_state(tmp_path, 4)
    newest = write_state(tmp_path, 8)

    def fail(path: object) -> None:
        if str(newest) in str(path):
            raise error

    read, digest = storage.read_bytes, states_module.sha256_of_file
    if isinstance(error, StorageError):
        monkeypatch.setattr(storage, "read_bytes", lambda url: fail(url) or read(url))
    else:
        monkeypatch.setattr(states_module, "sha256_of_file", lambda path: fail(path) or digest(path))
    with pytest.raises(StorageError, match="Input/output error"):
        list_states(str(tmp_path))
    assert states(tmp_path) == [4, 8]
