"""Weights of others -> our checkpoint folder: original BLIP, ClipCap and VGG16 files, and pretrained towers put together.

What the weights do not hold (a ClipCap file its vision tower, towers what joins them, VGG16 its LSTM) is taken from a
folder or drawn anew from a seed; the printed lines say which.
"""

import copy
import json
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from raycap import storage
from raycap.checkpoint.fit import settle_tied
from raycap.checkpoint.folder import read_json, shown
from raycap.checkpoint.layout import (
    MAX_TOKENS,
    complete_config,
    fresh_config,
    is_scorer,
    read_image_spec,
    read_text_spec,
    with_pooler,
)
from raycap.checkpoint.originals import (
    PARTS,
    PICKLED,
    blip_from_salesforce,
    read_parts,
    read_pickled,
    retrieval_from_salesforce,
)
from raycap.checkpoint.published import local_folder, published_spec, refuse_adapter
from raycap.checkpoint.retrieval import ScorerSpec, load_scorer, save_scorer, scorer_spec
from raycap.checkpoint.sealed import save_checkpoint
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.checkpoint.towers import read_gpt2, read_vision_tower
from raycap.checkpoint.weights import export_weights, has_safetensors, load_model, read_weights
from raycap.config import ImportConfig
from raycap.errors import CheckpointError, UserError
from raycap.models import CaptionModel, build_model
from raycap.models.clip_gpt2 import clipcap_layout, import_clipcap
from raycap.models.presets import CLIP_GPT2_MLP, IMAGES, PRESETS, VGG_LSTM
from raycap.models.vgg_lstm import import_torchvision
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import END_OF_TEXT, TextSpec, load_tokenizer, role_ids

Say = Callable[[str], None]
Weights = Mapping[str, Tensor]
Imported = tuple[CheckpointSpec, CaptionModel]
FLAGS = {  # what is imported -> the fields of ImportConfig that it takes beside weights, out and seed
    "BLIP's weights": ("tokenizer", "prompt", "image_size"),
    "the weights of BLIP's scorer": ("tokenizer", "image_size"),
    "ClipCap's weights": ("vision_tower", "tokenizer", "prompt", "image_size", "settings", "num_heads"),
    "VGG16's weights": ("tokenizer", "prompt", "image_size", "settings"),
    "the weights of a folder with a config.json": ("prompt",),
    "the weights of a scorer's folder": (),
    "towers": ("vision_tower", "text_decoder", "architecture", "prompt", "image_size", "settings"),
}
# What --settings may name: of towers put together, of ClipCap's weights (which say the rest themselves), of VGG16's.
FREEZING = ("freeze_vision", "freeze_text", "normalize_prefix")
MAPPING = ("mapper", "prefix_length", "clip_length", "num_mapper_layers", "num_mapper_heads")
DECODING = ("attention", "embedding_size", "hidden_size", "dropout", "freeze_vision")


def import_weights(config: ImportConfig, say: Say = print) -> None:
    """Writes the checkpoint folder config.out. Raises UserError, CheckpointError or StorageError; then nothing is written."""
    if not config.weights and not (config.vision_tower and config.text_decoder):
        raise UserError("nothing to import; give --weights, or --vision-tower and --text-decoder")
    _check_empty(config.out)
    torch.manual_seed(config.seed % 2**63)
    if not config.weights:
        _write(_of_towers(config, say), config, say)
        return
    path = _find(config)
    weights = _read(path, say)
    in_folder = path.name in (PICKLED, PARTS) and (path.parent / "config.json").exists()
    if in_folder and is_scorer(read_json(path.parent / "config.json", str(path.parent))):
        _published_scorer(path.parent, weights, config, say)
    elif in_folder:
        _write(_published(path.parent, weights, config, say), config, say)
    elif "itm_head.weight" in weights and not any(name.startswith("text_decoder.") for name in weights):
        _import_scorer(weights, config, say)  # a pretraining checkpoint holds both, and is taken as a captioner
    elif any(name.startswith("visual_encoder.") for name in weights):
        _write(_blip(weights, config, say), config, say)
    elif any(name.startswith("clip_project.") for name in weights):
        _write(_clipcap(weights, config, say), config, say)
    elif "features.0.weight" in weights:
        _write(_vgg(weights, config, say), config, say)
    else:
        raise CheckpointError(
            f"{config.weights!r} is of no layout that is known (its first tensor is {shown(next(iter(weights), 'none'))}); give "
            f"weights of BLIP's authors, of ClipCap's, or torchvision's VGG16"
        )


def _check_empty(out: str) -> None:
    """A folder that holds anything would be replaced by the checkpoint. The job itself has written status.json."""
    names = storage.list_files(out) if storage.is_url(out) or Path(out).is_dir() else []
    others = [name for name in names if name != "status.json"]
    if others or (not storage.is_url(out) and Path(out).is_file()):
        raise UserError(
            f"--out {out!r} is not empty (it holds {others[0] if others else 'bytes'!r}); give a folder that does not exist yet"
        )


