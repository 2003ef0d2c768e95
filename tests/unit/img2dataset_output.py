"""Folders as img2dataset 1.47 writes them: WebDataset tars with a table beside each, or Parquet with the images in it."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import webdataset

SAMPLES_PER_SHARD = 10_000  # its default: keys have nine digits
NOT_FOUND = "HTTP Error 404: Not Found"


@dataclass(frozen=True)
class Tried:
    """One URL that img2dataset tried. image: None where that failed, for the reason `error`."""

    caption: str | None = "a cat"
    image: bytes | None = b"\xff\xd8 an image"
    status: str = "success"
    error: str | None = None


LOST = Tried(image=None, status="failed_to_download", error=NOT_FOUND)
BAD = Tried(image=None, status="failed_to_resize", error="image too small")


def key_of(shard: int, i: int) -> str:
    return f"{shard * SAMPLES_PER_SHARD + i:09d}"


def row_of(shard: int, i: int, tried: Tried) -> dict[str, Any]:
    found = tried.image is not None
    return {
        "url": f"http://host/{shard}/{i}.jpg",
        "caption": tried.caption,
        "key": key_of(shard, i),
        "status": tried.status,
        "error_message": tried.error,
        "width": 64 if found else None,
        "height": 48 if found else None,
        "original_width": 640 if found else None,
        "original_height": 480 if found else None,
        "exif": json.dumps({}) if found else None,
        "sha256": hashlib.sha256(tried.image).hexdigest() if tried.image is not None else None,
    }


def schema(**images: pa.DataType) -> pa.Schema:
    sizes = {name: pa.int32() for name in ("width", "height", "original_width", "original_height")}
    texts = {name: pa.string() for name in ("url", "caption", "key", "status", "error_message")}
    return pa.schema([*texts.items(), *sizes.items(), ("exif", pa.string()), ("sha256", pa.string()), *images.items()])


def write_tar(root: Path, shard: int, tried: list[Tried], captions: bool = True) -> None:
    """00000.tar, 00000.parquet and 00000_stats.json. captions: whether --caption_col was given."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [row_of(shard, i, one) for i, one in enumerate(tried)]
    for row in rows if not captions else ():
        del row["caption"]
    with webdataset.TarWriter(str(root / f"{shard:05d}.tar")) as writer:
        for one, row in zip(tried, rows, strict=True):
            if one.image is not None:
                members = {"__key__": row["key"], "jpg": one.image, "json": json.dumps(row, indent=4)}
                writer.write(members | ({"txt": one.caption or ""} if captions else {}))
    write_table(root / f"{shard:05d}.parquet", rows, schema())
    write_stats(root, shard, tried)


def write_parquet(root: Path, shard: int, tried: list[Tried], encode: str = "jpg") -> None:
    """00000.parquet with the images, and 00000_stats.json."""
    root.mkdir(parents=True, exist_ok=True)
    rows = [row_of(shard, i, one) | {encode: one.image} for i, one in enumerate(tried)]
    write_table(root / f"{shard:05d}.parquet", rows, schema(**{encode: pa.binary()}))
    write_stats(root, shard, tried)


def write_table(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=100)


def write_stats(root: Path, shard: int, tried: list[Tried]) -> None:
    counts = Counter(one.status for one in tried)
    stats = {"count": len(tried), "successes": counts["success"], **counts, "start_time": 0.0, "end_time": 1.0}
    reasons = Counter(one.error or one.status for one in tried)
    (root / f"{shard:05d}_stats.json").write_text(json.dumps(stats | {"status_dict": reasons}))
