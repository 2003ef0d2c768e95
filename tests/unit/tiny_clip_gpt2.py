"""Tiny CLIP-GPT2 models for tests: every tower and mapper at a size that trains in milliseconds."""

from typing import Any

import torch
from torch import Tensor

from raycap.models.clip_gpt2 import ClipGpt2

BOS_ID = 58
EOS_ID = PAD_ID = 3  # one token for both, as GPT-2's tokenizer has it
FEATURES = {"clip_vision_model": 24, "vit": 32, "siglip_vision_model": 32, "dinov2": 32}


def tiny_config(mapper: str = "mlp", tower: str = "clip_vision_model", **changes: Any) -> dict[str, Any]:
    """What a config.json holds. changes: fields in place of these, "text_config" and "vision_config" field by field."""
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
    if tower != "dinov2":
        vision["intermediate_size"] = 64
    if tower == "clip_vision_model":
        vision["projection_dim"] = FEATURES[tower]
    text = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 60}
    roles = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    return {
        "model_type": "clip_gpt2",
        "mapper": mapper,
        "prefix_length": 5,
        "clip_length": 4,
        "num_mapper_layers": 2,
        **changes,
        "vision_config": {"model_type": tower, **vision, **changes.get("vision_config", {})},
        "text_config": {"model_type": "gpt2", **text, **roles, **changes.get("text_config", {})},
    }


def tiny_clip_gpt2(mapper: str = "mlp", tower: str = "clip_vision_model", *, seed: int = 0, **changes: Any) -> ClipGpt2:
    """In eval mode, all weights (norms and biases too) far from 0, so that each image has its own caption.

    changes: see tiny_config.
    """
    model = ClipGpt2(tiny_config(mapper, tower, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_scale = name.endswith("weight") and parameter.ndim == 1  # of a LayerNorm
            spread = 0.9 if name.endswith("wpe.weight") else 0.6 if name.startswith("clip_project.") else 0.3
            parameter.copy_(1 + 0.2 * noise if is_scale else spread * noise)
    return model


def images(count: int, seed: int = 1) -> Tensor:
    return 3 * torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def captions(rows: int, *, same_length: bool = False, seed: int = 2) -> tuple[Tensor, Tensor]:
    """input_ids and labels of rows "bos 7 8 words... eos", the end being a label too; the prompt 7 8 carries none.

    Padded on the right with the end token, unless all have the same length.
    """
    generator = torch.Generator().manual_seed(seed)
    texts = []
    for row in range(rows):
        words = torch.randint(4, BOS_ID, (5 if same_length else 1 + row % 6,), generator=generator)
        texts.append(torch.tensor([BOS_ID, 7, 8, *words, EOS_ID]))
    length = max(map(len, texts))
    input_ids = torch.full((rows, length), PAD_ID)
    labels = torch.full((rows, length), -100)
    for row, text in enumerate(texts):
        input_ids[row, : len(text)] = text
        labels[row, 3 : len(text)] = text[3:]
    return input_ids, labels
