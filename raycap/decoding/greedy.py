"""Greedy search: the most likely token at every step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycap.decoding.protocol import CaptionModel
from raycap.schema import DecodeSettings


@dataclass(frozen=True, slots=True)
class Decoded:
    """One caption as token ids, without prompt and end token.

    score: mean log-probability, under the model, of the generated tokens, the end token included.
    """

    ids: tuple[int, ...]
    score: float


def greedy(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    all_finished: Callable[[bool], bool] | None = None,
) -> list[Decoded]:
    """One caption per image of `state`, in order. prompt_ids: int64 (P,), P >= 1, on the model's device.

    all_finished: asked once per step whether all ranks of a distributed run may stop, given that this one may. Under
    ZeRO-3 every step gathers parameters from all ranks, so a rank that stops alone hangs the others.
    """
    decode_state = model.start(state, prompt_ids)
    ids_N = prompt_ids[-1].expand(decode_state.num_rows)
    finished_N = torch.zeros_like(ids_N, dtype=torch.bool)
    tokens, log_probs = [], []
    for num_new_tokens in range(settings.max_new_tokens):
        log_probs_NV = model.step(decode_state, ids_N).log_softmax(dim=-1)
        choices_NV = log_probs_NV
        if num_new_tokens < settings.min_new_tokens:
            choices_NV = log_probs_NV.index_fill(1, torch.tensor([eos_id], device=ids_N.device), -torch.inf)
        ids_N = choices_NV.argmax(dim=-1)
        tokens.append(ids_N)
        log_probs.append(log_probs_NV.gather(1, ids_N[:, None])[:, 0])
        finished_N |= ids_N == eos_id  # a finished row runs on; what follows its end token is cut off below
        finished = bool(finished_N.all())
        if all_finished(finished) if all_finished else finished:
            break
    rows = zip(torch.stack(tokens, dim=1).tolist(), torch.stack(log_probs, dim=1).tolist(), strict=True)
    return [_cut(ids, scores, eos_id) for ids, scores in rows]


def _cut(ids: list[int], log_probs: list[float], eos_id: int) -> Decoded:
    length = ids.index(eos_id) if eos_id in ids else len(ids)
    generated = log_probs[: length + 1]  # the end token counts, where there is one
    return Decoded(tuple(ids[:length]), sum(generated) / len(generated))
