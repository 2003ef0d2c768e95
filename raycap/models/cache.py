"""What text rows have read so far, and what the rows of one image share. BLIP's and GPT-2's decoders use it.

Owns keys and values between calls. Does not own the projections that make them, nor the search that reorders them.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P prefix length,
E width of the image's states, T image tokens, H heads, K width of a head, C capacity of a cache.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor

from raycap.models.absorbed import MAX_BEAMS

CACHE_GROWTH = 32  # slots; a COCO caption with its prompt and end token fits into the first allocation


class SharedState(Protocol):
    """What a model's encode_image gives and all rows of an image share."""

    @property
    def num_images(self) -> int: ...

    def select(self, images: Tensor) -> Self:
        """A new state for decoding, of the images at these positions (int64), in this order."""


Shared = TypeVar("Shared", bound=SharedState)


def check_rows(num_rows: int, shared: SharedState) -> None:
    """Raises ValueError unless every image has the same number of rows."""
    if num_rows % shared.num_images:
        raise ValueError(
            f"every image needs the same number of text rows, got {num_rows} rows for {shared.num_images} images"
        )


@dataclass
class ImageState:
    """What text rows look at: the vision tower's output, and the keys and values each text layer makes of it.

    absorbed: layers look at states_BTE itself, see absorbed.py.
    """

    states_BTE: Tensor
    # By (layer, grad mode): captions sampled under no_grad must not leave keys without a graph for a later loss.
    cross: dict[tuple[int, bool], tuple[Tensor, Tensor]] = field(default_factory=dict)
    absorbed: bool = False

    @property
    def num_images(self) -> int:
        return len(self.states_BTE)

    def for_beams(self, beams: int) -> "ImageState":
        """The same, for so many rows an image in decoding; what either projects, both have."""
        is_projected = (0, False) in self.cross
        return ImageState(self.states_BTE, self.cross, absorbed=beams <= MAX_BEAMS and not is_projected)

    def keys_values(self, layer: int, project: Callable[[Tensor], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """What project(states_BTE) returns, each (B, H, T, K), projected once per layer and grad mode."""
        cached = (layer, torch.is_grad_enabled())
        if cached not in self.cross:
            self.cross[cached] = project(self.states_BTE)
        return self.cross[cached]

    def select(self, images: Tensor) -> "ImageState":
        decoding = {key: value for key, value in self.cross.items() if not key[1]}
        cross = {key: (keys[images], values[images]) for key, (keys, values) in decoding.items()}
        return ImageState(self.states_BTE[images], cross, self.absorbed)


@dataclass
class Prefix:
    """Keys and values of P positions which all rows of an image follow: (B, H, P, K) each, one pair per layer.

    A decoder that reads embeddings with an empty Prefix as its `text` fills it, once and with its graph; later calls of
    the decoder take it as their `prefix`.
    """

    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    length: int = 0

    @property
    def num_images(self) -> int:
        return len(self.layers[0][0])

    def append(self, layer: int, key_BHPK: Tensor, value_BHPK: Tensor) -> tuple[Tensor, Tensor]:
        assert self.length == 0, "a prefix is read by one call"
        assert layer == len(self.layers), "a prefix is read layer by layer"
        self.layers.append((key_BHPK, value_BHPK))
        return key_BHPK, value_BHPK

    def before(self, layer: int, key_NHSK: Tensor, value_NHSK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with those of each row's image in front: (N, H, P + S, K) each."""
        keys_values = zip(self.layers[layer], (key_NHSK, value_NHSK), strict=True)
        key, value = (torch.cat([_per_row(x_BHPK, len(x)), x], dim=2) for x_BHPK, x in keys_values)
        return key, value

    def select(self, images: Tensor) -> "Prefix":
        return Prefix([(keys[images], values[images]) for keys, values in self.layers], self.length)


class TextCache:
    """Self-attention keys and values of the text so far, of N rows. For decoding: it is written in place, no graph."""

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self.length = 0
        self._layers: list[Tensor | None] = [None] * num_layers  # (key or value, N, H, C, K) each
        self._spare: Tensor | None = None  # such a one: fresh memory for every reorder() takes ten times as long

    def append(self, layer: int, key_NHLK: Tensor, value_NHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of every position so far, these included. `length` moves on when all layers have appended."""
        N, H, L, K = key_NHLK.shape
        end, cache = self.length + L, self._layers[layer]
        if cache is None or end > cache.shape[3]:
            grown = key_NHLK.new_empty(2, N, H, -(-end // CACHE_GROWTH) * CACHE_GROWTH, K)
            if cache is not None:
                grown[..., : self.length, :] = cache[..., : self.length, :]
            self._layers[layer] = cache = grown
        cache[0, :, :, self.length : end] = key_NHLK
        cache[1, :, :, self.length : end] = value_NHLK
        return cache[0, :, :, :end], cache[1, :, :, :end]

    def reorder(self, index_N: Tensor) -> None:
        """Row r goes on from the text of row index_N[r], which must belong to the same image."""
        self.num_rows, written = len(index_N), slice(0, self.length)
        for layer, cache in enumerate(self._layers):
            if cache is None:
                continue
            kinds, _, *others = cache.shape
            shape = (kinds, len(index_N), *others)
            spare = self._spare if self._spare is not None and self._spare.shape == shape else cache.new_empty(shape)
            torch.index_select(cache[..., written, :], 1, index_N, out=spare[..., written, :])
            self._layers[layer], self._spare = spare, cache


class TextState(TextCache, Generic[Shared]):
    """The text so far of N = B * beams rows, and the image state they share: a decode state of decoding/protocol.py."""

    def __init__(self, image: Shared, num_layers: int) -> None:
        super().__init__(num_layers, image.num_images)
        self.image = image

    def keep(self, images: Tensor) -> None:
        """Drop every image but those at these positions, with all their rows. start()'s image state is untouched."""
        rows = torch.arange(self.num_rows, device=images.device).view(self.image.num_images, -1)[images]
        self.image = self.image.select(images)
        self.reorder(rows.flatten())


def _per_row(keys_BHPK: Tensor, num_rows: int) -> Tensor:
    """The keys or values of each row's image: (N, H, P, K), without a copy where an image has one row."""
    k = num_rows // len(keys_BHPK)
    return keys_BHPK[:, None].expand(-1, k, -1, -1, -1).flatten(0, 1)
