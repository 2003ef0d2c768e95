"""What the training driver says and refuses before and after Ray Train runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
from conftest import Demo, pack
from tiny_families import tiny_family
from training_runs import small_run

from raycap import storage
from raycap.errors import StorageError, UserError
from raycap.schema import Sample
from raycap.shards import read_manifest
from raycap.training import driver
from raycap.training.watch import MetricsFile, read_records


def test_more_epochs_of_a_finished_run_are_refused_with_the_way_to_train_on(demo: Demo, tmp_path: Path) -> None:
    identity = asdict(small_run(demo, str(tmp_path)))
    (tmp_path / "config.json").write_text(json.dumps(identity))
    (tmp_path / "train.json").write_text("{}")
    with pytest.raises(
        UserError, match=rf"finished run .*epochs 3 -> 5.*another --out, with --init-from {tmp_path}/checkpoint"
    ):
        driver._finished(str(tmp_path), identity | {"epochs": 5})
    (tmp_path / "train.json").unlink()
    with pytest.raises(UserError, match=r"choose another --out$"):
        driver._finished(str(tmp_path), identity | {"epochs": 5})


def test_a_run_whose_cider_never_moved_says_what_the_best_was_chosen_by() -> None:
    assert "CIDEr was 0.000 at each of the 3 evaluations" in driver._chosen_by_loss([0.0, 0.0, 0.0])
    assert driver._chosen_by_loss([0.0, 0.1]) == driver._chosen_by_loss([0.0]) == ""


def test_captions_that_the_tokenizer_does_not_know_are_refused_with_examples(
    demo: Demo, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, _ = tiny_family("blip")
    config = replace(small_run(demo, str(tmp_path)), tokenizer="/the/tokenizer")

    def manifest_of(name: str, captions: list[str]) -> str:
        samples = [Sample(key=str(i), image=b"x", ext="jpg", captions=(c,)) for i, c in enumerate(captions)]
        return pack(str(tmp_path / name), samples, samples_per_shard=2)

    known = manifest_of("known", ["two dogs", "a red kite on the hill"] * 5)
    driver._check_words(config, spec, read_manifest(known))
    assert capsys.readouterr().out == ""
    few = manifest_of("few", ["two dogs and one red cat on the big blue hill", "two dogs and one red cat on 狗"])
    driver._check_words(config, spec, read_manifest(few))
    assert "% of the tokens of 2 captions are unknown to the tokenizer (in '狗')" in capsys.readouterr().out
    foreign = manifest_of("foreign", ["狗 山", "上 dogs"] * 3)
    with pytest.raises(
        UserError,
        match=r"75.0 % of the tokens of 6 captions .*'/the/tokenizer' \(in '狗', '山', '上'\), more than 10 %",
    ):
        driver._check_words(config, spec, read_manifest(foreign))


def test_a_torn_last_line_of_the_metrics_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": 1.5}\n{"step": 3, "lo')
    assert [record["step"] for record in read_records(str(tmp_path))] == [1, 2]
    file = MetricsFile(str(tmp_path), step=1)
    assert file.resumed(1) == {"step": 1, "resumed_from": 1}
    MetricsFile(str(tmp_path), step=1).resumed(1)
    assert [r["resumed_from"] for r in read_records(str(tmp_path)) if "resumed_from" in r] == [1, 1]
    assert [r["loss"] for r in read_records(str(tmp_path)) if "loss" in r] == [2.0]


def test_a_full_disk_leaves_a_status_that_is_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, job_module: ModuleType
) -> None:
    job_module._write_status(str(tmp_path), "train_blip", "running", None, None)

    def full(url: str, data: bytes) -> None:
        raise StorageError("no space")

    monkeypatch.setattr(storage, "put", full)
    job_module._try_write_status(str(tmp_path), "train_blip", "failed", 2, "no space is left")
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["error"]) == ("failed", 2, "no space is left")
