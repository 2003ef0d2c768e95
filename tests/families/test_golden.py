"""Checkpoints that old versions of transformers wrote say here what they said there. golden/ is of make_golden.py, which says how."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from make_golden import BEAMS, FOLDER, MEAN, MODELS, NEW_TOKENS, SIDE, STD, TIED, VOCABULARY, images, tensor_of
from safetensors.torch import save_file
from tiny import write_bert_tokenizer

from raycap.captioner import Captioner
from raycap.checkpoint.imports import import_weights
from raycap.config import ImportConfig
from raycap.schema import DecodeSettings
from raycap.text import decode

pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified", "ignore:.* is a pickled file")
GOLDEN = sorted(FOLDER.glob("transformers-*.json"))
CASES = [(path, name) for path in GOLDEN for name in json.loads(path.read_text())]


def write_folder(folder: Path, golden: dict[str, Any], is_tied: bool) -> None:
    """The folder as that version wrote it, with a tokenizer and how images are prepared, which are no model's to write."""
    write_bert_tokenizer(folder, VOCABULARY)
    (folder / "config.json").write_text(json.dumps(golden["config"]))
    square = {"height": SIDE, "width": SIDE}
    image = {"image_mean": [MEAN] * 3, "image_std": [STD] * 3, "size": square, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    weights = {
        name: torch.from_numpy(tensor_of(name, shape, "float32" if dtype == "float32" else dtype, is_tied))
        for name, (dtype, *shape) in golden["tensors"].items()
    }
    if golden["file"] == "model.safetensors":
        save_file(weights, folder / golden["file"], metadata={"format": "pt"})
    else:
        torch.save(weights, folder / golden["file"])


@pytest.mark.parametrize(("path", "name"), CASES, ids=[f"{path.stem}-{name}" for path, name in CASES])
def test_a_checkpoint_of_an_old_version_says_what_it_said_there(path: Path, name: str, tmp_path: Path) -> None:
    golden = json.loads(path.read_text())[name]
    folder = tmp_path / "theirs"
    write_folder(folder, golden, is_tied=not name.endswith("untied"))
    if golden["file"] == "pytorch_model.bin":
        import_weights(ImportConfig(weights=str(folder), out=str(tmp_path / "ours")), print)
        folder = tmp_path / "ours"
    captioner = Captioner.load(str(folder))
    for key, num_beams in (("greedy", 1), ("beams", BEAMS)):
        if golden[key] is not None:
            settings = DecodeSettings(max_new_tokens=NEW_TOKENS, num_beams=num_beams)
            ours = [result.caption for result in captioner.caption(images(), settings)]
            assert ours == [decode(captioner.spec.tokenizer, row) for row in golden[key]]


def test_the_untied_say_something_else_than_the_tied_and_all_versions_are_here() -> None:
    assert len(GOLDEN) == 5
    for path in GOLDEN:
        golden = json.loads(path.read_text())
        assert set(golden) >= set(MODELS[2:])
        for tied in set(golden) & {"blip", "vit_gpt2"}:
            assert golden[tied]["greedy"] != golden[f"{tied}_untied"]["greedy"]
    # The case that went wrong: two tensors, and a config.json that says nothing of it.
    untied = json.loads((FOLDER / "transformers-4.51.3.json").read_text())["blip_untied"]
    assert "tie_word_embeddings" not in untied["config"]
    assert set(next(iter(TIED.items()))) <= set(untied["tensors"])
