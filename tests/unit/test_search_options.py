"""What a search may be told, against transformers' generate(); and sampling, whose draws are ours."""

from collections import Counter
from typing import Any

import pytest
import torch
from test_greedy import BOS_ID, images, pair_that_ends_captions
from tiny import EOS_ID
from torch import Tensor
from transformers import BlipForConditionalGeneration

from raycap.decoding import search
from raycap.decoding.rules import draw
from raycap.models.blip import Blip
from raycap.schema import DecodeSettings

torch.set_num_threads(1)
PROMPT = [BOS_ID, 7, 8]
OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"banned": ((49,), (7, 8), (49, 50))},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "banned": ((11,),), "min_new_tokens": 4},
]


def ours_and_theirs(
    pair: tuple[Blip, BlipForConditionalGeneration], pixels: Tensor, options: dict[str, Any]
) -> tuple[list[list[int]], list[list[int]]]:
    ours, published = pair
    options = dict(options)
    banned = options.pop("banned", ())
    settings = DecodeSettings(max_new_tokens=12, **options)
    found = search(
        ours, ours.encode_image(pixels), torch.tensor(PROMPT), eos_id=EOS_ID, settings=settings, banned=banned
    )
    # transformers drops the last of input_ids, as its processor ends a prompt with [SEP]
    input_ids = torch.tensor([[*PROMPT, EOS_ID]]).repeat(len(pixels), 1)
    more = {"bad_words_ids": [list(words) for words in banned]} if banned else {}
    generated = published.generate(
        pixels, input_ids, **({"max_new_tokens": 12, "num_beams": 1, "do_sample": False} | options | more)
    )
    texts = [[*row[len(PROMPT) :].tolist(), EOS_ID] for row in generated]
    return [list(best.ids) for best, *_ in found], [text[: text.index(EOS_ID)] for text in texts]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_may_not_be_said_is_what_transformers_does_not_say(options: dict[str, Any], num_beams: int) -> None:
    found, expected = ours_and_theirs(pair_that_ends_captions(), images(24), options | {"num_beams": num_beams})
    assert found == expected
    plain, _ = ours_and_theirs(pair_that_ends_captions(), images(24), {"num_beams": num_beams})
    assert found != plain, "the option must matter to some image"


@pytest.mark.parametrize("early_stopping", [True, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.0])
def test_an_image_stops_when_transformers_stops_it(early_stopping: Any, length_penalty: float) -> None:
    options = {"num_beams": 3, "early_stopping": early_stopping, "length_penalty": length_penalty}
    found, expected = ours_and_theirs(pair_that_ends_captions(), images(24), options)
    assert found == expected


def sample(pixels: Tensor, seeds: list[int], **options: Any) -> list[list[Any]]:
    ours, _ = pair_that_ends_captions()
    settings = DecodeSettings(**({"max_new_tokens": 8, "do_sample": True} | options))
    return search(
        ours,
        ours.encode_image(pixels),
        torch.tensor(PROMPT),
        eos_id=EOS_ID,
        settings=settings,
        image_seeds=seeds,
    )


def test_a_sampled_caption_depends_on_its_seeds_alone() -> None:
    pixels, seeds = images(6), [11, 22, 33, 44, 55, 66]
    together = sample(pixels, seeds, num_candidates=3, top_p=0.95)
    order = [4, 1, 5]
    some = sample(pixels[order], [seeds[i] for i in order], num_candidates=3, top_p=0.95)
    assert [[d.ids for d in image] for image in some] == [[d.ids for d in together[i]] for i in order]
    assert all(len({d.ids for d in image}) > 1 for image in together), "draws of one image must differ"
    other = sample(pixels, seeds, num_candidates=3, top_p=0.95, seed=1)
    assert [[d.ids for d in image] for image in other] != [[d.ids for d in image] for image in together]
    again = sample(pixels, seeds, num_candidates=3, top_p=0.95)
    assert again == together


def test_the_likeliest_token_alone_is_greedy_search() -> None:
    found = sample(images(5), [1, 2, 3, 4, 5], top_k=1)
    ours, _ = pair_that_ends_captions()
    settings = DecodeSettings(max_new_tokens=8)
    expected = search(ours, ours.encode_image(images(5)), torch.tensor(PROMPT), eos_id=EOS_ID, settings=settings)
    assert [[d.ids for d in image] for image in found] == [[d.ids for d in image] for image in expected]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0, -torch.inf]])
    num_draws = 20_000
    drawn = draw(logits.expand(num_draws, -1), torch.arange(num_draws), seed=3, step=5)
    counts = Counter(drawn.tolist())
    expected = logits.softmax(-1)[0]
    assert set(counts) == {0, 1, 3, 4}
    for token, count in counts.items():
        share = float(expected[token])
        assert abs(count / num_draws - share) < 5 * (share * (1 - share) / num_draws) ** 0.5


