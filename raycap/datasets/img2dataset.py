"""The folder that img2dataset wrote, as it is: which of its files are shards, and what it failed to download.

Tars (`00000.tar`, one sample `<key>.jpg`, `.json`, `.txt`) come with a table `00000.parquet` beside each, of all that was
tried; Parquet output has the images in such tables. Shard numbers may have gaps, and the last tar may be cut. What is in a
shard is raycap/shards' matter.
"""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from raycap import storage
from raycap.errors import StorageError
from raycap.shards import MANIFEST
from raycap.shards.parquet import failure_reason

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
MAX_REASONS = 100  # of failed downloads that are told apart: a message may name a host
UNREADABLE_TABLE = "unknown: the table beside the shard cannot be read"


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A shard as it was listed, and the table beside it, if there is one. version: changes when either file does."""

    name: str
    num_bytes: int
    version: str
    table: str | None


def find_shards(root: str, entries: Sequence[storage.Entry]) -> list[ShardFile]:
    """The shards among the files below root, in the order of their names.

    Where there are tars, every Parquet file is a table that goes with one. Raises StorageError if there are no shards.
    """
    by_name = {entry.name: entry for entry in entries}
    shards = [entry for entry in entries if entry.name.endswith(".tar")]
    if not shards:
        shards = [entry for entry in entries if entry.name.endswith(".parquet") and entry.name != MANIFEST]
        images = [entry.name for entry in entries if entry.name.lower().endswith(IMAGES)]
        if images:
            raise StorageError(
                f"{root!r} holds images as files, {images[0]!r} say, and no shards; captions in files beside them are not read yet: write "
                f"a CSV with the header `image,caption` and give it to jobs/prepare_shards.py --annotations with this folder as "
                f"--images, or run img2dataset with --output_format webdataset"
            )
    if not shards:
        raise StorageError(
            f"no shards below {root!r}: of its {len(entries)} files none ends with .tar or .parquet; give the folder that "
            f"jobs/prepare_shards.py or img2dataset wrote"
        )
    found = []
    for shard in sorted(shards, key=lambda entry: entry.name):
        table = by_name.get(shard.name.removesuffix(".tar") + ".parquet") if shard.name.endswith(".tar") else None
        version = f"{shard.num_bytes}-{shard.etag}" + (f"-{table.num_bytes}-{table.etag}" if table else "")
        found.append(ShardFile(shard.name, shard.num_bytes, version, table.name if table else None))
    return found


def count_failures(root: str, table: str) -> Counter[str]:
    """The rows of the table beside a tar that have no image in it, by `<status>: <message>`.

    A table that was cut counts once, as UNREADABLE_TABLE. Raises StorageError if the file is gone.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = storage.read_bytes(storage.join(root, table))
    try:
        rows = pq.read_table(io.BytesIO(data), columns=["status", "error_message"]).to_pylist()
        failed = [row for row in rows if row["status"] != "success"]
        return Counter(failure_reason(row["status"], row["error_message"]) for row in failed)
    except (pa.ArrowException, OSError, KeyError, UnicodeDecodeError):
        return Counter({UNREADABLE_TABLE: 1})


def shorten(failures: Counter[str]) -> Counter[str]:
    """The most frequent MAX_REASONS; the rest by their status alone."""
    ranked = sorted(failures.items(), key=lambda item: (-item[1], item[0]))
    short = Counter(dict(ranked[:MAX_REASONS]))
    for reason, count in ranked[MAX_REASONS:]:
        short[reason.partition(":")[0] + ": other reasons"] += count
    return short
