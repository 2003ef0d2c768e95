"""GPT-2 (Radford et al. 2019) as a caption decoder: it reads embeddings, and optionally an image or a shared prefix.

Owns the network and its fresh weights. Does not own caches (cache.py), losses (loss.py) or what the embeddings are.
Parameter names and shapes are those of transformers' GPT2LMHeadModel, with and without cross-attention, and the tests
hold it equal. What differs is where the work is done: attention is torch's scaled_dot_product_attention, the rows of an
image are folded into one query for cross-attention, and a prefix is read once per image.

Every parameter is used inside forward() of the module that owns it, and modules are only called, never reached into:
DeepSpeed ZeRO-3 gathers parameters in forward hooks.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L length of this call's text, P
prefix length, S length of all that a row attends to, V vocabulary, D width, T image tokens, H heads, K width of a head.
"""

import math
import re
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from raycap.models.absorbed import mean_states, through_keys, through_values
from raycap.models.cache import ImageState, Prefix, TextCache, check_rows
from raycap.models.linear import Linear, is_sharded, linear

if TYPE_CHECKING:
    from transformers import GPT2Config

TIED_NAMES = {"lm_head.weight": "transformer.wte.weight"}  # second name -> first, where the configuration ties them
# Causal masks that transformers before 5 kept as buffers, still in many published files. They are no weights.
MASK_BUFFER = re.compile(r"(^|\.)h\.\d+\.(attn|crossattention)\.(bias|masked_bias)$")


class Projection(nn.Module):
    """A linear layer whose weight is stored (in, out), as GPT-2 was published."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width_in, width_out))  # _initialise draws it, or a file has it
        self.bias = nn.Parameter(torch.zeros(width_out))

    def forward(self, hidden: Tensor) -> Tensor:
        product = F.linear if is_sharded(self.weight) else linear
        return product(hidden, self.weight.T, self.bias)


class Attention(nn.Module):
    """What self-attention and cross-attention share."""

    def __init__(self, config: "GPT2Config", layer: int) -> None:
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"GPT-2's n_embd must be a multiple of n_head, got {config.n_embd} and {config.n_head}")
        self.layer = layer
        self.num_heads = config.n_head
        self.dropout = config.attn_pdrop
        self.scale = (config.n_embd // config.n_head) ** -0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1
        self.c_proj = Projection(config.n_embd, config.n_embd)
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def heads(self, hidden: Tensor) -> Tensor:
        """(rows, positions, D) -> (rows, H, positions, K)"""
        return hidden.reshape(*hidden.shape[:2], self.num_heads, -1).transpose(1, 2)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *, causal: bool) -> Tensor:
        """(rows, positions of the query, D). causal: the query's positions are the last ones of the keys'."""
        L, S = query.shape[2], key.shape[2]
        mask_LS = None
        if causal and 1 < L < S:  # torch's is_causal would align the first positions
            mask_LS = torch.ones(L, S, dtype=torch.bool, device=query.device).tril(S - L)
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask_LS,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal and 1 < L == S,
            scale=self.scale,
        )
        return mixed.transpose(1, 2).flatten(2)


class SelfAttention(Attention):
    def __init__(self, config: "GPT2Config", layer: int) -> None:
        super().__init__(config, layer)
        self.c_attn = Projection(config.n_embd, 3 * config.n_embd)

    def forward(self, hidden_NLD: Tensor, text: TextCache | Prefix | None, prefix: Prefix | None) -> Tensor:
        query, key, value = (self.heads(part) for part in self.c_attn(hidden_NLD).chunk(3, dim=-1))
        if text is not None:
            key, value = text.append(self.layer, key, value)
        if prefix is not None:
            key, value = prefix.before(self.layer, key, value)
        mixed_NLD: Tensor = self.resid_dropout(self.c_proj(self.attend(query, key, value, causal=True)))
        return mixed_NLD


class KeysValues(Projection):
    """Of an image's states, side by side. absorbed: not keys or values, but see absorbed.py."""

    def __init__(self, config: "GPT2Config") -> None:
        super().__init__(config.n_embd, 2 * config.n_embd)
        self.num_heads = config.n_head

    def forward(self, hidden: Tensor, absorbed: Literal["", "keys", "values"] = "") -> Tensor:
        if not absorbed:
            return super().forward(hidden)
        key_weight_DE, value_weight_DE = self.weight.T.chunk(2)
        if absorbed == "keys":
            return through_keys(hidden, key_weight_DE, self.num_heads)
        return through_values(hidden, value_weight_DE, self.bias.chunk(2)[1], self.num_heads)


class CrossAttention(Attention):
    def __init__(self, config: "GPT2Config", layer: int) -> None:
        super().__init__(config, layer)
        self.c_attn = KeysValues(config)
        self.q_attn = Projection(config.n_embd, config.n_embd)

    def forward(self, hidden_NLD: Tensor, image: ImageState) -> Tensor:
        query_NLD: Tensor = self.q_attn(hidden_NLD)
        # No mask and no positions here: the rows of an image are simply more queries, (N, L) -> (B, k * L).
        folded = query_NLD.reshape(image.num_images, -1, query_NLD.shape[-1])
        if image.absorbed:
            asked: Tensor = self.c_attn(folded, absorbed="keys")
            mixed = self.c_attn(mean_states(asked, image.states_BTE, self.scale), absorbed="values")
        else:
            keys_values = image.keys_values(self.layer, self._keys_values)
            mixed = self.attend(self.heads(folded), *keys_values, causal=False)
        mixed_NLD: Tensor = self.resid_dropout(self.c_proj(mixed.view_as(query_NLD)))
        return mixed_NLD

    def _keys_values(self, states_BTD: Tensor) -> tuple[Tensor, Tensor]:
        key, value = (self.heads(part) for part in self.c_attn(states_BTD).chunk(2, dim=-1))
        return key, value


