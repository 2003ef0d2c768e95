"""Captions trained per second of CPU: ours with 5 captions an image in one vision pass, transformers with one image a row.

Both compute the same mean loss over the same captions, asserted first, and all its gradients, in fp32 on one thread. The
widths, the 384 pixels and the vocabulary are those of BLIP base; both towers have NUM_LAYERS of its 12 layers, which
favours the peer: the vocabulary's projection, which packing does not save, weighs more than in the whole model.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import BlipConfig, BlipForConditionalGeneration

from raycap.models.blip import Blip

NUM_LAYERS, NUM_IMAGES, CAPTIONS, LENGTH, ROUNDS = 3, 2, 5, 20, 5


def build_pair() -> tuple[Blip, BlipForConditionalGeneration]:
    """Ours and transformers' model in eval mode, for dropout draws other numbers in other shapes, with the same weights."""
    torch.manual_seed(0)
    config = BlipConfig(
        # BLIP base is narrower in its text tower than transformers' default says of its vision tower
        text_config={"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 12, "encoder_hidden_size": 768},
        vision_config={"num_hidden_layers": NUM_LAYERS, "image_size": 384, "initializer_range": 0.02},
    )
    published = BlipForConditionalGeneration(config).eval()
    ours = Blip(config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def inputs(pad_id: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel values of NUM_IMAGES; ids and labels of CAPTIONS rows for each, as long as captions of COCO: 10 to LENGTH."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(NUM_IMAGES, 3, 384, 384, generator=generator)
    rows = NUM_IMAGES * CAPTIONS
    input_ids = torch.randint(1000, vocab_size, (rows, LENGTH), generator=generator)
    lengths = torch.randint(10, LENGTH + 1, (rows,), generator=generator)
    padding = torch.arange(LENGTH) >= lengths[:, None]
    return pixel_values, input_ids.masked_fill(padding, pad_id), input_ids.masked_fill(padding, -100)


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    ours, published = build_pair()
    text = published.config.text_config
    pixel_values, input_ids, labels = inputs(text.pad_token_id, text.vocab_size)

    def our_loss() -> Tensor:
        loss_sum, num_targets = ours(pixel_values, input_ids, labels)
        return loss_sum / num_targets

    def peer_loss() -> Tensor:
        mask = (labels != -100).long()
        rows = pixel_values.repeat_interleave(CAPTIONS, dim=0)
        loss: Tensor = published(rows, input_ids, attention_mask=mask, labels=labels).loss
        return loss

    mine, theirs = our_loss().item(), peer_loss().item()
    difference = abs(mine - theirs) / theirs
    assert difference < 1e-5, f"the losses differ: {mine} and {theirs}"
    rates: dict[Callable[[], Tensor], list[float]] = {our_loss: [], peer_loss: []}
    for number in range(ROUNDS + 1):
        for model, loss in ((published, peer_loss), (ours, our_loss)):
            model.zero_grad()
            begun = time.process_time()
            loss().backward()
            if number:  # the first round warms up
                rates[loss].append(len(input_ids) / (time.process_time() - begun))
    peer = statistics.median(rates[peer_loss])
    return {
        "name": "train_packed5",
        "values": [round(rate, 3) for rate in rates[our_loss]],
        "peer": round(peer, 3),
        "unit": "captions/s",
        "ratio": round(statistics.median(rates[our_loss]) / peer, 2),
        "must": 4,
        "aim": 5,
        "identical": True,
        "loss_difference": difference,
        "layers": f"{NUM_LAYERS} of 12 in both towers",
    }
