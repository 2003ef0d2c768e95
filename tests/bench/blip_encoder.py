"""Images encoded per second of CPU by BLIP base's vision tower at 384 pixels: ours against transformers' BlipVisionModel.

As transformers runs it by default, which in this version is "eager" attention: BLIP has no other. Both compute the same states,
asserted first, in fp32, without gradients, on one thread.
"""

import statistics
import time
from typing import Any

import torch
from transformers import BlipVisionConfig, BlipVisionModel

from raycap.models.blip import VisionTower

NUM_IMAGES, ROUNDS = 4, 5


def measure() -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # transformers' default initializer_range is 1e-10: a tower that sees nothing
    config = BlipVisionConfig(image_size=384, initializer_range=0.02)
    published = BlipVisionModel(config).eval()
    ours = VisionTower(config).eval()
    ours.load_state_dict(published.state_dict())
    pixel_values = torch.randn(NUM_IMAGES, 3, 384, 384)
    rates: dict[str, list[float]] = {"ours": [], "peer": []}
    with torch.no_grad():
        expected = published(pixel_values).last_hidden_state
        difference = (ours(pixel_values) - expected).abs().max().item()
        assert difference < 1e-5, f"the states differ by {difference}; the largest is {expected.abs().max()}"
        for _ in range(ROUNDS):
            for name, tower in (("peer", published), ("ours", ours)):
                begun = time.process_time()
                tower(pixel_values)
                rates[name].append(NUM_IMAGES / (time.process_time() - begun))
    peer = statistics.median(rates["peer"])
    return {
        "name": "blip_encoder",
        "values": [round(rate, 3) for rate in rates["ours"]],
        "peer": round(peer, 3),
        "unit": "images/s",
        "ratio": round(statistics.median(rates["ours"]) / peer, 2),
        "must": 1.15,
        "aim": 1.3,
        "identical": True,
        "difference": difference,
        "peer_attention": published.config._attn_implementation,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
