"""raycap/datasets/flickr.py: token files with their ghost, split files, Kaggle's tables with their broken row."""

import os
from pathlib import Path

import pytest

from raycap.datasets.dataset import DatasetRead
from raycap.datasets.flickr import GHOST, read_flickr
from raycap.errors import StorageError, UserError

ONE, TWO, THREE = "1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg", "jpg_pgj.jpg"
TOKEN = (
    f"{ONE}#1\tA girl going into a wooden building .\n"
    f"{TWO}#0\tA black dog and a spotted dog are fighting\n"
    f"{ONE}#0\tA child in a pink dress is climbing up a set of stairs in an entry way .\n"
    f'{THREE}#0\tnan\n{THREE}#1\tA " quoted , one\n'
    f"{GHOST}#0\tA man on a bicycle\n{GHOST}#1\tA man on a bicycle ."
)


def read(
    folder: Path, content: str | bytes, split: str = "", *, files: tuple[str, ...] = (ONE, TWO, THREE), where: str = ""
) -> DatasetRead:
    for name in files:
        path = folder / "images" / where / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    path = folder / "Flickr8k.token.txt"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_flickr(str(path), str(folder / "images"), split)


def captions(result: DatasetRead) -> dict[str, tuple[str, ...]]:
    return {sample.key: sample.captions for sample in result.samples}


def test_a_token_file_gives_captions_by_number_and_its_ghost_is_counted(tmp_path: Path) -> None:
    result = read(tmp_path, TOKEN, where="Flicker8k_Dataset")
    assert captions(result) == {
        "1000268201_693b08cb0e": (
            "A child in a pink dress is climbing up a set of stairs in an entry way .",
            "A girl going into a wooden building .",
        ),
        "1001773457_577c3a7d70": ("A black dog and a spotted dog are fighting",),
        "jpg_pgj": ("nan", 'A " quoted , one'),
    }
    assert result.skipped == {"image without file (Flickr8k's ghost)": 2}
    assert next(iter(result.samples)).url == f"{tmp_path}/images/Flicker8k_Dataset/{ONE}"


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n"])
def test_the_end_of_the_file_and_a_byte_order_mark_do_not_matter(tmp_path: Path, end: str) -> None:
    text = f"\ufeff{ONE}#0\ta dog{end}".replace("\n", end) if end == "\r\n" else f"\ufeff{ONE}#0\ta dog{end}"
    assert captions(read(tmp_path, text)) == {"1000268201_693b08cb0e": ("a dog",)}


@pytest.mark.parametrize(("split", "file"), [("train", "train"), ("val", "dev"), ("dev", "dev"), ("test", "test")])
def test_a_split_is_the_file_beside_the_tokens(tmp_path: Path, split: str, file: str) -> None:
    (tmp_path / f"Flickr_8k.{file}Images.txt").write_text(f"{ONE}\r\n{THREE}")
    result = read(tmp_path, TOKEN, split)
    assert captions(result).keys() == {"1000268201_693b08cb0e", "jpg_pgj"}
    assert result.skipped == {"image without file (Flickr8k's ghost)": 2, "image of another split": 1}


def test_a_split_may_be_any_file_of_image_names_and_only_its_images_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text(f"{TWO}\n")
    result = read(tmp_path, TOKEN, f"{tmp_path}/mine.txt", files=(TWO,))
    assert captions(result).keys() == {"1001773457_577c3a7d70"}


def test_a_split_that_is_no_file_or_names_other_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'training' of .*; pass train, val or test, or the path"):
        read(tmp_path, TOKEN, "training")
    with pytest.raises(StorageError, match=r"Flickr_8k\.testImages\.txt"):
        read(tmp_path, TOKEN, "test")
    (tmp_path / "mine.txt").write_text("9.jpg\n")
    with pytest.raises(
        UserError, match=r"1 of the 1 images of the split .* have no captions in .*, the first: '9.jpg'"
    ):
        read(tmp_path, TOKEN, f"{tmp_path}/mine.txt")
    (tmp_path / "mine.txt").write_text("\n")
    with pytest.raises(UserError, match="names no image"):
        read(tmp_path, TOKEN, f"{tmp_path}/mine.txt")


def test_the_table_of_flickr8k_is_csv_with_commas_and_quotes_in_quotes(tmp_path: Path) -> None:
    table = (
        f"image,caption\n{TWO},zebra\n{TWO},a dog\n"
        f'{ONE},"A child , in a pink dress"\n{ONE},"He said ""no"" ."\n{THREE},null\n{THREE}'
    )
    result = read(tmp_path, table, where="Images")
    assert captions(result) == {
        "1001773457_577c3a7d70": ("a dog", "zebra"),
        "1000268201_693b08cb0e": ("A child , in a pink dress", 'He said "no" .'),
        "jpg_pgj": ("null",),
    }
    assert result.skipped == {"row without 2 columns": 1}


