"""Reads COCO captions (2014, 2017 and data sets written like them). Owns the annotation format; decodes no image."""

import json
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raycap import storage
from raycap.datasets.dataset import DatasetRead, is_empty, key_of, keys_of, locate, refuse_missing, tidy
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
    names, ids = _file_names(image_entries, annotations)
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
    paths = locate(with_captions.values(), set(storage.iter_names(images)), images)
    refuse_missing(list(with_captions.values()), paths, annotations, images)
    keys = keys_of(paths.values())
    samples = tuple(
        SampleRef(
            key=keys[paths[name]],
            url=storage.join(images, paths[name]),
            captions=tuple(captions[image_id]),
            image_id=ids[image_id],
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


def _as_id(given: Any) -> int | str | None:
    """An id to compare by: 1, "1" and 1.0 are one, and a text that is no number is itself."""
    if isinstance(given, str):
        return int(given) if given.isascii() and given.isdecimal() else given
    return (
        int(given) if isinstance(given, int | float) and given == given // 1 and not isinstance(given, bool) else None
    )


def _file_names(entries: list[Any], annotations: str) -> tuple[dict[int | str, str], dict[int | str, int | str]]:
    """image id, see _as_id -> file name, normalised; and -> the id as the file writes it."""
    names: dict[int | str, str] = {}
    ids: dict[int | str, int | str] = {}
    for position, entry in enumerate(entries):
        image_id = _as_id(entry.get("id")) if isinstance(entry, dict) else None
        file_name = entry.get("file_name") if isinstance(entry, dict) else None
        if image_id is None or not isinstance(file_name, str) or not PurePosixPath(file_name).name:
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
        ids[image_id] = image_id if isinstance(entry["id"], float) else entry["id"]
    return names, ids


def _captions_by_image(
    entries: list[Any], names: dict[int | str, str], skips: DatasetRead
) -> dict[int | str, list[str]]:
    captions: dict[int | str, list[str]] = {}
    for entry in sorted(entries, key=_annotation_order):
        image_id = _as_id(entry.get("image_id")) if isinstance(entry, dict) else None
        if image_id is None or image_id not in names:
            given = entry.get("image_id") if isinstance(entry, dict) else entry
            skips.skip(str(given)[:60], "annotation of an unknown image", unusable=True)
        elif entry.get("is_rejected") or entry.get("is_precanned"):  # VizWiz's own tools leave them out
            skips.skip(key_of(names[image_id]), "annotation marked as rejected or precanned")
        elif caption := tidy(entry.get("caption")):
            captions.setdefault(image_id, []).append(caption)
        else:
            empty = is_empty(entry.get("caption"))
            reason = "annotation without caption" if empty else "annotation whose caption is no text"
            skips.skip(key_of(names[image_id]), reason, unusable=not empty)
    return captions


def _annotation_order(entry: Any) -> tuple[bool, int]:
    """By id; entries without an int id keep the file's order, behind the others (sorting is stable)."""
    annotation_id = entry.get("id") if isinstance(entry, dict) else None
    return (False, annotation_id) if isinstance(annotation_id, int) else (True, 0)
