"""What makes a loaded model faster that is not trained any more: its weights in another place, form or order.

A model so changed must not be trained or saved. What it computes is the same but for rounding.
"""

import torch
from torch import nn

from raycap.models.gpt2 import Projection
from raycap.models.linear import Linear
from raycap.schema import ImageSpec


@torch.no_grad()
def use_fast_products(model: nn.Module) -> None:
    """Every linear layer computes by linear.py, transformers' towers too."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear  # the same parameters
        elif isinstance(module, Projection):
            module.weight.data = module.weight.T.contiguous().T  # stored (in, out), in memory as it is multiplied


@torch.no_grad()
def fold_normalization(model: nn.Module, spec: ImageSpec) -> bool:
    """Has the model take pixels from 0 to 255: mean and std become part of its first convolution. False if that cannot be.

    W ((x / 255 - mean) / std) + b = (W / (255 std)) x + (b - W (mean / std)). A convolution that pads, as VGG16's, adds pixels
    of the mean colour, which no constant stands for.
    """
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    if first.padding not in ((0, 0), "valid"):
        return False
    mean, std = (torch.tensor(of_channel, dtype=torch.float64).view(3, 1, 1) for of_channel in (spec.mean, spec.std))
    weight = first.weight.double().cpu()
    bias = -(weight * (mean / std)).sum(dim=(1, 2, 3))
    if first.bias is not None:
        bias += first.bias.double().cpu()
    first.weight.copy_(weight / (255 * std))
    first.bias = nn.Parameter(bias.to(first.weight), requires_grad=False)  # CLIP's has none
    return True
