"""raycap/checkpoint.py: what was saved comes back bit by bit, damage is named, and plain transformers reads the folder."""

import errno
import io
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import png_images, tiny_checkpoint
from tokenizers import Tokenizer
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)

from raycap import checkpoint
from raycap.captioner import Captioner
from raycap.checkpoint import (
    SEAL,
    CheckpointSpec,
    export_weights,
    import_published,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from raycap.errors import CheckpointError, StorageError
from raycap.models.blip import TIED_NAMES
from raycap.text import save_tokenizer

torch.set_num_threads(1)

INFO = {"step": 12, "metrics": {"cider": 0.75, "val_loss": 1.5}, "config": {"lr": 1e-3, "prompt": "é"}, "none": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder with a prompt."""
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model.state_dict()), spec, INFO)
    return tmp_path / "checkpoint"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder as Salesforce published BLIP: BERT's tokenizer, to which [DEC] and [ENC] are unknown; no raycap.json."""
    folder = tmp_path / "published"
    folder.mkdir()
    spec, _, model = tiny_checkpoint()
    model.save_pretrained(folder)
    # Salesforce's text_config names 2 as the end, which nothing uses; captions end with [SEP].
    edit_json(folder / "config.json", lambda config: config["text_config"].update(eos_token_id=2))
    BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    document = json.loads(spec.tokenizer.to_str())
    document["added_tokens"] = [t for t in document["added_tokens"] if t["content"] not in ("[DEC]", "[ENC]")]
    document["model"]["vocab"] = {k: v for k, v in document["model"]["vocab"].items() if k not in ("[DEC]", "[ENC]")}
    save_tokenizer(Tokenizer.from_str(json.dumps(document)), spec.text, str(folder))
    return folder


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def import_plainly(folder: Path) -> tuple[CheckpointSpec, Any]:
    return import_published(str(folder), prompt="", max_tokens=20)


# ---- round trip


def test_what_was_saved_comes_back_bit_by_bit(saved: Path) -> None:
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    loaded, weights = load_checkpoint(str(saved))
    for name in ("kind", "text", "image", "decode"):
        assert getattr(loaded, name) == getattr(spec, name), name
    assert loaded.tokenizer.to_str() == spec.tokenizer.to_str()
    assert loaded.info == INFO
    assert loaded.verified
    expected = export_weights(model.state_dict())
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    again = load_model(loaded, weights, str(saved)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert len(again) == len(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_weights_are_single_precision_copies_with_each_tied_tensor_once(dtype: torch.dtype) -> None:
    _, model, _ = tiny_checkpoint()
    weights = export_weights(model.to(dtype).state_dict())
    assert set(model.state_dict()) - set(weights) == set(TIED_NAMES)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(-7)
    assert all(torch.equal(weights[name], before[name]) for name in before)


def test_a_saved_checkpoint_saves_again_without_change(saved: Path, tmp_path: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    save_checkpoint(str(tmp_path / "again"), weights, spec, INFO)
    names = sorted(path.name for path in saved.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    for name in names:
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


# ---- damage


def test_one_flipped_byte_in_any_file_is_refused_by_the_files_name(saved: Path) -> None:
    files = sorted(path for path in saved.iterdir() if path.name != SEAL)
    assert {path.name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    for path in files:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            with pytest.raises(CheckpointError, match=rf"checkpoint '{saved}' is damaged: '{path.name}' is not"):
                load_checkpoint(str(saved))
        path.write_bytes(whole[:-1])
        with pytest.raises(CheckpointError, match=f"'{path.name}'"):
            load_checkpoint(str(saved))
        path.write_bytes(whole)
    load_checkpoint(str(saved))


def test_one_flipped_byte_in_the_seal_is_refused_too(saved: Path) -> None:
    """It holds the prompt, the image size and the decode settings, which no other file vouches for."""
    whole = (saved / SEAL).read_bytes()
    for place in range(0, len(whole), 7):
        (saved / SEAL).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=rf"{SEAL}|has format"):
            load_checkpoint(str(saved))
    (saved / SEAL).write_bytes(whole.replace(b'"max_new_tokens": 12', b'"max_new_tokens": 13'))
    with pytest.raises(CheckpointError, match=f"is damaged: '{SEAL}' is not as it was written"):
        load_checkpoint(str(saved))


def test_a_missing_file_is_named(saved: Path) -> None:
    (saved / "vocab.txt").unlink()
    with pytest.raises(CheckpointError, match=f"checkpoint '{saved}' lacks 'vocab.txt', which its {SEAL} names"):
        load_checkpoint(str(saved))


def test_weights_that_somebody_added_are_not_read(saved: Path) -> None:
    _, expected = load_checkpoint(str(saved))
    name = "text_decoder.cls.predictions.bias"
    save_file({name: torch.full_like(expected[name], 9.0), "more": torch.ones(1)}, saved / "z.safetensors")
    _, weights = load_checkpoint(str(saved))
    assert weights.keys() == expected.keys()
    assert torch.equal(weights[name], expected[name])


def test_a_folder_that_is_none_or_no_checkpoint_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=f"no checkpoint folder at '{tmp_path}/x': it does not exist; check the path"
    ):
        load_checkpoint(f"{tmp_path}/x")
    with pytest.raises(
        CheckpointError, match=f"'{tmp_path}' is no checkpoint folder: it holds no {SEAL}; give the folder"
    ):
        load_checkpoint(str(tmp_path))
    for text in ("[1]", "{", "\udcff"):
        (tmp_path / SEAL).write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(CheckpointError, match=f"{SEAL} in '{tmp_path}'"):
            load_checkpoint(str(tmp_path))


def test_a_later_format_names_the_version_to_install(saved: Path) -> None:
    edit_json(saved / SEAL, lambda seal: seal.update(format_version=2, versions={"raycap": "9.1"}))
    with pytest.raises(
        CheckpointError, match=r"has format 2, this raycap reads 1; install the raycap that wrote it \(9.1\)"
    ):
        load_checkpoint(str(saved))


# ---- writing


def out_of_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["save_file", "save_tokenizer", "_write_json", "_sha256"])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    saved: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load_checkpoint(str(saved))
    monkeypatch.setattr(checkpoint, function, out_of_space)
    with pytest.raises(StorageError, match=f"cannot write checkpoint '{saved}': .*No space left on device; free space"):
        save_checkpoint(str(saved), weights, spec, {"step": 13})
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(str(saved.parent / "new"), weights, spec, {"step": 13})
    monkeypatch.undo()
    assert load_checkpoint(str(saved))[0].info == INFO
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_a_rename_that_fails_puts_the_older_checkpoint_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights = load_checkpoint(str(saved))
    rename = Path.rename

    def fail_for_the_new(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)
    with pytest.raises(StorageError, match="Input/output error"):
        save_checkpoint(str(saved), weights, spec, {"step": 13})
    assert load_checkpoint(str(saved))[0].info == INFO
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_an_interrupted_save_leaves_the_older_checkpoint(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, weights = load_checkpoint(str(saved))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_tokenizer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(saved), weights, spec, {"step": 13})
    assert load_checkpoint(str(saved))[0].info == INFO
    assert [path.name for path in saved.parent.iterdir()] == ["checkpoint"]


def test_what_a_killed_process_left_is_never_taken_for_a_checkpoint(saved: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    for kind in ("new", "old"):  # its process number may be ours: containers count from 1
        left = saved.parent / f".checkpoint.{kind}-{os.getpid()}"
        left.mkdir()
        (left / "model.safetensors").write_bytes(b"half")
        (left / "stray").write_bytes(b"")
    with pytest.raises(CheckpointError, match="is no checkpoint folder"):
        load_checkpoint(str(left))
    save_checkpoint(str(saved), weights, spec, {"step": 13})
    assert load_checkpoint(str(saved))[0].info == {"step": 13}
    assert sorted(path.name for path in saved.parent.iterdir()) == ["checkpoint"]
    assert not (saved / "stray").exists()


# ---- plain transformers


def captions_by_transformers(folder: Path, images: list[bytes], prompt: str) -> list[str]:
    model = BlipForConditionalGeneration.from_pretrained(folder).eval()
    processor = BlipProcessor.from_pretrained(folder)
    pictures = [Image.open(io.BytesIO(data)) for data in images]
    text = {"text": [prompt] * len(images)} if prompt else {}
    inputs = processor(images=pictures, return_tensors="pt", **text)
    generated = model.generate(**inputs, max_new_tokens=12, num_beams=1, do_sample=False)
    texts = processor.batch_decode(generated, skip_special_tokens=True)
    return [text.removeprefix(prompt.strip()).strip() for text in texts]


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_plain_transformers_gives_our_captions(tmp_path: Path, prompt: str) -> None:
    spec, model, _ = tiny_checkpoint(prompt=prompt)
    save_checkpoint(str(tmp_path), export_weights(model.state_dict()), spec, {})
    images = png_images(12)
    ours = [result.caption or "" for result in Captioner.load(str(tmp_path)).caption(images)]
    assert len(set(ours)) > 4
    # Random weights may begin with the inner piece of a word, which transformers glues to the prompt.
    assert [caption.removeprefix("##") for caption in ours] == captions_by_transformers(tmp_path, images, prompt)


def test_plain_transformers_loads_every_part_without_a_complaint(
    saved: Path,
) -> None:
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    published, facts = BlipForConditionalGeneration.from_pretrained(saved, output_loading_info=True)
    assert not any(facts.values()), facts
    assert all(torch.equal(published.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert type(AutoProcessor.from_pretrained(saved)) is BlipProcessor
    assert AutoTokenizer.from_pretrained(saved).get_vocab() == spec.tokenizer.get_vocab()
    pixel_values = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    ids = torch.tensor([spec.text.bos_id, 20, 21, 22])
    with torch.no_grad():
        expected = published.eval()(pixel_values, ids.expand(3, -1)).logits[:, -1]
        state = model.start(model.encode_image(pixel_values), ids)
    torch.testing.assert_close(model.step(state, ids[-1].expand(3)), expected, rtol=1e-5, atol=1e-5)


# ---- published weights


def test_a_published_folder_gives_the_captions_of_transformers_and_is_unverified(published: Path) -> None:
    spec, weights = import_plainly(published)
    assert not spec.verified
    assert spec.tokenizer.token_to_id("[DEC]") is None
    vocab_size = spec.model_config["text_config"]["vocab_size"]
    assert (spec.text.bos_id, spec.text.eos_id, spec.text.pad_id) == (vocab_size - 2, 3, 0)
    assert (spec.text.prompt, spec.text.max_tokens, spec.image.size) == ("", 20, 32)
    captioner = Captioner(load_model(spec, weights, "x").eval(), spec)
    images = png_images(8)
    ours = [result.caption for result in captioner.caption(images, replace(spec.decode, max_new_tokens=12))]
    assert ours == captions_by_transformers(published, images, "")


def test_an_imported_model_saved_as_a_checkpoint_gives_the_same_captions(published: Path, tmp_path: Path) -> None:
    spec, weights = import_plainly(published)
    before = Captioner(load_model(spec, weights, "x").eval(), spec).caption(png_images(6))
    save_checkpoint(str(tmp_path / "checkpoint"), weights, spec, {})
    captioner = Captioner.load(str(tmp_path / "checkpoint"))
    assert captioner.spec.verified
    assert captioner.caption(png_images(6)) == before


def test_older_and_newer_layouts_of_the_preprocessing_are_read(published: Path) -> None:
    expected = import_plainly(published)[0].image
    edit_json(published / "preprocessor_config.json", lambda image: image.update(size=32))
    assert import_plainly(published)[0].image == expected
    # What BlipProcessor.save_pretrained of transformers 5 writes.
    image = json.loads((published / "preprocessor_config.json").read_text())
    (published / "processor_config.json").write_text(json.dumps({"image_processor": image}))
    (published / "preprocessor_config.json").unlink()
    assert import_plainly(published)[0].image == expected
    edit_json(published / "processor_config.json", lambda p: p["image_processor"].update(size={"shortest_edge": 32}))
    with pytest.raises(CheckpointError, match=r"processor_config.json of .* no square size"):
        import_plainly(published)
    (published / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no preprocessor_config.json"):
        import_plainly(published)


def test_settings_that_an_export_left_out_have_their_default(published: Path) -> None:
    edit_json(published / "config.json", lambda config: config["text_config"].pop("pad_token_id"))
    assert import_plainly(published)[0].text.pad_id == 0


def test_position_ids_and_tied_names_of_older_exports_are_no_obstacle(published: Path) -> None:
    path = published / "model.safetensors"
    weights = load_file(path)
    extra = {"text_decoder.bert.embeddings.position_ids": torch.arange(64)[None]}
    tied = {second: weights[first].clone() for second, first in TIED_NAMES.items()}
    save_file(weights | extra | tied, path)
    spec, given = import_plainly(published)
    state = load_model(spec, given, "x").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


def test_only_safetensors_are_read(published: Path) -> None:
    torch.save(load_file(published / "model.safetensors"), published / "pytorch_model.bin")
    (published / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"holds no \*.safetensors file; raycap loads no pickled weights"):
        import_plainly(published)
    (published / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' of .* cannot be read"):
        import_plainly(published)


def test_another_kind_of_model_is_refused(published: Path) -> None:
    edit_json(published / "config.json", lambda config: config.update(model_type="vit-gpt2"))
    with pytest.raises(CheckpointError, match="holds a model of type 'vit-gpt2'; raycap imports 'blip'"):
        import_plainly(published)
    (published / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        import_plainly(published)


def test_weights_that_do_not_fit_are_refused_by_the_first_name(published: Path) -> None:
    spec, weights = import_plainly(published)
    name = "vision_model.embeddings.position_embedding"
    with pytest.raises(CheckpointError, match=f"0 missing, 0 unknown, 1 of another shape \\(first: '{name}'\\)"):
        load_model(spec, {**weights, name: torch.zeros(1, 3, 32)}, "x")
    without = {key: tensor for key, tensor in weights.items() if key != name}
    with pytest.raises(CheckpointError, match=f"of 'x' do not fit its config.json: 1 missing, 0 unknown.*'{name}'"):
        load_model(spec, without, "x")
    with pytest.raises(CheckpointError, match=r"0 missing, 1 unknown.*first: 'stranger'"):
        load_model(spec, {**weights, "stranger": torch.zeros(1)}, "x")
    # A tied tensor under neither of its names is missing under both.
    tied = "text_decoder.cls.predictions.bias"
    with pytest.raises(CheckpointError, match=r"2 missing"):
        load_model(spec, {key: tensor for key, tensor in weights.items() if key != tied}, "x")


def test_importing_a_sealed_folder_verifies_it_and_takes_the_given_prompt(saved: Path) -> None:
    spec, weights = import_published(str(saved), prompt="two ", max_tokens=9)
    before, expected = load_checkpoint(str(saved))
    assert spec.verified
    assert spec.text == replace(before.text, prompt="two ", max_tokens=9)
    assert (spec.image, spec.decode, spec.info) == (before.image, before.decode, before.info)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    shutil.copy(saved / "README.md", saved / "config.json")
    with pytest.raises(CheckpointError, match=r"is damaged: 'config.json'"):
        import_published(str(saved), prompt="", max_tokens=9)


def test_a_hub_name_without_network_is_refused_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets at import
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    begun = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"cannot get 'nobody/nothing' from the model hub \(.*local folder"):
        import_published("nobody/nothing", prompt="", max_tokens=20)
    assert time.perf_counter() - begun < 2
    for path in ("/no/such/folder", "./nowhere", "one-word"):
        with pytest.raises(
            CheckpointError, match=f"no checkpoint folder at '{path}': it does not exist; check the path"
        ):
            import_published(path, prompt="", max_tokens=20)
