"""Training through Ray Train and DeepSpeed: exact against plain PyTorch, exact after a kill, clear when it cannot go on."""

import json
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil
import pytest
import torch
from safetensors.torch import load_file
from training_runs import curve, records_of

from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import TrainConfig
from raycap.data.batch import Source, iterate_local
from raycap.errors import TrainingError, UserError
from raycap.image import normalize
from raycap.order import Plan
from raycap.shards import Manifest, read_manifest
from raycap.training.driver import train_captioner
from raycap.training.engine import DeepSpeedEngine, avoid_compilers_on_cpu
from raycap.training.loop import Position, learning_rate, train
from raycap.training.start import build_start
from raycap.training.worker import build_plan

pytestmark = pytest.mark.ray
STEPS = 20


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run in a worker group. Half way its state is left in `save`; or it begins half way with the state in `load`."""

    config: TrainConfig
    load: str = ""
    save: str = ""


def inputs(config: TrainConfig) -> tuple[Plan, Manifest, Source, Any, Any]:
    """What a run starts from; without dropout, whose masks are others in other shapes."""
    spec, model = build_start(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    manifest = read_manifest(config.train_shards)
    source = Source(
        image=spec.image,
        text=spec.text,
        tokenizer=spec.tokenizer.to_str(),
        captions_per_image=config.captions_per_image,
        seed=config.seed,
    )
    return build_plan(config, manifest), manifest, source, spec, model


def plain_losses(config: TrainConfig) -> list[float]:
    """The same model on the same global batches, in a plain PyTorch loop that shares nothing else with ours."""
    plan, manifest, source, spec, model = inputs(config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    losses = []
    model.train()
    for batch in iterate_local(plan, manifest, source, 0, STEPS):
        labels = torch.tensor(batch.labels).flatten(0, 1)
        pixel_values = normalize(torch.tensor(batch.pixel_values), spec.image)
        loss_sum, _ = model(pixel_values, torch.tensor(batch.input_ids).flatten(0, 1), labels)
        loss = loss_sum / (labels[:, 1:] != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, batch.step, STEPS)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def _run_cases(settings: dict[str, Any]) -> None:
    """Runs in each worker: one case after the other in one worker group; rank 0 writes down what it saw."""
    import ray.train

    torch.set_num_threads(1)
    rank, world = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    results: list[dict[str, Any]] = []
    for case in settings["cases"]:
        config = replace(case.config, eval_every=10**6, checkpoint_every=STEPS // 2)
        plan, manifest, source, spec, model = inputs(config)
        num_parameters = sum(p.numel() for p in model.parameters())
        engine = DeepSpeedEngine(model, config, torch.device("cpu"), num_micro_steps=4 // world)
        if case.load:
            engine.load_state(Path(case.load))
        start = STEPS // 2 if case.load else 0
        records: list[dict[str, Any]] = []

        def save(position: Position, case: Case = case, engine: DeepSpeedEngine = engine) -> None:
            if case.save and position.step == STEPS // 2:
                engine.save_state(Path(case.save))

        train(
            engine,
            iterate_local(plan, manifest, source, start, STEPS, rank, world),
            config=config,
            image=spec.image,
            position=Position(step=start),
            num_steps=STEPS,
            evaluate=lambda step: {"cider": 0.0, "val_loss": 1.0},  # noqa: ARG005
            save=save,
            save_best=lambda position, metrics: None,  # noqa: ARG005
            log=records.append,
        )
        num_weights = sum(w.numel() for w in engine.weights().values())
        shares = engine.gather(_num_moments(engine.engine.optimizer))
        results.append(
            {
                "stage": engine.engine.zero_optimization_stage(),
                "optimizer": type(engine.engine.optimizer).__name__,
                "losses": [record["loss"] for record in records if "loss" in record],
                "digests": [record["batch_digest"] for record in records if "loss" in record],
                "moments_of_ranks": shares,
                "num_parameters": num_parameters,
                "num_weights": num_weights,
            }
        )
        del engine, model
    if rank == 0:
        Path(settings["result"]).write_text(json.dumps(results))
    ray.train.report({})


def _num_moments(optimizer: Any) -> int:
    """Elements of Adam's first moment that this rank holds."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return sum(state["exp_avg"].numel() for state in optimizer.state.values())


def run_cases(cases: list[Case], num_workers: int, folder: Path) -> list[dict[str, Any]]:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    result = folder / f"result-{num_workers}.json"
    TorchTrainer(
        _run_cases,
        train_loop_config={"cases": cases, "result": str(result)},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers),
        run_config=RunConfig(
            name=f"cases-{num_workers}",
            storage_path=str(folder),
            failure_config=FailureConfig(controller_failure_limit=0),
        ),
    ).fit()
    results: list[dict[str, Any]] = json.loads(result.read_text())
    return results


