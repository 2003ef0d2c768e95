"""Captioner(model, spec): images in, captions or typed errors out. The only inference path, for every door.

Owns no batching policy and no processes: a caller decides how many images come at once.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache, partial

import numpy as np
import numpy.typing as npt
import torch

from raycap.checkpoint import CheckpointSpec, load_model, open_checkpoint
from raycap.decoding import search
from raycap.decoding.greedy import Decoded
from raycap.decoding.protocol import CaptionModel
from raycap.errors import CheckpointError, ErrorKind, ImageError, UserError
from raycap.image import EncodedImage, normalize, prepare_given
from raycap.models.inference import fold_normalization, use_fast_products
from raycap.schema import Candidate, CaptionResult, DecodeSettings
from raycap.scorer import Scorer, check_geometry
from raycap.text import banned_ids, decode, goes_on, prompt_ids, required_ids

DTYPES = ("fp32", "bf16")


class Captioner:
    """A model with the preprocessing and decode defaults of its checkpoint.

    After load(), `model` serves this captioner alone: see models/inference.py. For a model to train or to look into, load_model.
    """

    def __init__(
        self,
        model: CaptionModel,
        spec: CheckpointSpec,
        device: torch.device | str = "cpu",
        dtype: str = "fp32",
        scorer: Scorer | None = None,
    ) -> None:
        """dtype: bf16 computes matrix products in it; the weights stay as they are. scorer: see load; of the same geometry, on the
        same device.
        """
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}")
        self.model = model
        self.spec = spec
        self.device = torch.device(device)
        self.dtype = dtype
        self.scorer = scorer
        self._takes_bytes = False  # the model has mean and std in its weights
        self._fitting: dict[DecodeSettings, int] = {}  # images at once, where a batch did not fit into memory

    @classmethod
    def load(
        cls,
        source: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "fp32",
        prompt: str = "",
        scorer: str | os.PathLike[str] = "",
    ) -> "Captioner":
        """The captioner of a checkpoint folder (local or s3://), or of published weights: see open_checkpoint.

        prompt: if not empty, in place of the checkpoint's. scorer: folder or hub name, see Scorer.load; of all captions that a search
        finds, the one that it matches best with the image is the caption. It computes in float32, whatever the dtype. Warns of
        published weights, which nothing vouches for. Raises CheckpointError, StorageError, and UserError for a device that this
        machine does not have, and for a scorer that reads other pixels.
        """
        source, scorer = os.fspath(source), os.fspath(scorer)
        _check_device(device)
        spec, weights = open_checkpoint(source, prompt=prompt)
        if not spec.verified:
            warnings.warn(f"{source!r} is unverified: no raycap.json vouches for its files", stacklevel=2)
        matcher = Scorer.load(scorer, device=device) if scorer else None
        if matcher is not None:
            check_geometry(matcher.spec.image, scorer, spec.image, source)
        model = load_model(spec, weights, source).to(device).eval()
        use_fast_products(model)
        captioner = cls(model, spec, device, dtype)
        captioner._takes_bytes = fold_normalization(model, spec.image)
        captioner.scorer = matcher
        return captioner

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
        prompts: Sequence[str] | None = None,
        micro_batch_size: int = 32,
    ) -> list[CaptionResult]:
        """One result per image, in order. images: encoded bytes or uint8 RGB (H, W, 3). Never raises for a bad image.

        prompts: of each image, in place of the checkpoint's. Images are decoded in this process, micro_batch_size at a time,
        and captioned in one forward pass for each prompt among them. Raises before any work: TypeError for what is neither bytes
        nor an array, and for a prompt that is no text; ValueError for settings or prompts that do not fit.
        """
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts or ()):
            raise TypeError(f"prompts is {prompts!r}; give a list with a text for each image")
        if micro_batch_size < 1:
            raise ValueError(f"micro_batch_size is {micro_batch_size}; give at least 1")
        self.check(settings or self.spec.decode, prompts or ())
        given: object = images
        if not isinstance(given, Sequence) or isinstance(given, EncodedImage | str):
            raise TypeError(f"images is {type(given).__name__}; give a list of images, also for a single one")
        for i, image in enumerate(images):
            if not isinstance(image, EncodedImage | np.ndarray):
                raise TypeError(
                    f"image {i} of {len(images)} is {type(image).__name__}, which no caption is made of; give the encoded bytes of an "
                    f"image, or a uint8 RGB array (height, width, 3)"
                )
        if prompts is not None and len(prompts) != len(images):
            raise ValueError(f"there are {len(images)} images and {len(prompts)} prompts; give one for each image")
        results = []
        for first in range(0, len(images), micro_batch_size):
            part = slice(first, first + micro_batch_size)
            results += self._caption_together(images[part], settings, prompts[part] if prompts is not None else None)
        return results

    def check(self, settings: DecodeSettings, prompts: Sequence[str] = ()) -> None:
        """Raises ValueError for settings, or prompts in place of the checkpoint's, that the model cannot follow, and for settings
        that leave a scorer nothing to choose from.
        """
        if self.scorer is not None:
            settings.check_choice()
        for prompt in {*prompts} or {self.spec.text.prompt}:
            self._spec_of(prompt).check_settings(settings)

    def _spec_of(self, prompt: str) -> CheckpointSpec:
        return replace(self.spec, text=replace(self.spec.text, prompt=prompt))

    def _caption_together(
        self,
        images: Sequence[EncodedImage | npt.NDArray[np.uint8]],
        settings: DecodeSettings | None,
        prompts: Sequence[str] | None,
    ) -> list[CaptionResult]:
        results: list[CaptionResult | None] = [None] * len(images)
        prepared = []
        for i, image in enumerate(images):
            try:
                prepared.append((i, prepare_given(image, self.spec.image)))
            except ImageError as error:
                results[i] = CaptionResult(caption=None, error_kind=error.kind.value, error=str(error))
        if prepared:
            captioned = self.caption_prepared(
                np.stack([pixels for _, pixels in prepared]),
                settings,
                prompts=[prompts[i] for i, _ in prepared] if prompts is not None else None,
            )
            for (i, _), result in zip(prepared, captioned, strict=True):
                results[i] = result
        return [result for result in results if result is not None]

    @torch.no_grad()
    def caption_prepared(
        self,
        pixel_values: npt.NDArray[np.uint8],
        settings: DecodeSettings | None = None,
        *,
        prompts: Sequence[str] | None = None,
        all_finished: Callable[[bool], bool] | None = None,
    ) -> list[CaptionResult]:
        """One result per image of uint8 (B, 3, S, S), in order. Raises ValueError for settings that do not fit the model.

        prompts: of each image, in place of the checkpoint's. An image for which the model, or the scorer, gives no finite
        probabilities is a result with error_kind "not_finite"; see check_finite. One for which no caption with the required words
        is found is a result with error_kind "no_such_caption".
        all_finished: asked once a step with whether this rank is done, answers whether every rank is; ranks that share
        ZeRO-3 parameters must take equal numbers of steps.
        """
        settings = settings or self.spec.decode
        self.check(settings, prompts or ())
        shape = (3, self.spec.image.size, self.spec.image.size)
        if pixel_values.dtype != np.uint8 or pixel_values.shape[1:] != shape:
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {pixel_values.shape}, not uint8 (images, {', '.join(map(str, shape))}); prepare "
                f"images with raycap.image.prepare_image"
            )
        if not len(pixel_values) and all_finished is None:
            return []
        places = {self.spec.text.prompt: list(range(len(pixel_values)))}
        if prompts is not None:
            places = {
                prompt: [i for i, own in enumerate(prompts) if own == prompt] for prompt in dict.fromkeys(prompts)
            }
        results: dict[int, CaptionResult] = {}
        for prompt, images in places.items():
            captioned = self._caption_in_parts(pixel_values[images], settings, prompt, all_finished)
            results |= dict(zip(images, captioned, strict=True))
        return [results[i] for i in range(len(pixel_values))]

    def _caption_in_parts(
        self,
        pixel_values: npt.NDArray[np.uint8],
        settings: DecodeSettings,
        prompt: str,
        all_finished: Callable[[bool], bool] | None,
    ) -> list[CaptionResult]:
        """As many images at once as memory holds: halved as often as it does not, and remembered."""
        if all_finished is not None:  # a rank that takes other steps than the others would hang them
            return self._caption_part(pixel_values, settings, prompt, all_finished)
        results: list[CaptionResult] = []
        while len(results) < len(pixel_values):
            size = min(self._fitting.get(settings, len(pixel_values)), len(pixel_values) - len(results))
            try:
                results += self._caption_part(pixel_values[len(results) : len(results) + size], settings, prompt)
                continue
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                lack = str(error).partition("\n")[0]
            # Outside of the handler, whose exception still holds the tensors.
            if size == 1:
                raise UserError(
                    f"the memory of device {str(self.device)!r} does not hold the search of one image with {settings} ({lack}); give "
                    f"fewer beams or candidates, or another device"
                )
            self._fitting[settings] = size // 2
            warnings.warn(
                f"{size} images do not fit into the memory of device {str(self.device)!r}, so {size // 2} are captioned at once; a "
                f"smaller micro batch size spares the attempt",
                stacklevel=2,
            )
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results

    def _caption_part(
        self,
        pixel_values: npt.NDArray[np.uint8],
        settings: DecodeSettings,
        prompt: str,
        all_finished: Callable[[bool], bool] | None = None,
    ) -> list[CaptionResult]:
        results = [
            self._result(found, settings) for found in self._search(pixel_values, settings, prompt, all_finished)
        ]
        return self.scorer.choose(pixel_values, results, settings.num_candidates) if self.scorer else results

    def _search(
        self,
        pixel_values: npt.NDArray[np.uint8],
        settings: DecodeSettings,
        prompt: str,
        all_finished: Callable[[bool], bool] | None = None,
    ) -> list[list[Decoded]]:
        # A copy, because arrays of Ray's object store are read-only and torch cannot hold such.
        pixels = torch.tensor(pixel_values, device=self.device)
        pixels = pixels.float() if self._takes_bytes else normalize(pixels, self.spec.image)
        text = replace(self.spec.text, prompt=prompt)
        banned = banned_ids(self.spec.tokenizer, settings.banned_words)
        with self._autocast():
            return search(
                self.model,
                self.model.encode_image(pixels),
                torch.tensor(prompt_ids(self.spec.tokenizer, text), device=self.device),
                eos_id=self.spec.text.eos_id,
                settings=settings,
                banned=banned,
                required=required_ids(self.spec.tokenizer, settings.required_words, banned),
                goes_on=cache(partial(goes_on, self.spec.tokenizer)),
                image_seeds=[_seed_of(image) for image in pixel_values] if settings.do_sample else (),
                all_finished=all_finished,
            )

    def _autocast(self) -> AbstractContextManager[object]:
        # In fp32 the caller's context holds: training validates in the dtype it trains in.
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == "bf16" else nullcontext()

    def _result(self, captions: list[Decoded], settings: DecodeSettings) -> CaptionResult:
        if not captions:
            return CaptionResult(
                caption=None,
                error_kind=ErrorKind.NO_SUCH_CAPTION.value,
                error=f"no caption of at most {settings.max_new_tokens} tokens was found that holds the required words "
                f"{settings.required_words!r}; raise max_new_tokens, ban fewer words, or leave some of these out",
            )
        if not math.isfinite(captions[0].score):
            return CaptionResult(
                caption=None,
                error_kind=ErrorKind.NOT_FINITE.value,
                error="the model's probabilities for this image are infinite or NaN; see whether other images are captioned",
            )
        tokenizer = self.spec.tokenizer
        found = [Candidate(decode(tokenizer, c.ids), c.score, c.log_prob) for c in captions]
        kept = len(found) if self.scorer else settings.num_candidates  # it chooses from all
        return CaptionResult(**found[0]._asdict(), candidates=tuple(found[:kept]))


def check_finite(error_kinds: Iterable[str | None]) -> None:
    """Raises CheckpointError if the model read several images of these and had finite probabilities for none."""
    of_model = [kind for kind in error_kinds if kind in (None, ErrorKind.NOT_FINITE.value)]
    if len(of_model) > 1 and None not in of_model:
        raise CheckpointError(
            f"the model's probabilities are infinite or NaN for all of {len(of_model)} images, so the checkpoint's weights, or those "
            f"of its scorer, are broken or too large for the dtype they are computed in; choose fp32 or another checkpoint or scorer"
        )


def is_out_of_memory(error: Exception) -> bool:
    """Of a GPU, or of the CPU where a limit makes an allocation fail: torch has no type for that, and oneDNN no word."""
    on_cpu = ("DefaultCPUAllocator", "could not create a primitive", "could not create a memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in on_cpu)


def _seed_of(pixels: npt.NDArray[np.uint8]) -> int:
    """63 bits that follow from the pixels, so that the same image is drawn the same caption wherever it lies."""
    return int.from_bytes(hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "big") >> 1


def _check_device(device: str) -> None:
    try:
        torch.empty(1, device=device)
    except (AssertionError, RuntimeError) as error:  # torch built without it, no driver, no such number, no such name
        raise UserError(
            f"device {device!r} cannot be used on this machine ({str(error).partition(chr(10))[0].rstrip('.')}); give device='cpu'"
        ) from error
