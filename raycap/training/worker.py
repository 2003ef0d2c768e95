"""One Ray Train worker: sets up model, engine and stream, resumes from the last checkpoint, and runs the loop."""

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from raycap import storage
from raycap.augment import AugmentSpec
from raycap.captioner import Captioner
from raycap.checkpoint import CheckpointSpec, save_checkpoint
from raycap.config import TrainConfig
from raycap.data.batch import Batch, Source
from raycap.data.stream import iterate
from raycap.errors import RaycapError, TrainingError
from raycap.order import InOrder, Order, Plan, rows_per_rank
from raycap.shards import Manifest
from raycap.training.engine import DeepSpeedEngine, Engine
from raycap.training.loop import Metrics, Position, train
from raycap.training.start import build_start
from raycap.training.states import POSITION, seal_state
from raycap.training.validate import Validator
from raycap.training.watch import MetricsFile

KEPT_CHECKPOINTS = 2  # the last ones, beside the best


@dataclass(frozen=True, kw_only=True)
class Data:
    """What the driver found: the manifests of both splits, once in a node's memory, and what one worker's reads may take.

    num_cpus: Ray CPUs. store_bytes: of Ray's shared memory.
    """

    train: "ray.ObjectRef[Manifest]"
    val: "ray.ObjectRef[Manifest]"
    num_cpus: int
    store_bytes: int


def train_worker(settings: dict[str, Any], board: Any, data: Data) -> None:
    """Ray Train's function per worker. settings: {"config": fields of TrainConfig}. Returns early once the run has failed."""
    if ray.get(board.error.remote()):
        return  # restarted after an error that a restart does not mend: end, so that the driver can say it
    try:
        _run(TrainConfig(**settings["config"]), board, data)
    except TrainingError as error:  # every rank raises it alike
        ray.get(board.fail.remote(str(error)))
    except RaycapError as error:
        ray.get(board.fail.remote(str(error)))
        raise  # the other ranks may be waiting for this one


def build_plan(config: TrainConfig, manifest: Manifest) -> Plan:
    """The order of the run: a function of seed, manifest and global batch size alone."""
    return Plan(
        shard_sizes=manifest.sizes,
        global_batch_size=config.global_batch_size,
        seed=config.seed,
        run_length=config.run_length,
    )


def _run(config: TrainConfig, board: Any, data: Data) -> None:
    torch.set_num_threads(config.cpus_per_worker)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's use, not ours
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    spec, model = build_start(config)
    num_micro_steps = -(-rows_per_rank(config.global_batch_size, world) // config.micro_batch_size)
    engine = DeepSpeedEngine(model, config, device, num_micro_steps)
    position = _resume(engine)
    position.num_workers = world

    train_manifest, val_manifest = ray.get(data.train), ray.get(data.val)
    plan = build_plan(config, train_manifest)
    num_steps = plan.steps_per_epoch * config.epochs
    val_order = InOrder(
        shard_sizes=val_manifest.sizes,
        global_batch_size=config.micro_batch_size * world,
        num_samples=min(config.eval_images, val_manifest.num_samples),
    )
    source = Source(
        image=spec.image,
        text=spec.text,
        tokenizer=spec.tokenizer.to_str(),
        captions_per_image=config.captions_per_image,
        seed=config.seed,
    )

    def stream(
        order: Order, manifest: "ray.ObjectRef[Manifest]", source: Source, start: int, stop: int
    ) -> Iterator[Batch]:
        return iterate(
            order,
            rank,
            world,
            manifest=manifest,
            source=source,
            start=start,
            stop=stop,
            num_cpus=data.num_cpus,
            store_bytes=data.store_bytes,
        )

    def validation() -> Iterator[Batch]:
        return stream(val_order, data.val, source, 0, val_order.num_steps)

    augmented = replace(source, augment=AugmentSpec() if config.augment == "blip" else None)
    metrics_file = MetricsFile(config.out, position.step) if rank == 0 else None
    if metrics_file and position.step:
        board.post.remote(metrics_file.resumed(position.step))
    saver = _Saver(engine, config, spec, train_manifest.fingerprint, metrics_file)
    validator = Validator(engine, Captioner(model, spec, device), config.micro_batch_size)

    def log(record: Metrics) -> None:
        if metrics_file:
            metrics_file.append(record)
            board.post.remote(record)

    train(
        engine,
        stream(plan, data.train, augmented, position.step, num_steps),
        config=config,
        image=spec.image,
        position=position,
        num_steps=num_steps,
        evaluate=lambda step: validator.evaluate(validation()),  # noqa: ARG005
        save=saver.save,
        save_best=saver.save_best,
        log=log,
    )
    if rank == 0:
        ray.get(board.post.remote({"finished": True, **asdict(position), "val_skipped_keys": validator.skipped}))


def _resume(engine: Engine) -> Position:
    """The position of the last checkpoint, with weights and optimizer state loaded; the beginning if there is none."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return Position()
    with checkpoint.as_directory() as name:
        engine.load_state(Path(name))
        return Position(**json.loads((Path(name) / POSITION).read_text()))


class _Saver:
    """Writes what a run leaves behind: the sharded state to resume from, the last checkpoints, and the best one."""

    def __init__(
        self, engine: Engine, config: TrainConfig, spec: CheckpointSpec, data: str, metrics_file: MetricsFile | None
    ) -> None:
        self._engine = engine
        self._config = config
        self._spec = spec
        self._data = data
        self._metrics_file = metrics_file

    def save(self, position: Position) -> None:
        """checkpoints/step-N, then the state that makes the run resume from here; in this order, so that both exist."""
        root = storage.join(self._config.out, "checkpoints")
        self._write(storage.join(root, f"step-{position.step:08d}"), position, {})
        if self._engine.rank == 0:
            _prune(root, KEPT_CHECKPOINTS)
        if self._metrics_file:
            self._metrics_file.flush()
        with storage.temporary_folder("state") as folder:
            self._engine.save_state(folder)
            if self._engine.rank == 0:
                (folder / POSITION).write_text(json.dumps(asdict(position)))
            seal_state(folder, self._engine.rank)
            checkpoint = ray.train.Checkpoint.from_directory(str(folder))
            ray.train.report({"step": position.step}, checkpoint=checkpoint)

    def save_best(self, position: Position, metrics: Metrics) -> None:
        """checkpoint/, with the metrics it was chosen by."""
        numbers = {k: v for k, v in metrics.items() if isinstance(v, float)}
        self._write(storage.join(self._config.out, "checkpoint"), position, numbers)

    def _write(self, root: str, position: Position, metrics: Metrics) -> None:
        weights = self._engine.weights()
        finite = all(bool(tensor.isfinite().all()) for tensor in weights.values())
        if not all(self._engine.gather(finite)):  # a finite loss can have gradients that are not
            raise TrainingError(
                f"weights became infinite or NaN by step {position.step}, and no checkpoint of them was written to {root!r}; run "
                f"the command again with a lower --lr or with --clip-norm to go on from the checkpoint before"
            )
        if self._engine.rank == 0:
            info = {
                "step": position.step,
                "metrics": metrics,
                "config": asdict(self._config),
                "data_fingerprint": self._data,
            }
            save_checkpoint(root, weights, self._spec, info)


def _prune(root: str, keep: int) -> None:
    """Removes all but the newest step folders."""
    folders = sorted({name.split("/")[0] for name in storage.list_files(root) if name.startswith("step-")})
    if not storage.is_url(root):
        for leftover in Path(root).glob(".step-*"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
    for folder in folders[:-keep]:
        storage.remove_folder(storage.join(root, folder))
