"""The loss that all captioning models share: cross-entropy of the tokens that have a target, summed and counted."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's default ignore_index


def summed_token_loss(
    head: Callable[[Tensor], Tensor], hidden_NLD: Tensor, targets_NL: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum of the token losses (0-d, the dtype of the logits) and the number M of target tokens (0-d, int64).

    head: (M, D) -> logits (M, V). hidden_NLD at position l predicts targets_NL at l, unless that is IGNORED_LABEL.
    M = 0 gives loss 0 and zero gradients to everything that made hidden_NLD.
    """
    is_target_NL = targets_NL != IGNORED_LABEL
    logits_MV = head(hidden_NLD[is_target_NL])
    loss = F.cross_entropy(logits_MV, targets_NL[is_target_NL], reduction="sum", label_smoothing=label_smoothing)
    return loss, is_target_NL.sum()
