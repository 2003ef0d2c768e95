"""One tiny model of each family with its CheckpointSpec, all of one tokenizer, and folders of them as raycap and as others write them."""

from pathlib import Path
from typing import Any

import torch
from tiny import tiny_checkpoint
from tiny_clip_gpt2 import tiny_clip_gpt2, tiny_config
from tiny_gpt2 import tiny_vit_gpt2_pair

from raycap.checkpoint import SEAL, CheckpointSpec, export_weights, save_checkpoint
from raycap.models import CaptionModel
from raycap.models.presets import VGG_LSTM_TINY
from raycap.models.vgg_lstm import VggLstm
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import text_spec, train_wordpiece

TOKENIZER = train_wordpiece(["a picture of two dogs and one red cat on the hill", "under a big blue kite, then"])
TEXT = text_spec(TOKENIZER)
ROLES = {"bos_token_id": TEXT.bos_id, "eos_token_id": TEXT.eos_id, "pad_token_id": TEXT.pad_id}
FAMILIES = ("blip", "clip_gpt2", "vit_gpt2", "vgg_lstm")
SETTINGS = DecodeSettings(max_new_tokens=12)


def tiny_family(name: str, prompt: str = "") -> tuple[CheckpointSpec, CaptionModel]:
    """In eval mode; each image has its own caption."""
    match name:
        case "blip":
            spec, blip, _ = tiny_checkpoint(prompt=prompt)
            return spec, blip
        case "clip_gpt2":
            return tiny_clip_gpt2_family(prompt=prompt)
        case "vit_gpt2":
            return tiny_vit_gpt2_family(prompt)
        case _:
            config = VGG_LSTM_TINY | {"vocab_size": TOKENIZER.get_vocab_size(), "image_size": 32}
            torch.manual_seed(0)
            return spec_of(config, prompt), VggLstm(config).eval()


def tiny_clip_gpt2_family(
    tower: str = "clip_vision_model", mapper: str = "mlp", *, prompt: str = "", **changes: Any
) -> tuple[CheckpointSpec, CaptionModel]:
    """changes: see tiny_config. Images are cut for CLIP and squashed for the others, as each was published."""
    changes = {"text_config": {"vocab_size": TOKENIZER.get_vocab_size(), **ROLES}, **changes}
    model = tiny_clip_gpt2(mapper, tower, seed=1, **changes)
    spec = spec_of(tiny_config(mapper, tower, **changes), prompt, "crop" if tower.startswith("clip") else "squash")
    return spec, model


def tiny_vit_gpt2_family(prompt: str = "", *, pooler: bool = True) -> tuple[CheckpointSpec, CaptionModel]:
    model, published = tiny_vit_gpt2_pair(pooler=pooler, vocab_size=TOKENIZER.get_vocab_size(), **ROLES)
    with torch.no_grad():  # random weights look at the text more than at the image
        for layer in model.decoder.transformer.h:
            layer.crossattention.c_proj.weight *= 4
    config = published.config.to_dict()
    config |= {"decoder_start_token_id": TEXT.bos_id, "eos_token_id": TEXT.eos_id, "pad_token_id": TEXT.pad_id}
    return spec_of(config, prompt), model


def spec_of(config: dict[str, Any], prompt: str = "", fit: Any = "squash") -> CheckpointSpec:
    return CheckpointSpec(
        kind=config["model_type"],
        model_config=config,
        tokenizer=TOKENIZER,
        text=text_spec(TOKENIZER, prompt=prompt),
        image=ImageSpec(size=32, fit=fit),
        decode=SETTINGS,
    )


def write_family(folder: Path, name: str, *, sealed: bool = True, prompt: str = "") -> Path:
    """A checkpoint folder; without its seal it is one that somebody published."""
    spec, model = tiny_family(name, prompt)
    save_checkpoint(str(folder), export_weights(model), spec, {"step": 1})
    if not sealed:
        (folder / SEAL).unlink()
    return folder
