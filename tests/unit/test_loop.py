"""raycap/training/loop.py over one process: what a step computes, when things are called, and that a run resumes exactly."""

import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Demo, pack
from test_batch import plan_of, samples_of, source_of
from tiny import tiny_blip_config
from torch import Tensor
from transformers import BlipForConditionalGeneration

from raycap.config import TrainConfig
from raycap.data.batch import Batch, Source, iterate_local
from raycap.errors import TrainingError
from raycap.image import normalize
from raycap.models.blip import Blip
from raycap.shards import Manifest, read_manifest
from raycap.text import load_tokenizer
from raycap.training import loop
from raycap.training.engine import PlainEngine
from raycap.training.loop import Metrics, Position, Stopwatch, count_skipped, keys_digest, learning_rate, train

torch.set_num_threads(1)
CPU = torch.device("cpu")


def config_of(demo: Demo, **changes: Any) -> TrainConfig:
    """Batches of 8 images in two micro steps, two captions each; no step but the last is evaluated or saved."""
    return TrainConfig(
        **{
            "train_shards": demo.train,
            "val_shards": demo.val,
            "tokenizer": demo.tokenizer,
            "num_workers": 1,
            "global_batch_size": 8,
            "micro_batch_size": 4,
            "captions_per_image": 2,
            "image_size": 32,
            "lr": 3e-3,
            "warmup_steps": 3,
            "log_every": 1,
            "eval_every": 1000,
            "checkpoint_every": 1000,
            "max_error_rate": 1.0,
        }
        | changes
    )


def data_of(demo: Demo) -> Source:
    source = source_of(demo)
    return replace(source, image=replace(source.image, size=32))


def model_of(demo: Demo, seed: int = 0, dropout: float = 0.0) -> Blip:
    config = tiny_blip_config(vocab_size=load_tokenizer(demo.tokenizer).get_vocab_size())
    config.text_config.hidden_dropout_prob = config.text_config.attention_probs_dropout_prob = dropout
    torch.manual_seed(seed)
    return Blip(config)


