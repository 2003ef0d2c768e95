"""Captioner(model, spec): images in, captions or typed errors out. The only inference path, for every door.

Owns no batching policy and no processes: a caller decides how many images come at once.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from raycap.checkpoint import CheckpointSpec, load_checkpoint, load_model
from raycap.decoding.greedy import greedy
from raycap.decoding.protocol import CaptionModel
from raycap.errors import ImageError
from raycap.image import decode_image, normalize, prepare_image
from raycap.schema import CaptionResult, DecodeSettings
from raycap.text import decode, prompt_ids


class Captioner:
    """A model with the preprocessing and decode defaults of its checkpoint."""

    def __init__(self, model: CaptionModel, spec: CheckpointSpec, device: torch.device | str = "cpu") -> None:
        self.model = model
        self.spec = spec
        self.device = torch.device(device)
        self._prompt = torch.tensor(prompt_ids(spec.tokenizer, spec.text), device=self.device)

    @classmethod
    def load(cls, checkpoint_dir: str, *, device: str = "cpu") -> "Captioner":
        """The captioner of a checkpoint folder, local or s3://. Raises CheckpointError."""
        spec, weights = load_checkpoint(checkpoint_dir)
        model = load_model(spec, weights, checkpoint_dir).to(device).eval()
        return cls(model, spec, device)

    def caption(
        self, images: Sequence[bytes | npt.NDArray[np.uint8]], settings: DecodeSettings | None = None
    ) -> list[CaptionResult]:
        """One result per image, in order. images: encoded bytes or uint8 RGB (H, W, 3). Never raises for a bad image."""
        results: list[CaptionResult | None] = [None] * len(images)
        prepared = []
        for i, image in enumerate(images):
            try:
                pixels = decode_image(image) if isinstance(image, bytes) else image
                prepared.append((i, prepare_image(pixels, self.spec.image)))
            except ImageError as error:
                results[i] = CaptionResult(caption=None, error_kind=error.kind.value, error=str(error))
        if prepared:
            captioned = self.caption_prepared(np.stack([pixels for _, pixels in prepared]), settings)
            for (i, _), result in zip(prepared, captioned, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    @torch.no_grad()
    def caption_prepared(
        self,
        pixel_values: npt.NDArray[np.uint8],
        settings: DecodeSettings | None = None,
        *,
        all_finished: Callable[[bool], bool] | None = None,
        autocast: AbstractContextManager[object] | None = None,
    ) -> list[CaptionResult]:
        """One result per image of uint8 (B, 3, S, S), in order.

        all_finished: asked once a step with whether this rank is done, answers whether every rank is; ranks that share
        ZeRO-3 parameters must take equal numbers of steps.
        """
        # A copy, because arrays of Ray's object store are read-only and torch cannot hold such.
        pixels = normalize(torch.tensor(pixel_values, device=self.device), self.spec.image)
        with autocast or nullcontext():
            decoded = greedy(
                self.model,
                self.model.encode_image(pixels),
                self._prompt,
                eos_id=self.spec.text.eos_id,
                settings=settings or self.spec.decode,
                all_finished=all_finished,
            )
        return [CaptionResult(caption=decode(self.spec.tokenizer, d.ids), score=d.score) for d in decoded]
