"""Beam search: transformers' generate(num_beams=k, do_sample=False), token for token.

Shape suffixes, beside those of protocol.py: k beams, C = 2 k candidates of a step, L tokens generated at most.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycap.decoding.greedy import Decoded
from raycap.decoding.protocol import CaptionModel
from raycap.decoding.rules import Rules
from raycap.schema import DecodeSettings

# Added to the score of what must not be chosen (transformers' value). It is finite and added, not put in the place of
# the score, so that choices among the forbidden equal transformers' and a score that is not a number stays one.
FORBIDDEN = -1e9


@dataclass(slots=True)
class _Beams:
    """k texts of every image, best first. Tokens behind the end token are end tokens."""

    tokens_BkL: Tensor
    scores_Bk: Tensor
    """Of running texts the sum of log-probabilities, of finished ones that sum by their length to length_penalty."""
    sums_Bk: Tensor
    """Log-probability under the model, whatever rules made of it."""

    def best(self, scores_BX: Tensor, sums_BX: Tensor, tokens_BXL: Tensor) -> tuple["_Beams", Tensor]:
        """The k best of these X texts, as new beams, and which ones they are (B, k)."""
        scores_Bk, chosen_Bk = scores_BX.topk(self.scores_Bk.shape[1])
        return _Beams(_texts(tokens_BXL, chosen_Bk), scores_Bk, sums_BX.gather(1, chosen_Bk)), chosen_Bk

    def select(self, images: Tensor) -> "_Beams":
        return _Beams(self.tokens_BkL[images], self.scores_Bk[images], self.sums_Bk[images])

    def decoded(self, eos_id: int) -> list[list[Decoded]]:
        images = zip(self.tokens_BkL.tolist(), self.sums_Bk.tolist(), strict=True)
        return [[Decoded.cut(ids, log_prob, eos_id) for ids, log_prob in zip(*image, strict=True)] for image in images]


def beam(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    banned: tuple[tuple[int, ...], ...] = (),
    all_finished: Callable[[bool], bool] | None = None,
) -> list[list[Decoded]]:
    """The num_beams best captions per image of `state`, ranked by log-probability / length ** length_penalty.

    When an image is done and what a length is: see DecodeSettings. Arguments: see greedy().
    """
    k, L = settings.num_beams, settings.max_new_tokens
    rules = Rules.of(settings, eos_id, banned)
    decode_state = model.start(state, prompt_ids, k)
    B, device = decode_state.num_rows // k, prompt_ids.device
    tokens_BkL = torch.full((B, k, L), eos_id, device=device)
    prompt_BkP = (prompt_ids if model.counts_prompt else prompt_ids[:0]).expand(B, k, -1)
    nothing_Bk = torch.full((B, k), FORBIDDEN, device=device)
    nought_Bk = torch.zeros_like(nothing_Bk)
    running = _Beams(tokens_BkL, nothing_Bk.index_fill(1, tokens_BkL.new_zeros(1), 0.0), nought_Bk)  # all start alike
    finished = _Beams(tokens_BkL, nothing_Bk, nothing_Bk)
    open_B = torch.ones(B, dtype=torch.bool, device=device)
    images_B = torch.arange(B, device=device)  # of those not dropped yet: their places in the result
    results: list[list[Decoded]] = [[] for _ in range(B)]
    ids_N = prompt_ids[-1].expand(B * k)
    with_prompt, power = settings.length_counts_prompt, settings.length_penalty
    num_before = len(prompt_ids) - 1 if with_prompt else 0  # less one, because the end token is not counted then
    for num_new_tokens in range(1, L + 1):
        log_probs_NV = model.step(decode_state, ids_N).log_softmax(dim=-1)
        said_BkL = torch.cat([prompt_BkP[: len(open_B)], running.tokens_BkL[:, :, : num_new_tokens - 1]], dim=2)
        allowed_NV = rules.apply(log_probs_NV, said_BkL.flatten(0, 1), num_new_tokens - 1)
        V = log_probs_NV.shape[-1]
        totals_BkV = running.scores_Bk[:, :, None] + allowed_NV.view(-1, k, V)
        # Twice as many as beams, because up to k of them end a text and k must go on.
        totals_BC, index_BC = totals_BkV.flatten(1).topk(2 * k)
        parents_BC, words_BC = index_BC // V, index_BC % V
        sums_BC = running.sums_Bk.gather(1, parents_BC) + log_probs_NV.view(-1, k * V).gather(1, index_BC)
        texts_BCL = _texts(running.tokens_BkL, parents_BC)
        texts_BCL[:, :, num_new_tokens - 1] = words_BC
        ends_BC = (words_BC == eos_id) | (num_new_tokens == L)

        # A text among the second k may not finish: it is there only so that k can go on.
        may_finish_BC = ends_BC & (torch.arange(2 * k, device=device) < k) & open_B[:, None]
        if with_prompt:  # in transformers 4.15 what max_new_tokens cuts may, though it is among them
            may_finish_BC |= ends_BC & (words_BC != eos_id) & open_B[:, None]
        length = num_before + num_new_tokens
        ranks_BC = torch.where(
            words_BC == eos_id, totals_BC / length**power, totals_BC / (length + with_prompt) ** power
        )
        scores_BC = ranks_BC + ~may_finish_BC * FORBIDDEN
        finished, _ = finished.best(
            torch.cat([finished.scores_Bk, scores_BC], dim=1),
            torch.cat([finished.sums_Bk, sums_BC], dim=1),
            torch.cat([finished.tokens_BkL, texts_BCL], dim=1),
        )
        running, chosen_Bk = running.best(totals_BC + ends_BC * FORBIDDEN, sums_BC, texts_BCL)

        hoped_length = num_before + L + with_prompt if settings.early_stopping == "never" and power > 0 else length
        # transformers 4.15 hoped for the likeliest text also where that has just ended.
        best_B = totals_BC[:, 0] if with_prompt and not settings.early_stopping else running.scores_Bk[:, 0]
        best_running_B = best_B / hoped_length**power
        worst_finished_B = finished.scores_Bk.min(dim=1).values
        open_B = open_B & (best_running_B > worst_finished_B)
        if settings.early_stopping is True:
            open_B = open_B & (worst_finished_B < FORBIDDEN / 2)  # not all num_beams are finished
        num_open = 0 if num_new_tokens == L else int(open_B.sum())
        if all_finished(num_open == 0) if all_finished else num_open == 0:
            break
        parents_Bk = parents_BC.gather(1, chosen_Bk)
        decode_state.reorder((parents_Bk + k * torch.arange(len(parents_Bk), device=device)[:, None]).flatten())
        ids_Bk = words_BC.gather(1, chosen_Bk)
        if 0 < num_open <= len(open_B) // 2:  # dropping copies what stays, so it waits until it is worth it
            for place, decoded in zip(images_B.tolist(), finished.decoded(eos_id), strict=True):
                results[place] = decoded  # of an image still open, until it is overwritten
            kept = open_B.nonzero()[:, 0]
            decode_state.keep(kept)
            running, finished = running.select(kept), finished.select(kept)
            open_B, images_B, ids_Bk = open_B[kept], images_B[kept], ids_Bk[kept]
        ids_N = ids_Bk.flatten()
    for place, decoded in zip(images_B.tolist(), finished.decoded(eos_id), strict=True):
        results[place] = decoded
    return results


def _texts(tokens_BXL: Tensor, index_BY: Tensor) -> Tensor:
    """The texts at index_BY of each image (B, Y, L), as a copy."""
    return tokens_BXL.gather(1, index_BY[:, :, None].expand(-1, -1, tokens_BXL.shape[2]))
