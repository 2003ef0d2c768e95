"""The states that a run resumes from, below its state/: sealed file by file, verified before use, and listed for Ray Train.

Ray Train resumes from the last entry of a list that it writes in place, which a kill can cut short or leave behind. So the
list is written anew from the states that are there, before Ray Train reads it; none is removed on its word.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from raycap import storage
from raycap.checkpoint import sha256_of_file
from raycap.errors import CheckpointError, StorageError
from raycap.training.reshard import check_whole

SNAPSHOT = "checkpoint_manager_snapshot.json"  # Ray Train's list
POSITION = "position.json"
NUM_KEPT = 2
_SEAL = "files-{rank}.json"


def seal_state(folder: Path, rank: int) -> None:
    """Names every file that this rank wrote into the folder, by size and sha256; written last."""
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, sha256_of_file(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    (folder / _SEAL.format(rank=rank)).write_text(json.dumps(files))


@dataclass(frozen=True)
class _State:
    """step: -1 if it does not say. fault: why it cannot be resumed from, or "". is_whole: whether it was saved to its end."""

    name: str
    step: int
    fault: str
    is_whole: bool


def list_states(root: str) -> list[str]:
    """Verifies the states below root, keeps the last NUM_KEPT good ones and lists them for Ray Train. Returns what to say.

    A state whose saving was cut off counts as never saved. Removes nothing, and raises CheckpointError, if states were saved and none
    of them is good; StorageError, if one cannot be read, which says nothing of what is in it.
    """
    names = storage.list_files(root) if storage.is_url(root) or Path(root).exists() else []
    folders = sorted({name.partition("/")[0] for name in names if name.startswith("checkpoint_") and "/" in name})
    states = sorted((_verify(root, folder, names) for folder in folders), key=lambda state: (state.step, state.name))
    good = [state for state in states if not state.fault]
    damaged = [state for state in states if state.fault and state.is_whole]
    unfinished = [state for state in states if not state.is_whole]
    if not good and (damaged or len(unfinished) > 1):  # a run that was killed in its first saving left one
        raise CheckpointError(
            f"the run cannot be resumed: {(damaged or unfinished)[-1].fault}, and no other state below {root!r} is whole; restore that folder from a "
            f"copy, or begin another --out with the weights of the run's last checkpoint as --init-from"
        )
    said = [f"{state.fault}: this state is not used" for state in damaged if not 0 <= state.step < good[-1].step]
    said += [f"{state.fault}: it is removed" for state in unfinished]
    kept = good[-NUM_KEPT:]
    _write_list(root, kept)
    for state in states:
        if state not in kept:
            storage.remove_folder(storage.join(root, state.name))
    return said


def _verify(root: str, folder: str, names: list[str]) -> _State:
    """Local files are read whole; those of a store, which a put never leaves half-written, are looked up."""
    url = storage.join(root, folder)
    inside = {name.partition("/")[2] for name in names if name.startswith(f"{folder}/")}
    step, fault = -1, ""
    is_whole = POSITION in inside
    try:
        position = _read_object(storage.join(url, POSITION)) if is_whole else {"step": step}
        step = int(position["step"])
        seals = [_SEAL.format(rank=rank) for rank in range(position.get("num_workers", 0))]
        is_whole = is_whole and inside.issuperset(seals)
        if not seals:  # of a raycap before these seals
            for name in inside if not storage.is_url(url) else ():
                if name.endswith(".pt"):
                    check_whole(Path(url, name))
        files = [_read_object(storage.join(url, seal)) for seal in seals if seal in inside]
        for name, (size, digest) in (entry for of_rank in files for entry in of_rank.items()):
            if name not in inside:
                fault = f"{storage.join(url, name)!r} is missing"
            elif not storage.is_url(url) and Path(url, name).stat().st_size != size:
                fault = f"{storage.join(url, name)!r} has {Path(url, name).stat().st_size} bytes, not {size}"
            elif not storage.is_url(url) and sha256_of_file(Path(url, name)) != digest:
                fault = f"{storage.join(url, name)!r} is damaged"
    except (CheckpointError, ValueError, KeyError, TypeError) as error:
        fault = fault or f"{url!r} is damaged ({' '.join(str(error).split())})"
    except OSError as error:
        raise StorageError(
            f"cannot read the state {url!r}: {error.strerror or error}; run the same command again when it can be read"
        ) from error
    return _State(folder, step, fault or ("" if is_whole else f"{url!r} was not saved to its end"), is_whole)


def _read_object(url: str) -> dict[str, Any]:
    content = json.loads(storage.read_bytes(url))
    if not isinstance(content, dict):
        raise ValueError(f"{url!r} holds no JSON object")
    return content


def _write_list(root: str, states: list[_State]) -> None:
    """In the form that Ray Train reads (ray/train/v2, checkpoint_manager.py, _CheckpointManagerState)."""
    url = storage.join(root, SNAPSHOT)
    if not states:
        storage.remove(url)
        return
    results = [{"version": 0, "checkpoint_dir_name": s.name, "metrics": {"step": s.step}} for s in states]
    content = {
        "ray_version": ray.__version__,
        "checkpoint_results": results,
        "checkpoint_report_indices": list(range(len(results))),
        "latest_checkpoint_result": results[-1],
        "pending_training_results": [],
        "pending_validation_specs": [],
        "current_report_index": len(results),
        "validated_checkpoint_dir_names": [],
        "timed_out_validation_checkpoint_dir_names": [],
        "failed_validation_checkpoint_dir_names": [],
    }
    storage.put(url, json.dumps(content).encode())
