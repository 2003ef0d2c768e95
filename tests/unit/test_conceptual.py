"""raycap/datasets/conceptual.py and files.py: columns in either order, no quoting, dead links, bounded memory, s3:// alike."""

import itertools
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from raycap import storage
from raycap.datasets import conceptual
from raycap.datasets.conceptual import read_conceptual
from raycap.datasets.dataset import DatasetRead
from raycap.datasets.files import ImageIndex
from raycap.errors import StorageError, UserError

URLS = [f"http://example.org/{i}.jpg?a=b" for i in range(6)]
CAPTIONS = ["a man , walking", "null", 'the 5" wheel', "NA", "two  <PERSON> dogs ", "nan"]


def stem(row: int, url: str | None = None) -> str:
    return f"{row}_{zlib.crc32((url or URLS[row]).encode()) & 0xFFFFFFFF}"


def read(folder: Path, content: bytes, present: tuple[str, ...]) -> DatasetRead:
    (folder / "images").mkdir(exist_ok=True)
    for name in present:
        (folder / "images" / name).touch()
    (folder / "train.tsv").write_bytes(content)
    return read_conceptual(str(folder / "train.tsv"), str(folder / "images"))


def rows(order: str, end: str = "\n") -> bytes:
    pairs = zip(CAPTIONS, URLS, strict=True)
    return "".join("\t".join(p if order == "cc3m" else p[::-1]) + end for p in pairs).encode()


ALL = tuple(f"{stem(i)}.jpg" for i in range(6))


@pytest.mark.parametrize("order", ["cc3m", "cc12m"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("header", [b"", b"\xef\xbb\xbf", b"caption\turl\n", b"\xef\xbb\xbfurl\tcaption\r\n"])
def test_the_url_shows_which_column_is_which_and_a_header_is_no_row(
    tmp_path: Path, order: str, end: str, header: bytes
) -> None:
    result = read(tmp_path, header + rows(order, end), ALL)
    samples = list(result.samples)
    assert [s.captions for s in samples] == [
        ("a man , walking",),
        ("null",),
        ('the 5" wheel',),
        ("NA",),
        ("two <PERSON> dogs",),
        ("nan",),
    ]
    assert [s.key for s in samples] == [stem(i) for i in range(6)]
    assert [s.url for s in samples] == [f"{tmp_path}/images/{name}" for name in ALL]
    assert result.skipped == {}


def test_the_last_line_needs_no_end_and_labels_behind_the_url_are_not_read(tmp_path: Path) -> None:
    content = f"a dog\t{URLS[0]}\tdog,animal\t/m/1\t0.9\na cat\t{URLS[1]}\t\t\t".encode()
    assert [s.captions for s in read(tmp_path, content, ALL).samples] == [("a dog",), ("a cat",)]


def test_missing_images_are_counted_and_never_fatal(tmp_path: Path) -> None:
    result = read(tmp_path, rows("cc12m"), (ALL[4],))
    assert [s.key for s in result.samples] == [stem(4)]
    assert result.skipped == {"image file is missing": 5}
    assert result.skipped_keys == [(stem(i), "image file is missing") for i in (0, 1, 2, 3, 5)]


def test_an_image_may_have_any_of_the_suffixes_or_none_and_the_first_of_two_counts(tmp_path: Path) -> None:
    names = (f"{stem(0)}.png", stem(1), f"{stem(2)}.webp", f"{stem(2)}.jpeg", f"{stem(3)}.JPG", f"{stem(4)}.txt")
    result = read(tmp_path, rows("cc3m"), names)
    found = [s.url.rpartition("/")[2] for s in result.samples]
    assert found == [f"{stem(0)}.png", stem(1), f"{stem(2)}.jpeg", f"{stem(3)}.JPG"]
    assert result.skipped == {"image file is missing": 2}


def test_rows_that_cannot_be_used_are_counted_and_keep_their_number(tmp_path: Path) -> None:
    lines = [
        f"a dog\t{URLS[0]}".encode(),
        b"no url\tnowhere",
        b"one column",
        b"",
        f" \t{URLS[4]}".encode(),
        b"caf\xe9\t" + URLS[5].encode(),
        f"a\u2028line\x85 separator\x0b\t{URLS[1]}".encode(),
    ]
    present = (f"{stem(0)}.jpg", f"{stem(4)}.jpg", f"{stem(5)}.jpg", f"{stem(6, URLS[1])}.jpg")
    result = read(tmp_path, b"\n".join(lines), present)
    assert [s.captions for s in result.samples] == [("a dog",), ("a line separator",)]
    assert result.skipped == {
        "row without caption and URL": 3,
        "row without caption": 1,
        "caption that is not UTF-8": 1,
    }
    assert ("2", "row without caption and URL") in result.skipped_keys


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "neither of the first two columns holds URLs in the first 0 lines"),
        (b"a\tb\nc\td\n", "neither of the first two columns holds URLs in the first 2 lines"),
        (b"http://a\thttp://b\n", "both columns hold URLs"),
        (b"a,http://b\n", "neither"),
    ],
)
def test_a_file_without_one_column_of_urls_is_refused_at_once(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, content, ALL)
    assert says in str(caught.value)
    assert f"'{tmp_path}/train.tsv'" in str(caught.value)


def test_a_folder_without_images_and_one_of_other_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no image below .*; pass the folder that holds the images"):
        read(tmp_path, rows("cc3m"), ())
    result = read(tmp_path, rows("cc3m"), ("000000001.jpg",))
    with pytest.raises(UserError, match=r"no row of .* has its image below .* \(skipped image file is missing: 6\)"):
        list(result.samples)
    with pytest.raises(StorageError, match="nowhere"):
        read_conceptual(f"{tmp_path}/nowhere.tsv", str(tmp_path))


def test_ten_times_more_rows_take_eight_bytes_per_image_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "http://example.org/x.jpg"
    monkeypatch.setattr(conceptual, "_BATCH", 256)

    def lines(num_rows: int) -> Iterator[bytes]:
        return (f"caption of {i}\t{url}".encode() for i in range(num_rows))

    def peak(num_rows: int) -> int:
        monkeypatch.setattr(storage, "read_lines", lambda _: lines(num_rows))
        monkeypatch.setattr(storage, "iter_names", lambda _: (f"{stem(i, url)}.jpg" for i in range(0, num_rows, 2)))
        tracemalloc.start()
        try:
            result = read_conceptual("x.tsv", "/images")
            assert sum(1 for _ in result.samples) == num_rows // 2
            assert result.skipped == {"image file is missing": num_rows // 2}
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # what is made once
    small, large = peak(2_000), peak(22_000)
    assert (large - small) / 10_000 < 10  # the array has some room to grow


def test_every_suffix_is_told_apart_and_strangers_are_not_found() -> None:
    stems = [f"{i}_{i * 7919}" for i in range(5000)]
    names = [stem + suffix for stem, suffix in zip(stems, itertools.cycle(conceptual.SUFFIXES), strict=False)]
    index = ImageIndex(iter([*names, "a/b.txt"]), conceptual.SUFFIXES)
    assert len(index) == 5000
    assert [s + (found or "") for s, found in zip(stems, index.suffixes_of(stems), strict=True)] == names
    assert set(index.suffixes_of([f"x{stem}" for stem in stems])) == {None}
    assert ImageIndex(iter(()), conceptual.SUFFIXES).suffixes_of(["a"]) == [None]
