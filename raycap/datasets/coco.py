"""Reads COCO captions (2014, 2017 and data sets written like them). Owns the annotation format; decodes no image."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from raycap import storage
from raycap.errors import UserError
from raycap.schema import SampleRef


@dataclass(frozen=True, kw_only=True, slots=True)
class CocoRead:
    """What a caption file holds. skipped: reason -> count of the entries that became no sample or no caption."""

    samples: tuple[SampleRef, ...]
    skipped: dict[str, int]


def read_coco(annotations: str, images: str) -> CocoRead:
    """Returns one sample per image that has captions, in the order of the file's `images`.

    annotations: path or URL of captions_*.json. images: the folder or URL that `file_name` is relative to. Captions
    lose surrounding and repeated whitespace (an eighth of COCO's end in a space, some contain a newline) and come in
    the order of their annotation ids, because the file itself is in no image order.
    Raises UserError when the file is not COCO captions, when nothing usable is left, when two images would share a key
    or an id, or when an image file is missing; StorageError when a path does not exist.
    """
    image_entries, annotation_entries = _parse(storage.read_bytes(annotations), annotations)
    names = _file_names(image_entries, annotations)
    captions, skipped = _captions_by_image(annotation_entries, names)
    with_captions = {image_id: name for image_id, name in names.items() if image_id in captions}
    if len(with_captions) < len(names):
        skipped["image without captions"] = len(names) - len(with_captions)
    if not with_captions:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items()) or "both lists are empty"
        raise UserError(
            f"no sample in '{annotations}': {len(image_entries)} images and {len(annotation_entries)} annotations, but "
            f"no image has a caption ({reasons}); pass a captions_*.json, not an instances_*.json"
        )
    _refuse_missing_files(with_captions, annotations, images)
    samples = tuple(
        SampleRef(key=_key(name), url=storage.join(images, name), captions=tuple(captions[image_id]), image_id=image_id)
        for image_id, name in with_captions.items()
    )
    return CocoRead(samples=samples, skipped=dict(skipped))


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
    id_of_key: dict[str, int | str] = {}
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
        if (key := _key(name)) in id_of_key:
            raise UserError(
                f"the images '{names[id_of_key[key]]}' and '{name}' in '{annotations}' share the key '{key}' (the path "
                f"without suffix), and a key names one image; rename one or remove the duplicate"
            )
        names[image_id] = name
        id_of_key[key] = image_id
    return names


def _key(name: str) -> str:
    return str(PurePosixPath(name).with_suffix(""))


def _captions_by_image(
    entries: list[Any], names: dict[int | str, str]
) -> tuple[dict[int | str, list[str]], Counter[str]]:
    captions: dict[int | str, list[str]] = {}
    skipped: Counter[str] = Counter()
    for entry in sorted(entries, key=_annotation_order):
        image_id = entry.get("image_id") if isinstance(entry, dict) else None
        if not isinstance(image_id, int | str) or image_id not in names:
            skipped["annotation of an unknown image"] += 1
            continue
        text = entry.get("caption")
        caption = " ".join(text.split()) if isinstance(text, str) else ""
        if caption:
            captions.setdefault(image_id, []).append(caption)
        else:
            skipped["annotation without caption"] += 1
    return captions, skipped


def _annotation_order(entry: Any) -> tuple[bool, int]:
    """By id; entries without an int id keep the file's order, behind the others (sorting is stable)."""
    annotation_id = entry.get("id") if isinstance(entry, dict) else None
    return (False, annotation_id) if isinstance(annotation_id, int) else (True, 0)


def _refuse_missing_files(names: dict[int | str, str], annotations: str, images: str) -> None:
    present = set(storage.list_files(images))  # one listing: a stat per file takes minutes on S3
    missing = [name for name in names.values() if name not in present]
    if missing:
        some = ", ".join(f"'{name}'" for name in missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of the {len(names)} images of '{annotations}' are missing below '{images}': {some}; pass "
            f"the folder that the file names are relative to, or complete the download"
        )
