"""Loss and CIDEr on the validation split, from inside training: every rank takes part, in equal numbers of steps."""

from collections.abc import Iterator
from typing import TypeVar

import torch

from raycap.captioner import Captioner
from raycap.data.batch import Batch
from raycap.errors import UserError
from raycap.image import normalize
from raycap.metrics.cider import CiderReferences, prepare_references, score
from raycap.training.engine import Engine
from raycap.training.loop import Metrics

V = TypeVar("V")
NUM_SAMPLES = 4  # images whose captions are shown at every evaluation, always the same ones


class Validator:
    """Scores a model on a validation split; keeps the references' statistics between evaluations."""

    def __init__(self, engine: Engine, captioner: Captioner, micro_batch_size: int) -> None:
        self._engine = engine
        self._captioner = captioner
        self._micro_batch_size = micro_batch_size
        self._references: CiderReferences | None = None
        self.skipped: dict[str, str] = {}
        """Key -> error kind of the samples of the split that could not be used, on every rank."""

    @torch.no_grad()
    def evaluate(self, batches: Iterator[Batch]) -> Metrics:
        """val_loss, cider, num_val_images, num_val_skipped and samples, the same on every rank.

        batches: this rank's share of each step.
        """
        engine = self._engine
        engine.module.eval()
        loss_sum = num_tokens = 0.0
        captions: dict[str, str] = {}
        references: dict[str, tuple[str, ...]] = {}
        skipped: dict[str, str] = {}
        for batch in batches:
            for arrays in batch.micro_batches(self._micro_batch_size):
                pixel_values, input_ids, labels = (torch.tensor(array, device=engine.device) for array in arrays)
                micro_loss, micro_tokens = engine.forward(
                    normalize(pixel_values, self._captioner.spec.image), input_ids, labels
                )
                loss_sum, num_tokens = loss_sum + float(micro_loss), num_tokens + float(micro_tokens)
            bad = dict(batch.errors)
            skipped |= bad
            for first in range(0, len(batch.keys), self._micro_batch_size):
                rows = slice(first, first + self._micro_batch_size)
                with engine.autocast():
                    results = self._captioner.caption_prepared(
                        batch.pixel_values[rows], all_finished=self._all_finished
                    )
                for key, refs, result in zip(batch.keys[rows], batch.captions[rows], results, strict=True):
                    if key and refs and key not in bad:
                        captions[key], references[key] = result.caption or "", refs
        loss_sum, num_tokens = engine.all_reduce([loss_sum, num_tokens])
        self.skipped = _merge(engine.gather(skipped))
        parts = engine.gather((captions, references))
        scores = self._score(parts) | {"num_val_skipped": len(self.skipped)} if engine.rank == 0 else {}
        return {"val_loss": loss_sum / max(num_tokens, 1), **engine.gather(scores)[0]}

    def _all_finished(self, finished: bool) -> bool:
        return self._engine.all_reduce([0.0 if finished else 1.0])[0] == 0

    def _score(self, parts: "list[tuple[dict[str, str], dict[str, tuple[str, ...]]]]") -> Metrics:
        captions = _merge([part[0] for part in parts])
        references = _merge([part[1] for part in parts])
        if not captions:
            raise UserError("no image of the validation split can be decoded and has captions; check --val-shards")
        if self._references is None:
            self._references = prepare_references(references)
        cider, _ = score(captions, self._references)
        shown = sorted(captions)[:NUM_SAMPLES]
        samples = [{"key": key, "caption": captions[key], "reference": references[key][0]} for key in shown]
        return {"cider": cider, "num_val_images": len(captions), "samples": samples}


def _merge(parts: "list[dict[str, V]]") -> dict[str, V]:
    return {key: value for part in parts for key, value in part.items()}
