"""Output layers that are not the word embeddings: captioned, trained, saved and opened elsewhere as they are, and never one for the other."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_imports_of_weights import folders
from tiny import edit_json, png_images
from tiny_families import tiny_family, write_family
from torch import nn
from transformers import AutoModelForImageTextToText, BlipForConditionalGeneration, VisionEncoderDecoderModel

from raycap.captioner import Captioner
from raycap.checkpoint import SEAL, export_weights, load_model, open_checkpoint, save_checkpoint
from raycap.checkpoint.imports import import_weights
from raycap.config import ImportConfig
from raycap.errors import CheckpointError
from raycap.image import decode_image, prepare_image
from raycap.models import TIED_NAMES
from raycap.schema import DecodeSettings

__all__ = ["folders"]  # the fixture
pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified")
SETTINGS = DecodeSettings(max_new_tokens=12)
PARTS = {"blip": ("", "text_config"), "clip_gpt2": ("", "text_config"), "vit_gpt2": ("decoder",)}
PLAIN = {
    "blip": BlipForConditionalGeneration,
    "clip_gpt2": AutoModelForImageTextToText,
    "vit_gpt2": VisionEncoderDecoderModel,
}


def names_of(folder: Path) -> tuple[str, str]:
    """(output layer, word embeddings) in the weights of this family."""
    kind = open_checkpoint(str(folder))[0].kind
    return next((second, first) for second, first in TIED_NAMES[kind].items() if second.endswith("weight"))


def untie(folder: Path) -> None:
    """Gives the output layer values of its own, which no config.json says."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    head, words = names_of(folder)
    noise = torch.randn(weights[words].shape, generator=torch.Generator().manual_seed(3))
    save_file({**weights, head: weights[words] + 0.3 * noise}, path, metadata={"format": "pt"})


def by_transformers(folder: Path, family: str) -> list[str]:
    """Greedy captions of plain transformers from our pixels."""
    spec, _ = open_checkpoint(str(folder))
    model = (
        PLAIN[family].from_pretrained(folder, **({"trust_remote_code": True} if family == "clip_gpt2" else {})).eval()
    )
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.image.mean, spec.image.std))
    pixels = [torch.tensor(prepare_image(decode_image(data), spec.image)) for data in png_images(6)]
    pixel_values = torch.stack([(image / 255 - mean) / std for image in pixels])
    # BLIP takes these from its own config.
    roles = {} if family == "blip" else {"eos_token_id": spec.text.eos_id, "pad_token_id": spec.text.pad_id}
    ids = model.generate(pixel_values=pixel_values, max_new_tokens=12, num_beams=1, do_sample=False, **roles)
    texts = [spec.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in ids]
    return [" ".join(text.split()) for text in texts]


def by_raycap(folder: Path) -> list[str | None]:
    return [r.caption for r in Captioner.load(str(folder)).caption(png_images(6), SETTINGS)]


@pytest.mark.parametrize("family", list(PARTS))
def test_an_output_layer_of_its_own_says_what_it_says_in_transformers(tmp_path: Path, family: str) -> None:
    folder = write_family(tmp_path / "published", family, sealed=False)
    tied = by_raycap(folder)
    untie(folder)
    assert by_raycap(folder) == by_transformers(folder, family)
    assert by_raycap(folder) != tied, "the noise changes the captions, or this test shows nothing"


@pytest.mark.parametrize("family", list(PARTS))
def test_what_is_trained_and_saved_keeps_both_tensors_and_says_so(tmp_path: Path, family: str) -> None:
    published = write_family(tmp_path / "published", family, sealed=False)
    head, words = names_of(published)
    untie(published)
    spec, given = open_checkpoint(str(published))
    weights = {name: tensor.clone() for name, tensor in given.items()}
    model = load_model(spec, given, "x")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = torch.tensor([[spec.text.bos_id, 5, 6, spec.text.eos_id]])
    total, count = model(torch.zeros(1, 3, 32, 32), ids, ids)
    (total / count).backward()
    optimizer.step()
    saved = tmp_path / "saved"
    save_checkpoint(str(saved), export_weights(model), spec, {"step": 1})
    on_disk = load_file(saved / "model.safetensors")
    assert not torch.equal(on_disk[head], on_disk[words])
    assert not torch.equal(on_disk[head], weights[head]), "trained"
    assert not torch.equal(on_disk[words], weights[words]), "trained"
    assert by_raycap(saved) == by_transformers(saved, family)
    again = load_model(*open_checkpoint(str(saved)), "x").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in model.state_dict().items())


