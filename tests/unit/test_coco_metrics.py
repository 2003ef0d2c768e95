"""The COCO metrics through their child process: scores, odd captions, and what is left when something dies.

tests/metrics compares them with a plain call of pycocoevalcap, which takes longer than a unit test may.
"""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from raycap.errors import RaycapError
from raycap.metrics.coco import CocoScores, coco_scores
from raycap.metrics.coco_child import tokenize
from raycap.metrics.meteor import meteor

needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are found through /proc")

CANDIDATES = {
    "plain": "a man rides a brown horse on the beach",
    "paraphrase": "two puppies are seated near a big sofa.",
    "empty": "",
    "punctuation": " ... ! ",
    "line breaks": "a red\nbus \r\n parked\u2028on the street\v",
    "separator": "a cat ||| on a mat|||",
    "unicode": "a caf\u00e9 table with cr\u00e8me br\u00fbl\u00e9e \U0001f600",
    "abbreviations": "the U.S. flag flies at 5:30 p.m.",
}
REFERENCES = {
    "plain": ["a person riding a horse along the shore", "a man on a horse at the ocean"],
    "paraphrase": ["Two small dogs sitting next to a large couch.", "a pair of dogs on the floor, by a couch"],
    "empty": ["a bowl of fruit", "some fruit in a bowl"],
    "punctuation": ["a stop sign", "a red sign that says stop"],
    "line breaks": ["a red bus parked on the street", "a bus that is parked"],
    "separator": ["a cat sits on the mat", "cat ||| mat"],
    "unicode": ["cr\u00e8me br\u00fbl\u00e9e on the table of a caf\u00e9", "a dessert"],
    "abbreviations": ["an american flag in the U.S.", "the flag of the u.s.a. flying in the evening"],
}


