"""The log-probability of every caption is that of its tokens under the model, whatever rules or draws it was found by."""

import pytest
import torch
from drawn import cases, draw_images, draw_prompt, draw_search
from trained import KINDS, Banned, Family, family

from raycap.decoding.greedy import Decoded
from raycap.schema import DecodeSettings


@torch.no_grad()
def told(theirs: Family, rows: list[int], prompt: list[int], found: list[list[Decoded]]) -> list[float]:
    """The summed log-probability of each caption in one pass over its text, by code that is not ours."""
    start = [theirs.bos_id, *prompt]
    texts = [[*caption.ids, theirs.eos_id][: caption.num_tokens] for captions in found for caption in captions]
    images = [row for row, captions in zip(rows, found, strict=True) for _ in captions]
    longest = max(map(len, texts))
    ids = torch.tensor([[*start, *text] + [theirs.eos_id] * (longest - len(text)) for text in texts])
    log_probs = theirs.logits(theirs.pixels[images], ids[:, :-1])[:, len(prompt) :].log_softmax(-1)
    of_tokens = log_probs.gather(2, ids[:, len(start) :, None])[:, :, 0]
    return [float(row[: len(text)].double().sum()) for row, text in zip(of_tokens, texts, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_probability_of_a_caption_is_that_of_its_tokens_read_in_one_pass(kind: str) -> None:
    both = family(kind)
    counts = {"captions": 0, "ended": 0}

    def check(images: list[int], prompt: list[int], settings: DecodeSettings, banned: Banned) -> None:
        found = both.search(images, prompt, settings, banned, seeds=[1000 + image for image in images])
        captions = [caption for captions in found for caption in captions]
        counts["captions"] += len(captions)
        for caption, log_prob in zip(captions, told(both, images, prompt, found), strict=True):
            ended = len(caption.ids) < settings.max_new_tokens
            counts["ended"] += ended
            assert caption.num_tokens == len(caption.ids) + ended
            assert caption.log_prob == pytest.approx(log_prob, abs=1e-4)
            assert caption.score == pytest.approx(log_prob / caption.num_tokens, abs=1e-4)

    for random in cases(150, kind):
        check(draw_images(random), draw_prompt(random), *draw_search(random))
    assert counts["captions"] > 500
    assert counts["captions"] / 8 < counts["ended"] < counts["captions"]
