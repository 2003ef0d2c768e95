"""Pretrained towers as somebody published them: CLIP, ViT, SigLIP, DINOv2 and GPT-2, loaded by transformers, for import alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raycap.checkpoint.folder import in_short, read_json, shown
from raycap.checkpoint.layout import read_image_spec
from raycap.checkpoint.originals import PICKLED, read_pickled, resized_positions
from raycap.checkpoint.published import local_folder
from raycap.checkpoint.weights import has_safetensors, weight_files
from raycap.errors import CheckpointError, UserError
from raycap.schema import ImageSpec

TOWERS = {  # model_type in the config.json of a published folder -> transformers' class of its vision tower
    "clip": "CLIPVisionModelWithProjection",
    "clip_vision_model": "CLIPVisionModelWithProjection",
    "vit": "ViTModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
}
POSITIONS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")


def read_vision_tower(source: str, image_size: int = 0) -> tuple[dict[str, Any], ImageSpec, dict[str, Tensor]]:
    """The configuration of a published tower, how it wants its images, and its weights by the names of transformers' module.

    image_size: 0 is that of its images. Position embeddings of another size are interpolated, as DINOv2 itself does at
    every pass. Raises CheckpointError, UserError.
    """
    import transformers

    folder = local_folder(source, pickled=True)
    kind = _kind(folder, source)
    if kind not in TOWERS:
        raise CheckpointError(
            f"{source!r} is a model of type {shown(kind)}; give one with a vision tower of {', '.join(TOWERS)}"
        )
    _, image = read_image_spec(folder, source)
    tower = _load(getattr(transformers, TOWERS[kind]), folder, source)
    config: dict[str, Any] = tower.config.to_dict()
    weights = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("pooler.dense.")}
    size = image_size or image.size
    if size % config["patch_size"]:
        raise UserError(
            f"--image-size {size} is no multiple of the patches of {config['patch_size']} pixels of {source!r}; give one that is"
        )
    (name,) = (name for name in weights if name.endswith(POSITIONS))
    sides = (config["image_size"] // config["patch_size"], size // config["patch_size"])
    weights[name] = resized_positions(weights[name], *sides)
    shorter_side = round(image.shorter_side * size / image.size)
    return config | {"image_size": size}, replace(image, size=size, shorter_side=shorter_side), weights


def read_gpt2(source: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a published GPT-2. Raises CheckpointError."""
    from transformers import GPT2LMHeadModel

    folder = local_folder(source, pickled=True)
    kind = _kind(folder, source)
    if kind != "gpt2":
        raise CheckpointError(f"{source!r} is a model of type {shown(kind)}; give a GPT-2 as --text-decoder")
    model = _load(GPT2LMHeadModel, folder, source)
    is_tied = model.lm_head.weight is model.transformer.wte.weight  # whatever its config.json says
    return model.config.to_dict() | {"tie_word_embeddings": is_tied}, dict(model.state_dict())


def _kind(folder: Path, source: str) -> Any:
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{source!r} holds no config.json; give the folder of a model as transformers writes it")
    return read_json(folder / "config.json", source).get("model_type")


def _load(kind: Any, folder: Path, source: str) -> Any:
    """A tower as transformers loads it, whole: every weight of it is in the folder, but for a pooler that nothing reads."""
    options = {"dtype": torch.float32, "output_loading_info": True}
    try:
        with _quiet():
            if (folder / PICKLED).exists() and not has_safetensors(folder):
                config = kind.config_class.from_pretrained(folder)
                model, report = kind.from_pretrained(
                    None, config=config, state_dict=read_pickled(folder / PICKLED), **options
                )
            else:
                weight_files(folder, source)  # safetensors, or what to do
                model, report = kind.from_pretrained(folder, use_safetensors=True, local_files_only=True, **options)
    except CheckpointError:
        raise
    except Exception as error:  # transformers raises a dozen types at a folder that is damaged or of another kind
        raise CheckpointError(f"{source!r} cannot be read ({in_short(error)}); copy it again") from error
    missing = [name for name in report["missing_keys"] if "pooler.dense" not in name]
    if missing or report["mismatched_keys"]:
        raise CheckpointError(
            f"{source!r} lacks weights that its config.json asks for (first: {[*missing, *report['mismatched_keys']][0]}); copy it again"
        )
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers lists the text tower that is left out, and draws a progress bar."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()  # type: ignore[no-untyped-call]