def _find(config: ImportConfig) -> Path:
    """The file of --weights, or the pickled one of a folder or hub name."""
    path = Path(config.weights).expanduser()
    if path.is_file():
        return path
    if not path.is_dir() and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", config.weights):
        raise UserError(f"--weights {config.weights!r} is no file; give the file of the original weights")
    folder = local_folder(config.weights, pickled=True)
    refuse_adapter(folder, config.weights)
    for name in (PICKLED, PARTS):
        if (folder / name).is_file():
            return folder / name
    if has_safetensors(folder):
        raise UserError(
            f"--weights {config.weights!r} holds safetensors and needs no import: give it to Captioner.load, to a job's --checkpoint or "
            f"--init-from, or a scorer to raycap.Scorer and --scorer"
        )
    raise UserError(
        f"--weights {config.weights!r} holds neither {PICKLED} nor {PARTS}; give the file of original weights"
    )


def _read(path: Path, say: Say) -> Weights:
    if path.suffix == ".safetensors":
        weights = read_weights([path], str(path))
    else:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            weights = read_parts(path) if path.name == PARTS else read_pickled(path)
        for warning in caught:
            say(f"warning: {warning.message}")
    if weights and all(name.startswith("module.") for name in weights):  # of a model that was saved inside DDP
        weights = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    return weights


def _accept(config: ImportConfig, what: str) -> None:
    """Raises UserError for a flag that means nothing for what is imported."""
    taken = FLAGS[what]
    for field in fields(config):
        given = getattr(config, field.name) != getattr(ImportConfig, field.name)
        if given and field.name not in (*taken, "weights", "out", "seed"):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in taken)
            raise UserError(
                f"--{field.name.replace('_', '-')} {getattr(config, field.name)!r} is not for {what}, which take {flags}; leave it out"
            )


def _write(imported: Imported, config: ImportConfig, say: Say) -> None:
    """The folder, if what was imported can caption."""
    spec, model = imported
    try:
        spec.check_settings(spec.decode)
    except ValueError as error:
        raise UserError(f"captions would not fit the model: {error}, or a shorter prompt or prefix") from error
    info = {"step": 0, "imported_from": [n for n in (config.weights, config.vision_tower, config.text_decoder) if n]}
    save_checkpoint(config.out, export_weights(model), spec, info)
    total = sum(parameter.numel() for parameter in model.parameters())
    say(f"wrote {config.out}: a {spec.kind} model of {total:,} parameters for images of {spec.image.size} pixels")


def _import_scorer(weights: Weights, config: ImportConfig, say: Say) -> None:
    _accept(config, "the weights of BLIP's scorer")
    given, converted, dropped = retrieval_from_salesforce(weights, config.weights, image_size=config.image_size or None)
    if dropped:
        say(f"left out {len(dropped)} tensors that only training needs (first: {dropped[0]})")
    tokenizer = _berts(config, given["text_config"])
    image = ImageSpec(size=given["vision_config"]["image_size"])
    _write_scorer(scorer_spec(given, tokenizer, image, config.weights), converted, config, say)


def _published_scorer(folder: Path, weights: Weights, config: ImportConfig, say: Say) -> None:
    """A scorer's folder from before safetensors; the files beside the weights say the rest."""
    _accept(config, "the weights of a scorer's folder")
    given = read_json(folder / "config.json", str(folder))
    spec = scorer_spec(given, load_tokenizer(str(folder)), read_image_spec(folder, str(folder))[1], str(folder))
    _write_scorer(spec, weights, config, say)


def _write_scorer(spec: ScorerSpec, weights: Weights, config: ImportConfig, say: Say) -> None:
    load_scorer(spec, weights, config.weights)
    save_scorer(config.out, spec, weights)
    say(f"wrote {config.out}: a scorer of images and texts, for raycap.Scorer and transformers; it captions nothing")


def _published(folder: Path, weights: Weights, config: ImportConfig, say: Say) -> Imported:
    """A folder in Hugging Face's layout from before safetensors; the files beside the weights say the rest."""
    _accept(config, "the weights of a folder with a config.json")
    spec, _ = published_spec(folder, str(folder))
    text = replace(spec.text, prompt=config.prompt)
    model_config, weights = settle_tied(with_pooler(spec.model_config, weights), weights)
    spec = replace(spec, model_config=model_config, text=text, verified=True)
    say(f"configuration and tokenizer are those of {folder}")
    return spec, load_model(spec, weights, config.weights)


