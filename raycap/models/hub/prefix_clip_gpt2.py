"""From pixels to visual tokens: vision towers that give one vector per image, and ClipCap's mappers.

Both our own model (raycap/models/clip_gpt2.py) and the one exported for plain transformers are built of these, so this
file imports nothing of raycap. Structure and parameter names of the mappers are those of ClipCap (Mokady et al. 2021,
arXiv:2111.09734; github rmokady/CLIP_prefix_caption, train.py). Fresh mappers are as torch draws them, as there.

Every parameter is used inside forward() of the module that owns it: DeepSpeed ZeRO-3 gathers parameters in forward
hooks. The one exception is transformers' SigLIP, whose pooling is a torch.nn.MultiheadAttention.

Shape suffixes: B images, E width of an image's vector, P visual tokens (prefix_length), C positions made of the vector
(clip_length), M = C + P, D width of the text model, H heads, K width of a head, S side of the image in pixels.
"""

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOWERS = ("clip_vision_model", "vit", "siglip_vision_model", "dinov2")  # "model_type" of a vision_config
MAPPERS = ("linear_tanh", "mlp", "transformer")
MLP_RATIO = 2  # of the transformer mapper


class ChainMapper(nn.Module):
    """Layers from the vector to all visual tokens at once: ClipCap's MLP is Linear, Tanh, Linear."""

    def __init__(self, prefix_length: int, *layers: nn.Module) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.model = nn.Sequential(*layers)

    def forward(self, vector_BE: Tensor) -> Tensor:
        mapped: Tensor = self.model(vector_BE)
        return mapped.view(len(vector_BE), self.prefix_length, -1)


class MapperAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_queries = nn.Linear(width, width, bias=False)
        self.to_keys_values = nn.Linear(width, 2 * width, bias=False)
        self.project = nn.Linear(width, width)

    def forward(self, hidden_BMD: Tensor) -> Tensor:
        B, M, D = hidden_BMD.shape
        query_BMHK = self.to_queries(hidden_BMD).view(B, M, self.num_heads, -1)
        key_BMHK, value_BMHK = self.to_keys_values(hidden_BMD).view(B, M, 2, self.num_heads, -1).unbind(2)
        heads = (part.transpose(1, 2) for part in (query_BMHK, key_BMHK, value_BMHK))
        mixed_BHMK = F.scaled_dot_product_attention(*heads)
        projected: Tensor = self.project(mixed_BHMK.transpose(1, 2).reshape(B, M, D))
        return projected


class MapperLayer(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = MapperAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(fc1=nn.Linear(width, MLP_RATIO * width), act=nn.ReLU(), fc2=nn.Linear(MLP_RATIO * width, width))
        )

    def forward(self, hidden_BMD: Tensor) -> Tensor:
        hidden_BMD = hidden_BMD + self.attn(self.norm1(hidden_BMD))
        output_BMD: Tensor = hidden_BMD + self.mlp(self.norm2(hidden_BMD))
        return output_BMD


class TransformerMapper(nn.Module):
    """ClipCap's transformer: P learned constants attend to C positions made of the vector, and become the prefix."""

    def __init__(
        self, width_in: int, width: int, prefix_length: int, clip_length: int, num_layers: int, num_heads: int
    ) -> None:
        super().__init__()
        self.clip_length = clip_length
        self.linear = nn.Linear(width_in, clip_length * width)
        self.prefix_const = nn.Parameter(torch.randn(prefix_length, width))
        layers = nn.Sequential(*(MapperLayer(width, num_heads) for _ in range(num_layers)))
        self.transformer = nn.Sequential(OrderedDict(layers=layers))

    def forward(self, vector_BE: Tensor) -> Tensor:
        clip_BCD = self.linear(vector_BE).view(len(vector_BE), self.clip_length, -1)
        prefix_BPD = self.prefix_const.expand(len(vector_BE), -1, -1)
        output_BMD: Tensor = self.transformer(torch.cat([clip_BCD, prefix_BPD], dim=1))
        return output_BMD[:, self.clip_length :]


def build_mapper(config: Any) -> nn.Module:
    """(B, E) -> (B, P, D). config: a ClipGpt2Config, which was checked."""
    E, D, P = vector_width(config.vision_config), config.text_config.n_embd, config.prefix_length
    match config.mapper:
        case "linear_tanh":
            return ChainMapper(P, nn.Linear(E, P * D), nn.Tanh())
        case "mlp":  # half as many hidden values as the visual tokens have together
            return ChainMapper(P, nn.Linear(E, P * D // 2), nn.Tanh(), nn.Linear(P * D // 2, P * D))
        case _:
            return TransformerMapper(E, D, P, config.clip_length, config.num_mapper_layers, config.num_mapper_heads)


def build_vision_tower(config: Any) -> nn.Module:
    """transformers' tower with fresh weights. config: of transformers, its model_type one of TOWERS.

    ViT is built without its pooler: classifiers are published without one.
    """
    import transformers

    match config.model_type:
        case "clip_vision_model":
            return transformers.CLIPVisionModelWithProjection(config)
        case "vit":
            return transformers.ViTModel(config, add_pooling_layer=False)
        case "siglip_vision_model":
            return transformers.SiglipVisionModel(config)
        case _:
            return transformers.Dinov2Model(config)


def vector_width(config: Any) -> int:
    """E of this vision configuration."""
    width: int = config.projection_dim if config.model_type == "clip_vision_model" else config.hidden_size
    return width


def image_vector(tower: Any, pixel_values_B3SS: Tensor) -> Tensor:
    """One vector per image, (B, E). tower: of build_vision_tower.

    CLIP: its image embedding, projected, as ClipCap takes it. SigLIP: the output of its pooling head. ViT and DINOv2:
    the [CLS] position behind the last LayerNorm. Raises ValueError for images of another size than the tower's; DINOv2
    alone adapts its positions to any multiple of its patches.
    """
    size, model_type = tower.config.image_size, tower.config.model_type
    if model_type != "dinov2" and pixel_values_B3SS.shape[1:] != (3, size, size):
        raise ValueError(
            f"this vision tower takes pixel_values (images, 3, {size}, {size}), got {tuple(pixel_values_B3SS.shape)}"
        )
    output = tower(pixel_values=pixel_values_B3SS)
    vector_BE: Tensor
    match model_type:
        case "clip_vision_model":
            vector_BE = output.image_embeds
        case "siglip_vision_model":
            vector_BE = output.pooler_output
        case _:
            vector_BE = output.last_hidden_state[:, 0]
    return vector_BE


def normalized(vector_BE: Tensor) -> Tensor:
    """Divided by its L2 norm."""
    norm_B1: Tensor = torch.linalg.vector_norm(vector_BE, dim=-1, keepdim=True)
    return vector_BE / norm_B1