class RecordingEngine(PlainEngine):
    """Keeps the gradients of every optimizer step, before they are clipped."""

    def __init__(self, module: torch.nn.Module, config: TrainConfig) -> None:
        super().__init__(module, config, CPU, -(-config.global_batch_size // config.micro_batch_size))
        self.gradients: list[dict[str, Tensor]] = []

    def step(self, lr: float) -> None:
        gradients = {n: p.grad.clone() for n, p in self.module.named_parameters() if p.grad is not None}
        super().step(lr)
        if all(p.grad is None for p in self.module.parameters()):
            self.gradients.append(gradients)


@dataclass
class Run:
    """A loop and everything it calls back, in order: (name, step)."""

    engine: RecordingEngine
    config: TrainConfig
    source: Source
    manifest: Manifest
    position: Position = field(default_factory=Position)
    ciders: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    calls: list[tuple[str, int]] = field(default_factory=list)
    records: list[Metrics] = field(default_factory=list)
    on_save: Callable[[Position], None] = lambda _: None

    def train(self, num_steps: int, batches: Iterator[Batch] | None = None) -> "Run":
        plan = plan_of(self.manifest, self.config.global_batch_size)
        train(
            self.engine,
            batches or iterate_local(plan, self.manifest, self.source, self.position.step, num_steps),
            config=self.config,
            image=self.source.image,
            position=self.position,
            num_steps=num_steps,
            evaluate=self._evaluate,
            save=self._save,
            save_best=lambda position, metrics: self.calls.append((f"best {metrics['cider']}", position.step)),
            log=self.records.append,
        )
        return self

    def _evaluate(self, step: int) -> Metrics:
        self.calls.append(("evaluate", step))
        return {
            "cider": self.ciders.pop(0) if self.ciders else 0.0,
            "val_loss": self.losses.pop(0) if self.losses else 1.0,
        }

    def _save(self, position: Position) -> None:
        self.calls.append(("save", position.step))
        self.on_save(position)

    def of(self, name: str) -> list[Any]:
        return [record[name] for record in self.records if name in record]


def run_of(demo: Demo, *, model: Blip | None = None, root: str = "", **changes: Any) -> Run:
    config = config_of(demo, **changes)
    return Run(
        RecordingEngine(model or model_of(demo), config), config, data_of(demo), read_manifest(root or demo.train)
    )


# ---- what a step computes


def test_the_loss_falls(demo: Demo) -> None:
    losses = run_of(demo, micro_batch_size=8, lr=1e-2).train(24).of("loss")
    assert len(losses) == 24
    assert losses[0] == pytest.approx(math.log(load_tokenizer(demo.tokenizer).get_vocab_size()), rel=0.05)
    assert np.mean(losses[-5:]) < 0.6 * losses[0]


def test_loss_and_gradients_are_those_of_the_plain_definition(demo: Demo) -> None:
    """By hand, one caption at a time through transformers' BLIP: token losses summed, divided by the number of tokens."""
    source, manifest = data_of(demo), read_manifest(demo.train)
    model = model_of(demo)
    published = BlipForConditionalGeneration(
        tiny_blip_config(vocab_size=load_tokenizer(demo.tokenizer).get_vocab_size())
    )
    published.load_state_dict(model.state_dict())
    (batch,) = iterate_local(plan_of(manifest, 8), manifest, source, 0, 1)
    total, num_tokens = torch.zeros(()), 0
    for pixels, rows in zip(batch.pixel_values, batch.labels, strict=True):
        pixel_values = normalize(torch.tensor(pixels[None]), source.image)
        for row in rows:
            targets = torch.tensor([i for i in row if i != -100])
            ids = torch.cat([torch.tensor([source.text.bos_id]), targets])
            logits = published(pixel_values, ids[None]).logits[0]
            total = total + F.cross_entropy(logits[:-1], targets, reduction="sum")
            num_tokens += len(targets)
    (total / num_tokens).backward()
    expected = {name: p.grad for name, p in published.named_parameters() if p.grad is not None}

    run = run_of(demo, model=model, micro_batch_size=3).train(1)
    assert run.of("loss") == [pytest.approx(total.item() / num_tokens, rel=1e-5)]
    (gradients,) = run.engine.gradients
    scale = max(g.abs().max() for g in expected.values())
    assert len(gradients) > 50
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert (gradient - expected[name]).abs().max() < 1e-5 * scale, name


@pytest.mark.parametrize("size", [1, 3, 8, 64])
def test_the_losses_do_not_depend_on_the_micro_batch_size(demo: Demo, size: int) -> None:
    expected = run_of(demo).train(5)
    other = run_of(demo, micro_batch_size=size).train(5)
    assert other.of("loss") == pytest.approx(expected.of("loss"), rel=1e-5)
    assert other.of("batch_digest") == expected.of("batch_digest")
    assert len(other.engine.gradients) == 5


def test_an_engine_that_averages_gets_a_loss_scaled_to_undo_it(demo: Demo) -> None:
    """DeepSpeed divides by ranks times micro steps: the gradients must be those of an engine that does not."""

    class Averaging(RecordingEngine):
        def backward(self, loss: Tensor) -> None:
            super().backward(loss / self.grad_divisor)

    config = config_of(demo)
    averaging = Averaging(model_of(demo), config)
    averaging.grad_divisor = 6
    run = Run(averaging, config, data_of(demo), read_manifest(demo.train)).train(1)
    expected = run_of(demo).train(1)
    assert run.of("loss") == expected.of("loss")
    for name, gradient in expected.engine.gradients[0].items():
        torch.testing.assert_close(averaging.gradients[0][name], gradient, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_once_per_step_at_their_norm(demo: Demo) -> None:
    config = config_of(demo, clip_norm=0.01, warmup_steps=0)
    model = model_of(demo)
    before = copy.deepcopy(model)
    run = Run(RecordingEngine(model, config), config, data_of(demo), read_manifest(demo.train)).train(1)
    # What plain PyTorch does with the very gradients.
    norm = torch.sqrt(sum((g**2).sum() for g in run.engine.gradients[0].values()))
    assert norm > 0.1
    decayed = [p for p in before.parameters() if p.ndim > 1]
    plain = [p for p in before.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0}]
    optimizer = torch.optim.AdamW(groups, lr=config.lr)
    for name, parameter in before.named_parameters():
        parameter.grad = run.engine.gradients[0][name] * (0.01 / norm)
    optimizer.step()
    for (name, parameter), expected in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(parameter, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_losses_do_not_depend_on_the_rows_of_bad_images(demo: Demo, tmp_path: Path) -> None:
    """A bad image weighs nothing, whatever is in its place."""
    samples = samples_of(demo.train)
    bad = {i: replace(samples[i], image=samples[i].image[:-500] if i % 2 else b"<html>") for i in range(0, 96, 7)}
    other = {i: replace(samples[i], image=b"") for i in bad}
    runs = [
        run_of(demo, root=pack(str(tmp_path / name), [changed.get(i, s) for i, s in enumerate(samples)]))
        for name, changed in (("bad", bad), ("other", other))
    ]
    model, source, manifest = model_of(demo), data_of(demo), runs[0].manifest
    for run in runs:
        run.train(12)
    assert runs[0].of("loss") == runs[1].of("loss")
    assert runs[0].of("batch_digest") == runs[1].of("batch_digest")
    assert runs[0].position.skipped == {"truncated": 7, "not_an_image": 7}
    assert runs[1].position.skipped == {"empty": 14}
    assert sorted(runs[0].position.skipped_keys) == sorted(sample.key for sample in bad.values())
    # The good rows of the first batch that has bad ones, alone.
    step, batch = next(
        (batch.step, batch) for batch in iterate_local(plan_of(manifest, 8), manifest, source, 0, 12) if batch.errors
    )
    good = torch.tensor([key not in dict(batch.errors) for key in batch.keys])
    pixel_values = normalize(torch.tensor(batch.pixel_values)[good], source.image)
    labels = torch.tensor(batch.labels)[good].flatten(0, 1)
    fresh = run_of(demo, model=model, root=manifest.root, lr=1e-30).train(step + 1)
    loss, num_tokens = model(pixel_values, torch.tensor(batch.input_ids)[good].flatten(0, 1), labels)
    assert fresh.of("loss")[step] == pytest.approx(float((loss / num_tokens).detach()), rel=1e-5)


def test_a_global_batch_of_bad_images_alone_has_loss_zero_and_does_not_stop_the_run(demo: Demo, tmp_path: Path) -> None:
    samples = [replace(sample, image=b"") for sample in samples_of(demo.train)[:8]]
    run = run_of(demo, root=pack(str(tmp_path), samples)).train(2)
    assert run.of("loss") == [0.0, 0.0]
    assert run.position.skipped == {"empty": 16}  # rows skipped, in both epochs
    assert len(run.position.skipped_keys) == 8


# ---- stop and resume


def test_a_run_resumed_from_its_saved_state_repeats_losses_and_batches_exactly(demo: Demo, tmp_path: Path) -> None:
    """Steps 5 to 15 of 12 an epoch, with dropout, whose masks must depend on the position alone."""
    changes = {"checkpoint_every": 5}
    whole = run_of(demo, model=model_of(demo, dropout=0.2), **changes)

    def save(position: Position) -> None:
        folder = tmp_path / str(position.step)
        folder.mkdir()
        whole.engine.save_state(folder)
        (folder / "position.json").write_text(json.dumps(asdict(position)))

    whole.on_save = save
    whole.train(15)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "15", "5"]

    torch.manual_seed(99)
    resumed = run_of(demo, model=model_of(demo, seed=8, dropout=0.2), **changes)
    resumed.engine.load_state(tmp_path / "5")
    resumed.position = Position(**json.loads((tmp_path / "5" / "position.json").read_text()))
    resumed.train(15)
    for name in ("step", "loss", "lr", "batch_digest"):
        assert resumed.of(name) == whole.of(name)[5:], name
    assert resumed.position == whole.position
    for name, tensor in whole.engine.weights().items():
        assert torch.equal(tensor, resumed.engine.weights()[name]), name


def test_dropout_differs_between_steps_and_seeds(demo: Demo) -> None:
    """On one and the same batch with a learning rate of nothing, only dropout changes the loss."""
    source, manifest = data_of(demo), read_manifest(demo.train)
    (batch,) = iterate_local(plan_of(manifest, 8), manifest, source, 0, 1)

    def losses(seed: int) -> list[float]:
        run = run_of(demo, model=model_of(demo, dropout=0.3), seed=seed, lr=1e-30, weight_decay=0.0)
        return run.train(3, iter([replace(batch, step=step) for step in range(3)])).of("loss")

    assert losses(0) == losses(0)
    assert len({*losses(0), *losses(1)}) == 6


def test_a_finished_run_does_nothing_more(demo: Demo) -> None:
    run = run_of(demo)
    run.position = Position(step=4)
    run.train(4, iter(()))
    assert run.calls == run.records == []


# ---- schedule


def test_the_learning_rate_rises_to_its_peak_and_falls_along_a_cosine_to_zero(demo: Demo) -> None:
    config = config_of(demo, lr=1.0, warmup_steps=4)
    rates = [learning_rate(config, step, 14) for step in range(15)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(11)])
    assert rates[14] == pytest.approx(0, abs=1e-15)
    without = config_of(demo, lr=2.0, warmup_steps=0)
    assert learning_rate(without, 0, 10) == 2.0
    longer = config_of(demo, lr=1.0, warmup_steps=50)
    assert learning_rate(longer, 9, 10) == 0.2  # a run shorter than its warm-up


def test_every_step_uses_and_logs_the_rate_of_the_schedule(demo: Demo) -> None:
    run = run_of(demo, warmup_steps=2)
    run.train(5)
    assert run.of("lr") == [learning_rate(run.config, step, 5) for step in range(5)]
    assert {group["lr"] for group in run.engine._optimizer.param_groups} == {run.of("lr")[-1]}


def test_evaluations_saves_and_logs_come_at_their_steps_and_the_best_is_by_cider(demo: Demo) -> None:
    run = run_of(demo, eval_every=4, checkpoint_every=3, log_every=5, micro_batch_size=8, captions_per_image=1)
    run.ciders, run.losses = [0.5, 0.5, 0.7], [1.0, 1.1, 1.2]
    run.train(10)
    assert run.calls == [
        ("save", 3),
        ("evaluate", 4),
        ("best 0.5", 4),
        ("save", 6),
        ("evaluate", 8),  # not better than the best
        ("save", 9),
        ("evaluate", 10),
        ("best 0.7", 10),
        ("save", 10),  # after the evaluation, so that a resumed run knows the best
    ]
    assert [record["step"] for record in run.records if "loss" in record] == [5, 10]
    assert [(record["step"], record["cider"]) for record in run.records if "cider" in record] == [
        (4, 0.5),
        (8, 0.5),
        (10, 0.7),
    ]
    assert (run.position.best_cider, run.position.best_step, run.position.step) == (0.7, 10, 10)


def test_where_cider_is_the_same_the_lower_validation_loss_is_the_best_and_then_the_later_step(demo: Demo) -> None:
    run = run_of(demo, eval_every=1, micro_batch_size=8)
    run.losses = [1.5, 0.3, 0.4, 0.3]
    run.train(4)
    assert [call for call in run.calls if call[0].startswith("best")] == [
        ("best 0.0", 1),
        ("best 0.0", 2),
        ("best 0.0", 4),
    ]
    assert (run.position.best_val_loss, run.position.best_step) == (0.3, 4)


def test_training_goes_on_in_training_mode_after_an_evaluation(demo: Demo) -> None:
    run = run_of(demo, eval_every=1, micro_batch_size=8)
    modes: list[bool] = []
    run.engine.module.register_forward_hook(lambda module, *_: modes.append(module.training))
    run._evaluate = lambda _: run.engine.module.eval() and {"cider": 0.0, "val_loss": 1.0}
    run.train(3)
    assert modes == [True, True, True]


# ---- what must stop a run


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_move(demo: Demo, value: float) -> None:
    class Failing(RecordingEngine):
        def forward(self, *arrays: Tensor) -> tuple[Tensor, Tensor]:
            loss, num_tokens = super().forward(*arrays)
            return (loss * value if len(self.gradients) == 3 else loss), num_tokens

    config = config_of(demo, checkpoint_every=1)
    source = data_of(demo)
    run = Run(Failing(model_of(demo), config), config, source, read_manifest(demo.train))
    (batch,) = iterate_local(plan_of(read_manifest(demo.train), 8), read_manifest(demo.train), source, 3, 4)
    weights: dict[str, Tensor] = {}
    run.on_save = lambda _: weights.update(run.engine.weights())
    with pytest.raises(TrainingError) as caught:
        run.train(10)
    message = str(caught.value)
    assert f"the loss became {value} at step 4 (learning rate {config.lr:.3g}) on the images" in message
    assert ", ".join(sorted(batch.keys)) in message
    assert "run the command again with a lower --lr" in message
    assert (run.position.step, run.of("step")[-1], len(run.engine.gradients)) == (3, 3, 3)
    assert run.calls[-1] == ("save", 3)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in run.engine.weights().items())


