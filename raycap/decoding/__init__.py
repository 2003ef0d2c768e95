"""The search for a caption, by any model that fits protocol.py. Attention and caches belong to the models."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from raycap.decoding.beam import beam
from raycap.decoding.greedy import Decoded, greedy
from raycap.decoding.protocol import CaptionModel
from raycap.schema import DecodeSettings


def search(
    model: CaptionModel,
    state: Any,
    prompt_ids: Tensor,
    *,
    eos_id: int,
    settings: DecodeSettings,
    all_finished: Callable[[bool], bool] | None = None,
) -> list[list[Decoded]]:
    """settings.num_beams captions per image of `state`, best first; one beam is greedy search. Arguments: see greedy()."""
    if settings.num_beams > 1:
        return beam(model, state, prompt_ids, eos_id=eos_id, settings=settings, all_finished=all_finished)
    decoded = greedy(model, state, prompt_ids, eos_id=eos_id, settings=settings, all_finished=all_finished)
    return [[caption] for caption in decoded]
