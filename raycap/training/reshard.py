"""Reads DeepSpeed's sharded optimizer state for another number of workers than wrote it.

Owns the layout of the files that `save_checkpoint` leaves under ZeRO. DeepSpeed 0.19.8 refuses to load them once the
number of ranks differs. Under stages 1 and 2 each parameter group is one flat vector: its parameters one after the other,
zeros up to a multiple of the number of ranks, cut into equal parts, and file r holds part r. So any part of another cut
can be put together from the old ones; each rank does it for itself, in memory, and none waits for another. Stage 0 keeps
the whole state in one file, which any number of ranks loads. Stage 3 cuts every parameter apart and is not converted.
"""

import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycap.errors import CheckpointError

MODEL_FILE = "mp_rank_00_model_states.pt"
_STATE, _BASE, _MASTERS = "optimizer_state_dict", "base_optimizer_state", "single_partition_of_fp32_groups"


def check_state(folder: Path, stage: int, num_workers: int) -> None:
    """Raises CheckpointError if a file of the state is missing or cut short, or if `num_workers` cannot load it."""
    num_ranks = len(read_states(folder)) if stage else 1
    for rank in range(num_ranks if stage == 3 else 1):
        check_whole(folder / (f"zero_pp_rank_{rank}_{MODEL_FILE}" if stage == 3 else MODEL_FILE))
    if stage == 3 and num_ranks != num_workers:
        raise CheckpointError(zero_3_refused(str(folder), num_ranks, num_workers))


def zero_3_refused(where: str, num_ranks: int, num_workers: int) -> str:
    """The sentence for a state of ZeRO 3 that another number of workers wants to load."""
    return (
        f"{where!r} holds the ZeRO 3 state of {num_ranks} workers, which cannot be shared out to {num_workers}; go on with "
        f"--num-workers {num_ranks}, or begin another --out with the weights of its last checkpoint as --init-from"
    )


def read_states(folder: Path) -> list[dict[str, Any]]:
    """The optimizer state of every rank that wrote one, in order, its tensors mapped from the files.

    Raises CheckpointError if a file is missing, damaged, or of another number of ranks than the first one.
    """
    first = _read(_rank_file(folder, 0))
    num_ranks = _num_ranks(first)
    states = [first] + [_read(_rank_file(folder, rank)) for rank in range(1, num_ranks)]
    odd = [rank for rank, state in enumerate(states) if _num_ranks(state) != num_ranks]
    if odd:
        others = f"is of {_num_ranks(states[odd[0]])} workers, and the file of rank 0 beside it of {num_ranks}"
        raise CheckpointError(_not_usable(_rank_file(folder, odd[0]), others))
    if _rank_file(folder, num_ranks).exists():
        raise CheckpointError(_not_usable(folder, f"holds the files of more than the {num_ranks} workers it is of"))
    return states


def read_share(folder: Path, rank: int, sizes: Sequence[int]) -> dict[str, Any]:
    """One rank's optimizer state under stage 1 or 2, as `load_state_dict` of DeepSpeed's optimizer takes it, on the CPU.

    sizes: elements of this rank's part of each parameter group, padding included; every rank's parts are as long. The
    files are mapped, not read as a whole: beside the pages of files in use, memory holds this rank's share alone, 12
    bytes an element under AdamW. Raises CheckpointError if a file is missing, cut short, or of another step than the rest.
    """
    saved = read_states(folder)
    groups = saved[0][_BASE]["param_groups"]
    assert len(groups) == len(sizes), (len(groups), len(sizes))
    assert not any(map(any, saved[0]["param_alignment_paddings"])), "DeepSpeed's zero_optimization.parameter_alignment"
    masters: list[Tensor] = []
    states: dict[int, dict[str, Tensor]] = {}
    for i, (group, size) in enumerate(zip(groups, sizes, strict=True)):
        (number,) = group["params"]  # the flat vector is the only parameter that the optimizer sees
        old_masters = [state[_MASTERS][i].detach() for state in saved]
        old_states = [state[_BASE]["state"][number] for state in saved]
        lengths = [len(master) for master in old_masters]  # without padding
        start = rank * size
        masters.append(_cut(old_masters, start, size))
        states[number] = {}
        for name, value in old_states[0].items():
            values = [state[name] for state in old_states]
            if value.ndim:
                pieces = [value[:length] for value, length in zip(values, lengths, strict=True)]
                assert [len(piece) for piece in pieces] == lengths, (name, lengths)
                states[number][name] = _cut(pieces, start, size)
            elif any(other != value for other in values):
                raise CheckpointError(_not_usable(folder, f"mixes files of steps {sorted({int(v) for v in values})}"))
            else:
                states[number][name] = value.clone()  # lest it keep the file mapped
    return {**saved[0], _BASE: {**saved[0][_BASE], "state": states}, _MASTERS: masters}


def _cut(pieces: Sequence[Tensor], start: int, size: int) -> Tensor:
    """Elements start..start+size-1 of the pieces put end to end, (size,); zeros beyond their end."""
    part = torch.zeros(size, dtype=pieces[0].dtype)
    first = 0
    for piece in pieces:
        low, high = max(start, first), min(start + size, first + len(piece))
        if low < high:
            part[low - start : high - start] = piece[low - first : high - first]
        first += len(piece)
    return part


def _num_ranks(state: dict[str, Any]) -> int:
    count = state["partition_count"]  # stage 3 has one number, the others one for each parameter group
    return int(count if isinstance(count, int) else count[0])


def _rank_file(folder: Path, rank: int) -> Path:
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"


def _read(path: Path) -> dict[str, Any]:
    check_whole(path)
    try:
        # Pickles: DeepSpeed's own classes stand in them. A run wrote them into its --out, and nothing else reads them;
        # DeepSpeed's loader opens the file of the weights beside them in the same way.
        state: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=False)[_STATE]
    except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(_not_usable(path, f"is damaged ({type(error).__name__})")) from error
    return state


def check_whole(path: Path) -> None:
    """A file of torch.save is a zip archive, whose directory is its end: without it, something was cut off."""
    if not path.is_file():
        raise CheckpointError(_not_usable(path, "is missing"))
    if not zipfile.is_zipfile(path):
        raise CheckpointError(_not_usable(path, f"is cut short at {path.stat().st_size} bytes"))


def _not_usable(path: Path, what: str) -> str:
    return (
        f"the run cannot be resumed: {str(path)!r} {what}; restore the folder from a copy, or begin another --out with the "
        f"weights of the run's last checkpoint as --init-from"
    )
