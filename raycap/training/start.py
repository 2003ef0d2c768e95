"""What a run starts from: published or earlier weights, or a fresh model of a named architecture. Runs on driver and workers."""

from dataclasses import replace
from typing import Any

import torch

from raycap import storage
from raycap.checkpoint import CheckpointSpec, complete_config, fresh_config, import_published, load_model
from raycap.config import TrainConfig
from raycap.errors import UserError
from raycap.models import CaptionModel, build_model, model_sizes
from raycap.models.presets import IMAGES, PRESETS
from raycap.schema import DecodeSettings
from raycap.text import TextSpec, load_tokenizer, role_ids


def build_start(config: TrainConfig) -> tuple[CheckpointSpec, CaptionModel]:
    """The spec and model at step 0, the same on every rank. Raises UserError or CheckpointError."""
    torch.manual_seed(config.seed)
    if not config.init_from:
        spec = _fresh_spec(config)
        return spec, build_model(spec.kind, spec.model_config)
    spec, weights = import_published(config.init_from, prompt=config.prompt, max_tokens=config.max_tokens)
    if spec.image.size != config.image_size:
        raise UserError(
            f"--image-size {config.image_size} does not fit --init-from {config.init_from!r}, which reads images of "
            f"{spec.image.size} pixels; give --image-size {spec.image.size}"
        )
    spec = replace(
        spec,
        decode=_decode(config),
        image=replace(spec.image, decode=config.decode),
        text=replace(spec.text, clean=_clean(config, spec.text.clean)),
        model_config=_with_smoothing(spec.model_config, config),
    )
    return spec, load_model(spec, weights, config.init_from)


def _fresh_spec(config: TrainConfig) -> CheckpointSpec:
    tokenizer = load_tokenizer(config.tokenizer)
    preset = PRESETS[config.architecture]
    kind = preset["model_type"]
    patch_size = model_sizes(kind, preset).patch_size
    if config.image_size % patch_size:
        raise UserError(
            f"--image-size {config.image_size} is no multiple of the patch size {patch_size} of --architecture "
            f"{config.architecture}; choose one that is"
        )
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    text = TextSpec(
        prompt=config.prompt,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        max_tokens=config.max_tokens,
        clean=_clean(config, True),
    )
    fresh = fresh_config(
        preset,
        vocab_size=tokenizer.get_vocab_size(),
        num_positions=max(64, config.max_tokens + config.max_new_tokens),
        text=text,
        image_size=config.image_size,
    )
    return CheckpointSpec(
        kind=kind,
        model_config=_with_smoothing(complete_config(fresh, f"--architecture {config.architecture}"), config),
        tokenizer=tokenizer,
        text=text,
        image=replace(IMAGES[kind], size=config.image_size, decode=config.decode),
        decode=_decode(config),
    )


def _clean(config: TrainConfig, auto: bool) -> bool:
    return auto if config.clean_captions == "auto" else config.clean_captions == "on"


def _decode(config: TrainConfig) -> DecodeSettings:
    return DecodeSettings(max_new_tokens=config.max_new_tokens)


def _with_smoothing(model_config: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    part = {"blip": "text_config", "clip_gpt2": "text_config", "vision-encoder-decoder": "decoder"}
    smoothing = {"label_smoothing": config.label_smoothing}
    name = part.get(model_config["model_type"])
    return model_config | ({name: model_config[name] | smoothing} if name else smoothing)


def state_root(config: TrainConfig) -> str:
    """Where Ray Train keeps the resumable state of a run."""
    return storage.join(config.out, "state")
