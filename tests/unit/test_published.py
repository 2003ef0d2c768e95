"""raycap/checkpoint: published weights are what transformers makes of them, and what does not fit is refused by a sentence."""

import json
import pickle
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import assert_same_results, captions_by_transformers, edit_json, png_images, tiny_checkpoint, write_published
from transformers import AutoImageProcessor, BlipForConditionalGeneration

from raycap.captioner import Captioner
from raycap.checkpoint import (
    SEAL,
    CheckpointSpec,
    export_weights,
    import_published,
    load_checkpoint,
    load_model,
    open_checkpoint,
    save_checkpoint,
)
from raycap.checkpoint.layout import image_processor, read_image_spec
from raycap.errors import CheckpointError
from raycap.image import normalize, prepare_image
from raycap.models.blip import TIED_NAMES
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import save_tokenizer, train_wordpiece

torch.set_num_threads(1)

INFO = {"step": 12}


class Trap:
    """What a pickle can do to those who load it."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A published folder; beside the weights lies a pickle, as in Salesforce's."""
    write_published(tmp_path / "published")
    (tmp_path / "published" / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
    return tmp_path / "published"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint folder with a prompt."""
    spec, model, _ = tiny_checkpoint(prompt="a picture of ")
    save_checkpoint(str(tmp_path / "checkpoint"), export_weights(model), spec, INFO)
    return tmp_path / "checkpoint"


opened: list[str] | None = None


def note_opened(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


sys.addaudithook(note_opened)  # stays for the process; idle but in the one test that looks


def shard(folder: Path) -> None:
    """model.safetensors as transformers cuts a large one."""
    BlipForConditionalGeneration.from_pretrained(folder).save_pretrained(folder, max_shard_size="60KB")
    (folder / "generation_config.json").unlink()
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def import_plainly(folder: Path) -> tuple[CheckpointSpec, Any]:
    return import_published(str(folder), prompt="", max_tokens=20)


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
    assert_same_results(captioner.caption(png_images(6)), before)


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
    with pytest.raises(
        CheckpointError, match=r"holds no model.safetensors and no .*; if it holds pytorch_model.bin, .* convert"
    ):
        import_plainly(published)
    (published / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match=r"'model.safetensors' of .* cannot be read"):
        import_plainly(published)


def test_another_kind_of_model_is_refused(published: Path) -> None:
    edit_json(published / "config.json", lambda config: config.update(model_type="vit-gpt2"))
    with pytest.raises(CheckpointError, match="holds a model of type 'vit-gpt2'; raycap imports blip, clip_gpt2, "):
        import_plainly(published)
    (published / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"holds no config.json"):
        import_plainly(published)


def test_weights_that_do_not_fit_are_refused_by_the_first_name(published: Path) -> None:
    spec, weights = import_plainly(published)
    name = "vision_model.embeddings.position_embedding"
    with pytest.raises(
        CheckpointError, match=f"0 missing, 0 unknown, 1 of another shape or dtype \\(first: '{name}'\\)"
    ):
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


@pytest.mark.filterwarnings("ignore:.* is unverified")
def test_every_door_opens_a_published_folder_without_its_pickle(published: Path, tmp_path: Path) -> None:
    global opened
    opened = []
    spec, weights = open_checkpoint(str(published))
    read, opened = opened, None
    assert {Path(name).name for name in read} >= {"config.json", "tokenizer.json", "preprocessor_config.json"}
    assert not [name for name in read if name.endswith(".bin")]
    assert not (tmp_path / "sprung").exists()
    imported, expected = import_plainly(published)
    assert replace(spec, text=imported.text, tokenizer=imported.tokenizer) == imported
    assert (spec.text.prompt, spec.verified) == ("", False)
    assert weights.keys() == expected.keys()
    captions = [result.caption or "" for result in Captioner.load(str(published)).caption(png_images(8))]
    assert [c.removeprefix("##") for c in captions] == captions_by_transformers(published, png_images(8), "", 20)


@pytest.mark.filterwarnings("ignore:.* is unverified")
def test_a_prompt_takes_the_place_of_the_checkpoints_own(saved: Path, published: Path) -> None:
    assert open_checkpoint(str(saved))[0].text.prompt == "a picture of "
    before = open_checkpoint(str(saved))[0]
    after = open_checkpoint(str(saved), prompt="two dogs")[0]
    assert (after.text.prompt, after.text.max_tokens) == ("two dogs", before.text.max_tokens)
    assert (after.verified, after.fingerprint) == (True, before.fingerprint)
    ours = Captioner.load(str(published), prompt="two dogs").caption(png_images(6), DecodeSettings(max_new_tokens=12))
    captions = [(result.caption or "").removeprefix("##") for result in ours]
    assert captions == captions_by_transformers(published, png_images(6), "two dogs")


def test_a_relative_path_is_opened_where_the_shell_stands(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert open_checkpoint("checkpoint")[0].info == INFO


def test_decode_defaults_of_published_weights_are_those_of_their_generation_config(published: Path) -> None:
    assert open_checkpoint(str(published))[0].decode == DecodeSettings()
    given = {"max_new_tokens": 7, "min_new_tokens": 2, "num_beams": 3, "length_penalty": 0.5, "max_length": 99}
    (published / "generation_config.json").write_text(json.dumps({**given, "pad_token_id": 0, "do_sample": None}))
    settings = DecodeSettings(max_new_tokens=7, min_new_tokens=2, num_beams=3, length_penalty=0.5)
    assert open_checkpoint(str(published))[0].decode == settings
    for wrong in ("many", 0):
        (published / "generation_config.json").write_text(json.dumps({"max_new_tokens": wrong}))
        with pytest.raises(CheckpointError, match=r"generation_config.json of .* cannot be followed: .*; correct it"):
            open_checkpoint(str(published))


def test_weights_in_several_files_are_read_as_one(published: Path) -> None:
    _, expected = open_checkpoint(str(published))
    shard(published)
    spec, weights = open_checkpoint(str(published))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
    index = published / "model.safetensors.index.json"
    whole = index.read_bytes()
    first, *_, last = sorted(published.glob("model-*.safetensors"))
    shutil.copy(first, published.parent / "kept")
    shutil.copy(last, first)
    with pytest.raises(CheckpointError, match=rf"'{first.name}' of .* does not hold what its {index.name} says"):
        open_checkpoint(str(published))
    first.unlink()
    with pytest.raises(CheckpointError, match=f"{index.name} of .* names '{first.name}', which is not in that folder"):
        open_checkpoint(str(published))
    shutil.copy(published.parent / "kept", first)
    for name in ("../published/" + first.name, "/etc/passwd", "pytorch_model.bin", 7):
        edit_json(index, lambda content, name=name: content["weight_map"].update({"x": name}))
        with pytest.raises(CheckpointError, match=f"names {str(name)!r}, which is not in that folder"):
            open_checkpoint(str(published))
    for text in ('{"weight_map": {}}', "{}", '{"weight_map": [1]}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="names no file"):
            open_checkpoint(str(published))
    index.write_bytes(whole)
    assert open_checkpoint(str(published))[0].fingerprint == spec.fingerprint


def test_a_fingerprint_is_of_the_checkpoint_wherever_it_lies(saved: Path, published: Path, tmp_path: Path) -> None:
    for folder in (saved, published):
        before = open_checkpoint(str(folder))[0].fingerprint
        assert len(before) == 64
        copy = tmp_path / f"copy of {folder.name}"
        shutil.copytree(folder, copy)
        assert open_checkpoint(str(copy), prompt="two ")[0].fingerprint == before
    assert before != open_checkpoint(str(saved))[0].fingerprint
    assert open_checkpoint(str(saved))[0].fingerprint == json.loads((saved / SEAL).read_text())["sha256"]
    (published / "README.md").write_text("says nothing about captions")
    (published / "pytorch_model.bin").unlink()
    assert open_checkpoint(str(published))[0].fingerprint == before

    changed = set()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        whole = (published / name).read_bytes()
        (published / name).write_bytes(whole + b"\n")
        changed.add(open_checkpoint(str(published))[0].fingerprint)
        (published / name).write_bytes(whole)
    weights = load_file(published / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, published / "model.safetensors")
    changed.add(open_checkpoint(str(published))[0].fingerprint)
    shard(published)
    changed.add(open_checkpoint(str(published))[0].fingerprint)
    assert len(changed - {before}) == 5


def test_code_that_a_folder_brings_is_refused(published: Path) -> None:
    edit_json(published / "config.json", lambda config: config.update(auto_map={"AutoModel": "evil.Evil"}))
    with pytest.raises(CheckpointError, match=r"names code of its own \(auto_map: \{'AutoModel': 'evil.Evil'\}\)"):
        open_checkpoint(str(published))


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [
        ("text_config", "hidden_size", 10**9),
        ("vision_config", "intermediate_size", 10**9),
        ("text_config", "vocab_size", 10**12),
        ("vision_config", "num_hidden_layers", 10**9),
        ("vision_config", "image_size", 10**6),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "intermediate_size", -4),
    ],
)
def test_sizes_beyond_reason_are_refused_before_anything_is_allocated(
    published: Path, part: str, name: str, value: int
) -> None:
    edit_json(published / "config.json", lambda config: config[part].update({name: value}))
    begun = time.perf_counter()
    with pytest.raises(
        CheckpointError, match=f"config.json of .* asks for {part}.{name} = {value}, which is no number"
    ):
        open_checkpoint(str(published))
    assert time.perf_counter() - begun < 2


def test_a_model_larger_than_its_weights_is_never_allocated(published: Path) -> None:
    """Each size by itself is within reason, together they are 400 GB."""
    size = {"hidden_size": 16_384, "intermediate_size": 65_536, "num_hidden_layers": 36}
    edit_json(published / "config.json", lambda config: config["text_config"].update(size))
    spec, weights = open_checkpoint(str(published))
    with pytest.raises(CheckpointError, match=r"do not fit its config.json"):
        load_model(spec, weights, "x")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"text_config": {"hidden_size": "wide"}}, r"is no configuration of a blip model \(.*'wide'"),
        ({"text_config": [1]}, "is no configuration of a blip model"),
        (
            {"text_config": {"num_attention_heads": 5}},
            "divides text_config.hidden_size = 32 by num_attention_heads = 5",
        ),
        (
            {"text_config": {"bos_token_id": 10**6}},
            "the first token of .* has id 1000000, outside its vocab_size = 63",
        ),
        ({"text_config": {"sep_token_id": -1}}, "the end token of .* has id -1, outside"),
        ({"vision_config": {"image_size": 48}}, "prepares images of 32 pixels for a vision tower of 48 pixels"),
    ],
)
def test_a_config_that_contradicts_itself_is_refused(published: Path, change: dict[str, Any], sentence: str) -> None:
    def apply(config: dict[str, Any]) -> None:
        for part, values in change.items():
            config[part] = {**config[part], **values} if isinstance(values, dict) else values

    edit_json(published / "config.json", apply)
    with pytest.raises(CheckpointError, match=sentence):
        open_checkpoint(str(published))


def test_a_tokenizer_of_another_model_is_refused(published: Path) -> None:
    larger = train_wordpiece([f"word{n}" for n in range(50)])
    save_tokenizer(larger, open_checkpoint(str(published))[0].text, str(published))
    with pytest.raises(
        CheckpointError, match=r"tokenizer.json of .* has \d+ tokens, its config.json a vocab_size of \d+;"
    ):
        open_checkpoint(str(published))


def test_preprocessing_that_is_not_ours_is_refused_and_clips_and_vits_is_read(published: Path) -> None:
    path = published / "preprocessor_config.json"
    whole = path.read_text()
    expected = open_checkpoint(str(published))[0].image
    for same in ({"resample": 3, "do_center_crop": None}, {"rescale_factor": 0.00392156862745098}, {"do_pad": True}):
        path.write_text(json.dumps(json.loads(whole) | same))
        assert open_checkpoint(str(published))[0].image == expected
    crop = {"do_center_crop": True, "size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    for theirs, ours in (({"resample": 2}, {"resample": "bilinear"}), (crop, {"fit": "crop"})):
        path.write_text(json.dumps(json.loads(whole) | theirs))
        assert open_checkpoint(str(published))[0].image == replace(expected, **ours)
    path.write_text(json.dumps(json.loads(whole) | crop | {"size": {"shortest_edge": 37}}))
    assert open_checkpoint(str(published))[0].image == replace(expected, fit="crop", shorter_side=37)
    for other in ({"resample": 1}, {"do_normalize": False}, {"rescale_factor": 1.0}):
        path.write_text(json.dumps(json.loads(whole) | other))
        with pytest.raises(CheckpointError, match=f"preprocessor_config.json of .* asks for .*{next(iter(other))}"):
            open_checkpoint(str(published))
    path.write_text(json.dumps(json.loads(whole) | {"image_mean": [0.5]}))
    with pytest.raises(CheckpointError, match="are not three numbers each"):
        open_checkpoint(str(published))


def test_a_crop_that_is_no_square_of_the_resized_image_is_refused(published: Path) -> None:
    path = published / "preprocessor_config.json"
    whole = json.loads(path.read_text()) | {"do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    for wrong in (
        {"size": {"shortest_edge": 31}},  # transformers pads it
        {"size": {"shortest_edge": 65}},
        {"size": {"shortest_edge": 10**9}},
        {"size": {"shortest_edge": 0}},
        {"size": {"shortest_edge": "37"}},
        {"size": {"shortest_edge": 37, "longest_edge": 60}},
        {"size": {"height": 37, "width": 37}},  # squeezed, then cropped: DeiT's
        {"size": 37},  # for BLIP's processor the same
        {"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 31}},
        {"size": {"shortest_edge": 37}, "crop_size": None},
        {"size": {"shortest_edge": 37}, "do_center_crop": False},
        {"size": None},
    ):
        path.write_text(json.dumps(whole | wrong))
        with pytest.raises(CheckpointError, match="has no square size, image_mean and image_std"):
            open_checkpoint(str(published))


DINOV2 = {  # facebook/dinov2-base
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 256},
}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
IN21K = {"do_normalize": True, "do_resize": True, **HALF, "size": 224}  # google/vit-base-patch16-224-in21k
CLIP = {"crop_size": 224, "do_center_crop": True, "do_normalize": True, "do_resize": True, **HALF, "size": 224}
SQUARE = {"height": 224, "width": 224}


@pytest.mark.parametrize(
    ("model_type", "image", "expected"),
    [
        ("dinov2", DINOV2, {"fit": "crop", "shorter_side": 256}),
        ("dinov2", HALF | {"size": 256}, {"fit": "crop", "shorter_side": 256}),
        ("vit", IN21K, {"resample": "bilinear"}),
        ("vit", IN21K | {"resample": 3}, {}),
        ("vit", IN21K | {"feature_extractor_type": "ViTFeatureExtractor"}, {"resample": "bilinear"}),
        ("vit", IN21K | {"image_processor_type": "ViTImageProcessorFast"}, {"resample": "bilinear"}),
        ("clip", IN21K | {"image_processor_type": "ViTImageProcessor"}, {"resample": "bilinear"}),
        ("blip", IN21K, {}),
        ("blip", CLIP, {}),  # squeezed, and nothing to cut off
        ("clip", CLIP | {"feature_extractor_type": "CLIPFeatureExtractor"}, {"fit": "crop"}),
        ("clip", IN21K, {"fit": "crop"}),
        ("clip", CLIP | {"size": 240}, {"fit": "crop", "shorter_side": 240}),
        ("clip", CLIP | {"size": SQUARE}, {}),
        ("siglip", HALF | {"size": SQUARE}, {}),
    ],
)
def test_a_folder_is_prepared_for_as_by_the_processor_that_transformers_chooses(
    model_type: str, image: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image))
    name, spec = read_image_spec(tmp_path, "x")
    mean, std = tuple(image["image_mean"]), tuple(image["image_std"])
    assert (name, spec) == ("preprocessor_config.json", ImageSpec(size=224, mean=mean, std=std, **expected))
    theirs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    assert {2: "bilinear", 3: "bicubic"}[theirs.resample] == spec.resample
    # What we write of it is read as the same, by either.
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(spec, model_type)))
    assert read_image_spec(tmp_path, "x")[1] == spec
    written = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    picture = Image.effect_noise((301, 257), 90).convert("RGB")
    ours = normalize(torch.tensor(prepare_image(np.asarray(picture), spec)), spec)
    for processor in (theirs, written):
        values = torch.as_tensor(processor(picture, return_tensors="np")["pixel_values"])[0]
        assert values.shape == ours.shape
        assert (values - ours).abs().max() < 1.001 / 255 / min(spec.std)


def test_a_vit_gpt2_without_a_named_processor_is_prepared_for_as_its_encoder(tmp_path: Path) -> None:
    """transformers chooses none for such a model, but does for its encoder."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(IN21K))
    for config, resample in (
        ({"model_type": "vision-encoder-decoder", "encoder": {"model_type": "vit"}}, "bilinear"),
        (
            {"model_type": "vision-encoder-decoder", "encoder": {"model_type": "siglip"}},
            None,
        ),  # 224 for the shorter side
        ({"model_type": "vision-encoder-decoder", "encoder": [1]}, None),
        ({"model_type": "resnet"}, None),
        ({"model_type": ["vit"]}, None),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        if resample:
            assert read_image_spec(tmp_path, "x")[1].resample == resample
        else:
            with pytest.raises(CheckpointError, match=r"has no square size|asks for \{'resample': None\}"):
                read_image_spec(tmp_path, "x")


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
def test_weights_that_are_not_finite_are_refused_by_name(published: Path, value: float) -> None:
    spec, weights = open_checkpoint(str(published))
    name = "vision_model.post_layernorm.weight"
    large = {**weights, name: torch.full_like(weights[name], 3e38)}  # their sum is infinite, they are not
    assert torch.equal(load_model(spec, large, "x").state_dict()[name], large[name])
    broken = {**weights, name: weights[name].index_fill(0, torch.tensor([3]), value)}
    with pytest.raises(
        CheckpointError, match=f"the weights of 'x' are broken: '{name}' holds values that are infinite"
    ):
        load_model(spec, broken, "x")


def test_half_precision_weights_are_read_as_single_and_integers_are_refused(published: Path) -> None:
    spec, weights = open_checkpoint(str(published))
    model = load_model(spec, {name: tensor.half() for name, tensor in weights.items()}, "x")
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    name = "vision_model.post_layernorm.weight"
    with pytest.raises(CheckpointError, match=f"0 missing, 0 unknown, 1 of another shape .*'{name}'"):
        load_model(spec, {**weights, name: weights[name].to(torch.int8)}, "x")


def test_loading_draws_no_random_numbers(published: Path) -> None:
    spec, weights = open_checkpoint(str(published))
    before = torch.get_rng_state()
    load_model(spec, weights, "x")
    assert torch.equal(torch.get_rng_state(), before)


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


def test_a_file_in_the_place_of_a_folder_is_named_one(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"at '.*/model.safetensors': it is a file; give its folder"):
        open_checkpoint(str(tmp_path / "model.safetensors"))
