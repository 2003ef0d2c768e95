"""Drawn searches, the same in transformers' words, and when two captions that differ are a tie.

RAYCAP_TEST_CASES: how many searches are drawn that are compared with generate(); the full size is 1000.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import torch
from trained import NUM_IMAGES, WORDS, Banned, Change
from transformers import LogitsProcessorList
from transformers.generation import logits_process as theirs

from raycap.schema import DecodeSettings

NUM_CASES = int(os.environ.get("RAYCAP_TEST_CASES", "300"))
GAP = 1e-4  # captions may differ where a smaller gap between two scores decides
MAX_TIES = 0.005  # of all captions
HOW = ("greedy", "beam", "sample")


def cases(count: int, of: str) -> Iterator[Random]:
    """What each of so many cases is drawn from, the same ones every time.

    Not by hypothesis: it goes on from what it has drawn, and among 334 searches there were 66 different settings.
    """
    return (Random(f"{of} {number}") for number in range(count))


def draw_search(
    random: Random, how: Sequence[str] = HOW, *, words: Sequence[int] = WORDS, longest: int = 40
) -> tuple[DecodeSettings, Banned]:
    """Settings that do not contradict themselves, and banned ids. words: what is banned."""
    one_of = random.choice
    max_new_tokens = one_of([n for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 40) if n <= longest])
    shortest = [0, 36] if max_new_tokens == 40 else [0, 0, 0, 0, 1, 2, 4, 14]  # 36 are more than a cache begins with
    given: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min(one_of(shortest), max_new_tokens),
        "repetition_penalty": one_of([1.0, 1.0, 0.7, 1.3, 2.0]),
        "no_repeat_ngram_size": min(one_of([0, 0, 0, 1, 2, 3]), max_new_tokens),
    }
    match one_of(how):
        case "beam":
            given |= {
                "num_beams": one_of([2, 3, 5]),
                "length_penalty": one_of([1.0, -1.0, 0.0, 0.5, 2.0, -2.0]),
                "early_stopping": one_of([False, True, "never"]),
            }
        case "sample":
            given |= {
                "do_sample": True,
                "num_candidates": one_of([0, 1, 3]),
                "temperature": one_of([1.0, 0.5, 1.7]),
                "top_k": one_of([0, 0, 3, 20]),
                "top_p": one_of([1.0, 1.0, 0.9, 0.4]),
                "seed": one_of([0, 1, 2**40]),
            }
    # Half of these texts say a word two or three times, as captions do: others of that length are rarely begun.
    texts = [random.choices(words, k=one_of([1, 2, 3])) for _ in range(one_of([0, 0, 1, 3, 8]))]
    banned = [tuple(text if one_of([True, False]) else [text[0]] * len(text)) for text in texts]
    return DecodeSettings(**given), tuple(dict.fromkeys(banned))


def draw_images(random: Random, most: int = 6, *, num_images: int = NUM_IMAGES) -> list[int]:
    """Of a batch; some images may be in it twice."""
    return random.choices(range(num_images), k=random.randint(1, most))


def draw_prompt(random: Random, words: Sequence[int] = WORDS) -> list[int]:
    """What stands behind the first token."""
    return random.choices(words, k=random.randint(0, 3))


def generate_options(settings: DecodeSettings, banned: Banned) -> dict[str, Any]:
    names = ["max_new_tokens", "min_new_tokens", "repetition_penalty", "no_repeat_ngram_size", "num_beams", "do_sample"]
    if settings.num_beams > 1:
        names += ["length_penalty", "early_stopping"]
    if settings.do_sample:
        names += ["temperature", "top_k", "top_p"]
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    return options | ({"bad_words_ids": [list(words) for words in banned]} if banned else {})


def processors(settings: DecodeSettings, banned: Banned, eos_id: int, history_length: int) -> LogitsProcessorList:
    """transformers', in the order in which generate() applies them. history_length: of what they see of the prompt."""
    found = LogitsProcessorList()
    if settings.repetition_penalty != 1:
        found.append(theirs.RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.no_repeat_ngram_size:
        found.append(theirs.NoRepeatNGramLogitsProcessor(settings.no_repeat_ngram_size))
    if banned:
        found.append(theirs.NoBadWordsLogitsProcessor([list(words) for words in banned], eos_token_id=eos_id))
    if settings.min_new_tokens:
        found.append(theirs.MinNewTokensLengthLogitsProcessor(history_length, settings.min_new_tokens, eos_id))
    if settings.temperature != 1:
        found.append(theirs.TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        found.append(theirs.TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1:
        found.append(theirs.TopPLogitsWarper(settings.top_p))
    return found


def assert_tie(ours: Callable[[Change], Any], expected: Any) -> None:
    """Two captions that differ in float32 are a tie: in float64 they are equal, and a gap below GAP decides which it is.

    ours: what we find in float64 if all logits go through a change. expected: what the other one found in float64.
    """
    found = ours(lambda logits_NV: logits_NV)
    assert found == expected, "they differ in float64 too"

    def moved(seed: int) -> Change:
        generator = torch.Generator().manual_seed(seed)
        return lambda logits_NV: logits_NV + GAP * (torch.rand(logits_NV.shape, generator=generator) - 0.5)

    assert any(ours(moved(seed)) != found for seed in range(30)), f"no gap below {GAP} decides"