def test_a_weight_that_became_nan_is_noticed_at_the_next_step(demo: Demo) -> None:
    run = run_of(demo)

    def batches() -> Iterator[Batch]:
        for batch in iterate_local(plan_of(run.manifest, 8), run.manifest, run.source, 0, 5):
            if batch.step == 3:
                with torch.no_grad():
                    run.engine.module.vision_model.post_layernorm.weight[0] = math.nan
            yield batch

    with pytest.raises(TrainingError, match=r"the loss became nan at step 4 "):
        run.train(5, batches())
    assert run.of("step") == [1, 2, 3]


def test_a_batch_of_another_step_is_our_own_fault_and_asserted(demo: Demo) -> None:
    run = run_of(demo)
    with pytest.raises(AssertionError):
        run.train(5, iterate_local(plan_of(run.manifest, 8), run.manifest, run.source, 1, 5))


# ---- what is reported


def test_a_digest_is_of_the_set_of_keys_however_ranks_share_them() -> None:
    keys = ("a/1", "b", "ü")
    assert keys_digest(keys) == keys_digest(keys[::-1]) == keys_digest((*keys, "")) == 1729249916067
    assert keys_digest(keys[:2]) + keys_digest(keys[2:]) == keys_digest(keys)
    assert keys_digest(("a/1", "b", "u")) != keys_digest(keys)
    assert keys_digest(("",)) == 0
    # A global batch of some thousand keys must add up exactly in fp64, in which ranks sum.
    assert 2**loop.DIGEST_BITS * 8192 <= 2**53