def test_the_table_of_flickr30k_has_bars_spaces_and_a_broken_row(tmp_path: Path) -> None:
    table = (
        "image_name| comment_number| comment\n"
        f"{ONE}| 1| Several men , in hard hats .\n{ONE}| 0| Two | bars\n"
        '2199200615.jpg| 0| A dog " runs\n2199200615.jpg| 4   A dog runs across the grass .\n'
        "2199200615.jpg| 5\n"
    )
    files = (ONE, "2199200615.jpg")
    result = read(tmp_path, table, files=files, where="flickr30k_images/flickr30k_images")
    assert captions(result) == {
        "1000268201_693b08cb0e": ("Two | bars", "Several men , in hard hats ."),
        "2199200615": ('A dog " runs', "A dog runs across the grass ."),
    }
    assert result.skipped == {"row without 3 columns": 1}


def test_lines_that_are_not_utf8_or_no_captions_are_counted(tmp_path: Path) -> None:
    content = (
        f"{ONE}#0\ta dog\n{TWO}#0\tcaf".encode()
        + b"\xe9\n"
        + b"caf\xe9.jpg#0\ta name\n"
        + f"{TWO}#1\t  \nno caption\n".encode()
    )
    result = read(tmp_path, content, files=(ONE, TWO, os.fsdecode(b"caf\xe9.jpg")))
    assert captions(result) == {"1000268201_693b08cb0e": ("a dog",)}
    assert result.skipped == {
        "line that is not UTF-8": 2,
        "row without caption": 1,
        "image without captions": 1,
        "line that is no `image#number<TAB>caption`": 1,
    }
    assert ("line 3: caf\\udce9.jpg#0\ta name", "line that is not UTF-8") in result.skipped_keys


def test_a_missing_image_that_is_not_the_ghost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"1 of the 3 images of .* are missing below .*: '{TWO}'; pass the folder"):
        read(tmp_path, TOKEN, files=(ONE, THREE))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "it is empty"),
        ("a.jpg\tcaption\n", "its first line is 'a.jpg\\tcaption'"),
        ("image,caption\n", "no sample in"),
        (f"{ONE}#0\t \n", "no sample in"),
        (f'image,caption\n{ONE},"' + "x" * 200_000, "field larger than field limit"),
    ],
)
def test_a_file_that_holds_no_captions_of_flickr_is_refused(tmp_path: Path, content: str, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content)
    assert says in str(caught.value)
    assert "Flickr8k.token.txt'" in str(caught.value)


def images_below(folder: Path, **files: bytes) -> str:
    for name, data in files.items():
        path = folder / "images" / name.replace("__", "/").replace("_dot_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(folder / "images")


def test_captions_with_commas_and_no_quotes_are_whole(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\na.jpg,a dog, a cat, and a bird\nb.jpg,one\n")
    images = images_below(tmp_path, a_dot_jpg=b"1", b_dot_jpg=b"2")
    result = read_flickr(str(tmp_path / "captions.csv"), images)
    assert [sample.captions for sample in result.samples] == [("a dog, a cat, and a bird",), ("one",)]
    assert not result.skipped


def test_keys_keep_the_folder_and_the_suffix_where_two_files_have_one_stem(tmp_path: Path) -> None:
    rows = ["cats/0.jpg,a cat", "dogs/0.jpg,a dog", "a.jpg,one", "a.png,two"]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    images = images_below(tmp_path, cats__0_dot_jpg=b"1", dogs__0_dot_jpg=b"2", a_dot_jpg=b"3", a_dot_png=b"4")
    samples = read_flickr(str(tmp_path / "captions.csv"), images).samples
    assert [(sample.key, sample.captions) for sample in samples] == [
        ("cats/0", ("a cat",)),
        ("dogs/0", ("a dog",)),
        ("a.jpg", ("one",)),
        ("a.png", ("two",)),
    ]


def test_a_name_of_different_pictures_is_refused_and_one_of_equal_copies_is_read(tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\n0001.jpg,a dog\n")
    images = images_below(tmp_path, train__0001_dot_jpg=b"1", test__0001_dot_jpg=b"1")
    (sample,) = read_flickr(str(tmp_path / "captions.csv"), images).samples
    assert sample.captions == ("a dog",)
    images_below(tmp_path, train__0001_dot_jpg=b"2")
    with pytest.raises(
        UserError, match=r"'0001.jpg' of .* is the name of different files .*: 'test/0001.jpg' and 'train/0001.jpg'"
    ):
        read_flickr(str(tmp_path / "captions.csv"), images)


def test_rows_that_a_quote_swallows_are_counted(tmp_path: Path) -> None:
    rows = ["a.jpg,one", 'b.jpg,"a dog', "c.jpg,a cat", 'd.jpg,a "big" bird"', 'e.jpg,"goes on', 'here"', "f.jpg,six"]
    (tmp_path / "captions.csv").write_text("\n".join(["image,caption", *rows]) + "\n")
    images = images_below(tmp_path, **{f"{letter}_dot_jpg": letter.encode() for letter in "abcdef"})
    result = read_flickr(str(tmp_path / "captions.csv"), images)
    assert [(sample.key, sample.captions) for sample in result.samples] == [
        ("a", ("one",)),
        ("e", ("goes on here",)),
        ("f", ("six",)),
    ]
    assert result.unusable == {"row behind a quote that is not closed": 3}
