"""Rows trained per second of CPU, BLIP base at 384 pixels: one caption an image, ours against transformers' model.

Forward and backward of the whole model, 12 layers in both towers, in the same plain loop, fp32 on one thread. Both compute the
same mean loss and the same gradients, asserted first.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BlipConfig, BlipForConditionalGeneration

from raycap.checkpoint import complete_config
from raycap.models.blip import Blip
from raycap.models.presets import BLIP_BASE_384

NUM_IMAGES, LENGTH, ROUNDS = 4, 20, 3


def inputs(pad_id: int, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixel values, and the ids and labels of one caption for each image, as long as captions of COCO: 10 to LENGTH."""
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(NUM_IMAGES, 3, 384, 384, generator=generator)
    input_ids = torch.randint(1000, vocab_size, (NUM_IMAGES, LENGTH), generator=generator)
    lengths = torch.randint(10, LENGTH + 1, (NUM_IMAGES,), generator=generator)
    padding = torch.arange(LENGTH) >= lengths[:, None]
    return pixel_values, input_ids.masked_fill(padding, pad_id), input_ids.masked_fill(padding, -100)


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BlipConfig.from_dict(complete_config(BLIP_BASE_384, "the preset"))
    published = BlipForConditionalGeneration(config).eval()  # dropout draws other numbers in other shapes
    ours = Blip(config).eval()
    ours.load_state_dict(published.state_dict())
    pixel_values, input_ids, labels = inputs(config.text_config.pad_token_id, config.text_config.vocab_size)
    mask = (labels != -100).long()

    def our_loss() -> Tensor:
        loss_sum, num_targets = ours(pixel_values, input_ids, labels)
        return loss_sum / num_targets

    def peer_loss() -> Tensor:
        loss: Tensor = published(pixel_values, input_ids, attention_mask=mask, labels=labels).loss
        return loss

    steps: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "peer": (published, peer_loss),
        "ours": (ours, our_loss),
    }
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    differences: dict[str, float] = {}
    for number in range(ROUNDS + 1):
        losses = {}
        for name, (model, loss_of) in steps.items():
            model.zero_grad()
            begun = time.process_time()
            loss = loss_of()
            loss.backward()
            if number:  # the first round warms up
                rates[name].append(NUM_IMAGES / (time.process_time() - begun))
            losses[name] = loss.item()
        if not number:
            differences["loss_difference"] = abs(losses["ours"] - losses["peer"]) / losses["peer"]
            differences["gradient_difference"] = _gradient_difference(ours, published)
            assert max(differences.values()) < 1e-5, f"loss or gradients differ: {differences}"
    peer = statistics.median(rates["peer"])
    return {
        "name": "blip_train_step",
        "values": [round(rate, 3) for rate in rates["ours"]],
        "peer": round(peer, 3),
        "unit": "rows/s",
        "ratio": round(statistics.median(rates["ours"]) / peer, 2),
        "must": 1.1,
        "aim": 1.3,
        "identical": True,
        **differences,
        "peer_attention": published.config._attn_implementation,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gradient_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Of the gradient of all parameters, as one vector, relative to its length."""
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    ours_by_name = {name: parameter.grad for name, parameter in ours.named_parameters()}
    assert ours_by_name.keys() == expected.keys()
    apart = sum(float((ours_by_name[name] - expected[name]).double().square().sum()) for name in expected)
    length = sum(float(gradient.double().square().sum()) for gradient in expected.values())
    return float((apart / length) ** 0.5)