def test_a_draw_never_takes_what_may_not_be_said_at_either_end() -> None:
    logits = torch.full((2000, 9), -torch.inf)
    logits[:, 4] = 0.0
    assert set(draw(logits, torch.arange(2000), seed=0, step=0).tolist()) == {4}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"do_sample": True, "num_beams": 2}, "do_sample and num_beams=2 exclude each other"),
        ({"temperature": 0.5}, "temperature=0.5 is for sampling; give do_sample and one beam"),
        ({"top_k": 5}, "top_k=5 is for sampling"),
        ({"seed": 5}, "seed=5 is for sampling"),
        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0; give one from 0.01 to 100"),
        ({"do_sample": True, "top_p": float("nan")}, "top_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size is -1"),
        ({"banned_words": ("a", " ")}, "banned_words are"),
        ({"banned_words": "photo"}, "banned_words is 'photo'; give a list of words"),
        ({"required_words": None}, "required_words is None; give a list of words"),
        ({"num_beams": 2.0}, "num_beams is 2.0; give a whole number"),
        ({"num_beams": True}, "num_beams is True; give a whole number"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; give a whole number"),
        ({"repetition_penalty": None}, "repetition_penalty is None; give a number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; give true or false"),
        ({"num_beams": 2, "early_stopping": 1}, "early_stopping is 1; give False, True or 'never'"),
        ({"early_stopping": True}, "early_stopping=True is for beams"),
        ({"length_counts_prompt": True}, "length_counts_prompt=True is for beams"),
        ({"num_beams": 2, "early_stopping": "maybe"}, "early_stopping is 'maybe'"),
        ({"num_candidates": 2}, "num_candidates is 2 and num_beams 1; a search finds as many captions as it has beams"),
        ({"do_sample": True, "num_candidates": 101}, "num_candidates is 101; give one from 0 to 100"),
    ],
)
def test_settings_that_contradict_each_other_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecodeSettings(**options)


def test_settings_say_what_is_not_the_default() -> None:
    assert str(DecodeSettings()) == "max_new_tokens=20 num_beams=1"
    said = str(DecodeSettings(do_sample=True, top_p=0.9, banned_words=["dog"]))  # type: ignore[arg-type]  # as JSON has it
    assert said == "max_new_tokens=20 num_beams=1 banned_words=('dog',) do_sample=True top_p=0.9"


@pytest.mark.parametrize(
    ("others", "sentence"),
    [
        ("top_p=0.9", "is no JSON"),
        ("[1]", "is no JSON object; settings are max_new_tokens"),
        ('{"top": 1}', "names 'top'; settings are max_new_tokens"),
        ('{"top_p": "high"}', "top_p is 'high'"),
        ('{"do_sample": 1}', "do_sample is 1"),
        ('{"top_k": true}', "top_k is True"),
        ('{"banned_words": "dog"}', "banned_words is 'dog'"),
        ('{"temperature": 0.5}', "temperature=0.5 is for sampling"),
    ],
)
def test_settings_given_as_json_are_checked_by_name(others: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecodeSettings().override(others=others)


def test_settings_given_as_json_join_the_flags_and_are_given_once() -> None:
    with pytest.raises(ValueError, match=r"num_beams is 3 and in .* 5; give it once"):
        DecodeSettings().override(num_beams=3, others='{"num_beams": 5}')
    with pytest.raises(ValueError, match="'top_k' stands in it twice"):
        DecodeSettings().override(others='{"top_k": 1, "top_k": 2, "do_sample": true}')
    others = '{"num_beams": 3, "repetition_penalty": 2, "banned_words": ["dog"], "early_stopping": "never"}'
    settings = DecodeSettings().override(num_beams=3, others=others)
    assert str(settings) == (
        "max_new_tokens=20 num_beams=3 early_stopping=never repetition_penalty=2 banned_words=('dog',)"
    )


@pytest.mark.parametrize(
    ("name", "value"), [("num_beams", 10**9), ("max_new_tokens", 10**9), ("num_candidates", 10**9)]
)
def test_a_setting_that_can_never_fit_is_refused_before_any_work(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is {value}; give"):
        DecodeSettings(**{name: value, **({"do_sample": True} if name == "num_candidates" else {})})
