"""Captions that hold required words: against every text there is, against the rule restated, and as their readers see them."""

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import test_vgg_lstm
import torch
from hypothesis import HealthCheck, assume, given, settings, strategies
from tiny import EOS_ID, png_images, tiny_blip_pair, tiny_checkpoint
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from raycap.captioner import Captioner
from raycap.decoding import search
from raycap.decoding.greedy import Decoded
from raycap.decoding.required import Required, Words
from raycap.decoding.rules import Rules
from raycap.models.blip import BlipDecodeState
from raycap.schema import DecodeSettings
from raycap.text import banned_ids, decode, goes_on, required_ids, train_wordpiece

torch.set_num_threads(1)
PROMPT = [1]
GoesOn = Callable[[int], bool]
drawn = settings(deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


def never(_: int) -> bool:
    return False


def holds(text: Sequence[int], words: Words, goes_on: GoesOn = never) -> bool:
    """Whether the text holds each word in one of its spellings, by itself."""

    def stands(ids: tuple[int, ...], first: int) -> bool:
        end = first + len(ids)
        begins, ends = first == 0 or not goes_on(ids[0]), end == len(text) or not goes_on(text[end])
        return begins and ends

    return all(
        any(tuple(text[i : i + len(ids)]) == ids and stands(ids, i) for ids in word for i in range(len(text)))
        for word in words
    )


def found_by(
    model: Any, state: Any, settings: DecodeSettings, words: Words, eos_id: int, **more: Any
) -> list[list[Decoded]]:
    prompt = torch.tensor(more.pop("prompt", PROMPT))
    with torch.no_grad():
        return search(model, state, prompt, eos_id=eos_id, settings=settings, required=words, **more)


def ids_of(results: list[list[Decoded]]) -> list[list[tuple[int, ...]]]:
    return [[caption.ids for caption in image] for image in results]


def assert_same(found: Sequence[Decoded], expected: Sequence[Decoded]) -> None:
    assert [decoded.ids for decoded in found] == [decoded.ids for decoded in expected]
    assert [decoded.score for decoded in found] == pytest.approx([decoded.score for decoded in expected], abs=1e-9)


# ---- where a text stands


@dataclass(frozen=True)
class Drawn:
    words: Words
    goes_on: frozenset[int]

    def holds(self, text: Sequence[int]) -> bool:
        return holds(text, self.words, self.goes_on.__contains__)


@strategies.composite
def requirements(draw: Any, num_tokens: int = 4) -> Drawn:
    token = strategies.integers(0, num_tokens - 1)
    spelling = strategies.lists(token, min_size=1, max_size=3).map(tuple)
    words = draw(
        strategies.lists(strategies.lists(spelling, min_size=1, max_size=2).map(tuple), min_size=1, max_size=3)
    )
    continuing = draw(strategies.frozensets(token, max_size=2))
    assume(all(any(ids[0] not in continuing for ids in word) for word in words))
    return Drawn(tuple(words), continuing)


@settings(drawn, max_examples=60)
@given(requirements(), strategies.lists(strategies.integers(0, 5), max_size=8))
def test_a_text_lacks_nothing_if_and_only_if_it_holds_every_word(what: Drawn, text: list[int]) -> None:
    required = Required(what.words, what.goes_on.__contains__)
    alone = [Required((word,), what.goes_on.__contains__) for word in what.words]
    place, places = required.start, [each.start for each in alone]
    for n, token in enumerate(text):
        place = required.follow(place, token)
        places = [each.follow(p, token) for each, p in zip(alone, places, strict=True)]
        assert (place.num_missing == 0) == what.holds(text[: n + 1])
        assert max(p.num_missing for p in places) == place.num_least <= place.num_missing <= required.num_tokens

    # One of the next tokens always leads on, so that a text is as near to its end as is said, or nearer.
    fewest, reached = 0, {place}
    while not any(p.num_missing == 0 for p in reached):
        fewest, reached = fewest + 1, {required.follow(p, token) for p in reached for token in range(6)}
    assert place.num_least <= fewest <= place.num_missing
    while place.num_missing:
        nearer = min((required.follow(place, token) for token in place.next_ids), key=lambda p: p.num_missing)
        assert nearer.num_missing < place.num_missing
        place = nearer


# ---- a model whose probabilities are looked up, so that every text can be asked for


class Table:
    """Logits that are drawn by the image's number and the text. Its own decode state. The last token is the end token."""

    def __init__(
        self, images: Sequence[int], vocab: int = 5, *, eos_bonus: float = 0.0, counts_prompt: bool = True
    ) -> None:
        self.images, self.vocab, self.eos_bonus, self.counts_prompt = images, vocab, eos_bonus, counts_prompt
        self.steps, self.widths = 0, list[int]()

    def logits(self, image: int, text: tuple[int, ...]) -> Tensor:
        seed = hash((image, *text)) % 2**31
        logits = 2 * torch.randn(self.vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        logits[-1] += self.eos_bonus
        return logits

    def start(self, _: Any, prompt_ids: Tensor, beams: int = 1) -> "Table":
        self.beams, self.steps, self.widths = beams, 0, []
        self.rows = [(image, tuple(prompt_ids[:-1].tolist())) for image in self.images for _ in range(beams)]
        return self

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    def step(self, _: Any, ids: Tensor) -> Tensor:
        self.steps += 1
        self.widths.append(len(self.rows) // self.beams)
        self.rows = [(image, (*text, token)) for (image, text), token in zip(self.rows, ids.tolist(), strict=True)]
        logits = {row: self.logits(*row) for row in dict.fromkeys(self.rows)}
        return torch.stack([logits[row] for row in self.rows]) if self.rows else torch.zeros(0, self.vocab)

    def reorder(self, index: Tensor) -> None:
        parents = index.tolist()
        assert all(self.rows[row][0] == self.rows[parent][0] for row, parent in enumerate(parents)), "another image's"
        self.rows = [self.rows[parent] for parent in parents]

    def keep(self, images: Tensor) -> None:
        self.rows = [self.rows[image * self.beams + row] for image in images.tolist() for row in range(self.beams)]

    def numbers(self, image: int, text: tuple[int, ...], rules: Rules) -> tuple[list[float], list[float]]:
        """Of every token behind the text: log-probability after the rules, and before them."""
        log_probs = self.logits(image, (*PROMPT, *text)).log_softmax(-1)
        said = torch.tensor([[*PROMPT, *text] if self.counts_prompt else text], dtype=torch.int64)
        scores = rules.apply(log_probs[None], said, len(text))[0]
        return scores.tolist(), log_probs.tolist()


OPTIONS = strategies.fixed_dictionaries(
    {
        "length_penalty": strategies.sampled_from([1.0, 0.0, -1.0, 2.0]),
        "length_counts_prompt": strategies.booleans(),
        "early_stopping": strategies.sampled_from([False, False, True, "never"]),
        "repetition_penalty": strategies.sampled_from([1.0, 1.0, 0.7, 1.5]),
        "min_new_tokens": strategies.integers(0, 4),
    }
)
BANNED = strategies.lists(strategies.lists(strategies.integers(0, 4), min_size=1, max_size=2).map(tuple), max_size=2)


def length_of(num_new_tokens: int, ended: bool, given: DecodeSettings) -> int:
    return len(PROMPT) + num_new_tokens - ended if given.length_counts_prompt else num_new_tokens


@settings(drawn, max_examples=12)
@given(requirements(), OPTIONS, BANNED.map(tuple))
def test_beams_as_wide_as_all_texts_find_every_text_with_the_words_in_order(
    what: Drawn, options: dict[str, Any], banned: tuple[tuple[int, ...], ...]
) -> None:
    L, eos_id, model = 4, 4, Table([0, 1])
    # As many as texts of 3 tokens: no bank ever drops one, and no image is done before the last step.
    given = DecodeSettings(max_new_tokens=L, num_beams=4**3, required_words=("these",), **options)
    found = found_by(model, None, given, what.words, eos_id, goes_on=what.goes_on.__contains__, banned=banned)
    rules = Rules.of(given, eos_id, banned)
    for image, captions in enumerate(found):
        expected, running = [], [((), 0.0, 0.0)]
        for n in range(1, L + 1):
            longer = []
            for ids, score, total in running:
                for token, (more, log_prob) in enumerate(zip(*model.numbers(image, ids, rules), strict=True)):
                    text = (ids if token == eos_id else (*ids, token), score + more, total + log_prob)
                    if more > -math.inf and token != eos_id:
                        longer.append(text)
                    if more > -math.inf and (token == eos_id or n == L) and what.holds(text[0]):
                        expected.append(
                            (
                                text[1] / length_of(n, token == eos_id, given) ** given.length_penalty,
                                Decoded(text[0], text[2], n),
                            )
                        )
            running = longer
        expected.sort(key=lambda ranked: ranked[0], reverse=True)
        assert_same(captions, [decoded for _, decoded in expected][: given.num_beams])


def restated(model: Table, image: int, given: DecodeSettings, what: Drawn, banned: Any, eos_id: int) -> list[Decoded]:
    """The rule as constrained.py states it, of one image and one text after the other."""
    k, L, required = given.num_beams, given.max_new_tokens, Required(what.words, what.goes_on.__contains__)
    rules = Rules.of(given, eos_id, banned)
    running, finished = [(0.0, 0.0, (), required.start)], list[tuple[float, Decoded]]()
    for n in range(1, L + 1):
        banks = defaultdict(list)
        for score, total, ids, place in running:
            scores, log_probs = model.numbers(image, ids, rules)
            likeliest = sorted(range(model.vocab), key=lambda token: -scores[token])[: 2 * k]
            for token in {*likeliest, *place.next_ids}:
                text = (ids if token == eos_id else (*ids, token)), score + scores[token], total + log_probs[token]
                if text[1] == -math.inf:
                    continue
                if token != eos_id and n < L:
                    follow = required.follow(place, token)
                    if follow.num_least <= L - n:
                        banks[follow.num_missing].append((text[1], text[2], text[0], follow))
                elif what.holds(text[0]):
                    finished.append(
                        (
                            text[1] / length_of(n, token == eos_id, given) ** given.length_penalty,
                            Decoded(text[0], text[2], n),
                        )
                    )
        finished = sorted(finished, key=lambda ranked: -ranked[0])[:k]
        running = [text for bank in banks.values() for text in sorted(bank, key=lambda text: -text[0])[:k]]
        never = given.early_stopping == "never" and given.length_penalty > 0
        length = length_of(L if never else n, not never, given)
        hoped = max((text[0] for text in running), default=-math.inf) / length**given.length_penalty
        if len(finished) == k and (given.early_stopping is True or hoped <= finished[-1][0]):
            break
    return [decoded for _, decoded in finished]


@settings(drawn, max_examples=40)
@given(
    requirements(),
    OPTIONS,
    strategies.integers(2, 4),
    strategies.integers(0, 4),
    strategies.lists(strategies.integers(0, 9), min_size=1, max_size=5, unique=True),
    strategies.one_of(strategies.just(()), BANNED.map(tuple)),
    strategies.sampled_from([0.0, 3.0]),
    strategies.booleans(),
)
def test_few_beams_find_texts_with_the_words_by_the_rule_whatever_comes_together(
    what: Drawn,
    options: dict[str, Any],
    num_beams: int,
    more: int,
    images: list[int],
    banned: tuple[tuple[int, ...], ...],
    eos_bonus: float,
    counts_prompt: bool,
) -> None:
    num_required = Required(what.words, what.goes_on.__contains__).num_tokens
    options["min_new_tokens"] = min(options["min_new_tokens"], num_required + more)
    given = DecodeSettings(max_new_tokens=num_required + more, num_beams=num_beams, **options)
    model = Table(images, vocab=12, eos_bonus=eos_bonus, counts_prompt=counts_prompt)
    found = found_by(model, None, given, what.words, 11, goes_on=what.goes_on.__contains__, banned=banned)
    for image, captions in zip(images, found, strict=True):
        assert captions or banned, "where the words have room, they are said"
        assert all(what.holds(caption.ids) and len(caption.ids) <= given.max_new_tokens for caption in captions)
        assert len({caption.ids for caption in captions}) == len(captions) <= num_beams
        assert_same(captions, restated(model, image, given, what, banned, 11))


def test_an_image_is_done_when_no_running_text_can_come_among_the_finished_ones() -> None:
    def widths(early_stopping: Any, length_penalty: float = 1.0) -> list[int]:
        """How many images took each step."""
        model = Table(range(8), vocab=9, eos_bonus=4.0)
        options = {"early_stopping": early_stopping, "length_penalty": length_penalty}
        found = found_by(
            model, None, DecodeSettings(max_new_tokens=30, num_beams=2, **options), (((2,),), ((3, 4),)), 8
        )
        assert all(len(image) == 2 for image in found)
        return model.widths

    at_once, by_length, surely = widths(True), widths(False), widths("never")
    assert 3 < len(at_once) < len(by_length) <= len(surely) <= 30
    assert sum(by_length) < sum(surely)
    assert (by_length[0], by_length[-1]) == (8, 1), "what is done leaves the batch"
    for length_penalty in (0.0, -1.0):  # a longer text is ranked no higher, so its present length is its best
        assert widths(False, length_penalty) == widths("never", length_penalty)


# ---- real models


@pytest.mark.parametrize("family", ["show_and_tell", "show_attend_and_tell", "blip"])
def test_models_of_tiny_vocabulary_say_every_text_with_the_words_in_order(family: str) -> None:
    vocab, eos_id, L, k = 6, 5, 4, 5**3  # see above: no bank ever drops a text
    penalty = {"show_and_tell": 0.0, "show_attend_and_tell": 1.0, "blip": 2.0}[family]
    if family == "blip":
        model, published = (m.double() for m in tiny_blip_pair(seed=3, vocab_size=vocab))
        pixels = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).double()
    else:
        config = {"vocab_size": vocab, "hidden_size": 6, "embedding_size": 6, "image_size": 32}
        model = test_vgg_lstm.tiny_model(family == "show_attend_and_tell", **config).double()
        pixels = test_vgg_lstm.images(1, size=32).double()
    everything = []
    for length in range(L + 1):
        texts = torch.tensor(list(itertools.product(range(eos_id), repeat=length)), dtype=torch.int64)
        said = torch.cat([torch.tensor([PROMPT] * len(texts)), texts], dim=1)
        rows = pixels.expand(len(texts), -1, -1, -1)
        with torch.no_grad():
            logits = (
                published(rows, said).logits
                if family == "blip"
                else test_vgg_lstm.restated_logits(model.state_dict(), rows, said)
            )
        new = torch.cat([said[:, 1:], torch.full((len(texts), 1), eos_id)], dim=1)[:, :L]
        totals = logits.log_softmax(-1)[:, : new.shape[1]].gather(2, new[:, :, None]).sum(dim=(1, 2))
        n = new.shape[1]
        scored = zip(texts.tolist(), totals.tolist(), strict=True)
        everything += [(total / n**penalty, Decoded(tuple(text), total, n)) for text, total in scored]
    everything.sort(key=lambda ranked: ranked[0], reverse=True)

    state = model.encode_image(pixels)
    for words in (
        (((3,),),),
        (((2, 3),), ((3, 0),)),  # "2 3 0" holds both
        (((1,),),),  # the prompt says it too
    ):
        expected = [decoded for _, decoded in everything if holds(decoded.ids, words)]
        assert 10 < len(expected) < len(everything)
        given = DecodeSettings(max_new_tokens=L, num_beams=k, length_penalty=penalty)
        (captions,) = found_by(model, state, given, words, eos_id)
        assert_same(captions, expected[:k])


def pair_that_ends_captions() -> Any:
    ours, _ = tiny_blip_pair(seed=3)
    with torch.no_grad():  # random weights rarely end a caption by themselves
        ours.text_decoder.get_parameter("cls.predictions.bias")[EOS_ID] += 3.0
    return ours


def test_an_image_has_the_same_captions_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, words = pair_that_ends_captions(), (((20,),), ((30, 31),))
    pixels = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    given = DecodeSettings(max_new_tokens=14, num_beams=3, length_penalty=0.0)
    dropped: list[int] = []
    keep = BlipDecodeState.keep

    def record(self: BlipDecodeState, kept: Tensor) -> None:
        dropped.append(self.num_rows // 12 - len(kept))
        keep(self, kept)

    monkeypatch.setattr(BlipDecodeState, "keep", record)
    states = [model.encode_image(pixels[i : i + 1]) for i in range(12)]
    alone = [found_by(model, state, given, words, EOS_ID, prompt=[58, 20, 30, 31])[0] for state in states]
    assert not dropped
    assert all(len(image) == 3 and holds(caption.ids, words) for image in alone for caption in image)
    for size in (5, 12):
        parts = [model.encode_image(pixels[i : i + size]) for i in range(0, 12, size)]
        batched = [
            image for state in parts for image in found_by(model, state, given, words, EOS_ID, prompt=[58, 20, 30, 31])
        ]
        assert ids_of(batched) == ids_of(alone)
        for ours, theirs in zip(batched, alone, strict=True):
            assert [c.score for c in ours] == pytest.approx([c.score for c in theirs], rel=1e-4)
    assert sum(dropped) > 3


def test_a_caption_that_holds_the_words_anyway_is_found_or_a_better_one() -> None:
    """Not by the rule, as a bank may fill with what plain beams never see; but of these weights, and nearly always."""
    model = pair_that_ends_captions()
    state = model.encode_image(torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    given = DecodeSettings(max_new_tokens=10, num_beams=4)
    plain = found_by(model, state, given, (), EOS_ID)
    said = [image[0].ids[len(image[0].ids) // 2] for image in plain if image[0].ids]
    assert len(set(said)) > 1
    for token in set(said):
        found = found_by(model, state, given, (((token,),),), EOS_ID)
        for (best, *_), (free, *_) in zip(found, plain, strict=True):
            assert best.ids == free.ids if token in free.ids else best.score < free.score + 1e-6


@pytest.mark.parametrize("step", [0, 2, 4])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probability_that_is_no_number_is_seen_in_the_score_of_its_image_alone(step: int, value: float) -> None:
    class Broken(Table):
        def logits(self, image: int, text: tuple[int, ...]) -> Tensor:
            logits = super().logits(image, text)
            if image == 1 and len(text) - len(PROMPT) == step:
                logits[0] = value
            return logits

    given = DecodeSettings(max_new_tokens=6, min_new_tokens=6, num_beams=3)
    words = (((2,),), ((3, 0),))
    broken = found_by(Broken([0, 1, 2]), None, given, words, 4)
    whole = found_by(Table([0, 1, 2]), None, given, words, 4)
    assert len(broken[1]) == 1
    assert math.isnan(broken[1][0].score)
    assert [broken[0], broken[2]] == [whole[0], whole[2]]
    assert all(math.isfinite(caption.score) for image in whole for caption in image)


def test_a_rank_that_is_done_goes_on_until_all_ranks_are_and_says_the_same() -> None:
    given, words = DecodeSettings(max_new_tokens=40, num_beams=2, length_penalty=0.0), (((2,),), ((3, 0),))
    model, asked = Table([0, 1, 2], eos_bonus=3.0), list[bool]()

    def all_finished(finished: bool) -> bool:
        asked.append(finished)
        return len(asked) == 30

    expected = found_by(model, None, given, words, 4)
    steps_alone = model.steps
    assert steps_alone < 30
    assert found_by(model, None, given, words, 4, all_finished=all_finished) == expected
    assert asked == [step >= steps_alone for step in range(1, 31)]

    nothing = Table([])  # a rank without images takes the others' steps
    assert found_by(nothing, None, given, words, 4, all_finished=lambda _: False) == []
    assert nothing.steps == 40


# ---- words as a tokenizer spells them


def byte_level() -> Tokenizer:
    """As GPT-2's: a word behind a space is another token than at the start of a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġcat", "Ġdog", "cat", "do"]
    merges = [(word[:i], word[i]) for word in words for i in range(1, len(word))]
    pieces = [*alphabet, *("".join(pair) for pair in merges), "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


TOKENIZERS = {
    "words": train_wordpiece(["a cat, two dogs and the fish . t - shirt ! café dog"]),
    "bytes": byte_level(),
}
both_tokenizers = pytest.mark.parametrize("kind", TOKENIZERS)


def pieces(kind: str, words: Words) -> list[list[str]]:
    return [[" ".join(TOKENIZERS[kind].id_to_token(i) for i in ids) for ids in word] for word in words]


def test_a_word_is_spelled_as_at_the_start_of_a_text_and_as_behind_a_space() -> None:
    given = ["cat", " two dogs ", "cat", "tac"]
    assert pieces("words", required_ids(TOKENIZERS["words"], given)) == [["cat"], ["two dogs"], ["t ##a ##c"]]
    assert pieces("bytes", required_ids(TOKENIZERS["bytes"], ["cat", "dog", "über"])) == [
        ["cat", "Ġcat"],
        ["do g", "Ġdog"],
        ["Ã ¼ b e r", "Ġ Ã ¼ b e r"],
    ]
    banned = banned_ids(TOKENIZERS["bytes"], ["do"])
    assert pieces("bytes", required_ids(TOKENIZERS["bytes"], ["dog"], banned)) == [["Ġdog"]]


@pytest.mark.parametrize(
    ("kind", "word", "sentence"),
    [
        ("words", "狗", "the tokenizer cannot spell the required word '狗'; leave it out"),
        ("words", "cat 狗", "cannot spell the required word 'cat 狗'"),
        ("words", "[SEP]", r"the tokenizer cannot spell the required word '\[SEP\]'"),
        ("words", "cat [SEP]", r"writes the required word 'cat \[SEP\]' as 'cat'"),
        ("words", "Cat", "the tokenizer writes the required word 'Cat' as 'cat'; give it so"),
        ("words", "café", "writes the required word 'café' as 'cafe'"),
        ("words", "t-shirt", "writes the required word 't-shirt' as 't - shirt'"),
        ("bytes", "<|endoftext|>", "cannot spell the required word"),
        ("bytes", "bobcat", "the required word 'bobcat' holds a banned one; give one of them"),
    ],
)
def test_a_word_that_would_not_stand_in_the_text_as_given_is_refused(kind: str, word: str, sentence: str) -> None:
    tokenizer = TOKENIZERS[kind]
    with pytest.raises(ValueError, match=sentence):
        required_ids(tokenizer, ["dog", word], banned_ids(tokenizer, ["cat"]) if word == "bobcat" else ())


def test_a_tokenizer_that_tells_no_word_from_the_middle_of_one_is_refused() -> None:
    tokenizer = Tokenizer(models.BPE({"\u2581": 0, "c": 1}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    with pytest.raises(ValueError, match="cannot spell the required word 'c'"):
        required_ids(tokenizer, ["c"])


def test_tokens_that_go_on_with_a_word_are_told_from_those_that_do_not() -> None:
    for kind, on, not_on in (
        ("words", ["##c", "##a", "[PAD]", "[DEC]"], ["cat", "a", ",", "-"]),
        ("bytes", ["cat", "c", "7", "Ã", "<|endoftext|>"], ["Ġcat", "Ġ", ",", ".", "'", "-"]),
    ):
        tokenizer = TOKENIZERS[kind]
        assert [token for token in on + not_on if goes_on(tokenizer, tokenizer.token_to_id(token))] == on
        assert goes_on(tokenizer, tokenizer.get_vocab_size() + 5), "what has no text does not end a word"


@both_tokenizers
def test_a_text_that_holds_a_word_shows_it_to_its_reader(kind: str) -> None:
    tokenizer, num_held = TOKENIZERS[kind], Counter[str]()
    words = ["cat", "dog", "two dogs", "cat,", "t - shirt" if kind == "words" else "t-shirt", "a"]
    spelled = {word: required_ids(tokenizer, [word]) for word in words}
    whole = [ids for required in spelled.values() for ids in required[0]]
    some = [*range(0, tokenizer.get_vocab_size(), 7), *map(tokenizer.token_to_id, "os,-"), *itertools.chain(*whole)]
    part = strategies.one_of(strategies.sampled_from(whole), strategies.sampled_from([(token,) for token in some]))
    automata = {word: Required(spelled[word], lambda token: goes_on(tokenizer, token)) for word in words}

    @settings(drawn, max_examples=100)
    @given(strategies.lists(part, max_size=6))
    def check(said: list[tuple[int, ...]]) -> None:
        ids = [token for part in said for token in part]
        text = decode(tokenizer, ids)
        for word, automaton in automata.items():
            place = automaton.start
            for token in ids:
                place = automaton.follow(place, token)
            if place.num_missing == 0:
                assert re.search(rf"(?<![a-z0-9]){re.escape(word)}(?![a-z0-9])", text), (word, text)
                num_held[word] += 1

    check()
    assert len(num_held) == len(words), num_held


# ---- through a captioner


def captioner() -> Captioner:
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    return Captioner(model, spec)


SETTINGS = DecodeSettings(max_new_tokens=8, num_beams=3, num_candidates=3)


def test_every_caption_and_candidate_holds_the_words() -> None:
    ours, images = captioner(), png_images(5)
    words = ("red kite", "under", "wolf")
    assert not any(word in (result.caption or "") for result in ours.caption(images, SETTINGS) for word in words)
    results = ours.caption([*images, b"no image"], replace(SETTINGS, required_words=words))
    for result in results[:-1]:
        assert result.candidates[0][:2] == (result.caption, result.score)
        assert len(result.candidates) == 3
        for text, *_ in result.candidates:
            assert all(re.search(rf"\b{word}\b", text) for word in words), text
    assert results[-1].error_kind == "not_an_image"
    prompts = ["two dogs", ""] * 2 + ["two dogs"]
    prompted = ours.caption(images, replace(SETTINGS, required_words=("dogs",)), prompts=prompts)
    assert all(re.search(r"\bdogs\b", result.caption or "") for result in prompted)


def test_a_word_that_the_model_would_rather_go_on_with_stands_by_itself() -> None:
    ours = captioner()
    with torch.no_grad():
        for token in ("##u", "##t"):
            ours.model.text_decoder.get_parameter("cls.predictions.bias")[ours.spec.tokenizer.token_to_id(token)] += 5
    for result in ours.caption(png_images(5), replace(SETTINGS, required_words=("cat", "a"))):
        assert all({"cat", "a"} <= set(re.findall(r"\w+", text)) for text, *_ in result.candidates), result


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"required_words": ("wolf", "hill", "kite"), "max_new_tokens": 5},
            "take 6 tokens, and max_new_tokens is 5; raise",
        ),
        ({"required_words": ("Dog",)}, "writes the required word 'Dog' as 'dog'; give it so"),
        ({"required_words": ("red dogs",), "banned_words": ("dogs",)}, "'red dogs' holds a banned one"),
        ({"required_words": ("日本",)}, "cannot spell the required word '日本'"),
    ],
)
def test_words_that_cannot_be_said_are_refused_before_any_work(options: dict[str, Any], sentence: str) -> None:
    ours, given = captioner(), replace(SETTINGS, **options)
    with pytest.raises(ValueError, match=sentence):
        ours.caption([b"no image"], given)
    with pytest.raises(ValueError, match=sentence):
        ours.caption_prepared(np.zeros((1, 3, 32, 32), np.uint8), given)
    with pytest.raises(ValueError, match=sentence):
        replace(ours.spec, decode=given).settings()


def test_an_image_without_such_a_caption_is_an_error_of_its_own_kind_and_not_a_broken_model() -> None:
    # Each order is banned, and there is no room for a word between them.
    given = replace(
        SETTINGS, max_new_tokens=2, required_words=("red", "cat"), banned_words=("red cat", "cat red"), num_candidates=0
    )
    results = captioner().caption(png_images(2), given)
    assert [(result.caption, result.error_kind) for result in results] == [(None, "no_such_caption")] * 2
    assert "no caption of at most 2 tokens was found that holds the required words ('red', 'cat')" in (
        results[0].error or ""
    )
    assert captioner().caption(png_images(1), replace(given, max_new_tokens=3))[0].caption


def test_a_broken_model_is_named_as_one() -> None:
    ours = captioner()
    with torch.no_grad():
        ours.model.vision_model.get_parameter("post_layernorm.bias")[0] = torch.inf
    given = replace(SETTINGS, required_words=("cat",))
    results = ours.caption_prepared(np.zeros((2, 3, 32, 32), np.uint8), given, all_finished=lambda finished: finished)
    assert [(result.caption, result.error_kind) for result in results] == [(None, "not_finite")] * 2


# ---- settings


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, r"required_words are \('dog',\) and num_beams is 1; a search for them has beams, so give 2 or more"),
        ({"do_sample": True}, r"do_sample and required_words=\('dog',\) exclude each other"),
        ({"num_beams": 2, "no_repeat_ngram_size": 2}, "and no_repeat_ngram_size is 2, which may forbid them; give one"),
        (
            {"num_beams": 2, "banned_words": ("cat", " dog")},
            "banned_words and required_words both hold 'dog'; give it in",
        ),
        (
            {"num_beams": 2, "required_words": ("dog", " ")},
            r"required_words are \('dog', ' '\); give words that are not empty",
        ),
        ({"num_beams": 2, "required_words": (7,)}, r"required_words are \(7,\); give words"),
    ],
)
def test_settings_that_contradict_required_words_are_refused_by_name(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        DecodeSettings(**({"required_words": ("dog",)} | options))


def test_required_words_are_given_as_json() -> None:
    given = DecodeSettings().override(num_beams=3, others='{"required_words": ["dog", "red cat"]}')
    assert str(given) == "max_new_tokens=20 num_beams=3 required_words=('dog', 'red cat')"
    assert hash(given) == hash(replace(given, required_words=("dog", "red cat")))
    with pytest.raises(ValueError, match="required_words is 'dog'; give a list of words"):
        DecodeSettings().override(num_beams=3, others='{"required_words": "dog"}')
