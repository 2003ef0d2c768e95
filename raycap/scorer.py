"""Scorer: how well texts fit images, by BLIP's image-text matching and by the cosine of their vectors."""

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raycap.checkpoint.retrieval import ScorerSpec, open_scorer, open_scorer_spec
from raycap.errors import ErrorKind, ImageError, UserError
from raycap.image import EncodedImage, normalize, prepare_given
from raycap.models.blip_retrieval import BlipRetrieval
from raycap.schema import CaptionResult, ImageSpec

MAX_TOKENS = 35  # of a text, as the published scorers were trained (salesforce/BLIP, models/blip_retrieval.py)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one image's texts, in order; without any where the image could not be read.

    match: the probability that text and image belong together. cosine: of their vectors, from -1 to 1; empty where it was not
    asked for.
    """

    match: tuple[float, ...] = ()
    cosine: tuple[float, ...] = ()
    error_kind: str | None = None
    error: str | None = None


class Scorer:
    """BLIP's scorer with the preprocessing of its folder."""

    def __init__(self, model: BlipRetrieval, spec: ScorerSpec, device: torch.device | str = "cpu") -> None:
        self.model, self.spec, self.device = model.to(device), spec, torch.device(device)

    @classmethod
    def load(cls, source: str | os.PathLike[str], *, device: str = "cpu") -> "Scorer":
        """Of a folder or hub name in the layout of transformers' BlipForImageTextRetrieval; warns that nothing vouches for it.

        Raises CheckpointError and StorageError.
        """
        spec, model = open_scorer(os.fspath(source))
        warnings.warn(f"{os.fspath(source)!r} is unverified: no raycap.json vouches for its files", stacklevel=2)
        return cls(model, spec, device)

    @property
    def fingerprint(self) -> str:
        """sha256 of the folder, the same for every copy of it."""
        return self.spec.fingerprint

    def score(
        self,
        images: Sequence[EncodedImage | npt.NDArray[np.uint8]],
        texts: Sequence[Sequence[str]],
        *,
        micro_batch_size: int = 32,
    ) -> list[Scores]:
        """One result per image. images: encoded bytes or uint8 RGB (H, W, 3). texts: those of each image, any number.

        A text that is matched begins with [ENC], as in training; transformers' processor leaves [CLS] there, which gives
        other probabilities. Never raises for a bad image. Raises ValueError if there are not as many lists of texts as
        images, and TypeError for a text in the place of a list.
        """
        if len(images) != len(texts):
            raise ValueError(f"there are {len(images)} images and {len(texts)} lists of texts; give one for each image")
        if any(isinstance(of_image, str) for of_image in texts):
            raise TypeError("texts holds a text where a list of texts is expected; give a list for each image")
        results: list[Scores] = []
        for first in range(0, len(images), micro_batch_size):
            part = slice(first, first + micro_batch_size)
            results += self._score_together(images[part], texts[part])
        return results

    def _score_together(
        self, images: Sequence[EncodedImage | npt.NDArray[np.uint8]], texts: Sequence[Sequence[str]]
    ) -> list[Scores]:
        results: list[Scores] = [Scores()] * len(images)
        places: list[int] = []
        pixels: list[npt.NDArray[np.uint8]] = []
        for place, image in enumerate(images):
            try:
                pixels.append(prepare_given(image, self.spec.image))
                places.append(place)
            except ImageError as error:
                results[place] = Scores(error_kind=error.kind.value, error=str(error))
        if pixels:
            scores = self.score_prepared(np.stack(pixels), [texts[place] for place in places])
            for place, of_image in zip(places, scores, strict=True):
                results[place] = of_image
        return results

    @torch.no_grad()
    def score_prepared(
        self, pixel_values: npt.NDArray[np.uint8], texts: Sequence[Sequence[str]], *, with_cosine: bool = True
    ) -> list[Scores]:
        """One result per image of uint8 (B, 3, S, S), in order, in one forward pass. texts: see score()."""
        shape = (3, self.spec.image.size, self.spec.image.size)
        if pixel_values.dtype != np.uint8 or pixel_values.shape[1:] != shape or len(pixel_values) != len(texts):
            raise ValueError(
                f"pixel_values are {pixel_values.dtype} {pixel_values.shape} with {len(texts)} lists of texts, not uint8 (images, "
                f"{', '.join(map(str, shape))}) with a list for each; prepare images with raycap.image.prepare_image"
            )
        most = max(map(len, texts), default=0)
        if not most:
            return [Scores()] * len(texts)
        # A copy, because arrays of Ray's object store are read-only and torch cannot hold such.
        state = self.model.encode_image(normalize(torch.tensor(pixel_values, device=self.device), self.spec.image))
        # Every image needs as many rows: empty texts fill up.
        ids_NL, mask_NL = self._rows([text for own in texts for text in [*own, *[""] * (most - len(own))]])
        cosines = (
            self.model.cosine(state, ids_NL, mask_NL).view(-1, most).tolist() if with_cosine else [()] * len(texts)
        )
        ids_NL[:, 0] = self.spec.enc_id
        matches = self.model.match(state, ids_NL, mask_NL).view(-1, most).tolist()
        return [
            Scores(match=tuple(match[: len(own)]), cosine=tuple(cosine[: len(own)]))
            for own, match, cosine in zip(texts, matches, cosines, strict=True)
        ]

    def choose(
        self, pixel_values: npt.NDArray[np.uint8], results: Sequence[CaptionResult], num_candidates: int
    ) -> list[CaptionResult]:
        """The results with the candidate that matches its image best as their caption. One forward pass, in float32.

        results: of each image of uint8 (B, 3, S, S), with all candidates that were found. They come back by match, highest first,
        those of equal match in their order, and cut to num_candidates. A result without a caption stays as it is; one with a match
        that is no number becomes an error "not_finite".
        """
        found = [result.candidates if result.caption is not None else () for result in results]
        # The same text has one row, so that it has one match to the last digit.
        texts = [list(dict.fromkeys(candidate.caption for candidate in of_image)) for of_image in found]
        chosen = []
        for result, own, scores in zip(
            results, texts, self.score_prepared(pixel_values, texts, with_cosine=False), strict=True
        ):
            match = dict(zip(own, scores.match, strict=True))
            if not all(map(math.isfinite, scores.match)):
                result = CaptionResult(
                    caption=None,
                    error_kind=ErrorKind.NOT_FINITE.value,
                    error="the scorer's probabilities for this image are infinite or NaN; see whether other images are captioned",
                )
            elif match:
                matched = [candidate._replace(match=match[candidate.caption]) for candidate in result.candidates]
                # A draw that the captioner itself has no finite probability for is never the caption.
                matched.sort(key=lambda candidate: (not math.isfinite(candidate.score), -match[candidate.caption]))
                result = replace(result, **matched[0]._asdict(), candidates=tuple(matched[:num_candidates]))
            chosen.append(result)
        return chosen

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (N, L) and mask (N, L) of [CLS] text [SEP], cut to MAX_TOKENS and padded on the right."""
        encoded = self.spec.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        most = min(MAX_TOKENS, self.spec.model_config["text_config"]["max_position_embeddings"])
        rows = [[self.spec.cls_id, *e.ids[: most - 2], self.spec.sep_id] for e in encoded]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.spec.pad_id] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]


def scorer_fingerprint(scorer: str, image: ImageSpec, checkpoint: str) -> str:
    """The fingerprint of a scorer's folder or hub name, which is read like Scorer.load but not held in memory; "" for none.

    image: of the checkpoint. Raises CheckpointError, StorageError, and UserError as check_geometry does.
    """
    if not scorer:
        return ""
    spec = open_scorer_spec(scorer)
    check_geometry(spec.image, scorer, image, checkpoint)
    return spec.fingerprint


def chosen_by(scorer: str) -> str:
    """What a job says of the scorer that it uses."""
    return f"captions chosen by {scorer} (unverified: no raycap.json vouches for it)"


def check_geometry(of_scorer: ImageSpec, scorer: str, of_checkpoint: ImageSpec, checkpoint: str) -> None:
    """Raises UserError if the two read other parts of an image. mean and std may differ: each model has its own; and so may decode,
    whose two ways differ less than two sizes of an image do.
    """
    ours, theirs = (
        {name: getattr(image, name) for name in ("size", "fit", "resample")}
        | {"shorter_side": image.shorter_side if image.shorter_side != image.size else 0}  # 0 means the size
        for image in (of_checkpoint, of_scorer)
    )
    if names := [name for name in ours if ours[name] != theirs[name]]:
        wanted, given = (", ".join(f"{name}={values[name]!r}" for name in names) for values in (ours, theirs))
        raise UserError(
            f"checkpoint {checkpoint!r} prepares images with {wanted} and scorer {scorer!r} with {given}, but a scorer reads the "
            f"pixels that the captioner reads; give two that prepare images alike"
        )
