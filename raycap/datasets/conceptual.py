"""Reads the TSV files of Conceptual Captions (3M and 12M) over a folder of images that were downloaded. Decodes none."""

import itertools
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from raycap import storage
from raycap.datasets.dataset import DatasetRead, is_unicode, tidy
from raycap.datasets.files import ImageIndex
from raycap.errors import UserError
from raycap.schema import SampleRef

# Of the same image in two files the first counts. LAVIS's own downloader wrote names without suffix.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".gif", ".bmp", "")
_BATCH = 4096  # rows whose images are looked up at once
_HEAD = 100  # lines that show which column is which
_URL = re.compile(rb"https?://\S", re.IGNORECASE)

Row = tuple[str, str]  # path of its image without suffix, caption


def read_conceptual(annotations: str, images: str) -> DatasetRead:
    """Returns one sample per row whose image was downloaded, as a stream in the order of the file.

    annotations: path or URL of a TSV with a caption and a URL in each row: CC3M has the caption first and CC12M the URL,
    so the column is found by what it holds; further columns (CC3M's labels) and a header row are fine. No quoting: a quote
    is a letter, and so is the caption "null". images: the folder or URL with the images by LAVIS's naming,
    `{row}_{crc32 of the URL}` with any of SUFFIXES; row counts the data rows from 0, usable or not.
    The stream holds 8 bytes per image file in memory and nothing per row. What has no image file is counted: 17 to 32 % of
    the links are dead. Raises UserError at once when no column holds URLs or when no file has such a name, and
    StorageError when a path does not exist.
    """
    column, has_header = _find_columns(annotations)
    index = ImageIndex(storage.iter_names(images), SUFFIXES)
    if not len(index):
        raise UserError(
            f"there is no image below '{images}' for '{annotations}'; pass the folder that holds the images"
        )
    skips = DatasetRead(samples=())
    return replace(skips, samples=_samples(annotations, images, column, has_header, index, skips))


def _find_columns(annotations: str) -> tuple[int, bool]:
    """(number of the column of URLs, 0 or 1; whether the first row is a header)."""
    rows = [line.split(b"\t") for line in itertools.islice(storage.read_lines(annotations), _HEAD)]
    with_url = [
        {number for number, text in enumerate(row[:2]) if _URL.match(text.strip())} for row in rows if len(row) >= 2
    ]
    columns = set().union(*with_url)
    if len(columns) != 1:
        found = "both columns hold" if columns else "neither of the first two columns holds"
        raise UserError(
            f"cannot read Conceptual Captions from '{annotations}': {found} URLs in the first {len(rows)} lines; pass a TSV "
            f"of captions and URLs, in either order"
        )
    first = rows[0]
    return columns.pop(), len(first) >= 2 and not with_url[0]


def _samples(
    annotations: str, images: str, column: int, has_header: bool, index: ImageIndex, skips: DatasetRead
) -> Iterator[SampleRef]:
    any_sample = False
    rows = _rows(itertools.islice(storage.read_lines(annotations), has_header, None), column, skips)
    while batch := list(itertools.islice(rows, _BATCH)):
        suffixes = index.suffixes_of([stem for stem, _ in batch])
        for (stem, caption), suffix in zip(batch, suffixes, strict=True):
            if suffix is None:
                skips.skip(stem, "image file is missing")
            else:
                any_sample = True
                yield SampleRef(key=stem, url=storage.join(images, f"{stem}{suffix}"), captions=(caption,))
    if not any_sample:
        raise UserError(
            f"no row of '{annotations}' has its image below '{images}' (skipped {skips.describe_skipped()}); the names must "
            f"be {{row}}_{{crc32 of the URL}}.jpg, as LAVIS downloads them; pass img2dataset's output as shards instead"
        )


def _rows(lines: Iterable[bytes], column: int, skips: DatasetRead) -> Iterator[Row]:
    for number, line in enumerate(lines):
        fields = line.split(b"\t")
        url = fields[column] if len(fields) >= 2 else b""
        if not _URL.match(url.strip()):
            skips.skip(str(number), "row without caption and URL", unusable=True)
            continue
        stem = f"{number}_{zlib.crc32(url)}"
        text = fields[1 - column].decode("utf-8", "surrogateescape")
        if caption := tidy(text):
            yield stem, caption
        else:
            is_text = is_unicode(text)
            skips.skip(stem, "row without caption" if is_text else "caption that is not UTF-8", unusable=not is_text)
