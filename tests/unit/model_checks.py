"""What the tests of every model measure: gradients, their distance, and parameters that exist only while they are used."""

import torch
from torch import Tensor, nn


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_relative_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of any entry, relative to the largest of all tensors: the gradient of a key's bias is 0 and rounding noise."""
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in theirs.values())
    return max(float((ours[name] - theirs[name]).abs().max() / scale) for name in theirs)


def empty_parameters_outside_their_module(model: nn.Module) -> None:
    """As ZeRO-3 does: a module's own parameters hold their values from its pre-forward hook to its forward hook only."""
    weights = {parameter: parameter.detach().clone() for parameter in model.parameters()}
    in_use = dict.fromkeys(weights, 0)

    @torch.no_grad()
    def gather(module: nn.Module, _inputs: object) -> None:
        for parameter in module.parameters(recurse=False):
            in_use[parameter] += 1
            parameter.copy_(weights[parameter])

    @torch.no_grad()
    def release(module: nn.Module, _inputs: object, _output: object) -> None:
        for parameter in module.parameters(recurse=False):
            in_use[parameter] -= 1
            if not in_use[parameter]:
                parameter.fill_(torch.nan)

    for module in model.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
    with torch.no_grad():
        for parameter in weights:
            parameter.fill_(torch.nan)
