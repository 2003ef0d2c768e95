"""jobs/import_weights.py on what published folders really are: other geometries, old weights, wrong companions, full folders."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_imports_of_weights import SIZE, TOWERS, captions_of, folders
from test_originals import VOCAB_SIZE, captioner_state
from tiny import write_bert_tokenizer
from torch import Tensor
from transformers import (
    BitImageProcessorPil,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    GPT2LMHeadModel,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTModel,
)

from raycap.captioner import Captioner
from raycap.checkpoint.imports import import_weights
from raycap.checkpoint.towers import read_vision_tower
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, RaycapError, UserError
from raycap.text import load_tokenizer

__all__ = ["folders"]  # the fixture
LAYERS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def towers(folders: dict[str, Path], **others: str) -> dict[str, Any]:
    return {name: value.format(**folders) for name, value in TOWERS.items()} | others


def test_a_folder_that_holds_anything_is_never_replaced(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=r"is not empty \(it holds 'thesis.tex'\); give a folder that does not exist"):
        import_weights(ImportConfig(**towers(folders), out=str(tmp_path / "out")), print)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]
    shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    with pytest.raises(UserError, match="is not empty"):
        import_weights(
            ImportConfig(**towers(folders, text_decoder=str(tmp_path / "gpt2")), out=str(tmp_path / "gpt2")), print
        )
    assert (tmp_path / "gpt2" / "model.safetensors").exists()


def tower_of(source: Path, image_size: int = 0) -> tuple[dict[str, Any], dict[str, Tensor], int, int]:
    config, image, weights = read_vision_tower(str(source), image_size)
    return config, weights, image.size, image.shorter_side


@pytest.mark.parametrize("kind", ["clip", "vit"])
def test_a_tower_for_other_images_computes_what_transformers_does_with_interpolated_positions(
    kind: str, folders: dict[str, Path]
) -> None:
    classes: dict[str, Any] = {"clip": CLIPVisionModelWithProjection, "vit": ViTModel}
    published = classes[kind].from_pretrained(folders[kind]).eval()
    config, weights, size, _ = tower_of(folders[kind], 64)
    assert (config["image_size"], size) == (64, 64)
    ours = classes[kind](type(published.config).from_dict(config)).eval()
    ours.load_state_dict(weights, strict=False)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = published(pixels, interpolate_pos_encoding=True).last_hidden_state
        torch.testing.assert_close(ours(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)


def test_dinov2_comes_in_with_the_geometry_it_was_published_with(folders: dict[str, Path], tmp_path: Path) -> None:
    """facebook/dinov2-base resizes to 256, cuts out 224 and has positions for 518; here 48, 42 and 70."""
    torch.manual_seed(0)
    folder = tmp_path / "dinov2"
    published = Dinov2Model(Dinov2Config(**LAYERS, image_size=70, patch_size=14)).eval()
    published.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 42, "width": 42}).save_pretrained(folder)
    config, weights, size, shorter_side = tower_of(folder)
    assert (config["image_size"], size, shorter_side) == (42, 42, 48)
    ours = Dinov2Model(Dinov2Config.from_dict(config)).eval()
    ours.load_state_dict(weights)
    pixels = torch.randn(2, 3, 42, 42)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(pixels).last_hidden_state, published(pixels).last_hidden_state, rtol=0, atol=1e-5
        )
    given = towers(folders, vision_tower=str(folder))
    import_weights(ImportConfig(**given, out=str(tmp_path / "out")), lambda _: None)
    assert len(captions_of(tmp_path / "out")) == 3
    assert (
        "until their shorter side has 48 pixels, of which the middle 42 x 42"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_siglip_without_a_class_token_is_interpolated_too(tmp_path: Path) -> None:
    folder = tmp_path / "siglip"
    SiglipVisionModel(SiglipVisionConfig(**LAYERS, intermediate_size=64, image_size=32, patch_size=16)).save_pretrained(
        folder
    )
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    config, weights, size, _ = tower_of(folder, 64)
    (positions,) = (tensor for name, tensor in weights.items() if name.endswith("position_embedding.weight"))
    assert (config["image_size"], size, tuple(positions.shape)) == (64, 64, (16, 48))


def test_towers_from_before_safetensors_give_the_same_captioner(folders: dict[str, Path], tmp_path: Path) -> None:
    import_weights(ImportConfig(**towers(folders), out=str(tmp_path / "new")), lambda _: None)
    old = {}
    for flag, name in (("vision_tower", "clip"), ("text_decoder", "gpt2")):
        old[flag] = str(shutil.copytree(folders[name], tmp_path / name))
        torch.save(load_file(Path(old[flag]) / "model.safetensors"), Path(old[flag]) / "pytorch_model.bin")
        (Path(old[flag]) / "model.safetensors").unlink()
    with pytest.warns(UserWarning, match="is a pickled file"):
        import_weights(ImportConfig(**old, out=str(tmp_path / "out")), lambda _: None)
    assert captions_of(tmp_path / "out") == captions_of(tmp_path / "new")


def test_a_pickle_beside_safetensors_in_several_files_is_not_opened(folders: dict[str, Path], tmp_path: Path) -> None:
    import_weights(ImportConfig(**towers(folders), out=str(tmp_path / "whole")), lambda _: None)
    sharded = tmp_path / "sharded"
    shutil.copytree(folders["gpt2"], sharded, ignore=shutil.ignore_patterns("*.safetensors"))
    GPT2LMHeadModel.from_pretrained(folders["gpt2"]).save_pretrained(sharded, max_shard_size="100KB")
    assert (sharded / "model.safetensors.index.json").exists()
    (sharded / "pytorch_model.bin").write_bytes(b"no weights")
    given = towers(folders, text_decoder=str(sharded))
    import_weights(ImportConfig(**given, out=str(tmp_path / "out")), lambda _: None)
    assert captions_of(tmp_path / "out") == captions_of(tmp_path / "whole")


def clipcap_file(folders: dict[str, Path], tmp_path: Path) -> Path:
    import_weights(ImportConfig(**towers(folders), out=str(tmp_path / "source")), lambda _: None)
    state = Captioner.load(tmp_path / "source").model.state_dict()
    path = tmp_path / "coco_weights.pt"
    torch.save({n: t for n, t in state.items() if n.startswith(("clip_project.", "gpt."))}, path)
    return path


def test_clipcaps_captions_end_with_a_full_stop_everywhere(folders: dict[str, Path], tmp_path: Path) -> None:
    path = clipcap_file(folders, tmp_path)
    said: list[str] = []
    given: dict[str, Any] = {"weights": str(path), "vision_tower": str(folders["clip"])}
    config = ImportConfig(**given, tokenizer=str(folders["gpt2"]), out=str(tmp_path / "out"))
    import_weights(config, said.append)
    assert "captions end with '.', as ClipCap's do" in said
    tokenizer = load_tokenizer(str(folders["gpt2"]))
    period, end = tokenizer.token_to_id("."), tokenizer.token_to_id("<|endoftext|>")
    captioner = Captioner.load(tmp_path / "out")
    assert (captioner.spec.text.eos_id, captioner.spec.text.pad_id) == (period, end)
    model_config = json.loads((tmp_path / "out" / "config.json").read_text())
    roles = [model_config["text_config"][f"{role}_token_id"] for role in ("bos", "eos", "pad")]
    assert roles == [end, period, end]
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == period
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"imported from {path}, {folders['clip']} with raycap" in card
    assert "trust_remote_code=True" in card


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"num_heads": 7}, "--num-heads 7 is not for towers, which take --vision-tower"),
        ({"tokenizer": "{gpt2}"}, "--tokenizer .* is not for towers"),
        ({"image_size": 40}, "--image-size 40 is no multiple of the patches of 16 pixels"),
        ({"settings": '{{"clip_length": 7}}'}, "names 'clip_length'; these weights take freeze_vision"),
        ({"settings": '{{"prefix_length": 79}}'}, "captions would not fit the model: .*give at most 2, or a shorter"),
        ({"prompt": "word " * 50}, "captions would not fit the model"),
        ({"vision_tower": "{bare}"}, "holds no preprocessor_config.json"),
        ({"vision_tower": "{broken}"}, "do not fit the model, or are not finite"),
        ({"text_decoder": "{words}"}, "has no <|endoftext|>, so it is not GPT-2's"),
    ],
)
def test_what_would_not_work_later_is_refused_now(
    flags: dict[str, Any], sentence: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    others = {name: tmp_path / name for name in ("bare", "broken", "words")}
    shutil.copytree(folders["clip"], others["bare"])
    (others["bare"] / "preprocessor_config.json").unlink()
    shutil.copytree(folders["clip"], others["broken"])
    weights = load_file(others["broken"] / "model.safetensors")
    weights["vision_model.post_layernorm.bias"][0] = torch.nan
    save_file(weights, others["broken"] / "model.safetensors", metadata={"format": "pt"})
    shutil.copytree(folders["gpt2"], others["words"])
    write_bert_tokenizer(tmp_path / "bert", 120)
    shutil.copy(tmp_path / "bert" / "tokenizer.json", others["words"] / "tokenizer.json")
    where = {name: str(path) for name, path in {**folders, **others}.items()}
    given = {name: value.format(**where) if isinstance(value, str) else value for name, value in flags.items()}
    with pytest.raises(RaycapError, match=sentence):
        import_weights(ImportConfig(**towers(folders, **given), out=str(tmp_path / "out")), lambda _: None)
    assert not (tmp_path / "out").exists()


def test_clipcaps_mistakes_are_named_by_their_flags(folders: dict[str, Path], tmp_path: Path) -> None:
    given: dict[str, Any] = {"weights": str(clipcap_file(folders, tmp_path)), "out": str(tmp_path / "out")}
    clip, vit, gpt2 = (str(folders[name]) for name in ("clip", "vit", "gpt2"))
    for flags, sentence in (
        ({"vision_tower": vit, "tokenizer": gpt2}, "reads 48 values, and .*vit' gives 64; give the --vision-tower"),
        ({"vision_tower": clip, "tokenizer": gpt2, "num_heads": 5}, "--num-heads 5 does not divide the width 64"),
        (
            {"vision_tower": clip, "tokenizer": gpt2, "architecture": "clip_gpt2_transformer"},
            "--architecture .* not for",
        ),
        ({"vision_tower": clip}, "need --tokenizer: GPT-2's"),
    ):
        with pytest.raises(UserError, match=sentence):
            import_weights(ImportConfig(**given, **flags), lambda _: None)


def test_blips_weights_take_berts_tokenizer_with_and_without_blips_own_two_tokens(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in captioner_state().items()}  # as DDP names them
    torch.save({"model": state}, tmp_path / "blip.pth")
    for vocab_size, fits in ((VOCAB_SIZE, True), (VOCAB_SIZE - 2, True), (VOCAB_SIZE - 10, False)):
        write_bert_tokenizer(tmp_path / str(vocab_size), vocab_size)
        config = ImportConfig(
            weights=str(tmp_path / "blip.pth"),
            tokenizer=str(tmp_path / str(vocab_size)),
            out=str(tmp_path / f"out-{vocab_size}"),
        )
        if fits:
            import_weights(config, lambda _: None)
            assert captions_of(Path(config.out)) is not None
        else:
            with pytest.raises(
                UserError, match=r"has 110 tokens and \[SEP\] = 102, and these weights have 120 and 102"
            ):
                import_weights(config, lambda _: None)


def test_sizes_without_bounds_are_refused_before_anything_is_built(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "vgg16.pth")
    config = ImportConfig(
        **towers(folders, settings=json.dumps({"mapper": "transformer", "num_mapper_layers": 10**6})),
        out=str(tmp_path / "out"),
    )
    with pytest.raises(CheckpointError, match="num_mapper_layers = 1000000, which is no number from 1 to"):
        import_weights(config, lambda _: None)


def test_images_of_the_default_size_stay_as_they_are(folders: dict[str, Path]) -> None:
    assert tower_of(folders["clip"])[2:] == (SIZE, 0)
