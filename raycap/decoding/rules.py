"""What a caption may not say: repetition, banned words, an end too early. As transformers' processors, in their order.

Shape suffixes: N text rows, L tokens of history (the prompt and what was generated), V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from raycap.schema import DecodeSettings

_64_BITS = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Rules:
    """banned: token ids of each text that may not be said."""

    eos_id: int
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    banned: tuple[tuple[int, ...], ...] = ()

    @classmethod
    def of(cls, settings: DecodeSettings, eos_id: int, banned: tuple[tuple[int, ...], ...]) -> "Rules":
        return cls(
            eos_id=eos_id,
            min_new_tokens=settings.min_new_tokens,
            repetition_penalty=settings.repetition_penalty,
            no_repeat_ngram_size=settings.no_repeat_ngram_size,
            banned=tuple(words for words in banned if words != (eos_id,)),  # as transformers: a caption may always end
        )

    def apply(self, scores_NV: Tensor, history_NL: Tensor, num_new_tokens: int) -> Tensor:
        """The scores (logits in greedy search and sampling, log-probabilities in beam search) with -inf for what is forbidden.

        num_new_tokens: how many were generated before.
        """
        if self.repetition_penalty != 1:
            said_NL = scores_NV.gather(1, history_NL)
            said_NL = torch.where(said_NL < 0, said_NL * self.repetition_penalty, said_NL / self.repetition_penalty)
            scores_NV = scores_NV.scatter(1, history_NL, said_NL)
        n = self.no_repeat_ngram_size
        if 0 < n <= history_NL.shape[1]:
            scores_NV = _forbid_repeated(scores_NV, history_NL, n)
        for words in self.banned:
            scores_NV = _forbid_after(scores_NV, history_NL, words)
        if num_new_tokens < self.min_new_tokens:
            scores_NV = scores_NV.index_fill(1, torch.tensor([self.eos_id], device=scores_NV.device), -torch.inf)
        return scores_NV


def _forbid_repeated(scores_NV: Tensor, history_NL: Tensor, n: int) -> Tensor:
    """No token that would end an n-gram of the history a second time."""
    windows_NWn = history_NL.unfold(1, n, 1)
    start_Nm = history_NL[:, history_NL.shape[1] + 1 - n :]
    repeats_NW = (windows_NWn[..., :-1] == start_Nm[:, None]).all(dim=-1)
    # A window that does not match forbids a place behind the vocabulary.
    V = scores_NV.shape[1]
    forbidden_NW = torch.where(repeats_NW, windows_NWn[..., -1], V)
    padded = torch.cat([scores_NV, scores_NV[:, :1]], dim=1)
    return padded.scatter(1, forbidden_NW, -torch.inf)[:, :V]


def _forbid_after(scores_NV: Tensor, history_NL: Tensor, words: tuple[int, ...]) -> Tensor:
    """No last token of `words` behind the others."""
    *first, last = words
    if len(first) > history_NL.shape[1]:
        return scores_NV
    begun_N = torch.ones(len(scores_NV), dtype=torch.bool, device=scores_NV.device)
    if first:
        begun_N = (history_NL[:, -len(first) :] == torch.tensor(first, device=history_NL.device)).all(dim=-1)
    scores_NV = scores_NV.clone()
    scores_NV[:, last] = scores_NV[:, last].masked_fill(begun_N, -torch.inf)
    return scores_NV


def keep_likeliest(logits_NV: Tensor, *, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Logits to draw from: divided by the temperature, then -inf but for the top_k likeliest tokens (0: all), then but for
    the likeliest whose probabilities together reach top_p.
    """
    logits_NV = logits_NV / temperature
    V = logits_NV.shape[1]
    if 0 < top_k < V:
        least_N1 = logits_NV.topk(top_k).values[:, -1:]
        logits_NV = logits_NV.masked_fill(logits_NV < least_N1, -torch.inf)
    if top_p < 1:
        sorted_NV, order_NV = logits_NV.sort(descending=False)
        dropped_NV = sorted_NV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        dropped_NV[:, -1] = False  # the likeliest always stays
        logits_NV = logits_NV.masked_fill(dropped_NV.scatter(1, order_NV, dropped_NV), -torch.inf)
    return logits_NV


def draw(logits_NV: Tensor, seeds_N: Tensor, seed: int, step: int) -> Tensor:
    """A token of each row, int64 (N,), drawn from the softmax of its logits.

    The number it is drawn by follows from (its row's seed, seed, step) alone, so neither batch nor place matter.
    """
    numbers_N = torch.tensor([_uniform(int(row), seed, step) for row in seeds_N.tolist()], dtype=torch.float64)
    sums_NV = logits_NV.double().softmax(dim=-1).cumsum(dim=-1)
    drawn_N1 = numbers_N.to(logits_NV.device)[:, None] * sums_NV[:, -1:]
    ids_N = torch.searchsorted(sums_NV, drawn_N1, right=True)[:, 0]
    # A number just below 1 must not run past the last token that may be said.
    last_N = (logits_NV > -torch.inf).long().cumsum(dim=-1).argmax(dim=-1)
    return ids_N.minimum(last_N)


def _uniform(*words: int) -> float:
    """A number in [0, 1) by splitmix64 over the words (Steele, Lea, Flood 2014)."""
    state = 0
    for word in words:
        state = (state ^ word) + 0x9E3779B97F4A7C15 & _64_BITS
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _64_BITS
        state = (state ^ state >> 27) * 0x94D049BB133111EB & _64_BITS
        state ^= state >> 31
    return (state >> 11) / 2**53
