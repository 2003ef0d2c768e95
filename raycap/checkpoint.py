"""The one checkpoint folder: save, load, verify, and import of published weights. safetensors and JSON only, never a pickle.

Hugging Face layout plus raycap.json, which is written last and names every file with its size and sha256. DeepSpeed's
sharded state is not in here: it lies apart and serves only to resume training.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from raycap import storage
from raycap.errors import CheckpointError, StorageError
from raycap.models import CaptionModel, build_model
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, load_tokenizer, save_tokenizer

FORMAT_VERSION = 1
SEAL = "raycap.json"
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """Everything about a model but its weights. verified: read from a folder whose raycap.json vouches for every file."""

    kind: str
    model_config: dict[str, Any]
    tokenizer: Tokenizer
    text: TextSpec
    image: ImageSpec
    decode: DecodeSettings
    verified: bool = True
    info: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(root: str, weights: Weights, spec: CheckpointSpec, info: Mapping[str, Any]) -> None:
    """Writes the folder `root` (local or s3://), replacing one that is there; a reader never sees half of it.

    weights: fp32 on the CPU, by Hugging Face's names. info: step, metrics, resolved config, data fingerprint: JSON.
    Raises StorageError.
    """
    with _new_folder(root) as folder:
        save_file(
            {k: v.contiguous() for k, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"}
        )
        (folder / "model.safetensors").chmod(0o644)  # the library writes 0600, which locks out others on shared storage
        save_tokenizer(spec.tokenizer, spec.text, str(folder))
        for name, content in _hugging_face_files(spec).items():
            _write_json(folder / name, content)
        (folder / "README.md").write_text(_model_card(spec, info))
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(folder.iterdir())}
        seal = {
            "format_version": FORMAT_VERSION,
            "kind": spec.kind,
            "image": spec.image.to_dict(),
            "text": asdict(spec.text),
            "decode": asdict(spec.decode),
            "info": dict(info),
            "versions": {name: version(name) for name in ("raycap", "torch", "transformers", "safetensors")},
            "files": files,
        }
        _write_json(folder / SEAL, seal | {"sha256": _seal_sha256(seal)})


def load_checkpoint(root: str) -> tuple[CheckpointSpec, Weights]:
    """What `save_checkpoint` wrote, verified file by file.

    Raises CheckpointError for a folder that is missing, is not a checkpoint, is of a later format, or is damaged.
    """
    with _local_copy(root) as folder:
        seal = _read_json(folder / SEAL, root)
        if seal.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {root!r} has format {seal.get('format_version')!r}, this raycap reads {FORMAT_VERSION}; install the "
                f"raycap that wrote it ({seal.get('versions', {}).get('raycap', 'unknown')})"
            )
        if seal.pop("sha256", None) != _seal_sha256(seal):
            raise CheckpointError(f"checkpoint {root!r} is damaged: {SEAL!r} is not as it was written; copy it again")
        _verify(folder, seal["files"], root)
        spec = CheckpointSpec(
            kind=seal["kind"],
            model_config=_read_json(folder / "config.json", root),
            tokenizer=load_tokenizer(str(folder)),
            text=TextSpec(**seal["text"]),
            image=ImageSpec.from_dict(seal["image"]),
            decode=DecodeSettings(**seal["decode"]),
            info=seal["info"],
        )
        # Only what the seal names: a file that somebody added is nobody's word.
        return spec, _read_weights([folder / name for name in sorted(seal["files"])], root)


def import_published(source: str, *, prompt: str, max_tokens: int) -> tuple[CheckpointSpec, Weights]:
    """Weights in Hugging Face's layout without raycap.json: a local folder, s3:// root or hub name. Unverified.

    A folder with raycap.json goes through `load_checkpoint`, with the given prompt and length. Raises CheckpointError.
    """
    folder = source if storage.is_url(source) or Path(source).is_dir() else _download_from_hub(source)
    if storage.exists(storage.join(folder, SEAL)):
        spec, weights = load_checkpoint(folder)
        text = TextSpec(**(asdict(spec.text) | {"prompt": prompt, "max_tokens": max_tokens}))
        return CheckpointSpec(**(vars(spec) | {"text": text})), weights
    with _local_copy(folder) as local:
        config = _read_json(local / "config.json", source)
        kind = config.get("model_type")
        if kind != "blip":
            raise CheckpointError(
                f"{source!r} holds a model of type {kind!r}; raycap imports 'blip'; choose such a folder"
            )
        from transformers import BlipConfig

        model_config = BlipConfig.from_dict(config).to_dict()  # older exports leave out what has its default
        text_config = model_config["text_config"]
        spec = CheckpointSpec(
            kind=kind,
            model_config=model_config,
            tokenizer=load_tokenizer(str(local)),
            text=TextSpec(
                prompt=prompt,
                max_tokens=max_tokens,
                bos_id=text_config["bos_token_id"],
                eos_id=text_config["sep_token_id"],  # BLIP ends captions with [SEP]; its eos_token_id is a left-over
                pad_id=text_config["pad_token_id"],
            ),
            image=_published_image_spec(local, source),
            decode=DecodeSettings(),
            verified=False,
        )
        return spec, _read_weights(sorted(local.iterdir()), source)


def _published_image_spec(folder: Path, source: str) -> ImageSpec:
    """What preprocessor_config.json says, or processor_config.json, where transformers 5 puts it."""
    if not (folder / "preprocessor_config.json").exists() and (folder / "processor_config.json").exists():
        name, image = "processor_config.json", _read_json(folder / "processor_config.json", source)
        image = image.get("image_processor", {})
    else:
        name, image = "preprocessor_config.json", _read_json(folder / "preprocessor_config.json", source)
    size = image.get("size")
    if isinstance(size, dict) and size.get("height") == size.get("width"):
        size = size.get("height")
    if not isinstance(size, int) or not {"image_mean", "image_std"} <= image.keys():
        raise CheckpointError(
            f"{name} of {source!r} has no square size, image_mean and image_std (size: {image.get('size')!r}); raycap resizes "
            f"images to a square: choose a folder of BLIP's own preprocessing"
        )
    return ImageSpec.from_dict({"size": size, "mean": image["image_mean"], "std": image["image_std"]})


def load_model(spec: CheckpointSpec, weights: Weights, source: str) -> CaptionModel:
    """The model of a checkpoint, on the CPU. Raises CheckpointError if the weights are not those of its config."""
    model = build_model(spec.kind, spec.model_config)
    own = model.state_dict()
    # Older exports carry position_ids, which are no weights; tied tensors may be stored under one of their names only.
    given = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    aliases = {t.data_ptr(): name for name, t in own.items() if name in given}
    missing = [name for name, t in own.items() if name not in given and t.data_ptr() not in aliases]
    unknown = [name for name in given if name not in own]
    shapes = [n for n, t in given.items() if n in own and own[n].shape != t.shape]
    if missing or unknown or shapes:
        raise CheckpointError(
            f"the weights of {source!r} do not fit its config.json: {len(missing)} missing, {len(unknown)} unknown, {len(shapes)} of "
            f"another shape (first: {(missing + unknown + shapes)[0]!r}); check that both files are of the same model"
        )
    model.load_state_dict(given, strict=False)
    return model


def export_weights(state: Weights) -> dict[str, Tensor]:
    """fp32 CPU copies of a state dict, each shared tensor once under its first name, as safetensors wants it."""
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {name: state[name].detach().to("cpu", torch.float32, copy=True) for name in seen.values()}


def _hugging_face_files(spec: CheckpointSpec) -> dict[str, dict[str, Any]]:
    """The JSON files plain transformers reads, v4 and v5."""
    image = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "BlipProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": spec.image.size, "width": spec.image.size},
        "resample": 3,  # bicubic
        "rescale_factor": 1 / 255,
        "image_mean": list(spec.image.mean),
        "image_std": list(spec.image.std),
    }
    return {
        "config.json": spec.model_config | {"architectures": ["BlipForConditionalGeneration"], "model_type": spec.kind},
        "generation_config.json": {
            "bos_token_id": spec.text.bos_id,
            "eos_token_id": spec.text.eos_id,
            "pad_token_id": spec.text.pad_id,
            "max_new_tokens": spec.decode.max_new_tokens,
            "num_beams": 1,
        },
        "preprocessor_config.json": image,
        "processor_config.json": {"processor_class": "BlipProcessor", "image_processor": image},
    }


def _model_card(spec: CheckpointSpec, info: Mapping[str, Any]) -> str:
    metrics = "\n".join(f"| {k} | {v:.4f} |" for k, v in info.get("metrics", {}).items() if isinstance(v, float))
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [image-captioning, raycap]
---
A {spec.kind} image captioner trained with raycap {version("raycap")}, step {info.get("step", "unknown")}.

Images are resized to {spec.image.size} x {spec.image.size} pixels. Prompt: {spec.text.prompt!r}.

| metric | value |
| --- | --- |
{metrics}
"""


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]], root: str) -> None:
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"checkpoint {root!r} lacks {name!r}, which its {SEAL} names; copy the folder again")
        if path.stat().st_size != expected["size"] or _sha256(path) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {root!r} is damaged: {name!r} is not the file its {SEAL} names by size and sha256; copy it again"
            )


