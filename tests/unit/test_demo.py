import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from raycap.datasets import demo, demo_scenes
from raycap.datasets.coco import read_coco
from raycap.datasets.demo import DemoPaths, write_demo
from raycap.errors import StorageError, UserError

SIZES: dict[str, Any] = {"num_train": 60, "num_val": 20, "num_test": 130, "image_size": 64}
TINY: dict[str, Any] = {"num_train": 2, "num_val": 1, "num_test": 1, "image_size": 32}


@pytest.fixture(scope="session")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> DemoPaths:
    return write_demo(str(tmp_path_factory.mktemp("demo") / "set"), **SIZES)


def scenes(paths: DemoPaths, split: str) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The entry of each image and its captions."""
    document = json.loads(Path(paths.annotations[split]).read_bytes())
    for image in document["images"]:
        yield image, [a["caption"] for a in document["annotations"] if a["image_id"] == image["id"]]


def pairs(paths: DemoPaths, split: str) -> set[frozenset[str]]:
    return {frozenset((image["scene"]["first"], image["scene"]["second"])) for image, _ in scenes(paths, split)}


def digest(root: Path) -> str:
    files = sorted(path for path in root.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(root)).encode() + f.read_bytes() for f in files)).hexdigest()


def write_in_process(root: Path, hash_seed: str = "0", **arguments: Any) -> subprocess.Popen[bytes]:
    code = f"from raycap.datasets.demo import write_demo; write_demo({str(root)!r}, **{arguments!r})"
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": hash_seed})


def test_read_coco_reads_every_split_and_skips_nothing(demo_set: DemoPaths) -> None:
    for split, number in (("train", 60), ("val", 20), ("test", 130)):
        result = read_coco(demo_set.annotations[split], demo_set.images[split])
        assert len(result.samples) == number
        assert result.skipped == {}
        with Image.open(result.samples[-1].url) as image:
            assert (image.mode, image.size) == ("RGB", (64, 64))


def test_the_same_arguments_give_the_same_bytes_in_processes_with_other_hash_seeds(tmp_path: Path) -> None:
    writers = [write_in_process(tmp_path / seed, seed, **TINY) for seed in ("1", "2")]
    assert [writer.wait() for writer in writers] == [0, 0]
    write_demo(str(tmp_path / "other"), **TINY, seed=1)
    first, second, other = (digest(tmp_path / name) for name in ("1", "2", "other"))
    assert first == second != other


def test_two_processes_that_write_one_folder_both_end_with_it_complete(tmp_path: Path) -> None:
    writers = [write_in_process(tmp_path / "set", **TINY) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    write_demo(str(tmp_path / "alone"), **TINY)
    assert digest(tmp_path / "set") == digest(tmp_path / "alone")


def test_a_killed_writer_leaves_only_a_partial_folder_that_the_next_one_removes(tmp_path: Path) -> None:
    writer = write_in_process(tmp_path / "set", **{**TINY, "num_train": 1_000_000})
    while not any(tmp_path.glob(".set.partial-*/images/train/*.jpg")):
        assert writer.poll() is None
        time.sleep(0.02)
    write_demo(str(tmp_path / "set"), **TINY)
    assert any(tmp_path.glob(".set.partial-*/images/train/*.jpg"))  # a live writer's folder is left alone
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    (tmp_path / "set").rename(tmp_path / "elsewhere")
    write_demo(str(tmp_path / "set"), **TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "set"]


def test_a_complete_folder_is_left_alone(demo_set: DemoPaths) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(demo_set.root).rglob("*")}
    assert write_demo(demo_set.root, **SIZES) == demo_set
    assert {path: path.stat().st_mtime_ns for path in Path(demo_set.root).rglob("*")} == before


def test_a_folder_with_other_arguments_or_other_content_is_refused(demo_set: DemoPaths, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"was written with .*'seed': 0.*'seed': 5"):
        write_demo(demo_set.root, **SIZES, seed=5)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists and is no demo data set; pass another folder"):
        write_demo(str(tmp_path), **TINY)
    with pytest.raises(UserError, match="is no demo data set"):
        write_demo(str(tmp_path / "notes.txt"), **TINY)
    with pytest.raises(StorageError, match=r"cannot write the demo data set to '.*notes.txt/set'"):
        write_demo(str(tmp_path / "notes.txt" / "set"), **TINY)
    with pytest.raises(UserError, match="it is written to a local folder"):
        write_demo("s3://bucket/demo", **TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_sizes_that_make_no_data_set_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least 1 image a split"):
        write_demo(str(tmp_path / "set"), num_val=0)
    with pytest.raises(ValueError, match="image_size=31"):
        write_demo(str(tmp_path / "set"), image_size=31)


def test_without_the_extra_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == "resvg_py" else object())
    with pytest.raises(
        UserError, match=re.escape("resvg_py is not installed in this environment; pip install 'raycap[demo]'")
    ):
        write_demo(str(tmp_path / "set"), **TINY)
    assert list(tmp_path.iterdir()) == []


def test_no_two_splits_share_a_pair_of_objects(demo_set: DemoPaths) -> None:
    of_split = {split: pairs(demo_set, split) for split in demo.SPLITS}
    assert {split: len(found) for split, found in of_split.items()} == {"train": 60, "val": 20, "test": 120}
    assert len(of_split["train"] | of_split["val"] | of_split["test"]) == 200


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_pairs_of_all_splits_are_all_pairs_once_and_every_twenty_show_every_object(seed: int) -> None:
    dealt = {split: demo_scenes.split_pairs(split, seed) for split in demo.SPLITS}
    assert {split: len(found) for split, found in dealt.items()} == {"train": 600, "val": 60, "test": 120}
    assert len({frozenset(pair) for found in dealt.values() for pair in found}) == 40 * 39 // 2
    for found in dealt.values():
        for start in range(0, len(found), 20):
            assert len({name for pair in found[start : start + 20] for name in pair}) == 40


def test_every_object_relation_and_ground_occurs_in_train(demo_set: DemoPaths) -> None:
    seen = [image["scene"] for image, _ in scenes(demo_set, "train")]
    assert len({s["first"] for s in seen} | {s["second"] for s in seen}) == len(demo_scenes.OBJECTS) == 40
    assert {s["axis"] for s in seen} == set(demo_scenes.TEMPLATES)
    assert {s["ground"] for s in seen} == set(demo_scenes.GROUNDS)


def test_names_are_plain_lower_case_words_and_no_two_are_equal() -> None:
    names = [demo_scenes.object_name(character) for character in demo_scenes.OBJECTS]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-z]+", name) for name in names)
    assert {"dog", "pizza", "bicycle", "umbrella"} <= set(names)


def test_an_image_has_five_different_captions_that_each_state_all_facts_truly(demo_set: DemoPaths) -> None:
    """Reads each caption back with its own small grammar, which knows no template."""
    before = "(?:(?:is )?to the left of|on the left of|(?:is )?above|over)"
    after = "(?:(?:is )?to the right of|is on the right of|(?:is )?below|is under)"
    trailing = "(?:to its right|below it)"
    wordings = Counter[str]()
    for split in demo.SPLITS:
        for image, captions in scenes(demo_set, split):
            scene = image["scene"]
            assert len(set(captions)) == len(captions) == 5
            for caption in captions:
                assert re.fullmatch("[a-z]+(?: [a-z]+)*", caption)
                assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", caption)
                ground = re.search(r"\b(\w+) background", caption)
                assert ground is not None
                assert ground[1] == scene["ground"]
                subject, verb, other = re.search(  # type: ignore[union-attr]
                    rf"(?:^|there is |with )an? (\w+) ({before}|{after}|with) an? (\w+)", caption
                ).groups()
                if verb == "with":
                    assert re.search(trailing, caption)
                inverse = re.fullmatch(after, verb)
                assert (
                    (other, subject) == (scene["first"], scene["second"])
                    if inverse
                    else (subject, other)
                    == (
                        scene["first"],
                        scene["second"],
                    )
                )
                assert ("left" in caption or "right" in caption) == (scene["axis"] == "horizontal")
                wordings["inverse" if inverse else "canonical"] += 1
    assert wordings["canonical"] > 2 * wordings["inverse"]


def test_the_picture_shows_the_ground_and_an_object_in_each_half(demo_set: DemoPaths) -> None:
    for image, _ in scenes(demo_set, "test"):
        pixels = np.asarray(Image.open(Path(demo_set.images["test"]) / image["file_name"])).astype(int)
        if image["scene"]["axis"] == "vertical":
            pixels = pixels.transpose(1, 0, 2)
        ground = np.median(np.concatenate([pixels[0], pixels[-1]]), axis=0)
        distances = {name: np.abs(ground - rgb).sum() for name, rgb in demo_scenes.GROUNDS.items()}
        assert min(distances, key=lambda name: distances[name]) == image["scene"]["ground"]
        drawn = np.abs(pixels - ground).sum(axis=2) > 90
        assert drawn[:, :32].sum() > 60
        assert drawn[:, 32:].sum() > 60


def test_the_folder_carries_the_licence_and_the_source_of_every_drawing(demo_set: DemoPaths) -> None:
    notice = Path(demo_set.root, "LICENSE.txt").read_text()
    for fact in ("OpenMoji", "openmoji.org", "CC BY-SA 4.0", "creativecommons.org/licenses/by-sa/4.0", "adaptations"):
        assert fact in notice
    attribution = json.loads(Path(demo_set.root, "ATTRIBUTION.json").read_bytes())
    assert "".join(entry["emoji"] for entry in attribution["objects"]) == demo_scenes.OBJECTS
    assert attribution["objects"][0] == {"emoji": "🐶", "codepoint": "1F436", "name": "dog", "file": "1F436.svg"}
