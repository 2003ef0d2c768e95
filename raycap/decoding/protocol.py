"""What the search and the training loop ask of a captioning model. raycap/models fits it by structure, not by import.

Shape suffixes: B images, N text rows (image i owns rows i*k .. i*k+k-1, k = N // B), L text length, P prompt length,
V vocabulary, S side of the image in pixels. The state types are each model's own: the search only hands them back.
"""

from typing import Any, Protocol

from torch import Tensor


class DecodeState(Protocol):
    """The text generated so far, N = B * beams rows, and the image state they share."""

    num_rows: int

    def reorder(self, index_N: Tensor) -> None:
        """Row r goes on from the text of row index_N[r] (int64), which must belong to the same image."""

    def keep(self, images: Tensor) -> None:
        """Drop every image but those at these positions (int64), with all their rows."""


class CaptionModel(Protocol):
    counts_prompt: bool
    """Whether rules (what was said, n-grams, banned words) see the prompt, first token included, as transformers' generate()
    of such a model does: it does not where the prompt is given as vectors."""

    def encode_image(self, pixel_values_B3SS: Tensor) -> Any:
        """The image state: computed once per image, shared by all its captions or beams. pixel_values: normalised."""

    def loss(self, state: Any, input_ids_NL: Tensor, labels_NL: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the token losses (0-d, float32) and the number of target tokens (0-d, int64).

        input_ids: int64, padded on the right. labels: the same positions, unshifted, -100 where nothing is to be
        learned. With no target at all the loss is 0 and every parameter still gets a (zero) gradient.
        """

    def start(self, state: Any, prompt_ids_P: Tensor, beams: int = 1) -> DecodeState:
        """A decode state that has read prompt_ids[:-1] (int64, the same for all images); step() takes the last one."""

    def step(self, state: Any, ids_N: Tensor) -> Tensor:
        """logits_NV (float32) of the token after ids_N (int64), which is appended to the state. Never has a graph."""
