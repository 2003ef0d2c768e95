"""The training job on the driver: checks everything that can be checked at once, then lets Ray Train run the workers."""

import json
import os
import time
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from typing import Any, Literal

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raycap import cluster, storage
from raycap.checkpoint import CheckpointSpec
from raycap.config import TrainConfig, default_root
from raycap.data.demo import find_or_make_demo
from raycap.data.index import open_shards
from raycap.data.tasks import own_errors
from raycap.errors import TrainingError, UserError
from raycap.order import Plan
from raycap.schema import Sample
from raycap.shards import Manifest, check_shards, read_run
from raycap.text import unknown_words
from raycap.training.loop import MAX_SKIPPED_KEYS
from raycap.training.reshard import zero_3_refused
from raycap.training.start import build_start, state_root
from raycap.training.states import NUM_KEPT, list_states
from raycap.training.watch import Board, Display, read_records
from raycap.training.worker import Data, build_plan, train_worker

# What may differ when a run is resumed: what changes no result but its rounding, and what an error message asks to lower.
NEUTRAL_FIELDS = (
    "num_workers",
    "micro_batch_size",
    "cpus_per_worker",
    "max_error_rate",
    "max_failures",
    "log_every",
    "checkpoint_every",
)
FREE_FIELDS = (*NEUTRAL_FIELDS, "lr", "clip_norm")
WORD_SHARDS, WORD_SAMPLES = 8, 32  # whose captions are shown to the tokenizer before a run starts
MAX_UNKNOWN = 0.1  # of their tokens; names and emoji of real captions are under one in a hundred


def train_captioner(config: TrainConfig) -> None:
    """Trains to the end, resuming what is in config.out. Raises UserError before anything ran, TrainingError after."""
    config = _with_demo(config)
    spec, num_parameters, num_trained = _start(config)  # a wrong --init-from is found here, before shards are indexed
    train_manifest, val_manifest = _open_shards(config, "train"), _open_shards(config, "val")
    plan = build_plan(config, train_manifest)
    num_steps = plan.steps_per_epoch * config.epochs
    identity = asdict(config) | {
        "train_fingerprint": train_manifest.fingerprint,
        "val_fingerprint": val_manifest.fingerprint,
    }
    if _finished(config.out, identity):
        print(
            f"this run is finished ({num_steps} steps): its checkpoint is {config.out}/checkpoint; for another run choose another --out"
        )
        return
    check_shards(train_manifest)
    check_shards(val_manifest)
    _check_words(config, spec, train_manifest)

    use_gpu = _connect(config)
    storage.put(storage.join(config.out, "config.json"), (json.dumps(identity, indent=2) + "\n").encode())
    print(
        f"training on {train_manifest.num_samples} images ({plan.num_dropped} dropped at each epoch's end), validating on "
        f"{min(config.eval_images, val_manifest.num_samples)}; {num_steps} steps with {config.num_workers} workers on "
        f"{'GPUs' if use_gpu else 'CPUs'}, ZeRO stage {config.zero_stage}\n"
        f"the model has {num_parameters:,} parameters, {num_trained:,} of them trained",
        flush=True,
    )
    begun = time.perf_counter()
    num_cpus, store_bytes = share_of_data(config, ray.cluster_resources())  # type: ignore[no-untyped-call]
    data = Data(train=ray.put(train_manifest), val=ray.put(val_manifest), num_cpus=num_cpus, store_bytes=store_bytes)
    board: Any = Board.remote()  # type: ignore[attr-defined]  # ray.remote's types hide it
    for sentence in list_states(state_root(config)):
        print(sentence, flush=True)
    with own_errors("training"):  # Ray Train's controller and Ray itself may be killed
        with Display(board, num_steps) as display:
            try:
                _trainer(config, board, data, use_gpu).fit()
            except ray.train.TrainingFailedError as error:
                message = ray.get(board.error.remote()) or _cause(error)
                raise TrainingError(message) from error
        if message := ray.get(board.error.remote()):
            raise TrainingError(message)
    # A worker that died before Ray Train had heard of its state left one that is not listed.
    list_states(state_root(config))
    sizes = {"num_parameters": num_parameters, "num_trained_parameters": num_trained}
    _write_report(config, sizes, display, plan, (train_manifest, val_manifest), time.perf_counter() - begun)


