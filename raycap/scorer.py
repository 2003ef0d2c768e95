"""Scorer: how well texts fit images, by BLIP's image-text matching and by the cosine of their vectors."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from raycap.checkpoint.retrieval import ScorerSpec, open_scorer
from raycap.errors import ImageError
from raycap.image import EncodedImage, normalize, prepare_given
from raycap.models.blip_retrieval import BlipRetrieval

MAX_TOKENS = 35  # of a text, as the published scorers were trained (salesforce/BLIP, models/blip_retrieval.py)


@dataclass(frozen=True, slots=True)
class Scores:
    """Of one image's texts, in order; without any where the image could not be read.

    match: the probability that text and image belong together. cosine: of their vectors, from -1 to 1.
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

    @torch.no_grad()
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
        places, pixels = [], []
        for place, image in enumerate(images):
            try:
                pixels.append(prepare_given(image, self.spec.image))
                places.append(place)
            except ImageError as error:
                results[place] = Scores(error_kind=error.kind.value, error=str(error))
        most = max((len(texts[place]) for place in places), default=0)
        if not most:
            return results
        state = self.model.encode_image(normalize(torch.tensor(np.stack(pixels), device=self.device), self.spec.image))
        # Every image needs as many rows: empty texts fill up.
        ids_NL, mask_NL = self._rows([text for p in places for text in [*texts[p], *[""] * (most - len(texts[p]))]])
        cosines = self.model.cosine(state, ids_NL, mask_NL).view(-1, most).tolist()
        ids_NL[:, 0] = self.spec.enc_id
        matches = self.model.match(state, ids_NL, mask_NL).view(-1, most).tolist()
        for place, match, cosine in zip(places, matches, cosines, strict=True):
            num_texts = len(texts[place])
            results[place] = Scores(match=tuple(match[:num_texts]), cosine=tuple(cosine[:num_texts]))
        return results

    def _rows(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """ids (N, L) and mask (N, L) of [CLS] text [SEP], cut to MAX_TOKENS and padded on the right."""
        encoded = self.spec.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        most = min(MAX_TOKENS, self.spec.model_config["text_config"]["max_position_embeddings"])
        rows = [[self.spec.cls_id, *e.ids[: most - 2], self.spec.sep_id] for e in encoded]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [self.spec.pad_id] * (longest - len(row)) for row in rows], device=self.device)
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        return ids, torch.arange(longest, device=self.device) < lengths[:, None]
