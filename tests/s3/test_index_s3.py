"""An img2dataset folder on S3 is indexed into S3 and read as the same folder on disk, with one request in twenty failing."""

from pathlib import Path

import pytest
from img2dataset_output import BAD, LOST, Tried, write_parquet, write_tar
from s3_server import BUCKET, client, faults
from test_img2dataset import read_all

from raycap import storage
from raycap.data.index import open_shards
from raycap.errors import StorageError
from raycap.shards import check_shards, read_manifest

pytestmark = [pytest.mark.ray, pytest.mark.s3]
ROOT = f"s3://{BUCKET}/img2dataset"


@pytest.mark.parametrize("write", [write_tar, write_parquet])
def test_the_samples_of_a_folder_on_s3_are_those_of_the_folder_on_disk(
    ray_cluster: str, s3_endpoint: str, tmp_path: Path, write: type
) -> None:
    root = f"{ROOT}/{write.__name__}"
    for shard in (0, 1, 3):
        tried = [Tried(f"caption {shard} {i}", b"%d-%d " % (shard, i) * 500) for i in range(130)]
        write(tmp_path / "out", shard, [LOST, *tried, BAD, Tried(" ")])
    shards = sorted(path for path in (tmp_path / "out").glob("0000*") if path.suffix in (".tar", ".parquet"))
    last = next(path for path in reversed(shards) if write is write_parquet or path.suffix == ".tar")
    if write is write_tar:
        last.write_bytes(last.read_bytes()[:300_000])  # the run was killed
    for name in storage.list_files(f"{tmp_path}/out"):
        storage.put(f"{root}/data/{name}", storage.read_bytes(f"{tmp_path}/out/{name}"))

    local = open_shards(f"{tmp_path}/out", f"{tmp_path}/index", report=lambda _: None)
    with faults(s3_endpoint, fail_every=20) as done:
        there = open_shards(f"{root}/data", f"{root}/index", report=lambda _: None)
        again = read_manifest(f"{root}/data", f"{root}/index")
        samples = read_all(again)
    assert done["failed"] >= 1
    assert samples == read_all(local)
    assert (there.fingerprint, there.skipped, there.failures) == (local.fingerprint, local.skipped, local.failures)
    assert storage.list_files(f"{root}/data") == storage.list_files(f"{tmp_path}/out")
    check_shards(again)
    client().delete_object(Bucket=BUCKET, Key=f"img2dataset/{write.__name__}/data/{local.shards[0]}")
    with pytest.raises(StorageError, match=rf"1 of 3 shards .* first: '{local.shards[0]}' is missing"):
        check_shards(again)
    with pytest.raises(StorageError, match="has no such key"):
        read_all(again)
