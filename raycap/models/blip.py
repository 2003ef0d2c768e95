"""BLIP captioning (Li et al. 2022, arXiv:2201.12086): a ViT, and a BERT decoder that reads it by cross-attention.

Owns the network. Does not own its caches (cache.py), the sum of its loss (loss.py), the search (raycap/decoding) or
files (raycap/checkpoint).
Parameter names are those of transformers' BlipForConditionalGeneration, so weights move both ways untouched, and the
tests hold it equal. What differs is where the work is done: attention is torch's scaled_dot_product_attention, and the
rows of one image (its captions in training, its beams in decoding) share one vision pass and one set of cross-attention
keys and values: they are folded into the query length, nothing of the image is copied per row.

Every parameter is used inside forward() of the module that owns it, and modules are only called, never reached into:
DeepSpeed ZeRO-3 gathers parameters in forward hooks.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P prompt length,
M text positions with a target, V vocabulary, D width of the text decoder, E width of the vision tower, T image tokens,
H heads, K width of a head, S side of the image in pixels.
"""

from collections import OrderedDict
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.models.absorbed import mean_states, through_keys, through_values
from raycap.models.cache import ImageState, TextState, check_rows
from raycap.models.linear import Linear
from raycap.models.loss import summed_token_loss

if TYPE_CHECKING:
    from transformers import BlipConfig, BlipTextConfig, BlipVisionConfig

TIED_NAMES = {  # second name of a parameter -> its first; of the weights only where the configuration ties them
    "text_decoder.cls.predictions.decoder.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
}


class BlipDecodeState(TextState[ImageState]):
    """What start() returns and step() continues."""


class VisionEmbeddings(nn.Module):
    def __init__(self, config: "BlipVisionConfig") -> None:
        super().__init__()
        if not isinstance(config.image_size, int) or not isinstance(config.patch_size, int):
            raise ValueError(f"BLIP needs square images, got size {config.image_size} and patches {config.patch_size}")
        self.image_size = config.image_size
        num_tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, num_tokens, config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, stride=config.patch_size)

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        if pixel_values_B3SS.shape[1:] != (3, self.image_size, self.image_size):
            raise ValueError(
                f"this BLIP takes pixel_values (images, 3, {self.image_size}, {self.image_size}), got "
                f"{tuple(pixel_values_B3SS.shape)}"
            )
        patches_BTE = self.patch_embedding(pixel_values_B3SS.to(self.class_embedding.dtype)).flatten(2).transpose(1, 2)
        class_B1E = self.class_embedding.expand(len(patches_BTE), -1, -1)
        return torch.cat([class_B1E, patches_BTE], dim=1) + self.position_embedding


class VisionAttention(nn.Module):
    def __init__(self, config: "BlipVisionConfig") -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_dropout
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.projection = Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        qkv: Tensor = self.qkv(hidden_BTE).reshape(*hidden_BTE.shape[:2], 3, self.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each BHTK
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.dropout if self.training else 0.0)
        projected: Tensor = self.projection(mixed.transpose(1, 2).flatten(2))
        return projected


class VisionLayer(nn.Module):
    def __init__(self, config: "BlipVisionConfig") -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = _named(
            fc1=Linear(config.hidden_size, config.intermediate_size),
            activation=_gelu(config.hidden_act),
            fc2=Linear(config.intermediate_size, config.hidden_size),
        )

    def forward(self, hidden_BTE: Tensor) -> Tensor:
        attended_BTE: Tensor = hidden_BTE + self.self_attn(self.layer_norm1(hidden_BTE))
        output_BTE: Tensor = attended_BTE + self.mlp(self.layer_norm2(attended_BTE))
        return output_BTE


class VisionTower(nn.Module):
    def __init__(self, config: "BlipVisionConfig") -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        self.encoder = _named(layers=nn.Sequential(*(VisionLayer(config) for _ in range(config.num_hidden_layers))))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixel_values_B3SS: Tensor) -> Tensor:
        states_BTE: Tensor = self.post_layernorm(self.encoder(self.embeddings(pixel_values_B3SS)))
        return states_BTE


class TextEmbeddings(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids_NL: Tensor, start: int) -> Tensor:
        end = start + ids_NL.shape[1]
        if end > self.position_embeddings.num_embeddings:  # on a GPU the look-up itself would kill the process
            raise ValueError(f"this BLIP reads {self.position_embeddings.num_embeddings} text tokens, got {end}")
        positions_L = torch.arange(start, end, device=ids_NL.device)
        embedded = self.word_embeddings(ids_NL) + self.position_embeddings(positions_L)
        hidden_NLD: Tensor = self.dropout(self.LayerNorm(embedded))
        return hidden_NLD


