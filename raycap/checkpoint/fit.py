"""Whether weights are those of a model, by name and shape, and which of their names are one tensor. Reads no file."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raycap.checkpoint.folder import shown
from raycap.checkpoint.layout import is_tied, untied
from raycap.errors import CheckpointError
from raycap.models import TIED_NAMES
from raycap.models.gpt2 import MASK_BUFFER
from raycap.models.vit_gpt2 import VitGpt2

Weights = Mapping[str, Tensor]


def fitted(outline: nn.Module, weights: Weights, source: str) -> dict[str, Tensor]:
    """The weights by the names of a model's state dict, of a tied tensor one name at least. Raises CheckpointError if they do not fit.

    outline: the model on the meta device, where the weights may be too.
    """
    given = _in_memory(outline, weights)
    missing, unknown, other = _misfits(outline, given)
    if not (missing or unknown or other):
        return given
    first = next(iter(weights), "")
    for prefix in (first[: place + 1] for place, letter in enumerate(first) if letter == "."):
        bare = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
        if len(bare) == len(weights) and not any(_misfits(outline, _in_memory(outline, bare))):
            raise CheckpointError(
                f"the weights of {source!r} have {shown(prefix)} before every name, as those of a wrapped model, and without it they "
                f"fit its config.json; save the model without its wrapper, or its tensors by their bare names: "
                f"safetensors.torch.save_file({{name.removeprefix({shown(prefix)}): tensor for name, tensor in tensors.items()}}, "
                f"'model.safetensors')"
            )
    raise CheckpointError(
        f"the weights of {source!r} do not fit its config.json: {len(missing)} missing, {len(unknown)} unknown, {len(other)} of "
        f"another shape or dtype (first: {shown((missing + unknown + other)[0])}); check that both files are of the same model"
    )


def _in_memory(outline: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """The weights by the names of a state dict, but for position_ids and causal masks of older exports, which are no weights."""
    names = {in_file: name for name, in_file in file_names(outline).items()}
    return {
        names.get(name, name): tensor
        for name, tensor in weights.items()
        if not name.endswith("position_ids") and not MASK_BUFFER.search(name)
    }


def _misfits(outline: nn.Module, given: Weights) -> tuple[list[str], list[str], list[str]]:
    """Names that are missing, unknown, and of another shape or dtype. Tied tensors may be given under one of their names only."""
    own = tensors_of(outline)
    found = {id(tensor) for name, tensor in own.items() if name in given}
    missing = [name for name, tensor in own.items() if id(tensor) not in found]
    unknown = [name for name in given if name not in own]
    other = [n for n, t in given.items() if n in own and (own[n].shape != t.shape or not t.is_floating_point())]
    return missing, unknown, other


def tensors_of(outline: nn.Module) -> dict[str, Tensor]:
    """The state dict; a tied tensor is the same object under each of its names."""
    own = dict(outline.named_parameters(remove_duplicate=False)) | dict(outline.named_buffers())
    return {name: own[name] for name in outline.state_dict()}


def settle_tied(model_config: dict[str, Any], weights: Weights) -> tuple[dict[str, Any], Weights]:
    """The config that says whether the two names of a tied tensor are one in these weights, and the weights, each tensor once.

    transformers 4.26 to 4.55 trained BLIP's output layer apart from its word embeddings, and any folder may hold two
    tensors where its config ties them: then the model has both, as in transformers 5. Weights on the meta device keep the config.
    """
    settled = dict(weights)
    for second, first in TIED_NAMES[model_config["model_type"]].items():
        if second not in weights or first not in weights:
            continue
        is_same = weights[second].is_meta or torch.equal(weights[second], weights[first])
        if second.endswith(".bias"):  # the layer's own; the other name is read by nothing, in no version
            settled[first] = settled.pop(second)
        elif is_same and is_tied(model_config):
            del settled[second]
        elif not is_same:
            model_config = untied(model_config)
    return model_config, settled


def file_names(model: nn.Module) -> dict[str, str]:
    """The name of each entry of a model's state dict -> its name in the files of a checkpoint.

    They differ where transformers renames a tower's parameters when it reads and writes them.
    """
    names: dict[str, str] = (
        model.published_names() if isinstance(model, VitGpt2) else {n: n for n in model.state_dict()}
    )
    return names
