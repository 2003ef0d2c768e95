"""raycap/decoding/rules.py: every rule is transformers' processor of that name, value for value."""

import pytest
import torch
from torch import Tensor
from transformers.generation import logits_process as theirs

from raycap.decoding.rules import Rules, keep_likeliest
from raycap.schema import DecodeSettings

EOS, V = 3, 17


def rows(seed: int, num_rows: int = 5, length: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    history = torch.randint(0, 6, (num_rows, length), generator=generator)  # few words: much is repeated
    return 3 * torch.randn(num_rows, V, generator=generator), history


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length", [1, 2, 9])
def test_repetition_penalty_divides_what_was_said(seed: int, length: int) -> None:
    scores, history = rows(seed, length=length)
    for penalty in (0.7, 1.0, 1.3):
        expected = theirs.RepetitionPenaltyLogitsProcessor(penalty)(history, scores.clone())
        assert torch.equal(Rules(eos_id=EOS, repetition_penalty=penalty).apply(scores, history, 4), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3, 9, 10])
def test_no_ngram_is_said_twice(seed: int, size: int) -> None:
    scores, history = rows(seed)
    expected = theirs.NoRepeatNGramLogitsProcessor(size)(history, scores.clone())
    assert torch.equal(Rules(eos_id=EOS, no_repeat_ngram_size=size).apply(scores, history, 4), expected)


@pytest.mark.parametrize("seed", range(5))
def test_banned_words_are_not_finished(seed: int) -> None:
    scores, history = rows(seed)
    banned = ((4,), (1, 2), (5, 5, 5), (0, 1), (2,) * 12)
    expected = theirs.NoBadWordsLogitsProcessor([list(words) for words in banned], eos_token_id=EOS)(history, scores)
    assert torch.equal(Rules(eos_id=EOS, banned=banned).apply(scores, history, 4), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_new_tokens", [0, 4, 5, 6])
def test_all_rules_together_are_transformers_processors_one_after_another(seed: int, num_new_tokens: int) -> None:
    scores, history = rows(seed)
    rules = Rules(eos_id=EOS, min_new_tokens=5, repetition_penalty=1.4, no_repeat_ngram_size=2, banned=((4,), (1, 2)))
    expected = scores
    for processor in (
        theirs.RepetitionPenaltyLogitsProcessor(1.4),
        theirs.NoRepeatNGramLogitsProcessor(2),
        theirs.NoBadWordsLogitsProcessor([[4], [1, 2]], eos_token_id=EOS),
        theirs.MinNewTokensLengthLogitsProcessor(history.shape[1] - num_new_tokens, 5, EOS),
    ):
        expected = processor(history, expected)
    assert torch.equal(rules.apply(scores, history, num_new_tokens), expected)
    assert bool(expected[:, EOS].isneginf().all()) == (num_new_tokens < 5)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 5, 1.0), (2.0, 0, 0.7), (1.3, 6, 0.4), (1.0, 99, 1e-6)]
)
def test_what_is_drawn_from_is_filtered_as_transformers_filters(
    seed: int, temperature: float, top_k: int, top_p: float
) -> None:
    scores, history = rows(seed)
    expected = theirs.TemperatureLogitsWarper(temperature)(history, scores)
    if top_k:
        expected = theirs.TopKLogitsWarper(top_k)(history, expected)
    if top_p < 1:
        expected = theirs.TopPLogitsWarper(top_p)(history, expected)
    assert torch.equal(keep_likeliest(scores, temperature=temperature, top_k=top_k, top_p=top_p), expected)


def test_a_caption_may_end_whatever_is_banned() -> None:
    settings = DecodeSettings(max_new_tokens=9)
    assert Rules.of(settings, EOS, ((EOS,), (4, EOS), (2,))).banned == ((4, EOS), (2,))