class TextAttention(nn.Module):
    """What self-attention and cross-attention share. source_width: of what keys and values are made from."""

    KEY: type[Linear] = Linear
    VALUE: type[Linear] = Linear

    def __init__(self, config: "BlipTextConfig", layer: int, source_width: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.dropout = config.attention_probs_dropout_prob
        self.query = Linear(config.hidden_size, config.hidden_size)
        self.key = self.KEY(source_width, config.hidden_size)
        self.value = self.VALUE(source_width, config.hidden_size)

    def heads(self, hidden: Tensor) -> Tensor:
        """(rows, positions, D) -> (rows, H, positions, K)"""
        return hidden.reshape(*hidden.shape[:2], self.num_heads, -1).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
        """(rows, positions of the query, D)"""
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=is_causal)
        return mixed.transpose(1, 2).flatten(2)


class SelfAttention(TextAttention):
    def forward(self, hidden_NLD: Tensor, text: BlipDecodeState | None) -> Tensor:
        query, key, value = (self.heads(project(hidden_NLD)) for project in (self.query, self.key, self.value))
        if text is not None:
            assert text.length == 0 or hidden_NLD.shape[1] == 1, "a cache is continued one token at a time"
            key, value = text.append(self.layer, key, value)
        return self.attend(query, key, value, is_causal=hidden_NLD.shape[1] > 1)


class CrossKey(Linear):
    """absorbed_by: not keys of states, but what so many heads' queries ask of the states."""

    def forward(self, input: Tensor, absorbed_by: int = 0) -> Tensor:
        return through_keys(input, self.weight, absorbed_by) if absorbed_by else super().forward(input)


class CrossValue(Linear):
    """absorbed_by: not values of states, but what so many heads mix of their means of the states."""

    def forward(self, input: Tensor, absorbed_by: int = 0) -> Tensor:
        return through_values(input, self.weight, self.bias, absorbed_by) if absorbed_by else super().forward(input)


