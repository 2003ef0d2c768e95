import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from raycap.errors import CheckpointError
from raycap.text import (
    TextSpec,
    clean_caption,
    collate,
    decode,
    load_tokenizer,
    prompt_ids,
    role_ids,
    save_tokenizer,
    text_spec,
    tokenize,
    train_wordpiece,
    unknown_words,
)

CAPTIONS = [
    "A dog, left of a pizza!",
    "a pizza to the right of a dog",
    "an owl above a key; on blue",
    "a picture of a café",
]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_wordpiece(CAPTIONS)


def tokens(tokenizer: Tokenizer, ids: list[int]) -> list[str | None]:
    return [tokenizer.id_to_token(i) for i in ids]


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('A "Dog" (brown), runs; fast: #1 *now*~!', "a dog brown , runs fast 1 now"),
        ("  two\n cats \t sit. ", "two cats sit"),
        ("it's a t-shirt, yes?", "it's a t-shirt, yes?"),
        ("...", ""),
        (" ".join(["word"] * 31), " ".join(["word"] * 30)),
    ],
)
def test_a_caption_is_cleaned_as_blip_does_and_only_once(text: str, clean: str) -> None:
    assert clean_caption(text) == clean
    assert clean_caption(clean) == clean


def test_a_caption_may_keep_all_its_words() -> None:
    assert clean_caption("word " * 50, None).count("word") == 50
    assert clean_caption("one two three", 2) == "one two"


def test_a_caption_that_is_not_cleaned_keeps_its_case_and_characters_and_loses_only_whitespace() -> None:
    text = '  A "Dog" (brown);\tran\n fast: #1! '
    assert clean_caption(text, clean=False) == 'A "Dog" (brown); ran fast: #1!'
    assert clean_caption(text, 2, clean=False) == 'A "Dog"'
    assert clean_caption(" \n ", clean=False) == ""


def test_special_tokens_have_blips_places(tokenizer: Tokenizer) -> None:
    size = tokenizer.get_vocab_size()
    assert tokens(tokenizer, [0, 1, 2, 3, 4, size - 2, size - 1]) == [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "[DEC]",
        "[ENC]",
    ]
    assert role_ids(tokenizer) == (size - 2, 3, 0)


