"""Every family through the same rooms: a fresh model, its checkpoint folder, the doors' Captioner, and the folder without its seal."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import assert_same_results

from raycap.captioner import Captioner
from raycap.checkpoint import (
    CheckpointSpec,
    export_weights,
    load_checkpoint,
    load_model,
    open_checkpoint,
    save_checkpoint,
)
from raycap.config import TrainConfig
from raycap.decoding.protocol import CaptionModel
from raycap.errors import CheckpointError
from raycap.image import normalize
from raycap.models.gpt2 import Projection
from raycap.models.inference import fold_normalization
from raycap.models.presets import PRESETS
from raycap.schema import DecodeSettings
from raycap.text import TextSpec, role_ids, save_tokenizer, train_wordpiece
from raycap.training.start import build_start

TINY = [name for name in PRESETS if name.endswith("_tiny")]
WORDS = ["a dog runs on the beach", "two cats sleep", "a red bus in a street", "the sea under clouds"]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = train_wordpiece(WORDS)
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    save_tokenizer(
        tokenizer, TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=32), str(folder)
    )
    return folder


def start_of(architecture: str, tokenizer: Path) -> tuple[CheckpointSpec, CaptionModel]:
    """A fresh model whose weights are ten times as large, so that it says different things of different images."""
    config = TrainConfig(
        architecture=architecture,  # type: ignore[arg-type]  # one of the literals
        train_shards="/t",
        val_shards="/v",
        tokenizer=str(tokenizer),
        prompt="a picture of",
        label_smoothing=0.1,
    )
    spec, model = build_start(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2)
    return spec, model.eval()


def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), np.uint8)


@pytest.mark.parametrize("architecture", TINY)
def test_a_saved_model_says_what_it_said_with_and_without_its_seal(
    architecture: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    spec, model = start_of(architecture, tokenizer_folder)
    settings = DecodeSettings(max_new_tokens=8, num_beams=2, num_candidates=2)
    expected = Captioner(model, spec).caption_prepared(images(), settings)
    root = tmp_path / "checkpoint"
    save_checkpoint(str(root), export_weights(model), spec, {"step": 1})
    loaded = Captioner.load(root)
    assert loaded.verified
    assert not any(type(module) is torch.nn.Linear for module in loaded.model.modules())  # see models/inference.py
    assert all(m.weight.T.is_contiguous() for m in loaded.model.modules() if isinstance(m, Projection))
    assert_same_results(loaded.caption_prepared(images(), settings), expected)
    again, weights = load_checkpoint(str(root))
    assert again.model_config["model_type"] == spec.kind
    assert (again.image, again.text) == (spec.image, spec.text)
    load_model(again, weights, "it")
    assert '"label_smoothing": 0.1' in (root / "config.json").read_text()
    (root / "raycap.json").unlink()
    if spec.kind == "vgg_lstm":  # a folder of ours alone: nothing else says what its tokens mean
        with pytest.raises(CheckpointError, match=r"is a vgg_lstm folder without raycap.json"):
            open_checkpoint(str(root))
        return
    bare, weights = open_checkpoint(str(root), prompt="a picture of")
    assert not bare.verified
    assert bare.image == replace(spec.image)
    captioner = Captioner(load_model(bare, weights, str(root)).eval(), bare)
    assert captioner.caption_prepared(images(), settings) == expected


@pytest.mark.parametrize("architecture", TINY)
def test_a_model_that_takes_bytes_sees_what_it_saw_normalised(architecture: str, tokenizer_folder: Path) -> None:
    spec, model = start_of(architecture, tokenizer_folder)
    model = model.double()
    prompt, pixels = torch.tensor([spec.text.bos_id]), torch.tensor(images())
    ids = torch.full((len(pixels),), spec.text.bos_id)

    def logits_of(pixel_values: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.step(model.start(model.encode_image(pixel_values), prompt), ids)

    expected = logits_of(normalize(pixels, spec.image).double())
    folded = fold_normalization(model, spec.image)
    assert folded is (spec.kind != "vgg_lstm")  # its first layer pads
    seen = logits_of(pixels.double() if folded else normalize(pixels, spec.image).double())
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)  # normalize() rounds to float32
    assert not folded or not torch.allclose(logits_of(normalize(pixels, spec.image).double()), expected)


@pytest.mark.parametrize("architecture", TINY)
def test_what_no_file_holds_is_as_in_a_fresh_model(architecture: str, tokenizer_folder: Path) -> None:
    spec, model = start_of(architecture, tokenizer_folder)
    weights = export_weights(model)
    loaded = load_model(spec, weights, "it")
    buffers = dict(loaded.named_buffers())
    assert buffers.keys() == dict(model.named_buffers()).keys()
    assert all(torch.equal(buffers[name], buffer) for name, buffer in model.named_buffers())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name, parameter in loaded.named_parameters() if parameter.requires_grad} == trained
    assert {p.data_ptr() for p in loaded.parameters()} == {tensor.data_ptr() for tensor in weights.values()}


@pytest.mark.parametrize("architecture", TINY)
def test_a_checkpoint_of_one_kind_names_itself_in_config_json(
    architecture: str, tokenizer_folder: Path, tmp_path: Path
) -> None:
    spec, model = start_of(architecture, tokenizer_folder)
    save_checkpoint(str(tmp_path / "c"), export_weights(model), spec, {})
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    assert config["model_type"] == PRESETS[architecture]["model_type"]
    assert ("auto_map" in config) == (architecture == "clip_gpt2_tiny")
    assert (tmp_path / "c" / "modeling_clip_gpt2.py").exists() == (architecture == "clip_gpt2_tiny")


def test_code_of_others_in_a_clip_gpt2_folder_is_refused(tokenizer_folder: Path, tmp_path: Path) -> None:
    spec, model = start_of("clip_gpt2_tiny", tokenizer_folder)
    root = tmp_path / "c"
    save_checkpoint(str(root), export_weights(model), spec, {})
    (root / "raycap.json").unlink()
    config = json.loads((root / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "other.Config"
    (root / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names code of its own"):
        open_checkpoint(str(root))
