"""raycap/datasets/read.py: the format shows in the content, and a split has a meaning only where there are several."""

import json
import zlib
from pathlib import Path

import pytest

from raycap.config import DatasetFormat
from raycap.datasets.read import detect_format, read_dataset
from raycap.errors import StorageError, UserError

URL = "http://example.org/a.jpg"
CASES: list[tuple[str, str]] = [
    (json.dumps({"info": {}, "images": [{"id": 1, "file_name": "1.jpg"}], "annotations": []}), "coco"),
    (json.dumps({"images": [], "annotations": []}, indent=1), "coco"),
    (json.dumps({"images": [{"sentids": [1], "filename": "1.jpg"}], "dataset": "coco"}), "karpathy"),
    (json.dumps([{"image": "1.jpg", "caption": "a"}]), "lavis"),
    ("\n [\n]", "lavis"),
    ("1000268201_693b08cb0e.jpg#0\ta dog", "flickr8k"),
    ("1000092795.jpg#0\ta dog\n", "flickr30k"),
    ("image,caption\n1.jpg,a", "flickr8k"),
    ("image_name| comment_number| comment\n", "flickr30k"),
    (f"a dog\t{URL}\n", "conceptual"),
    (f"{URL}\ta dog\n", "conceptual"),
    (f"caption\turl\na dog\t{URL}", "conceptual"),
]


@pytest.mark.parametrize(("content", "format"), CASES)
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_format_is_found_in_the_content(tmp_path: Path, content: str, format: DatasetFormat, mark: str) -> None:
    (tmp_path / "annotations").write_text(mark + content, encoding="utf-8")
    assert detect_format(str(tmp_path / "annotations")) == format


@pytest.mark.parametrize("content", ["", "hello", '{"dataset": 3}', "{'images'", "a\tb\n", "\0\1\2", f"{URL} a dog"])
def test_content_that_tells_nothing_asks_for_the_flag(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations").write_text(content)
    with pytest.raises(UserError) as caught:
        read_dataset(str(tmp_path / "annotations"), str(tmp_path))
    assert f"cannot tell the format of '{tmp_path}/annotations'" in str(caught.value)
    assert "pass --format with one of coco, karpathy, lavis, flickr8k, flickr30k, conceptual" in str(caught.value)


def test_a_format_that_is_given_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "annotations").write_text("a\tb\n")
    with pytest.raises(UserError, match="cannot read Conceptual Captions"):
        read_dataset(str(tmp_path / "annotations"), str(tmp_path), format="conceptual")


def test_every_format_gives_its_samples(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    name = f"0_{zlib.crc32(URL.encode())}.jpg"
    (tmp_path / "images" / name).touch()
    contents: dict[DatasetFormat, str] = {
        "coco": json.dumps(
            {"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "a dog"}]}
        ),
        "karpathy": json.dumps({"images": [{"filename": name, "split": "val", "sentences": [{"raw": "a dog"}]}]}),
        "lavis": json.dumps([{"image": name, "caption": "a dog"}]),
        "flickr8k": f"{name}#0\ta dog",
        "flickr30k": f"image_name| comment_number| comment\n{name}| 0| a dog",
        "conceptual": f"a dog\t{URL}",
    }
    for format, content in contents.items():
        path = tmp_path / "annotations"
        path.write_text(content)
        for given in (format, "auto"):
            split = "val" if format == "karpathy" else ""
            (sample,) = read_dataset(str(path), f"{tmp_path}/images", format=given, split=split).samples
            assert (sample.key, sample.captions) == (name.removesuffix(".jpg"), ("a dog",))
            assert Path(sample.url).is_file()


@pytest.mark.parametrize("content", [CASES[0][0], CASES[3][0], CASES[9][0]])
def test_a_split_of_a_file_that_has_one_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "annotations").write_text(content)
    with pytest.raises(UserError, match="holds one split, so --split 'val' has no meaning"):
        read_dataset(str(tmp_path / "annotations"), str(tmp_path), split="val")


def test_a_missing_file_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="nowhere"):
        read_dataset(f"{tmp_path}/nowhere", str(tmp_path))


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b'{"file_name": "1.jpg", "text": "a dog"}\n{"file_name": "2.jpg", "text": "a cat"}\n', "a JSON Lines file"),
        (b'{"file_name": "1.jpg", "text": "a dog"}', "a JSON Lines file"),
        (b"PAR1\x15\x04\x15", "a Parquet table"),
        ("image,caption\n1.jpg,a dog\n".encode("utf-16"), "text in UTF-16"),
        (b"image;caption\n1.jpg;a dog\n", "a table with the header 'image;caption'"),
        (b"filename,caption\n1.jpg,a dog\n", "a table with the header 'filename,caption'"),
        (b"image\tcaption\n1.jpg\ta dog\n", "a table with the header"),
        (b'{"dataset_type":"train","dataset_name":"textcaps","data":[{"caption_str":"a"}]}', "a file of TextCaps"),
    ],
)
def test_formats_that_are_not_read_yet_are_called_by_name_with_what_to_do(
    tmp_path: Path, content: bytes, what: str
) -> None:
    (tmp_path / "annotations").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_dataset(str(tmp_path / "annotations"), str(tmp_path))
    assert f"is {what}" in str(caught.value)
    assert "does not read yet; write its captions as CSV with the header `image,caption`" in str(caught.value)