def _read_weights(candidates: Sequence[Path], source: str) -> Weights:
    files = [path for path in candidates if path.suffix == ".safetensors"]
    if not files:
        raise CheckpointError(
            f"{source!r} holds no *.safetensors file; raycap loads no pickled weights: convert them with transformers' save_pretrained"
        )
    weights: dict[str, Tensor] = {}
    for path in files:
        try:
            weights |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name!r} of {source!r} cannot be read ({error}); copy the file again"
            ) from error
    return weights


def _read_json(path: Path, root: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{root!r} is no checkpoint folder: it holds no {path.name}; give the folder that training wrote, such as "
            f"<out>/checkpoint"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} in {root!r} cannot be read ({error}); copy the folder again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} in {root!r} holds no JSON object; copy the folder again")
    return content


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def _seal_sha256(seal: Mapping[str, Any]) -> str:
    """Of the seal's own fields, which hold the prompt and the image size: they must not change unnoticed either."""
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _local_copy(root: str) -> Iterator[Path]:
    if not storage.is_url(root):
        if not Path(root).is_dir():
            raise CheckpointError(
                f"no checkpoint folder at {root!r}: it does not exist; check the path, or train first"
            )
        yield Path(root)
        return
    with tempfile.TemporaryDirectory(prefix="raycap-checkpoint-") as folder:
        storage.download_folder(root, folder)
        yield Path(folder)


