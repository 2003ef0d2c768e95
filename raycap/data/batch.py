"""Reads of a plan -> blocks of arrays -> batches, without Ray: reads runs of shards, decodes, resizes, augments, tokenises.

raycap/data/stream.py runs `load_reads` in Ray Data tasks and `assemble` in each rank; tests and single-process loops call
them directly. Shapes: R rows (images) of one rank's share, k captions per image, L tokens, S pixels.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from raycap import storage
from raycap.augment import AugmentSpec, augment_bytes
from raycap.errors import ImageError
from raycap.image import prepare_bytes
from raycap.order import Order, Read, pick
from raycap.schema import ImageSpec, Sample, SampleError
from raycap.shards import Manifest, read_run
from raycap.text import TextSpec, collate, prompt_ids, tokenize

Columns = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """How samples become arrays, beside the manifest they are read by. tokenizer: its JSON. augment: None leaves images as they are."""

    image: ImageSpec
    text: TextSpec
    tokenizer: str
    captions_per_image: int
    seed: int
    augment: AugmentSpec | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """One rank's share of a global batch, padded to the same number of rows R on every rank, shortest captions first.

    pixel_values: uint8 (R, 3, S, S), zeros where a row is padding or its image is bad. input_ids, labels: int64 (R, k, L),
    L the longest caption of the share; labels are -100 on the prompt, on padding, and in the whole row where it must not
    count. lengths: int64 (R, k), tokens of each caption. keys: "" for padding. captions: all references of each image.
    errors: (key, error kind) of bad samples.
    """

    step: int
    keys: tuple[str, ...]
    image_ids: tuple[int | str | None, ...]
    captions: tuple[tuple[str, ...], ...]
    errors: tuple[tuple[str, str], ...]
    pixel_values: npt.NDArray[np.uint8]
    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

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
        """(pixel_values (r, 3, S, S), input_ids (r*k, l), labels (r*k, l)) for r <= size rows; l: their longest caption."""
        for first in range(0, len(self.keys), size):
            rows = slice(first, first + size)
            stop = max(2, int(self.lengths[rows].max(initial=0)))  # a position to predict, even where all is padding
            ids, labels = self.input_ids[rows, :, :stop], self.labels[rows, :, :stop]
            yield self.pixel_values[rows], ids.reshape(-1, stop), labels.reshape(-1, stop)


def load_reads(reads: Sequence[Read], manifest: Manifest, source: Source) -> Columns:
    """The samples of some reads as columns of a block, a row each, in the order of the reads and of their indices.

    step, row: where it goes. key, error_kind (or ""), about: JSON of image id and captions. pixel_values: uint8
    (n, 3, S, S). input_ids, labels, lengths: as in Batch, L the longest caption of the block.
    """
    num_rows = sum(len(read.indices) for read in reads)
    pixels = np.zeros((num_rows, 3, source.image.size, source.image.size), np.uint8)
    kinds = [""] * num_rows
    chosen: list[list[str]] = [[] for _ in range(num_rows)]
    samples: list[Sample | SampleError] = []
    for row, (epoch, sample) in enumerate(_read(reads, manifest)):
        samples.append(sample)
        if isinstance(sample, SampleError):
            kinds[row] = sample.kind
            continue
        try:
            pixels[row] = _pixels(sample, source, epoch)
        except ImageError as error:
            kinds[row] = error.kind.value
            continue
        picked = pick(source.seed, epoch, sample.key, len(sample.captions), source.captions_per_image)
        chosen[row] = [sample.captions[i] for i in picked]
    return {
        "step": np.concatenate([read.steps for read in reads]),
        "row": np.concatenate([read.rows for read in reads]),
        "key": np.array([sample.key for sample in samples], dtype=object),
        "about": np.array([_about(sample) for sample in samples], dtype=object),
        "error_kind": np.array(kinds, dtype=object),
        "pixel_values": pixels,
        **_texts(chosen, source),
    }


def assemble(
    blocks: Iterable[Columns], order: Order, source: Source, *, start: int, stop: int, rank: int, world: int
) -> Iterator[Batch]:
    """The batches of steps start .. stop - 1 of one rank, from the blocks of its reads in the order of order.reads."""
    arriving = iter(blocks)
    waiting: dict[int, list[tuple[Columns, int]]] = defaultdict(list)  # step -> the rows of it that have arrived
    for step in range(start, stop):
        while len(waiting[step]) < order.share_size(step, rank, world):
            block = next(arriving, None)
            assert block is not None, f"the blocks end before step {step} is whole"
            for i, its_step in enumerate(block["step"].tolist()):
                waiting[its_step].append((block, i))
        yield _batch(step, waiting.pop(step), order.rows(world), source)


def iterate_local(
    order: Order, manifest: Manifest, source: Source, start: int, stop: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """What stream.iterate yields, computed here and now."""
    blocks = (load_reads([read], manifest, source) for read in order.reads(start, stop, rank, world))
    return assemble(blocks, order, source, start=start, stop=stop, rank=rank, world=world)


def _read(reads: Sequence[Read], manifest: Manifest) -> Iterator[tuple[int, Sample | SampleError]]:
    """(epoch, sample) of every index. From a URL all reads are under way at once, while the first are decoded."""

    def read_one(read: Read) -> list[tuple[int, Sample | SampleError]]:
        first = int(read.indices[0])
        run = read_run(manifest, read.shard, first, int(read.indices[-1]) + 1)
        return [(read.epoch, run[int(i) - first]) for i in read.indices]

    if not storage.is_url(manifest.root):
        for read in reads:
            yield from read_one(read)
        return
    with ThreadPoolExecutor(len(reads)) as pool:
        for samples in pool.map(read_one, reads):
            yield from samples


def _about(sample: Sample | SampleError) -> str:
    if isinstance(sample, SampleError):
        return json.dumps({"image_id": None, "captions": []})
    return json.dumps({"image_id": sample.image_id, "captions": sample.captions})


def _pixels(sample: Sample, source: Source, epoch: int) -> npt.NDArray[np.uint8]:
    if source.augment is None:
        return prepare_bytes(sample.image, source.image).pixels
    return augment_bytes(
        sample.image,
        source.image,
        source.augment,
        seed=source.seed,
        epoch=epoch,
        key=sample.key,
        captions=sample.captions,
    )


def _texts(captions: Sequence[Sequence[str]], source: Source) -> Columns:
    """input_ids, labels and lengths of up to k captions of each row; one call of the tokenizer for all of them."""
    tokenizer = _tokenizer(source.tokenizer)
    tokens = tokenize(tokenizer, source.text, [caption for row in captions for caption in row])
    ids, targets = collate(tokens, source.text, len(prompt_ids(tokenizer, source.text)))
    shape = (len(captions), source.captions_per_image, max(1, ids.shape[1]))  # Arrow holds no column of width 0
    input_ids = np.full(shape, source.text.pad_id, np.int32)
    labels = np.full(shape, -100, np.int32)
    lengths = np.zeros(shape[:2], np.int32)
    used = np.arange(shape[1]) < np.array([len(row) for row in captions])[:, None]
    input_ids[used, : ids.shape[1]], labels[used, : ids.shape[1]] = ids, targets
    lengths[used] = [len(row) for row in tokens]
    return {"input_ids": input_ids, "labels": labels, "lengths": lengths}


def _batch(step: int, rows: list[tuple[Columns, int]], num_rows: int, source: Source) -> Batch:
    """A batch of the given rows of blocks, and of padding up to num_rows."""
    rows = sorted(rows, key=lambda row: (row[0]["lengths"][row[1]].max(), row[0]["row"][row[1]]))
    length = max([2, *(int(block["lengths"][i].max()) for block, i in rows)])
    pixels = np.zeros((num_rows, 3, source.image.size, source.image.size), np.uint8)
    input_ids = np.full((num_rows, source.captions_per_image, length), source.text.pad_id, np.int64)
    labels = np.full_like(input_ids, -100)
    lengths = np.zeros((num_rows, source.captions_per_image), np.int64)
    for row, (block, i) in enumerate(rows):
        pixels[row] = block["pixel_values"][i]
        lengths[row] = block["lengths"][i]
        used = int(lengths[row].max())
        input_ids[row, :, :used] = block["input_ids"][i, :, :used]
        labels[row, :, :used] = block["labels"][i, :, :used]
    keys = [str(block["key"][i]) for block, i in rows]
    kinds = [str(block["error_kind"][i]) for block, i in rows]
    padding = num_rows - len(rows)
    about = [json.loads(str(block["about"][i])) for block, i in rows] + [{"image_id": None, "captions": []}] * padding
    return Batch(
        step=step,
        keys=(*keys, *[""] * padding),
        image_ids=tuple(a["image_id"] for a in about),
        captions=tuple(tuple(a["captions"]) for a in about),
        errors=tuple((key, kind) for key, kind in zip(keys, kinds, strict=True) if kind),
        pixel_values=pixels,
        input_ids=input_ids,
        labels=labels,
        lengths=lengths,
    )


@lru_cache(maxsize=4)
def _tokenizer(tokenizer_json: str) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json)
