"""Folders in Hugging Face's layout, sealed or not: what every door and --init-from open. No code of a folder ever runs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycap import storage
from raycap.checkpoint.fit import Weights, settle_tied
from raycap.checkpoint.folder import local_copy, read_json, sha256_of_file, sha256_of_json, shown
from raycap.checkpoint.generation import FILE as GENERATION
from raycap.checkpoint.generation import read_generation
from raycap.checkpoint.layout import complete_config, read_image_spec, read_text_spec, with_pooler
from raycap.checkpoint.sealed import SEAL, load_checkpoint
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.checkpoint.weights import INDEX, check_weights, has_safetensors, read_and_hash, weight_files
from raycap.errors import CheckpointError
from raycap.schema import DecodeSettings
from raycap.text import load_tokenizer, tokenizer_files


def open_checkpoint(source: str, *, prompt: str = "") -> tuple[CheckpointSpec, Weights]:
    """A raycap folder, verified, or published weights in Hugging Face's layout, which nobody vouches for.

    source: a local folder, an s3:// root or a hub name. prompt: if not empty, in place of the checkpoint's own (published
    weights have none). Decode defaults of published weights: max_new_tokens, min_new_tokens, num_beams and length_penalty
    of generation_config.json, else 20 tokens by greedy search, which is what generate() of transformers 5 does with BLIP
    (it reads no max_length). Raises CheckpointError, StorageError.
    """
    return _open(source, {"prompt": prompt} if prompt else {})


def open_spec(source: str, *, prompt: str = "") -> CheckpointSpec:
    """The spec that open_checkpoint gives, of weights that are verified in the same way, found to fit it, and not held in memory."""
    return _open(source, {"prompt": prompt} if prompt else {}, keep=False)[0]


def import_published(source: str, *, prompt: str, max_tokens: int) -> tuple[CheckpointSpec, Weights]:
    """The same to train on from: the prompt is this one, empty or not. max_tokens: see TextSpec."""
    return _open(source, {"prompt": prompt, "max_tokens": max_tokens})


def _open(source: str, text: Mapping[str, Any], *, keep: bool = True) -> tuple[CheckpointSpec, Weights]:
    """text: fields of TextSpec that the caller has instead of the checkpoint's. keep: see read_file."""
    root = source if storage.is_url(source) else str(local_folder(source))
    if storage.exists(storage.join(root, SEAL)):
        spec, weights = load_checkpoint(root, keep=keep)
    else:
        with local_copy(root) as local:
            spec, weights = _read_published(local, source, text, keep)
    if not keep:  # nobody will make a model of them here
        check_weights(spec, weights, source)
    return replace(spec, text=replace(spec.text, **text)), weights


def local_folder(source: str, *, pickled: bool = False) -> Path:
    """The folder of a path, or where the hub's files of that name lie after their download. Raises CheckpointError.

    pickled: whether a hub's pytorch_model.bin may come in the place of safetensors, for jobs/import_weights.py.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path.absolute()
    folder = Path(_download_from_hub(source, "*.safetensors"))
    if pickled and not has_safetensors(folder):
        _download_from_hub(source, "pytorch_model*.bin")
    return folder


def _read_published(folder: Path, source: str, text: Mapping[str, Any], keep: bool) -> tuple[CheckpointSpec, Weights]:
    spec, digests = published_spec(folder, source, text)
    weights, fingerprint = read_published_weights(folder, source, digests, keep=keep)
    model_config, weights = settle_tied(with_pooler(spec.model_config, weights), weights)
    return replace(spec, model_config=model_config, fingerprint=fingerprint), weights


def read_published_weights(
    folder: Path, source: str, digests: Mapping[str, str], *, keep: bool = True
) -> tuple[Weights, str]:
    """The weights, and the fingerprint of the folder: sha256 (hex) over that of each file that was read. digests: of those that
    say what the weights are, by name. keep: see read_file.
    """
    names, weight_map = weight_files(folder, source)
    of_index = {INDEX: sha256_of_file(folder / INDEX)} if weight_map else {}
    weights, of_weights = read_and_hash([folder / name for name in names], source, weight_map, keep=keep)
    return weights, sha256_of_json({**digests, **of_index, **of_weights})


def published_spec(
    folder: Path, source: str, text: Mapping[str, Any] | None = None
) -> tuple[CheckpointSpec, dict[str, str]]:
    """What a folder in Hugging Face's layout says beside its weights, and the sha256 (hex) of the files that say it.

    text: fields of TextSpec that the caller has instead of the folder's; max_length counts the prompt.
    """
    refuse_adapter(folder, source)
    model_config = complete_config(read_json(folder / "config.json", source), source)
    refuse_incomplete(folder, source, model_config)
    preprocessor, image = read_image_spec(folder, source)
    spec = CheckpointSpec(
        kind=model_config["model_type"],
        model_config=model_config,
        tokenizer=load_tokenizer(str(folder)),
        text=replace(read_text_spec(model_config, source), **(text or {})),
        image=image,
        decode=DecodeSettings(),
        verified=False,
    )
    check_spec(spec, source)
    spec = read_generation(spec, folder, source)
    check_spec(spec, source)
    names = [
        "config.json",
        *tokenizer_files(str(folder)),
        preprocessor,
        *([GENERATION] if (folder / GENERATION).exists() else []),
    ]
    return spec, {name: sha256_of_file(folder / name) for name in names}


def refuse_adapter(folder: Path, source: str) -> None:
    """Raises CheckpointError for a folder of LoRA's differences from another model."""
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_json(folder / "adapter_config.json", source).get("base_model_name_or_path")
        raise CheckpointError(
            f"{source!r} is an adapter (LoRA) of {shown(base)} and no model: merge it with peft's "
            f"PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(folder), and give that folder"
        )


def refuse_incomplete(folder: Path, source: str, model_config: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a folder without preprocessing or tokenizer, as trainers leave it, with the files to copy."""
    image = ("preprocessor_config.json", "processor_config.json")
    missing = [] if any((folder / name).exists() for name in image) else [image[0]]
    text = ("tokenizer.json", "vocab.txt", "vocab.json")
    missing += [] if any((folder / name).exists() for name in text) else ["tokenizer.json", "tokenizer_config.json"]
    if not missing:
        return
    named = [model_config, *(part for part in model_config.values() if isinstance(part, dict))]
    bases = [part["_name_or_path"] for part in named if part.get("_name_or_path")]
    usual = {
        "blip": "Salesforce/blip-image-captioning-base",
        "vision-encoder-decoder": "nlpconnect/vit-gpt2-image-captioning",
    }
    base = f", {shown(bases[0])}" if bases else ""
    if not bases and model_config["model_type"] in usual:
        base = f", for example {usual[model_config['model_type']]!r} if it was that"
    raise CheckpointError(
        f"{source!r} holds no {' and no '.join(missing)}, as trainers leave it; copy {', '.join(missing)} into it from the model that it "
        f"was trained from{base}"
    )


def _download_from_hub(name: str, weights: str) -> str:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint folder at {name!r}: it does not exist; check the path, or give a hub name like 'owner/name'"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.md", weights])
    except Exception as error:  # the hub client has dozens of types here; each means the same to the user
        raise CheckpointError(
            f"cannot get {name!r} from the model hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}); check the name and the "
            f"network, or give a local folder"
        ) from error
