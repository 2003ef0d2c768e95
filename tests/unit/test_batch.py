"""raycap/data/batch.py: reads become batches of equal shape on every rank, and nothing is counted twice."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Demo, pack, samples_of
from tokenizers import Tokenizer

from raycap import storage
from raycap.augment import AugmentSpec
from raycap.data.batch import Batch, Source, assemble, iterate_local, load_reads
from raycap.image import decode_image, prepare_image
from raycap.order import InOrder, Order, Plan, Read
from raycap.schema import ImageSpec
from raycap.shards import Manifest, read_manifest
from raycap.text import TextSpec, load_tokenizer, prompt_ids, role_ids


def source_of(demo: Demo, *, prompt: str = "", captions_per_image: int = 2, max_tokens: int = 24) -> Source:
    tokenizer = load_tokenizer(demo.tokenizer)
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    return Source(
        image=ImageSpec(size=16),
        text=TextSpec(prompt=prompt, bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=max_tokens),
        tokenizer=tokenizer.to_str(),
        captions_per_image=captions_per_image,
        seed=3,
    )


def plan_of(manifest: Manifest, global_batch_size: int = 10) -> Plan:
    return Plan(shard_sizes=manifest.sizes, global_batch_size=global_batch_size, seed=3)


def one(order: Order, root: str, source: Source, step: int = 0, rank: int = 0, world: int = 1) -> Batch:
    (batch,) = iterate_local(order, read_manifest(root), source, step, step + 1, rank, world)
    return batch


class Listed:
    """An order that reads the given samples of the first shard at every step, one read each; the epoch is the step."""

    def __init__(self, *indices: int) -> None:
        self.indices = indices

    def reads(self, start: int, stop: int, *_: int) -> Iterator[Read]:
        for step in range(start, stop):
            for row, index in enumerate(self.indices):
                array = [np.array([value]) for value in (index, step, row)]
                yield Read(epoch=step, shard=0, indices=array[0], steps=array[1], rows=array[2])

    def share_size(self, *_: int) -> int:
        return len(self.indices)

    def rows(self, *_: int) -> int:
        return len(self.indices)


def by_key(batch: Batch, source: Source) -> dict[str, list[str]]:
    """What the labels of each row spell, without rows that have none; the order of rows is that of their lengths."""
    return dict(zip(batch.keys, texts(batch, source), strict=True))


def texts(batch: Batch, source: Source) -> list[list[str]]:
    """What the labels of each row spell, without rows that have none."""
    tokenizer = Tokenizer.from_str(source.tokenizer)
    return [
        [tokenizer.decode([i for i in row if i != -100]) for row in rows if (row != -100).any()]
        for rows in batch.labels
    ]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_rank_has_equal_rows_and_together_they_are_the_global_batch(demo: Demo, world: int) -> None:
    source, plan = source_of(demo), plan_of(read_manifest(demo.train))
    whole = one(plan, demo.train, source, step=4)
    ranks = [one(plan, demo.train, source, 4, rank, world) for rank in range(world)]
    rows = -(-10 // world)
    for batch in ranks:
        assert batch.step == 4
        assert batch.pixel_values.shape == (rows, 3, 16, 16)
        assert batch.input_ids.shape == batch.labels.shape == (rows, 2, batch.lengths.max())
        assert (batch.pixel_values.dtype, batch.input_ids.dtype, batch.labels.dtype) == (np.uint8, np.int64, np.int64)
        assert len(batch.keys) == len(batch.captions) == len(batch.image_ids) == rows
    keys = [samples_of(demo.train)[i].key for i in plan.batch(4)]
    assert sorted(key for batch in ranks for key in batch.keys if key) == sorted(keys) == sorted(whole.keys)
    for name in ("num_tokens", "num_captions", "num_images"):
        assert sum(getattr(batch, name) for batch in ranks) == getattr(whole, name), name


def test_rows_come_shortest_first_so_that_micro_batches_pad_little(demo: Demo) -> None:
    """Among 96 images, padding alone in order of arrival costs several times what it costs by length."""
    source = source_of(demo, captions_per_image=1, max_tokens=60)
    (batch,) = iterate_local(Listed(*range(40)), read_manifest(demo.train), source, 0, 1)
    longest = batch.lengths.max(axis=1)
    assert (np.diff(longest) >= 0).all()
    assert (longest == (batch.labels[:, 0] != -100).sum(axis=1) + 1).all()

    def padding(lengths: np.ndarray) -> int:
        return sum(int((part.max() - part).sum()) for part in np.split(lengths, 10))

    positions = sum(ids.size for _, ids, _ in batch.micro_batches(4))
    assert positions - int(batch.lengths.sum()) == padding(longest)
    assert padding(longest) < 0.4 * padding(np.random.default_rng(0).permutation(longest))


def test_padding_is_rows_without_key_pixels_and_targets(demo: Demo) -> None:
    source = source_of(demo)
    padded = one(plan_of(read_manifest(demo.train)), demo.train, source, rank=0, world=3)  # 3 of 10 rows, padded to 4
    assert [key != "" for key in padded.keys] == [True, True, True, False]
    assert (padded.labels[3] == -100).all()
    assert (padded.input_ids[3] == source.text.pad_id).all()
    assert not padded.pixel_values[3].any()
    assert (padded.captions[3], padded.image_ids[3], padded.num_images) == ((), None, 3)
    assert (padded.errors, padded.lengths[3].tolist()) == ((), [0, 0])


def test_a_row_is_its_samples_image_and_captions(demo: Demo) -> None:
    source = source_of(demo, prompt="a picture of ", captions_per_image=5, max_tokens=60)
    samples = {sample.key: sample for sample in samples_of(demo.train)}
    batch = one(plan_of(read_manifest(demo.train)), demo.train, source)
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
    assert (batch.lengths == targets.sum(axis=2) + num_prompt_tokens).all()


def test_the_counted_tokens_are_the_targets_of_the_loss(demo: Demo) -> None:
    source = source_of(demo)
    batch = one(plan_of(read_manifest(demo.train)), demo.train, source)
    by_hand = sum(
        len(Tokenizer.from_str(source.tokenizer).encode(text).ids) - 1 for row in texts(batch, source) for text in row
    )
    assert batch.num_tokens == int((batch.labels[:, :, 1:] != -100).sum()) == by_hand  # encode adds [CLS] and [SEP]
    assert batch.num_captions == 20
    assert batch.num_images == 10


def test_a_target_in_the_first_column_is_not_counted_because_nothing_predicts_it(demo: Demo) -> None:
    source = source_of(demo)
    batch = one(plan_of(read_manifest(demo.train)), demo.train, source)
    labels = batch.labels.copy()
    labels[:, :, 0] = source.text.bos_id
    assert replace(batch, labels=labels).num_tokens == batch.num_tokens


@pytest.mark.parametrize("size", [1, 3, 4, 10, 16])
def test_micro_batches_cut_rows_and_padding_but_no_target(demo: Demo, size: int) -> None:
    source = source_of(demo, captions_per_image=3, max_tokens=60)
    batch = one(plan_of(read_manifest(demo.train)), demo.train, source, rank=0, world=1)
    parts = list(batch.micro_batches(size))
    assert [len(pixels) for pixels, _, _ in parts] == [min(size, 10 - first) for first in range(0, 10, size)]
    assert np.array_equal(np.concatenate([pixels for pixels, _, _ in parts]), batch.pixel_values)
    row, width = 0, batch.labels.shape[2]
    for pixels, input_ids, labels in parts:
        assert input_ids.shape == labels.shape == (3 * len(pixels), labels.shape[1])
        assert (labels[:, -1] != -100).any()  # the last column is a target: nothing shorter would do
        assert labels.shape[1] <= width < 60
        whole = batch.labels.reshape(-1, width)[row : row + len(labels)]
        assert np.array_equal(labels, whole[:, : labels.shape[1]])
        assert (whole[:, labels.shape[1] :] == -100).all()
        assert np.array_equal(input_ids, batch.input_ids.reshape(-1, width)[row : row + len(labels), : labels.shape[1]])
        row += len(labels)
    assert sum(int((labels[:, 1:] != -100).sum()) for _, _, labels in parts) == batch.num_tokens


def test_a_micro_batch_of_padding_alone_still_has_a_position_to_predict(demo: Demo) -> None:
    source = source_of(demo)
    batch = one(plan_of(read_manifest(demo.train), 2), demo.train, source, rank=0, world=3)  # 2 images for 3 ranks
    assert batch.keys == ("",)
    ((pixels, input_ids, labels),) = batch.micro_batches(4)
    assert (pixels.shape, input_ids.shape) == ((1, 3, 16, 16), (2, 2))
    assert (labels == -100).all()
    assert (batch.num_tokens, batch.num_captions, batch.num_images) == (0, 0, 0)


def test_captions_are_drawn_by_seed_in_each_epoch(demo: Demo) -> None:
    source, order = source_of(demo), Listed(*range(30))
    drawn = [by_key(one(order, demo.train, source, step=epoch), source) for epoch in (0, 0, 1)]
    assert drawn[0] == drawn[1]
    assert 10 < sum(drawn[0][key] != drawn[2][key] for key in drawn[0]) <= 30
    assert by_key(one(order, demo.train, replace(source, seed=4)), source) != drawn[0]
    # The draw belongs to the image: neither its place in the batch nor its neighbours matter.
    others = by_key(one(Listed(7, 35, 3), demo.train, source), source)
    assert len(others.keys() & drawn[0].keys()) == 2
    assert all(others[key] == drawn[0][key] for key in others.keys() & drawn[0].keys())


def test_augmented_images_repeat_with_seed_epoch_and_key_and_differ_between_epochs(demo: Demo) -> None:
    source = replace(source_of(demo), augment=AugmentSpec())
    plain = one(Listed(*range(8)), demo.train, source_of(demo))
    batches = [one(Listed(*range(8)), demo.train, source, step=epoch) for epoch in (0, 0, 1)]
    pixels = [dict(zip(batch.keys, batch.pixel_values, strict=True)) for batch in [plain, *batches]]
    assert all(np.array_equal(pixels[1][key], pixels[2][key]) for key in pixels[1])
    assert sum(np.array_equal(pixels[1][key], pixels[3][key]) for key in pixels[1]) <= 1
    assert sum(np.array_equal(pixels[1][key], pixels[0][key]) for key in pixels[1]) <= 1
    # Alone, in another place: the same.
    alone = one(Listed(5), demo.train, source)
    assert np.array_equal(alone.pixel_values[0], pixels[1][alone.keys[0]])


def test_an_image_with_fewer_captions_gives_all_of_them(demo: Demo, tmp_path: Path) -> None:
    first, second = samples_of(demo.test)[:2]
    samples = [replace(first, captions=first.captions[:1]), replace(second, captions=second.captions[:3])]
    source = source_of(demo, captions_per_image=3)
    batch = one(Listed(0, 1), pack(str(tmp_path), samples), source)
    spelled = by_key(batch, source)
    assert {key: sorted(spelled[key]) for key in spelled} == {s.key: sorted(s.captions) for s in samples}
    assert (batch.num_images, batch.num_captions) == (2, 4)
    one_caption = batch.keys.index(first.key)
    assert (batch.labels[one_caption, 1:] == -100).all()


def test_a_read_is_one_range_of_one_shard(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    source, manifest = source_of(demo), read_manifest(demo.train)  # shards of 40, 40 and 16
    reads: list[str] = []
    real = storage.read_range

    def counted(url: str, start: int, stop: int) -> bytes:
        reads.append(url.rpartition("/")[2])
        return real(url, start, stop)

    monkeypatch.setattr(storage, "read_range", counted)
    indices = np.array([3, 4, 9])
    columns = load_reads(
        [Read(epoch=0, shard=1, indices=indices, steps=np.array([5, 5, 6]), rows=np.array([1, 0, 0]))], manifest, source
    )
    assert columns["pixel_values"].shape == (3, 3, 16, 16)
    assert (columns["step"].tolist(), columns["row"].tolist()) == ([5, 5, 6], [1, 0, 0])
    assert reads == [manifest.shards[1]]
    assert columns["key"].tolist() == [samples_of(demo.train)[40 + i].key for i in indices]


def test_the_last_short_step_of_an_evaluation_is_padded_not_dropped(demo: Demo) -> None:
    source, manifest = source_of(demo), read_manifest(demo.test)
    order = InOrder(shard_sizes=manifest.sizes, num_samples=16, global_batch_size=6)
    batches = [b for rank in range(2) for b in iterate_local(order, manifest, source, 0, order.num_steps, rank, 2)]
    assert {len(batch.keys) for batch in batches} == {3}
    keys = Counter(key for batch in batches for key in batch.keys if key)
    assert keys == Counter(sample.key for sample in samples_of(demo.test))
    assert sum(batch.num_images for batch in batches) == 16


def test_bad_samples_are_rows_without_weight_and_named_by_kind(demo: Demo, tmp_path: Path) -> None:
    samples = samples_of(demo.test)[:5]
    samples[1] = replace(samples[1], key="cut", image=samples[1].image[:-200])
    samples[2] = replace(samples[2], key="page", image=b"<html>not found</html>")
    samples[4] = replace(samples[4], key="nothing", image=b"")
    batch = one(Listed(0, 1, 2, 3, 4), pack(str(tmp_path), samples), source_of(demo))
    assert dict(batch.errors) == {"cut": "truncated", "page": "not_an_image", "nothing": "empty"}
    assert (batch.num_images, batch.num_captions) == (2, 4)
    bad = [batch.keys.index(key) for key in ("cut", "page", "nothing")]
    assert (batch.labels[bad] == -100).all()
    assert not batch.pixel_values[bad].any()
    assert batch.captions[bad[0]] == samples[1].captions  # an evaluation still knows what it missed


def test_a_sample_that_changed_since_it_was_indexed_is_a_counted_error(demo: Demo, tmp_path: Path) -> None:
    root = pack(str(tmp_path), samples_of(demo.test)[:4])
    url = storage.join(root, read_manifest(root).shards[0])
    data = bytearray(Path(url).read_bytes())
    data[int(read_manifest(root).offsets[2]) + 700] ^= 1  # in the third sample's image
    Path(url).write_bytes(data)
    batch = one(Listed(0, 1, 2, 3), root, source_of(demo))
    assert [kind for _, kind in batch.errors] == ["sample_changed"]
    assert (batch.num_images, batch.num_captions) == (3, 6)


def test_a_block_of_bad_samples_alone_is_a_block_all_the_same(demo: Demo, tmp_path: Path) -> None:
    samples = [replace(sample, image=b"") for sample in samples_of(demo.test)[:2]]
    batch = one(Listed(0, 1), pack(str(tmp_path), samples), source_of(demo))
    assert [kind for _, kind in batch.errors] == ["empty", "empty"]
    assert (batch.num_tokens, batch.labels.shape) == (0, (2, 2, 2))


def test_blocks_that_end_early_are_noticed(demo: Demo) -> None:
    source, manifest = source_of(demo), read_manifest(demo.train)
    plan = plan_of(manifest)
    blocks = [load_reads([read], manifest, source) for read in plan.reads(0, 3, 0, 1)][:-1]
    with pytest.raises(AssertionError, match="the blocks end before step"):
        list(assemble(blocks, plan, source, start=0, stop=3, rank=0, world=1))
