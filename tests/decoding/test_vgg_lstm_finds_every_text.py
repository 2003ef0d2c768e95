"""VGG16 and LSTM, which transformers has not: searches equal plain enumeration of all texts of a tiny vocabulary."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from drawn import cases, draw_prompt, draw_search, processors
from test_vgg_lstm import BOS_ID, EOS_ID, restated_logits, tiny_model
from torch import Tensor
from trained import Banned, Family

from raycap.decoding.greedy import Decoded
from raycap.schema import DecodeSettings

V = 5
WORDS = [token for token in range(V) if token != EOS_ID]
both_modes = pytest.mark.parametrize("attention", [False, True], ids=["show_and_tell", "show_attend_and_tell"])


def tiny(attention: bool, seed: int) -> Family:
    sizes = {"vocab_size": V, "hidden_size": 6, "embedding_size": 6, "image_size": 32}
    model = tiny_model(attention, seed=seed, **sizes).double()
    pixels = 3 * torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).double()
    return Family(model, BOS_ID, EOS_ID, pixels, lambda *texts: restated_logits(model.state_dict(), *texts))


@torch.no_grad()
def every_text(ours: Family, image: Tensor, prompt: list[int], settings: DecodeSettings, banned: Banned) -> list[Any]:
    """(what ranks it, as it is found) of each text that may be said, best first.

    As generate() counts with beams: rules change log-probabilities, and what they leave is summed and divided.
    """
    start = torch.tensor([ours.bos_id, *prompt])
    rules = processors(settings, banned, EOS_ID, len(start))
    texts, totals, sums = torch.empty(1, 0, dtype=torch.int64), torch.zeros(1).double(), torch.zeros(1).double()
    found = []
    for length in range(1, settings.max_new_tokens + 1):
        history = torch.cat([start.expand(len(texts), -1), texts], dim=1)
        log_probs = ours.logits(image.expand(len(texts), -1, -1, -1), history)[:, -1].log_softmax(-1)
        totals = (totals[:, None] + rules(history, log_probs)).flatten()
        sums = (sums[:, None] + log_probs).flatten()
        texts = torch.cat([texts.repeat_interleave(V, 0), torch.arange(V).repeat(len(texts))[:, None]], dim=1)
        ends = (texts[:, -1] == EOS_ID) | (length == settings.max_new_tokens)
        for i in (ends & totals.isfinite()).nonzero()[:, 0].tolist():
            words = tuple(token for token in texts[i].tolist() if token != EOS_ID)
            found.append((float(totals[i]) / length**settings.length_penalty, Decoded(words, float(sums[i]), length)))
        texts, totals, sums = texts[~ends], totals[~ends], sums[~ends]
    return sorted(found, key=lambda text: -text[0])


@both_modes
def test_a_beam_as_wide_as_all_texts_finds_them_in_the_order_of_their_scores(attention: bool) -> None:
    numbers = set()

    def check(prompt: list[int], settings: DecodeSettings, banned: Banned, seed: int) -> None:
        num_texts = sum(len(WORDS) ** length for length in range(settings.max_new_tokens + 1))
        # early_stopping=True counts what fills the beams in the place of texts that there are not, as generate() does.
        settings = replace(settings, num_beams=num_texts, early_stopping=settings.early_stopping and "never")
        ours = tiny(attention, seed)
        for i, found in enumerate(ours.search([0, 1], prompt, settings, banned)):
            expected = [text for _, text in every_text(ours, ours.pixels[i : i + 1], prompt, settings, banned)]
            assert [caption.ids for caption in found[: len(expected)]] == [text.ids for text in expected]
            assert [caption.num_tokens for caption in found[: len(expected)]] == [t.num_tokens for t in expected]
            sums = [caption.log_prob for caption in found[: len(expected)]]
            assert sums == pytest.approx([text.log_prob for text in expected], abs=1e-9)
            numbers.add(len(expected))

    for seed, random in enumerate(cases(60, "beam")):
        check(draw_prompt(random, WORDS), *draw_search(random, ["beam"], words=WORDS, longest=4), seed)
    assert len(numbers) > 20  # rules matter
    assert max(numbers) == 1 + 4 + 4**2 + 4**3 + 4**4


@both_modes
def test_greedy_search_says_what_a_plain_loop_says(attention: bool) -> None:
    lengths = set()

    def check(prompt: list[int], settings: DecodeSettings, banned: Banned, seed: int) -> None:
        ours = tiny(attention, seed)
        for i, (caption,) in enumerate(ours.search([0, 1], prompt, settings, banned)):
            text = torch.tensor([[ours.bos_id, *prompt]])
            rules, log_prob = processors(settings, banned, EOS_ID, text.shape[1]), 0.0
            for _ in range(settings.max_new_tokens):
                logits = ours.logits(ours.pixels[i : i + 1], text)[:, -1]
                token = rules(text, logits).argmax(-1)
                log_prob += float(logits.log_softmax(-1)[0, token])
                text = torch.cat([text, token[None]], dim=1)
                if token == EOS_ID:
                    break
            said = text[0, 1 + len(prompt) :].tolist()
            assert caption.ids == tuple(token for token in said if token != EOS_ID)
            assert caption.num_tokens == len(said)
            assert caption.log_prob == pytest.approx(log_prob, abs=1e-9)
            lengths.add(len(caption.ids))

    for seed, random in enumerate(cases(100, "greedy")):
        check(draw_prompt(random, WORDS), *draw_search(random, ["greedy"], words=WORDS), seed)
    assert len(lengths) > 5
