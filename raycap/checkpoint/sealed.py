"""Our own checkpoint folder: Hugging Face layout, sealed by raycap.json, which names every file and itself by sha256."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from raycap.checkpoint.card import model_card
from raycap.checkpoint.fit import Weights, settle_tied
from raycap.checkpoint.folder import local_copy, new_folder, read_json, sha256_of_file, sha256_of_json, write_json
from raycap.checkpoint.layout import code_files, hugging_face_files
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.checkpoint.weights import read_file, write_weights
from raycap.errors import CheckpointError
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, load_tokenizer, save_tokenizer

FORMAT_VERSION = 1
SEAL = "raycap.json"


def save_checkpoint(root: str, weights: Weights, spec: CheckpointSpec, info: Mapping[str, Any]) -> None:
    """Writes the folder `root` (local or s3://), replacing one that is there; a reader never sees half of it.

    weights: fp32 on the CPU, by Hugging Face's names. info: step, metrics, resolved config, data fingerprint: JSON.
    Raises StorageError.
    """
    with new_folder(root, last=SEAL) as folder:
        write_weights(folder, weights)
        save_tokenizer(spec.tokenizer, spec.text, str(folder))
        for name, content in hugging_face_files(spec).items():
            write_json(folder / name, content)
        for name, text in code_files(spec).items():
            (folder / name).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(model_card(spec, info))
        files = {p.name: {"size": p.stat().st_size, "sha256": sha256_of_file(p)} for p in sorted(folder.iterdir())}
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
        # The seal's own fields hold the prompt and the image size: they must not change unnoticed either.
        write_json(folder / SEAL, seal | {"sha256": sha256_of_json(seal)})


def load_checkpoint(root: str, *, keep: bool = True) -> tuple[CheckpointSpec, Weights]:
    """What `save_checkpoint` wrote, verified file by file. Without keep the weights are on the meta device.

    Raises CheckpointError for a folder that is missing, is not a checkpoint, is of a later format, or is damaged.
    """
    with local_copy(root) as folder:
        seal = read_json(folder / SEAL, root)
        found = seal.get("format_version")
        if isinstance(found, int) and found != FORMAT_VERSION:
            raise CheckpointError(
                f"{SEAL} of checkpoint {root!r} has format {found}, this raycap reads {FORMAT_VERSION}; install the raycap that wrote "
                f"it ({_writer(seal)})"
            )
        fingerprint = seal.pop("sha256", None)
        if found != FORMAT_VERSION or fingerprint != sha256_of_json(seal):
            raise CheckpointError(f"checkpoint {root!r} is damaged: {SEAL!r} is not as it was written; copy it again")
        try:
            _verify(folder, seal["files"], root)
            spec = CheckpointSpec(
                kind=seal["kind"],
                model_config=read_json(folder / "config.json", root),
                tokenizer=load_tokenizer(str(folder)),
                text=TextSpec(**seal["text"]),
                image=ImageSpec.from_dict(seal["image"]),
                decode=DecodeSettings(**seal["decode"]),  # fields it lacks are younger than it, and have their defaults
                fingerprint=fingerprint,
                info=seal["info"],
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{SEAL} of {root!r} holds what this raycap does not read ({error}); install the raycap that wrote it "
                f"({_writer(seal)})"
            ) from error
        check_spec(spec, root)
        weights: dict[str, Tensor] = {}
        for name in sorted(filter(_holds_weights, seal["files"])):  # a file that somebody added is nobody's word
            weights |= _read_verified(folder / name, seal["files"][name], root, keep)
        model_config, settled = settle_tied(spec.model_config, weights)
        return replace(spec, model_config=model_config), settled


def _writer(seal: Mapping[str, Any]) -> str:
    versions = seal.get("versions")
    return str(versions.get("raycap", "unknown")) if isinstance(versions, dict) else "unknown"


def _verify(folder: Path, files: Mapping[str, Mapping[str, Any]], root: str) -> None:
    """Every file's size and, but for those of weights, its sha256."""
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise CheckpointError(f"checkpoint {root!r} lacks {name!r}, which its {SEAL} names; copy the folder again")
        size, digest = expected["size"], expected["sha256"]
        if path.stat().st_size != size or not (_holds_weights(name) or sha256_of_file(path) == digest):
            raise _damaged(name, root)


def _holds_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _read_verified(path: Path, expected: Mapping[str, Any], root: str, keep: bool) -> dict[str, Tensor]:
    """The tensors of a file, made of the very bytes that were hashed. A file that is damaged is called that, readable or not."""
    try:
        weights, digest = read_file(path, root, keep=keep)
    except CheckpointError:
        with suppress(OSError):  # then it cannot be read, which was said
            if sha256_of_file(path) != expected["sha256"]:
                raise _damaged(path.name, root) from None
        raise
    if digest != expected["sha256"]:
        raise _damaged(path.name, root)
    return weights


def _damaged(name: str, root: str) -> CheckpointError:
    return CheckpointError(
        f"checkpoint {root!r} is damaged: {name!r} is not the file its {SEAL} names by size and sha256; copy it again"
    )
