"""Samples of a plan -> batches of arrays, without Ray: reads runs of shards, decodes, resizes, tokenises.

raycap/data/stream.py runs these functions in Ray Data tasks; tests and single-process loops call them directly.
Shapes: R rows (images) of one rank's share, k captions per image, L tokens, S pixels.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from raycap.errors import ImageError
from raycap.image import prepare_bytes
from raycap.order import Indices, deal, pick, rows_per_rank
from raycap.schema import ImageSpec, Sample
from raycap.shards import Manifest, read_run
from raycap.text import TextSpec, collate, prompt_ids, tokenize

Columns = dict[str, npt.NDArray[Any]]


class Order(Protocol):
    """Which samples each rank reads at each step: a training Plan or an InOrder pass."""

    def share(self, step: int, rank: int, world: int) -> Indices: ...
    def rows(self, world: int) -> int: ...
    def epoch(self, step: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class InOrder:
    """Each of num_samples once, in file order, for evaluation: global_batch_size a step, the last step short."""

    num_samples: int
    global_batch_size: int

    @property
    def num_steps(self) -> int:
        return -(-self.num_samples // self.global_batch_size)

    def share(self, step: int, rank: int, world: int) -> Indices:
        first = step * self.global_batch_size
        return deal(np.arange(first, min(first + self.global_batch_size, self.num_samples)), rank, world)

    def rows(self, world: int) -> int:
        return rows_per_rank(self.global_batch_size, world)

    def epoch(self, step: int) -> int:  # noqa: ARG002  # evaluation draws the same captions every time
        return 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """Everything a loading task needs to turn sample numbers into arrays. tokenizer: its JSON."""

    manifest: Manifest
    image: ImageSpec
    text: TextSpec
    tokenizer: str
    captions_per_image: int
    seed: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rank's share of a global batch, padded to the same number of rows R on every rank.

    pixel_values: uint8 (R, 3, S, S), zeros where a row is padding or its image is bad. input_ids, labels: int64 (R, k, L);
    labels are -100 on the prompt, on padding, and in the whole row where it must not count. keys: "" for padding.
    captions: all references of each image. errors: (key, error kind) of bad images.
    """

    step: int
    keys: tuple[str, ...]
    image_ids: tuple[int | str | None, ...]
    captions: tuple[tuple[str, ...], ...]
    errors: tuple[tuple[str, str], ...]
    pixel_values: npt.NDArray[np.uint8]
    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Target tokens: labels behind the first position, which nothing predicts."""
        return int((self.labels[:, :, 1:] != -100).sum())

    @property
    def num_images(self) -> int:
        return sum(key != "" for key in self.keys) - len(self.errors)

    @property
    def num_captions(self) -> int:
        return int((self.labels != -100).any(axis=2).sum())

    def micro_batches(
        self, size: int
    ) -> Iterator[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
        """(pixel_values (r, 3, S, S), input_ids (r*k, l), labels (r*k, l)) for r <= size rows; l reaches the last target."""
        for first in range(0, len(self.keys), size):
            labels = self.labels[first : first + size]
            used = np.flatnonzero((labels != -100).any(axis=(0, 1)))
            stop = int(used[-1]) + 1 if len(used) else min(2, labels.shape[2])
            ids = self.input_ids[first : first + size, :, :stop]
            yield self.pixel_values[first : first + size], ids.reshape(-1, stop), labels[:, :, :stop].reshape(-1, stop)


def load_steps(order: Order, source: Source, steps: Sequence[int], rank: int, world: int) -> Columns:
    """The rows of some steps' shares below each other, each step padded to order.rows(world), as columns of a block."""
    parts = [_load_share(order, source, step, rank, world) for step in steps]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def split_steps(columns: Columns) -> Iterator[Batch]:
    """The batches in a block that `load_steps` made, in order."""
    steps = columns["step"]
    for step in dict.fromkeys(steps.tolist()):
        rows = np.flatnonzero(steps == step)
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        keys = tuple(str(key) for key in columns["key"][part])
        kinds = [str(kind) for kind in columns["error_kind"][part]]
        about = [json.loads(str(text)) for text in columns["about"][part]]
        yield Batch(
            step=step,
            keys=keys,
            image_ids=tuple(a["image_id"] for a in about),
            captions=tuple(tuple(a["captions"]) for a in about),
            errors=tuple((key, kind) for key, kind in zip(keys, kinds, strict=True) if kind),
            pixel_values=columns["pixel_values"][part],
            input_ids=columns["input_ids"][part].astype(np.int64),
            labels=columns["labels"][part].astype(np.int64),
        )


def iterate_local(
    order: Order, source: Source, start: int, stop: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """What stream.iterate yields, computed here and now."""
    for step in range(start, stop):
        yield from split_steps(load_steps(order, source, [step], rank, world))


def _load_share(order: Order, source: Source, step: int, rank: int, world: int) -> Columns:
    """One step's rows of one rank; rows behind the share are padding."""
    samples = list(_read(source.manifest, order.share(step, rank, world)))
    rows, k, length = order.rows(world), source.captions_per_image, source.text.max_tokens
    pixels = np.zeros((rows, 3, source.image.size, source.image.size), np.uint8)
    input_ids = np.full((rows, k, length), source.text.pad_id, np.int32)
    labels = np.full((rows, k, length), -100, np.int32)
    kinds = [""] * rows
    tokenizer = _tokenizer(source.tokenizer)
    num_prompt_tokens = len(prompt_ids(tokenizer, source.text))
    for row, sample in enumerate(samples):
        try:
            pixels[row] = prepare_bytes(sample.image, source.image).pixels
        except ImageError as error:
            kinds[row] = error.kind.value
            continue
        chosen = pick(source.seed, order.epoch(step), sample.key, len(sample.captions), k)
        tokens = tokenize(tokenizer, source.text, [sample.captions[i] for i in chosen])
        ids, targets = collate(tokens, source.text, num_prompt_tokens)
        input_ids[row, : len(chosen), : ids.shape[1]] = ids
        labels[row, : len(chosen), : ids.shape[1]] = targets
    missing = rows - len(samples)
    about: list[dict[str, Any]] = [{"image_id": s.image_id, "captions": s.captions} for s in samples] + [
        {"image_id": None, "captions": []}
    ] * missing
    return {
        "step": np.full(rows, step, np.int64),
        "key": np.array([s.key for s in samples] + [""] * missing, dtype=object),
        "about": np.array([json.dumps(a) for a in about], dtype=object),
        "error_kind": np.array(kinds, dtype=object),
        "pixel_values": pixels,
        "input_ids": input_ids,
        "labels": labels,
    }


def _read(manifest: Manifest, indices: Indices) -> Iterator[Sample]:
    """Samples in the order of their numbers; neighbours in a shard come with one read."""
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    for run in runs:
        first, stop = (int(run[0]), int(run[-1]) + 1) if len(run) else (0, 0)
        while first < stop:
            number, start = manifest.locate(first)
            shard = manifest.shards[number]
            end = min(start + stop - first, shard.num_samples)
            yield from read_run(manifest.root, shard, start, end)
            first += end - start


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)
