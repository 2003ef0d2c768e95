"""Folders in Hugging Face's layout, sealed or not: what every door and --init-from open. No code of a folder ever runs."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycap import storage
from raycap.checkpoint.folder import local_copy, read_json, sha256_of_file, sha256_of_json
from raycap.checkpoint.sealed import SEAL, load_checkpoint
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.checkpoint.weights import INDEX, Weights, read_weights, weight_files
from raycap.errors import CheckpointError
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, load_tokenizer

MAX_TOKENS = 40  # of a caption to train on: BLIP's (salesforce/BLIP, models/blip.py, forward)


def open_checkpoint(source: str, *, prompt: str = "") -> tuple[CheckpointSpec, Weights]:
    """A raycap folder, verified, or published weights in Hugging Face's layout, which nobody vouches for.

    source: a local folder, an s3:// root or a hub name. prompt: if not empty, in place of the checkpoint's own (published
    weights have none). Decode defaults of published weights: max_new_tokens, min_new_tokens, num_beams and length_penalty
    of generation_config.json, else 20 tokens by greedy search, which is what generate() of transformers 5 does with BLIP
    (it reads no max_length). Raises CheckpointError, StorageError.
    """
    return _open(source, {"prompt": prompt} if prompt else {})


def import_published(source: str, *, prompt: str, max_tokens: int) -> tuple[CheckpointSpec, Weights]:
    """The same to train on from: the prompt is this one, empty or not. max_tokens: see TextSpec."""
    return _open(source, {"prompt": prompt, "max_tokens": max_tokens})


def _open(source: str, text: Mapping[str, Any]) -> tuple[CheckpointSpec, Weights]:
    """text: fields of TextSpec that the caller has instead of the checkpoint's."""
    root = source
    if not storage.is_url(source):
        path = Path(source).expanduser()
        root = str(path.absolute()) if path.exists() else _download_from_hub(source)
    if storage.exists(storage.join(root, SEAL)):
        spec, weights = load_checkpoint(root)
    else:
        with local_copy(root) as local:
            spec, weights = _read_published(local, source)
    return replace(spec, text=replace(spec.text, **text)), weights


def _read_published(folder: Path, source: str) -> tuple[CheckpointSpec, Weights]:
    config = read_json(folder / "config.json", source)
    if config.get("model_type") != "blip":
        raise CheckpointError(
            f"{source!r} holds a model of type {config.get('model_type')!r}; raycap imports 'blip'; choose such a folder"
        )
    if "auto_map" in config:
        raise CheckpointError(
            f"config.json of {source!r} names code of its own (auto_map: {config['auto_map']!r}), which raycap does not run; choose "
            f"a folder of transformers' own BLIP"
        )
    model_config = _complete(config, source)
    text_config = model_config["text_config"]
    preprocessor, image = _image_spec(folder, source)
    weight_names, weight_map = weight_files(folder, source)
    read = ["config.json", "tokenizer.json", preprocessor, *([INDEX] if weight_map else []), *weight_names]
    spec = CheckpointSpec(
        kind="blip",
        model_config=model_config,
        tokenizer=load_tokenizer(str(folder)),
        text=TextSpec(
            prompt="",
            max_tokens=MAX_TOKENS,
            bos_id=text_config["bos_token_id"],
            eos_id=text_config["sep_token_id"],  # BLIP ends captions with [SEP]; its eos_token_id is a left-over
            pad_id=text_config["pad_token_id"],
        ),
        image=image,
        decode=_decode_settings(folder, source),
        verified=False,
        fingerprint=sha256_of_json({name: sha256_of_file(folder / name) for name in read}),
    )
    check_spec(spec, source)
    return spec, read_weights([folder / name for name in weight_names], source, weight_map)


def _complete(config: dict[str, Any], source: str) -> dict[str, Any]:
    """The config with the defaults that older exports leave out."""
    from transformers import BlipConfig

    try:
        complete: dict[str, Any] = BlipConfig.from_dict(config).to_dict()
    except Exception as error:  # its checks raise a dozen types
        raise CheckpointError(
            f"config.json of {source!r} is no configuration of BLIP ({' '.join(str(error).split())}); copy it again"
        ) from error
    return complete


def _image_spec(folder: Path, source: str) -> tuple[str, ImageSpec]:
    """The file that says how images are prepared, and what it says.

    It is preprocessor_config.json, or processor_config.json, where transformers 5 puts it.
    """
    name = "preprocessor_config.json"
    image = None
    if not (folder / name).exists() and (folder / "processor_config.json").exists():
        name = "processor_config.json"
        image = read_json(folder / name, source).get("image_processor")
    image = image if isinstance(image, dict) else read_json(folder / name, source)
    size = image.get("size")
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    if not isinstance(size, int) or not {"image_mean", "image_std"} <= image.keys():
        raise CheckpointError(
            f"{name} of {source!r} has no square size, image_mean and image_std (size: {image.get('size')!r}); raycap resizes "
            f"images to a square: choose a folder of BLIP's own preprocessing"
        )
    ours = {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_center_crop": False, "resample": 3}
    others = {key: image[key] for key, value in ours.items() if image.get(key) not in (None, value)}
    if not math.isclose(image.get("rescale_factor") or 1 / 255, 1 / 255, rel_tol=1e-6):
        others["rescale_factor"] = image["rescale_factor"]
    if others:
        raise CheckpointError(
            f"{name} of {source!r} asks for {others}; raycap resizes to a square, bicubic, scales by 1/255 and normalises: choose a "
            f"folder of BLIP's own preprocessing"
        )
    try:
        return name, ImageSpec.from_dict({"size": size, "mean": image["image_mean"], "std": image["image_std"]})
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"image_mean and image_std in {name} of {source!r} are not three numbers each ({error}); copy it again"
        ) from error


def _decode_settings(folder: Path, source: str) -> DecodeSettings:
    name = "generation_config.json"
    given = read_json(folder / name, source) if (folder / name).exists() else {}
    keys = ("max_new_tokens", "min_new_tokens", "num_beams", "length_penalty")
    try:
        return DecodeSettings(**{key: given[key] for key in keys if given.get(key) is not None})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{name} of {source!r} cannot be followed: {error}; correct it there") from error


def _download_from_hub(name: str) -> str:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint folder at {name!r}: it does not exist; check the path, or give a hub name like 'owner/name'"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.md", "*.safetensors"])
    except Exception as error:  # the hub client has dozens of types here; each means the same to the user
        raise CheckpointError(
            f"cannot get {name!r} from the model hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}); check the name and the "
            f"network, or give a local folder"
        ) from error
