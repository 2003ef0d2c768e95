"""Tiny models for tests: BLIP's structure and token roles at a size that trains in milliseconds."""

import torch
from transformers import BlipConfig, BlipForConditionalGeneration

from raycap.models.blip import Blip

PAD_ID, EOS_ID = 0, 3


def tiny_blip_config(*, vocab_size: int = 60, label_smoothing: float = 0.0) -> BlipConfig:
    """BLIP's roles: pad 0, end = sep, [DEC] = bos = vocab_size - 2, [ENC] = vocab_size - 1."""
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **size,
        "encoder_hidden_size": 32,
        "vocab_size": vocab_size,
        "max_position_embeddings": 64,
        "pad_token_id": PAD_ID,
        "sep_token_id": EOS_ID,
        "eos_token_id": EOS_ID,
        "bos_token_id": vocab_size - 2,
        "label_smoothing": label_smoothing,
    }
    # transformers' default for the vision tower is 1e-10: fresh weights that see nothing
    vision = {**size, "image_size": 32, "patch_size": 8, "initializer_range": 0.02}
    return BlipConfig(text_config=text, vision_config=vision)


def tiny_blip_pair(*, seed: int = 0, label_smoothing: float = 0.0) -> tuple[Blip, BlipForConditionalGeneration]:
    """Ours and transformers' BLIP in eval mode with the same weights, all of them (norms and biases too) far from 0."""
    config = tiny_blip_config(label_smoothing=label_smoothing)
    published = BlipForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in published.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name.lower() and "weight" in name else 0.2 * noise)
    ours = Blip(config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published
