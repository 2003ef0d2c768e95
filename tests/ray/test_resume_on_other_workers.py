"""One run, killed three times and gone on with on other numbers of workers: the batches and losses of an undisturbed one."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import Demo
from training_runs import curve, small_run

from raycap.config import TrainConfig
from raycap.errors import TrainingError, UserError
from raycap.training.driver import train_captioner

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def alone(demo: Demo, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The small run on one worker with augmentation, run to its end: two forward passes to a step, a checkpoint every four."""
    run = small_run(demo, str(tmp_path_factory.mktemp("alone") / "run"))
    config = replace(run, num_workers=1, micro_batch_size=6, max_failures=0, augment="blip")
    train_captioner(config)
    return config


def test_a_chain_of_1_2_1_3_workers_sees_the_batches_and_losses_of_one_worker(
    alone: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each link but the last loses a worker after a checkpoint of its own and has no restart left."""
    first = replace(alone, out=str(tmp_path / "run"))
    second = replace(first, num_workers=2, micro_batch_size=3)
    third = replace(first, micro_batch_size=12)
    last = replace(first, num_workers=3, micro_batch_size=2)
    for config in (first, second, third):
        assassin = threading.Thread(
            target=kill_a_worker_after_a_checkpoint, args=(config.out, known_states(config.out))
        )
        assassin.start()
        with pytest.raises(TrainingError):
            train_captioner(config)
        assassin.join()
        assert (
            saved_ranks(config.out)[known_states(config.out)[-1]] == config.num_workers
        )  # and no file of a larger world
    (orphan := Path(last.out) / "state" / "checkpoint_nobody_knows").mkdir()  # of a worker that died before its report
    (orphan / "state.json").write_text("{}")
    train_captioner(last)
    assert saved_ranks(last.out)[known_states(last.out)[-1]] == 3
    assert sorted(saved_ranks(last.out)) == known_states(last.out), "two states, and nobody's is gone"

    said = capsys.readouterr().out
    assert "going on with other settings: micro_batch_size 6 -> 3, num_workers 1 -> 2" in said
    assert "going on with other settings: micro_batch_size 12 -> 2, num_workers 1 -> 3" in said
    assert said.count("resuming from step") == 3
    resumed_from = json.loads((Path(last.out) / "train.json").read_text())["resumed_from"]
    assert len(resumed_from) == 3
    assert resumed_from == sorted(resumed_from)
    assert resumed_from[-1] in (12, 16, 20)
    expected, seen = curve(alone.out), curve(last.out)
    assert [(step, digest) for step, digest, _ in seen] == [(step, digest) for step, digest, _ in expected]
    assert [loss for *_, loss in seen] == pytest.approx([loss for *_, loss in expected], abs=1e-5)
    assert [step for step, *_ in seen] == list(range(1, 25))


def test_zero_3_on_other_workers_is_refused_before_any_starts(alone: TrainConfig, tmp_path: Path) -> None:
    begun = json.loads((Path(alone.out) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(begun | {"out": str(tmp_path), "zero_stage": 3, "num_workers": 2}))
    since = time.monotonic()
    with pytest.raises(
        UserError, match=r"ZeRO 3 state of 2 workers, which cannot be shared out to 3; .*--init-from"
    ) as error:
        train_captioner(replace(alone, out=str(tmp_path), zero_stage=3, num_workers=3))
    assert error.value.exit_code == 2
    assert time.monotonic() - since < 5
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def known_states(out: str) -> list[str]:
    """The folders that Ray Train would resume from; none before the run's first checkpoint."""
    path = Path(out) / "state" / "checkpoint_manager_snapshot.json"
    try:
        return [result["checkpoint_dir_name"] for result in json.loads(path.read_text())["checkpoint_results"]]
    except (FileNotFoundError, json.JSONDecodeError):  # Ray writes it in place
        return []


def saved_ranks(out: str) -> dict[str, int]:
    """How many ranks' files of optimizer state stand in each checkpoint of a run."""
    folders = [path for path in (Path(out) / "state").glob("checkpoint_*") if path.is_dir()]
    return {folder.name: len(list(folder.glob("deepspeed/zero_pp_rank_*_optim_states.pt"))) for folder in folders}


def kill_a_worker_after_a_checkpoint(out: str, before: list[str]) -> None:
    """Once Ray's controller has heard of a checkpoint that is not one of `before`: until then a run goes on from those."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if (known := known_states(out)) and known != before:
            ours = {child.pid for child in psutil.Process().children(recursive=True)}
            processes = psutil.process_iter(["cmdline"])
            workers = [p for p in processes if "RayTrainWorker" in " ".join(p.info["cmdline"] or []) and p.pid in ours]
            max(workers, key=lambda worker: worker.pid).kill()
            return
        time.sleep(0.005)
    raise AssertionError("the run wrote no checkpoint in time")
