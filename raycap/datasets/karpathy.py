"""Reads Karpathy's splits, dataset_coco.json, dataset_flickr8k.json and dataset_flickr30k.json. Decodes no image."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from raycap import storage
from raycap.datasets.dataset import DatasetRead, is_empty, key_of, keys_of, locate, refuse_missing, tidy
from raycap.errors import UserError
from raycap.schema import SampleRef

# 30,504 of COCO's validation images were "restored" to training: the 113,287 that papers call Karpathy's train.
_PARTS = {"train": ("train", "restval")}


def read_karpathy(annotations: str, images: str, split: str) -> DatasetRead:
    """Returns one sample per image of a split that has captions, in the order of the file.

    annotations: path or URL of dataset_*.json. images: the folder or URL that holds `filepath`/`filename` (train2014/
    and val2014/ of COCO), or for Flickr, whose files name no folder, anything the images are somewhere below.
    split: train (with restval, as papers mean it), val, test, or restval alone. An image's split says nothing about its
    folder: restval, val and test are all in val2014/. The id is `cocoid`; Flickr has none.
    Raises UserError when the file is not such a file, has no image in the split, or when an image file is missing;
    StorageError when a path does not exist.
    """
    entries = _parse(storage.read_bytes(annotations), annotations)
    counts = Counter(str(entry.get("split")) for entry in entries)
    chosen = [entry for entry in entries if entry.get("split") in _PARTS.get(split, (split,))]
    if not chosen:
        there = ", ".join(f"{name} ({count} images)" for name, count in sorted(counts.items())) or "none"
        raise UserError(
            f"no image of the split {split!r} in '{annotations}', which holds {there}; pass --split train, val or test"
        )
    skips = DatasetRead(samples=())
    captions: dict[str, tuple[str, ...]] = {}
    ids: dict[str, int | None] = {}
    for entry in chosen:
        name = str(PurePosixPath(str(entry.get("filepath") or ""), str(entry.get("filename"))))
        texts = _captions(entry, key_of(name), skips)
        if texts:
            captions[name] = texts
            ids[name] = entry["cocoid"] if isinstance(entry.get("cocoid"), int) else None
        else:
            skips.skip(key_of(name), "image without captions")
    if not captions:
        raise UserError(
            f"no sample in '{annotations}': none of the {len(chosen)} images of the split {split!r} has a caption; pass "
            f"another file"
        )
    paths = find_images(images, list(captions), annotations)
    keys = keys_of(captions)
    samples = tuple(
        SampleRef(key=keys[name], url=storage.join(images, paths[name]), captions=texts, image_id=ids[name])
        for name, texts in captions.items()
    )
    return replace(skips, samples=samples)


def find_images(images: str, names: list[str], annotations: str) -> dict[str, str]:
    """name -> path below images. A name without folder may lie in any: Flickr's archives have folders of several names,
    and one of them twice. Of several equal files of one name the one nearest to the root counts.

    Raises UserError, naming the first, if an image is missing, or if files of its name are different pictures.
    """
    present = set(storage.iter_names(images))
    paths = locate(names, present, images)
    by_file_name: dict[str, list[str]] = {}
    for path in sorted(present, key=lambda path: (path.count("/"), path)):
        by_file_name.setdefault(path.rpartition("/")[2], []).append(path)
    refuse_missing(names, paths.keys() | by_file_name.keys(), annotations, images)
    for name in names:
        if name not in paths:
            first, *others = by_file_name[name]
            if others and any(not _same_bytes(images, first, other) for other in others):
                raise UserError(
                    f"'{name}' of '{annotations}' is the name of different files below '{images}': '{first}' and '{others[0]}'; give the "
                    f"folder of the right ones, or write the folder into the annotations"
                )
            paths[name] = first
    return paths


def _same_bytes(images: str, first: str, second: str) -> bool:
    one, other = (storage.read_bytes(storage.join(images, path)) for path in (first, second))
    return one == other


def _parse(data: bytes, annotations: str) -> list[dict[str, Any]]:
    try:
        document = json.loads(data, object_hook=_without_tokens)
    except ValueError as e:
        content = f"JSON is broken: {e}" if data.strip() else "it is empty"
        raise UserError(f"cannot read Karpathy's split from '{annotations}': {content}; pass a dataset_*.json") from e
    entries = document.get("images") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise UserError(
            f"cannot read Karpathy's split from '{annotations}': it is no object with a list 'images'; pass a dataset_*.json"
        )
    for position, entry in enumerate(entries):
        if not (
            isinstance(entry, dict) and isinstance(entry.get("filename"), str) and PurePosixPath(entry["filename"]).name
        ):
            raise UserError(
                f"images[{position}] in '{annotations}' has no filename: {str(entry)[:100]}; pass a dataset_*.json"
            )
    return entries


def _without_tokens(entry: dict[str, Any]) -> dict[str, Any]:
    """The words of each sentence again, most of the file; dropped while it is parsed."""
    entry.pop("tokens", None)
    return entry


def _captions(entry: dict[str, Any], key: str, skips: DatasetRead) -> tuple[str, ...]:
    """In the order of their sentence ids."""
    sentences = entry.get("sentences")
    texts = []
    for sentence in sorted(sentences, key=_sentence_order) if isinstance(sentences, list) else []:
        if text := tidy(sentence.get("raw") if isinstance(sentence, dict) else None):
            texts.append(text)
        else:
            empty = isinstance(sentence, dict) and is_empty(sentence.get("raw"))
            skips.skip(key, "sentence without text" if empty else "sentence that is no text", unusable=not empty)
    return tuple(texts)


def _sentence_order(sentence: Any) -> tuple[bool, int]:
    number = sentence.get("sentid") if isinstance(sentence, dict) else None
    return (False, number) if isinstance(number, int) else (True, 0)
