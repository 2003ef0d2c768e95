"""Reads the caption files of Flickr8k and Flickr30k: the authors' token files and the tables that Kaggle has of them."""

import csv
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from raycap import storage
from raycap.datasets.dataset import DatasetRead, is_unicode, key_of, keys_of, tidy
from raycap.datasets.karpathy import find_images
from raycap.errors import UserError
from raycap.schema import SampleRef

GHOST = "2258277193_586949ec62.jpg.1"  # five captions in every copy of Flickr8k.token.txt, and no image anywhere
_TOKEN = re.compile(r"([^\t]+)#(\d+)\t(.*)")
# Row 19999 of Kaggle's Flickr30k lacks its second '|': `2199200615.jpg| 4   A dog runs across the grass .`
_NUMBER_AND_TEXT = re.compile(r"(\d+)\s+(\S.*)")
_SPLIT_FILES = {"train": "trainImages", "val": "devImages", "dev": "devImages", "test": "testImages"}
_ROW = re.compile(r"[^\n,]+\.(jpe?g|png|webp|gif|bmp)\s*,", re.IGNORECASE)
_LAST = 1 << 60  # the number of a caption that has none

Row = tuple[str, int, str]  # image, number of the caption, caption


def read_flickr(annotations: str, images: str, split: str = "") -> DatasetRead:
    """Returns one sample per image that has captions, in the order of first mention.

    annotations: path or URL of Flickr8k.token.txt or results_20130124.token (`image.jpg#0<TAB>caption`), of Kaggle's
    captions.txt of Flickr8k (CSV `image,caption`) or results.csv of Flickr30k (`image_name| comment_number| comment`).
    images: a folder or URL that the images are somewhere below: Flicker8k_Dataset/, flickr30k-images/, or Kaggle's folder
    in a folder. split: "" takes all images; the path or URL of a file of image names takes those; train, val or test
    takes Flickr_8k.trainImages.txt, .devImages.txt or .testImages.txt beside the annotations. (Flickr30k has no such
    files: its split is in dataset_flickr30k.json, see read_karpathy.)
    Captions come by number; Kaggle's Flickr8k has no numbers, there they are sorted. The ghost image of Flickr8k is
    counted. Raises UserError when the file is none of these, nothing usable is left, a name of the split has no captions,
    or an image file is missing; StorageError when a path does not exist.
    """
    skips = DatasetRead(samples=())
    wanted = None if not split else _read_split(_split_url(annotations, split), annotations)
    found: dict[str, list[tuple[int, str]]] = {}
    other = Counter[str]()
    for image, number, text in _rows(annotations, skips):
        if image == GHOST:
            skips.skip(image, "image without file (Flickr8k's ghost)")
        elif wanted is not None and image not in wanted:
            other[image] += 1
        elif caption := tidy(text):
            found.setdefault(image, []).append((number, caption))
        else:
            found.setdefault(image, [])
            skips.skip(key_of(image), "row without caption")
    for image in sorted(image for image, texts in found.items() if not texts):
        skips.skip(key_of(image), "image without captions")
    captions = {image: tuple(text for _, text in sorted(texts)) for image, texts in found.items() if texts}
    if other:
        skips.skipped["image of another split"] = len(other)
    if wanted is not None and (lost := sorted(wanted - found.keys() - {GHOST})):
        raise UserError(
            f"{len(lost)} of the {len(wanted)} images of the split {split!r} have no captions in '{annotations}', the "
            f"first: '{lost[0]}'; pass the split file that belongs to the captions"
        )
    if not captions:
        raise UserError(f"no sample in '{annotations}': skipped {skips.describe_skipped()}; pass a file with captions")
    paths = find_images(images, list(captions), annotations)
    keys = keys_of(captions)
    samples = tuple(
        SampleRef(key=keys[image], url=storage.join(images, paths[image]), captions=texts)
        for image, texts in captions.items()
    )
    return replace(skips, samples=samples)


