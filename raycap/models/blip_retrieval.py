"""BLIP's scorer of images and texts (arXiv:2201.12086, section 3.2): whether they match, and the cosine of their vectors.

Owns BERT as an encoder, which reads a text in both directions, alone or with an image, and the three heads. The vision
tower, cross-attention and their pieces are those of blip.py. Does not own files (raycap/checkpoint) nor training: scores are
made without a graph.
Parameter names are those of transformers' BlipForImageTextRetrieval, so weights move both ways untouched, and the tests
hold it equal.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, D width of the text
encoder, E width of the vision tower, T image tokens, W width of the space that images and texts share, S side of the image
in pixels.
"""

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.models.blip import (
    AttentionBlock,
    CrossAttention,
    ResidualNorm,
    TextAttention,
    TextEmbeddings,
    VisionTower,
    _gelu,
    _named,
)
from raycap.models.cache import ImageState, check_rows

if TYPE_CHECKING:
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig


class BidirectionalAttention(TextAttention):
    def forward(self, hidden_NLD: Tensor, is_read_N11L: Tensor) -> Tensor:
        query, key, value = (self.heads(project(hidden_NLD)) for project in (self.query, self.key, self.value))
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=is_read_N11L, dropout_p=dropout)
        return mixed.transpose(1, 2).flatten(2)


class EncoderLayer(nn.Module):
    def __init__(self, config: "BlipTextConfig", layer: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, BidirectionalAttention(config, layer, config.hidden_size))
        self.crossattention = AttentionBlock(config, CrossAttention(config, layer, config.encoder_hidden_size))
        self.intermediate = _named(
            dense=nn.Linear(config.hidden_size, config.intermediate_size), activation=_gelu(config.hidden_act)
        )
        self.output = ResidualNorm(config, config.intermediate_size)

    def forward(self, hidden_NLD: Tensor, is_read_N11L: Tensor, image: ImageState | None) -> Tensor:
        hidden_NLD = self.attention(hidden_NLD, is_read_N11L)
        if image is not None:
            hidden_NLD = self.crossattention(hidden_NLD, image)
        output_NLD: Tensor = self.output(self.intermediate(hidden_NLD), hidden_NLD)
        return output_NLD


class EncoderLayers(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.layer = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.num_hidden_layers))

    def forward(self, hidden_NLD: Tensor, is_read_N11L: Tensor, image: ImageState | None) -> Tensor:
        for layer in self.layer:
            hidden_NLD = layer(hidden_NLD, is_read_N11L, image)
        return hidden_NLD


class BidirectionalText(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = EncoderLayers(config)

    def forward(self, ids_NL: Tensor, attention_mask_NL: Tensor, image: ImageState | None = None) -> Tensor:
        """hidden_ND of the first token, which stands for the text. With `image`, its rows look at it by cross-attention."""
        if ids_NL.shape != attention_mask_NL.shape:
            raise ValueError(
                f"input_ids and attention_mask need the same shape, got {tuple(ids_NL.shape)} and "
                f"{tuple(attention_mask_NL.shape)}"
            )
        is_read_N11L = attention_mask_NL.bool()[:, None, None]
        hidden_NLD: Tensor = self.encoder(self.embeddings(ids_NL, 0), is_read_N11L, image)
        return hidden_NLD[:, 0]


class BlipRetrieval(nn.Module):
    """Scores k texts of each image: image i owns rows i*k .. i*k+k-1 of input_ids (N, L) and attention_mask (N, L; 1 or
    True where a token is read, 0 where it is padding). Raises ValueError where N is no multiple of the images.

    Built with torch's fresh weights, which say nothing: load published ones.
    """

    def __init__(self, config: "BlipConfig") -> None:
        super().__init__()
        vision = cast("BlipVisionConfig", config.vision_config)
        text = cast("BlipTextConfig", config.text_config)
        self.vision_model = VisionTower(vision)
        self.text_encoder = BidirectionalText(text)
        self.vision_proj = nn.Linear(vision.hidden_size, config.image_text_hidden_size)
        self.text_proj = nn.Linear(text.hidden_size, config.image_text_hidden_size)
        self.itm_head = nn.Linear(text.hidden_size, 2)

    @torch.no_grad()
    def encode_image(self, pixel_values_B3SS: Tensor) -> ImageState:
        return ImageState(self.vision_model(pixel_values_B3SS))

    @torch.no_grad()
    def match(self, state: ImageState, input_ids_NL: Tensor, attention_mask_NL: Tensor) -> Tensor:
        """(N,), the probability that text and image belong together; float32 or wider. Texts begin with [ENC]."""
        check_rows(len(input_ids_NL), state)
        logits_N2 = _wide(self.itm_head(self.text_encoder(input_ids_NL, attention_mask_NL, state)))
        # Index 1 is "they match" (itm_labels in models/blip_retrieval.py of salesforce/BLIP).
        return logits_N2.softmax(-1)[:, 1]

    @torch.no_grad()
    def cosine(self, state: ImageState, input_ids_NL: Tensor, attention_mask_NL: Tensor) -> Tensor:
        """(N,), the cosine of the vectors of text and image, from -1 to 1; float32 or wider. Texts begin with [CLS]."""
        check_rows(len(input_ids_NL), state)
        image_BW = F.normalize(_wide(self.vision_proj(state.states_BTE[:, 0])), dim=-1)
        text_NW = F.normalize(_wide(self.text_proj(self.text_encoder(input_ids_NL, attention_mask_NL))), dim=-1)
        text_BkW = text_NW.reshape(state.num_images, -1, text_NW.shape[-1])
        return (text_BkW * image_BW[:, None]).sum(-1).flatten()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
