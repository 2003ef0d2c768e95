"""raycap/checkpoint: what was saved comes back bit by bit, damage is named, and plain transformers reads the folder."""

import errno
import json
import os
import resource
import shutil
import struct
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import captions_by_transformers, edit_json, png_images, tiny_checkpoint
from torch import nn
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
    open_checkpoint,
    open_spec,
    save_checkpoint,
)
from raycap.checkpoint.folder import sha256_of_json, write_json
from raycap.checkpoint.weights import MAX_HEADER_BYTES, _parameters_without_memory, read_weights
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


# ---- the memory of a loaded model


@pytest.mark.parametrize("sealed", [True, False])
def test_a_loaded_model_outlives_its_folder(saved: Path, sealed: bool) -> None:
    _, expected, _ = tiny_checkpoint(prompt="a picture of ")
    spec, weights = load_checkpoint(str(saved))
    if not sealed:
        weights = read_weights([saved / "model.safetensors"], str(saved))
    model = load_model(spec, weights, str(saved))
    with (saved / "model.safetensors").open("r+b") as file:  # in place: whoever mapped the file sees it
        file.write(b"\xff" * (saved / "model.safetensors").stat().st_size)
        file.truncate(0)  # and dies of reading behind its end
    shutil.rmtree(saved)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


def test_writing_to_a_parameter_leaves_the_file_as_it_was(saved: Path) -> None:
    before = (saved / "model.safetensors").read_bytes()
    model = load_model(*load_checkpoint(str(saved)), str(saved))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert (saved / "model.safetensors").read_bytes() == before
    load_checkpoint(str(saved))


def test_parameters_can_be_trained_and_are_no_second_copy_of_the_weights(saved: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    model = load_model(spec, weights, str(saved))
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        assert parameter.requires_grad, name
        assert parameter.is_leaf, name
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, name
    assert {p.data_ptr() for p in parameters.values()} == {tensor.data_ptr() for tensor in weights.values()}
    for second_name, name in TIED_NAMES.items():
        assert model.get_parameter(second_name) is model.get_parameter(name)


def test_weights_that_share_memory_become_parameters_that_do_not(saved: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    names = [f"vision_model.encoder.layers.{n}.self_attn.projection.weight" for n in range(2)]
    both = torch.stack([weights[name] for name in names])
    for same in ({names[0]: both[0], names[1]: both[1]}, {name: weights[names[0]].T.contiguous().T for name in names}):
        model = load_model(spec, {**weights, **same}, "x")
        first, second = (model.get_parameter(name) for name in names)
        assert all(torch.equal(model.get_parameter(name), tensor) for name, tensor in same.items())
        assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
        assert first.is_contiguous()
        assert first.untyped_storage().nbytes() == first.nbytes
    model = load_model(spec, {**weights, names[1]: weights[names[0]]}, "x")
    with torch.no_grad():
        model.get_parameter(names[0]).zero_()
    assert model.get_parameter(names[1]).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_file_of_another_precision_gives_a_model_in_float32(saved: Path, dtype: torch.dtype) -> None:
    spec, weights = load_checkpoint(str(saved))
    other = {name: tensor.to(dtype) for name, tensor in weights.items()}
    save_checkpoint(str(saved), other, spec, INFO)
    spec, read = load_checkpoint(str(saved))
    assert {tensor.dtype for tensor in read.values()} == {dtype}
    model = load_model(spec, read, str(saved))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(model.state_dict()[name], tensor.float()) for name, tensor in other.items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_value_that_float32_cannot_hold_is_refused(saved: Path) -> None:
    spec, weights = load_checkpoint(str(saved))
    name = "vision_model.post_layernorm.weight"
    wide = {**weights, name: torch.full(weights[name].shape, 1e300, dtype=torch.float64)}
    with pytest.raises(CheckpointError, match=f"'{name}' holds values that are infinite or NaN"):
        load_model(spec, wide, "x")


def test_a_model_that_another_thread_builds_meanwhile_keeps_its_parameters() -> None:
    built: list[nn.Linear] = []
    with _parameters_without_memory():
        thread = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        thread.start()
        thread.join()
        assert nn.Linear(2, 2).weight.is_meta
    assert not built[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


# ---- damage


def padded(path: Path, num_header_bytes: int) -> None:
    """The same safetensors file with spaces behind its header, which the format allows."""
    whole = path.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = whole[8 : 8 + length].ljust(num_header_bytes)
    path.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])


def test_a_header_of_100_mb_is_refused_at_once_and_never_held(saved: Path) -> None:
    path = saved / "model.safetensors"
    expected = read_weights([path], "x")
    padded(path, MAX_HEADER_BYTES)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_weights([path], "x").items())
    padded(path, 99_999_992)  # the library itself takes 100 MB
    peak_kb, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    sentence = (
        r"^'model.safetensors' of 'x' cannot be read \(its header of 99999992 bytes is longer than 8388608\); copy the"
    )
    with pytest.raises(CheckpointError, match=sentence):
        read_weights([path], "x")
    assert time.perf_counter() - begun < 0.5
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_kb < 10_000
    with pytest.raises(CheckpointError, match=r"is damaged: 'model.safetensors'"):
        load_checkpoint(str(saved))


def test_tensors_of_every_shape_and_type_come_back(tmp_path: Path) -> None:
    """Half a value between others, a number without dimensions and an empty tensor: no file aligns what follows them."""
    tensors = {
        "a": torch.arange(3, dtype=torch.uint8),
        "b": torch.tensor(2.5),
        "c": torch.zeros(0, 4),
        "d": torch.randn(5, 3).bfloat16(),
        "e": torch.tensor([True, False, True]),
        "f": torch.arange(6).view(2, 3),
        "g": torch.randn(3).to(torch.float8_e4m3fn),
        "h": torch.randn(2, dtype=torch.float64),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    read = read_weights([tmp_path / "a.safetensors"], "x")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].float(), tensor.float())
    save_file({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "b.safetensors")
    with pytest.raises(
        CheckpointError, match=r"'b.safetensors' of 'x' cannot be read \('a' holds values of type 'C64'\);"
    ):
        read_weights([tmp_path / "b.safetensors"], "x")


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


@pytest.mark.parametrize("function", ["write_weights", "save_tokenizer", "write_json", "sha256_of_file"])
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


@pytest.mark.parametrize("sealed", [True, False])
def test_a_spec_alone_is_verified_like_the_whole_and_holds_no_weights(sealed: bool, tmp_path: Path) -> None:
    spec, model, _ = tiny_checkpoint()
    root = tmp_path / "checkpoint"
    save_checkpoint(str(root), export_weights(model), spec, {"step": 1})
    if not sealed:
        (root / SEAL).unlink()
    alone, (whole, _) = open_spec(str(root), prompt="a"), open_checkpoint(str(root), prompt="a")
    assert alone.fingerprint == whole.fingerprint
    assert (alone.verified, alone.model_config, alone.text) == (whole.verified, whole.model_config, whole.text)
    assert alone.verified == sealed
    if sealed:
        assert all(tensor.is_meta for tensor in load_checkpoint(str(root), keep=False)[1].values())
    content = bytearray((root / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (root / "model.safetensors").write_bytes(content)
    if sealed:
        with pytest.raises(CheckpointError, match=r"'model\.safetensors' is not the file"):
            open_spec(str(root))
    else:
        assert open_spec(str(root)).fingerprint != whole.fingerprint
