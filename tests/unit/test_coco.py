import json
import os
from pathlib import Path
from typing import Any

import pytest

from raycap.datasets.coco import read_coco
from raycap.datasets.dataset import DatasetRead
from raycap.errors import StorageError, UserError

IMAGES = [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "part/a.png"}]
CAPTIONS = [
    {"id": 12, "image_id": 3, "caption": "a cat  on\na mat "},
    {"id": 10, "image_id": 7, "caption": "Two dogs."},
    {"id": 11, "image_id": 3, "caption": "one cat"},
]


def read(
    folder: Path, images: Any = IMAGES, annotations: Any = CAPTIONS, files: tuple[str, ...] | None = None
) -> DatasetRead:
    """Writes a data set with those entries and empty image files (all that are named, by default), and reads it."""
    for name in [str(image["file_name"]) for image in images if "file_name" in image] if files is None else files:
        path = folder / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / "images").mkdir(exist_ok=True)
    (folder / "captions.json").write_text(json.dumps({"info": {}, "images": images, "annotations": annotations}))
    return read_coco(str(folder / "captions.json"), str(folder / "images"))


def test_samples_keep_the_order_of_images_and_captions_come_by_annotation_id(tmp_path: Path) -> None:
    first, second = read(tmp_path).samples
    assert (first.key, first.image_id, first.captions) == ("b", 7, ("Two dogs.",))
    assert (second.key, second.image_id, second.captions) == ("part/a", 3, ("one cat", "a cat on a mat"))
    assert second.url == str(tmp_path / "images" / "part" / "a.png")


def test_the_file_of_2014_reads_as_that_of_2017(tmp_path: Path) -> None:
    """Its names carry the split, its keys come in another order, and early versions had a `type`."""
    name = "COCO_val2014_000000391895.jpg"
    document = {
        "info": {"description": "This is stable 1.0 version of the 2014 MS COCO dataset."},
        "type": "captions",
        "images": [{"license": 3, "file_name": name, "height": 360, "width": 640, "id": 391895}],
        "licenses": [],
        "annotations": [{"image_id": 391895, "id": 37, "caption": "A man with a red helmet on a dirt road. "}],
    }
    (tmp_path / "val2014").mkdir()
    (tmp_path / "val2014" / name).touch()
    (tmp_path / "captions_val2014.json").write_text(json.dumps(document))
    (sample,) = read_coco(str(tmp_path / "captions_val2014.json"), str(tmp_path / "val2014")).samples
    assert (sample.key, sample.image_id) == ("COCO_val2014_000000391895", 391895)
    assert sample.captions == ("A man with a red helmet on a dirt road.",)


def test_what_is_skipped_is_counted_by_reason(tmp_path: Path) -> None:
    images = [*IMAGES, {"id": 9, "file_name": "silent.jpg"}]
    annotations = [
        *CAPTIONS,
        {"id": 13, "image_id": 3, "caption": " \n"},
        {"id": 14, "image_id": 3, "bbox": [0, 0, 1, 1]},
        {"id": 15, "image_id": 99, "caption": "no such image"},
    ]
    result = read(tmp_path, images, annotations)
    assert [sample.key for sample in result.samples] == ["b", "part/a"]
    assert result.skipped_keys == [
        ("99", "annotation of an unknown image"),
        ("part/a", "annotation without caption"),
        ("part/a", "annotation without caption"),
        ("silent", "image without captions"),
    ]
    assert result.skipped == {
        "annotation without caption": 2,
        "annotation of an unknown image": 1,
        "image without captions": 1,
    }


def test_image_ids_may_be_strings_and_annotation_ids_may_be_missing(tmp_path: Path) -> None:
    annotations = [{"image_id": "0af3", "caption": "second"}, {"image_id": "0af3", "caption": "third"}]
    annotations.append({"image_id": "0af3", "caption": "first", "id": 1})  # type: ignore[dict-item]
    (sample,) = read(tmp_path, [{"id": "0af3", "file_name": "x.jpg"}], annotations).samples
    assert sample.image_id == "0af3"
    assert sample.captions == ("first", "second", "third")


