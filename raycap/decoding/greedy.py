"""One text at a time for each row: the likeliest token at every step, or one that is drawn."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raycap.decoding.protocol import CaptionModel
from raycap.decoding.rules import Rules, draw, keep_likeliest
from raycap.schema import DecodeSettings


@dataclass(frozen=True, slots=True)
class Decoded:
    """One caption as token ids, without prompt and end token.

    log_prob: summed log-probability, under the model, of the generated tokens; num_tokens: how many, the end token included
    where there is one.
    """

    ids: tuple[int, ...]
    log_prob: float
    num_tokens: int

    @classmethod
    def cut(cls, ids: list[int], log_prob: float, eos_id: int) -> "Decoded":
        """Of token ids with end tokens behind the text, where it ends before they do."""
        length = ids.index(eos_id) if eos_id in ids else len(ids)
        return cls(tuple(ids[:length]), log_prob, min(length + 1, len(ids)))

    @property
    def score(self) -> float:
        """The mean in place of the sum: what captions of several lengths are compared by."""
        return self.log_prob / self.num_tokens


def greedy(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    banned: tuple[tuple[int, ...], ...] = (),
    image_seeds: Sequence[int] = (),
    all_finished: Callable[[bool], bool] | None = None,
) -> list[list[Decoded]]:
    """One caption per image of `state`, in order; num_candidates drawn ones where settings say do_sample.

    prompt_ids: int64 (P,), P >= 1, on the model's device. banned: token ids that must not follow each other. image_seeds: of
    each image, for do_sample.
    all_finished: asked once per step whether all ranks of a distributed run may stop, given that this one may. Under
    ZeRO-3 every step gathers parameters from all ranks, so a rank that stops alone hangs the others.
    """
    k = max(1, settings.num_candidates) if settings.do_sample else 1
    rules = Rules.of(settings, eos_id, banned)
    decode_state = model.start(state, prompt_ids, k) if k > 1 else model.start(state, prompt_ids)
    N, L, device = decode_state.num_rows, settings.max_new_tokens, prompt_ids.device
    B = N // k
    seeds_N = torch.tensor([seed ^ row for seed in image_seeds for row in range(k)], dtype=torch.int64, device=device)
    said_P = prompt_ids if model.counts_prompt else prompt_ids[:0]
    text_NL = torch.cat([said_P.expand(N, -1), torch.full((N, L), eos_id, device=device)], dim=1)
    sums_N = torch.zeros(N, dtype=torch.float64, device=device)
    open_N = torch.ones(N, dtype=torch.bool, device=device)
    rows_N = torch.arange(N, device=device)  # of those not dropped yet: their places in the result
    ids_N = prompt_ids[-1].expand(N)
    P = len(said_P)
    for step in range(L):
        logits_NV = model.step(decode_state, ids_N)
        choices_NV = rules.apply(logits_NV, text_NL[rows_N, : P + step], step)
        if settings.do_sample:
            kept_NV = keep_likeliest(
                choices_NV, temperature=settings.temperature, top_k=settings.top_k, top_p=settings.top_p
            )
            ids_N = draw(kept_NV, seeds_N[rows_N], settings.seed, step)
        else:
            ids_N = choices_NV.argmax(dim=-1)
        ids_N = ids_N.where(open_N, eos_id)  # a finished row runs on until it is dropped, and says nothing more
        text_NL[rows_N, P + step] = ids_N
        log_probs_NV = logits_NV.log_softmax(dim=-1)
        sums_N[rows_N] += log_probs_NV.gather(1, ids_N[:, None])[:, 0].double().where(open_N, 0.0)
        open_N = open_N & (ids_N != eos_id)
        open_B = open_N.view(-1, k).any(dim=1)
        num_open = int(open_B.sum())
        if all_finished(num_open == 0) if all_finished else num_open == 0:
            break
        if 0 < num_open <= len(open_B) // 2:  # dropping copies what stays, so it waits until it is worth it
            kept = open_B.nonzero()[:, 0]
            decode_state.keep(kept)
            rows = (kept[:, None] * k + torch.arange(k, device=device)).flatten()
            open_N, rows_N, ids_N = open_N[rows], rows_N[rows], ids_N[rows]
    texts = zip(text_NL[:, P:].tolist(), sums_N.tolist(), strict=True)
    captions = [Decoded.cut(ids, log_prob, eos_id) for ids, log_prob in texts]
    return [captions[image * k : image * k + k] for image in range(B)]
