"""raycap/checkpoint: what was saved comes back bit by bit, damage is named, and plain transformers reads the folder."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import captions_by_transformers, edit_json, png_images, tiny_checkpoint
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipProcessor,
)

from raycap.captioner import Captioner
from raycap.checkpoint import (
    SEAL,
    export_weights,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from raycap.checkpoint.folder import sha256_of_json, write_json
from raycap.errors import CheckpointError, StorageError
from raycap.models.blip import TIED_NAMES
from raycap.schema import DecodeSettings

torch.set_num_threads(1)

INFO = {"step": 12, "metrics": {"cider": 0.75, "val_loss": 1.5}, "config": {"lr": 1e-3, "prompt": "é"}, "none": None}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder with a prompt."""
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model), spec, INFO)
    return tmp_path / "checkpoint"


# ---- round trip


def test_what_was_saved_comes_back_bit_by_bit(saved: Path) -> None:
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    loaded, weights = load_checkpoint(str(saved))
    for name in ("kind", "text", "image", "decode"):
        assert getattr(loaded, name) == getattr(spec, name), name
    assert loaded.tokenizer.to_str() == spec.tokenizer.to_str()
    assert loaded.info == INFO
    assert loaded.verified
    expected = export_weights(model)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    again = load_model(loaded, weights, str(saved)).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())
    assert len(again) == len(model.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_weights_are_single_precision_copies_with_each_tied_tensor_once(dtype: torch.dtype) -> None:
    _, model, _ = tiny_checkpoint()
    weights = export_weights(model.to(dtype))
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
        with pytest.raises(CheckpointError, match=SEAL):
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


def test_a_checkpoint_sealed_with_the_two_older_settings_has_defaults_for_the_others(saved: Path) -> None:
    seal = json.loads((saved / SEAL).read_text())
    del seal["sha256"]
    seal["decode"] = {"max_new_tokens": 9, "min_new_tokens": 1}
    write_json(saved / SEAL, seal | {"sha256": sha256_of_json(seal)})
    assert load_checkpoint(str(saved))[0].decode == DecodeSettings(max_new_tokens=9, min_new_tokens=1)
    seal["decode"]["sampling"] = True  # of a later raycap
    write_json(saved / SEAL, seal | {"sha256": sha256_of_json(seal)})
    with pytest.raises(CheckpointError, match=rf"{SEAL} of .* does not read \(.*sampling.*\); install the raycap that"):
        load_checkpoint(str(saved))
    write_json(saved / SEAL, {"format_version": 1, "sha256": sha256_of_json({"format_version": 1})})
    with pytest.raises(CheckpointError, match=r"does not read \('files'\); install .*\(unknown\)"):
        load_checkpoint(str(saved))


def test_a_kind_of_a_later_raycap_is_refused(saved: Path) -> None:
    seal = json.loads((saved / SEAL).read_text())
    del seal["sha256"]
    seal["kind"] = "telepathy"
    write_json(saved / SEAL, seal | {"sha256": sha256_of_json(seal)})
    with pytest.raises(CheckpointError, match="holds a model of kind 'telepathy'; this raycap knows"):
        load_checkpoint(str(saved))


# ---- writing


def out_of_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("function", ["save_file", "save_tokenizer", "write_json", "sha256_of_file"])
def test_a_full_disk_leaves_the_older_checkpoint_and_nothing_else(
    saved: Path, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load_checkpoint(str(saved))
    monkeypatch.setattr(f"raycap.checkpoint.sealed.{function}", out_of_space)
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

    monkeypatch.setattr("raycap.checkpoint.sealed.save_tokenizer", interrupt)
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


def test_leftovers_of_any_killed_process_are_swept_and_nothing_else(saved: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    theirs = [
        "checkpoint.old-5",
        ".checkpoint.old-5.new-77",
        ".checkpoint.old-final",
        ".checkpoints.old-7",
        ".other.old-7",
    ]
    for name in (*theirs, ".checkpoint.old-7", ".checkpoint.old-123456", ".checkpoint.new-8"):
        (saved.parent / name).mkdir()
        (saved.parent / name / "model.safetensors").write_bytes(b"x")
    save_checkpoint(str(saved), weights, spec, {"step": 13})
    assert sorted(path.name for path in saved.parent.iterdir()) == sorted(["checkpoint", *theirs])
    save_checkpoint(str(saved.parent / "checkpoint.old-5"), weights, spec, {})
    assert sorted(path.name for path in saved.parent.iterdir()) == sorted(["checkpoint", *theirs[:1], *theirs[2:]])


def test_the_last_whole_checkpoint_of_a_process_killed_between_its_renames_outlives_a_failed_save(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, weights = load_checkpoint(str(saved))
    saved.rename(saved.parent / ".checkpoint.old-7")
    monkeypatch.setattr("raycap.checkpoint.sealed.save_tokenizer", out_of_space)
    with pytest.raises(StorageError, match="No space left"):
        save_checkpoint(str(saved), weights, spec, {"step": 13})
    assert load_checkpoint(str(saved.parent / ".checkpoint.old-7"))[0].info == INFO


# ---- plain transformers


@pytest.mark.parametrize("prompt", ["", "a picture of "])
def test_plain_transformers_gives_our_captions(tmp_path: Path, prompt: str) -> None:
    spec, model, _ = tiny_checkpoint(prompt=prompt)
    save_checkpoint(str(tmp_path), export_weights(model), spec, {})
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
