"""raycap/checkpoint/imports.py: original files and pretrained towers become checkpoint folders that every door opens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_families import write_family
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
)

from raycap.captioner import Captioner
from raycap.checkpoint import SEAL
from raycap.checkpoint.imports import import_weights
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, RaycapError, UserError
from raycap.models.vgg_lstm import VggLstm
from raycap.schema import DecodeSettings
from raycap.text import TextSpec, role_ids, save_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:.*pickled file:UserWarning")
SIZE, WIDTH = 32, 64


def gpt2_tokenizer() -> Tokenizer:
    """Byte-level as GPT-2's, without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny towers as transformers saves them."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("towers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": SIZE, "patch_size": 16}
    text = {**sizes, "vocab_size": 50, "max_position_embeddings": 16}
    width = {"projection_dim": 48}
    CLIPModel(CLIPConfig(vision_config=vision | width, text_config=text | width, **width)).save_pretrained(
        root / "clip"
    )
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(root / "clip")
    ViTModel(ViTConfig(**vision)).save_pretrained(root / "vit")
    ViTImageProcessorPil(size={"height": SIZE, "width": SIZE}).save_pretrained(root / "vit")
    tokenizer = gpt2_tokenizer()
    end = tokenizer.token_to_id("<|endoftext|>")
    config = GPT2Config(
        n_embd=WIDTH,
        n_layer=2,
        n_head=1,
        n_positions=80,
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=end,
        eos_token_id=end,
    )
    GPT2LMHeadModel(config).save_pretrained(root / "gpt2")
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    spec = TextSpec(prompt="", bos_id=bos_id, eos_id=eos_id, pad_id=pad_id, max_tokens=40, clean=False)
    save_tokenizer(tokenizer, spec, str(root / "gpt2"))
    return {name: root / name for name in ("clip", "vit", "gpt2")}


TOWERS = {"vision_tower": "{clip}", "text_decoder": "{gpt2}"}


def captions_of(folder: Path) -> list[str | None]:
    captioner = Captioner.load(folder)
    assert captioner.verified
    size = captioner.spec.image.size
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, size, size), np.uint8)
    return [result.caption for result in captioner.caption_prepared(pixels, DecodeSettings(max_new_tokens=5))]


