"""raycap/datasets/lavis.py: rows of one caption and rows of many, ids of three kinds, and images that links have lost."""

import json
from pathlib import Path
from typing import Any

import pytest

from raycap.datasets.dataset import DatasetRead
from raycap.datasets.lavis import read_lavis
from raycap.errors import StorageError, UserError

TRAIN = "val2014/COCO_val2014_000000522418.jpg"
VAL = "val2014/COCO_val2014_000000184613.jpg"


def read(folder: Path, rows: Any, files: tuple[str, ...] | None = None) -> DatasetRead:
    named = [row["image"] for row in rows if isinstance(row, dict) and isinstance(row.get("image"), str)]
    for name in named if files is None else files:
        path = folder / "images" / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "images").mkdir(exist_ok=True)
    (folder / "list.json").write_text(json.dumps(rows))
    return read_lavis(str(folder / "list.json"), str(folder / "images"))


def test_rows_of_one_caption_are_gathered_to_one_sample_per_image(tmp_path: Path) -> None:
    rows = [
        {"caption": "A woman wearing a net on her head cutting a cake. ", "image": TRAIN, "image_id": "coco_522418"},
        {"caption": "a dog", "image": VAL, "image_id": "coco_184613"},
        {"caption": "A woman\ncutting", "image": TRAIN, "image_id": "coco_522418"},
    ]
    result = read(tmp_path, rows)
    first, second = result.samples
    assert first.captions == ("A woman cutting", "A woman wearing a net on her head cutting a cake.")
    assert (first.key, first.image_id) == ("val2014/COCO_val2014_000000522418", 522418)
    assert first.url == f"{tmp_path}/images/{TRAIN}"
    assert second.captions == ("a dog",)
    # The rows have no numbers: another order of them is the same data set.
    again = read(tmp_path, list(reversed(rows)))
    assert sorted(again.samples, key=lambda s: s.key) == sorted(result.samples, key=lambda s: s.key)


def test_rows_of_many_captions_keep_their_order_and_take_the_id_from_the_file_name(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, [{"image": VAL, "caption": ["z first", "a second ", " "]}]).samples
    assert (sample.captions, sample.image_id) == (("z first", "a second"), 184613)


@pytest.mark.parametrize(
    ("row", "image_id", "key"),
    [
        ({"image": "val/0013ea2087020901.jpg", "img_id": 0}, 0, "val/0013ea2087020901"),
        ({"image": "val/jpg.gjp.jpg", "image_id": "0af3"}, "0af3", "val/jpg.gjp"),
        ({"image": "000000397133.jpg"}, 397133, "000000397133"),
        ({"image": "flickr30k-images/1007129816.jpg"}, None, "flickr30k-images/1007129816"),
    ],
)
def test_ids_are_what_the_row_says_or_cocos_number(tmp_path: Path, row: Any, image_id: Any, key: str) -> None:
    (sample,) = read(tmp_path, [{**row, "caption": ["a dog"]}]).samples
    assert (sample.image_id, sample.key) == (image_id, key)


def test_rows_without_image_or_caption_are_counted(tmp_path: Path) -> None:
    rows = [
        {"image": VAL, "caption": "a dog"},
        {"image": VAL, "caption": " \n "},
        {"image": TRAIN},
        {"image": TRAIN, "caption": None},
        {"caption": "of nothing"},
        "text",
    ]
    result = read(tmp_path, rows)
    assert [sample.image_id for sample in result.samples] == [184613]
    assert result.skipped == {"row without caption": 2, "image without captions": 1, "row without image": 2}
    assert ("[4]", "row without image") in result.skipped_keys


def test_a_missing_image_of_a_closed_list_is_refused(tmp_path: Path) -> None:
    rows = [{"image": TRAIN, "caption": "a"}, {"image": VAL, "caption": "b"}]
    with pytest.raises(UserError, match=rf"1 of the 2 images of .* are missing below .*: '{VAL}'; pass the folder"):
        read(tmp_path, rows, files=(TRAIN,))


@pytest.mark.parametrize(
    "rows",
    [
        [{"image": f"/somewhere/cc3m/{i}_323908638{i}.jpg", "caption": "a"} for i in range(3)],
        [{"image": f"x{i}.jpg", "caption": "a", "url": f"http://x/{i}"} for i in range(3)],
    ],
)
def test_missing_images_of_the_web_are_counted_unless_all_are(tmp_path: Path, rows: Any) -> None:
    name = rows[1]["image"].rpartition("/")[2]
    result = read(tmp_path, rows, files=(name, "other.jpg"))
    (sample,) = result.samples
    assert (sample.url, sample.key) == (f"{tmp_path}/images/{name}", name.removesuffix(".jpg"))
    assert result.skipped == {"image file is missing": 2}
    (tmp_path / "images" / name).unlink()
    with pytest.raises(UserError, match="3 of the 3 images of"):
        read(tmp_path, rows, files=())


def test_images_are_found_by_file_name_where_the_folder_is_spelled_otherwise(tmp_path: Path) -> None:
    (sample,) = read(tmp_path, [{"image": "flickr30k-images/10.jpg", "caption": ["a"]}], files=("10.jpg",)).samples
    assert (sample.key, sample.url) == ("flickr30k-images/10", f"{tmp_path}/images/10.jpg")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b'[{"image": ', "JSON is broken"),
        (b'{"images": []}', "it holds dict, not a list"),
        (b'[{"image": "a.jpg", "img_id": 3}]', "none of its 1 rows is an image with a caption"),
        (b"[]", "none of its 0 rows"),
    ],
)
def test_a_file_that_is_no_list_of_captions_is_refused_with_its_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "list.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_lavis(str(path), str(tmp_path))
    assert says in str(caught.value)
    assert f"'{path}'" in str(caught.value)
    with pytest.raises(StorageError, match="nowhere"):
        read_lavis(f"{tmp_path}/nowhere.json", str(tmp_path))


@pytest.mark.parametrize("above", ["/data/", ""])
def test_two_names_that_end_alike_are_not_taken_for_one_file(tmp_path: Path, above: str) -> None:
    rows = [{"image": f"{above}{folder}/1.jpg", "caption": f"a {folder}"} for folder in ("cat", "dog")]
    with pytest.raises(UserError, match=r"cat/1.jpg' and '.*dog/1.jpg' end alike"):
        read(tmp_path, rows, files=("1.jpg",))
