"""DeepSpeed's sharded state read by another number of ranks: real engines in real processes, bit for bit."""

import json
import multiprocessing
import os
import shutil
import socket
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from raycap.config import TrainConfig
from raycap.errors import CheckpointError, UserError
from raycap.training import driver
from raycap.training.engine import DeepSpeedEngine
from raycap.training.reshard import MODEL_FILE, check_state, read_share, read_states

ROWS = 12  # of a global batch
MICRO_STEPS = {1: 3, 2: 2, 3: 1}  # by number of ranks: another number of workers is another micro batch size here
CLIP_NORMS = {"back1": 2.0}  # a run that goes on may change it
SLOW_IMPORTS = ["deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo"]  # once for all processes
RANK_FILE = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"
# Each phase runs in processes of its own: (its name, number of ranks, the phase it goes on from, steps it trains).
PHASES = (
    ("start1", 1, None, 3),
    ("at2", 2, "start1", 0),
    ("back1", 1, "at2", 0),  # 1 -> 2 -> 1
    ("on2", 2, "at2", 3),
    ("at3", 3, "on2", 0),
    ("back2", 2, "at3", 0),  # 2 -> 3 -> 2
    ("on3", 3, "at3", 3),
    ("on1", 1, "on3", 3),
    ("whole", 1, None, 12),
)


class Net(nn.Module):
    """Groups of 113 and 13 elements: neither divides by 2 or 3, and a boundary of ranks falls inside a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(7, 9), nn.Linear(9, 1), nn.Linear(9, 3)
        self.d = nn.Parameter(torch.full((2, 7), 0.1))

    def forward(self, x: Tensor, y: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        hidden = torch.tanh(self.a(x))
        guess = self.c(hidden) + self.b(hidden) + (x @ self.d.T).sum(1, keepdim=True)
        return (guess - y).pow(2).sum(), torch.tensor(len(x))


def train_phase(rank: int, world: int, root: str, port: int, phase: tuple[str, int, str | None, int]) -> None:
    """One rank of one phase, stage after stage: loads, trains, saves, and rank 0 writes down losses and state."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, rank == 0, timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    name, _, before, num_steps = phase
    for stage in (0, 1, 2):
        folder = Path(root) / f"{name}-{stage}"
        folder.mkdir(exist_ok=True)
        torch.manual_seed(0 if before is None else 1)  # what is loaded must not be what the weights began with
        module = Net()
        config = TrainConfig(
            zero_stage=stage, num_workers=world, global_batch_size=ROWS, clip_norm=CLIP_NORMS.get(name, 0.5)
        )  # type: ignore[arg-type]
        engine = DeepSpeedEngine(module, config, torch.device("cpu"), MICRO_STEPS[world])
        first = 0
        if before is not None:
            source = Path(root) / f"{before}-{stage}"
            engine.load_state(source)
            first = json.loads((source / "seen.json").read_text())["stop"]
        loaded = whole_state(engine)
        losses = [take_step(engine, step) for step in range(first, first + num_steps)]
        engine.save_state(folder)
        saved = whole_state(engine)
        if rank == 0:
            torch.save({"loaded": loaded, "saved": saved}, folder / "state.pt")
            clip_norm = engine.engine.optimizer.clip_grad if stage else engine.engine.gradient_clipping()
            left = {"losses": losses, "stop": first + num_steps, "clip_norm": clip_norm}
            (folder / "seen.json").write_text(json.dumps(left))
        dist.barrier()
    dist.destroy_process_group()


