"""Cross-attention without keys and values: the weights that make them work on the few queries, not on the many image tokens.

A key is K h, so its product with a query q is (K^T q) h; a mean of values V h is V times the mean of h. So queries look at
the image's states h themselves, which all layers share, and nothing is projected or kept per layer. The bias of the keys adds
the same to every product of a query, which softmax does not see; that of the values is added to the mean.

Shape suffixes: B images, L query rows of an image, D width of the text decoder, E width of the image's states, T image
tokens, H heads, K width of a head.
"""

from torch import Tensor

# Up to so many rows an image. Projecting costs as much as about 60 row steps without keys and values, at 577 and at 197 image
# tokens (tests/bench/LOG.md); captions of COCO have 12 tokens in the mean.
MAX_BEAMS = 3


def through_keys(query_BLD: Tensor, weight_DE: Tensor, num_heads: int) -> Tensor:
    """What each head's query asks of the states, (B, H * L, E): K^T q. weight: of the projection that makes keys."""
    B, L, D = query_BLD.shape
    query_HXK = query_BLD.reshape(B * L, num_heads, -1).transpose(0, 1)  # X = B * L
    asked_HXE = query_HXK @ weight_DE.view(num_heads, D // num_heads, -1)
    return asked_HXE.view(num_heads, B, L, -1).transpose(0, 1).reshape(B, num_heads * L, -1)


def mean_states(asked_BXE: Tensor, states_BTE: Tensor, scale: float) -> Tensor:
    """The states as each head of each query weighs them, (B, H * L, E). scale: of the products before softmax."""
    weights_BXT = (asked_BXE @ states_BTE.transpose(1, 2) * scale).softmax(dim=-1)
    return weights_BXT.to(states_BTE.dtype) @ states_BTE


def through_values(mean_BXE: Tensor, weight_DE: Tensor, bias_D: Tensor, num_heads: int) -> Tensor:
    """What attention mixes for each query, (B, L, D). weight, bias: of the projection that makes values."""
    B, X, E = mean_BXE.shape
    mean_HXE = mean_BXE.view(B, num_heads, -1, E).transpose(0, 1).reshape(num_heads, -1, E)  # X = B * L
    mixed_HXK = mean_HXE @ weight_DE.view(num_heads, -1, E).transpose(1, 2)
    return mixed_HXK.transpose(0, 1).reshape(B, X // num_heads, -1) + bias_D
