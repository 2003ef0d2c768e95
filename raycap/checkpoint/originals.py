"""Weights in the layouts of the research code that first published them, which are pickled torch files.

Owns reading such a file, and the conversion of Salesforce's BLIP to Hugging Face's names. Does not own files in Hugging
Face's layout (published.py) nor models (raycap/models). `read_pickled` is the only place where raycap reads a pickle that
somebody else wrote, and it runs none of it: no door opens one, and what is imported is saved as a checkpoint of
safetensors and JSON. (Training also reads back the state by which it resumes, which raycap itself wrote.)

Names and shapes are those of github.com/salesforce/BLIP: models/vit.py, models/med.py, models/blip.py and
models/blip_retrieval.py. LAVIS (github.com/salesforce/LAVIS, lavis/models/vit.py, med.py, blip_models) saves BLIP under
the same names, so its files are read by the same functions.
"""

import math
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raycap.checkpoint.folder import read_json, refuse_pointer
from raycap.errors import CheckpointError
from raycap.models.blip import TIED_NAMES

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name in the file -> (Hugging Face's name, shape)
Imported = tuple[dict[str, Any], dict[str, Tensor], list[str]]  # configuration, weights, names of what was dropped

PICKLED = "pytorch_model.bin"  # transformers' name of all weights of a model before safetensors
PARTS = "pytorch_model.bin.index.json"  # of such weights in several files: {"weight_map": {tensor: file}}
HEAD_WIDTH = 64  # of ViT-B, ViT-L and BERT base; the number of heads leaves no trace in the weights
MOST_EXPANSION = 10  # of a compressed file in memory: weights shrink by a tenth, a trap by a thousand
SEP_ID = 102  # [SEP] of bert-base-uncased, which ends captions; [DEC] and [ENC] come behind that vocabulary
# What a file may hold beside the model that is read: momentum copies and queues of negatives, and heads of the other one.
_BESIDE = r"(visual_encoder|text_encoder|vision_proj|text_proj)_m\.|(image_queue|text_queue|idx_queue|queue_ptr|ptr_queue|temp)$"
_NO_CAPTIONER = re.compile(rf"{_BESIDE}|(text_encoder|vision_proj|text_proj|itm_head)\.")
_NO_SCORER = re.compile(rf"{_BESIDE}|text_decoder\.")
_REFUSED_GLOBAL = re.compile(r"(?:GLOBAL|nsupported class) ([\w.]+)")


def read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all the files that PARTS names. Raises and warns as read_pickled does."""
    weight_map = read_json(index, str(index.parent)).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    if not names or any(Path(name).name != name or not (index.parent / name).is_file() for name in names):
        raise CheckpointError(
            f"{index.name} of {str(index.parent)!r} names files that are not there; copy the folder again"
        )
    return {name: tensor for part in names for name, tensor in read_pickled(index.parent / part).items()}


def read_pickled(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a local file that torch.save wrote, bare or below "model" or "state_dict".

    Read with weights_only=True whatever the environment says, which builds tensors and calls nothing else (torch 2.6 and
    later hold that promise: CVE-2025-32434). Tensors lie on the CPU in the dtype of the file; those of a zip file are
    mapped, so the file must stay as it is while they are used. Raises CheckpointError for a file that cannot be read, that
    holds anything but named dense tensors, or a value that is infinite or NaN. Warns of every file that is read.
    """
    path, source = Path(path), str(path)
    refuse_pointer(path, str(path.parent))
    content = _unpickle(path, source)
    below = [content[key] for key in ("model", "state_dict") if isinstance(content, dict) and key in content]
    state = next((value for value in below if isinstance(value, dict)), content)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(
            f"{source!r} holds {_kind_of(state)} where named tensors are expected; give a state dict, bare or below "
            f"'model' or 'state_dict'"
        )
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not _is_dense(tensor):
            raise CheckpointError(
                f"{source!r} holds {_kind_of(tensor)} under {name!r} where a dense tensor is expected; give a state dict, "
                f"bare or below 'model' or 'state_dict'"
            )
        if tensor.is_floating_point() and not math.isfinite(tensor.detach().sum(dtype=torch.float64)):
            raise CheckpointError(
                f"the weights of {source!r} are broken: {name!r} holds values that are infinite or NaN; choose another file"
            )
    warnings.warn(
        f"{source!r} is a pickled file, read with weights_only=True: its weights are only as trustworthy as its source",
        stacklevel=2,
    )
    return {name: tensor.detach() for name, tensor in state.items()}


def blip_from_salesforce(
    weights: Mapping[str, Tensor],
    source: str,
    *,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> Imported:
    """(configuration, weights, dropped) of a captioner, out of a fine-tuned or a pretraining checkpoint of BLIP.

    configuration: for transformers' BlipConfig.from_dict, with the original's own constants, some of which are not
    transformers' defaults: LayerNorm of the vision tower has epsilon 1e-6 there (not 1e-5), and text trains with dropout 0.1
    (not 0). weights: by the names of BlipForConditionalGeneration, each tied pair under its first name. dropped: names of
    the tensors that belong to other heads of the checkpoint.
    source: names the file in errors. image_size: in pixels; position embeddings are interpolated to it, without it they stay
    as they are. vision_heads, text_heads: needed where a width is no multiple of 64. Raises CheckpointError.
    """
    if any(name.startswith("text_encoder.") for name in weights) and "itm_head.weight" not in weights:
        raise CheckpointError(
            f"{source!r} holds a text encoder without itm_head, as BLIP for question answering does, whose decoder reads "
            f"questions and not images; choose a captioning or a pretraining checkpoint"
        )
    given, dropped = _without(_NO_CAPTIONER, weights)
    # Pretraining unties the output layer from the embeddings (models/blip_pretrain.py, tie_encoder_decoder_weights). The
    # loader of models/blip.py ties them again: the output layer is copied last, so it stays, and what it replaces may
    # even have another length.
    for second_name, name in TIED_NAMES.items():
        if second_name in given:
            given[name] = given.pop(second_name)
    vision, layout = _vision(given, source, vision_heads)
    text, text_layout = _text(given, source, text_heads, "text_decoder.bert.", vision["hidden_size"])
    D, head = text["hidden_size"], "text_decoder.cls.predictions"
    layout |= text_layout | _same(f"{head}.transform.dense", D, D) | _same(f"{head}.transform.LayerNorm", D)
    layout |= {f"{head}.bias": (f"{head}.bias", (text["vocab_size"],))}
    converted = _renamed(given, layout, source)
    _fit_positions(converted, vision, image_size, source)
    return {"model_type": "blip", "vision_config": vision, "text_config": text}, converted, dropped


def retrieval_from_salesforce(
    weights: Mapping[str, Tensor],
    source: str,
    *,
    image_size: int | None = None,
    vision_heads: int | None = None,
    text_heads: int | None = None,
) -> Imported:
    """(configuration, weights, dropped) of a scorer of images and texts, out of a retrieval or a pretraining checkpoint.

    weights: by the names of transformers' BlipForImageTextRetrieval, and of our BlipRetrieval. [ENC], with which a text
    begins that is matched, is token vocab_size - 1. All else as for blip_from_salesforce.
    """
    given, dropped = _without(_NO_SCORER, weights)
    vision, layout = _vision(given, source, vision_heads)
    text, text_layout = _text(given, source, text_heads, "text_encoder.", vision["hidden_size"])
    E, D = vision["hidden_size"], text["hidden_size"]
    W = _shape(given, "text_proj.weight", 2, source)[0]
    layout |= text_layout | _same("vision_proj", W, E) | _same("text_proj", W, D) | _same("itm_head", 2, D)
    converted = _renamed(given, layout, source)
    _fit_positions(converted, vision, image_size, source)
    config = {"model_type": "blip", "vision_config": vision, "text_config": text, "image_text_hidden_size": W}
    return config, converted, dropped


def _unpickle(path: Path, source: str) -> Any:
    if path.suffix == ".safetensors":  # torch.load would read it, and no pickle
        raise CheckpointError(
            f"{source!r} is no pickled file by its name; give the file that torch.save wrote, such as a .pth"
        )
    entries = _zip_entries(path)
    if entries and sum(entry.file_size for entry in entries) > MOST_EXPANSION * path.stat().st_size:
        raise CheckpointError(
            f"{source!r} is compressed to less than 1/{MOST_EXPANSION} of what it would take in memory, which no weights are; choose "
            f"another file"
        )
    # torch does not look for compression, and would map the wrong bytes.
    can_be_mapped = bool(entries) and all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=can_be_mapped)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(
            f"{source!r} cannot be read ({reason}); check the path, or copy the file again"
        ) from error
    except Exception as error:  # a damaged file raises a dozen types, and what torch advises is to trust the file
        refused = _REFUSED_GLOBAL.search(str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if refused:
            raise CheckpointError(
                f"{source!r} holds more than tensors: its pickle asks for {refused[1]!r}, which raycap does not run; choose a "
                f"file that holds a state dict alone"
            ) from error
        raise CheckpointError(
            f"{source!r} cannot be read as what torch.save writes: it is cut short, damaged or of another format; copy it again"
        ) from error


def _zip_entries(path: Path) -> list[zipfile.ZipInfo]:
    """What a whole zip file holds; nothing for any other file: older than torch 1.6, or damaged, and torch.load says which."""
    try:
        with zipfile.ZipFile(path) as file:
            return file.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return []


def _is_dense(tensor: Tensor) -> bool:
    """Also False for a view that repeats a few bytes as a large tensor, as no state dict holds one."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _kind_of(value: object) -> str:
    return "an empty dict" if value == {} else f"a value of type {type(value).__name__}"


def _without(beside: re.Pattern[str], weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The weights whose names do not match, and the names that do."""
    kept = {name: tensor for name, tensor in weights.items() if not beside.match(name)}
    return kept, [name for name in weights if name not in kept]


def _shape(weights: Mapping[str, Tensor], name: str, num_dimensions: int, source: str) -> tuple[int, ...]:
    """The shape of a tensor that sizes are read from."""
    if name not in weights:
        raise CheckpointError(
            f"{source!r} lacks {name!r}, so it holds no such BLIP in the layout of its authors; choose another file"
        )
    shape = tuple(weights[name].shape)
    if len(shape) != num_dimensions or 0 in shape:
        raise CheckpointError(
            f"{name!r} in {source!r} has shape {shape}, not {num_dimensions} dimensions of at least 1; choose another file"
        )
    return shape


def _num_heads(width: int, num_heads: int | None, part: str, source: str) -> int:
    if num_heads is None and width % HEAD_WIDTH == 0:
        return width // HEAD_WIDTH
    if num_heads is None or num_heads < 1 or width % num_heads:
        raise CheckpointError(
            f"the {part} of {source!r} is {width} wide, which {num_heads or 'no known number of'} heads do not divide as in BLIP "
            f"(64 each); give {part.partition(' ')[0]}_heads"
        )
    return num_heads


def _num_layers(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many different numbers follow the prefix."""
    return len({name[len(prefix) :].partition(".")[0] for name in weights if name.startswith(prefix)})


def _vision(weights: Mapping[str, Tensor], source: str, num_heads: int | None) -> tuple[dict[str, Any], Layout]:
    """vision_config and layout. visual_encoder of models/vit.py is timm's ViT."""
    old, new = "visual_encoder", "vision_model"
    E, channels, patch_size, height = _shape(weights, f"{old}.patch_embed.proj.weight", 4, source)
    num_tokens = _shape(weights, f"{old}.pos_embed", 3, source)[1]
    width = _shape(weights, f"{old}.blocks.0.mlp.fc1.weight", 2, source)[0]
    num_layers = _num_layers(weights, f"{old}.blocks.")
    side = math.isqrt(num_tokens - 1)
    if side < 1 or side * side != num_tokens - 1 or patch_size != height or channels != 3:
        raise CheckpointError(
            f"{source!r} has {num_tokens} positions for patches of {patch_size} x {height} with {channels} channels; raycap reads "
            f"BLIP of square colour images and a class token: choose another file"
        )
    config = {
        "hidden_size": E,
        "intermediate_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _num_heads(E, num_heads, "vision tower", source),
        "image_size": side * patch_size,
        "patch_size": patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    layout: Layout = {
        f"{old}.cls_token": (f"{new}.embeddings.class_embedding", (1, 1, E)),
        f"{old}.pos_embed": (f"{new}.embeddings.position_embedding", (1, num_tokens, E)),
    }
    layout |= _both(f"{old}.patch_embed.proj", f"{new}.embeddings.patch_embedding", E, 3, patch_size, patch_size)
    layout |= _both(f"{old}.norm", f"{new}.post_layernorm", E)
    for number in range(num_layers):
        block, layer = f"{old}.blocks.{number}", f"{new}.encoder.layers.{number}"
        layout |= _both(f"{block}.norm1", f"{layer}.layer_norm1", E)
        layout |= _both(f"{block}.attn.qkv", f"{layer}.self_attn.qkv", 3 * E, E)
        layout |= _both(f"{block}.attn.proj", f"{layer}.self_attn.projection", E, E)
        layout |= _both(f"{block}.norm2", f"{layer}.layer_norm2", E)
        layout |= _both(f"{block}.mlp.fc1", f"{layer}.mlp.fc1", width, E)
        layout |= _both(f"{block}.mlp.fc2", f"{layer}.mlp.fc2", E, width)
    return config, layout


def _text(
    weights: Mapping[str, Tensor], source: str, num_heads: int | None, prefix: str, encoder_width: int
) -> tuple[dict[str, Any], Layout]:
    """text_config, and the layout of BERT's embeddings and layers, whose names Hugging Face kept."""
    words = f"{prefix}embeddings.word_embeddings.weight"
    positions = f"{prefix}embeddings.position_embeddings.weight"
    V, D = _shape(weights, words, 2, source)
    num_positions = _shape(weights, positions, 2, source)[0]
    width = _shape(weights, f"{prefix}encoder.layer.0.intermediate.dense.weight", 2, source)[0]
    num_layers = _num_layers(weights, f"{prefix}encoder.layer.")
    config = {
        "vocab_size": V,
        "hidden_size": D,
        "encoder_hidden_size": encoder_width,
        "intermediate_size": width,
        "num_hidden_layers": num_layers,
        "num_attention_heads": _num_heads(D, num_heads, "text transformer", source),
        "max_position_embeddings": num_positions,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "pad_token_id": 0,
        "bos_token_id": V - 2,  # [DEC], then [ENC], added behind BERT's vocabulary (init_tokenizer in models/blip.py)
        "eos_token_id": SEP_ID,
        "sep_token_id": SEP_ID,
    }
    layout: Layout = {words: (words, (V, D)), positions: (positions, (num_positions, D))}
    layout |= _same(f"{prefix}embeddings.LayerNorm", D)
    for number in range(num_layers):
        layer = f"{prefix}encoder.layer.{number}"
        for block, source_width in (("attention", D), ("crossattention", encoder_width)):
            layout |= _same(f"{layer}.{block}.self.query", D, D)
            layout |= _same(f"{layer}.{block}.self.key", D, source_width)
            layout |= _same(f"{layer}.{block}.self.value", D, source_width)
            layout |= _same(f"{layer}.{block}.output.dense", D, D) | _same(f"{layer}.{block}.output.LayerNorm", D)
        layout |= _same(f"{layer}.intermediate.dense", width, D)
        layout |= _same(f"{layer}.output.dense", D, width) | _same(f"{layer}.output.LayerNorm", D)
    return config, layout


def _both(old: str, new: str, *shape: int) -> Layout:
    """Weight and bias of a linear layer, a convolution or a norm."""
    return {f"{old}.weight": (f"{new}.weight", shape), f"{old}.bias": (f"{new}.bias", shape[:1])}


def _same(name: str, *shape: int) -> Layout:
    return _both(name, name, *shape)


def _renamed(weights: Mapping[str, Tensor], layout: Layout, source: str) -> dict[str, Tensor]:
    """The weights by their new names. Raises CheckpointError unless they are those of the layout, all of them."""
    given = {name: tensor for name, tensor in weights.items() if not name.endswith(".position_ids")}  # arange, a buffer
    missing = [name for name in layout if name not in given]
    unknown = [name for name in given if name not in layout]
    other = [
        name
        for name, (_, shape) in layout.items()
        if name in given and (given[name].shape != shape or not given[name].is_floating_point())
    ]
    if missing or unknown or other:
        raise CheckpointError(
            f"the weights of {source!r} are not those of one BLIP in the layout of its authors: {len(missing)} missing, "
            f"{len(unknown)} unknown, {len(other)} of another shape or dtype (first: {(missing + unknown + other)[0]!r}); check "
            f"which model the file holds, or copy it again"
        )
    return {new: given[name] for name, (new, _) in layout.items()}


def _fit_positions(weights: dict[str, Tensor], vision: dict[str, Any], image_size: int | None, source: str) -> None:
    """Interpolates the position embeddings to another image size, in place, as interpolate_pos_embed of models/vit.py does.

    The class token's is kept; those of the patches are resized as a picture: bicubic, align_corners=False, no antialiasing.
    """
    if image_size is None or image_size == vision["image_size"]:
        return
    if image_size < 1 or image_size % vision["patch_size"]:
        raise CheckpointError(
            f"images of {image_size} pixels cannot be cut into the patches of {vision['patch_size']} that {source!r} was trained "
            f"with; give a multiple as --image-size"
        )
    name = "vision_model.embeddings.position_embedding"
    sides = (vision["image_size"] // vision["patch_size"], image_size // vision["patch_size"])
    weights[name] = resized_positions(weights[name], *sides)
    vision["image_size"] = image_size


def resized_positions(positions: Tensor, side: int, new_side: int) -> Tensor:
    """Position embeddings (..., [1 +] side^2, E) for new_side^2 patches: a class token's in front is kept."""
    if side == new_side:
        return positions
    num_extra = positions.shape[-2] - side**2
    positions_1LE = positions.view(1, *positions.shape[-2:])
    extra_1XE, patches_1PE = positions_1LE[:, :num_extra], positions_1LE[:, num_extra:]
    picture_1ESS = patches_1PE.to(torch.promote_types(patches_1PE.dtype, torch.float32)).mT.reshape(1, -1, side, side)
    resized_1ESS = F.interpolate(picture_1ESS, size=(new_side, new_side), mode="bicubic", align_corners=False)
    resized_1XE = torch.cat([extra_1XE, resized_1ESS.flatten(2).mT.to(patches_1PE.dtype)], dim=1)
    return resized_1XE.view(*positions.shape[:-2], *resized_1XE.shape[1:])
