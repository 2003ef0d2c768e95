"""Beam search for captions that hold every required word, however unlikely it is: grid beam search.

transformers 5 has no such search; this rule is ours, after Hokamp and Liu (2017, arXiv:1704.07138), with the banks of Post and
Vilar (2018, arXiv:1804.06609). The words have C tokens together. Bank c keeps the k = num_beams likeliest running texts of
which c tokens are met: with C - c more they hold every word, as required.py defines it; the prompt does not count. At each step

1. every text goes on with its 2 k likeliest tokens, and with the next token of every word that it lacks;
2. a text ends by the end token or at max_new_tokens, and only where it holds every word. The k best are kept, by
   log-probability / length ** length_penalty. An image is done as in beam.py: see DecodeSettings.early_stopping;
3. what can no longer hold a word within max_new_tokens is dropped, and each bank keeps its best.

A text competes only with texts that lack as many tokens, so one with every word is found wherever max_new_tokens leaves room
for C, unless rules forbid its tokens or the model gives them no probability at all.

Shape suffixes, beside those of protocol.py: k texts of a bank, R = k * (C + 1) rows of an image, L tokens generated so far, W
tokens that words need next, X tokens that a text may go on with.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor

from raycap.decoding.greedy import Decoded
from raycap.decoding.protocol import CaptionModel
from raycap.decoding.required import Place, Required, Words
from raycap.decoding.rules import Rules
from raycap.schema import DecodeSettings


@dataclass(slots=True)
class _Text:
    """score: the sum of log-probabilities after the rules. sum: the same before them, under the model. row: of its image,
    the one that it goes on from.
    """

    ids: tuple[int, ...]
    score: float
    sum: float
    place: Place
    row: int = 0


@dataclass(slots=True)
class _Image:
    """running: texts, each in the row of its position; none once the image is done. finished: by rank, best first."""

    running: list[_Text]
    finished: list[tuple[float, Decoded]] = field(default_factory=list)

    def grow(
        self,
        rows: Sequence[list[list[float]]],
        num_new_tokens: int,
        num_before: int,
        required: Required,
        settings: DecodeSettings,
        eos_id: int,
    ) -> None:
        """One token more. rows: of each running text what it may go on with, as (id, score, log-probability). num_before: tokens of
        the prompt that a length counts, less one.
        """
        k, L, n = settings.num_beams, settings.max_new_tokens, num_new_tokens
        with_prompt, power = settings.length_counts_prompt, settings.length_penalty
        banks: defaultdict[int, list[_Text]] = defaultdict(list)
        for row, (text, found) in enumerate(zip(self.running, rows, strict=True)):
            for token, (score, log_prob) in {int(token): numbers for token, *numbers in found}.items():
                if math.isnan(log_prob):
                    self.running, self.finished = [], [(math.nan, Decoded((), math.nan, 1))]
                    return
                new_ids = () if token == eos_id else (token,)
                place = required.follow(text.place, token) if new_ids else text.place
                ends = token == eos_id or n == L
                fits = place.num_missing == 0 if ends else place.num_least <= L - n
                if score == -math.inf or not fits:
                    continue
                longer = _Text(text.ids + new_ids, text.score + score, text.sum + log_prob, place, row)
                if ends:
                    rank = longer.score / (num_before + n + (with_prompt and token != eos_id)) ** power
                    self.finished.append((rank, Decoded(longer.ids, longer.sum, n)))
                else:
                    banks[place.num_missing].append(longer)
        self.finished = sorted(self.finished, key=lambda ranked: ranked[0], reverse=True)[:k]
        self.running = [text for _, bank in sorted(banks.items()) for text in _likeliest(bank, k)]
        if self.running and len(self.finished) == k:
            longest = settings.early_stopping == "never" and power > 0
            hoped_length = num_before + (L + with_prompt if longest else n)
            hoped = max(text.score for text in self.running) / hoped_length**power
            if settings.early_stopping is True or hoped <= self.finished[-1][0]:
                self.running = []


def constrained(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    required: Words,
    goes_on: Callable[[int], bool] = lambda _: False,
    banned: tuple[tuple[int, ...], ...] = (),
    all_finished: Callable[[bool], bool] | None = None,
) -> list[list[Decoded]]:
    """The num_beams best captions per image of `state` that hold every word; fewer, or none, where no more were found.

    Of an image whose probabilities are no numbers, one whose score is NaN. required, goes_on: see required.py. Other arguments
    and scores: see beam().
    """
    k, device = settings.num_beams, prompt_ids.device
    rules, words = Rules.of(settings, eos_id, banned), Required(required, goes_on)
    R = k * (words.num_tokens + 1)
    decode_state = model.start(state, prompt_ids, R)
    N = decode_state.num_rows
    images = everyone = [_Image([_Text((), 0.0, 0.0, words.start)]) for _ in range(N // R)]
    said_NL = (prompt_ids if model.counts_prompt else prompt_ids[:0]).expand(N, -1)
    ids_N = prompt_ids[-1].expand(N)
    num_before = len(prompt_ids) - 1 if settings.length_counts_prompt else 0
    as_ids = partial(torch.tensor, dtype=torch.int64, device=device)
    for num_new_tokens in range(1, settings.max_new_tokens + 1):
        log_probs_NV = model.step(decode_state, ids_N).log_softmax(dim=-1)
        scores_NV = rules.apply(log_probs_NV, said_NL, num_new_tokens - 1)
        next_ids = _of_rows(images, R, lambda text: text.place.next_ids, ())
        W = max(map(len, next_ids), default=0)
        next_NW = as_ids([_filled(ids, W, eos_id) for ids in next_ids]).view(len(next_ids), W)
        likeliest_NX = scores_NV.topk(min(2 * k, scores_NV.shape[1])).indices
        ids_NX = torch.cat([likeliest_NX, next_NW], dim=1)
        numbers_NX3 = torch.stack(
            [ids_NX.double(), scores_NV.gather(1, ids_NX).double(), log_probs_NV.gather(1, ids_NX).double()], dim=2
        )
        rows = zip(numbers_NX3.tolist(), next_ids, strict=True)
        rows_N = [numbers[: likeliest_NX.shape[1] + len(ids)] for numbers, ids in rows]
        for i, image in enumerate(images):
            image.grow(rows_N[i * R :][: len(image.running)], num_new_tokens, num_before, words, settings, eos_id)
        kept = [i for i, image in enumerate(images) if image.running]
        if all_finished(not kept) if all_finished else not kept:
            break
        # A row without a text goes on from the first of its image, and nobody looks at what it says.
        parents_N = as_ids(_of_rows(images, R, lambda text: text.row, 0))
        parents_N += torch.arange(len(images), device=device).repeat_interleave(R) * R
        ids_N = as_ids(_of_rows(images, R, lambda text: text.ids[-1], eos_id))
        decode_state.reorder(parents_N)
        said_NL = torch.cat([said_NL[parents_N], ids_N[:, None]], dim=1)
        if 0 < len(kept) <= len(images) // 2:  # dropping copies what stays, so it waits until it is worth it
            decode_state.keep(as_ids(kept))
            images = [images[i] for i in kept]
            rows_kept = (as_ids(kept)[:, None] * R + torch.arange(R, device=device)).flatten()
            ids_N, said_NL = ids_N[rows_kept], said_NL[rows_kept]
    return [[decoded for _, decoded in image.finished] for image in everyone]


def _likeliest(texts: list[_Text], count: int) -> list[_Text]:
    return sorted(texts, key=lambda text: text.score, reverse=True)[:count]


def _of_rows(images: Sequence[_Image], num_rows: int, of_text: Callable[[_Text], Any], filling: Any) -> list[Any]:
    """A value for each row of the images: of the text in it, or the filling where there is none."""
    return [value for image in images for value in _filled(map(of_text, image.running), num_rows, filling)]


def _filled(values: Iterable[Any], length: int, filling: Any) -> list[Any]:
    return list(islice(chain(values, repeat(filling)), length))