@pytest.mark.parametrize(
    ("architecture", "tower", "kind"),
    [
        ("clip_gpt2_mlp", "clip", "clip_gpt2"),
        ("clip_gpt2_transformer", "clip", "clip_gpt2"),
        ("clip_gpt2_mlp", "vit", "clip_gpt2"),
        ("vit_gpt2", "vit", "vision-encoder-decoder"),
    ],
)
def test_towers_are_put_together_with_their_own_weights(
    architecture: Any, tower: str, kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    said: list[str] = []
    config = ImportConfig(
        vision_tower=str(folders[tower]),
        text_decoder=str(folders["gpt2"]),
        architecture=architecture,
        out=str(tmp_path / "out"),
    )
    import_weights(config, said.append)
    assert "drawn anew" in said[0]
    captioner = Captioner.load(tmp_path / "out")
    assert captioner.spec.kind == kind
    assert (captioner.spec.image.fit, captioner.spec.image.size) == ("crop" if tower == "clip" else "squash", SIZE)
    gpt2 = GPT2LMHeadModel.from_pretrained(folders["gpt2"]).state_dict()
    ours = captioner.model.state_dict()
    prefix = "decoder." if kind == "vision-encoder-decoder" else "gpt."
    assert all(torch.equal(ours[prefix + name], tensor) for name, tensor in gpt2.items())
    assert len(captions_of(tmp_path / "out")) == 3


@pytest.mark.parametrize("mapper", ["mlp", "transformer"])
def test_clipcaps_own_file_becomes_a_checkpoint(mapper: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    config = ImportConfig(
        vision_tower=str(folders["clip"]),
        text_decoder=str(folders["gpt2"]),
        architecture=f"clip_gpt2_{mapper}",  # type: ignore[arg-type]  # one of the literals
        out=str(source),
    )
    import_weights(config, lambda _: None)
    state = Captioner.load(source).model.state_dict()
    original = {n: t for n, t in state.items() if n.startswith(("clip_project.", "gpt."))}
    original["gpt.transformer.h.0.attn.bias"] = torch.ones(1, 1, 80, 80)  # a buffer of transformers 4
    torch.save(original, tmp_path / "coco_weights.pt")
    imported = ImportConfig(
        weights=str(tmp_path / "coco_weights.pt"),
        vision_tower=str(folders["clip"]),
        tokenizer=str(folders["gpt2"]),
        out=str(tmp_path / "out"),
    )
    import_weights(imported, lambda _: None)
    assert captions_of(tmp_path / "out") == captions_of(source)
    with pytest.raises(UserError, match="is not empty"):
        import_weights(imported, lambda _: None)


def test_torchvisions_vgg16_gives_its_features_to_a_fresh_lstm(folders: dict[str, Path], tmp_path: Path) -> None:
    with torch.device("meta"):
        names = VggLstm({"vocab_size": 10, "attention": False}).state_dict()
    state = {n: torch.full(t.shape, 0.01) for n, t in names.items() if n.startswith(("features.", "classifier."))}
    state |= {"classifier.6.weight": torch.zeros(1000, 4096), "classifier.6.bias": torch.zeros(1000)}
    torch.save(state, tmp_path / "vgg16.pth")
    config = ImportConfig(
        weights=str(tmp_path / "vgg16.pth"), tokenizer=str(folders["gpt2"]), image_size=SIZE, out=str(tmp_path / "out")
    )
    import_weights(config, lambda _: None)
    features = {
        n: t for n, t in Captioner.load(tmp_path / "out").model.state_dict().items() if n.startswith("features.")
    }
    assert len(features) == 26
    assert all(bool((t == 0.01).all()) for t in features.values())


def test_settings_stand_in_the_place_of_the_architectures(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"mapper": "linear_tanh", "prefix_length": 3, "freeze_text": 1, "normalize_prefix": True}
    given = {name: value.format(**folders) for name, value in TOWERS.items()}
    config = ImportConfig(**given, settings=json.dumps(settings), out=str(tmp_path / "out"))
    import_weights(config, lambda _: None)
    captioner = Captioner.load(tmp_path / "out")
    assert captioner.spec.model_config.items() >= settings.items()
    frozen = {name for name, parameter in captioner.model.named_parameters() if not parameter.requires_grad}
    assert any(name.startswith("vision_tower.") for name in frozen)  # as the preset has it
    assert {name.split(".")[3] for name in frozen if name.startswith("gpt.")} == {"0"}


@pytest.mark.parametrize("family", ["blip", "vit_gpt2"])
def test_a_folder_from_before_safetensors_says_the_same_after_its_import(family: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "old", family)
    expected = captions_of(folder)
    (folder / SEAL).unlink()
    weights = load_file(folder / "model.safetensors")
    if family == "vit_gpt2":  # what GPT-2's files held besides
        weights["decoder.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
        weights["decoder.transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        weights["decoder.lm_head.weight"] = weights["decoder.transformer.wte.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"convert it: jobs/import_weights.py --weights"):
        Captioner.load(folder)
    given: Any = {"weights": str(folder / "pytorch_model.bin"), "out": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"--image-size 64 is not for the weights of a folder with a config.json"):
        import_weights(ImportConfig(**given, image_size=64), lambda _: None)
    import_weights(ImportConfig(**given), lambda _: None)
    assert captions_of(tmp_path / "out") == expected


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.bin", "weights.safetensors"])
def test_a_payload_never_runs_whatever_the_file_is_called(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"model": Payload(tmp_path / "ran")}, tmp_path / name)
    config = ImportConfig(weights=str(tmp_path / name), tokenizer=str(folders["gpt2"]), out=str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=name):
        import_weights(config, lambda _: None)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({}, "nothing to import"),
        ({"weights": "/nowhere.pth"}, "'/nowhere.pth' is no file"),
        ({"vision_tower": "{clip}", "text_decoder": "{clip}"}, "is a model of type 'clip'; give a GPT-2"),
        (
            {"vision_tower": "{gpt2}", "text_decoder": "{gpt2}"},
            "is a model of type 'gpt2'; give one with a vision tower",
        ),
        ({"vision_tower": "{clip}", "text_decoder": "{gpt2}", "architecture": "vit_gpt2"}, "reads a ViT"),
        (TOWERS | {"settings": "mapper=mlp"}, "--settings 'mapper=mlp' is no JSON"),
        (TOWERS | {"settings": "[1]"}, "is no JSON object; give one"),
        (TOWERS | {"settings": '{{"n_layer": 3}}'}, "names 'n_layer'; these weights take freeze_vision, freeze_text"),
        (TOWERS | {"settings": '{{"mapper": "mean"}}'}, "cannot be used: mapper is 'mean'; give one of linear_tanh"),
        (
            TOWERS | {"settings": '{{"freeze_text": 3}}'},
            "cannot be used: freeze_text is 3; give none, all, or how many .* up to 2",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    flags: dict[str, str], sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    given: Any = {name: value.format(**folders) for name, value in flags.items()}
    with pytest.raises(RaycapError, match=sentence):
        import_weights(ImportConfig(**given, out=str(tmp_path / "out")), lambda _: None)
    assert not (tmp_path / "out").exists()
