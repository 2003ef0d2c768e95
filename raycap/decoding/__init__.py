"""The search for a caption, by any model that fits protocol.py. Attention and caches belong to the models."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from raycap.decoding.beam import beam
from raycap.decoding.constrained import constrained
from raycap.decoding.greedy import Decoded, greedy
from raycap.decoding.protocol import CaptionModel
from raycap.decoding.required import Words
from raycap.schema import DecodeSettings


def search(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    banned: tuple[tuple[int, ...], ...] = (),
    required: Words = (),
    goes_on: Callable[[int], bool] = lambda _: False,
    image_seeds: Sequence[int] = (),
    all_finished: Callable[[bool], bool] | None = None,
) -> list[list[Decoded]]:
    """num_beams captions per image of `state`, best first, or one; of sampled ones num_candidates. Arguments: see greedy().

    required: words that every caption holds, see constrained(), which may find fewer captions, or none.
    """
    if required:
        return constrained(
            model,
            state,
            prompt_ids,
            eos_id=eos_id,
            settings=settings,
            required=required,
            goes_on=goes_on,
            banned=banned,
            all_finished=all_finished,
        )
    if settings.num_beams > 1:
        return beam(
            model, state, prompt_ids, eos_id=eos_id, settings=settings, banned=banned, all_finished=all_finished
        )
    return greedy(
        model,
        state,
        prompt_ids,
        eos_id=eos_id,
        settings=settings,
        banned=banned,
        image_seeds=image_seeds,
        all_finished=all_finished,
    )
