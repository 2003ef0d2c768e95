"""Reads a data set of any of the known formats: which one it is shows in the first bytes of its annotations."""

import json
import re
from typing import get_args

from raycap import storage
from raycap.config import DatasetFormat
from raycap.datasets.coco import read_coco
from raycap.datasets.conceptual import read_conceptual
from raycap.datasets.dataset import DatasetRead, refuse_split
from raycap.datasets.flickr import read_flickr
from raycap.datasets.karpathy import read_karpathy
from raycap.datasets.lavis import read_lavis
from raycap.errors import UserError

_TOKEN_LINE = re.compile(r"([^\t]+)#\d+\t")


def read_dataset(annotations: str, images: str, *, format: DatasetFormat = "auto", split: str = "") -> DatasetRead:
    """The samples of a data set; see the reader of the format for what it takes and raises.

    format: auto finds it in the content and raises UserError where it cannot. split: of a file that holds several, else "".
    """
    found = detect_format(annotations) if format == "auto" else format
    if found == "img2dataset":
        raise UserError(
            f"'{annotations}' is a file, and img2dataset's output is a folder of shards; give it as --images, without "
            f"--annotations"
        )
    if found == "karpathy":
        return read_karpathy(annotations, images, split)
    if found in ("flickr8k", "flickr30k"):
        return read_flickr(annotations, images, split)
    refuse_split(split, annotations, found)
    if found == "lavis":
        return read_lavis(annotations, images)
    if found == "conceptual":
        return read_conceptual(annotations, images)
    return read_coco(annotations, images)


def detect_format(annotations: str) -> DatasetFormat:
    """The format of the file, from its first 64 KB. Raises UserError if they tell none."""
    data = storage.read_head(annotations)
    if other := _not_read_yet(data):
        raise UserError(
            f"'{annotations}' is {other}, which raycap does not read yet; write its captions as CSV with the header `image,caption` and "
            f"commas, in UTF-8, or as COCO's captions_*.json"
        )
    head = data.decode("utf-8", "replace")
    start = head.lstrip()
    if start.startswith("["):
        return "lavis"
    if start.startswith("{"):
        keys = set(re.findall(r'"(\w+)"\s*:', start))
        if keys & {"sentences", "sentids"}:
            return "karpathy"
        if keys & {"annotations", "file_name", "licenses", "coco_url"}:
            return "coco"
    if found := _detect_table(start):
        return found
    formats = ", ".join(name for name in get_args(DatasetFormat) if name not in ("auto", "img2dataset"))
    raise UserError(
        f"cannot tell the format of '{annotations}', which begins with {json.dumps(start[:60])}; pass --format with one of "
        f"{formats}"
    )


def _not_read_yet(data: bytes) -> str:
    """What a file of captions is that would otherwise be taken for another or for nothing; "" of others."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "text in UTF-16"
    if data.startswith(b"PAR1"):
        return "a Parquet table, as Hugging Face's data sets are"
    first, _, rest = data.decode("utf-8", "replace").strip().partition("\n")
    if first.startswith("{"):
        try:
            row = json.loads(first)
        except ValueError:
            row = None
        if isinstance(row, dict) and ((rest and not row.keys() & {"images", "annotations"}) or "file_name" in row):
            return "a JSON Lines file, such as metadata.jsonl of an image folder"
        if re.search(
            r'"(caption_str|reference_strs)"|"dataset_name"\s*:\s*"textcaps"', data.decode("utf-8", "replace")
        ):
            return "a file of TextCaps"
        return ""
    columns = [column.strip().strip('"').lower() for column in re.split(r"[,;\t|]", first)]
    names = {"file_name", "filename", "file", "image", "image_name", "image_path", "filepath", "path"}
    texts = {"caption", "captions", "text", "comment", "description", "title"}
    if names & set(columns) and texts & set(columns) and _detect_table(f"{first}\n{rest}") is None:
        return f"a table with the header {first[:60]!r}"
    return ""


def _detect_table(start: str) -> DatasetFormat | None:
    lines = start.split("\n")
    if match := _TOKEN_LINE.match(start):
        return "flickr30k" if match[1].partition(".")[0].isdecimal() else "flickr8k"
    columns = [column.strip().lower() for column in re.split(r"[|,]", lines[0])]
    if columns == ["image", "caption"]:
        return "flickr8k"
    if columns == ["image_name", "comment_number", "comment"]:
        return "flickr30k"
    # The first line may be a header.
    if any(re.search(r"(^|\t)\s*https?://", line, re.IGNORECASE) and "\t" in line for line in lines[:2]):
        return "conceptual"
    return None
