"""torch's linear layer, with another library at work where it is faster: not for training."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ONEDNN_FROM = 2**22  # multiplications


def is_onednn_faster(cpu_info: str, capability: str) -> bool:
    """Whether oneDNN is known to beat MKL on this processor: on AMD's with AVX-512, where MKL does without it.

    On Intel's MKL is the faster one, and nobody measured others. cpu_info: /proc/cpuinfo; capability: torch's word for the
    instructions it uses.
    """
    return capability == "AVX512" and "AuthenticAMD" in cpu_info


def _cpu_info() -> str:
    """What Linux says of the processor; "" elsewhere."""
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


USES_ONEDNN = (
    torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # theirs
    and is_onednn_faster(_cpu_info(), torch.backends.cpu.get_cpu_capability())
)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As torch's function, which calls MKL, or by oneDNN where that is known to be faster.

    oneDNN takes half the time on AMD's processors with AVX-512 (tests/bench/LOG.md); results differ by rounding. With
    AVX2 alone the two are equal, and for a few rows the way to oneDNN and back costs what it saves. Where a graph is
    recorded torch's stays: with oneDNN's gradients the losses under DeepSpeed's ZeRO 2 were others.
    """
    is_float32 = input.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    is_large = input.ndim > 1 and input.numel() * len(weight) >= ONEDNN_FROM
    if (
        USES_ONEDNN
        and is_float32
        and is_large
        and weight.is_contiguous()  # oneDNN would turn it around at every call
        and input.device.type == "cpu"
        and not torch.is_grad_enabled()
    ):
        return torch.ops.aten.linear(input.to_mkldnn(), weight, bias).to_dense()  # type: ignore[no-any-return]
    return F.linear(input, weight, bias)


def is_sharded(parameter: Tensor) -> bool:
    """Whether it is by ZeRO 3, which has a function of its own in the place of F.linear."""
    return hasattr(parameter, "ds_id")


class Linear(nn.Linear):
    """With linear() above for its product."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if is_sharded(self.weight) else linear(input, self.weight, self.bias)
