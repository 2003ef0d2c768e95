"""Reads the json lists of BLIP and LAVIS: coco_karpathy_*.json, nocaps_*.json, flickr30k_*.json, cc3m.json, sbu.json."""

import json
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raycap import storage
from raycap.datasets.dataset import DatasetRead, is_empty, key_of, keys_of, locate, refuse_missing, tidy
from raycap.errors import UserError
from raycap.schema import SampleRef

_COCO_NAME = re.compile(r"COCO_[a-z]+\d{4}_(\d{12})|(\d{12})")  # of 2014 and of 2017
_WEB_NAME = re.compile(r"\d+_\d{1,10}")  # {row}_{crc32 of the URL}: images that were downloaded one by one


def read_lavis(annotations: str, images: str) -> DatasetRead:
    """Returns one sample per image that has captions, in the order of first mention.

    annotations: path or URL of a JSON list of {"image", "caption"}: one row per caption (train) or one per image with a
    list of captions (val, test). Captions that come in rows of their own are sorted, because a row has no number; those
    of a list keep its order. images: the folder or URL that `image` is relative to; of an absolute `image`, which is a
    path of whoever wrote the list, and of one that is not there, the file name alone is looked up.
    The id of an image of COCO is the number in its file name (val and test have no other, train calls it "coco_522418");
    else what the row says, if it does.
    A missing image of a list of web images (a row with `url`, or LAVIS's names of CC3M) is counted, as is usual of links;
    of any other list it is refused. Raises UserError for that, for a file that is not such a list, and when nothing
    usable is left; StorageError when a path does not exist.
    """
    rows = _parse(storage.read_bytes(annotations), annotations)
    skips = DatasetRead(samples=())
    single: dict[str, list[str]] = {}  # captions of rows of their own
    listed: dict[str, list[str]] = {}
    ids: dict[str, int | str | None] = {}
    is_web = False
    for number, row in enumerate(rows):
        image = row.get("image") if isinstance(row, dict) else None
        if not isinstance(image, str) or not PurePosixPath(image).name:
            skips.skip(f"[{number}]", "row without image", unusable=True)
            continue
        path = PurePosixPath(image)
        name = str(path)
        is_web = is_web or "url" in row or _WEB_NAME.fullmatch(path.stem) is not None
        ids.setdefault(name, _image_id(row, path))
        given = row.get("caption")
        target = listed if isinstance(given, list) else single
        for text in given if isinstance(given, list) else [given] if "caption" in row else []:
            if caption := tidy(text):
                target.setdefault(name, []).append(caption)
            else:
                reason = "row without caption" if is_empty(text) else "row whose caption is no text"
                skips.skip(key_of(name), reason, unusable=not is_empty(text))
    captions = {
        name: (*listed.get(name, ()), *sorted(single.get(name, ()))) for name in ids if name in listed or name in single
    }
    for name in ids.keys() - captions.keys():
        skips.skip(key_of(name), "image without captions")
    if not captions:
        raise UserError(
            f"no sample in '{annotations}': none of its {len(rows)} rows is an image with a caption (skipped "
            f"{skips.describe_skipped()}); pass a list that has captions"
        )
    paths = _find(captions, is_web, annotations, images)
    for name in captions.keys() - paths.keys():
        skips.skip(key_of(name), "image file is missing")
    shown = {name: path if name.startswith("/") else name for name, path in paths.items()}  # no path of somebody else's
    keys = keys_of(shown.values())
    samples = tuple(
        SampleRef(key=keys[shown[name]], url=storage.join(images, paths[name]), captions=texts, image_id=ids[name])
        for name, texts in captions.items()
        if name in paths
    )
    return replace(skips, samples=samples)


def _find(names: Collection[str], is_web: bool, annotations: str, images: str) -> dict[str, str]:
    """name -> path below images of those that are there: the name itself, or its last part alone.

    Raises UserError if one is not and the list is of no web images, or if none is.
    """
    present = set(storage.iter_names(images))
    paths = locate(names, present, images, by_last_part=True)
    if not is_web or not paths:
        refuse_missing(names, paths.keys(), annotations, images)
    return paths


def _parse(data: bytes, annotations: str) -> list[Any]:
    try:
        document = json.loads(data)
    except ValueError as e:
        content = f"JSON is broken: {e}" if data.strip() else "it is empty"
        raise UserError(
            f"cannot read a list of captions from '{annotations}': {content}; pass BLIP's or LAVIS's json"
        ) from e
    if not isinstance(document, list):
        raise UserError(
            f"cannot read a list of captions from '{annotations}': it holds {type(document).__name__}, not a list of "
            f"rows with 'image' and 'caption'; pass BLIP's or LAVIS's json"
        )
    return document


def _image_id(row: dict[str, Any], path: PurePosixPath) -> int | str | None:
    if match := _COCO_NAME.fullmatch(path.stem):
        return int(match[1] or match[2])
    given = row.get("image_id", row.get("img_id"))
    return given if isinstance(given, int | str) else None