@contextmanager
def _new_folder(root: str) -> Iterator[Path]:
    """A folder to fill, which becomes `root` when the block ends well."""
    if storage.is_url(root):
        with tempfile.TemporaryDirectory(prefix="raycap-checkpoint-") as name:
            yield Path(name)
            if storage.exists(storage.join(root, SEAL)):
                storage.remove(storage.join(root, SEAL))  # from here until the new seal, readers refuse the folder
            storage.upload_folder(name, root, last=SEAL)
        return
    target = Path(root)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    stale = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        shutil.rmtree(fresh, ignore_errors=True)  # of a killed process that had our number, as in a new container
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            shutil.rmtree(stale, ignore_errors=True)
            target.rename(stale)
        try:
            fresh.rename(target)
        except OSError:
            if stale.exists():
                stale.rename(target)
            raise
        shutil.rmtree(stale, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write checkpoint {root!r}: {error}; free space or choose another --out") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _download_from_hub(name: str) -> str:
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise CheckpointError(
            f"no checkpoint folder at {name!r}: it does not exist; check the path, or give a hub name like 'owner/name'"
        )
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors"])
    except Exception as error:  # the hub client has dozens of types here; each means the same to the user
        raise CheckpointError(
            f"cannot get {name!r} from the model hub ({type(error).__name__}: {str(error).partition(chr(10))[0]}); check the name and the "
            f"network, or give a local folder"
        ) from error
