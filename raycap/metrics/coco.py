"""BLEU, METEOR, ROUGE-L and CIDEr as papers report them, through pycocoevalcap. Owns the child process that scores.

Two of the tools are Java programs. All of it runs in one child Python process with a process group of its own
(coco_child.py), so that nothing outlives a scoring: not at its end, at a time-out, at Ctrl-C, nor when this process is
killed. Scores equal a plain call of pycocoevalcap.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raycap.errors import RaycapError
from raycap.metrics.cider import check_pairs
from raycap.metrics.java import describe_exit, last_line

CHILD = "raycap.metrics.coco_child"
GRACE_S = 10.0  # the child ends itself that long after the time limit, for a parent that was stopped and cannot


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoScores:
    """Corpus values, 0 to 1, CIDEr 0 to 10 (papers print them times 100); cider_by_key: one value an image."""

    bleu_1: float
    bleu_2: float
    bleu_3: float
    bleu_4: float
    meteor: float
    rouge_l: float
    cider: float
    cider_by_key: dict[str, float]


def coco_scores(
    candidates: Mapping[str, str], references: Mapping[str, Sequence[str]], *, timeout_s: float = 1800
) -> CocoScores:
    """The COCO caption metrics of one candidate a key against its references.

    An empty candidate, or one of punctuation alone, is a caption without words: it scores 0 for its key, and the corpus
    values count it as upstream does. Line breaks inside a caption are read as spaces. 400 x 5 captions take about 4 s
    on 2 cores, 5,000 x 5 about 10 s. Several scorings may run at once.

    Raises ValueError where keys differ or a key has no reference (check_pairs) and for text that is not Unicode,
    RaycapError when the time is up or when a process of the scoring dies.
    """
    check_pairs(candidates, references)
    if not (timeout_s > 0 and math.isfinite(timeout_s)):
        raise ValueError(f"timeout_s must be a positive number of seconds, got {timeout_s}")
    captions = {"candidates": dict(candidates), "references": {key: list(references[key]) for key in candidates}}
    with tempfile.TemporaryDirectory(prefix="raycap-coco-", ignore_cleanup_errors=True) as folder:
        (Path(folder) / "captions.json").write_bytes(json.dumps(captions, ensure_ascii=False).encode())
        answer = _run_child(Path(folder), timeout_s, len(candidates))
    return CocoScores(**answer)


def _run_child(folder: Path, timeout_s: float, num_candidates: int) -> dict[str, Any]:
    errors = folder / "errors.txt"
    with open(errors, "wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD, str(folder), str(timeout_s + GRACE_S)],
            env=_child_environment(),
            stdin=subprocess.PIPE,  # never written to: the child sees it close when this process ends, however it ends
            stdout=output,  # pycocoevalcap prints
            stderr=output,
            start_new_session=True,
        )
    try:
        returncode = child.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise RaycapError(
            f"the COCO metrics of {num_candidates} candidates were not ready after {timeout_s:g} s, in child process "
            f"{child.pid} ({CHILD}), which was ended; give a longer timeout_s or a less busy machine"
        ) from None
    finally:
        _kill_group(child)
    if not (folder / "answer.json").exists():
        raise RaycapError(
            f"the scoring process of the COCO metrics ended with {describe_exit(returncode)} before it answered, its "
            f"last words were {last_line(errors)}, in {CHILD}; check the memory that is free and run this again"
        )
    answer = json.loads((folder / "answer.json").read_bytes())
    if "error" in answer:
        raise RaycapError(answer["error"])
    scores: dict[str, Any] = answer["scores"]
    return scores


def _child_environment() -> dict[str, str]:
    """This environment, where the child finds this very raycap whatever folder it was imported from."""
    root = str(Path(__file__).resolve().parents[2])
    inherited = os.environ.get("PYTHONPATH")
    return os.environ | {"PYTHONPATH": os.pathsep.join([root, inherited] if inherited else [root])}


def _kill_group(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and every process it started. The group keeps its number while one of them lives."""
    # All gone, when it says so; PermissionError is how macOS speaks of a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if child.stdin is not None:
        child.stdin.close()
