"""Tiny GPT-2 and ViT-GPT2 models for tests, ours and transformers' with the same weights; and how to compare them."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
from transformers.models.vit import ViTModel

from raycap.models.gpt2 import Gpt2
from raycap.models.vit_gpt2 import VitGpt2

VOCAB_SIZE = 60
BOS_ID = 59  # GPT-2 has one special token: first, end and padding
IGNORED = -100


def tiny_gpt2_config(**fields: Any) -> GPT2Config:
    size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCAB_SIZE}
    return GPT2Config(**{**size, "bos_token_id": BOS_ID, "eos_token_id": BOS_ID, **fields})


def tiny_vit_gpt2_config(*, vision_width: int = 32, **fields: Any) -> VisionEncoderDecoderConfig:
    """fields: of the decoder."""
    size = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "image_size": 32,
        "patch_size": 8,
    }
    return VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        ViTConfig(hidden_size=vision_width, **size),
        tiny_gpt2_config(**fields),
        decoder_start_token_id=BOS_ID,
        pad_token_id=BOS_ID,
        eos_token_id=BOS_ID,
    )


def tiny_gpt2_pair(**fields: Any) -> tuple[Gpt2, GPT2LMHeadModel]:
    """Ours and transformers' in eval mode with the same weights, all of them (norms and biases too) far from 0."""
    published = scatter_weights(GPT2LMHeadModel(tiny_gpt2_config(**fields))).eval()
    ours = Gpt2(published.config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def tiny_vit_gpt2_pair(*, pooler: bool = True, **fields: Any) -> tuple[VitGpt2, VisionEncoderDecoderModel]:
    """The same of ViT-GPT2. pooler: whether the vision tower has weights that nothing uses."""
    config = tiny_vit_gpt2_config(**fields)
    published = VisionEncoderDecoderModel(config, encoder=None if pooler else ViTModel(config.encoder, False))
    scatter_weights(published).eval()
    config.encoder.add_pooling_layer = pooler
    ours = VitGpt2(config).eval()
    ours.load_state_dict(published.state_dict())
    return ours, published


def scatter_weights(model: nn.Module, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator) + float(is_scale))
    return model


def set_by_formula(model: nn.Module) -> Any:
    """Weights that no random generator draws: a sine whose frequency and phase depend on the name's place alone."""
    names = sorted(name for name, _ in model.named_parameters())
    with torch.no_grad():
        for place, name in enumerate(names):
            parameter = model.get_parameter(name)
            angles = torch.arange(parameter.numel(), dtype=torch.float64) * (0.7 + 0.013 * place) + place
            is_scale = name.endswith("weight") and ("norm" in name.lower() or ".ln_" in name)
            parameter.copy_((0.3 * torch.sin(angles) + float(is_scale)).view(parameter.shape))
    return model


def captions(rows: int, seed: int = 2) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, "bos 7 8 words... eos", padded on the right; the prompt 7 8 carries no label."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.full((rows, 12), BOS_ID)
    labels = torch.full((rows, 12), IGNORED)
    for row in range(rows):
        words = torch.randint(0, BOS_ID, (3 + row % 6,), generator=generator)
        text = torch.cat([torch.tensor([BOS_ID, 7, 8]), words, torch.tensor([BOS_ID])])
        input_ids[row, : len(text)] = text
        labels[row, 3 : len(text)] = text[3:]
    return input_ids, labels


def lengths_mask(labels: Tensor) -> Tensor:
    """1 up to the last label of each row, 0 on the padding behind it: transformers' attention_mask."""
    return (labels != IGNORED).flip(1).cummax(1).values.flip(1).long()


def assert_drawn_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Fresh weights of the same mean and spread, within four standard errors; constants are equal."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        if tensor.std() < 1e-6:
            assert torch.equal(ours[name], tensor), name
        else:
            error = 4 / tensor.numel() ** 0.5
            assert ours[name].mean().abs() < error * tensor.std() * 1.5, name
            assert abs(float(ours[name].std() / tensor.std()) - 1) < error, name