def test_two_equal_tensors_stay_one_where_the_configuration_ties_them_and_two_where_it_does_not(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    head, words = names_of(folder)
    spec, weights = open_checkpoint(str(folder))
    assert head not in weights
    assert isinstance(words, str)
    model = load_model(spec, weights, "x")
    assert model.get_parameter(head) is model.get_parameter(words)
    edit_json(folder / "config.json", lambda config: config.update(tie_word_embeddings=False))
    edit_json(folder / "config.json", lambda config: config["text_config"].update(tie_word_embeddings=False))
    model = load_model(*open_checkpoint(str(folder)), "x")
    assert model.get_parameter(head) is not model.get_parameter(words)


def test_the_bias_that_transformers_adds_is_the_one_that_counts(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "published", "blip", sealed=False)
    path = folder / "model.safetensors"
    weights = load_file(path)
    unread, added = "text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"
    save_file({**weights, unread: torch.full_like(weights[unread], 9.0)}, path, metadata={"format": "pt"})
    _, given = open_checkpoint(str(folder))
    assert torch.equal(given[unread], weights[added])
    assert by_raycap(folder) == by_transformers(folder, "blip")


def test_weights_in_memory_that_a_configuration_makes_one_must_be_one() -> None:
    spec, model = tiny_family("blip")
    weights = export_weights(model)
    head, words = next(iter(TIED_NAMES["blip"].items()))
    with pytest.raises(CheckpointError, match=rf"'{words}' and '{head}' .* differ"):
        load_model(spec, {**weights, head: weights[words] + 1}, "x")


def test_every_blip_folder_holds_both_names_of_what_is_tied(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "saved", "blip")
    assert (folder / SEAL).exists()
    on_disk = load_file(folder / "model.safetensors")
    for second, first in TIED_NAMES["blip"].items():
        assert torch.equal(on_disk[second], on_disk[first])


def test_a_text_decoder_keeps_an_output_layer_of_its_own(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from raycap.checkpoint.towers import read_gpt2

    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=40, n_positions=32)
    model = GPT2LMHeadModel(config)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() + 1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", lambda content: content.update(tie_word_embeddings=True))
    given, weights = read_gpt2(str(tmp_path))
    assert given["tie_word_embeddings"] is False
    assert not torch.equal(weights["lm_head.weight"], weights["transformer.wte.weight"])


@pytest.mark.parametrize(("architecture", "tower"), [("clip_gpt2_mlp", "clip"), ("vit_gpt2", "vit")])
def test_towers_put_together_keep_a_decoders_output_layer(
    folders: dict[str, Path], tmp_path: Path, architecture: str, tower: str
) -> None:
    text = tmp_path / "gpt2"
    shutil.copytree(folders["gpt2"], text)
    weights = load_file(text / "model.safetensors")
    words = weights["transformer.wte.weight"]
    save_file({**weights, "lm_head.weight": words + 1}, text / "model.safetensors", metadata={"format": "pt"})
    edit_json(text / "config.json", lambda content: content.update(tie_word_embeddings=False))
    given: Any = {"vision_tower": str(folders[tower]), "text_decoder": str(text), "architecture": architecture}
    import_weights(ImportConfig(**given, out=str(tmp_path / "out")), print)
    spec, made = open_checkpoint(str(tmp_path / "out"))
    head, first = names_of(tmp_path / "out")
    assert torch.equal(made[head], words + 1)
    assert torch.equal(made[first], words)
    assert load_model(spec, made, "x").get_parameter(head) is not None
