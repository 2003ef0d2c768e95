"""How each kind of model lies in a folder in Hugging Face's layout: what its JSON files say, written and read. Reads no weights."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycap.checkpoint.folder import in_short, read_json, shown
from raycap.checkpoint.generation import generation_config
from raycap.checkpoint.spec import CheckpointSpec
from raycap.errors import CheckpointError
from raycap.models import hub
from raycap.schema import ImageSpec
from raycap.text import TextSpec

MAX_TOKENS = 40  # of a caption to train on: BLIP's (salesforce/BLIP, models/blip.py, forward)
ARCHITECTURES = {  # the one entry of "architectures" in config.json
    "blip": "BlipForConditionalGeneration",
    "clip_gpt2": hub.ARCHITECTURE,
    "vision-encoder-decoder": "VisionEncoderDecoderModel",
    "vgg_lstm": "VggLstm",
}
SCORER = "BlipForImageTextRetrieval"  # in "architectures" of a model that captions nothing
_RESAMPLES = {2: "bilinear", 3: "bicubic"}  # PIL.Image.Resampling
_CROPS = {"resample": 3, "do_center_crop": True, "crop_size": 224}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of transformers' image processors, for what a file leaves out
    "Bit": _CROPS,
    "Blip": {"resample": 3},
    "CLIP": _CROPS,
    "Siglip": {"resample": 3},
    "ViT": {"resample": 2},
}
_BY_SHORTER_SIDE = ("Bit", "CLIP", "Siglip")  # those that take a size of one number for the shorter side
_PROCESSORS = {  # model_type in config.json -> the image processor that transformers chooses where the file names none
    "blip": "Blip",
    "clip": "CLIP",
    "clip_vision_model": "CLIP",
    "dinov2": "Bit",
    "siglip": "Siglip",
    "siglip_vision_model": "Siglip",
    "vit": "ViT",
}


def hugging_face_files(spec: CheckpointSpec) -> dict[str, dict[str, Any]]:
    """The JSON files plain transformers reads, v4 and v5, but for the tokenizer's."""
    image = image_processor(spec.image, spec.kind)
    processor = {"blip": "BlipProcessor", "clip_gpt2": hub.PROCESSOR}.get(spec.kind)
    if processor:
        image["processor_class"] = processor
    config = spec.model_config | {"architectures": [ARCHITECTURES[spec.kind]], "model_type": spec.kind}
    files = {"generation_config.json": generation_config(spec), "preprocessor_config.json": image}
    if processor:
        files["processor_config.json"] = {"processor_class": processor, "image_processor": image}
    if spec.kind == "clip_gpt2":
        config["auto_map"] = hub.CONFIG_AUTO_MAP
        files["processor_config.json"]["auto_map"] = hub.PROCESSOR_AUTO_MAP
    return {"config.json": config, **files}


def code_files(spec: CheckpointSpec) -> dict[str, str]:
    """Modules that plain transformers needs for models it does not know: name -> content."""
    return hub.module_texts() if spec.kind == "clip_gpt2" else {}


def image_processor(image: ImageSpec, kind: str) -> dict[str, Any]:
    """preprocessor_config.json of a model of this kind."""
    size = {"height": image.size, "width": image.size}
    cropped = {"size": {"shortest_edge": image.shorter_side or image.size}, "do_center_crop": True, "crop_size": size}
    squashed = {"size": size}
    name = "CLIP" if image.fit == "crop" else "Blip" if kind == "blip" else "ViT"
    return {
        "image_processor_type": f"{name}ImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        **(cropped if image.fit == "crop" else squashed),
        "resample": {name: number for number, name in _RESAMPLES.items()}[image.resample],
        "rescale_factor": 1 / 255,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }


