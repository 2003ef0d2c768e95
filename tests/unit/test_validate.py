"""raycap/training/validate.py: loss and CIDEr of a split are those of the plain definitions, bad images left out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Demo, pack
from test_batch import samples_of
from test_loop import RecordingEngine, config_of, data_of, model_of
from tiny import tiny_blip_config

from raycap.captioner import Captioner
from raycap.checkpoint import CheckpointSpec
from raycap.data.batch import Source, iterate_local
from raycap.image import normalize
from raycap.metrics.cider import cider
from raycap.models.blip import Blip
from raycap.order import InOrder
from raycap.schema import DecodeSettings
from raycap.shards import Manifest, read_manifest
from raycap.text import load_tokenizer
from raycap.training.validate import Validator

torch.set_num_threads(1)


def trained(demo: Demo) -> Blip:
    """A model whose captions differ between images; none is trained for that."""
    model = model_of(demo)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def captioner_of(demo: Demo, model: Blip, source: Source) -> Captioner:
    tokenizer = load_tokenizer(demo.tokenizer)
    spec = CheckpointSpec(
        kind="blip",
        model_config=tiny_blip_config(vocab_size=tokenizer.get_vocab_size()).to_dict(),
        tokenizer=tokenizer,
        text=source.text,
        image=source.image,
        decode=DecodeSettings(max_new_tokens=10),
    )
    return Captioner(model, spec)


def in_order(manifest: Manifest, global_batch_size: int) -> InOrder:
    return InOrder(shard_sizes=manifest.sizes, num_samples=manifest.num_samples, global_batch_size=global_batch_size)


def evaluate(demo: Demo, root: str, *, global_batch_size: int = 5, micro_batch_size: int = 3) -> dict[str, Any]:
    source, manifest = data_of(demo), read_manifest(root)
    model = trained(demo)
    engine = RecordingEngine(model, config_of(demo))
    validator = Validator(engine, captioner_of(demo, model, source), micro_batch_size)
    order = in_order(manifest, global_batch_size)
    first, second = (validator.evaluate(iterate_local(order, manifest, source, 0, order.num_steps)) for _ in range(2))
    assert first == second  # the references' statistics are kept, the scores must not care
    return first


def test_loss_and_cider_are_those_of_the_whole_split(demo: Demo) -> None:
    source, manifest = data_of(demo), read_manifest(demo.val)
    metrics = evaluate(demo, demo.val)
    model = trained(demo).eval()
    (batch,) = iterate_local(in_order(manifest, 12), manifest, source, 0, 1)
    pixel_values, input_ids, labels = (torch.tensor(array) for array in next(batch.micro_batches(12)))
    with torch.no_grad():
        loss, num_tokens = model(normalize(pixel_values, source.image), input_ids, labels)
    assert metrics["val_loss"] == pytest.approx(float(loss / num_tokens), rel=1e-5)

    samples = samples_of(demo.val)
    results = captioner_of(demo, model, source).caption([sample.image for sample in samples])
    captions = {sample.key: result.caption or "" for sample, result in zip(samples, results, strict=True)}
    assert len(set(captions.values())) > 4
    expected, _ = cider(captions, {sample.key: sample.captions for sample in samples})
    assert metrics["cider"] == pytest.approx(expected)
    assert metrics["num_val_images"] == 12
    shown = sorted(captions)[:4]
    references = {sample.key: sample.captions[0] for sample in samples}
    assert metrics["samples"] == [{"key": k, "caption": captions[k], "reference": references[k]} for k in shown]


@pytest.mark.parametrize(("global_batch_size", "micro_batch_size"), [(12, 12), (7, 2), (1, 1)])
def test_metrics_do_not_depend_on_batches(demo: Demo, global_batch_size: int, micro_batch_size: int) -> None:
    other = evaluate(demo, demo.val, global_batch_size=global_batch_size, micro_batch_size=micro_batch_size)
    expected = evaluate(demo, demo.val)
    assert other.pop("val_loss") == pytest.approx(expected.pop("val_loss"), rel=1e-5)
    assert other == expected


def test_bad_images_are_left_out_as_if_they_were_not_in_the_split(demo: Demo, tmp_path: Path) -> None:
    samples = samples_of(demo.val)
    damaged = [replace(s, image=s.image[:200]) if i in (0, 5) else s for i, s in enumerate(samples)]
    without = [s for i, s in enumerate(samples) if i not in (0, 5)]
    metrics = evaluate(demo, pack(str(tmp_path / "damaged"), damaged))
    expected = evaluate(demo, pack(str(tmp_path / "without"), without))
    assert metrics["num_val_images"] == 10
    assert (metrics.pop("num_val_skipped"), expected.pop("num_val_skipped")) == (2, 0)
    assert metrics.pop("val_loss") == pytest.approx(expected.pop("val_loss"), rel=1e-5)
    assert metrics == expected
