"""What a run starts from: published or earlier weights, or a fresh model of a named architecture. Runs on driver and workers."""

from dataclasses import replace
from typing import Any

import torch

from raycap import storage
from raycap.checkpoint import CheckpointSpec, import_published, load_model
from raycap.config import TrainConfig
from raycap.errors import UserError
from raycap.models import CaptionModel, build_model
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, load_tokenizer, role_ids

# vision and text widths, layers, heads and patch size; the feed-forward width is four times the model's, as in ViT and BERT.
# base is BLIP's ViT-B (Hugging Face's default BlipConfig).
ARCHITECTURES: dict[str, dict[str, int]] = {
    "tiny": {"width": 128, "vision_layers": 4, "text_layers": 2, "heads": 4, "patch_size": 16},
    "base": {"width": 768, "vision_layers": 12, "text_layers": 12, "heads": 12, "patch_size": 16},
}


def build_start(config: TrainConfig) -> tuple[CheckpointSpec, CaptionModel]:
    """The spec and model at step 0, the same on every rank. Raises UserError or CheckpointError."""
    torch.manual_seed(config.seed)
    if not config.init_from:
        spec = _fresh_spec(config)
        return spec, build_model(spec.kind, spec.model_config)
    spec, weights = import_published(config.init_from, prompt=config.prompt, max_tokens=config.max_tokens)
    if spec.image.size != config.image_size:
        raise UserError(
            f"--image-size {config.image_size} does not fit --init-from {config.init_from!r}, whose position embeddings are for "
            f"{spec.image.size} pixels; give --image-size {spec.image.size}"
        )
    spec = replace(
        spec,
        decode=_decode(config),
        image=replace(spec.image, decode=config.decode),
        text=replace(spec.text, clean=config.clean_captions),
        model_config=_with_smoothing(spec.model_config, config),
    )
    return spec, load_model(spec, weights, config.init_from)


def _fresh_spec(config: TrainConfig) -> CheckpointSpec:
    tokenizer = load_tokenizer(config.tokenizer)
    size = ARCHITECTURES[config.architecture]
    if config.image_size % size["patch_size"]:
        raise UserError(
            f"--image-size {config.image_size} is no multiple of the patch size {size['patch_size']} of --architecture "
            f"{config.architecture}; choose one that is"
        )
    bos_id, eos_id, pad_id = role_ids(tokenizer)
    from transformers import BlipConfig

    shared = {
        "hidden_size": size["width"],
        "intermediate_size": 4 * size["width"],
        "num_attention_heads": size["heads"],
    }
    model = BlipConfig(
        vision_config={
            **shared,
            "num_hidden_layers": size["vision_layers"],
            "patch_size": size["patch_size"],
            "image_size": config.image_size,
            "initializer_range": 0.02,  # timm's ViT; Hugging Face's default for BLIP is 1e-10, a tower that sees nothing
        },
        text_config={
            **shared,
            "num_hidden_layers": size["text_layers"],
            "encoder_hidden_size": size["width"],
            "vocab_size": tokenizer.get_vocab_size(),
            "max_position_embeddings": max(64, config.max_tokens + config.max_new_tokens),
            "bos_token_id": bos_id,
            "eos_token_id": eos_id,
            "sep_token_id": eos_id,
            "pad_token_id": pad_id,
        },
    )
    text = TextSpec(
        prompt=config.prompt,
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        max_tokens=config.max_tokens,
        clean=config.clean_captions,
    )
    return CheckpointSpec(
        kind="blip",
        model_config=_with_smoothing(model.to_dict(), config),
        tokenizer=tokenizer,
        text=text,
        image=ImageSpec(size=config.image_size, decode=config.decode),
        decode=_decode(config),
    )


def _decode(config: TrainConfig) -> DecodeSettings:
    return DecodeSettings(max_new_tokens=config.max_new_tokens)


def _with_smoothing(model_config: dict[str, Any], config: TrainConfig) -> dict[str, Any]:
    text = model_config["text_config"] | {"label_smoothing": config.label_smoothing}
    return model_config | {"text_config": text}


def state_root(config: TrainConfig) -> str:
    """Where Ray Train keeps the resumable state of a run."""
    return storage.join(config.out, "state")
