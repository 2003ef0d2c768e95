"""What the loop trains through: DeepSpeed over Ray Train's process group, or plain PyTorch in one process.

Owns the optimizer, gradient reduction, sharded state and the gathering of weights. Knows no data and no schedule.
"""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycap.checkpoint import export_weights, file_names
from raycap.config import TrainConfig, compute_dtype
from raycap.training.reshard import check_state, read_share

T = TypeVar("T")
_TAG = "deepspeed"  # the folder inside a checkpoint that DeepSpeed's files are in


class Engine(Protocol):
    """The loop's whole view of distributed training."""

    module: nn.Module
    device: torch.device
    rank: int
    world_size: int
    grad_divisor: int
    """What the engine divides the sum of micro-step gradients over all ranks by: the loop's loss is scaled to undo it."""

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]: ...
    def backward(self, loss: Tensor) -> None: ...
    def step(self, lr: float) -> None: ...
    def autocast(self) -> AbstractContextManager[object]: ...
    def all_reduce(self, values: "list[float]") -> "list[float]": ...
    def gather(self, value: T) -> "list[T]": ...
    def weights(self) -> Mapping[str, Tensor]: ...
    def save_state(self, folder: Path) -> None: ...
    def load_state(self, folder: Path) -> None: ...


class PlainEngine:
    """One process, no DeepSpeed: for tests and for reading the loop without a cluster."""

    def __init__(self, module: nn.Module, config: TrainConfig, device: torch.device, num_micro_steps: int) -> None:
        self.module = module.to(device)
        self.device = device
        self.rank, self.world_size, self.grad_divisor = 0, 1, 1
        self._optimizer = build_optimizer(module, config, device)
        self._clip_norm = config.clip_norm
        self._num_micro_steps = num_micro_steps
        self._micro_step = 0
        self._dtype = torch.bfloat16 if compute_dtype(config.dtype, device.type == "cuda") == "bf16" else torch.float32

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with self.autocast():
            result: tuple[Tensor, Tensor] = self.module(pixel_values, input_ids, labels)
            return result

    def backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float) -> None:
        self._micro_step += 1
        if self._micro_step % self._num_micro_steps:
            return
        if self._clip_norm:
            nn.utils.clip_grad_norm_(self.module.parameters(), self._clip_norm)
        _set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def all_reduce(self, values: list[float]) -> list[float]:
        return values

    def gather(self, value: T) -> list[T]:
        return [value]

    def weights(self) -> Mapping[str, Tensor]:
        return export_weights(self.module)

    def save_state(self, folder: Path) -> None:
        torch.save({"module": self.module.state_dict(), "optimizer": self._optimizer.state_dict()}, folder / "plain.pt")

    def load_state(self, folder: Path) -> None:
        state = torch.load(folder / "plain.pt", map_location=self.device, weights_only=True)
        self.module.load_state_dict(state["module"])
        self._optimizer.load_state_dict(state["optimizer"])


