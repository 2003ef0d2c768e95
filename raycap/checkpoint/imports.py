"""Weights of others -> our checkpoint folder: original BLIP, ClipCap and VGG16 files, and pretrained towers put together.

What the weights do not hold (a ClipCap file its vision tower, towers what joins them, VGG16 its LSTM) is taken from a
folder or drawn anew from a seed; the printed lines say which.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycap import storage
from raycap.checkpoint.folder import read_json
from raycap.checkpoint.layout import (
    MAX_TOKENS,
    complete_config,
    fresh_config,
    read_image_spec,
    read_text_spec,
    with_pooler,
)
from raycap.checkpoint.originals import blip_from_salesforce, read_pickled, retrieval_from_salesforce
from raycap.checkpoint.published import local_folder, published_spec
from raycap.checkpoint.retrieval import load_scorer, save_scorer, scorer_spec
from raycap.checkpoint.sealed import SEAL, save_checkpoint
from raycap.checkpoint.spec import CheckpointSpec
from raycap.checkpoint.weights import export_weights, load_model, read_weights, weight_files
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, UserError
from raycap.models import CaptionModel, build_model
from raycap.models.clip_gpt2 import clipcap_layout, import_clipcap
from raycap.models.presets import CLIP_GPT2_MLP, IMAGES, PRESETS, VGG_LSTM
from raycap.models.vgg_lstm import import_torchvision
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, load_tokenizer, role_ids

Say = Callable[[str], None]
Weights = Mapping[str, Tensor]
TOWERS = {  # model_type in the config.json of a published folder -> transformers' class of its vision tower
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "vit": "ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
}
PICKLED = "pytorch_model.bin"  # transformers' name of all weights of a model before safetensors
# What --settings may name: of towers put together, of ClipCap's weights (which say the rest themselves), of VGG16's.
FREEZING = ("freeze_vision", "freeze_text", "normalize_prefix")
MAPPING = ("mapper", "prefix_length", "clip_length", "num_mapper_layers", "num_mapper_heads")
DECODING = ("attention", "embedding_size", "hidden_size", "dropout", "freeze_vision")


def import_weights(config: ImportConfig, say: Say = print) -> None:
    """Writes the checkpoint folder config.out. Raises UserError, CheckpointError or StorageError; then nothing is written."""
    if not config.weights and not (config.vision_tower and config.text_decoder):
        raise UserError("nothing to import; give --weights, or --vision-tower and --text-decoder")
    if storage.exists(storage.join(config.out, SEAL)):
        raise UserError(f"--out {config.out!r} holds a checkpoint already; give another folder")
    torch.manual_seed(config.seed)
    weights = _read(config) if config.weights else {}
    if _is_scorer(weights):
        _import_scorer(weights, config, say)
        return
    spec, model = _of_file(weights, config, say) if config.weights else _of_towers(config, say)
    info = {"step": 0, "imported_from": [n for n in (config.weights, config.vision_tower, config.text_decoder) if n]}
    save_checkpoint(config.out, export_weights(model), spec, info)
    total = sum(parameter.numel() for parameter in model.parameters())
    say(f"wrote {config.out}: a {spec.kind} model of {total:,} parameters for images of {spec.image.size} pixels")


def _read(config: ImportConfig) -> Weights:
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(f"--weights {config.weights!r} is no file; give the file of the original weights")
    return read_weights([path], str(path)) if path.suffix == ".safetensors" else read_pickled(path)


def _is_scorer(weights: Weights) -> bool:
    """Whether these are of salesforce/BLIP's retrieval. A pretraining checkpoint holds both; it is taken as a captioner."""
    return "itm_head.weight" in weights and not any(name.startswith("text_decoder.") for name in weights)


