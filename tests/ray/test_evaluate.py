"""An evaluation from shards to report: what it writes, and what it says of images and shards that are not as they should be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Demo, pack, samples_of
from s3_server import BUCKET

from raycap import storage
from raycap.captioner import Captioner
from raycap.config import EvaluateConfig, TrainConfig
from raycap.errors import UserError
from raycap.evaluation.evaluate import evaluate

pytestmark = pytest.mark.ray


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_evaluation_writes_every_image_with_its_own_score_and_a_report(
    undisturbed: TrainConfig, demo: Demo, tmp_path: Path
) -> None:
    samples = samples_of(demo.test)
    samples[3] = replace(samples[3], image=samples[3].image[:700])
    shards, checkpoint = pack(str(tmp_path / "shards"), samples), f"{undisturbed.out}/checkpoint"
    config = EvaluateConfig(checkpoint=checkpoint, shards=shards, out=str(tmp_path), micro_batch_size=5, num_beams=3)
    scores = evaluate(replace(config, max_new_tokens=9))
    about = json.loads((tmp_path / "metrics.json").read_text())
    assert about["metrics"] == scores
    assert about["skipped_by_kind"] == {"truncated": 1}
    assert about["verified"] is True
    assert (about["decode"]["num_beams"], about["decode"]["max_new_tokens"]) == (3, 9)

    rows = lines_of(tmp_path / "per_image.jsonl")
    assert [row["key"] for row in rows] == [sample.key for sample in samples]
    assert [tuple(row["references"]) for row in rows] == [sample.captions for sample in samples]
    (skipped,) = [row for row in rows if row["error_kind"]]
    assert (skipped["key"], skipped["error_kind"], skipped["caption"], skipped["cider"]) == (
        samples[3].key,
        "truncated",
        None,
        None,
    )
    captioned = [row for row in rows if not row["error_kind"]]
    assert sum(row["cider"] for row in captioned) / len(captioned) == pytest.approx(scores["cider"])
    captioner = Captioner.load(checkpoint)
    settings = captioner.spec.decode.override(num_beams=3, max_new_tokens=9)
    results = captioner.caption([sample.image for sample in samples], settings)
    assert [result.caption for result in results] == [row["caption"] for row in rows]

    page = (tmp_path / "report.html").read_text()
    assert page.count("<img ") == 3 * 15
    assert f"{scores['cider']:.4f}" in page
    assert "3 beams, at most 9 tokens" in page
    assert samples[3].key in page


@pytest.mark.s3
def test_published_weights_are_evaluated_on_s3_and_marked_as_unverified(
    undisturbed: TrainConfig, demo: Demo, s3_endpoint: str, tmp_path: Path
) -> None:
    published = shutil.copytree(f"{undisturbed.out}/checkpoint", tmp_path / "published")
    (published / "raycap.json").unlink()
    root = f"s3://{BUCKET}/evaluated"
    storage.upload_folder(demo.test, f"{root}/shards", last="manifest.parquet")
    config = EvaluateConfig(checkpoint=str(published), shards=f"{root}/shards", out=root, prompt="a", max_images=3)
    scores = evaluate(config)
    about = json.loads(storage.read_bytes(f"{root}/metrics.json"))
    assert (about["metrics"], about["verified"], about["prompt"], about["num_images"]) == (scores, False, "a", 3)
    page = storage.read_bytes(f"{root}/report.html").decode()
    assert "Unverified checkpoint" in page
    assert page.count("<img ") == 3 * 3


def test_an_image_without_captions_is_counted_as_skipped(undisturbed: TrainConfig, demo: Demo, tmp_path: Path) -> None:
    samples = samples_of(demo.test)[:4]
    shards = pack(str(tmp_path / "shards"), [*samples[:3], replace(samples[3], captions=(" ",))])
    evaluate(EvaluateConfig(checkpoint=f"{undisturbed.out}/checkpoint", shards=shards, out=str(tmp_path)))
    about = json.loads((tmp_path / "metrics.json").read_text())
    assert (about["num_images"], about["skipped_by_kind"]) == (3, {"no_caption": 1})


def test_shards_that_cannot_be_scored_are_refused_in_one_sentence(
    undisturbed: TrainConfig, demo: Demo, tmp_path: Path
) -> None:
    samples = samples_of(demo.test)[:4]
    twice = [samples[0], samples[1], samples[2], samples[0]]
    broken = [replace(sample, image=b"") for sample in samples]
    for name, content, sentence in (
        ("twice", twice, rf"2 images in '.*/twice' have the key '{samples[0].key}'; prepare"),
        ("broken", broken, r"none of the 4 images in '.*/broken' could be decoded \(\{'empty': 4\}\)"),
    ):
        shards = pack(str(tmp_path / name), content, samples_per_shard=2)
        out = tmp_path / "out" / name
        with pytest.raises(UserError, match=sentence):
            evaluate(EvaluateConfig(checkpoint=f"{undisturbed.out}/checkpoint", shards=shards, out=str(out)))
        assert not out.exists()