class DeepSpeedEngine:
    """DeepSpeed on every rank of an initialised torch.distributed group."""

    def __init__(self, module: nn.Module, config: TrainConfig, device: torch.device, num_micro_steps: int) -> None:
        if device.type == "cpu":
            avoid_compilers_on_cpu()
        import deepspeed

        self.device = device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.grad_divisor = self.world_size * num_micro_steps
        self.stage = config.zero_stage
        self._clip_norm = config.clip_norm
        self._dtype = torch.bfloat16 if compute_dtype(config.dtype, device.type == "cuda") == "bf16" else torch.float32
        module.to(device)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=build_optimizer(module, config, device),
            config=self._deepspeed_config(config, num_micro_steps),
            dist_init_required=False,
        )
        self.module = module
        # Tied weights stand under several names; every rank must gather each parameter once, in the same order.
        self._names: dict[str, nn.Parameter] = dict(module.named_parameters())

    def _deepspeed_config(self, config: TrainConfig, num_micro_steps: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": num_micro_steps,
            "gradient_clipping": config.clip_norm,
            # Buckets allocate their full size; the defaults (5e8 elements) are made for models a thousand times larger.
            "zero_optimization": {
                "stage": config.zero_stage,
                "reduce_bucket_size": 20_000_000,
                "allgather_bucket_size": 20_000_000,
                "stage3_prefetch_bucket_size": 20_000_000,
            },
            "zero_force_ds_cpu_optimizer": False,  # its own CPU Adam is compiled on first use
            "torch_autocast": {"enabled": self._dtype is torch.bfloat16, "dtype": "bfloat16"},
            "steps_per_print": 10**9,
            "wall_clock_breakdown": False,
        }

    def forward(self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = self.engine(pixel_values, input_ids, labels)
        return result

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)

    def step(self, lr: float) -> None:
        _set_lr(self.engine.optimizer, lr)
        self.engine.step()

    def autocast(self) -> AbstractContextManager[object]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._dtype is torch.bfloat16)

    def all_reduce(self, values: list[float]) -> list[float]:
        """Sums over ranks, in fp64 so that counts stay exact."""
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor]

    def gather(self, value: T) -> list[T]:
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def weights(self) -> Mapping[str, Tensor]:
        """fp32 CPU copies on rank 0, nothing elsewhere. Every rank must call it: ZeRO-3 gathers what it sharded."""
        if self.stage < 3:
            return export_weights(self.module) if self.rank == 0 else {}
        import deepspeed

        copies: dict[str, Tensor] = {}
        for name, parameter in self._names.items():
            with deepspeed.zero.GatheredParameters([parameter]):
                if self.rank == 0:
                    copies[name] = parameter.detach().to("cpu", torch.float32, copy=True)
        if self.rank == 0:
            copies |= {
                name: buffer.cpu() for name, buffer in self.module.named_buffers() if name in self.module.state_dict()
            }
        names = file_names(self.module)
        return {names[name]: tensor for name, tensor in copies.items()}

    def save_state(self, folder: Path) -> None:
        """This rank's files of the sharded state; every rank must call it."""
        self.engine.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=False)

    def load_state(self, folder: Path) -> None:
        """What any number of ranks saved; under ZeRO 3 as many as there are now. Raises CheckpointError otherwise."""
        check_state(folder / _TAG, self.stage, self.world_size)
        ours = self.stage in (1, 2)
        loaded, _ = self.engine.load_checkpoint(str(folder), tag=_TAG, load_optimizer_states=not ours)
        assert loaded is not None, f"DeepSpeed found no state in {folder}"
        if ours:
            sharded = self.engine.optimizer
            sizes = [len(part) for part in sharded.single_partition_of_fp32_groups]
            share = read_share(folder / _TAG, self.rank, sizes)
            sharded.load_state_dict([share] * self.world_size, load_from_fp32_weights=True)  # it takes its own entry
            sharded.clip_grad = self._clip_norm  # not the one it was saved under: a run may go on with another


def avoid_compilers_on_cpu() -> None:
    """Keeps DeepSpeed from compiling at run time on a machine without a GPU, where it costs minutes and needs a compiler.

    Beside the settings in DeepSpeedEngine, one internal is replaced: DeepSpeed's torch backend builds a shared-memory
    all-reduce in its constructor, whose absence it handles by using torch.distributed.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    backend = import_module("deepspeed.comm.torch")  # as an attribute, deepspeed.comm.torch is PyTorch itself
    assert hasattr(backend, "build_shm_op"), (
        "DeepSpeed's build_shm_op is gone: see whether its CPU backend still compiles"
    )
    vars(backend)["build_shm_op"] = lambda: None


def build_optimizer(module: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only, as BERT and ViT recipes have it. Frozen parameters are none of its."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.lr, fused=device.type == "cuda")


def _set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
