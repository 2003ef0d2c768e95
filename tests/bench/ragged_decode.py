"""Captions per second of CPU, greedy, 64 images at once: rows that leave when they end, against running to the longest.

BLIP base's text decoder over 577 states an image, fp32, one thread; no vision tower. Captions end where LENGTHS says: the
end token is forbidden before, and sure there. Both sides are our engine. The peer is told that every caption is as long as
the longest, so that no row ever leaves, and its captions are cut afterwards. `ratio_to_generate` is to transformers'
generate() by the same rule. All captions are asserted to be the same first.

LENGTHS, the end token included: the 64 middle quantiles of 7 + a log-normal law with mean 4.5 and 99th percentile 12. So
their mean is 11.5 and the law's 99th percentile 19, those of COCO's captions; the longest has 20. `row_steps` is how many steps of
a row the peer takes for one that a caption needs, so what there is to gain.
"""

from math import exp
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

from raycap.decoding import search
from raycap.models.blip import Blip, BlipDecodeState
from raycap.models.cache import ImageState
from raycap.schema import DecodeSettings
from tests.bench.blip_decode import BOS_ID, EOS_ID, build_ours, build_published, generated_captions
from tests.bench.sides import Captions, compared, cpu_seconds, ratio, same

NUM_IMAGES, ROUNDS = 64, 3
QUANTILES = [NormalDist().inv_cdf((n + 0.5) / NUM_IMAGES) for n in range(NUM_IMAGES)]
LENGTHS = torch.tensor([round(7 + exp(1.394 + 0.47 * quantile)) for quantile in QUANTILES])[
    torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(0))
]
LONGEST = int(LENGTHS.max())


def ends(scores_NV: Tensor, lengths_N: Tensor, num_new_tokens: int) -> Tensor:
    """The scores of new token number num_new_tokens, which for rows of this length is the end token and for no other."""
    end_N1 = torch.where(lengths_N == num_new_tokens, 1e4, -torch.inf)[:, None]
    return scores_NV.scatter(1, torch.full_like(lengths_N, EOS_ID)[:, None], end_N1)


class RaggedState:
    def __init__(self, text: BlipDecodeState, lengths_B: Tensor) -> None:
        self.text = text
        self.lengths_B = lengths_B
        self.num_new_tokens = 0

    @property
    def num_rows(self) -> int:
        return self.text.num_rows

    def reorder(self, index_N: Tensor) -> None:
        self.text.reorder(index_N)

    def keep(self, images: Tensor) -> None:
        self.text.keep(images)
        self.lengths_B = self.lengths_B[images]


class Ragged:
    """BLIP, the captions of whose images have these lengths; for greedy search."""

    counts_prompt = True

    def __init__(self, blip: Blip, lengths_B: Tensor) -> None:
        self.blip = blip
        self.lengths_B = lengths_B

    def start(self, state: ImageState, prompt_ids_P: Tensor, beams: int = 1) -> RaggedState:
        return RaggedState(self.blip.start(state, prompt_ids_P, beams), self.lengths_B)

    def step(self, state: RaggedState, ids_N: Tensor) -> Tensor:
        state.num_new_tokens += 1
        return ends(self.blip.step(state.text, ids_N), state.lengths_B, state.num_new_tokens)


class RaggedProcessor(LogitsProcessor):  # type: ignore[misc]  # theirs has no types
    """The same for generate()."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return ends(scores, LENGTHS, input_ids.shape[1])


@torch.no_grad()
def our_captions(blip: Blip, states: Tensor, lengths_B: Tensor) -> Captions:
    model: Any = Ragged(blip, lengths_B)
    settings = DecodeSettings(max_new_tokens=LONGEST)
    found = search(model, ImageState(states), torch.tensor([BOS_ID]), eos_id=EOS_ID, settings=settings)
    return [list(caption.ids) for caption, *_ in found]


def cut(captions: Captions) -> Captions:
    return [ids[: length - 1] for ids, length in zip(captions, LENGTHS.tolist(), strict=True)]


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    published = build_published()
    ours = build_ours(published.state_dict())
    # As the vision tower's last LayerNorm leaves them: what they are of makes no difference here.
    states = torch.randn(NUM_IMAGES, 577, 768, generator=torch.Generator().manual_seed(1))
    sides = {
        "generate": lambda: cut(
            generated_captions(
                published, states, 1, max_new_tokens=LONGEST, min_new_tokens=0, logits_processor=[RaggedProcessor()]
            )
        ),
        "peer": lambda: cut(our_captions(ours, states, torch.full_like(LENGTHS, LONGEST))),
        "ours": lambda: our_captions(ours, states, LENGTHS),
    }
    said = same(sides["ours"](), sides["peer"]())
    same(said, sides["generate"]())
    assert [len(ids) + 1 for ids in said] == LENGTHS.tolist()
    spent = cpu_seconds(sides, ROUNDS)
    return compared(
        spent,
        NUM_IMAGES,
        said,
        name="ragged_decode",
        unit="captions/s",
        must=1.5,
        aim=1.65,
        row_steps=round(NUM_IMAGES * LONGEST / int(LENGTHS.sum()), 2),
        ratio_to_generate=ratio(spent, "generate"),
    )