def take_step(engine: DeepSpeedEngine, step: int) -> float:
    """The mean loss of global batch `step`, which does not depend on how many ranks share it."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(ROWS, 7, generator=generator)
    y = torch.sin(x[:, :3])
    mine = slice(ROWS * engine.rank // engine.world_size, ROWS * (engine.rank + 1) // engine.world_size)
    num_micro_steps = MICRO_STEPS[engine.world_size]
    total = 0.0
    for x_part, y_part in zip(x[mine].chunk(num_micro_steps), y[mine].chunk(num_micro_steps), strict=True):
        loss, _ = engine.forward(x_part, y_part, y_part)
        engine.backward(loss * engine.grad_divisor / ROWS)
        total += float(loss.detach())
        engine.step(0.01 * (step + 1))
    return engine.all_reduce([total])[0] / ROWS


def whole_state(engine: DeepSpeedEngine) -> dict[str, Tensor]:
    """fp32 weights, both moments and the step of every parameter, gathered from all ranks; empty before any step."""
    named = list(engine.module.named_parameters())
    sharded: Any = engine.engine.optimizer
    inner = sharded if engine.stage == 0 else sharded.optimizer
    if not inner.state:
        return {}
    state = {"step": torch.stack([entry["step"] for entry in inner.state.values()]).unique()}
    for i, matrices in enumerate((True, False)):
        members = [(name, parameter) for name, parameter in named if (parameter.ndim >= 2) is matrices]
        for key in ("weights", "exp_avg", "exp_avg_sq"):
            if engine.stage == 0:
                pieces = [p.flatten() if key == "weights" else inner.state[p][key].flatten() for _, p in members]
            else:
                part = sharded.single_partition_of_fp32_groups[i]
                pieces = engine.gather((part if key == "weights" else inner.state[part][key]).detach())
            whole, first = torch.cat(pieces).detach(), 0
            for name, parameter in members:
                state[f"{name} {key}"] = whole[first : first + parameter.numel()].clone()
                first += parameter.numel()
            assert not whole[first:].any()  # padding
    return state


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what every phase left, by phase and stage."""
    folder = tmp_path_factory.mktemp("reshard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([*SLOW_IMPORTS, __name__])
        for phase in PHASES:
            run_ranks(context, str(folder), phase)
    return folder


def run_ranks(context: Any, root: str, phase: tuple[str, int, str | None, int]) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [context.Process(target=train_phase, args=(rank, phase[1], root, port, phase)) for rank in range(phase[1])]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    assert [process.exitcode for process in ranks] == [0] * phase[1], phase


def seen(root: Path, phase: str, stage: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """(state after loading, state at the end, losses) of a phase."""
    state = torch.load(root / f"{phase}-{stage}" / "state.pt", weights_only=True)
    return state["loaded"], state["saved"], json.loads((root / f"{phase}-{stage}" / "seen.json").read_text())["losses"]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert len(one) == 1 + 3 * len(list(Net().parameters()))
    for name in one:
        assert torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(("before", "after"), [(p[2], p[0]) for p in PHASES if p[2]])
def test_another_number_of_ranks_loads_every_bit(root: Path, stage: int, before: str, after: str) -> None:
    _, saved, _ = seen(root, before, stage)
    loaded, _, _ = seen(root, after, stage)
    assert_same(loaded, saved)
    assert all(bool(value.any()) for name, value in loaded.items() if "exp_avg" in name)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(("origin", "back"), [("start1", "back1"), ("on2", "back2")])
def test_files_that_went_over_another_number_of_ranks_and_back_are_the_first_ones(
    root: Path, stage: int, origin: str, back: str
) -> None:
    """Padding included: what stands in each rank's file is what stood there."""
    first, last = root / f"{origin}-{stage}" / "deepspeed", root / f"{back}-{stage}" / "deepspeed"
    num_ranks = len(read_states(first))
    assert num_ranks == len(read_states(last))
    for rank in range(num_ranks):
        one, other = (
            torch.load(f / RANK_FILE.format(rank), weights_only=False)["optimizer_state_dict"] for f in (first, last)
        )
        assert_equal(one["base_optimizer_state"], other["base_optimizer_state"])
        for key in ("single_partition_of_fp32_groups", "group_paddings", "partition_count", "zero_stage"):
            assert_equal(one[key], other[key])


def assert_equal(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_equal(one[key], other[key])
    elif isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_equal(left, right)
    else:
        assert one == other


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_that_changed_its_ranks_three_times_loses_what_an_undisturbed_one_loses(root: Path, stage: int) -> None:
    losses = [loss for phase in ("start1", "on2", "on3", "on1") for loss in seen(root, phase, stage)[2]]
    assert losses == pytest.approx(seen(root, "whole", stage)[2], abs=1e-5)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_another_clip_norm_holds_after_a_resume(root: Path, stage: int) -> None:
    for phase in ("at2", "back1"):
        seen_by_rank_0 = json.loads((root / f"{phase}-{stage}" / "seen.json").read_text())
        assert seen_by_rank_0["clip_norm"] == CLIP_NORMS.get(phase, 0.5)


def test_shares_of_any_number_of_ranks_put_end_to_end_are_the_old_vectors(root: Path) -> None:
    folder = root / "on2-1" / "deepspeed"
    whole = read_share(folder, 0, [114, 14])
    for world in (1, 2, 3, 5, 16):
        sizes = [-(-113 // (2 * world)) * 2, -(-13 // (2 * world)) * 2]  # with 16 ranks some hold nothing but padding
        shares = [read_share(folder, rank, sizes) for rank in range(world)]
        for group, length in ((0, 113), (1, 13)):
            for pick in (
                lambda share, i: share["single_partition_of_fp32_groups"][i],
                lambda share, i: share["base_optimizer_state"]["state"][i]["exp_avg"],
                lambda share, i: share["base_optimizer_state"]["state"][i]["exp_avg_sq"],
            ):
                together = torch.cat([pick(share, group) for share in shares])
                assert torch.equal(together[:length], pick(whole, group)[:length])
                assert not together[length:].any()


@pytest.fixture
def state(root: Path, tmp_path: Path) -> Path:
    """A copy of the state of three ranks under stage 1, to be damaged."""
    return Path(shutil.copytree(root / "on3-1" / "deepspeed", tmp_path / "deepspeed"))


@pytest.mark.parametrize("name", [RANK_FILE.format(0), RANK_FILE.format(1), RANK_FILE.format(2), MODEL_FILE])
def test_a_missing_file_is_refused_by_name(state: Path, name: str) -> None:
    (state / name).unlink()
    with pytest.raises(CheckpointError, match=rf"cannot be resumed: '.*{name}' is missing; .*--init-from"):
        check_state(state, 1, 2)


@pytest.mark.parametrize("name", [RANK_FILE.format(0), RANK_FILE.format(2), MODEL_FILE])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused_by_name(state: Path, name: str, keep: float) -> None:
    data = (state / name).read_bytes()
    (state / name).write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(CheckpointError, match=rf"'.*{name}' is cut short at {int(len(data) * keep)} bytes"):
        check_state(state, 1, 2)


def test_stage_0_needs_its_one_file(state: Path) -> None:
    check_state(state, 0, 5)
    (state / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"{MODEL_FILE}' is missing"):
        check_state(state, 0, 5)


def test_a_folder_without_any_state_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank_0_.*' is missing"):
        read_states(tmp_path)


def test_files_of_two_steps_in_one_folder_are_refused(state: Path, root: Path) -> None:
    shutil.copy(root / "at3-1" / "deepspeed" / RANK_FILE.format(1), state)  # three steps older
    with pytest.raises(CheckpointError, match=r"mixes files of steps \[6, 9\]"):
        read_share(state, 0, [114, 14])


def test_the_files_of_a_larger_world_do_not_mix_in(state: Path, root: Path) -> None:
    shutil.copy(root / "on2-1" / "deepspeed" / RANK_FILE.format(1), state)
    with pytest.raises(CheckpointError, match=r"rank_1_.*' is of 2 workers, .* of 3"):
        check_state(state, 1, 2)
    smaller = shutil.copytree(root / "on2-1" / "deepspeed", state.parent / "smaller")
    shutil.copy(root / "on3-1" / "deepspeed" / RANK_FILE.format(2), smaller)
    with pytest.raises(CheckpointError, match="holds the files of more than the 2 workers"):
        check_state(Path(smaller), 1, 2)


def test_zero_3_is_refused_in_the_state_and_before_anything_starts(state: Path, tmp_path: Path) -> None:
    for rank in range(3):
        shutil.copy(state / MODEL_FILE, state / f"zero_pp_rank_{rank}_{MODEL_FILE}")
    check_state(state, 3, 3)
    refused = (
        r"ZeRO 3 state of 3 workers, which cannot be shared out to 2; go on with --num-workers 3, or .*--init-from"
    )
    with pytest.raises(CheckpointError, match=refused):
        check_state(state, 3, 2)
    before = asdict(TrainConfig(zero_stage=3, num_workers=3, out=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(before))
    with pytest.raises(UserError, match=refused) as error:
        driver._finished(str(tmp_path), before | {"num_workers": 2})
    assert error.value.exit_code == 2


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_run_goes_on_and_a_finished_one_is_recognised_with_other_workers_and_micro_batches(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: Literal[0, 1, 2]
) -> None:
    before = asdict(TrainConfig(zero_stage=stage, num_workers=2, micro_batch_size=32, out=str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(before))
    now = before | {"num_workers": 3, "micro_batch_size": 8}
    assert not driver._finished(str(tmp_path), now)
    said = "going on with other settings: num_workers 2 -> 3, micro_batch_size 32 -> 8"
    assert set(capsys.readouterr().out.strip().removeprefix(said.split(": ")[0] + ": ").split(", ")) == set(
        said.split(": ")[1].split(", ")
    )
    (tmp_path / "train.json").write_text("{}")
    assert driver._finished(str(tmp_path), now)
    with pytest.raises(UserError, match="zero_stage"):
        driver._finished(str(tmp_path), now | {"zero_stage": 3})