def test_files_beside_the_named_images_and_images_that_are_not_used_do_not_matter(tmp_path: Path) -> None:
    images = [*IMAGES, {"id": 9, "file_name": "silent-and-absent.jpg"}]
    assert len(read(tmp_path, images, files=("b.jpg", "part/a.png", "other.txt")).samples) == 2


def test_a_file_name_that_is_not_utf8_beside_the_images_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / os.fsdecode(b"images/caf\xe9.jpg")).touch()
    assert len(read(tmp_path).samples) == 2


def test_a_caption_that_is_no_unicode_is_counted(tmp_path: Path) -> None:
    annotations = [*CAPTIONS, {"id": 16, "image_id": 3, "caption": "half \ud83d a pair"}]
    result = read(tmp_path, annotations=annotations)
    assert result.skipped == result.unusable == {"annotation whose caption is no text": 1}


def test_the_listed_keys_are_the_first_hundred_of_the_keys_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    silent = [{"id": 100 + i, "file_name": f"{i:03d}.jpg"} for i in range(150)]
    for images in ([*IMAGES, *silent], [*reversed(silent), *IMAGES]):
        result = read(tmp_path, images)
        assert result.skipped == {"image without captions": 150}
        assert result.skipped_keys == [(f"{i:03d}", "image without captions") for i in range(100)]


def test_missing_image_files_are_counted_and_the_first_three_are_named(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(6)]
    annotations = [{"id": i, "image_id": i, "caption": "a dog"} for i in range(6)]
    with pytest.raises(UserError) as caught:
        read(tmp_path, images, annotations, files=("2.jpg", "5.jpg"))
    assert str(caught.value).startswith("4 of the 6 images of ")
    assert f"missing below '{tmp_path}/images': '0.jpg', '1.jpg', '3.jpg', ...; pass the folder" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "it is empty"),
        (b"{'images': []}", "JSON is broken"),
        (b'{"images": [', "JSON is broken"),
        (b"\xff\xfe\xfa", "JSON is broken"),
        (b"[]", "it holds list"),
        (b'{"images": {}, "annotations": []}', "an object with the keys ['annotations', 'images']"),
        (b'{"images": [], "annotations": []}', "0 images and 0 annotations"),
    ],
)
def test_a_file_that_is_no_caption_file_is_refused_with_its_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "captions.json"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_coco(str(path), str(tmp_path))
    assert says in str(caught.value)
    assert f"'{path}'" in str(caught.value)
    assert "pass a captions_*.json" in str(caught.value)


def test_an_instances_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"no image has a caption \(skipped annotation without caption: 1, .*not an instances"
    ):
        read(tmp_path, annotations=[{"id": 1, "image_id": 3, "bbox": [0, 0, 1, 1]}])


@pytest.mark.parametrize(
    "entry", [{"id": 1}, {"file_name": "x.jpg"}, {"id": 1, "file_name": "."}, {"id": 1.5, "file_name": "x"}]
)
def test_an_image_entry_without_id_or_file_name_is_named(tmp_path: Path, entry: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"images\[2\] in '.*captions.json' has no id and file_name"):
        read(tmp_path, [*IMAGES, entry], files=())


def test_two_images_of_one_stem_keep_their_suffix_in_the_key(tmp_path: Path) -> None:
    annotations = [*CAPTIONS, {"id": 16, "image_id": 8, "caption": "another"}]
    samples = read(tmp_path, [*IMAGES, {"id": 8, "file_name": "./b.png"}], annotations).samples
    assert [(sample.key, sample.url.rpartition("/")[2]) for sample in samples] == [
        ("b.jpg", "b.jpg"),
        ("part/a", "a.png"),
        ("b.png", "b.png"),
    ]


def test_an_image_id_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"image id 7 occurs twice in .* \('b.jpg' and 'c.jpg'\)"):
        read(tmp_path, [*IMAGES, {"id": 7, "file_name": "c.jpg"}])


def test_a_missing_annotation_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"captions_none\.json"):
        read_coco(str(tmp_path / "captions_none.json"), str(tmp_path))


