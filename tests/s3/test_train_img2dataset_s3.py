"""Training straight from what img2dataset wrote to S3, with its output there too."""

from pathlib import Path
from typing import Any

import pytest
from conftest import Demo
from img2dataset_output import write_parquet, write_tar
from s3_server import BUCKET, client
from test_train_img2dataset import CUT, check_run, run_of, write_folder

from raycap import storage
from raycap.training.driver import train_captioner

pytestmark = [pytest.mark.ray, pytest.mark.s3]


def seen_below(prefix: str) -> list[dict[str, Any]]:
    """Name, size, time and etag of every object."""
    pages = client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return [
        {name: entry[name] for name in ("Key", "Size", "LastModified", "ETag")}
        for page in pages
        for entry in page["Contents"]
    ]


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_four_steps_from_a_bucket_and_again(
    ray_cluster: str,
    s3_endpoint: str,
    demo: Demo,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    write: type,
) -> None:
    prefix = f"train-img2dataset/{write.__name__}"
    data, out = f"s3://{BUCKET}/{prefix}/data", f"s3://{BUCKET}/{prefix}/run"
    keys = write_folder(tmp_path / "data", write, demo)
    for name in storage.list_files(f"{tmp_path}/data"):
        storage.put(storage.join(data, name), storage.read_bytes(f"{tmp_path}/data/{name}"))
    before = seen_below(f"{prefix}/data/")
    assert len(before) == len(storage.list_files(f"{tmp_path}/data"))
    config = run_of(data, demo.val, demo, out)
    train_captioner(config)
    check_run(out, keys, {CUT: "truncated_shard"} if write is write_tar else {})
    assert storage.exists(f"{out}/index/train/manifest.parquet")
    assert capsys.readouterr().out.startswith("indexed_shards=")
    train_captioner(config)
    assert capsys.readouterr().out.startswith("this run is finished (4 steps)")
    assert seen_below(f"{prefix}/data/") == before