def test_two_workers_under_every_zero_stage_lose_what_a_plain_pytorch_loop_loses(
    ray_cluster: str, config: TrainConfig, tmp_path: Path
) -> None:
    stages: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
    results = run_cases([Case(config=replace(config, zero_stage=stage)) for stage in stages], 2, tmp_path)
    expected = plain_losses(config)
    assert len(expected) == STEPS
    assert expected[-1] < 0.7 * expected[0]
    for stage, seen in zip(stages, results, strict=True):
        assert seen["stage"] == stage
        assert seen["losses"] == pytest.approx(expected, abs=1e-5)
        assert seen["digests"] == results[0]["digests"]
        # What ZeRO is for: each of two ranks holds the whole of Adam's state without it, about half from stage 1 on.
        whole = seen["num_parameters"]
        for share in seen["moments_of_ranks"]:
            assert share == whole if stage == 0 else whole / 2 <= share <= whole / 2 + 10_000
        assert seen["num_weights"] == results[0]["num_weights"]
    assert "ZeRO" in results[3]["optimizer"] or "Stage3" in results[3]["optimizer"]


def half_frozen(config: TrainConfig, folder: str) -> TrainConfig:
    """A CLIP-GPT2 whose tower and first block are not trained, with its weights in a folder."""
    spec, model = build_start(replace(config, architecture="clip_gpt2_tiny"))
    frozen = spec.model_config | {"freeze_vision": True, "freeze_text": 1}
    save_checkpoint(folder, export_weights(model), replace(spec, model_config=frozen), {"step": 0})
    return replace(config, init_from=folder, tokenizer="")


