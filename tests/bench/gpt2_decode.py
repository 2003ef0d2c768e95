"""Captions per second of CPU, GPT-2 small behind 10 visual tokens: ours against generate(), and against ClipCap's own loop.

8 images, 5 beams, 20 new tokens each (the end token is forbidden), fp32 on one thread, sides in turn. Ours has its
weights as Captioner.load leaves them. The visual tokens are drawn: neither side has a vision tower or a mapper. Every caption is
asserted to be the same first.

gpt2_prefix_beam5: transformers' GPT2LMHeadModel.generate(inputs_embeds=...); all 5 captions of an image are compared.
clipcap_loop: the beam search of ClipCap (Mokady et al. 2021, arXiv:2111.09734; github rmokady/CLIP_prefix_caption,
predict.py, generate_beam) with transformers' GPT-2: one image after the other, and at every step the whole text anew. It keeps
ended texts among its beams and ranks all by mean log-probability; where none ends, as here, that is our rule too. The best caption
of an image is compared.

Weights are random, scaled so that nearly all words differ and their chances are about those of a trained model.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from raycap.decoding import search
from raycap.models.clip_gpt2 import ClipGpt2, PrefixState
from raycap.models.inference import use_fast_products
from raycap.models.presets import CLIP_GPT2_MLP
from raycap.schema import DecodeSettings
from tests.bench.sides import Captions, compared, cpu_seconds, same

NUM_IMAGES, NUM_BEAMS, NEW_TOKENS, ROUNDS = 8, 5, 20, 3
END_ID = 50_256  # the first token too
SCALES = {"wte": 12.0, "wpe": 10.0, "c_attn": 6.0, "c_proj": 10.0}


def build_pair() -> tuple[ClipGpt2, GPT2LMHeadModel]:
    torch.manual_seed(0)
    published = GPT2LMHeadModel(GPT2Config(**CLIP_GPT2_MLP["text_config"])).eval()
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            for part, scale in SCALES.items():
                if part in name and parameter.ndim > 1:
                    parameter.mul_(scale)
    ours = ClipGpt2(CLIP_GPT2_MLP).eval()
    ours.gpt.load_state_dict(published.state_dict())
    use_fast_products(ours)
    return ours, published


@torch.no_grad()
def our_captions(model: ClipGpt2, visual_BPD: Tensor) -> Captions:
    """NUM_BEAMS of each image, best first."""
    settings = DecodeSettings(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, num_beams=NUM_BEAMS)
    found = search(model, PrefixState(visual_BPD), torch.tensor([END_ID]), eos_id=END_ID, settings=settings)
    return [list(caption.ids) for captions in found for caption in captions]


def generated_captions(gpt: GPT2LMHeadModel, visual_BPD: Tensor) -> Captions:
    """The same by generate()."""
    ids: Tensor = gpt.generate(
        inputs_embeds=visual_BPD,
        attention_mask=torch.ones(visual_BPD.shape[:2], dtype=torch.long),
        num_beams=NUM_BEAMS,
        num_return_sequences=NUM_BEAMS,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        pad_token_id=END_ID,
    )
    return [list(row) for row in ids.tolist()]


@torch.no_grad()
def clipcap_caption(gpt: GPT2LMHeadModel, visual_PD: Tensor) -> list[int]:
    """The best caption of an image as ClipCap searches it. Shape suffixes: k beams, S positions so far."""
    log_probs_1V = gpt(inputs_embeds=visual_PD[None]).logits[:, -1].softmax(dim=-1).log()
    sums_k, words_k = log_probs_1V[0].topk(NUM_BEAMS)
    texts_kL, read_kSD = words_k[:, None], visual_PD.expand(NUM_BEAMS, -1, -1)
    lengths_k, ended_k = torch.ones(NUM_BEAMS), words_k == END_ID
    while texts_kL.shape[1] < NEW_TOKENS and not ended_k.all():
        read_kSD = torch.cat([read_kSD, gpt.transformer.wte(words_k)[:, None]], dim=1)
        log_probs_kV = gpt(inputs_embeds=read_kSD).logits[:, -1].softmax(dim=-1).log()
        log_probs_kV[ended_k] = -torch.inf
        log_probs_kV[ended_k, 0] = 0.0  # an ended text goes on in one way, at no cost
        lengths_k = lengths_k + ~ended_k
        means_kV = (sums_k[:, None] + log_probs_kV) / lengths_k[:, None]
        means_k, index_k = means_kV.flatten().topk(NUM_BEAMS)
        parents_k, words_k = index_k // means_kV.shape[1], index_k % means_kV.shape[1]
        texts_kL = torch.cat([texts_kL[parents_k], words_k[:, None]], dim=1)
        read_kSD, lengths_k = read_kSD[parents_k], lengths_k[parents_k]
        sums_k = means_k * lengths_k
        ended_k = ended_k[parents_k] | (words_k == END_ID)
    best = (sums_k / lengths_k).argmax()
    text: list[int] = texts_kL[best, : int(lengths_k[best])].tolist()
    return text


def measure_prefix_beam5() -> dict[str, Any]:
    ours, published, visual_BPD = _inputs()
    sides: dict[str, Callable[[], Captions]] = {
        "peer": lambda: generated_captions(published, visual_BPD),
        "ours": lambda: our_captions(ours, visual_BPD),
    }
    said = same(sides["ours"](), sides["peer"]())
    spent = cpu_seconds(sides, ROUNDS)
    return compared(spent, NUM_IMAGES, said, name="gpt2_prefix_beam5", unit="images/s", must=1.5, aim=1.8)


def measure_clipcap_loop() -> dict[str, Any]:
    ours, published, visual_BPD = _inputs()
    sides: dict[str, Callable[[], Captions]] = {
        "peer": lambda: [clipcap_caption(published, visual_PD) for visual_PD in visual_BPD],
        "ours": lambda: our_captions(ours, visual_BPD)[::NUM_BEAMS],
    }
    said = same(sides["ours"](), sides["peer"]())
    assert all(len(ids) == NEW_TOKENS for ids in said), "a caption has ended, where the two rules differ"
    spent = cpu_seconds(sides, ROUNDS)
    return compared(spent, NUM_IMAGES, said, name="clipcap_loop", unit="images/s", must=10, aim=15)


def _inputs() -> tuple[ClipGpt2, GPT2LMHeadModel, Tensor]:
    torch.set_num_threads(1)
    visual_BPD = torch.randn(NUM_IMAGES, 10, 768, generator=torch.Generator().manual_seed(1))
    return *build_pair(), visual_BPD
