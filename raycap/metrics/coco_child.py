"""The process in which coco.py scores: `python -m raycap.metrics.coco_child FOLDER LIMIT_S`. Started by coco.py alone.

Owns the order of the work: tokenise, cut METEOR's table down, then METEOR in Java while Python computes the rest.
Reads FOLDER/captions.json, answers in FOLDER/answer.json. Its standard input is a lifeline: when it closes, the parent
is gone.
"""

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Thread
from typing import Any

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer import ptbtokenizer as upstream

from raycap.errors import RaycapError
from raycap.metrics.java import describe_exit, java_command, java_environment, last_line
from raycap.metrics.meteor import meteor, write_paraphrases

JAR = Path(str(upstream.__file__)).with_name(upstream.STANFORD_CORENLP_3_4_1_JAR)
LINE_BREAK = re.compile("[\n\r\v\f\u2028\u2029]")  # what the Java tokenizer takes for the end of a caption
MAX_HEAP_MIB = 1024  # it streams: 100 MiB are in use


def main() -> None:
    """Scores and writes the answer: {"scores": ...}, or {"error": sentence} for what the caller should read."""
    folder, limit_s = Path(sys.argv[1]), float(sys.argv[2])
    Thread(target=_end_with_parent, args=(folder, limit_s), daemon=True).start()
    captions = json.loads((folder / "captions.json").read_bytes())
    answer: dict[str, Any]
    try:
        answer = {"scores": score(captions["candidates"], captions["references"], folder)}
    except RaycapError as error:
        answer = {"error": str(error)}
    (folder / "answer.part").write_text(json.dumps(answer), encoding="utf-8")
    (folder / "answer.part").replace(folder / "answer.json")


def _end_with_parent(folder: Path, limit_s: float) -> None:
    """Kills this process's group, Java included, when the parent's end of standard input closes or time is up."""
    select.select([sys.stdin], [], [], limit_s)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)


def score(candidates: dict[str, str], references: dict[str, list[str]], folder: Path) -> dict[str, Any]:
    """The fields of CocoScores. Both mappings have the same keys, not none; folder: scratch space."""
    with ThreadPoolExecutor(2) as pool:
        # Two processes as upstream, not one: its tokenizer reads the last caption of a file differently ("the u.s.").
        flat = [caption for key in candidates for caption in references[key]]
        tokenized_flat = pool.submit(tokenize, flat, folder, "references")
        tokenized = tokenize(list(candidates.values()), folder, "candidates")
        lines = iter(tokenized_flat.result())
        results = {key: [caption] for key, caption in zip(candidates, tokenized, strict=True)}
        truths = {key: [next(lines) for _ in references[key]] for key in candidates}
        if not any(tokenized_flat.result()):
            raise RaycapError(
                f"no word is left of {len(flat)} references after tokenisation, the first is {flat[0]!r}, in the "
                f"references given to coco_scores; give references that hold words"
            )
        write_paraphrases([*tokenized, *tokenized_flat.result()], folder / "paraphrases.gz")
        meteor_scores = pool.submit(meteor, tokenized, list(truths.values()), folder / "paraphrases.gz")
        bleu, _ = Bleu(4).compute_score(truths, results, verbose=0)
        rouge_l, _ = Rouge().compute_score(truths, results)
        cider, cider_by_key = Cider().compute_score(truths, results)
        return {
            **{f"bleu_{n}": float(value) for n, value in enumerate(bleu, start=1)},
            "meteor": meteor_scores.result()[0],
            "rouge_l": float(rouge_l),
            "cider": float(cider),
            "cider_by_key": {key: float(value) for key, value in zip(candidates, cider_by_key, strict=True)},
        }


def tokenize(captions: Sequence[str], folder: Path, name: str) -> list[str]:
    """The captions' words joined by spaces, as pycocoevalcap's PTBTokenizer returns them: lower case, no punctuation.

    Upstream writes its scratch file into the installed package, which may be read-only; this writes into `folder`.
    Raises RaycapError if Java fails or loses a line.
    """
    path, errors = folder / f"{name}.txt", folder / f"{name}_errors.txt"
    path.write_bytes("\n".join(LINE_BREAK.sub(" ", caption) for caption in captions).encode())
    arguments = ["-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase", path.name]
    command = java_command(*arguments, max_heap_mib=MAX_HEAP_MIB)
    with open(errors, "wb") as stderr:
        done = subprocess.run(
            command, cwd=folder, env=java_environment(), stdout=subprocess.PIPE, stderr=stderr, check=False
        )
    lines = done.stdout.decode().split("\n")
    if done.returncode or len(lines) != len(captions):
        raise RaycapError(
            f"the PTB tokenizer's Java process ended with {describe_exit(done.returncode)} and {len(lines)} lines for "
            f"{len(captions)} {name}, its last words were {last_line(errors)}, in '{JAR}'; check that "
            f"{MAX_HEAP_MIB} MiB of memory are free and run this again"
        )
    dropped = set(upstream.PUNCTUATIONS)
    return [" ".join(word for word in line.rstrip().split(" ") if word not in dropped) for line in lines]


if __name__ == "__main__":
    main()