def test_skipped_samples_are_counted_all_but_only_the_first_are_named() -> None:
    position = Position(skipped={"empty": 1}, skipped_keys={"x": "empty"})
    many = tuple((f"k{i}", "corrupt") for i in range(1500))
    count_skipped(position, [(("x", "empty"), ("y", "corrupt")), (), many])
    assert position.skipped == {"empty": 2, "corrupt": 1501}
    assert len(position.skipped_keys) == loop.MAX_SKIPPED_KEYS
    assert list(position.skipped_keys.items())[:3] == [("x", "empty"), ("y", "corrupt"), ("k0", "corrupt")]


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.13])
def test_more_bad_samples_than_the_rate_allows_end_the_run_and_fewer_do_not(
    demo: Demo, tmp_path: Path, rate: float
) -> None:
    samples = samples_of(demo.train)
    bad = {i: replace(samples[i], image=b"<html>") for i in range(0, 96, 8)}  # one in eight
    root = pack(str(tmp_path), [bad.get(i, s) for i, s in enumerate(samples)])
    run = run_of(demo, root=root, max_error_rate=rate, epochs=2)
    if rate > 0.125:
        run.train(24)
        assert run.position.skipped == {"not_an_image": 24}
    else:
        with pytest.raises(TrainingError, match=r"samples of 1 epochs could not be used by step \d+ \(not_an_image: "):
            run.train(24)
        assert sum(run.position.skipped.values()) > rate * 96
        assert run.position.step < 12  # it is known before the epoch ends
    assert all(key in {s.key for s in bad.values()} for key in run.position.skipped_keys)


