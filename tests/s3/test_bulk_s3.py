"""Bulk captioning with images, checkpoint and output on S3: the rows are those of the same run on local folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from s3_server import BUCKET, client, faults
from tiny import png_images, tiny_checkpoint

from raycap import storage
from raycap.bulk import plan, unit
from raycap.bulk.caption import caption_bucket
from raycap.checkpoint import export_weights, save_checkpoint
from raycap.config import CaptionBucketConfig
from raycap.decode_pool import DecodePool
from raycap.errors import StorageError, UserError
from raycap.schema import DecodeSettings, ImageSpec
from raycap.storage import s3

pytestmark = pytest.mark.s3
ROOT = f"s3://{BUCKET}/bulk"
# The second kind cannot be the name of a local file.
KEYS = ("a b+c%20d.png", "n\u0303o.png", "\u00f1o.png", "q?versionId=1&x#y.png", "ü/日本.PNG", "plain.png", "b/c.png")
S3_KEYS = ("a//b.png", "./x.png", "../y.png", "/lead.png", "trail/")


def make_job(images: str, out: str) -> plan.Job:
    return plan.Job(
        images=images,
        out=out,
        unit_size=4,
        format="jsonl",
        image=ImageSpec(size=32),
        settings=DecodeSettings(),
        checkpoint="x",
        settings_id="x",
        verified=True,
        micro_batch_size=8,
        decode_timeout_s=10.0,
    )


def write(root: str, keys: tuple[str, ...]) -> None:
    for key, data in zip(keys, png_images(len(keys)), strict=True):
        storage.put(storage.join(root, key), data)


def rows_below(out: str) -> list[dict[str, Any]]:
    names = storage.list_files(storage.join(out, "data"))
    return [json.loads(li) for n in names for li in storage.read_bytes(f"{out}/data/{n}").decode().split("\n")[:-1]]


def test_entries_carry_the_etag_and_are_read_only_as_they_were_listed(s3_endpoint: str) -> None:
    root = f"{ROOT}/entries"
    write(root, S3_KEYS)
    entries = storage.list_entries(root)
    assert [entry.name for entry in entries] == sorted(S3_KEYS)
    head = client().head_object(Bucket=BUCKET, Key="bulk/entries/a//b.png")
    found = next(entry for entry in entries if entry.name == "a//b.png")
    assert (found.num_bytes, f'"{found.etag}"') == (head["ContentLength"], head["ETag"])
    assert all(storage.read_entry(root, entry) == storage.read_bytes(f"{root}/{entry.name}") for entry in entries)
    storage.put(f"{root}/a//b.png", b"another image")
    storage.remove(f"{root}/trail/")
    for key, words in (
        ("a//b.png", r"it was replaced since it was listed \("),
        ("trail/", "it was listed but is gone"),
    ):
        entry = next(entry for entry in entries if entry.name == key)
        with pytest.raises(storage.EntryError, match=f"^cannot read '{root}/{key}': {words}"):
            storage.read_entry(root, entry)
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist") as caught:
        storage.read_entry("s3://no-such-bucket/x", entries[0])
    assert not isinstance(caught.value, storage.EntryError)
    assert storage.has_files(root)
    assert not storage.has_files(f"{root}/nothing")


def test_an_image_that_is_forbidden_is_a_row_and_a_storage_that_forbids_all_ends_the_run(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    class Forbids:
        """A client whose bucket policy forbids some requests, which the test server cannot."""

        def __init__(self, inner: Any, forbidden: tuple[str, ...]) -> None:
            self.inner, self.forbidden = inner, forbidden

        def __getattr__(self, name: str) -> Any:
            if name in self.forbidden:
                return self.refuse
            return getattr(self.inner, name)

        def get_object(self, **request: Any) -> Any:
            if request["Key"].endswith("plain.png"):
                self.refuse()
            return self.inner.get_object(**request)

        def refuse(self, **request: Any) -> Any:  # noqa: ARG002
            raise ClientError({"Error": {"Code": "AccessDenied", "Message": ""}}, "Request")

    root = f"{ROOT}/forbidden"
    write(root, KEYS)
    job = make_job(root, f"{ROOT}/forbidden-out")
    manifest = plan.create_manifest(job.out, plan.list_images(root, job.out, ["*"])[0])
    inner = s3._client()
    monkeypatch.setattr(s3, "_client", lambda: Forbids(inner, ()))
    with DecodePool() as pool:
        rows = unit.prepare_unit(job, 0, manifest, pool).rows
        (bad,) = [row for row in rows if row["error_kind"]]
        assert (bad["key"], bad["error_kind"]) == ("plain.png", "unreadable")
        assert (
            bad["error"] == f"cannot read '{root}/plain.png': it was listed but access to it is refused (AccessDenied)"
        )
        monkeypatch.setattr(s3, "_client", lambda: Forbids(inner, ("list_objects_v2",)))
        with pytest.raises(StorageError, match=rf"^cannot list '{root}': .* refuses access \(AccessDenied\)"):
            unit.prepare_unit(job, 0, manifest, pool)


def test_a_role_that_expires_half_way_ends_the_run_and_no_unit_of_refused_images_is_written(s3_endpoint: str) -> None:
    root = f"{ROOT}/expires"
    write(root, KEYS)
    job = make_job(root, f"{ROOT}/expires-out")
    manifest = plan.create_manifest(job.out, plan.list_images(root, job.out, ["*"])[0])
    with DecodePool() as pool:
        for number_read in (0, 2):
            with (
                faults(s3_endpoint, deny_after=number_read),
                pytest.raises(StorageError, match="access to other files there"),
            ):
                unit.prepare_unit(job, 0, plan.rows_of(job, manifest, 0), pool)
        assert not any(
            row["error_kind"] for row in unit.prepare_unit(job, 0, plan.rows_of(job, manifest, 0), pool).rows
        )


def test_roots_that_cannot_be_captioned_are_refused_with_a_sentence(s3_endpoint: str) -> None:
    with pytest.raises(UserError, match=rf"^there are no files below '{ROOT}/nothing'; check --images$"):
        plan.list_images(f"{ROOT}/nothing", f"{ROOT}/o", ["*"])
    with pytest.raises(StorageError, match=r"bucket 'no-such-bucket' does not exist at .*; create it or check the URL"):
        plan.list_images("s3://no-such-bucket/x", f"{ROOT}/o", ["*"])


@pytest.mark.ray
def test_a_run_on_s3_has_the_rows_of_a_run_on_local_folders(
    ray_cluster: str, s3_endpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, model, _ = tiny_checkpoint(seed=3)
    both: list[list[dict[str, Any]]] = []
    for root, keys in ((str(tmp_path), KEYS), (f"{ROOT}/run", KEYS + S3_KEYS)):
        save_checkpoint(f"{root}/checkpoint", export_weights(model), spec, {"step": 0})
        write(f"{root}/images", KEYS)
        storage.put(f"{root}/images/cut.png", png_images(1)[0][:100])
        if keys != KEYS:
            write(f"{root}/images", S3_KEYS)
        config = CaptionBucketConfig(
            checkpoint=f"{root}/checkpoint",
            images=f"{root}/images",
            out=f"{root}/images/out",  # below the images: it must not list itself
            format="jsonl",
            suffixes="*",
            unit_size=5,
        )
        summary = caption_bucket(config)
        assert (summary["num_images"], summary["errors"]) == (len(keys) + 1, {"truncated": 1})
        both.append(rows_below(config.out))
    local, remote = both
    assert [row["key"] for row in remote] == sorted((*KEYS, *S3_KEYS, "cut.png"))
    by_key = {row["key"]: row["caption"] for row in remote}
    assert {row["key"]: row["caption"] for row in local} == {key: by_key[key] for key in (*KEYS, "cut.png")}
    assert sum(caption is None for caption in by_key.values()) == 1
    caption_bucket(config)
    assert "this run is finished" in capsys.readouterr().out