class FeedForward(nn.Module):
    def __init__(self, config: "GPT2Config") -> None:
        super().__init__()
        width = config.n_inner if config.n_inner is not None else 4 * config.n_embd
        self.c_fc = Projection(config.n_embd, width)
        self.c_proj = Projection(width, config.n_embd)
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, hidden_NLD: Tensor) -> Tensor:
        output_NLD: Tensor = self.dropout(self.c_proj(F.gelu(self.c_fc(hidden_NLD), approximate="tanh")))
        return output_NLD


class Layer(nn.Module):
    def __init__(self, config: "GPT2Config", layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = SelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        if config.add_cross_attention:
            self.crossattention = CrossAttention(config, layer)
            self.ln_cross_attn = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = FeedForward(config)

    def forward(
        self, hidden_NLD: Tensor, image: ImageState | None, text: TextCache | Prefix | None, prefix: Prefix | None
    ) -> Tensor:
        hidden_NLD = hidden_NLD + self.attn(self.ln_1(hidden_NLD), text, prefix)
        if image is not None:
            hidden_NLD = hidden_NLD + self.crossattention(self.ln_cross_attn(hidden_NLD), image)
        output_NLD: Tensor = hidden_NLD + self.mlp(self.ln_2(hidden_NLD))
        return output_NLD


class TextBody(nn.Module):
    def __init__(self, config: "GPT2Config") -> None:
        super().__init__()
        self.reads_image = config.add_cross_attention
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(Layer(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def forward(
        self, embeddings_NLD: Tensor, image: ImageState | None, text: TextCache | Prefix | None, prefix: Prefix | None
    ) -> Tensor:
        assert self.reads_image == (image is not None), "an image goes with the configuration's add_cross_attention"
        N, L = embeddings_NLD.shape[:2]
        for shared in (image, prefix):
            if shared is not None:
                check_rows(N, shared)
        start = sum(source.length for source in (prefix, text) if source is not None)
        if start + L > self.wpe.num_embeddings:  # on a GPU the look-up itself would kill the process
            raise ValueError(f"this GPT-2 reads {self.wpe.num_embeddings} positions, got {start + L}")
        positions_L = torch.arange(start, start + L, device=embeddings_NLD.device)
        hidden_NLD = self.drop(embeddings_NLD + self.wpe(positions_L))
        for layer in self.h:
            hidden_NLD = layer(hidden_NLD, image, text, prefix)
        if text is not None:
            text.length += L
        normed_NLD: Tensor = self.ln_f(hidden_NLD)
        return normed_NLD


class LanguageHead(Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        """Logits over the last dimension, float32 or wider."""
        logits = super().forward(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Gpt2(nn.Module):
    """embed() makes embeddings of token ids, a call makes hidden states of embeddings, lm_head makes logits of those."""

    def __init__(self, config: "GPT2Config") -> None:
        super().__init__()
        _check(config)
        self.num_layers = config.n_layer
        self.transformer = TextBody(config)
        self.lm_head = LanguageHead(config.n_embd, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.wte.weight
        _initialise(self, config.initializer_range)

    def embed(self, ids: Tensor) -> Tensor:
        """Token embeddings, (..., D), without positions. ids: int64, of any shape."""
        embedded: Tensor = self.transformer.wte(ids)
        return embedded

    def forward(
        self,
        embeddings_NLD: Tensor,
        image: ImageState | None = None,
        text: TextCache | Prefix | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """hidden_NLD for lm_head. Positions count on from those of the prefix and of the text so far.

        image: what cross-attention looks at, of width D; asked for if the configuration has add_cross_attention, and
        refused otherwise. text: these embeddings continue it and are appended to it; a TextCache has N rows, an empty
        Prefix is filled with what these embeddings are as one. prefix: each row attends to the one of its image, then
        to itself causally; image and prefix hold B images, N a multiple of B.
        """
        hidden_NLD: Tensor = self.transformer(embeddings_NLD, image, text, prefix)
        return hidden_NLD


def _check(config: "GPT2Config") -> None:
    """Raises ValueError, naming the field, for a configuration that this file would compute differently."""
    if config.activation_function != "gelu_new":
        raise ValueError(
            f"this GPT-2 computes 'gelu_new', the configuration asks for activation_function={config.activation_function!r}"
        )
    if config.reorder_and_upcast_attn:
        raise ValueError(
            "this GPT-2 does not reorder attention, the configuration asks for reorder_and_upcast_attn=True"
        )


def _initialise(model: Gpt2, std: float) -> None:
    """Fresh weights as transformers' GPT2PreTrainedModel._init_weights draws them; LayerNorm is as torch makes it."""
    for name, module in model.named_modules():
        if isinstance(module, Projection):
            # The last one of each residual path: 2 paths a layer, also where cross-attention is a third.
            scale = math.sqrt(2 * model.num_layers) if name.endswith("c_proj") else 1.0
            nn.init.normal_(module.weight, std=std / scale)
        elif isinstance(module, nn.Embedding) or (
            module is model.lm_head and module.weight is not model.transformer.wte.weight
        ):
            nn.init.normal_(module.weight, std=std)
