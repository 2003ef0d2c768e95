"""Beam search against transformers' generate(num_beams=k, early_stopping=False), and its own bookkeeping."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import EOS_ID, tiny_blip_pair
from torch import Tensor
from transformers import BlipForConditionalGeneration

from raycap.decoding import search
from raycap.decoding.greedy import Decoded, greedy
from raycap.models.blip import Blip, BlipDecodeState
from raycap.schema import DecodeSettings

torch.set_num_threads(1)

BOS_ID = 58
ROUNDING = 1e-4  # far more than float32 loses in these models: captions that survive it are no ties


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pair_that_ends_captions(seed: int, vocab_size: int = 60) -> tuple[Blip, BlipForConditionalGeneration]:
    ours, published = tiny_blip_pair(seed=seed, vocab_size=vocab_size)
    with torch.no_grad():  # random weights rarely end a caption by themselves
        for model in (ours, published):
            model.text_decoder.get_parameter("cls.predictions.bias")[EOS_ID] += 2.0
    return ours, published


class Changed:
    """A model whose logits go through change(logits_NV, number of steps before)."""

    counts_prompt = True

    def __init__(self, model: Blip, change: Any) -> None:
        self.model = model
        self.change = change
        self.steps = 0

    def start(self, *arguments: Any) -> BlipDecodeState:
        self.steps = 0
        return self.model.start(*arguments)

    def step(self, state: BlipDecodeState, ids_N: Tensor) -> Tensor:
        self.steps += 1
        return self.change(self.model.step(state, ids_N), self.steps - 1)


def captions(model: Any, pixel_values: Tensor, prompt: list[int], settings: DecodeSettings) -> list[list[Decoded]]:
    blip = model if isinstance(model, Blip) else model.model
    with torch.no_grad():
        state = blip.encode_image(pixel_values)
    return search(model, state, torch.tensor(prompt), eos_id=EOS_ID, settings=settings)


def ids_of(results: list[list[Decoded]]) -> list[list[tuple[int, ...]]]:
    return [[caption.ids for caption in image] for image in results]


def num_tokens(caption: Decoded, settings: DecodeSettings) -> int:
    return min(len(caption.ids) + 1, settings.max_new_tokens)  # the end token counts, where there is one


def by_transformers(
    model: BlipForConditionalGeneration, pixel_values: Tensor, prompt: list[int], settings: DecodeSettings
) -> tuple[list[list[tuple[int, ...]]], list[float]]:
    k = settings.num_beams
    # transformers drops the last of input_ids, as its processor ends a prompt with [SEP]
    input_ids = torch.tensor([[*prompt, EOS_ID]]).repeat(len(pixel_values), 1)
    generated = model.generate(
        pixel_values,
        input_ids,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        num_beams=k,
        length_penalty=settings.length_penalty,
        early_stopping=False,
        do_sample=False,
        num_return_sequences=k,
        return_dict_in_generate=True,
        output_scores=True,
    )
    texts = [[*row[len(prompt) :].tolist(), EOS_ID] for row in generated.sequences]
    ids = [tuple(text[: text.index(EOS_ID)]) for text in texts]
    return [ids[i : i + k] for i in range(0, len(ids), k)], generated.sequences_scores.tolist()


@pytest.mark.parametrize("num_beams", [2, 3, 5])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_every_beam_and_its_score_equal_those_of_transformers(num_beams: int, length_penalty: float) -> None:
    lengths = set()
    for seed, min_new_tokens, prompt in (
        (1, 0, [BOS_ID, 7, 8]),
        (3, 0, [BOS_ID]),
        (3, 4, [BOS_ID]),
        (5, 3, [BOS_ID, 9]),
    ):
        ours, published = pair_that_ends_captions(seed)
        settings = DecodeSettings(
            max_new_tokens=12, min_new_tokens=min_new_tokens, num_beams=num_beams, length_penalty=length_penalty
        )
        results = captions(ours, images(8), prompt, settings)
        expected, expected_scores = by_transformers(published, images(8), prompt, settings)
        assert ids_of(results) == expected
        found = [caption for image in results for caption in image]
        scores = [c.score * num_tokens(c, settings) ** (1 - length_penalty) for c in found]
        assert scores == pytest.approx(expected_scores, rel=1e-5)
        assert all(num_tokens(c, settings) > min_new_tokens for c in found)
        lengths |= {len(c.ids) for c in found}

        noise = torch.Generator().manual_seed(0)
        noisy = Changed(ours, lambda x, _, noise=noise: x + ROUNDING * torch.rand(x.shape, generator=noise))
        assert ids_of(captions(noisy, images(8), prompt, settings)) == expected
    assert len(lengths) > 3


def test_fewer_words_than_beams_are_searched_as_by_transformers() -> None:
    """The first step has fewer continuations than it is asked for."""
    ours, published = pair_that_ends_captions(seed=0, vocab_size=8)
    settings = DecodeSettings(max_new_tokens=6, num_beams=5)
    results = captions(ours, images(6), [6], settings)
    assert ids_of(results) == by_transformers(published, images(6), [6], settings)[0]
    assert all(len(set(image)) == 5 for image in ids_of(results))


def test_one_new_token_is_searched_as_by_transformers() -> None:
    ours, published = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=1, num_beams=3)
    results = captions(ours, images(6), [BOS_ID], settings)
    assert ids_of(results) == by_transformers(published, images(6), [BOS_ID], settings)[0]
    assert {len(ids) for image in ids_of(results) for ids in image} == {0, 1}


def test_the_score_is_the_mean_log_probability_whatever_the_beams_are_ranked_by() -> None:
    ours, published = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=8, num_beams=3, length_penalty=2.0)
    pixel_values = images(4)
    for pixels, beams in zip(pixel_values, captions(ours, pixel_values, [BOS_ID, 7], settings), strict=True):
        for caption in beams:
            new_ids = [*caption.ids, EOS_ID][: num_tokens(caption, settings)]
            text = torch.tensor([[BOS_ID, 7, *new_ids]])
            with torch.no_grad():
                log_probs = published(pixels[None], text).logits[0, 1:-1].log_softmax(-1)
            expected = log_probs[torch.arange(len(new_ids)), torch.tensor(new_ids)].mean()
            assert caption.score == pytest.approx(float(expected), rel=1e-5)


def test_one_beam_is_greedy_search() -> None:
    ours, _ = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=10, min_new_tokens=2)
    image = ours.encode_image(images(6))
    expected = greedy(ours, image, torch.tensor([BOS_ID, 7]), eos_id=EOS_ID, settings=settings)
    assert captions(ours, images(6), [BOS_ID, 7], settings) == expected


@pytest.mark.parametrize("num_beams", [1, 3])
def test_an_image_has_the_same_beams_in_any_batch(num_beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=16, num_beams=num_beams)
    dropped: list[int] = []
    keep = BlipDecodeState.keep

    def record(self: BlipDecodeState, kept: Tensor) -> None:
        dropped.append(self.num_rows // num_beams - len(kept))
        keep(self, kept)

    monkeypatch.setattr(BlipDecodeState, "keep", record)
    pixel_values = images(20)
    alone = [captions(ours, pixel_values[i : i + 1], [BOS_ID], settings)[0] for i in range(20)]
    assert not dropped
    for size in (3, 7, 20):
        batched = [
            b for i in range(0, 20, size) for b in captions(ours, pixel_values[i : i + size], [BOS_ID], settings)
        ]
        assert ids_of(batched) == ids_of(alone)
        for ours_, theirs in zip(batched, alone, strict=True):
            assert [c.score for c in ours_] == pytest.approx([c.score for c in theirs], rel=1e-4)
    assert num_beams == 1 or len(dropped) > 3  # images that were done left their batch


def test_a_rank_that_is_done_goes_on_until_all_ranks_are_and_says_the_same() -> None:
    ours, _ = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=40, num_beams=2, length_penalty=0.0)
    model, asked = Changed(ours, lambda logits, _: logits), list[bool]()

    def all_finished(finished: bool) -> bool:
        asked.append(finished)
        return len(asked) == 30

    image = ours.encode_image(images(5))
    prompt_ids = torch.tensor([BOS_ID])
    expected = search(model, image, prompt_ids, eos_id=EOS_ID, settings=settings)
    assert model.steps < 30
    steps_alone = model.steps
    results = search(model, image, prompt_ids, eos_id=EOS_ID, settings=settings, all_finished=all_finished)
    assert model.steps == 30
    assert asked == [step >= steps_alone for step in range(1, 31)]
    assert ids_of(results) == ids_of(expected)


def test_what_a_finished_row_would_go_on_with_does_not_matter() -> None:
    ours, _ = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=16)
    alone = [caption for (caption,) in captions(ours, images(20), [BOS_ID], settings)]
    short, long = (choose(range(20), key=lambda i: alone[i].num_tokens) for choose in (min, max))
    last = alone[short].num_tokens
    assert last < alone[long].num_tokens

    def break_it_behind_its_end(logits_NV: Tensor, step: int) -> Tensor:
        return logits_NV.index_fill(0, torch.tensor([0]), torch.nan) if step >= last else logits_NV

    batch = images(20)[[short, long, long, long]]  # the finished one stays: most are not
    (found,), *_ = captions(Changed(ours, break_it_behind_its_end), batch, [BOS_ID], settings)
    assert found.ids == alone[short].ids
    assert found.log_prob == pytest.approx(alone[short].log_prob, rel=1e-4)


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_probability_that_is_no_number_is_seen_in_the_score_of_its_image_alone(num_beams: int, step: int) -> None:
    ours, _ = pair_that_ends_captions(seed=3)
    settings = DecodeSettings(max_new_tokens=6, min_new_tokens=6, num_beams=num_beams)

    def break_the_last_row(logits_NV: Tensor, steps: int) -> Tensor:
        return logits_NV.index_fill(0, torch.tensor([len(logits_NV) - 1]), torch.nan if steps == step else 0.0)

    def flatten_the_last_row(logits_NV: Tensor, _: int) -> Tensor:
        return logits_NV.index_fill(0, torch.tensor([len(logits_NV) - 1]), 0.0)

    broken = captions(Changed(ours, break_the_last_row), images(3), [BOS_ID], settings)
    whole = captions(Changed(ours, flatten_the_last_row), images(3), [BOS_ID], settings)
    assert math.isnan(broken[2][0].score)
    assert broken[:2] == whole[:2]
    assert all(math.isfinite(caption.score) for image in whole for caption in image)


def best_of_transformers_4_15(model: Blip, pixels: Tensor, prompt: list[int], given: DecodeSettings) -> tuple[int, ...]:
    """The beam search of transformers 4.15 for one image: a length is that of prompt and text without the end token."""
    k, power = given.num_beams, given.length_penalty
    running, finished = [(0.0, ())], list[tuple[float, tuple[int, ...]]]()
    for n in range(1, given.max_new_tokens + 1):
        totals = []
        for total, ids in running:
            with torch.no_grad():
                state = model.start(model.encode_image(pixels[None]), torch.tensor(prompt), 1)
                logits = [model.step(state, torch.tensor([token])) for token in (prompt[-1], *ids)][-1]
            totals.append(total + logits[0].log_softmax(-1))
        flat, V = torch.stack(totals).flatten(), totals[0].shape[-1]
        likeliest = [(float(flat[i]), running[int(i) // V][1], int(i) % V) for i in flat.topk(2 * k).indices]
        length = len(prompt) + n - 1
        finished += [(total / length**power, ids) for total, ids, token in likeliest[:k] if token == EOS_ID]
        finished = sorted(finished, reverse=True)[:k]
        running = [(total, (*ids, token)) for total, ids, token in likeliest if token != EOS_ID][:k]
        if len(finished) == k and finished[-1][0] >= likeliest[0][0] / length**power:
            return finished[0][1]
    length = len(prompt) + given.max_new_tokens
    return max(finished + [(total / length**power, ids) for total, ids in running])[1]


@pytest.mark.parametrize("length_penalty", [1.0, 2.0])
def test_lengths_that_count_the_prompt_give_the_captions_of_transformers_4_15(length_penalty: float) -> None:
    counts = {"other than without": 0, "cut at the last token": 0}
    for seed, num_beams, prompt in ((1, 3, [BOS_ID, 7, 8]), (3, 2, [BOS_ID]), (5, 3, [BOS_ID, 9])):
        ours, _ = pair_that_ends_captions(seed)
        settings = DecodeSettings(
            max_new_tokens=8, num_beams=num_beams, length_penalty=length_penalty, length_counts_prompt=True
        )
        found = [best.ids for best, *_ in captions(ours, images(12), prompt, settings)]
        assert found == [best_of_transformers_4_15(ours, pixels, prompt, settings) for pixels in images(12)]
        without = captions(ours, images(12), prompt, replace(settings, length_counts_prompt=False))
        counts["other than without"] += sum(ids != best.ids for ids, (best, *_) in zip(found, without, strict=True))
        counts["cut at the last token"] += sum(len(ids) == 8 for ids in found)
    assert min(counts.values()) > 0, counts