# A plain call of pycocoevalcap 1.2 on OpenJDK 17 gave these, with the line breaks above replaced by spaces: its own
# tokenizer would take each for the end of a caption and give every later image its neighbour's words.
BLEU = [0.5871331642339586, 0.42878143774646127, 0.32263243717059936, 0.26928202078075325]
METEOR = 0.3390804085349969
ROUGE_L = 0.40308530686182303
CIDER = 1.336748865732733
CIDER_BY_KEY = [
    0.991185171842164,
    0.16693853906042977,
    0.0,
    0.0,
    5.680284682488965,
    1.4516872567848211,
    1.4642243466719247,
    0.9396709290135605,
]


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> CocoScores:
    """One scoring of all captions above, with no java on PATH."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("no_java")))
        return coco_scores(CANDIDATES, REFERENCES)


def test_scores_are_those_of_a_plain_call_of_pycocoevalcap(scores: CocoScores) -> None:
    assert [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4] == pytest.approx(BLEU, rel=1e-12)
    assert scores.meteor == pytest.approx(METEOR, rel=1e-12)
    assert scores.rouge_l == pytest.approx(ROUGE_L, rel=1e-12)
    assert scores.cider == pytest.approx(CIDER, rel=1e-12)
    assert list(scores.cider_by_key) == list(CANDIDATES)
    assert list(scores.cider_by_key.values()) == pytest.approx(CIDER_BY_KEY, rel=1e-12)


def test_captions_without_words_score_zero_and_odd_ones_do_not_disturb_their_neighbours(scores: CocoScores) -> None:
    zero = {key for key, value in scores.cider_by_key.items() if value == 0}
    assert zero == {"empty", "punctuation"}


def test_keys_on_one_side_only_are_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="1 candidates have no references: 'x'"):
        coco_scores({"x": "a dog"}, {"y": ["a dog"]})
    with pytest.raises(ValueError, match="1 keys with references have no candidate: 'y'"):
        coco_scores({"x": "a dog"}, {"x": ["a dog"], "y": ["a dog"]})
    with pytest.raises(ValueError, match="got none"):
        coco_scores({}, {"y": ["a dog"]})
    with pytest.raises(ValueError, match="timeout_s must be a positive number of seconds, got 0"):
        coco_scores({"x": "a dog"}, {"x": ["a dog"]}, timeout_s=0)


def test_references_without_any_word_are_refused_with_the_first_of_them() -> None:
    with pytest.raises(RaycapError, match=r"no word is left of 2 references after tokenisation, the first is '\.\.\.'"):
        coco_scores({"x": "a dog"}, {"x": ["...", ""]})


MANY = 20_000  # captions: the tokenizer works on them for a second or more
MANY_CANDIDATES = {str(i): f"a man rides horse number {i} on the beach" for i in range(MANY)}
MANY_REFERENCES = {key: [caption] for key, caption in MANY_CANDIDATES.items()}


def processes() -> Iterator[tuple[int, int, int, str]]:
    """Every living process: id, parent, group, command line."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent, group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
                command = (folder / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # ended meanwhile
            if state not in "ZX":
                yield int(folder.name), int(parent), int(group), command


def wait_for(parent: int, command: str) -> tuple[int, int]:
    """Id and group of the first process of a scoring started by `parent` whose command line holds `command`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        living = list(processes())
        groups = {group for _, its_parent, group, line in living if its_parent == parent and "coco_child" in line}
        for process, _, group, line in living:
            if group in groups and command in line:
                return process, group
        time.sleep(0.01)
    raise AssertionError(f"no process with {command!r} appeared")


def assert_all_end(group: int) -> None:
    deadline = time.monotonic() + 20
    while left := [process for process in processes() if process[2] == group]:
        assert time.monotonic() < deadline, left
        time.sleep(0.02)


@needs_proc
@pytest.mark.parametrize(
    ("victim", "message"),
    [
        ("PTBTokenizer", "the PTB tokenizer's Java process ended with signal SIGKILL .* run this again"),
        ("coco_child", "the scoring process of the COCO metrics ended with signal SIGKILL before .* run this again"),
    ],
)
def test_a_killed_process_is_reported_and_takes_the_others_with_it(victim: str, message: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(coco_scores, MANY_CANDIDATES, MANY_REFERENCES)
        java, group = wait_for(os.getpid(), "PTBTokenizer")
        os.kill(java if victim == "PTBTokenizer" else group, signal.SIGKILL)
        with pytest.raises(RaycapError, match=message):
            scoring.result(timeout=60)
    assert_all_end(group)


@needs_proc
def test_a_time_out_is_reported_and_ends_every_process() -> None:
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(coco_scores, MANY_CANDIDATES, MANY_REFERENCES, timeout_s=0.7)
        _, group = wait_for(os.getpid(), "coco_child")
        with pytest.raises(RaycapError, match=r"20000 candidates were not ready after 0\.7 s, in child .* timeout_s"):
            scoring.result(timeout=60)
    assert_all_end(group)


@needs_proc
def test_processes_end_when_the_caller_is_killed_and_their_scratch_folder_goes(tmp_path: Path) -> None:
    script = (
        "from raycap.metrics.coco import coco_scores\n"
        f"captions = {{str(i): f'a man rides horse number {{i}}' for i in range({MANY})}}\n"
        "coco_scores(captions, {key: [caption] for key, caption in captions.items()})\n"
    )
    caller = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"TMPDIR": str(tmp_path)})
    _, group = wait_for(caller.pid, "PTBTokenizer")
    caller.kill()
    caller.wait()
    assert_all_end(group)
    assert list(tmp_path.iterdir()) == []


@needs_proc
def test_a_killed_meteor_is_reported_with_the_caption_it_was_at(tmp_path: Path) -> None:
    table = tmp_path / "paraphrases.gz"
    table.write_bytes(gzip.compress(b""))
    with ThreadPoolExecutor(1) as pool:
        scoring = pool.submit(meteor, ["a dog"] * 50_000, [["a dog"]] * 50_000, table)
        deadline = time.monotonic() + 60
        while not (found := [p for p, parent, _, line in processes() if parent == os.getpid() and "meteor" in line]):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(found[0], signal.SIGKILL)
        with pytest.raises(RaycapError, match=r"METEOR's Java process ended with signal SIGKILL at caption .* again"):
            scoring.result(timeout=60)


def test_the_tokenizer_keeps_one_line_a_caption(tmp_path: Path) -> None:
    captions = ["", "A dog.", "a\nb\rc\fd\ve\u2028f\u2029g", "...", "the U.S.", ""]
    assert tokenize(captions, tmp_path, "captions") == ["", "a dog", "a b c d e f g", "", "the u.s.", ""]
