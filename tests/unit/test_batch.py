"""raycap/data/batch.py: sample numbers become arrays of equal shape on every rank, and nothing is counted twice."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Demo, pack
from tokenizers import Tokenizer

from raycap import storage
from raycap.data.batch import Batch, InOrder, Order, Source, iterate_local, load_steps, split_steps
from raycap.image import decode_image, prepare_image
from raycap.order import Indices, Plan
from raycap.schema import ImageSpec, Sample
from raycap.shards import parse_samples, read_manifest
from raycap.text import TextSpec, load_tokenizer, prompt_ids, role_ids


def source_of(demo: Demo, root: str, *, prompt: str = "", captions_per_image: int = 2, max_tokens: int = 24) -> Source:
    tokenizer = load_tokenizer(demo.tokenizer)
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    return Source(
        manifest=read_manifest(root),
        image=ImageSpec(size=16),
        text=TextSpec(prompt=prompt, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=max_tokens),
        tokenizer=tokenizer.to_str(),
        captions_per_image=captions_per_image,
        seed=3,
    )


def plan_of(source: Source, global_batch_size: int = 10) -> Plan:
    sizes = tuple(shard.num_samples for shard in source.manifest.shards)
    return Plan(shard_sizes=sizes, global_batch_size=global_batch_size, seed=3)


def samples_of(root: str) -> list[Sample]:
    shards = read_manifest(root).shards
    return [sample for shard in shards for sample in parse_samples(storage.read_bytes(storage.join(root, shard.shard)))]


def one(order: Order, source: Source, step: int = 0, rank: int = 0, world: int = 1) -> Batch:
    (batch,) = iterate_local(order, source, step, step + 1, rank, world)
    return batch


def texts(batch: Batch, source: Source) -> list[list[str]]:
    """What the labels of each row spell, without rows that have none."""
    tokenizer = Tokenizer.from_str(source.tokenizer)
    return [
        [tokenizer.decode([i for i in row if i != -100]) for row in rows if (row != -100).any()]
        for rows in batch.labels
    ]


class Listed:
    """An order that reads the given sample numbers at every step; the epoch is the step."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = np.array(numbers, np.int64)

    def share(self, *_: int) -> Indices:
        return self.numbers

    def rows(self, *_: int) -> int:
        return len(self.numbers)

    def epoch(self, step: int) -> int:
        return step


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_equal_rows_and_together_they_are_the_global_batch(demo: Demo, world: int) -> None:
    source = source_of(demo, demo.train)
    plan = plan_of(source)
    whole = one(plan, source, step=4)
    ranks = [one(plan, source, 4, rank, world) for rank in range(world)]
    rows = -(-10 // world)
    for batch in ranks:
        assert batch.step == 4
        assert batch.pixel_values.shape == (rows, 3, 16, 16)
        assert batch.input_ids.shape == batch.labels.shape == (rows, 2, 24)
        assert (batch.pixel_values.dtype, batch.input_ids.dtype, batch.labels.dtype) == (np.uint8, np.int64, np.int64)
        assert len(batch.keys) == len(batch.captions) == len(batch.image_ids) == rows
    assert [key for batch in ranks for key in batch.keys if key] == list(whole.keys)
    for name in ("num_tokens", "num_captions", "num_images"):
        assert sum(getattr(batch, name) for batch in ranks) == getattr(whole, name), name
    real = np.concatenate([batch.labels[[key != "" for key in batch.keys]] for batch in ranks])
    assert np.array_equal(real, whole.labels)


def test_padding_is_rows_without_key_pixels_and_targets(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    padded = one(plan_of(source), source, rank=0, world=3)  # 3 of 10 rows, padded to 4
    assert [key != "" for key in padded.keys] == [True, True, True, False]
    assert (padded.labels[3] == -100).all()
    assert (padded.input_ids[3] == source.text.pad_id).all()
    assert not padded.pixel_values[3].any()
    assert (padded.captions[3], padded.image_ids[3], padded.num_images) == ((), None, 3)
    assert padded.errors == ()


def test_a_row_is_its_samples_image_and_captions(demo: Demo) -> None:
    source = source_of(demo, demo.train, prompt="a picture of ", captions_per_image=5, max_tokens=60)
    samples = {sample.key: sample for sample in samples_of(demo.train)}
    batch = one(plan_of(source), source)
    num_prompt_tokens = len(prompt_ids(Tokenizer.from_str(source.tokenizer), source.text))
    for row, key in enumerate(batch.keys):
        sample = samples[key]
        expected = prepare_image(decode_image(sample.image), source.image)
        assert np.array_equal(batch.pixel_values[row], expected)
        assert (batch.captions[row], batch.image_ids[row]) == (sample.captions, sample.image_id)
        assert sorted(text.strip() for text in texts(batch, source)[row]) == sorted(sample.captions)
    assert (batch.labels[:, :, :num_prompt_tokens] == -100).all()
    assert (batch.input_ids[:, :, 0] == source.text.bos_id).all()
    targets = batch.labels != -100
    assert np.array_equal(batch.input_ids[targets], batch.labels[targets])
    assert (targets.sum(axis=2) == (batch.labels == source.text.eos_id).argmax(axis=2) + 1 - num_prompt_tokens).all()


def test_the_counted_tokens_are_the_targets_of_the_loss(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    batch = one(plan_of(source), source)
    by_hand = sum(
        len(Tokenizer.from_str(source.tokenizer).encode(text).ids) - 1 for row in texts(batch, source) for text in row
    )
    assert batch.num_tokens == int((batch.labels[:, :, 1:] != -100).sum()) == by_hand  # encode adds [CLS] and [SEP]
    assert batch.num_captions == 20
    assert batch.num_images == 10


def test_a_target_in_the_first_column_is_not_counted_because_nothing_predicts_it(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    batch = one(plan_of(source), source)
    labels = batch.labels.copy()
    labels[:, :, 0] = source.text.bos_id
    assert replace(batch, labels=labels).num_tokens == batch.num_tokens


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_micro_batches_cut_rows_and_padding_but_no_target(demo: Demo, size: int) -> None:
    source = source_of(demo, demo.train, captions_per_image=3, max_tokens=60)
    batch = one(plan_of(source), source, rank=0, world=1)
    parts = list(batch.micro_batches(size))
    assert [len(pixels) for pixels, _, _ in parts] == [min(size, 10 - first) for first in range(0, 10, size)]
    assert np.array_equal(np.concatenate([pixels for pixels, _, _ in parts]), batch.pixel_values)
    row = 0
    for pixels, input_ids, labels in parts:
        assert input_ids.shape == labels.shape == (3 * len(pixels), labels.shape[1])
        assert (labels[:, -1] != -100).any()  # the last column is a target: nothing shorter would do
        assert labels.shape[1] < 60
        whole = batch.labels.reshape(-1, 60)[row : row + len(labels)]
        assert np.array_equal(labels, whole[:, : labels.shape[1]])
        assert (whole[:, labels.shape[1] :] == -100).all()
        assert np.array_equal(input_ids, batch.input_ids.reshape(-1, 60)[row : row + len(labels), : labels.shape[1]])
        row += len(labels)
    assert sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in parts) == batch.num_tokens


def test_a_micro_batch_of_padding_alone_still_has_a_position_to_predict(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    batch = one(plan_of(source, 2), source, rank=0, world=3)  # 2 images for 3 ranks
    assert batch.keys == ("",)
    ((pixels, input_ids, labels),) = batch.micro_batches(4)
    assert (pixels.shape, input_ids.shape) == ((1, 3, 16, 16), (2, 2))
    assert (labels == -100).all()
    assert (batch.num_tokens, batch.num_captions, batch.num_images) == (0, 0, 0)


def test_captions_are_drawn_by_seed_in_each_epoch(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    order = Listed(*range(30))
    drawn = [texts(one(order, source, step=epoch), source) for epoch in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert 10 < sum(first != second for first, second in zip(drawn[0], drawn[2], strict=True)) <= 30
    assert texts(one(order, replace(source, seed=4)), source) != drawn[0]
    # The draw belongs to the image: neither its place in the batch nor its neighbours matter.
    assert texts(one(Listed(7, 50, 3), source), source)[::2] == [drawn[0][7], drawn[0][3]]


def test_an_image_with_fewer_captions_gives_all_of_them_and_one_without_gives_none(demo: Demo, tmp_path: Path) -> None:
    first, second, third = samples_of(demo.test)[:3]
    samples = [
        replace(first, captions=first.captions[:1]),
        replace(second, captions=()),
        replace(third, captions=third.captions[:3]),
    ]
    source = source_of(demo, pack(str(tmp_path), samples), captions_per_image=3)
    batch = one(Listed(0, 1, 2), source)
    assert [sorted(t) for t in texts(batch, source)] == [sorted(sample.captions) for sample in samples]
    assert (batch.num_images, batch.num_captions) == (3, 4)
    assert (batch.labels[0, 1:] == -100).all()


def test_runs_are_read_across_shards_and_out_of_order(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(demo, demo.train)  # shards of 40, 40 and 16
    keys = [key for shard in source.manifest.shards for key in shard.keys]
    reads: list[tuple[str, int, int]] = []
    real = storage.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        reads.append((url.rpartition("/")[2], start, stop))
        return real(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    numbers = [*range(38, 43), 95, 5, 4, *range(79, 81)]
    assert one(Listed(*numbers), source).keys == tuple(keys[i] for i in numbers)
    assert [name[-5] for name, _, _ in reads] == ["0", "1", "2", "0", "0", "1", "2"]  # one read a run and shard
    assert one(Listed(*range(96)), source).keys == tuple(keys)
    assert len(reads) == 7 + 3


@pytest.mark.parametrize(
    ("num_samples", "global_batch_size", "world"), [(16, 6, 3), (16, 5, 2), (16, 16, 4), (1, 4, 2)]
)
def test_a_pass_in_order_covers_each_sample_once(num_samples: int, global_batch_size: int, world: int) -> None:
    order = InOrder(num_samples=num_samples, global_batch_size=global_batch_size)
    shares = [[order.share(step, rank, world) for rank in range(world)] for step in range(order.num_steps)]
    assert [int(i) for step in shares for share in step for i in share] == list(range(num_samples))
    assert max(len(share) for step in shares for share in step) <= order.rows(world)
    assert {order.epoch(step) for step in range(order.num_steps)} == {0}


def test_the_last_short_step_of_an_evaluation_is_padded_not_dropped(demo: Demo) -> None:
    source = source_of(demo, demo.test)
    order = InOrder(num_samples=16, global_batch_size=6)
    batches = [b for rank in range(2) for b in iterate_local(order, source, 0, order.num_steps, rank, 2)]
    assert {len(batch.keys) for batch in batches} == {3}
    assert Counter(key for batch in batches for key in batch.keys if key) == Counter(
        key for shard in source.manifest.shards for key in shard.keys
    )
    assert sum(batch.num_images for batch in batches) == 16


def test_bad_images_are_rows_without_weight_and_named_by_kind(demo: Demo, tmp_path: Path) -> None:
    samples = samples_of(demo.test)[:4]
    samples[1] = replace(samples[1], key="cut", image=samples[1].image[:-200])
    samples[2] = replace(samples[2], key="page", image=b"<html>not found</html>")
    batch = one(Listed(0, 1, 2, 3), source_of(demo, pack(str(tmp_path), samples)))
    assert batch.errors == (("cut", "truncated"), ("page", "not_an_image"))
    assert batch.num_images == 2
    assert batch.num_captions == 4
    assert (batch.labels[1:3] == -100).all()
    assert not batch.pixel_values[1:3].any()
    assert batch.captions[1] == samples[1].captions  # an evaluation still knows what it missed


def test_a_block_of_several_steps_splits_into_the_steps(demo: Demo) -> None:
    source = source_of(demo, demo.train)
    plan = plan_of(source)
    columns = load_steps(plan, source, [8, 9, 10], 1, 2)  # 9 steps an epoch: the block spans two epochs
    together = list(split_steps(columns))
    alone = list(iterate_local(plan, source, 8, 11, 1, 2))
    assert [batch.step for batch in together] == [8, 9, 10]
    for a, b in zip(together, alone, strict=True):
        assert (a.keys, a.captions, a.image_ids, a.errors) == (b.keys, b.captions, b.image_ids, b.errors)
        for name in ("pixel_values", "input_ids", "labels"):
            assert np.array_equal(getattr(a, name), getattr(b, name)), name