def _blip(weights: Weights, config: ImportConfig, say: Say) -> Imported:
    _accept(config, "BLIP's weights")
    given, converted, dropped = blip_from_salesforce(weights, config.weights, image_size=config.image_size or None)
    if dropped:
        say(f"left out {len(dropped)} tensors of other heads (first: {dropped[0]})")
    model_config = complete_config(given, config.weights)
    tokenizer = _berts(config, model_config["text_config"])
    text = replace(read_text_spec(model_config, config.weights), prompt=config.prompt)
    spec = _spec(model_config, tokenizer, text, ImageSpec(size=model_config["vision_config"]["image_size"]))
    return spec, load_model(spec, converted, config.weights)


def _clipcap(weights: Weights, config: ImportConfig, say: Say) -> Imported:
    """ClipCap's captions end with "." (stop_token of its predict.py): it trains without an end token."""
    _accept(config, "ClipCap's weights")
    why = "ClipCap's weights hold none; the published ones were trained with openai/clip-vit-base-patch32"
    tower_source = _require("--vision-tower", config.vision_tower, why)
    try:
        ours, layout = import_clipcap(weights), clipcap_layout(weights)
    except ValueError as error:
        raise CheckpointError(f"{config.weights!r}: {error}") from error
    tokenizer = _gpt2s(config.tokenizer)
    text = _text(tokenizer, config)
    if (period := tokenizer.token_to_id(".")) is not None:
        text = replace(text, eos_id=period)
        say("captions end with '.', as ClipCap's do")
    vision_config, image, tower = read_vision_tower(tower_source, config.image_size)
    vocab_size, width = ours["gpt.transformer.wte.weight"].shape
    num_heads = config.num_heads or width // 64 or 1
    if width % num_heads:
        raise UserError(
            f"--num-heads {num_heads} does not divide the width {width} of this GPT-2; give a number that does"
        )
    words = {
        "vocab_size": vocab_size,
        "n_embd": width,
        "n_positions": ours["gpt.transformer.wpe.weight"].shape[0],
        "n_layer": 1 + max(int(name.split(".")[3]) for name in ours if name.startswith("gpt.transformer.h.")),
        "n_head": num_heads,
        "bos_token_id": text.bos_id,
        "eos_token_id": text.eos_id,
        "pad_token_id": text.pad_id,
    }
    model_config = CLIP_GPT2_MLP | layout | {"vision_config": vision_config}
    model_config["text_config"] = CLIP_GPT2_MLP["text_config"] | words
    model_config = _with_settings(complete_config(model_config, config.weights), config, FREEZING)
    spec = _spec(model_config, tokenizer, text, image)
    first = next(name for name in ours if name.startswith("clip_project.") and name.endswith("weight"))
    own = _meta(spec, config.weights)[first].shape
    if own != ours[first].shape:
        raise UserError(
            f"the mapper of {config.weights!r} reads {ours[first].shape[1]} values, and {tower_source!r} gives {own[1]}; give the "
            f"--vision-tower that it was trained with"
        )
    say(f"the vision tower is that of {tower_source}")
    return spec, load_model(spec, {**ours, **_below("vision_tower.", tower)}, config.weights)


def _vgg(weights: Weights, config: ImportConfig, say: Say) -> Imported:
    _accept(config, "VGG16's weights")
    tokenizer = load_tokenizer(_require("--tokenizer", config.tokenizer, "the vocabulary of the LSTM"))
    preset = _with_settings(VGG_LSTM, config, DECODING)
    try:
        ours = import_torchvision(weights, attention=preset["attention"])
    except ValueError as error:
        raise CheckpointError(f"{config.weights!r}: {error}") from error
    size = config.image_size or preset["image_size"]
    model_config = preset | {"vocab_size": tokenizer.get_vocab_size(), "image_size": size}
    spec = _spec(model_config, tokenizer, _text(tokenizer, config), replace(IMAGES["vgg_lstm"], size=size))
    say("the LSTM is drawn anew: train it with jobs/train_vgg_lstm.py --init-from this folder")
    return spec, _with(spec, ours, config.weights)


def _of_towers(config: ImportConfig, say: Say) -> Imported:
    """Pretrained towers under what joins them, drawn anew: ClipCap's mapper, or the cross-attention of ViT-GPT2."""
    _accept(config, "towers")
    vision_config, image, tower = read_vision_tower(config.vision_tower, config.image_size)
    text_config, decoder = read_gpt2(config.text_decoder)
    tokenizer = _gpt2s(config.text_decoder)
    text = _text(tokenizer, config)
    preset = copy.deepcopy(PRESETS[config.architecture])
    sizes = {"vocab_size": text_config["vocab_size"], "num_positions": text_config["n_positions"]}
    if preset["model_type"] == "clip_gpt2":
        preset |= {"vision_config": vision_config, "text_config": text_config}
        preset = _with_settings(preset, config, (*FREEZING, *MAPPING))
        sizes["num_positions"] -= preset["prefix_length"]
        weights = _below("vision_tower.", tower) | _below("gpt.", decoder)
        fresh = "the mapper"
    else:
        _with_settings(preset, config, ())
        if vision_config["model_type"] != "vit":
            raise UserError(
                f"--architecture {config.architecture} reads a ViT, and {config.vision_tower!r} is none; give one"
            )
        vision_config["add_pooling_layer"] = False
        preset |= {"encoder": vision_config, "decoder": text_config | {"add_cross_attention": True, "is_decoder": True}}
        weights = _below("encoder.", tower) | _below("decoder.", decoder)
        fresh = "the cross-attention"
    model_config = complete_config(fresh_config(preset, text=text, image_size=image.size, **sizes), config.vision_tower)
    say(f"{fresh} is drawn anew: train it with --init-from this folder")
    spec = _spec(model_config, tokenizer, text, image)
    return spec, _with(spec, weights, f"{config.vision_tower} and {config.text_decoder}")


