"""CIDEr in pure Python, and the word splitter it uses in training."""

import random

import pytest
from pycocoevalcap.cider.cider import Cider

from raycap.metrics.cider import check_pairs, cider, prepare_references, score
from raycap.metrics.ptb_like import ptb_like

WORDS = ["a", "man", "dog", "rides", "the", "horse", "on", "beach", "red", "runs"]


def random_captions(num_images: int, num_references: int, seed: int) -> tuple[dict[str, str], dict[str, list[str]]]:
    rng = random.Random(seed)

    def caption() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, 14)))

    keys = [f"image{i}" for i in range(num_images)]
    return {key: caption() for key in keys}, {key: [caption() for _ in range(num_references)] for key in keys}


def assert_equals_pycocoevalcap(candidates: dict[str, str], references: dict[str, list[str]]) -> None:
    corpus, by_key = cider(candidates, references, tokenize=str.split)
    expected, expected_by_key = Cider().compute_score(references, {key: [c] for key, c in candidates.items()})
    assert corpus == pytest.approx(expected, abs=1e-9)
    assert list(by_key) == list(references)
    assert list(by_key.values()) == pytest.approx(list(expected_by_key), abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_references", [1, 5])
def test_scores_of_random_captions_equal_pycocoevalcap(num_references: int, seed: int) -> None:
    assert_equals_pycocoevalcap(*random_captions(40, num_references, seed))


def test_scores_of_odd_captions_equal_pycocoevalcap() -> None:
    candidates, references = random_captions(8, 3, seed=9)
    candidates |= {
        "image0": "",
        "image1": "dog",
        "image2": "words that no reference has",
        "image3": references["image3"][0],
        "image4": "a a a a a a a a a a a a a a a a a a a a a a a a a a a a",
    }
    references |= {"image5": ["", *references["image5"][1:]], "image6": ["", "", ""]}
    assert_equals_pycocoevalcap(candidates, references)


def test_a_single_image_scores_zero_as_in_pycocoevalcap() -> None:
    candidates, references = {"a": "a man rides a horse"}, {"a": ["a man rides a horse"]}
    assert cider(candidates, references) == (0.0, {"a": 0.0})
    assert_equals_pycocoevalcap(candidates, references)


def test_prepared_references_score_a_part_of_their_keys_with_the_weights_of_all() -> None:
    candidates, references = random_captions(20, 2, seed=1)
    prepared = prepare_references(references, str.split)
    _, by_key = score(candidates, prepared)
    corpus, part = score({key: candidates[key] for key in ("image3", "image7")}, prepared)
    assert part == {key: by_key[key] for key in ("image3", "image7")}
    assert corpus == pytest.approx((by_key["image3"] + by_key["image7"]) / 2)


def test_keys_on_one_side_only_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"2 candidates have no references: 'x', 'y'$"):
        cider({"x": "a", "y": "b", "z": "c"}, {"z": ["c"]})
    with pytest.raises(ValueError, match=r"4 keys with references have no candidate: 'k0', 'k1', 'k2'$"):
        cider({"z": "c"}, {"z": ["c"], **{f"k{i}": ["c"] for i in range(4)}})
    with pytest.raises(ValueError, match="1 candidates have no references: 'x'"):
        score({"x": "a"}, prepare_references({"z": ["c"]}))


def test_no_candidates_are_refused() -> None:
    with pytest.raises(ValueError, match="got none"):
        check_pairs({}, {"a": ["b"]})
    with pytest.raises(ValueError, match="got none"):
        score({}, prepare_references({"a": ["b"]}))


def test_references_that_are_no_list_of_captions_are_refused() -> None:
    with pytest.raises(ValueError, match="1 keys need a list of at least one reference: 'a'"):
        cider({"a": "dog", "b": "dog"}, {"a": "a dog", "b": ["a dog"]})
    with pytest.raises(ValueError, match="1 keys need a list of at least one reference: 'b'"):
        cider({"a": "dog", "b": "dog"}, {"a": ["a dog"], "b": []})


# Right: what Stanford's PTBTokenizer 3.4.1 with -lowerCase and pycocoevalcap's punctuation list answered.
TOKENIZED = {
    "A man's dog (blurry) isn't running.": "a man 's dog -lrb- blurry -rrb- is n't running",
    "The dogs' bowls can't hold water, so they don't.": "the dogs bowls ca n't hold water so they do n't",
    "He said \"hello\" to 'her' and it's 5:30 p.m.": "he said hello to her and it 's 5:30 p.m.",
    "a 50% off sign for $5.99 & more #1 @home": "a 50 % off sign for $ 5.99 & more # 1 @home",
    "black/white photo of a t-shirt and x-ray, well-known.": "black/white photo of a t-shirt and x-ray well-known",
    "U.S. flag on the St. Mary's bus no. 5": "u.s. flag on the st. mary 's bus no. 5",
    "cannot gonna wanna gimme lemme": "can not gon na wan na gim me lem me",
    "A dog ... runs -- fast - now; then: stops!": "a dog runs fast now then stops",
    "1,000 people, a 3-foot pizza, 1/2 of it, 20's": "1,000 people a 3-foot pizza 1/2 of it 20 's",
    "hello,world no.space.after end.Next": "hello world no.space.after end.next",
    "[brackets] {braces} *star* a_b o'clock ma'am": "-lsb- brackets -rsb- -lcb- braces -rcb- * star * a_b o'clock ma'am",
    "we're I'm you've he'll she'd what's": "we 're i 'm you 've he 'll she 'd what 's",
    "a caf\u00e9 with cr\u00e8me br\u00fbl\u00e9e; a man\u2019s \u201chat\u201d": "a caf\u00e9 with cr\u00e8me br\u00fbl\u00e9e a man 's hat",
    "  two   spaces\tand a tab\nand a line ": "two spaces and a tab and a line",
    "wow!! why?!": "wow !! why ?!",
    "...": "",
    "": "",
}


@pytest.mark.parametrize(("text", "words"), TOKENIZED.items())
def test_plain_captions_are_split_like_the_java_tokenizer_does(text: str, words: str) -> None:
    assert ptb_like(text) == words.split()
