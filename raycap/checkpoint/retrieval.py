"""The folder of BLIP's scorer in the layout of transformers' BlipForImageTextRetrieval: open it, write it. It has no seal."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from tokenizers import Tokenizer

from raycap import storage
from raycap.checkpoint.fit import Weights, fitted
from raycap.checkpoint.folder import in_short, local_copy, new_folder, read_json, sha256_of_file, shown, write_json
from raycap.checkpoint.layout import (
    SCORER,
    complete_config,
    image_processor,
    is_scorer,
    read_image_spec,
    read_text_spec,
)
from raycap.checkpoint.published import local_folder, read_published_weights, refuse_adapter, refuse_incomplete
from raycap.checkpoint.weights import write_weights
from raycap.errors import CheckpointError
from raycap.models.blip_retrieval import BlipRetrieval
from raycap.schema import ImageSpec
from raycap.text import CLS, ENC, SEP, load_tokenizer, save_tokenizer, tokenizer_files


@dataclass(frozen=True, kw_only=True)
class ScorerSpec:
    """Everything about a scorer but its weights. enc_id: the first token of a text that is matched, in place of cls_id.

    fingerprint: as CheckpointSpec's; "" of a scorer that was read from no folder.
    """

    model_config: dict[str, Any]
    tokenizer: Tokenizer
    image: ImageSpec
    cls_id: int
    sep_id: int
    enc_id: int
    pad_id: int
    fingerprint: str = ""


def scorer_spec(model_config: dict[str, Any], tokenizer: Tokenizer, image: ImageSpec, source: str) -> ScorerSpec:
    """Raises CheckpointError if the tokenizer is not BERT's or is not the model's, or images are of another size."""
    config = complete_config(model_config, source, scorer=True)
    text, size = config["text_config"], config["vision_config"]["image_size"]
    cls_id, sep_id = (tokenizer.token_to_id(token) for token in (CLS, SEP))
    if cls_id is None or sep_id is None or tokenizer.get_vocab_size() > text["vocab_size"]:
        raise CheckpointError(
            f"the tokenizer of {source!r} has no {CLS} and {SEP}, or more than the {text['vocab_size']} tokens of the model; give "
            f"BERT's"
        )
    if image.size != size:
        raise CheckpointError(
            f"{source!r} prepares images of {image.size} pixels for a tower of {size}; check preprocessor_config.json"
        )
    enc_id = tokenizer.token_to_id(ENC)
    return ScorerSpec(
        model_config=config,
        tokenizer=tokenizer,
        image=image,
        cls_id=cls_id,
        sep_id=sep_id,
        # Published tokenizers lack it; it is the last of the vocabulary (salesforce/BLIP, models/blip.py, init_tokenizer).
        enc_id=text["vocab_size"] - 1 if enc_id is None else enc_id,
        pad_id=text["pad_token_id"],
    )


def open_scorer(source: str) -> tuple[ScorerSpec, BlipRetrieval]:
    """The scorer of a folder or hub name, on the CPU, in float32 and eval mode. Raises CheckpointError, StorageError."""
    spec, weights = _open(source)
    return spec, load_scorer(spec, weights, source)


def open_scorer_spec(source: str) -> ScorerSpec:
    """The spec that open_scorer gives, of weights that are read in the same way, found to fit it, and not held in memory."""
    spec, weights = _open(source, keep=False)
    fitted(_outline(spec, source), weights, source)
    return spec


def _open(source: str, *, keep: bool = True) -> tuple[ScorerSpec, Weights]:
    with local_copy(source if storage.is_url(source) else str(local_folder(source))) as folder:
        refuse_adapter(folder, source)
        config = read_json(folder / "config.json", source)
        refuse_incomplete(folder, source, config)
        if not is_scorer(config):
            raise CheckpointError(
                f"{source!r} is of {shown(config.get('architectures'))}; a scorer is a {SCORER}, such as "
                f"Salesforce/blip-itm-base-coco"
            )
        preprocessor, image = read_image_spec(folder, source)
        spec = scorer_spec(config, load_tokenizer(str(folder)), image, source)
        digests = {
            name: sha256_of_file(folder / name) for name in ("config.json", *tokenizer_files(str(folder)), preprocessor)
        }
        weights, fingerprint = read_published_weights(folder, source, digests, keep=keep)
    return replace(spec, fingerprint=fingerprint), weights


def load_scorer(spec: ScorerSpec, weights: Weights, source: str) -> BlipRetrieval:
    """Raises CheckpointError if the weights are not those of the config, or are not finite."""
    model = _outline(spec, source)
    given = fitted(model, weights, source)
    broken = [name for name, tensor in given.items() if not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"the weights of {source!r} are broken: {shown(broken[0])} holds values that are infinite or NaN; choose another checkpoint"
        )
    model.load_state_dict({name: tensor.to(torch.float32) for name, tensor in given.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _outline(spec: ScorerSpec, source: str) -> BlipRetrieval:
    """The model on the meta device."""
    from transformers import BlipConfig

    try:
        with torch.device("meta"):
            return BlipRetrieval(BlipConfig.from_dict(spec.model_config))
    except Exception as error:  # transformers' config classes and torch's modules raise a dozen types at odd values
        raise CheckpointError(
            f"no scorer can be built from config.json of {source!r} ({in_short(error)}); copy it again"
        ) from error


def save_scorer(root: str, spec: ScorerSpec, weights: Weights) -> None:
    """A folder that open_scorer and plain transformers read; it appears whole. Raises StorageError."""
    with new_folder(root, last="config.json") as folder:
        write_weights(folder, weights)
        save_tokenizer(spec.tokenizer, read_text_spec(spec.model_config, root), str(folder))
        write_json(folder / "preprocessor_config.json", image_processor(spec.image, "blip"))
        write_json(folder / "config.json", spec.model_config | {"architectures": [SCORER]})