def test_every_family_frozen_in_parts_or_not_loses_what_a_plain_loop_loses_and_goes_on_with_one_worker(
    ray_cluster: str, config: TrainConfig, tmp_path: Path
) -> None:
    families: dict[str, TrainConfig] = {
        "vit_gpt2": replace(config, architecture="vit_gpt2_tiny"),
        "vgg_lstm": replace(config, architecture="vgg_lstm_tiny"),
        "half_frozen": half_frozen(config, str(tmp_path / "half_frozen")),
    }
    states = {name: str(tmp_path / f"state-{name}") for name in families}
    under_3 = [Case(config=replace(c, zero_stage=3)) for c in families.values()]
    under_1 = [Case(config=c, save=states[name]) for name, c in families.items()]
    results = run_cases(under_3 + under_1, 2, tmp_path)
    rest = run_cases([Case(config=c, load=states[name]) for name, c in families.items()], 1, tmp_path)
    for number, (name, family) in enumerate(families.items()):
        expected = plain_losses(family)
        assert expected[-1] < 0.8 * expected[0], name
        for seen in (results[number], results[number + len(families)]):
            assert seen["losses"] == pytest.approx(expected, abs=1e-5), name
            assert seen["num_weights"] == rest[number]["num_weights"], name
        assert rest[number]["losses"] == pytest.approx(expected[STEPS // 2 :], abs=1e-5), name


def test_a_run_leaves_a_verified_checkpoint_the_last_ones_and_a_report(undisturbed: TrainConfig) -> None:
    out = Path(undisturbed.out)
    report = json.loads((out / "train.json").read_text())
    assert report["num_steps"] == 24
    assert [step for step, *_ in curve(undisturbed.out)] == list(range(1, 25))
    evaluations = [r for r in records_of(undisturbed.out) if "cider" in r]
    assert [r["step"] for r in evaluations] == [12, 24]
    assert all(len(r["samples"]) == 4 and r["num_val_images"] == 12 for r in evaluations)
    assert [s["key"] for s in evaluations[0]["samples"]] == [s["key"] for s in evaluations[1]["samples"]]
    assert report["best_cider"] == max(r["cider"] for r in evaluations)
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000020", "step-00000024"]
    best = Captioner.load(str(out / "checkpoint"))
    assert best.spec.info["step"] == report["best_step"]
    assert best.spec.info["metrics"]["cider"] == report["best_cider"]
    assert best.spec.info["config"]["global_batch_size"] == 12


def test_the_same_command_on_a_finished_run_says_so_and_another_one_is_refused(
    undisturbed: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    train_captioner(undisturbed)
    assert "finished" in capsys.readouterr().out
    with pytest.raises(UserError, match="seed 0 -> 1"):
        train_captioner(replace(undisturbed, seed=1))


def test_a_run_that_lost_a_worker_sees_the_same_batches_and_losses_as_the_undisturbed_one(
    undisturbed: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    killed = replace(undisturbed, out=str(tmp_path / "killed"))
    assassin = threading.Thread(target=_kill_a_worker_at, args=(killed.out, 10))
    assassin.start()
    train_captioner(killed)
    assassin.join()
    # Step 8's checkpoint counts once Ray's controller has heard of it, which on a fast machine may be after the kill.
    (resumed_from,) = json.loads((Path(killed.out) / "train.json").read_text())["resumed_from"]
    assert resumed_from in (4, 8)
    assert f"resuming from step {resumed_from}" in capsys.readouterr().out
    expected = curve(undisturbed.out)
    seen = curve(killed.out)
    assert [(step, digest) for step, digest, _ in seen] == [(step, digest) for step, digest, _ in expected]
    assert [loss for *_, loss in seen] == pytest.approx([loss for *_, loss in expected], rel=1e-6)
    assert Captioner.load(f"{killed.out}/checkpoint").spec.info["metrics"] == pytest.approx(
        Captioner.load(f"{undisturbed.out}/checkpoint").spec.info["metrics"], rel=1e-6
    )


def _kill_a_worker_at(out: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        path = Path(out) / "metrics.jsonl"
        if path.exists() and any(json.loads(line)["step"] >= step for line in path.read_text().splitlines()):
            workers = [
                p for p in psutil.process_iter(["cmdline"]) if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])
            ]
            ours = {c.pid for c in psutil.Process().children(recursive=True)}
            max((p for p in workers if p.pid in ours), key=lambda p: p.pid).kill()
            return
        time.sleep(0.005)
    raise AssertionError(f"the run did not reach step {step} in time")


def test_a_whole_run_under_zero_3_evaluates_and_leaves_the_checkpoint_of_zero_1(
    undisturbed: TrainConfig, tmp_path: Path
) -> None:
    """Ranks caption unequal numbers of images with unequal lengths, and must still gather parameters in step."""
    sharded = replace(undisturbed, out=str(tmp_path / "sharded"), zero_stage=3)
    train_captioner(sharded)
    expected, seen = curve(undisturbed.out), curve(sharded.out)
    assert [(step, digest) for step, digest, _ in seen] == [(step, digest) for step, digest, _ in expected]
    assert [loss for *_, loss in seen] == pytest.approx([loss for *_, loss in expected], abs=1e-4)
    captions = [[s["caption"] for s in r["samples"]] for r in records_of(sharded.out) if "cider" in r]
    assert captions == [[s["caption"] for s in r["samples"]] for r in records_of(undisturbed.out) if "cider" in r]
    weights = {
        name: load_file(Path(out) / "checkpoint/model.safetensors")
        for name, out in (("1", undisturbed.out), ("3", sharded.out))
    }
    assert weights["3"].keys() == weights["1"].keys()
    for name, tensor in weights["1"].items():
        assert torch.allclose(weights["3"][name], tensor, atol=1e-3), name


def test_a_loss_that_is_not_finite_stops_the_run_naming_step_and_keys_and_a_lower_rate_goes_on(
    ray_cluster: str, config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = replace(config, lr=1e30, clip_norm=0.0, warmup_steps=0, epochs=1)
    expected = r"the loss became (nan|inf) at step \d+ .* on the images \d{12}, .*--lr"
    with pytest.raises(TrainingError, match=expected) as error:
        train_captioner(wild)
    assert str(error.value).count("0000") >= 12
    assert not (Path(config.out) / "train.json").exists()
    train_captioner(replace(wild, lr=3e-3, clip_norm=1.0))
    assert "going on with other settings: lr 1e+30 -> 0.003, clip_norm 0.0 -> 1.0" in capsys.readouterr().out
    assert (Path(config.out) / "train.json").exists()


def test_more_workers_than_the_cluster_holds_are_refused_at_once_with_both_numbers(
    ray_cluster: str, config: TrainConfig
) -> None:
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"needs 24 CPUs .*--num-workers 12 .* has 8"):
        train_captioner(replace(config, num_workers=12))
    assert time.monotonic() - begun < 5
    assert not (Path(config.out) / "config.json").exists()


def test_the_internal_of_deepspeed_that_is_replaced_on_cpu_is_still_the_one_that_compiles() -> None:
    """Fails when DeepSpeed renames or no longer calls it, so that avoid_compilers_on_cpu is looked at again."""
    import inspect
    from importlib import import_module

    avoid_compilers_on_cpu()
    backend = import_module("deepspeed.comm.torch")
    assert backend.build_shm_op() is None
    assert "build_shm_op()" in inspect.getsource(backend.TorchBackend.__init__)


def test_no_compiler_was_started(undisturbed: TrainConfig, compiler_log: Path) -> None:
    assert compiler_log.read_text() == ""