class CrossAttention(TextAttention):
    KEY = CrossKey
    VALUE = CrossValue

    def forward(self, hidden_NLD: Tensor, image: ImageState) -> Tensor:
        query_NLD: Tensor = self.query(hidden_NLD)
        # No mask and no positions here: the rows of an image are simply more queries, (N, L) -> (B, k * L).
        folded = query_NLD.reshape(image.num_images, -1, query_NLD.shape[-1])
        if image.absorbed:
            scale = (folded.shape[-1] // self.num_heads) ** -0.5
            mean = mean_states(self.key(folded, absorbed_by=self.num_heads), image.states_BTE, scale)
            mixed: Tensor = self.value(mean, absorbed_by=self.num_heads)
            return mixed.view_as(query_NLD)
        key_BHTK, value_BHTK = image.keys_values(
            self.layer, lambda states_BTE: (self.heads(self.key(states_BTE)), self.heads(self.value(states_BTE)))
        )
        return self.attend(self.heads(folded), key_BHTK, value_BHTK, is_causal=False).view_as(query_NLD)


class ResidualNorm(nn.Module):
    def __init__(self, config: "BlipTextConfig", source_width: int) -> None:
        super().__init__()
        self.dense = Linear(source_width, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, residual_NLD: Tensor) -> Tensor:
        normed_NLD: Tensor = self.LayerNorm(self.dropout(self.dense(hidden)) + residual_NLD)
        return normed_NLD


class AttentionBlock(nn.Module):
    def __init__(self, config: "BlipTextConfig", attention: TextAttention) -> None:
        super().__init__()
        self.self = attention  # the published name, also where it holds cross-attention
        self.output = ResidualNorm(config, config.hidden_size)

    def forward(self, hidden_NLD: Tensor, source: ImageState | BlipDecodeState | None) -> Tensor:
        mixed_NLD: Tensor = self.output(self.self(hidden_NLD, source), hidden_NLD)
        return mixed_NLD


class TextLayer(nn.Module):
    def __init__(self, config: "BlipTextConfig", layer: int) -> None:
        super().__init__()
        self.attention = AttentionBlock(config, SelfAttention(config, layer, config.hidden_size))
        self.crossattention = AttentionBlock(config, CrossAttention(config, layer, config.encoder_hidden_size))
        self.intermediate = _named(
            dense=Linear(config.hidden_size, config.intermediate_size), activation=_gelu(config.hidden_act)
        )
        self.output = ResidualNorm(config, config.intermediate_size)

    def forward(self, hidden_NLD: Tensor, image: ImageState, text: BlipDecodeState | None) -> Tensor:
        hidden_NLD = self.crossattention(self.attention(hidden_NLD, text), image)
        output_NLD: Tensor = self.output(self.intermediate(hidden_NLD), hidden_NLD)
        return output_NLD


class TextEncoder(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.layer = nn.ModuleList(TextLayer(config, layer) for layer in range(config.num_hidden_layers))

    def forward(self, hidden_NLD: Tensor, image: ImageState, text: BlipDecodeState | None) -> Tensor:
        for layer in self.layer:
            hidden_NLD = layer(hidden_NLD, image, text)
        return hidden_NLD


class TextBody(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.embeddings = TextEmbeddings(config)
        self.encoder = TextEncoder(config)

    def forward(self, ids_NL: Tensor, image: ImageState, text: BlipDecodeState | None = None) -> Tensor:
        """hidden_NLD. With `text`, ids_NL continues it and is appended to it."""
        check_rows(len(ids_NL), image)
        start = 0 if text is None else text.length
        hidden_NLD: Tensor = self.encoder(self.embeddings(ids_NL, start), image, text)
        if text is not None:
            text.length += ids_NL.shape[1]
        return hidden_NLD


class PredictionHead(nn.Module):
    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.transform = _named(
            dense=Linear(config.hidden_size, config.hidden_size),
            activation=_gelu(config.hidden_act),
            LayerNorm=nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps),
        )
        self.decoder = Linear(config.hidden_size, config.vocab_size)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))  # decoder.bias by its published second name

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits over the last dimension, float32 or wider."""
        logits: Tensor = self.decoder(self.transform(hidden))
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class TextDecoder(nn.Module):
    """Holds the body and the head under their published names; Blip calls the two of them."""

    def __init__(self, config: "BlipTextConfig") -> None:
        super().__init__()
        self.bert = TextBody(config)
        self.cls = _named(predictions=PredictionHead(config))


class Blip(nn.Module):
    """The captioning model of raycap/decoding/protocol.py: see CaptionModel there for the contract of each method."""

    counts_prompt = True

    def __init__(self, config: "BlipConfig") -> None:
        super().__init__()
        vision = cast("BlipVisionConfig", config.vision_config)
        text = cast("BlipTextConfig", config.text_config)
        self.label_smoothing = text.label_smoothing
        self.vision_model = VisionTower(vision)
        self.text_decoder = TextDecoder(text)
        _initialise(self.vision_model, vision.initializer_range)
        _initialise(self.text_decoder, text.initializer_range)
        is_tied = config.tie_word_embeddings or text.tie_word_embeddings  # either is enough in transformers 5
        for second_name, name in TIED_NAMES.items():
            owner, _, attribute = second_name.rpartition(".")
            if is_tied or attribute == "bias":
                setattr(self.get_submodule(owner), attribute, self.get_parameter(name))

    def encode_image(self, pixel_values_B3SS: Tensor) -> ImageState:
        return ImageState(self.vision_model(pixel_values_B3SS))

    def loss(self, state: ImageState, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        # Position l predicts the label of l + 1. Attention is causal, so padding on the right is seen by no target.
        hidden_NLD = self.text_decoder.bert(input_ids_NL[:, :-1], state)
        return summed_token_loss(self.text_decoder.cls, hidden_NLD, labels_NL[:, 1:], self.label_smoothing)

    def forward(self, pixel_values_B3SS: Tensor, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        return self.loss(self.encode_image(pixel_values_B3SS), input_ids_NL, labels_NL)

    @torch.no_grad()
    def start(self, state: ImageState, prompt_ids_P: Tensor, beams: int = 1) -> BlipDecodeState:
        text = BlipDecodeState(state.for_beams(beams), len(self.text_decoder.bert.encoder.layer))
        B = state.num_images
        if len(prompt_ids_P) > 1:
            self.text_decoder.bert(prompt_ids_P[:-1].expand(B, -1), text.image, text)
        text.reorder(torch.arange(B, device=prompt_ids_P.device).repeat_interleave(beams))
        return text

    @torch.no_grad()
    def step(self, state: BlipDecodeState, ids_N: Tensor) -> Tensor:
        hidden_NLD = self.text_decoder.bert(ids_N[:, None], state.image, state)
        logits_NV: Tensor = self.text_decoder.cls(hidden_NLD[:, 0])
        return logits_NV


def _named(**modules: nn.Module) -> nn.Sequential:
    """The modules in this order, under these names."""
    return nn.Sequential(OrderedDict(modules))


def _gelu(name: str) -> nn.Module:
    if name != "gelu":
        raise ValueError(f"BLIP's layers use the exact 'gelu', the configuration asks for hidden_act={name!r}")
    return nn.GELU()


def _initialise(tower: nn.Module, std: float) -> None:
    """Fresh weights as transformers' BlipPreTrainedModel._init_weights draws them; LayerNorm is as torch makes it."""
    for module in tower.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if module.padding_idx is not None:
                nn.init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, VisionEmbeddings):
            nn.init.trunc_normal_(module.class_embedding, std=std)
            nn.init.trunc_normal_(module.position_embedding, std=std)