def _split_url(annotations: str, split: str) -> str:
    if split in _SPLIT_FILES:
        return storage.join(annotations.rpartition("/")[0], f"Flickr_8k.{_SPLIT_FILES[split]}.txt")
    if "/" not in split:
        raise UserError(
            f"no split {split!r} of '{annotations}'; pass train, val or test, or the path of a file of image names"
        )
    return split


def _read_split(url: str, annotations: str) -> set[str]:
    """One file name per line."""
    names = {line.decode("utf-8", "surrogateescape").strip() for line in storage.read_lines(url)} - {""}
    if not names:
        raise UserError(f"the split file '{url}' of '{annotations}' names no image; pass one name per line")
    return names


def _rows(annotations: str, skips: DatasetRead) -> Iterator[Row]:
    """Of whichever of the four formats the first line shows."""
    lines = _text_lines(annotations, skips)
    first = next(lines, None)
    if first is None:
        raise UserError(
            f"cannot read Flickr's captions from '{annotations}': it is empty; pass a token file or Kaggle's csv"
        )
    if _TOKEN.fullmatch(first):
        yield from _token_rows(first, lines, skips)
        return
    delimiter = "|" if "|" in first else ","
    columns = [column.strip().lower() for column in first.split(delimiter)]
    if columns in (["image", "caption"], ["image_name", "comment_number", "comment"]):
        yield from _table_rows(lines, delimiter, len(columns), skips, annotations)
        return
    raise UserError(
        f"cannot read Flickr's captions from '{annotations}': its first line is {first[:80]!r}, not `image.jpg#0<TAB>caption`, "
        f"`image,caption` or `image_name| comment_number| comment`; pass a token file or Kaggle's csv"
    )


def _text_lines(annotations: str, skips: DatasetRead) -> Iterator[str]:
    """Those that are not empty and are UTF-8. Others are counted, so that no caption is guessed."""
    for number, line in enumerate(storage.read_lines(annotations), 1):
        text = line.decode("utf-8", "surrogateescape")
        if not is_unicode(text):
            skips.skip(f"line {number}: {text[:60]}", "line that is not UTF-8", unusable=True)
        elif text.strip():
            yield text


def _token_rows(first: str, lines: Iterable[str], skips: DatasetRead) -> Iterator[Row]:
    for line in (first, *lines):
        if match := _TOKEN.fullmatch(line):
            yield match[1], int(match[2]), match[3]
        else:
            skips.skip(line[:60], "line that is no `image#number<TAB>caption`", unusable=True)


def _table_rows(
    lines: Iterable[str], delimiter: str, num_columns: int, skips: DatasetRead, annotations: str
) -> Iterator[Row]:
    """Quotes are CSV's where the comma parts the columns, and plain letters where the bar does."""
    # A caption in quotes may go on in the next line, which must then keep its end.
    ended = (f"{line}\n" for line in lines)
    table = csv.reader(ended) if delimiter == "," else csv.reader(ended, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    num_lines = 0
    try:
        for row in table:
            num_lines, before = table.line_num, num_lines
            if num_lines > before + 1 and any(map(_ROW.match, "\n".join(row).splitlines()[2:])):
                for _ in range(before, num_lines):
                    skips.skip(delimiter.join(row)[:60], "row behind a quote that is not closed", unusable=True)
            elif num_columns == 2 and len(row) >= 2:
                yield row[0].strip(), _LAST, delimiter.join(row[1:])  # a caption with commas and no quotes
            elif num_columns == 3 and len(row) >= 3 and row[1].strip().isdecimal():
                yield row[0].strip(), int(row[1]), delimiter.join(row[2:])
            elif num_columns == 3 and len(row) == 2 and (match := _NUMBER_AND_TEXT.fullmatch(row[1].strip())):
                yield row[0].strip(), int(match[1]), match[2]
            else:
                skips.skip(delimiter.join(row)[:60], f"row without {num_columns} columns", unusable=True)
    except csv.Error as e:
        raise UserError(f"cannot read row {table.line_num} of '{annotations}': {e}; mend its quotes") from e
