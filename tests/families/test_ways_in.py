"""Folders as trainers, hubs and clones leave them: each has a way in, or a sentence with one that works."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import png_images, write_published
from tiny_families import write_family
from tokenizers import Tokenizer
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForImageTextRetrieval,
    BlipImageProcessorPil,
    GPT2Tokenizer,
)

from raycap import Captioner, Scorer
from raycap.checkpoint import open_checkpoint, open_spec
from raycap.checkpoint.imports import import_weights
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, UserError
from raycap.text import decode, load_tokenizer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is unverified"),
    pytest.mark.filterwarnings("ignore:.* is followed"),
]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
TEXTS = ["a picture of two dogs", "one red cat on the hill", "under a big blue kite, then"]


def captions(folder: Path) -> list[str | None]:
    return [result.caption for result in Captioner.load(str(folder)).caption(png_images(4))]


@pytest.mark.parametrize("family", ["blip", "vit_gpt2"])
def test_a_trainers_folder_names_the_files_to_copy_and_from_where(tmp_path: Path, family: str) -> None:
    whole = write_family(tmp_path / "whole", family, sealed=False)
    expected = captions(whole)
    trained = tmp_path / "trained"
    trained.mkdir()
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        shutil.copy(whole / name, trained)
    with pytest.raises(
        CheckpointError,
        match=r"holds no preprocessor_config.json and no tokenizer.json .*; copy .* into it from .*'(Sales|nlp)",
    ):
        open_spec(str(trained))
    config = json.loads((trained / "config.json").read_text())
    (trained / "config.json").write_text(json.dumps(config | {"_name_or_path": "me/base"}))
    with pytest.raises(
        CheckpointError, match=r"copy preprocessor_config.json, tokenizer.json, tokenizer_config.json .* 'me/base'"
    ):
        open_spec(str(trained))
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, trained)
    assert captions(trained) == expected


def test_an_adapter_is_told_from_a_model_with_the_way_to_merge_it(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "me/blip"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    for call in (
        lambda: Captioner.load(str(tmp_path)),
        lambda: Scorer.load(str(tmp_path)),
        lambda: import_weights(ImportConfig(weights=str(tmp_path), out=str(tmp_path / "out"))),
    ):
        with pytest.raises(
            CheckpointError, match=r"is an adapter \(LoRA\) of 'me/blip' .* merge it with peft's .*merge_and_unload"
        ):
            call()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "preprocessor_config.json"])
def test_a_git_lfs_pointer_is_called_one(tmp_path: Path, name: str) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match=rf"'{name}' of .* is a Git LFS pointer: fetch the file"):
        open_checkpoint(str(folder))


def test_a_pickled_file_that_is_a_pointer_is_called_one(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"'model.pth' of .* is a Git LFS pointer"):
        import_weights(ImportConfig(weights=str(tmp_path / "model.pth"), out=str(tmp_path / "out")))


def test_berts_vocabulary_alone_is_a_tokenizer(tmp_path: Path) -> None:
    write_published(tmp_path / "blip")
    expected = captions(tmp_path / "blip")
    assert (tmp_path / "blip" / "vocab.txt").exists()
    fingerprint = open_spec(str(tmp_path / "blip")).fingerprint
    (tmp_path / "blip" / "tokenizer.json").unlink()
    assert captions(tmp_path / "blip") == expected
    assert open_spec(str(tmp_path / "blip")).fingerprint != fingerprint
    ours = load_tokenizer(str(tmp_path / "blip"))
    vocab = {word: i for i, word in enumerate((tmp_path / "blip" / "vocab.txt").read_text().splitlines())}
    theirs = BertTokenizer(vocab=vocab)
    for text in (*TEXTS, "Unhéard of, [SEP] 狗!"):
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids


def test_gpt2s_vocabulary_and_merges_are_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ a", "d o", "do g", "Ġ dog"]
    vocab = {token: i for i, token in enumerate([*alphabet, "Ġa", "do", "dog", "Ġdog", "<|endoftext|>"])}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    ours, theirs = load_tokenizer(str(tmp_path)), GPT2Tokenizer(vocab=vocab, merges=[tuple(m.split()) for m in merges])
    for text in ("a dog", " a dog and a cat", "狗 é"):
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert decode(ours, [*ids, vocab["<|endoftext|>"]]) == text.strip()


def test_special_tokens_that_only_the_map_names_are_not_said(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"] = [token for token in document["added_tokens"] if token["content"] != "[MASK]"]
    (folder / "tokenizer.json").write_text(json.dumps(document))
    ids = [document["model"]["vocab"][token] for token in ("two", "[MASK]", "dogs")]
    (folder / "tokenizer_config.json").unlink()
    (folder / "special_tokens_map.json").write_text(json.dumps({"mask_token": {"content": "[MASK]"}}))
    assert decode(load_tokenizer(str(folder)), ids) == "two dogs"
    assert AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True) == "two dogs"
    (folder / "special_tokens_map.json").write_text("[]")
    assert decode(load_tokenizer(str(folder)), ids) == "two [MASK] dogs"
    (folder / "special_tokens_map.json").write_text('{"mask_token": "[NEW]"}')
    assert load_tokenizer(str(folder)).get_vocab_size() == Tokenizer.from_str(json.dumps(document)).get_vocab_size()


def test_special_tokens_are_read_from_every_place_that_names_them_and_a_word_that_ends_captions_is_none(
    tmp_path: Path,
) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    document = json.loads((folder / "tokenizer.json").read_text())
    ids = [document["model"]["vocab"][token] for token in ("two", "red", "big", "blue", "dogs")]
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "added_tokens_decoder": {str(ids[1]): {"content": "red", "special": True}},
                "extra_special_tokens": ["big"],
            }
        )
    )
    end = {"eos_token": {"content": "blue"}, "pad_token": "blue"}
    (folder / "special_tokens_map.json").write_text(json.dumps(end))
    assert decode(load_tokenizer(str(folder)), ids) == "two blue dogs"


@pytest.mark.parametrize("parts", [1, 2])
def test_pickled_weights_of_a_folder_whole_or_in_parts_come_in_through_the_import(tmp_path: Path, parts: int) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    expected = captions(folder)
    pickle_weights(folder, parts)
    with pytest.raises(CheckpointError, match=r"convert it: jobs/import_weights.py --weights .*published --out FOLDER"):
        Captioner.load(str(folder))
    import_weights(ImportConfig(weights=str(folder), out=str(tmp_path / "out")), say=lambda _: None)
    assert captions(tmp_path / "out") == expected


@pytest.mark.parametrize("parts", [1, 2])
def test_a_scorer_with_pickled_weights_comes_in_through_the_import(tmp_path: Path, parts: int) -> None:
    folder, whole = tmp_path / "scorer", tmp_path / "blip"
    write_published(whole)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    text = {**size, "encoder_hidden_size": 32, "vocab_size": load_tokenizer(str(whole)).get_vocab_size() + 2}
    config = BlipConfig(
        text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, image_text_hidden_size=16
    )
    torch.manual_seed(0)
    BlipForImageTextRetrieval(config).save_pretrained(folder)
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(whole / name, folder)
    expected = Scorer.load(str(folder)).score(png_images(2), [["two dogs"], ["a red cat"]])
    pickle_weights(folder, parts)
    with pytest.raises(CheckpointError, match=r"convert it: jobs/import_weights.py --weights .*scorer"):
        Scorer.load(str(folder))
    import_weights(ImportConfig(weights=str(folder), out=str(tmp_path / "out")), say=lambda _: None)
    assert Scorer.load(str(tmp_path / "out")).score(png_images(2), [["two dogs"], ["a red cat"]]) == expected


def test_a_folder_that_needs_no_import_says_where_it_goes(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    with pytest.raises(UserError, match=r"holds safetensors and needs no import: give it to Captioner.load"):
        import_weights(ImportConfig(weights=str(folder), out=str(tmp_path / "out")))


def pickle_weights(folder: Path, parts: int) -> None:
    """Its safetensors become files from before them."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return
    names = sorted(weights)
    weight_map = {}
    for number in range(parts):
        file = f"pytorch_model-{number + 1:05d}-of-{parts:05d}.bin"
        torch.save({name: weights[name] for name in names[number::parts]}, folder / file)
        weight_map |= dict.fromkeys(names[number::parts], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