def _start(config: TrainConfig) -> tuple[CheckpointSpec, int, int]:
    """Of step 0: the spec, the model's parameters, shared ones counted once, and how many of them are trained. Raises UserError."""
    spec, model = build_start(config)
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return spec, sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _check_words(config: TrainConfig, spec: CheckpointSpec, manifest: Manifest) -> None:
    """Raises UserError if the tokenizer does not know what the captions say: the model would learn to say nothing, at a low loss.

    Looks at the first samples of a few shards.
    """
    shards = range(0, len(manifest.sizes), -(-len(manifest.sizes) // WORD_SHARDS))
    runs = [read_run(manifest, n, 0, min(int(manifest.sizes[n]), WORD_SAMPLES)) for n in shards]
    captions = [caption for run in runs for sample in run if isinstance(sample, Sample) for caption in sample.captions]
    share, words = unknown_words(spec.tokenizer, spec.text, captions)
    some = ", ".join(map(repr, words[:5]))
    if share > MAX_UNKNOWN:
        raise UserError(
            f"{100 * share:.1f} % of the tokens of {len(captions)} captions in {config.train_shards!r} are unknown to the tokenizer of "
            f"{config.init_from or config.tokenizer!r} (in {some}), more than {100 * MAX_UNKNOWN:.0f} %: the model would not learn to say "
            f"them; choose a --tokenizer that knows their characters, or weights of their language as --init-from"
        )
    if words:
        print(
            f"{100 * share:.2f} % of the tokens of {len(captions)} captions are unknown to the tokenizer (in {some})",
            flush=True,
        )


def _with_demo(config: TrainConfig) -> TrainConfig:
    """The config with the demo's shards and tokenizer where none are given; makes them if they are missing."""
    if config.train_shards:
        return config
    cluster.connect(num_cpus=_num_cpus(config), need=_need(config))
    demo = find_or_make_demo(default_root("demo"))
    return replace(config, train_shards=demo.train, val_shards=demo.val, tokenizer=config.tokenizer or demo.tokenizer)


def _open_shards(config: TrainConfig, split: Literal["train", "val"]) -> Manifest:
    """The manifest of a split; shards without one are indexed below config.out. Raises UserError if too much is left out."""
    root = config.train_shards if split == "train" else config.val_shards
    index_root = storage.join(config.out, "index", split)
    manifest = open_shards(
        root, index_root, connect=lambda: cluster.connect(num_cpus=_num_cpus(config), need=_need(config))
    )
    num_listed = manifest.num_samples + len(manifest.skipped)
    if len(manifest.skipped) > config.max_error_rate * num_listed:
        kinds = ", ".join(f"{kind}: {count}" for kind, count in Counter(kind for _, kind in manifest.skipped).items())
        raise UserError(
            f"{len(manifest.skipped)} of the {num_listed} samples in {root!r} cannot be used ({kinds}; first: "
            f"{', '.join(key for key, _ in manifest.skipped[:5])}), more than --max-error-rate {config.max_error_rate}; mend "
            f"the shards or give a higher one"
        )
    return manifest


def share_of_data(config: TrainConfig, resources: dict[str, float]) -> tuple[int, int]:
    """(Ray CPUs, bytes of Ray's shared memory) that one worker's reads may take: what the workers leave, in equal parts.

    resources: of the whole cluster. Half of the memory stays for the batches in use.
    """
    num_cpus = int(resources["CPU"]) // config.num_workers - config.cpus_per_worker
    return num_cpus, int(resources["object_store_memory"] / 2 / config.num_workers)


def _num_cpus(config: TrainConfig) -> int:
    """For each worker its own CPUs and one that reads and decodes for it; more than that are used as they are there."""
    return config.num_workers * (config.cpus_per_worker + 1)


def _need(config: TrainConfig) -> str:
    return f"--num-workers {config.num_workers} x (--cpus-per-worker {config.cpus_per_worker} + 1 for its data)"


def _connect(config: TrainConfig) -> bool:
    """Connects, checks capacity and storage. Whether the workers use GPUs."""
    cluster.connect(
        num_cpus=_num_cpus(config), num_gpus=config.num_workers if config.device == "cuda" else 0, need=_need(config)
    )
    cluster.check_shared(config.out)
    return cluster.use_gpus(config.device, config.num_workers, "--num-workers")


def _trainer(config: TrainConfig, board: Any, data: Data, use_gpu: bool) -> TorchTrainer:
    return TorchTrainer(
        partial(train_worker, board=board, data=data),
        train_loop_config={"config": asdict(config)},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.num_workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": config.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=RunConfig(
            name="state",
            storage_path=config.out.removeprefix("s3://"),
            storage_filesystem=_s3_filesystem() if storage.is_url(config.out) else None,
            checkpoint_config=CheckpointConfig(num_to_keep=NUM_KEPT),
            # Ray's default would try again for ever what the cluster cannot schedule.
            failure_config=FailureConfig(max_failures=config.max_failures, controller_failure_limit=0),  # type: ignore[call-arg]  # v2's
        ),
    )


def _finished(out: str, identity: dict[str, Any]) -> bool:
    """Whether `out` holds this run, finished. Raises UserError if it holds another run.

    identity: the config and the fingerprints of the shards, as config.json has them.
    """
    url = storage.join(out, "config.json")
    if not storage.exists(url):
        return False
    before = json.loads(storage.read_bytes(url))
    changes = {k: f"{k} {before.get(k)!r} -> {v!r}" for k, v in identity.items() if v != before.get(k)}
    finished = storage.exists(storage.join(out, "train.json"))
    if not changes.keys() <= set(NEUTRAL_FIELDS if finished else FREE_FIELDS):
        more = (
            f", with --init-from {storage.join(out, 'checkpoint')} to train on from its best step" if finished else ""
        )
        raise UserError(
            f"--out {out!r} holds a {'finished ' if finished else ''}run with other settings ({', '.join(changes.values())}); repeat its "
            f"command, or choose another --out{more}"
        )
    if identity["zero_stage"] == 3 and "num_workers" in changes and not finished:
        raise UserError(zero_3_refused(out, before["num_workers"], identity["num_workers"]))
    if changes and not finished:
        print(f"going on with other settings: {', '.join(changes.values())}", flush=True)
    return finished


def _write_report(
    config: TrainConfig,
    sizes: dict[str, int],
    display: Display,
    plan: Plan,
    manifests: tuple[Manifest, Manifest],
    wall_s: float,
) -> None:
    """train.json. skipped: what a step could not use, once an epoch; left_out: what was known before the first step."""
    position, (train, val) = display.finished, manifests
    records = read_records(config.out)
    ciders = [record["cider"] for record in records if "cider" in record]
    num_steps = plan.steps_per_epoch * config.epochs
    report = {
        "num_steps": num_steps,
        **sizes,
        "best_step": position["best_step"],
        "best_cider": position["best_cider"],
        "best_val_loss": position["best_val_loss"],
        "skipped_by_kind": position["skipped"],
        "skipped_keys": position["skipped_keys"],
        "left_out_by_kind": dict(Counter(kind for _, kind in train.skipped)),
        "left_out_keys": dict(train.skipped[:MAX_SKIPPED_KEYS]),
        "not_downloaded": train.failures,
        "val_skipped_keys": position["val_skipped_keys"] | dict(val.skipped[:MAX_SKIPPED_KEYS]),
        "resumed_from": [record["resumed_from"] for record in records if "resumed_from" in record],
        "num_dropped_per_epoch": plan.num_dropped,
        "wall_s": round(wall_s, 1),
    }
    storage.put(storage.join(config.out, "train.json"), (json.dumps(report, indent=2) + "\n").encode())
    print(
        f"trained {num_steps} steps in {wall_s:.0f} s; best CIDEr {position['best_cider']:.3f} at step {position['best_step']}; bad "
        f"samples, each once an epoch: {position['skipped'] or 'none'}; left out: {report['left_out_by_kind'] or 'none'}; bad "
        f"in the validation split: {len(position['val_skipped_keys']) + len(val.skipped)}; checkpoint: "
        f"{config.out}/checkpoint{_chosen_by_loss(ciders)}",
        flush=True,
    )


def _chosen_by_loss(ciders: list[float]) -> str:
    """What to say where CIDEr tells no step from another: of one image, or of texts that it cannot split into words, it is 0."""
    if len(ciders) < 2 or len(set(ciders)) > 1:
        return ""
    return f"\nCIDEr was {ciders[0]:.3f} at each of the {len(ciders)} evaluations, so the best checkpoint is that of the lowest validation loss"


def _s3_filesystem() -> Any:
    """Ray Train's view of S3, with the endpoint that the rest of raycap takes from the environment."""
    from pyarrow.fs import AwsStandardS3RetryStrategy, S3FileSystem

    scheme, _, endpoint = (os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")).rpartition(
        "://"
    )
    return S3FileSystem(
        scheme=scheme or "https",
        endpoint_override=endpoint or None,
        connect_timeout=10,
        request_timeout=60,  # by default 3 s without a byte end a run
        retry_strategy=AwsStandardS3RetryStrategy(max_attempts=8),
    )


def _cause(error: BaseException) -> str:
    """One sentence of Ray Train's nested errors: the deepest cause's last line."""
    while error.__cause__ is not None:
        error = error.__cause__
    last = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
    return f"training stopped: {last}; run the same command again to go on from the last checkpoint"
