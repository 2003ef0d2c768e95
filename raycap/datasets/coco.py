"""Reads COCO captions (2014, 2017 and data sets written like them). Owns the annotation format; decodes no image."""

import json
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raycap import storage
from raycap.datasets.dataset import DatasetRead, key_of, refuse_missing, tidy
from raycap.errors import UserError
from raycap.schema import SampleRef


def read_coco(annotations: str, images: str) -> DatasetRead:
    """Returns one sample per image that has captions, in the order of the file's `images`.

    annotations: path or URL of captions_*.json. images: the folder or URL that `file_name` is relative to. Captions
    lose surrounding and repeated whitespace (an eighth of COCO's end in a space, some contain a newline) and come in
    the order of their annotation ids, because the file itself is in no image order.
    Raises UserError when the file is not COCO captions, when nothing usable is left, when two images would share an id,
    or when an image file is missing; StorageError when a path does not exist.
    """
    image_entries, annotation_entries = _parse(storage.read_bytes(annotations), annotations)
    names = _file_names(image_entries, annotations)
    skips = DatasetRead(samples=())
    captions = _captions_by_image(annotation_entries, names, skips)
    for image_id, name in names.items():
        if image_id not in captions:
            skips.skip(key_of(name), "image without captions")
    with_captions = {image_id: name for image_id, name in names.items() if image_id in captions}
    if not with_captions:
        raise UserError(
            f"no sample in '{annotations}': {len(image_entries)} images and {len(annotation_entries)} annotations, but "
            f"no image has a caption (skipped {skips.describe_skipped()}); pass a captions_*.json, not an instances_*.json"
        )
    refuse_missing(list(with_captions.values()), set(storage.iter_names(images)), annotations, images)
    samples = tuple(
        SampleRef(
            key=key_of(name), url=storage.join(images, name), captions=tuple(captions[image_id]), image_id=image_id
        )
        for image_id, name in with_captions.items()
    )
    return replace(skips, samples=samples)


def _parse(data: bytes, annotations: str) -> tuple[list[Any], list[Any]]:
    try:
        document = json.loads(data)
    except ValueError as e:  # JSONDecodeError and UnicodeDecodeError
        content = f"JSON is broken: {e}" if data.strip() else "it is empty"
        raise UserError(f"cannot read COCO captions from '{annotations}': {content}; pass a captions_*.json") from e
    found: Any = type(document).__name__
    if isinstance(document, dict):
        images, entries = document.get("images"), document.get("annotations")
        if isinstance(images, list) and isinstance(entries, list):
            return images, entries
        found = f"an object with the keys {sorted(document)[:8]}"
    raise UserError(
        f"cannot read COCO captions from '{annotations}': it holds {found}, not an object with the lists 'images' and "
        f"'annotations'; pass a captions_*.json"
    )


def _file_names(entries: list[Any], annotations: str) -> dict[int | str, str]:
    """image id -> file name, normalised. Ids are strings in some data sets that are written like COCO."""
    names: dict[int | str, str] = {}
    for position, entry in enumerate(entries):
        image_id = entry.get("id") if isinstance(entry, dict) else None
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        if not isinstance(image_id, int | str) or not isinstance(file_name, str) or not PurePosixPath(file_name).name:
            raise UserError(
                f"images[{position}] in '{annotations}' has no id and file_name: {str(entry)[:100]}; every image of a "
                f"COCO captions file needs both"
            )
        name = str(PurePosixPath(file_name))
        if image_id in names:
            raise UserError(
                f"image id {image_id!r} occurs twice in '{annotations}' ('{names[image_id]}' and '{name}'), so its "
                f"captions belong to neither; make the ids unique"
            )
        names[image_id] = name
    return names


def _captions_by_image(
    entries: list[Any], names: dict[int | str, str], skips: DatasetRead
) -> dict[int | str, list[str]]:
    captions: dict[int | str, list[str]] = {}
    for entry in sorted(entries, key=_annotation_order):
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(image_id, int | str) or image_id not in names:
            skips.skip(str(image_id), "annotation of an unknown image")
        elif caption := tidy(entry.get("caption")):
            captions.setdefault(image_id, []).append(caption)
        else:
            skips.skip(key_of(names[image_id]), "annotation without caption")
    return captions


def _annotation_order(entry: Any) -> tuple[bool, int]:
    """By id; entries without an int id keep the file's order, behind the others (sorting is stable)."""
    annotation_id = entry.get("id") if isinstance(entry, dict) else None
    return (False, annotation_id) if isinstance(annotation_id, int) else (True, 0)
