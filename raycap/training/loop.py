"""The training loop, top to bottom. It takes an iterator of batches and an engine, and knows neither Ray nor DeepSpeed."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from raycap.config import TrainConfig
from raycap.data.batch import Batch
from raycap.errors import TrainingError
from raycap.image import normalize
from raycap.order import hash_text
from raycap.schema import ImageSpec
from raycap.training.engine import Engine

Metrics = dict[str, Any]
MAX_SKIPPED_KEYS = 1000
DIGEST_BITS = 40  # sums of a few thousand stay exact in fp64


@dataclass
class Position:
    """Where a run stands: what a checkpoint saves beside weights and optimizer state.

    step: optimizer steps done. num_workers: that write its state, 0 where that is not known. skipped: samples by error
    kind, one in several epochs several times. skipped_keys: the first of them, key -> kind.
    """

    step: int = 0
    best_cider: float = -1.0
    best_val_loss: float = math.inf
    best_step: int = 0
    num_workers: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    skipped_keys: dict[str, str] = field(default_factory=dict)


def train(
    engine: Engine,
    batches: Iterator[Batch],
    *,
    config: TrainConfig,
    image: ImageSpec,
    position: Position,
    num_steps: int,
    evaluate: Callable[[int], Metrics],
    save: Callable[[Position], None],
    save_best: Callable[[Position, Metrics], None],
    log: Callable[[Metrics], None],
) -> None:
    """Trains from position.step to num_steps and leaves `position` at the end.

    batches: this rank's share of each global batch from position.step on. evaluate, save, save_best and log are called on
    every rank alike. Raises TrainingError, naming step and keys, at a loss that is not finite, and when more samples were bad
    than config.max_error_rate of an epoch; the step is not taken.
    """
    watch = Stopwatch(position.step, num_steps)
    while position.step < num_steps:
        step = position.step
        with watch.waiting():
            batch = next(batches)
        assert batch.step == step, (batch.step, step)
        torch.manual_seed(hash_text(f"{config.seed} {step} {engine.rank}"))  # dropout depends on the position alone

        micro_batches = list(batch.micro_batches(config.micro_batch_size))
        # How many target tokens the whole global batch has is known before its first micro step.
        counts = [batch.num_tokens, batch.num_captions, batch.num_images, len(batch.errors), keys_digest(batch.keys)]
        counts += [int(batch.lengths.sum()), sum(ids.size for _, ids, _ in micro_batches)]
        sums = engine.all_reduce([float(count) for count in counts])
        num_tokens, num_captions, num_images, num_errors, digest, num_text, num_positions = sums
        if num_errors:
            count_skipped(position, engine.gather(batch.errors))
            check_error_rate(position, config, num_steps)

        engine.module.train()
        lr = learning_rate(config, step, num_steps)
        scale = engine.grad_divisor / max(num_tokens, 1)
        loss_sum = 0.0
        for i, arrays in enumerate(micro_batches):
            pixel_values, input_ids, labels = (torch.tensor(array, device=engine.device) for array in arrays)
            micro_loss, _ = engine.forward(normalize(pixel_values, image), input_ids, labels)
            engine.backward(micro_loss * scale)
            loss_sum += float(micro_loss.detach())
            if i == len(micro_batches) - 1:  # before the weights move
                loss = engine.all_reduce([loss_sum])[0] / max(num_tokens, 1)
                if not math.isfinite(loss):
                    keys = [key for part in engine.gather(batch.keys) for key in part if key]
                    raise TrainingError(not_finite(loss, step, keys, lr))
            engine.step(lr)
        position.step = step = step + 1
        watch.add(num_images, num_captions, num_text / max(num_positions, 1))

        if step % config.log_every == 0 or step == num_steps:
            log({"step": step, "loss": loss, "lr": lr, "batch_digest": int(digest), **watch.read(step)})
        if step % config.eval_every == 0 or step == num_steps:
            with watch.paused():
                metrics = evaluate(step)
                log({"step": step, **metrics})
                if is_best(metrics, position):
                    position.best_cider, position.best_val_loss = metrics["cider"], metrics["val_loss"]
                    position.best_step = step
                    save_best(position, metrics)
        if step % config.checkpoint_every == 0 or step == num_steps:
            with watch.paused():
                save(position)


def is_best(metrics: Metrics, position: Position) -> bool:
    """Whether an evaluation beats the best before it: by CIDEr, then by the lower validation loss, then as the later one."""
    best = (position.best_cider, -position.best_val_loss)
    return (metrics["cider"], -metrics["val_loss"]) >= best


def learning_rate(config: TrainConfig, step: int, num_steps: int) -> float:
    """Linear from zero over warmup_steps, then a cosine to zero at num_steps. step: steps done before this one."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def keys_digest(keys: tuple[str, ...]) -> int:
    """A number of a set of keys that does not depend on their order, nor on how ranks share them: its sum over ranks.

    Two runs saw the same global batch if and only if, but for a chance of 2^-40, their digests are equal.
    """
    return sum(int.from_bytes(hashlib.blake2b(k.encode(), digest_size=5).digest(), "big") for k in keys if k)


