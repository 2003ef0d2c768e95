"""Captioner(model, spec): images in, captions or typed errors out. The only inference path, for every door.

Owns no batching policy and no processes: a caller decides how many images come at once.
"""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import numpy.typing as npt
import torch

from raycap.checkpoint import CheckpointSpec, load_model, open_checkpoint
from raycap.decoding import search
from raycap.decoding.greedy import Decoded
from raycap.decoding.protocol import CaptionModel
from raycap.errors import CheckpointError, ImageError, UserError
from raycap.image import EncodedImage, normalize, prepare_given
from raycap.schema import CaptionResult, DecodeSettings
from raycap.text import decode, prompt_ids

DTYPES = ("fp32", "bf16")


class Captioner:
    """A model with the preprocessing and decode defaults of its checkpoint."""

    def __init__(
        self,
        model: CaptionModel,
        spec: CheckpointSpec,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        *,
        source: str = "",
    ) -> None:
        """dtype: bf16 computes matrix products in it; the weights stay as they are. source: the checkpoint's name in errors."""
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}")
        self.model = model
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype
        self.source = source
        self._prompt = torch.tensor(prompt_ids(spec.tokenizer, spec.text), device=self.device)

    @classmethod
    def load(
        cls, source: str | os.PathLike[str], *, device: str = "cpu", dtype: str = "fp32", prompt: str = ""
    ) -> "Captioner":
        """The captioner of a checkpoint folder (local or s3://), or of published weights: see open_checkpoint.

        prompt: if not empty, in place of the checkpoint's. Warns of published weights, which nothing vouches for. Raises CheckpointError, StorageError, and UserError for a
        device that this machine does not have.
        """
        source = os.fspath(source)
        _check_device(device)
        spec, weights = open_checkpoint(source, prompt=prompt)
        if not spec.verified:
            warnings.warn(f"{source!r} is unverified: no raycap.json vouches for its files", stacklevel=2)
        model = load_model(spec, weights, source).to(device).eval()
        return cls(model, spec, device, dtype, source=source)

    @property
    def verified(self) -> bool:
        """Whether a raycap.json vouches for every file that was read."""
        return self.spec.verified

    @property
    def fingerprint(self) -> str:
        """sha256 of the checkpoint, the same for every copy of it."""
        return self.spec.fingerprint

    def caption(
        self,
        images: Sequence[EncodedImage | npt.NDArray[np.uint8]],
        settings: DecodeSettings | None = None,
        *,
        micro_batch_size: int = 32,
    ) -> list[CaptionResult]:
        """One result per image, in order. images: encoded bytes or uint8 RGB (H, W, 3). Never raises for a bad image.

        Images are decoded in this process, micro_batch_size at a time, and captioned in one forward pass. Raises before any
        work: TypeError for what is neither bytes nor an array, ValueError for settings that do not fit.
        """
        self.spec.check_settings(settings or self.spec.decode)
        given: object = images
        if not isinstance(given, Sequence) or isinstance(given, EncodedImage | str):
            raise TypeError(f"images is {type(given).__name__}; give a list of images, also for a single one")
        for i, image in enumerate(images):
            if not isinstance(image, EncodedImage | np.ndarray):
                raise TypeError(
                    f"image {i} of {len(images)} is {type(image).__name__}, which no caption is made of; give the encoded bytes of an "
                    f"image, or a uint8 RGB array (height, width, 3)"
                )
        results = []
        for first in range(0, len(images), micro_batch_size):
            results += self._caption_together(images[first : first + micro_batch_size], settings)
        return results

    def _caption_together(
        self, images: Sequence[EncodedImage | npt.NDArray[np.uint8]], settings: DecodeSettings | None
    ) -> list[CaptionResult]:
        results: list[CaptionResult | None] = [None] * len(images)
        prepared = []
        for i, image in enumerate(images):
            try:
                prepared.append((i, prepare_given(image, self.spec.image)))
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
    ) -> list[CaptionResult]:
        """One result per image of uint8 (B, 3, S, S), in order. Raises ValueError for settings that do not fit the model.

        all_finished: asked once a step with whether this rank is done, answers whether every rank is; ranks that share
        ZeRO-3 parameters must take equal numbers of steps. With it a score that is not finite is returned; without it
        CheckpointError is raised, as a rank must not: it would leave the others waiting.
        """
        settings = settings or self.spec.decode
        self.spec.check_settings(settings)
        shape = (3, self.spec.image.size, self.spec.image.size)
        if pixel_values.dtype != np.uint8 or pixel_values.shape[1:] != shape:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {pixel_values.shape}, not uint8 (images, {', '.join(map(str, shape))}); prepare "
                f"images with raycap.image.prepare_image"
            )
        if not len(pixel_values) and all_finished is None:
            return []
        # A copy, because arrays of Ray's object store are read-only and torch cannot hold such.
        pixels = normalize(torch.tensor(pixel_values, device=self.device), self.spec.image)
        with self._autocast():
            images = search(
                self.model,
                self.model.encode_image(pixels),
                self._prompt,
                eos_id=self.spec.text.eos_id,
                settings=settings,
                all_finished=all_finished,
            )
        if all_finished is None and not all(math.isfinite(best.score) for best, *_ in images):
            raise CheckpointError(
                f"the model{f' of {self.source!r}' if self.source else ''} gives probabilities that are infinite or NaN, so its weights "
                f"are broken or too large for {self.dtype}; choose another checkpoint"
            )
        return [self._result(captions, settings) for captions in images]

    def _autocast(self) -> AbstractContextManager[object]:
        # In fp32 the caller's context holds: training validates in the dtype it trains in.
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def _result(self, captions: list[Decoded], settings: DecodeSettings) -> CaptionResult:
        texts = [(decode(self.spec.tokenizer, c.ids), c.score) for c in captions[: max(1, settings.num_candidates)]]
        return CaptionResult(caption=texts[0][0], score=texts[0][1], candidates=tuple(texts[: settings.num_candidates]))


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch built without it, no driver, no such number, no such name
        raise UserError(
            f"device {device!r} cannot be used on this machine ({str(error).partition(chr(10))[0].rstrip('.')}); give device='cpu'"
        ) from error
