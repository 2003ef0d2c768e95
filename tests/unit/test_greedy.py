"""Greedy search against transformers' generate(num_beams=1, do_sample=False), and its own bookkeeping."""

from collections.abc import Sequence

import pytest
import torch
from tiny import EOS_ID, tiny_blip_pair
from torch import Tensor
from transformers import BlipForConditionalGeneration

from raycap.decoding.greedy import Decoded, greedy
from raycap.decoding.protocol import CaptionModel, DecodeState
from raycap.models.blip import Blip
from raycap.schema import DecodeSettings

torch.set_num_threads(1)

BOS_ID = 58


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def pair_that_ends_captions() -> tuple[Blip, BlipForConditionalGeneration]:
    ours, published = tiny_blip_pair(seed=3)
    with torch.no_grad():  # random weights rarely end a caption by themselves
        for model in (ours, published):
            model.text_decoder.get_parameter("cls.predictions.bias")[EOS_ID] += 2.0
    return ours, published


class Scripted:
    """A model that says given texts: each token has probability 1/2, all others share the rest."""

    counts_prompt = True

    def __init__(self, texts: Sequence[Sequence[int]], vocab_size: int = 8) -> None:
        self.texts = texts
        self.vocab_size = vocab_size
        self.num_rows = len(texts)
        self.steps = 0
        self.widths: list[int] = []

    def keep(self, images: Tensor) -> None:
        self.texts = [self.texts[image] for image in images.tolist()]
        self.num_rows = len(self.texts)

    def start(self, *_: object) -> "Scripted":
        return self

    def step(self, *_: object) -> Tensor:
        logits = torch.zeros(self.num_rows, self.vocab_size)
        for row, text in enumerate(self.texts):
            logits[row, text[min(self.steps, len(text) - 1)]] = torch.tensor(self.vocab_size - 1.0).log()
        self.steps += 1
        self.widths.append(self.num_rows)
        return logits


def test_blip_fits_the_protocol() -> None:
    ours, _ = tiny_blip_pair()
    model: CaptionModel = ours  # mypy checks the signatures where captioner.py hands a model to greedy()
    state: DecodeState = model.start(model.encode_image(images(2)), torch.tensor([BOS_ID]), beams=2)
    assert isinstance(model, Blip)
    assert state.num_rows == 4


@pytest.mark.parametrize("prompt", [[BOS_ID], [BOS_ID, 7, 8, 9]], ids=["no prompt", "prompt"])
@pytest.mark.parametrize("min_new_tokens", [0, 6])
def test_captions_of_different_lengths_equal_those_of_transformers(prompt: list[int], min_new_tokens: int) -> None:
    ours, published = pair_that_ends_captions()
    pixel_values, prompt_ids = images(24), torch.tensor(prompt)
    settings = DecodeSettings(max_new_tokens=15, min_new_tokens=min_new_tokens)
    decoded = [
        best for best, *_ in greedy(ours, ours.encode_image(pixel_values), prompt_ids, eos_id=EOS_ID, settings=settings)
    ]

    # transformers drops the last of input_ids, as its processor ends a prompt with [SEP]
    input_ids = torch.tensor([[*prompt, EOS_ID]]).repeat(len(pixel_values), 1)
    generated = published.generate(
        pixel_values, input_ids, max_new_tokens=15, min_new_tokens=min_new_tokens, num_beams=1, do_sample=False
    )
    texts = [[*row[len(prompt) :].tolist(), EOS_ID] for row in generated]
    assert [list(d.ids) for d in decoded] == [text[: text.index(EOS_ID)] for text in texts]
    lengths = {len(d.ids) for d in decoded}
    assert len(lengths) > 3
    assert min(lengths) >= min_new_tokens


def test_the_score_is_the_mean_log_probability_with_the_end_token() -> None:
    ours, published = pair_that_ends_captions()
    pixel_values, settings = images(12), DecodeSettings(max_new_tokens=6)
    decoded = [
        best
        for best, *_ in greedy(
            ours, ours.encode_image(pixel_values), torch.tensor([BOS_ID, 7]), eos_id=EOS_ID, settings=settings
        )
    ]
    assert len({len(d.ids) == 6 for d in decoded}) == 2  # with and without an end token
    for pixels, caption in zip(pixel_values, decoded, strict=True):
        new_ids = [*caption.ids, EOS_ID][:6]
        text = torch.tensor([[BOS_ID, 7, *new_ids]])
        with torch.no_grad():
            log_probs = published(pixels[None], text).logits[0, 1:-1].log_softmax(-1)
        expected = log_probs[torch.arange(len(new_ids)), torch.tensor(new_ids)].mean()
        assert caption.score == pytest.approx(float(expected), rel=1e-5)


def test_rows_stop_at_their_own_end_token_and_the_batch_when_all_have() -> None:
    model = Scripted([[5, 3], [5, 6, 7, 3], [3]])
    decoded = [
        best
        for best, *_ in greedy(
            model, None, torch.tensor([1]), eos_id=EOS_ID, settings=DecodeSettings(max_new_tokens=20)
        )
    ]
    assert [d.ids for d in decoded] == [(5,), (5, 6, 7), ()]
    assert [d.score for d in decoded] == pytest.approx([torch.tensor(0.5).log().item()] * 3)
    assert model.steps == 4
    assert model.widths == [3, 3, 1, 1]  # what is finished leaves once it is half of the batch


def test_a_caption_without_an_end_token_is_cut_at_max_new_tokens() -> None:
    decoded = [
        best
        for best, *_ in greedy(
            Scripted([[5]]), None, torch.tensor([1]), eos_id=EOS_ID, settings=DecodeSettings(max_new_tokens=4)
        )
    ]
    assert decoded == [Decoded((5, 5, 5, 5), pytest.approx(4 * torch.tensor(0.5).log().item()), 4)]


def test_a_rank_that_is_done_goes_on_until_all_ranks_are() -> None:
    model = Scripted([[5, 3]])
    asked = []

    def all_finished(finished: bool) -> bool:
        asked.append(finished)
        return finished and len(asked) == 5

    ((decoded,),) = greedy(
        model,
        None,
        torch.tensor([1]),
        eos_id=EOS_ID,
        settings=DecodeSettings(max_new_tokens=20),
        all_finished=all_finished,
    )
    assert asked == [False, True, True, True, True]
    assert model.steps == 5
    assert decoded.ids == (5,)
