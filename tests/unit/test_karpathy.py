"""raycap/datasets/karpathy.py: restval is training data, `filepath` says the folder, Flickr's files have neither."""

import json
from pathlib import Path
from typing import Any

import pytest

from raycap.datasets.dataset import DatasetRead
from raycap.datasets.karpathy import read_karpathy
from raycap.errors import StorageError, UserError


def sentence(number: int, raw: Any) -> dict[str, Any]:
    return {"tokens": str(raw).lower().split(), "raw": raw, "imgid": 0, "sentid": number}


def coco_entry(number: int, split: str, folder: str = "val2014", captions: tuple[Any, ...] = ("A dog.",)) -> Any:
    return {
        "filepath": folder,
        "sentids": list(range(len(captions))),
        "filename": f"COCO_{folder}_{number:012d}.jpg",
        "imgid": number,
        "split": split,
        "sentences": [sentence(i, raw) for i, raw in enumerate(captions)],
        "cocoid": number,
    }


def flickr_entry(name: str, split: str | None = "train") -> dict[str, Any]:
    entry: dict[str, Any] = {"sentids": [0], "imgid": 0, "sentences": [sentence(0, "A dog .")], "filename": name}
    return entry if split is None else {**entry, "split": split}


ENTRIES = [
    coco_entry(391895, "test"),
    coco_entry(57870, "train", "train2014"),
    coco_entry(522418, "restval"),
    coco_entry(184613, "val"),
]


def read(
    folder: Path, split: str, entries: Any = ENTRIES, files: tuple[str, ...] | None = None, dataset: str = "coco"
) -> DatasetRead:
    names = [f"{e.get('filepath', '')}/{e['filename']}".removeprefix("/") for e in entries if "filename" in e]
    for name in names if files is None else files:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "images").mkdir(exist_ok=True)
    path = folder / f"dataset_{dataset}.json"
    path.write_text(json.dumps({"images": entries, "dataset": dataset}))
    return read_karpathy(str(path), str(folder / "images"), split)


@pytest.mark.parametrize(
    ("split", "ids"), [("train", [57870, 522418]), ("restval", [522418]), ("val", [184613]), ("test", [391895])]
)
def test_train_is_train_with_restval_and_every_split_is_found(tmp_path: Path, split: str, ids: list[int]) -> None:
    assert [sample.image_id for sample in read(tmp_path, split).samples] == ids


def test_the_folder_is_the_file_path_and_not_the_split(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, "test").samples
    assert sample.key == "val2014/COCO_val2014_000000391895"
    assert sample.url == f"{tmp_path}/images/val2014/COCO_val2014_000000391895.jpg"


def test_captions_are_the_raw_sentences_by_number_on_one_line(tmp_path: Path) -> None:
    entry = coco_entry(1, "val", captions=("A man  with a red helmet. ", "second\nline", " ", None))
    entry["sentences"].reverse()
    result = read(tmp_path, "val", [entry])
    (sample,) = result.samples
    assert sample.captions == ("A man with a red helmet.", "second line")
    assert result.skipped == {"sentence without text": 2}


def test_an_image_without_a_caption_is_counted_by_key(tmp_path: Path) -> None:
    result = read(tmp_path, "val", [coco_entry(1, "val"), coco_entry(2, "val", captions=())])
    assert len(list(result.samples)) == 1
    assert result.skipped_keys == [("val2014/COCO_val2014_000000000002", "image without captions")]


@pytest.mark.parametrize("where", ["", "Flicker8k_Dataset/", "flickr30k_images/flickr30k_images/"])
def test_files_of_flickr_name_no_folder_and_no_id_and_may_lie_in_any_folder(tmp_path: Path, where: str) -> None:
    entries = [flickr_entry("gpj.jpg"), flickr_entry("1.jpg", None), flickr_entry("2.jpg", "test")]
    result = read(tmp_path, "train", entries, files=(f"{where}gpj.jpg", f"{where}2.jpg"), dataset="flickr8k")
    (sample,) = result.samples
    assert (sample.key, sample.image_id) == ("gpj", None)
    assert sample.url == f"{tmp_path}/images/{where}gpj.jpg"


def test_of_two_copies_of_a_folder_the_one_nearest_to_the_root_is_read(tmp_path: Path) -> None:
    files = ("x/flickr30k_images/1.jpg", "x/1.jpg")
    (sample,) = read(tmp_path, "train", [flickr_entry("1.jpg")], files=files, dataset="flickr30k").samples
    assert sample.url == f"{tmp_path}/images/x/1.jpg"


@pytest.mark.parametrize("split", ["", "dev"])
def test_a_split_that_the_file_has_not_is_refused_with_those_it_has(tmp_path: Path, split: str) -> None:
    with pytest.raises(
        UserError, match=rf"no image of the split '{split}' in .*restval \(1 images\), test \(1 images\)"
    ):
        read(tmp_path, split)


def test_missing_image_files_are_refused_by_name_but_only_those_of_the_split(tmp_path: Path) -> None:
    present = ("train2014/COCO_train2014_000000057870.jpg",)
    with pytest.raises(UserError, match=r"1 of the 2 images of .* 'val2014/COCO_val2014_000000522418.jpg'; pass the"):
        read(tmp_path, "train", files=present)
    # A file of that name in another folder is another image.
    with pytest.raises(UserError, match="missing below"):
        read(tmp_path, "val", files=("train2014/COCO_val2014_000000184613.jpg",))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b'{"images": [', "JSON is broken"),
        (b"[]", "it is no object with a list 'images'"),
        (b'{"images": 3}', "it is no object with a list 'images'"),
        (b'{"images": [{"split": "val"}]}', "has no filename"),
        (b'{"images": [7]}', "has no filename"),
    ],
)
def test_a_file_that_is_no_split_is_refused_with_its_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "dataset.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_karpathy(str(path), str(tmp_path), "val")
    assert says in str(caught.value)
    assert f"'{path}'" in str(caught.value)


def test_a_split_without_any_caption_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 images of the split 'val' has a caption"):
        read(tmp_path, "val", [coco_entry(1, "val", captions=())])
    with pytest.raises(StorageError, match="nowhere"):
        read_karpathy(f"{tmp_path}/nowhere.json", str(tmp_path), "val")
