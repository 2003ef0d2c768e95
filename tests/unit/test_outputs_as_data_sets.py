"""What raycap writes, opened as its users open it: `datasets`, webdataset, pandas and DuckDB see the samples and rows, and nothing else."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pandas as pd
import pytest
import webdataset
from conftest import Demo
from PIL import Image
from test_bulk import Says, make_manifest, write_images
from test_bulk import job as job  # a fixture
from test_bulk import pool as pool

from raycap import storage, units
from raycap.bulk import plan, unit, verify
from raycap.bulk.caption import _describe
from raycap.bulk.plan import Job
from raycap.data import prepare
from raycap.decode_pool import DecodePool
from raycap.evaluation.evaluate import per_image_schema
from raycap.shards import read_manifest


def load(folder: str, cache: Path) -> Any:
    (split,) = datasets.load_dataset(folder, cache_dir=str(cache)).values()
    return split


@pytest.fixture
def shards(demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    def in_sequence(pending: Any, work: Any, add: Any, doing: str) -> None:
        for each in pending:
            add(work(each))

    monkeypatch.setattr(prepare, "run_units", in_sequence)
    out = str(tmp_path / "shards")
    prepare.prepare_shards(
        f"{demo.coco}/annotations/captions_val.json",
        f"{demo.coco}/images/val",
        out,
        samples_per_shard=5,
        report=lambda _: None,
    )
    return out


def test_a_folder_of_shards_is_a_data_set_of_its_samples(shards: str, tmp_path: Path) -> None:
    num_samples = read_manifest(shards).num_samples
    rows = load(shards, tmp_path / "cache")
    assert len(rows) == num_samples == 12
    assert all(row["json"]["captions"] for row in rows)
    keys = {row["__key__"] for row in rows}
    tars = sorted(str(path) for path in Path(shards).glob("*.tar"))
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert {sample["__key__"] for sample in samples} == keys
    for sample in samples:
        assert json.loads(sample["json"])["captions"]
        Image.open(io.BytesIO(next(sample[ext] for ext in ("jpg", "png") if ext in sample))).load()


@pytest.mark.parametrize("format", ["parquet", "jsonl"])
def test_a_folder_of_captions_is_a_data_set_of_its_rows(
    job: Job, pool: DecodePool, tmp_path: Path, format: str
) -> None:
    job = replace(job, format=format)
    names = write_images(job, 10)
    storage.put(f"{job.images}/broken.png", b"<html>")
    manifest = make_manifest(job)
    for number in plan.pending_units(job, manifest.num_rows):
        unit.make_unit(job, unit.prepare_unit(job, number, plan.rows_of(job, manifest, number), pool), Says())
    _describe(job.out, job.format)
    verify.seal(job, manifest.num_rows, verify.verify_units(job, manifest), 1.0)
    rows = load(job.out, tmp_path / "cache")
    expected = sorted([*names, "broken.png"])
    assert sorted(rows["key"]) == expected
    assert [row["key"] for row in rows if row["error_kind"]] == ["broken.png"]
    data = f"{job.out}/data"
    table = duckdb.sql(f"SELECT key, caption FROM '{data}/*.{format}' ORDER BY key").fetchall()
    assert [key for key, _ in table] == expected
    read = pd.read_parquet if format == "parquet" else lambda path: pd.read_json(path, lines=True)
    frames = pd.concat([read(path) for path in sorted(Path(data).glob(f"*.{format}"))])
    assert sorted(frames["key"]) == expected


def test_a_readme_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    units.describe(str(tmp_path), "*.tar", "train", "x")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("image_id", [7, "x7", None])
def test_what_an_evaluation_says_of_each_image_is_a_data_set(tmp_path: Path, image_id: int | str | None) -> None:
    good = {"key": "a", "image_id": image_id, "caption": "a dog", "references": ["a dog"], "error_kind": None}
    rows = [good] * 200 + [good | {"key": "b", "caption": None, "references": [], "error_kind": "truncated"}]
    lines = [json.dumps(row | {"cider": None if row["error_kind"] else 1.5}) for row in rows]
    (tmp_path / "per_image.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "captions.json").write_text("[]")
    units.describe(str(tmp_path), "per_image.jsonl", "test", "x", per_image_schema(rows))
    found = load(str(tmp_path), tmp_path / "cache")
    assert found[0] == {**good, "cider": 1.5}
    assert (len(found), found[200]["error_kind"], found[200]["cider"]) == (201, "truncated", None)


def test_shards_of_images_of_several_suffixes_and_ids_of_both_kinds_lose_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, ids = tmp_path / "images", [1, "two", 3, 4, 5, 6, "seven"]
    images.mkdir()
    for number, ext in enumerate(("jpg", "jpg", "JPG", "jpg", "jpg", "png", "jpeg")):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(images / f"{number}.{ext}")
    names = sorted(path.name for path in images.iterdir())
    document = {
        "images": [{"id": i, "file_name": name} for i, name in zip(ids, names, strict=True)],
        "annotations": [{"image_id": i, "caption": f"about {i}"} for i in ids],
    }
    (tmp_path / "captions.json").write_text(json.dumps(document))
    out = str(tmp_path / "shards")
    prepare.prepare_shards(str(tmp_path / "captions.json"), str(images), out, report=lambda _: None)
    rows = load(out, tmp_path / "cache")
    assert len(rows) == 7
    assert all(sum(row[ext] is not None for ext in ("jpg", "jpeg", "png")) == 1 for row in rows)
    assert {row["json"]["captions"][0] for row in rows} == {f"about {i}" for i in ids}


def test_a_readme_of_ours_is_renewed_where_that_is_asked_for_and_no_other(tmp_path: Path) -> None:
    units.describe(str(tmp_path), "a", "test", "x")
    units.describe(str(tmp_path), "b", "test", "x")
    assert 'path: "a"' in (tmp_path / "README.md").read_text()
    units.describe(str(tmp_path), "b", "test", "x", renew=True)
    assert 'path: "b"' in (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text("mine")
    units.describe(str(tmp_path), "b", "test", "x", renew=True)
    assert (tmp_path / "README.md").read_text() == "mine"