def count_skipped(position: Position, errors_of_ranks: list[tuple[tuple[str, str], ...]]) -> None:
    """Adds bad samples to the report: all by kind, the first MAX_SKIPPED_KEYS by key."""
    for key, kind in (error for errors in errors_of_ranks for error in errors):
        position.skipped[kind] = position.skipped.get(kind, 0) + 1
        if len(position.skipped_keys) < MAX_SKIPPED_KEYS:
            position.skipped_keys.setdefault(key, kind)


def check_error_rate(position: Position, config: TrainConfig, num_steps: int) -> None:
    """Raises TrainingError when the samples that were bad are more than the epochs begun so far may have."""
    steps_per_epoch = max(1, num_steps // config.epochs)
    epochs = position.step // steps_per_epoch + 1
    num_bad, num_samples = sum(position.skipped.values()), epochs * steps_per_epoch * config.global_batch_size
    if num_bad > config.max_error_rate * num_samples:
        raise TrainingError(
            f"{num_bad} of the {num_samples} samples of {epochs} epochs could not be used by step {position.step} "
            f"({', '.join(f'{kind}: {count}' for kind, count in position.skipped.items())}; first: "
            f"{', '.join(list(position.skipped_keys)[:5])}), more than --max-error-rate {config.max_error_rate}; mend the "
            f"shards, or run the command again with a higher one"
        )


def not_finite(loss: float, step: int, keys: list[str], lr: float) -> str:
    """The sentence a run ends with; all keys are named so that the batch can be looked at."""
    return (
        f"the loss became {loss} at step {step + 1} (learning rate {lr:.3g}) on the images {', '.join(sorted(keys))}; the step was not "
        f"taken: look at these images, or run the command again with a lower --lr or with --clip-norm to go on from the last "
        f"checkpoint"
    )


class Stopwatch:
    """Since the last reading: images and captions per second, shares of time waiting for data and of padding, seconds left."""

    def __init__(self, step: int, num_steps: int) -> None:
        self._num_steps = num_steps
        self._since_step = step
        self._begun = time.perf_counter()
        self._images = self._captions = self._wait_s = self._text_share = 0.0

    def waiting(self) -> "_Span":
        return _Span(self._waited)

    def paused(self) -> "_Span":
        return _Span(self._pause)

    def add(self, images: float, captions: float, text_share: float) -> None:
        """One step. text_share: of the token positions that were computed, those that are no padding."""
        self._images += images
        self._captions += captions
        self._text_share += text_share

    def read(self, step: int) -> Metrics:
        elapsed = max(time.perf_counter() - self._begun, 1e-9)
        num_steps = max(1, step - self._since_step)
        rates = {
            "images_per_s": round(self._images / elapsed, 1),
            "captions_per_s": round(self._captions / elapsed, 1),
            "data_wait_percent": round(100 * self._wait_s / elapsed, 1),
            "padding_percent": round(100 * (1 - self._text_share / num_steps), 1),
            "eta_s": round(elapsed / num_steps * (self._num_steps - step)),
        }
        self._since_step, self._begun = step, time.perf_counter()
        self._images = self._captions = self._wait_s = self._text_share = 0.0
        return rates

    def _waited(self, seconds: float) -> None:
        self._wait_s += seconds

    def _pause(self, seconds: float) -> None:
        self._begun += seconds


class _Span:
    """A with-block whose length goes to `add`."""

    def __init__(self, add: Callable[[float], None]) -> None:
        self._add = add

    def __enter__(self) -> None:
        self._begun = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._add(time.perf_counter() - self._begun)
