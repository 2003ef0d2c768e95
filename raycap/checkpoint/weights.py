"""Weights: from safetensors files, into a model, and out of one. No other format is read."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from raycap.checkpoint.folder import read_json
from raycap.checkpoint.spec import CheckpointSpec, check_spec
from raycap.errors import CheckpointError
from raycap.models import CaptionModel, build_model
from raycap.models.gpt2 import MASK_BUFFER
from raycap.models.vit_gpt2 import VitGpt2

Weights = Mapping[str, Tensor]
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"  # of weights in several files: {"weight_map": {tensor: file}}


def weight_files(folder: Path, source: str) -> tuple[list[str], dict[str, str]]:
    """Names of the safetensors files of a folder in Hugging Face's layout, and which tensor the index says is in which.

    Raises CheckpointError for a folder that has none, and for an index that names other files than of this folder.
    """
    if (folder / WHOLE).exists():
        return [WHOLE], {}
    if not (folder / INDEX).exists():
        raise CheckpointError(
            f"{source!r} holds no {WHOLE} and no {INDEX}; raycap loads no pickled weights: convert them with transformers' "
            f"save_pretrained"
        )
    index = read_json(folder / INDEX, source).get("weight_map")
    weight_map = {name: str(file) for name, file in index.items()} if isinstance(index, dict) else {}
    files = sorted(set(weight_map.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
            raise CheckpointError(f"{INDEX} of {source!r} names {name!r}, which is not in that folder; copy it again")
    if not files:
        raise CheckpointError(f"{INDEX} of {source!r} names no file; copy it again")
    return files, weight_map


def read_weights(paths: Sequence[Path], source: str, weight_map: Mapping[str, str] | None = None) -> Weights:
    """The tensors of all these files. weight_map: what each file must hold. Raises CheckpointError."""
    weights: dict[str, Tensor] = {}
    for path in paths:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path.name!r} of {source!r} cannot be read ({error}); copy the file again"
            ) from error
        for name in weight_map or ():
            if weight_map and (weight_map[name] == path.name) != (name in tensors):
                raise CheckpointError(
                    f"{path.name!r} of {source!r} does not hold what its {INDEX} says (first: {name!r}); copy the folder again"
                )
        weights |= tensors
    return weights


def load_model(spec: CheckpointSpec, weights: Weights, source: str) -> CaptionModel:
    """The model of a checkpoint, on the CPU, in float32.

    Raises CheckpointError if the weights are not those of its config, or are not finite. Nothing of the size that a
    config asks for is allocated before the weights were found to be of that size.
    """
    check_spec(spec, source)
    with torch.device("meta"), _Uninitialised():
        outline = _built(spec, source)
    own = dict(outline.named_parameters(remove_duplicate=False)) | dict(outline.named_buffers())
    own = {name: own[name] for name in outline.state_dict()}
    in_model = {in_file: name for name, in_file in file_names(outline).items()}
    # Older exports carry position_ids and causal masks, which are no weights; tied tensors may be stored under one of their
    # names only.
    given = {
        in_model.get(name, name): tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids") and not MASK_BUFFER.search(name)
    }
    found = {id(tensor) for name, tensor in own.items() if name in given}
    missing = [name for name, tensor in own.items() if id(tensor) not in found]
    unknown = [name for name in given if name not in own]
    other = [n for n, t in given.items() if n in own and (own[n].shape != t.shape or not t.is_floating_point())]
    if missing or unknown or other:
        raise CheckpointError(
            f"the weights of {source!r} do not fit its config.json: {len(missing)} missing, {len(unknown)} unknown, {len(other)} of "
            f"another shape (first: {(missing + unknown + other)[0]!r}); check that both files are of the same model"
        )
    for name, tensor in given.items():
        # A sum is not finite if one value is not; it is quick, and may overflow where all values are finite.
        if not math.isfinite(tensor.float().sum()) and not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"the weights of {source!r} are broken: {name!r} holds values that are infinite or NaN; choose another checkpoint"
            )
    with _Uninitialised():
        model = _built(spec, source)
    model.load_state_dict(given, strict=False)
    return model


def _built(spec: CheckpointSpec, source: str) -> CaptionModel:
    try:
        return build_model(spec.kind, spec.model_config)
    except Exception as error:  # transformers' config classes and torch's modules raise a dozen types at odd values
        raise CheckpointError(
            f"no {spec.kind} model can be built from config.json of {source!r} ({str(error).partition(chr(10))[0]}); copy it again"
        ) from error


class _Uninitialised(TorchFunctionMode):
    """Modules made inside draw no fresh weights: that takes seconds, and on the meta device loads torch's compiler."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        module, name = getattr(func, "__module__", ""), getattr(func, "__name__", "")
        if name in ("normal_", "uniform_") and args and not args[0].is_meta:
            with torch.no_grad():  # trunc_normal_ draws again until all values lie within its bounds
                return args[0].zero_()
        if module == "torch.nn.init" or name in ("normal_", "uniform_"):
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def file_names(model: nn.Module) -> dict[str, str]:
    """The name of each entry of a model's state dict -> its name in the files of a checkpoint.

    They differ where transformers renames a tower's parameters when it reads and writes them.
    """
    names: dict[str, str] = (
        model.published_names() if isinstance(model, VitGpt2) else {n: n for n in model.state_dict()}
    )
    return names


def export_weights(model: nn.Module) -> dict[str, Tensor]:
    """fp32 CPU copies of a model's weights by their names in files, each shared tensor once under its first name, as safetensors
    wants it.
    """
    state, names = model.state_dict(), file_names(model)
    seen: dict[tuple[int, torch.Size], str] = {}
    for name, tensor in state.items():
        seen.setdefault((tensor.data_ptr(), tensor.shape), name)
    return {names[name]: state[name].detach().to("cpu", torch.float32, copy=True) for name in seen.values()}
