"""Sampling: what is drawn from is what generate() draws from, and captions come as often as their probabilities say."""

from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from drawn import cases, draw_images, draw_prompt, draw_search, generate_options, processors
from torch import Tensor
from trained import KINDS, Banned, Family, family

from raycap.schema import DecodeSettings


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`:UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_draws_from_what_generate_draws_from(kind: str) -> None:
    """Ours is told what transformers drew, so that both go on from the same text."""
    both = family(kind, torch.float64)
    compared = {"steps": 0, "filtered": 0}

    @torch.no_grad()
    def check(images: list[int], prompt: list[int], settings: DecodeSettings, banned: Banned) -> None:
        settings = replace(settings, num_candidates=0)
        torch.manual_seed(len(images))
        options = generate_options(settings, banned)
        generated = both.generate(both.pixels[images], [both.bos_id, *prompt], options)

        def draw(logits_NV: Tensor, seeds_N: Tensor, _: int, step: int) -> Tensor:
            said_NL, scores_NV = generated.sequences[seeds_N], generated.scores[step][seeds_N]
            goes_on_N = (said_NL[:, :step] != both.eos_id).all(dim=1)
            torch.testing.assert_close(logits_NV.float()[goes_on_N], scores_NV[goes_on_N], rtol=1e-5, atol=1e-5)
            compared["steps"] += int(goes_on_N.sum())
            compared["filtered"] += int(scores_NV[goes_on_N].isinf().any(dim=1).sum())
            return said_NL[:, step]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(import_module("raycap.decoding.greedy"), "draw", draw)
            found = both.search(images, prompt, settings, banned, seeds=list(range(len(images))))
        for (caption,), said in zip(found, generated.sequences.tolist(), strict=True):
            assert list(caption.ids) == [*said, both.eos_id][: [*said, both.eos_id].index(both.eos_id)]

    for random in cases(60, kind):
        check(draw_images(random), draw_prompt(random), *draw_search(random, ["sample"]))
    assert compared["steps"] > 500
    assert compared["filtered"] > 300


@torch.no_grad()
def probabilities(theirs: Family, image: int, settings: DecodeSettings) -> dict[tuple[int, ...], float]:
    """Of every caption that may be drawn, the end token in it."""
    start = theirs.history([])
    rules = processors(settings, (), theirs.eos_id, len(start))
    running, finished = {(): 1.0}, {}
    for step in range(settings.max_new_tokens):
        texts = list(running)
        ids = torch.tensor([[theirs.bos_id, *text] for text in texts])
        history = torch.tensor([[*start, *text] for text in texts], dtype=torch.int64)
        logits = theirs.logits(theirs.pixels[[image] * len(texts)], ids)[:, -1]
        shares = rules(history, logits).softmax(-1)
        longer = {
            (*text, token): running[text] * float(row[token])
            for text, row in zip(texts, shares, strict=True)
            for token in row.nonzero()[:, 0].tolist()
        }
        ends = {
            text: p for text, p in longer.items() if text[-1] == theirs.eos_id or step + 1 == settings.max_new_tokens
        }
        finished |= ends
        running = {text: p for text, p in longer.items() if text not in ends}
    return finished


def p_value(counts: Counter[tuple[int, ...]], shares: dict[tuple[int, ...], float]) -> float:
    """Pearson's, of so many captions if their probabilities are these; captions of fewer than 5 are put together."""
    total, cells = sum(counts.values()), [(0.0, 0.0)]
    for text, share in shares.items():
        observed, expected = counts[text], share * total
        if expected < 5:
            cells[0] = (cells[0][0] + observed, cells[0][1] + expected)
        else:
            cells.append((observed, expected))
    chi_square = sum((observed - expected) ** 2 / expected for observed, expected in cells if expected)
    freedom = sum(expected > 0 for _, expected in cells) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2).double(), torch.tensor(chi_square / 2).double()))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_are_drawn_as_often_as_their_probabilities_say(kind: str) -> None:
    ours, theirs = family(kind), family(kind, torch.float64)
    images, seeds = [0, 1] * 4, torch.randint(2**62, (8,), generator=torch.Generator().manual_seed(2)).tolist()
    drawn: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
    for seed in range(10):
        settings = DecodeSettings(
            do_sample=True,
            max_new_tokens=3,
            num_candidates=100,
            temperature=1.5,
            top_k=8,
            top_p=0.95,
            repetition_penalty=1.2,
            seed=seed,
        )
        for image, captions in zip(images, ours.search(images, [], settings, seeds=seeds), strict=True):
            drawn[image].update((*c.ids, *[ours.eos_id] * (c.num_tokens - len(c.ids))) for c in captions)
    for image in (0, 1):
        assert sum(drawn[image].values()) == 4000
        shares = probabilities(theirs, image, settings)
        assert sum(shares.values()) == pytest.approx(1)
        assert drawn[image].keys() <= shares.keys()
        assert len(shares) > 20
        assert p_value(drawn[image], shares) > 1e-3
        warmer = probabilities(theirs, image, replace(settings, temperature=2.5))
        assert p_value(drawn[image], warmer) < 1e-6, "4,000 captions must tell these from others"