def _import_scorer(weights: Weights, config: ImportConfig, say: Say) -> None:
    _with_settings({}, config, ())
    if storage.exists(storage.join(config.out, "config.json")):
        raise UserError(f"--out {config.out!r} holds a model already; give another folder")
    tokenizer = load_tokenizer(_require("--tokenizer", config.tokenizer, "BERT's, for example bert-base-uncased"))
    given, converted, dropped = retrieval_from_salesforce(weights, config.weights, image_size=config.image_size or None)
    if dropped:
        say(f"left out {len(dropped)} tensors that only training needs (first: {dropped[0]})")
    image = ImageSpec(size=given["vision_config"]["image_size"])
    spec = scorer_spec(given, tokenizer, image, config.weights)
    load_scorer(spec, converted, config.weights)
    save_scorer(config.out, spec, converted)
    say(f"wrote {config.out}: a scorer of images and texts, for raycap.Scorer and transformers; it captions nothing")


def _of_file(weights: Weights, config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    path = Path(config.weights)
    if path.name == PICKLED:
        return _published(path.parent, weights, config, say)
    if any(name.startswith("visual_encoder.") for name in weights):
        return _blip(weights, config, say)
    if any(name.startswith("clip_project.") for name in weights):
        return _clipcap(weights, config, say)
    if "features.0.weight" in weights:
        return _vgg(weights, config, say)
    raise CheckpointError(
        f"{config.weights!r} is of no layout that is known (its first tensor is {next(iter(weights), 'none')!r}); give weights of "
        f"BLIP's authors, of ClipCap's, or torchvision's VGG16"
    )


def _published(folder: Path, weights: Weights, config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    """A folder in Hugging Face's layout from before safetensors; the files beside the weights say the rest."""
    _with_settings({}, config, ())
    if config.image_size or config.tokenizer:
        flag = "--image-size" if config.image_size else "--tokenizer"
        raise UserError(f"{flag} is for weights without a config.json; {str(folder)!r} has one that says it")
    spec, _ = published_spec(folder, str(folder))
    spec = replace(
        spec,
        model_config=with_pooler(spec.model_config, weights),
        text=replace(spec.text, prompt=config.prompt),
        verified=True,
    )
    say(f"configuration and tokenizer are those of {folder}")
    return spec, load_model(spec, weights, config.weights)


def _blip(weights: Weights, config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    _with_settings({}, config, ())
    given, converted, dropped = blip_from_salesforce(weights, config.weights, image_size=config.image_size or None)
    if dropped:
        say(f"left out {len(dropped)} tensors of other heads (first: {dropped[0]})")
    model_config = complete_config(given, config.weights)
    text = replace(read_text_spec(model_config, config.weights), prompt=config.prompt)
    image = ImageSpec(size=model_config["vision_config"]["image_size"])
    spec = _spec(model_config, text, image, config)
    return spec, load_model(spec, converted, config.weights)


def _clipcap(weights: Weights, config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    _require(
        "--vision-tower",
        config.vision_tower,
        "ClipCap's weights hold none: openai/clip-vit-base-patch32's is the usual one",
    )
    try:
        ours, layout = import_clipcap(weights), clipcap_layout(weights)
    except ValueError as error:
        raise CheckpointError(f"{config.weights!r}: {error}") from error
    vision_config, image, tower = _vision_tower(config.vision_tower)
    vocab_size, width = ours["gpt.transformer.wte.weight"].shape
    positions = ours["gpt.transformer.wpe.weight"].shape[0]
    layers = 1 + max(int(name.split(".")[3]) for name in ours if name.startswith("gpt.transformer.h."))
    sizes = {
        "vocab_size": vocab_size,
        "n_embd": width,
        "n_positions": positions,
        "n_layer": layers,
        "n_head": width // 64 or 1,
    }
    model_config = CLIP_GPT2_MLP | layout | {"vision_config": vision_config}
    model_config["text_config"] = CLIP_GPT2_MLP["text_config"] | sizes | {"n_head": config.num_heads or sizes["n_head"]}
    model_config = _with_settings(complete_config(model_config, config.weights), config, FREEZING)
    spec = _spec(model_config, _gpt2_text(config), image, config)
    say(f"the vision tower is that of {config.vision_tower}")
    return spec, load_model(spec, {**ours, **tower}, config.weights)


def _vgg(weights: Weights, config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    tokenizer = load_tokenizer(_require("--tokenizer", config.tokenizer, "the vocabulary of the LSTM"))
    preset = _with_settings(VGG_LSTM, config, DECODING)
    try:
        ours = import_torchvision(weights, attention=preset["attention"])
    except ValueError as error:
        raise CheckpointError(f"{config.weights!r}: {error}") from error
    text = _text(tokenizer, config)
    size = config.image_size or preset["image_size"]
    model_config = preset | {"vocab_size": tokenizer.get_vocab_size(), "image_size": size}
    spec = _spec(model_config, text, replace(IMAGES["vgg_lstm"], size=size), config)
    say("the LSTM is drawn anew: train it with jobs/train_vgg_lstm.py --init-from this folder")
    return spec, _with(spec, ours, config.weights)


def _of_towers(config: ImportConfig, say: Say) -> tuple[CheckpointSpec, CaptionModel]:
    """Pretrained towers under what joins them, drawn anew: ClipCap's mapper, or the cross-attention of ViT-GPT2."""
    vision_config, image, tower = _vision_tower(config.vision_tower)
    text_config, decoder = _gpt2(config.text_decoder)
    preset = copy.deepcopy(PRESETS[config.architecture])
    text = _gpt2_text(config)
    if preset["model_type"] == "clip_gpt2":
        preset |= {"vision_config": vision_config, "text_config": text_config}
        preset = _with_settings(preset, config, (*FREEZING, *MAPPING))
        weights = {**tower, **{f"gpt.{name}": tensor for name, tensor in decoder.items()}}
        fresh = "the mapper"
    else:
        _with_settings(preset, config, ())
        if vision_config["model_type"] != "vit":
            raise UserError(
                f"--architecture {config.architecture} reads a ViT, and {config.vision_tower!r} is none; give one"
            )
        vision_config["add_pooling_layer"] = False
        preset |= {"encoder": vision_config, "decoder": text_config | {"add_cross_attention": True, "is_decoder": True}}
        weights = {f"encoder.{name.removeprefix('vision_tower.')}": tensor for name, tensor in tower.items()}
        weights |= {f"decoder.{name}": tensor for name, tensor in decoder.items()}
        fresh = "the cross-attention"
    sizes = {"vocab_size": text_config["vocab_size"], "num_positions": text_config["n_positions"]}
    if preset["model_type"] == "clip_gpt2":
        sizes["num_positions"] -= preset["prefix_length"]
    model_config = complete_config(fresh_config(preset, text=text, image_size=image.size, **sizes), config.vision_tower)
    spec = _spec(model_config, text, image, config)
    say(f"{fresh} is drawn anew: train it with --init-from this folder")
    return spec, _with(spec, weights, f"{config.vision_tower} and {config.text_decoder}")


def _with_settings(model_config: dict[str, Any], config: ImportConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with --settings in place of its own. Raises UserError for what it has no such setting for."""
    if not config.settings:
        return model_config
    try:
        given = json.loads(config.settings)
    except ValueError as error:
        raise UserError(f"--settings {config.settings!r} is no JSON ({error}); give an object in quotes") from error
    if not isinstance(given, dict) or (unknown := sorted(given.keys() - set(names))):
        what = f"names {unknown[0]!r}" if isinstance(given, dict) else "is no JSON object"
        raise UserError(f"--settings {config.settings!r} {what}; these weights take {', '.join(names) or 'none'}")
    try:
        complete_config(changed := model_config | given, "--settings")
    except CheckpointError as error:
        raise UserError(f"--settings {config.settings!r} cannot be used: {error.__cause__}") from error
    return changed


def _with(spec: CheckpointSpec, weights: Weights, source: str) -> CaptionModel:
    """A fresh model with these weights in place of some of its own, by the names it has in memory."""
    model = build_model(spec.kind, spec.model_config)
    own = model.state_dict()
    wrong = [n for n, t in weights.items() if n not in own or own[n].shape != t.shape]
    if wrong:
        raise CheckpointError(f"the weights of {source!r} do not fit the model (first: {wrong[0]!r}); give others")
    model.load_state_dict(dict(weights), strict=False)
    return model


def _vision_tower(source: str) -> tuple[dict[str, Any], ImageSpec, dict[str, Tensor]]:
    """The configuration of a published tower, how it wants its images, and its weights, named below vision_tower."""
    import transformers

    folder = local_folder(source)
    kind = read_json(folder / "config.json", source).get("model_type")
    if kind not in TOWERS:
        raise CheckpointError(
            f"{source!r} is a model of type {kind!r}; give one with a vision tower of {', '.join(TOWERS)}"
        )
    _, image = read_image_spec(folder, source)
    tower = _load(getattr(transformers, TOWERS[kind]), folder, source)
    vision_config = tower.config.to_dict()
    if vision_config["image_size"] != image.size:
        raise CheckpointError(
            f"{source!r} prepares images of {image.size} pixels for a tower of {vision_config['image_size']}"
        )
    weights = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("pooler.dense.")}
    return vision_config, image, {f"vision_tower.{name}": tensor for name, tensor in weights.items()}


def _gpt2(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from transformers import GPT2LMHeadModel

    folder = local_folder(source)
    kind = read_json(folder / "config.json", source).get("model_type")
    if kind != "gpt2":
        raise CheckpointError(f"{source!r} is a model of type {kind!r}; give a GPT-2 as --text-decoder")
    model = _load(GPT2LMHeadModel, folder, source)
    return model.config.to_dict(), dict(model.state_dict())


def _load(kind: Any, folder: Path, source: str) -> Any:
    """A tower as transformers loads it, whole: every weight of it is in the folder, but for a pooler that nothing reads."""
    from transformers import logging

    weight_files(folder, source)  # safetensors, or what to do
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it lists the text tower that is left out
    try:
        model, report = kind.from_pretrained(
            folder, use_safetensors=True, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers raises a dozen types at a folder that is damaged or of another kind
        raise CheckpointError(
            f"{source!r} cannot be read ({str(error).partition(chr(10))[0]}); copy it again"
        ) from error
    finally:
        logging.set_verbosity(before)
    missing = [name for name in report["missing_keys"] if "pooler.dense" not in name]
    if missing or report["mismatched_keys"]:
        raise CheckpointError(
            f"{source!r} lacks weights that its config.json asks for (first: {[*missing, *report['mismatched_keys']][0]}); copy it again"
        )
    return model


def _gpt2_text(config: ImportConfig) -> TextSpec:
    source = config.tokenizer or config.text_decoder
    return _text(load_tokenizer(_require("--tokenizer", source, "GPT-2's, for example openai-community/gpt2")), config)


def _text(tokenizer: Any, config: ImportConfig) -> TextSpec:
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    return TextSpec(
        prompt=config.prompt,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        max_tokens=MAX_TOKENS,
        clean=False,
        max_words=None,
    )


def _spec(model_config: dict[str, Any], text: TextSpec, image: ImageSpec, config: ImportConfig) -> CheckpointSpec:
    source = _require(
        "--tokenizer", config.tokenizer or config.text_decoder, "the one that the weights were trained with"
    )
    return CheckpointSpec(
        kind=model_config["model_type"],
        model_config=model_config,
        tokenizer=load_tokenizer(source),
        text=text,
        image=image,
        decode=DecodeSettings(),
    )


def _require(flag: str, value: str, why: str) -> str:
    if not value:
        raise UserError(f"these weights need {flag}: {why}")
    return value