def is_scorer(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is of BLIP's scorer, which is told from the captioner by its class alone."""
    return config.get("architectures") == [SCORER]


def complete_config(config: Mapping[str, Any], source: str, *, scorer: bool = False) -> dict[str, Any]:
    """A published config.json with the defaults that older exports leave out. Raises CheckpointError."""
    kind = config.get("model_type")
    if is_scorer(config) and not scorer:
        raise CheckpointError(
            f"{source!r} is a scorer of images and texts, which captions nothing; open it with raycap.Scorer"
        )
    auto_map = config.get("auto_map")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(
            f"{source!r} holds a model of type {shown(kind)}; raycap imports {', '.join(ARCHITECTURES)}; choose such a folder"
        )
    if auto_map is not None and (kind != "clip_gpt2" or auto_map != hub.CONFIG_AUTO_MAP):
        raise CheckpointError(
            f"config.json of {source!r} names code of its own (auto_map: {shown(auto_map)}), which raycap does not run; choose a "
            f"folder without it"
        )
    try:
        return _complete(kind, {name: value for name, value in config.items() if name != "auto_map"})
    except Exception as error:  # transformers' checks raise a dozen types
        raise CheckpointError(
            f"config.json of {source!r} is no configuration of a {kind} model ({in_short(error)}); copy it again"
        ) from error


def _complete(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    complete: dict[str, Any]
    match kind:
        case "blip":
            from transformers import BlipConfig

            complete = BlipConfig.from_dict(config).to_dict()
        case "vision-encoder-decoder":
            from transformers import VisionEncoderDecoderConfig

            complete = VisionEncoderDecoderConfig.from_dict(config).to_dict()
        case "clip_gpt2":
            from raycap.models.hub.configuration_clip_gpt2 import ClipGpt2Config

            complete = ClipGpt2Config.from_dict(config).to_dict()
        case _:
            from raycap.models.vgg_lstm import VggLstmConfig

            VggLstmConfig.from_dict(config)
            complete = config
    return complete


def fresh_config(
    preset: Mapping[str, Any], *, vocab_size: int, num_positions: int, text: TextSpec, image_size: int
) -> dict[str, Any]:
    """A preset for another vocabulary, length of texts (in tokens, the first included) and side of images in pixels."""
    kind = preset["model_type"]
    ids = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": text.pad_id}
    words = {"vocab_size": vocab_size, **ids}
    match kind:
        case "blip":
            words |= {"sep_token_id": text.eos_id, "max_position_embeddings": num_positions}
            parts = {"text_config": words, "vision_config": {"image_size": image_size}}
        case "clip_gpt2":
            words["n_positions"] = num_positions + preset["prefix_length"]
            parts = {"text_config": words, "vision_config": {"image_size": image_size}}
        case "vision-encoder-decoder":
            words["n_positions"] = num_positions
            parts = {"decoder": words, "encoder": {"image_size": image_size}}
        case _:
            return {**preset, "vocab_size": vocab_size, "image_size": image_size}
    changed = {name: {**preset[name], **values} for name, values in parts.items()}
    top = {"decoder_start_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": text.pad_id}
    return {**preset, **changed, **(top if kind == "vision-encoder-decoder" else {})}


def with_pooler(config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """A ViT-GPT2 config that says whether the weights of these names hold the tower's pooler, which config.json alone does not."""
    if config["model_type"] != "vision-encoder-decoder":
        return dict(config)
    has_pooler = any(name.endswith("encoder.pooler.dense.weight") for name in names)  # behind a wrapper's prefix too
    encoder = config["encoder"] | {"add_pooling_layer": has_pooler}
    return {**config, "encoder": encoder}


_TIES = {  # the parts of config.json whose tie_word_embeddings ties the words; one that is true is enough
    "blip": ("", "text_config"),
    "clip_gpt2": ("", "text_config"),
    "vision-encoder-decoder": ("decoder",),  # its own is about encoder and decoder, and always false
}


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether the output layer and the word embeddings of a complete config are one tensor."""
    parts = [config[name] if name else config for name in _TIES.get(config["model_type"], ())]
    return any(part.get("tie_word_embeddings", True) for part in parts)


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose output layer and word embeddings are two tensors, for transformers too."""
    changed = dict(config)
    for name in _TIES[config["model_type"]]:
        changed |= {name: config[name] | {"tie_word_embeddings": False}} if name else {"tie_word_embeddings": False}
    return changed


def read_text_spec(config: Mapping[str, Any], source: str) -> TextSpec:
    """The roles of special tokens, from a complete config. Raises CheckpointError."""
    try:
        match config["model_type"]:
            case "blip":
                text = config["text_config"]
                # BLIP ends captions with [SEP]; its eos_token_id is a left-over
                bos, eos, pad = text["bos_token_id"], text["sep_token_id"], text["pad_token_id"]
            case "vision-encoder-decoder":
                decoder = config["decoder"]
                eos = _first(config.get("eos_token_id"), decoder.get("eos_token_id"))
                bos = _first(config.get("decoder_start_token_id"), decoder.get("bos_token_id"))
                pad = _first(config.get("pad_token_id"), decoder.get("pad_token_id"), eos)
            case "clip_gpt2":
                text = config["text_config"]
                bos, eos = text["bos_token_id"], text["eos_token_id"]
                pad = _first(text.get("pad_token_id"), eos)
            case kind:
                raise CheckpointError(
                    f"{source!r} is a {kind} folder without raycap.json, which alone says what its tokens mean; copy it whole"
                )
    except KeyError as error:
        raise CheckpointError(f"config.json of {source!r} lacks {error}; copy it again") from error
    spec = TextSpec(prompt="", max_tokens=MAX_TOKENS, bos_id=bos, eos_id=eos, pad_id=pad)
    return spec if config["model_type"] == "blip" else replace(spec, clean=False, max_words=None)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def read_image_spec(folder: Path, source: str) -> tuple[str, ImageSpec]:
    """The file that says how images are prepared, and what it says.

    It is preprocessor_config.json, or processor_config.json, where transformers 5 puts it. Raises CheckpointError.
    """
    name = "preprocessor_config.json"
    image = None
    if not (folder / name).exists() and (folder / "processor_config.json").exists():
        name = "processor_config.json"
        image = read_json(folder / name, source).get("image_processor")
    image = image if isinstance(image, dict) else read_json(folder / name, source)
    kind = _processor(image, folder, source)
    image = _DEFAULTS.get(kind, {}) | image
    try:
        square = _square(image, by_shorter_side=kind in _BY_SHORTER_SIDE)
        mean, std = image["image_mean"], image["image_std"]
    except (KeyError, ValueError) as error:
        raise CheckpointError(
            f"{name} of {source!r} has no square size, image_mean and image_std ({in_short(error)}); raycap resizes images to a square, "
            f"or their shorter side and cuts out the middle: choose a folder that asks for either"
        ) from error
    resample: Any = image.get("resample")
    scale = image.get("rescale_factor") or 1 / 255
    ours = {"do_resize": True, "do_rescale": True, "do_normalize": True}
    others = {key: image[key] for key, value in ours.items() if image.get(key) not in (None, value)}
    if not isinstance(resample, int) or resample not in _RESAMPLES:
        others["resample"] = resample
    if not isinstance(scale, int | float) or not abs(255 * scale - 1) < 1e-6:
        others["rescale_factor"] = scale
    if others:
        raise CheckpointError(
            f"{name} of {source!r} asks for {shown(others)}; raycap resizes bicubic or bilinear, scales by 1/255 and normalises: choose a "
            f"folder of such preprocessing"
        )
    try:
        spec = ImageSpec.from_dict({**square.to_dict(), "mean": mean, "std": std, "resample": _RESAMPLES[resample]})
        if not all(map(math.isfinite, (*spec.mean, *spec.std))) or min(spec.std) <= 0:
            raise ValueError("finite ones, and image_std above 0")
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"image_mean and image_std in {name} of {source!r} are not three numbers each ({in_short(error)}); copy it again"
        ) from error
    return name, spec


def _processor(image: Mapping[str, Any], folder: Path, source: str) -> str:
    """The name of the image processor, as in _DEFAULTS: of the file, else what goes with the model; "" if none is known."""
    named = image.get("image_processor_type") or image.get("feature_extractor_type")
    if named:
        return re.sub("(ImageProcessor|FeatureExtractor).*", "", str(named))
    config: Any = read_json(folder / "config.json", source)
    if config.get("model_type") == "vision-encoder-decoder":  # of which transformers knows none; its encoder's
        config = config.get("encoder")
    kind = config.get("model_type") if isinstance(config, dict) else None
    return _PROCESSORS.get(kind, "") if isinstance(kind, str) else ""


def _square(image: Mapping[str, Any], *, by_shorter_side: bool) -> ImageSpec:
    """How an image becomes a square, the other fields at their defaults. Raises ValueError where it does not become one.

    by_shorter_side: what a size of one number means.
    """
    size, crop_size = image.get("size"), image.get("crop_size")
    if isinstance(size, dict):
        by_shorter_side = size.get("shortest_edge") is not None
    side = _side(size, "shortest_edge") if by_shorter_side else _side(size, "height", "width")
    crop = _side(crop_size, "height", "width") if image.get("do_center_crop") else None
    if by_shorter_side and side and crop:
        return ImageSpec(size=crop, fit="crop", shorter_side=0 if side == crop else side)
    if by_shorter_side or not side or (image.get("do_center_crop") and crop != side):
        raise ValueError(f"size: {shown(size)}, crop_size: {shown(crop_size)}")
    return ImageSpec(size=side)


def _side(size: Any, *names: str) -> int | None:
    """S of a number S, or of {name: S} with all of these names and no other; None if it is neither, or S below 1."""
    if isinstance(size, dict):
        given = {name: value for name, value in size.items() if value is not None}
        same = given.keys() == set(names) and all(value == given[names[0]] for value in given.values())
        size = given[names[0]] if same else None
    return size if type(size) is int and size > 0 else None