def test_training_gives_the_same_tokenizer_in_processes_with_other_hash_seeds() -> None:
    code = "import sys; from raycap.text import train_wordpiece as t; print(t(sys.argv[1:]).to_str())"
    written = {
        subprocess.run(
            [sys.executable, "-c", code, *CAPTIONS],
            env={**os.environ, "PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(written) == 1
    assert train_wordpiece(CAPTIONS).to_str().encode() == written.pop().strip()


def test_known_words_are_one_token_and_others_are_spelled(tokenizer: Tokenizer) -> None:
    spec = text_spec(tokenizer)
    (row,) = tokenize(tokenizer, spec, ["A pizza, a zap!"])
    assert tokens(tokenizer, row) == ["[DEC]", "a", "pizza", ",", "a", "z", "##a", "##p", "[SEP]"]
    assert decode(tokenizer, row) == "a pizza, a zap"
    assert tokens(tokenizer, tokenize(tokenizer, spec, ["a 狗 dog"])[0]) == ["[DEC]", "a", "[UNK]", "dog", "[SEP]"]


def test_the_vocabulary_keeps_the_most_frequent_words_when_it_is_limited() -> None:
    tokenizer = train_wordpiece(["dog dog cat", "owl cat dog"], max_words=2)
    encoded = tokenize(tokenizer, text_spec(tokenizer), ["dog cat owl"])[0]
    assert tokens(tokenizer, encoded)[1:-1] == ["dog", "cat", "o", "##w", "##l"]


def test_every_caption_survives_encoding_and_decoding(tokenizer: Tokenizer) -> None:
    rows = tokenize(tokenizer, text_spec(tokenizer), CAPTIONS)
    assert [decode(tokenizer, row) for row in rows] == [
        "a dog, left of a pizza",
        "a pizza to the right of a dog",
        "an owl above a key on blue",
        "a picture of a cafe",
    ]


def test_a_row_is_the_first_token_the_prompt_the_caption_and_the_end(tokenizer: Tokenizer) -> None:
    spec = text_spec(tokenizer, prompt="a picture of ")
    assert tokens(tokenizer, prompt_ids(tokenizer, spec)) == ["[DEC]", "a", "picture", "of"]
    (row,) = tokenize(tokenizer, spec, ["a dog"])
    assert tokens(tokenizer, row) == ["[DEC]", "a", "picture", "of", "a", "dog", "[SEP]"]


def test_a_long_caption_loses_its_end_but_not_the_end_token(tokenizer: Tokenizer) -> None:
    spec = text_spec(tokenizer, prompt="a picture of ", max_tokens=7)
    (row,) = tokenize(tokenizer, spec, ["a dog above a pizza"])
    assert tokens(tokenizer, row) == ["[DEC]", "a", "picture", "of", "a", "dog", "[SEP]"]
    with pytest.raises(ValueError, match=r"max_tokens=5 leaves no room for a caption: .*'a picture of ' .* take 5"):
        tokenize(tokenizer, text_spec(tokenizer, prompt="a picture of ", max_tokens=5), ["a dog"])


def test_special_tokens_written_in_a_caption_are_only_text(tokenizer: Tokenizer) -> None:
    spec = text_spec(tokenizer)
    for captions in (["a dog [SEP] [PAD]"], ["a dog [SEP] [PAD]"] * 50):  # a few are encoded by another way than many
        for row in tokenize(tokenizer, spec, captions) + tokenize(tokenizer, replace(spec, clean=False), captions):
            assert row.count(3) == 1
            assert 0 not in row


def test_the_spec_decides_what_of_a_caption_is_tokenized(tokenizer: Tokenizer) -> None:
    spec = text_spec(tokenizer, max_tokens=60)
    caption = " ".join(["dog"] * 40) + "!"
    for changes, num_dogs in (({}, 30), ({"max_words": None}, 40), ({"max_words": 2}, 2), ({"clean": False}, 30)):
        (row,) = tokenize(tokenizer, replace(spec, **changes), [caption])
        assert tokens(tokenizer, row) == ["[DEC]", *["dog"] * num_dogs, "[SEP]"]
    kept = train_wordpiece(["dog"])  # train_wordpiece cleans, so it knows no character that cleaning removes
    (row,) = tokenize(kept, replace(text_spec(kept), clean=False), ["Dog!"])
    assert tokens(kept, row) == ["[DEC]", "dog", "[UNK]", "[SEP]"]
    assert tokens(kept, tokenize(kept, text_spec(kept), ["Dog!"])[0]) == ["[DEC]", "dog", "[SEP]"]


def test_a_spec_without_the_younger_fields_means_blips_cleaning_and_others_are_refused() -> None:
    older = {"prompt": "", "bos_id": 9, "eos_id": 3, "pad_id": 0, "max_tokens": 40}
    spec = TextSpec(**older)  # type: ignore[arg-type]
    assert (spec.clean, spec.max_words) == (True, 30)
    for changes in ({"max_words": 0}, {"max_words": -1}, {"clean": "no"}, {"clean": None}):
        with pytest.raises(ValueError, match=r"(max_words|clean) is .* in the text settings"):
            replace(spec, **changes)
    with pytest.raises(TypeError, match="mirror"):
        TextSpec(**older, mirror=True)  # type: ignore[arg-type, call-arg]


def drawn_captions(seed: int, count: int) -> list[str]:
    """Captions as data sets have them and as they do not: empty, of 200 words, of any characters, with tokens' names."""
    rng = random.Random(seed)
    words = [word for caption in CAPTIONS for word in caption.split()]
    words += [
        "[SEP]",
        "x[dec]y",
        "##g",
        "dog-pizza",
        "ÉCOLE",
        "e\u0301",
        "狗",
        "\u200b",
        "\x00",
        "\ufffd",
        "İ",
        "ﬁ",
        "🦉",
        "a" * 120,
    ]
    alphabet = [chr(c) for c in (*range(1, 0x250), *range(0x2000, 0x2070), *range(0x4E00, 0x4E10), 0x1F989, 0x10FFFF)]
    captions = ["", " ", "...", " ".join(rng.choices(words, k=200))]
    for _ in range(count - len(captions)):
        text = " ".join(rng.choices(words, k=rng.randrange(14)))
        if rng.random() < 0.3:
            text += "".join(rng.choices(alphabet, k=rng.randrange(12)))
        captions.append(text)
    return captions


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize(
    "rules", ["bert", "bert that keeps case", "split at spaces", "bytes", "cut", "a token of two words"]
)
def test_many_captions_in_one_call_have_the_ids_they_have_alone(rules: str, clean: bool) -> None:
    tokenizer = train_wordpiece(CAPTIONS)
    match rules:
        case "bert that keeps case":
            tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
        case "split at spaces":
            tokenizer.normalizer = None
            tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        case "bytes":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "cut":
            tokenizer.enable_truncation(4)
        case "a token of two words":
            tokenizer.add_tokens(["left of"])
    alone = Tokenizer.from_str(tokenizer.to_str())
    alone.encode_special_tokens = True  # names of special tokens are text
    spec = replace(text_spec(tokenizer, max_tokens=400), clean=clean, max_words=None)
    for seed, count in ((0, 4), (1, 40), (2, 400)):
        captions = drawn_captions(seed, count)
        rows = tokenize(tokenizer, spec, captions)
        assert len(rows) == count
        for caption, row in zip(captions, rows, strict=True):
            ids = alone.encode(clean_caption(caption, None, clean=clean), add_special_tokens=False).ids
            if rules in ("bert", "bert that keeps case", "a token of two words") or "[" not in caption:
                assert row == [spec.bos_id, *ids[:398], spec.eos_id], caption
            else:
                assert not {spec.bos_id, spec.eos_id, 0, 2, 4} & set(row[1:-1]), caption
    assert tokenize(tokenizer, spec, []) == []


def test_tokenizing_thousands_of_captions_starts_no_thread_and_changes_no_environment() -> None:
    code = (
        "import os, psutil; from raycap.text import *\n"
        "tokenizer = train_wordpiece(['a dog']); environment = dict(os.environ)\n"
        "count = lambda: psutil.Process().num_threads()\n"
        "before = count(); tokenize(tokenizer, text_spec(tokenizer), ['a dog on a log', 'two'] * 1000)\n"
        "tokenize(tokenizer, text_spec(tokenizer), [f'a{n} dog{n}' for n in range(1000)])\n"
        "print(count() - before, environment == dict(os.environ))\n"
        "tokenizer.encode_batch(['a dog'] * 1000); print(count() > before)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["0", "True", "True"], done.stderr


def test_rows_are_padded_on_the_right_and_labels_skip_prompt_and_padding() -> None:
    spec = TextSpec(prompt="x", bos_id=9, eos_id=3, pad_id=7, max_tokens=10)
    input_ids, labels = collate([[9, 5, 4, 3], [9, 5, 4, 7, 6, 3]], spec, 2)
    assert input_ids.dtype == labels.dtype == np.int64
    assert input_ids.tolist() == [[9, 5, 4, 3, 7, 7], [9, 5, 4, 7, 6, 3]]
    assert labels.tolist() == [[-100, -100, 4, 3, -100, -100], [-100, -100, 4, 7, 6, 3]]
    assert [array.shape for array in collate([], spec, 2)] == [(0, 0), (0, 0)]


def test_decoding_skips_special_tokens_and_ids_without_a_name(tokenizer: Tokenizer) -> None:
    dog, comma = (tokenizer.token_to_id(token) for token in ("dog", ","))
    assert dog is not None
    assert comma is not None
    assert decode(tokenizer, [dog, comma, 30522, dog, 3, 0, 0]) == "dog, dog"
    assert decode(tokenizer, []) == ""


def test_a_saved_tokenizer_loads_equal(tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tokenizer(tokenizer, text_spec(tokenizer), str(tmp_path))
    assert load_tokenizer(str(tmp_path)).to_str() == tokenizer.to_str()
    assert (tmp_path / "vocab.txt").read_text().split("\n")[-3:] == ["[DEC]", "[ENC]", ""]
    monkeypatch.chdir(tmp_path.parent)
    assert load_tokenizer(tmp_path.name).to_str() == tokenizer.to_str()


def test_transformers_loads_a_saved_tokenizer_with_equal_ids(tokenizer: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer, BertTokenizer

    spec = text_spec(tokenizer)
    save_tokenizer(tokenizer, spec, str(tmp_path))
    text = "a pizza, an opera"
    for loaded in (AutoTokenizer.from_pretrained(tmp_path), BertTokenizer.from_pretrained(tmp_path)):
        assert loaded.get_vocab() == tokenizer.get_vocab()
        assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (spec.bos_id, spec.eos_id, 0)
        (row,) = tokenize(tokenizer, spec, [text])
        assert loaded(text, add_special_tokens=False).input_ids == row[1:-1]
        assert loaded(text).input_ids == [2, *row[1:]]
        assert loaded.decode(row, skip_special_tokens=True) == decode(tokenizer, row) == text


def test_a_tokenizer_in_blips_published_layout_works_with_the_ids_of_its_config(tmp_path: Path) -> None:
    """BERT's plain vocabulary: the ids of [DEC] and [ENC] lie behind it and have no name."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "picture", "of"]
    published = train_wordpiece([])
    published.model = models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]")
    document = json.loads(published.to_str())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] in pieces]
    tokenizer = Tokenizer.from_str(json.dumps(document))
    spec = TextSpec(prompt="a picture of ", bos_id=9, eos_id=3, pad_id=0, max_tokens=20)
    assert tokenize(tokenizer, spec, ["A dog."]) == [[9, 5, 7, 8, 5, 6, 3]]
    assert decode(tokenizer, [9, 5, 7, 8, 5, 6, 3]) == "a picture of a dog"
    save_tokenizer(tokenizer, spec, str(tmp_path))
    assert load_tokenizer(str(tmp_path)).get_vocab_size() == 9
    assert "bos_token" not in json.loads((tmp_path / "tokenizer_config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"has no \[DEC\] among its 9 tokens"):
        role_ids(tokenizer)


def test_a_folder_without_a_tokenizer_or_with_a_damaged_one_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot load the tokenizer of '{tmp_path}'.*tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(CheckpointError, match=f"'{tmp_path}': tokenizer.json is damaged"):
        load_tokenizer(str(tmp_path))


def test_a_name_that_the_hub_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(source: str, file_name: str) -> str:
        raise OSError(f"no network for {source}/{file_name}\nsecond line")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(
        CheckpointError, match=r"'nobody/nothing' from the Hugging Face Hub: no network .*json; pass the"
    ):
        load_tokenizer("nobody/nothing")


def test_words_that_the_tokenizer_does_not_know_are_counted_and_named() -> None:
    tokenizer = train_wordpiece(["a dog runs over the hill"])
    spec = text_spec(tokenizer)
    assert unknown_words(tokenizer, spec, ["a dog runs", "over the hill"]) == (0.0, [])
    share, words = unknown_words(tokenizer, spec, ["a dog 狗", "山 上"])
    assert share == pytest.approx(3 / 5)
    assert words == ["狗", "山", "上"]
    bytes_alone = Tokenizer(models.BPE())
    assert unknown_words(bytes_alone, spec, ["狗"]) == (0.0, [])