def test_the_share_of_padding_is_that_of_the_micro_batches(demo: Demo) -> None:
    run = run_of(demo, micro_batch_size=3).train(2)
    for step, percent in enumerate(run.of("padding_percent")):
        (batch,) = iterate_local(plan_of(run.manifest, 8), run.manifest, run.source, step, step + 1)
        positions = sum(ids.size for _, ids, _ in batch.micro_batches(3))
        num_padding = sum(int((ids == run.source.text.pad_id).sum()) for _, ids, _ in batch.micro_batches(3))
        assert percent == round(100 * num_padding / positions, 1)
        assert 0 < percent < 30


def test_the_stopwatch_tells_rates_without_pauses_and_the_share_of_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("raycap.training.loop.time.perf_counter", lambda: now)
    watch = Stopwatch(10, 50)
    with watch.waiting():
        now += 1.0
    now += 3.0
    watch.add(40, 80, 0.9)
    for _ in range(3):
        watch.add(0, 0, 0.5)
    with watch.paused():
        now += 1000.0
    assert watch.read(14) == {
        "images_per_s": 10.0,
        "captions_per_s": 20.0,
        "data_wait_percent": 25.0,
        "padding_percent": 40.0,  # the mean of four steps
        "eta_s": 36,  # a second a step
    }
    now += 2.0
    for _ in range(4):
        watch.add(10, 10, 1.0)
    assert watch.read(18) == {
        "images_per_s": 20.0,
        "captions_per_s": 20.0,
        "data_wait_percent": 0.0,
        "padding_percent": 0.0,
        "eta_s": 16,
    }