def _below(prefix: str, weights: Weights) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def _with_settings(model_config: dict[str, Any], config: ImportConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """The configuration with --settings in place of its own. Raises UserError for what it has no such setting for."""
    if not config.settings:
        return model_config
    try:
        given = json.loads(config.settings)
    except ValueError as error:
        raise UserError(f"--settings {config.settings!r} is no JSON ({error}); give an object in quotes") from error
    if not isinstance(given, dict):
        raise UserError(f'--settings {config.settings!r} is no JSON object; give one, such as {{"freeze_text": 6}}')
    changed = model_config | given
    if changed.get("mapper") != "transformer":
        names = tuple(name for name in names if name not in MAPPING[2:])
    if unknown := sorted(given.keys() - set(names)):
        raise UserError(
            f"--settings {config.settings!r} names {unknown[0]!r}; these weights take {', '.join(names) or 'none'}"
        )
    try:
        complete_config(changed, "--settings")
    except CheckpointError as error:
        raise UserError(f"--settings {config.settings!r} cannot be used: {error.__cause__}") from error
    return changed


def _meta(spec: CheckpointSpec, source: str) -> dict[str, Tensor]:
    """The shapes of the model, which is checked but not built: a size may be any number."""
    check_spec(spec, source)
    with torch.device("meta"):
        return build_model(spec.kind, spec.model_config).state_dict()


def _with(spec: CheckpointSpec, weights: Weights, source: str) -> CaptionModel:
    """A fresh model with these weights in place of some of its own, by the names it has in memory."""
    own = _meta(spec, source)
    wrong = [n for n, t in weights.items() if n not in own or own[n].shape != t.shape or not bool(t.isfinite().all())]
    if wrong:
        raise CheckpointError(
            f"the weights of {source!r} do not fit the model, or are not finite (first: {wrong[0]!r}); give others"
        )
    model = build_model(spec.kind, spec.model_config)
    model.load_state_dict(dict(weights), strict=False)
    return model


def _berts(config: ImportConfig, text_config: Mapping[str, Any]) -> Tokenizer:
    """BERT's tokenizer, with BLIP's two tokens behind its own or, as it is published, without them."""
    name = _require("--tokenizer", config.tokenizer, "BLIP's, for example Salesforce/blip-image-captioning-base")
    tokenizer, vocab_size = load_tokenizer(name), text_config["vocab_size"]
    if tokenizer.get_vocab_size() not in (vocab_size, vocab_size - 2) or (
        tokenizer.token_to_id("[SEP]") != text_config["sep_token_id"]
    ):
        raise UserError(
            f"--tokenizer {name!r} has {tokenizer.get_vocab_size()} tokens and [SEP] = {tokenizer.token_to_id('[SEP]')}, and these "
            f"weights have {vocab_size} and {text_config['sep_token_id']}; give that of bert-base-uncased, or of BLIP itself"
        )
    return tokenizer


def _gpt2s(name: str) -> Tokenizer:
    tokenizer = load_tokenizer(_require("--tokenizer", name, "GPT-2's, for example openai-community/gpt2"))
    if tokenizer.token_to_id(END_OF_TEXT) is None:
        raise UserError(
            f"the tokenizer of {name!r} has no {END_OF_TEXT}, so it is not GPT-2's; give openai-community/gpt2"
        )
    return tokenizer


def _text(tokenizer: Tokenizer, config: ImportConfig) -> TextSpec:
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


def _spec(model_config: dict[str, Any], tokenizer: Tokenizer, text: TextSpec, image: ImageSpec) -> CheckpointSpec:
    return CheckpointSpec(
        kind=model_config["model_type"],
        model_config=model_config,
        tokenizer=tokenizer,
        text=text,
        image=image,
        decode=DecodeSettings(),
    )


def _require(flag: str, value: str, why: str) -> str:
    if not value:
        raise UserError(f"these weights need {flag}: {why}")
    return value