@pytest.mark.skipif("RAYCAP_TEST_COCO" not in os.environ, reason="RAYCAP_TEST_COCO names no folder with COCO images")
def test_a_real_coco_file_gives_every_image_with_its_five_captions() -> None:
    root = os.environ["RAYCAP_TEST_COCO"]
    result = read_coco(f"{root}/annotations/captions_train2017.json", f"{root}/train2017")
    document = json.loads(Path(root, "annotations/captions_train2017.json").read_bytes())
    assert [sample.image_id for sample in result.samples] == [image["id"] for image in document["images"]]
    assert result.skipped == {}
    for sample in result.samples:
        assert sample.key == f"{sample.image_id:012d}"
        assert Path(sample.url).is_file()
        assert len(sample.captions) >= 5
        assert all(caption == " ".join(caption.split()) != "" for caption in sample.captions)


def test_annotations_that_vizwiz_marks_are_left_out_and_counted(tmp_path: Path) -> None:
    marked = {"is_precanned": False, "is_rejected": False}
    images = [*IMAGES, {"id": 9, "file_name": "dark.jpg"}]
    annotations = [
        *[entry | marked for entry in CAPTIONS],
        {"id": 20, "image_id": 7, "caption": "spam", **marked, "is_rejected": True},
        {"id": 21, "image_id": 9, "caption": "Quality issues are too severe.", **marked, "is_precanned": True},
    ]
    result = read(tmp_path, images, annotations)
    assert [sample.captions for sample in result.samples] == [("Two dogs.",), ("one cat", "a cat on a mat")]
    assert result.skipped == {"annotation marked as rejected or precanned": 2, "image without captions": 1}
    assert result.unusable.total() == 0


def test_ids_that_are_whole_numbers_are_compared_as_numbers(tmp_path: Path) -> None:
    images = [{"id": 1.0, "file_name": "a.jpg"}, {"id": "2", "file_name": "b.jpg"}, {"id": 3, "file_name": "c.jpg"}]
    annotations = [{"image_id": i, "caption": "a dog"} for i in ("1", 2.0, "3", 3)]
    result = read(tmp_path, images, annotations)
    assert [(sample.image_id, len(sample.captions)) for sample in result.samples] == [(1, 1), ("2", 1), (3, 2)]
    assert not result.skipped


def test_what_a_row_leaves_empty_is_not_held_against_it_and_what_it_holds_instead_is(tmp_path: Path) -> None:
    extra = [{"image_id": 7, "caption": caption} for caption in (None, " ", 5, ["a"])]
    result = read(tmp_path, annotations=[*CAPTIONS, *extra, {"image_id": 99, "caption": "a"}, 5])
    assert result.unusable == {"annotation whose caption is no text": 2, "annotation of an unknown image": 2}
    assert result.skipped["annotation without caption"] == 2


@pytest.mark.parametrize(
    "name", ["part\\a.png", "{images}/part/a.png", "images/part/a.png", "./part/a.png", "part//a.png"]
)
def test_a_file_name_is_found_in_the_forms_that_annotations_have(tmp_path: Path, name: str) -> None:
    name = name.replace("{images}", str(tmp_path / "images"))
    (sample,) = read(tmp_path, [{"id": 3, "file_name": name}], files=("part/a.png",)).samples
    assert (sample.key, sample.url) == ("part/a", str(tmp_path / "images" / "part" / "a.png"))


@pytest.mark.parametrize("name", ["http://host/x/a%20b.png?size=1", "/home/me/coco/a b.png", "C:/coco/a b.png"])
def test_the_last_part_of_somebody_elses_path_or_url_is_looked_for(tmp_path: Path, name: str) -> None:
    (sample,) = read(tmp_path, [{"id": 3, "file_name": name}], files=("a b.png",)).samples
    assert sample.url.endswith("/images/a b.png")


@pytest.mark.parametrize("above", ["http://h/{}/1.jpg", "/data/{}/1.jpg", "C:\\{}\\1.jpg"])
def test_two_names_that_end_alike_are_not_taken_for_one_file(tmp_path: Path, above: str) -> None:
    images = [{"id": i, "file_name": above.format(folder)} for i, folder in enumerate(("cats", "dogs"))]
    annotations = [{"image_id": i, "caption": "a pet"} for i in (0, 1)]
    with pytest.raises(UserError, match=r"cats.* and .*dogs.* end alike, and below .* there is one '1.jpg' for both"):
        read(tmp_path, images, annotations, files=("1.jpg",))
