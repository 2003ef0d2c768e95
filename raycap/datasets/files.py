"""Long listings and long text files, as streams: what the readers of large data sets need of storage."""

import array
import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from raycap import storage
from raycap.errors import StorageError

CHUNK_BYTES = 8 * 2**20  # of one range read of a URL
_BOM = b"\xef\xbb\xbf"


def iter_names(root: str) -> Iterator[str]:
    """Names of all files below root, in no order: relative, '/'-separated. Local ones that are not UTF-8 are among them,
    with their bytes as Python's file functions take them. Raises StorageError if root cannot be listed."""
    if storage.is_url(root):
        yield from storage.list_files(root)
        return
    with storage._local_errors("list", root):
        for name, _ in storage._walk(storage._path(root), "", ()):
            yield name


def read_head(url: str, num_bytes: int = 65536) -> bytes:
    """The first bytes of the file, without a byte order mark. Raises StorageError if it cannot be read."""
    return next(_chunks(url, num_bytes), b"").removeprefix(_BOM)


def read_lines(url: str) -> Iterator[bytes]:
    """The lines of the file, without their ends and without a byte order mark; the last one needs no end.

    A line ends at \\n or \\r\\n alone: a caption may hold any other mark that Unicode calls the end of a line. Holds one
    chunk in memory. Raises StorageError if the file cannot be read.
    """
    rest = b""
    for number, chunk in enumerate(_chunks(url, CHUNK_BYTES)):
        *lines, rest = (rest + (chunk if number else chunk.removeprefix(_BOM))).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")
    if rest:
        yield rest.removesuffix(b"\r")


def _chunks(url: str, size: int) -> Iterator[bytes]:
    if not storage.is_url(url):
        with storage._local_errors("read", url), open(storage._path(url), "rb") as f:
            while chunk := f.read(size):
                yield chunk
        return
    bucket, key = storage._bucket_key(url)
    head: Callable[[Any], int] = lambda client: int(client.head_object(Bucket=bucket, Key=key)["ContentLength"])  # noqa: E731
    num_bytes = storage._s3("read", url, head)
    # Range reads, each with its own retries: one request for gigabytes would start again from nothing when it breaks off.
    for start in range(0, num_bytes, size):
        yield storage.read_range(url, start, min(start + size, num_bytes))


def is_fault_of_file(error: StorageError) -> bool:
    """Whether reading failed because of that one file: missing, forbidden, no regular file, on a damaged part of a disk.

    Anything else (a server that does not answer, a wrong password) would be taken for thousands of bad files.
    """
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return cause.errno in (*storage._CHANGED_ERRNOS, errno.EIO, errno.ENAMETOOLONG)
    return isinstance(cause, Exception) and storage._code(cause) in storage._CHANGED_CODES


class ImageIndex:
    """Which image files are below a root, without their names: 8 bytes a file, so that millions fit.

    Holds, for each file with one of `suffixes` (or '' for none), a hash of its path without suffix in 60 bits and the
    number of its suffix in 4. Of 12 million files and as many questions, one wrong "yes" is to be expected in 8,000 such
    data sets; it becomes an image that cannot be read when it is packed.
    """

    def __init__(self, names: Iterable[str], suffixes: Sequence[str]) -> None:
        assert len(suffixes) <= 16, suffixes
        self._suffixes = tuple(suffixes)
        codes = {suffix: code for code, suffix in enumerate(suffixes)}
        found = array.array("Q")
        for name in names:
            stem, suffix = os.path.splitext(name)  # noqa: PTH122 (a Path of each of millions of names takes minutes)
            code = codes.get(suffix)
            if code is not None:
                found.append(_hash(stem) | code)
        self._entries = np.frombuffer(found, dtype=np.uint64) if found else np.empty(0, np.uint64)
        self._entries.sort()

    def __len__(self) -> int:
        return len(self._entries)

    def suffixes_of(self, stems: Sequence[str]) -> list[str | None]:
        """For each path without suffix, the suffix of the file that is there, or None."""
        if not len(self):
            return [None] * len(stems)
        wanted = np.fromiter((_hash(stem) for stem in stems), np.uint64, len(stems))
        places: npt.NDArray[np.int64] = np.searchsorted(self._entries, wanted)
        entries = self._entries[np.minimum(places, len(self) - 1)]
        same = (entries >> np.uint64(4)) == (wanted >> np.uint64(4))
        codes = (entries & np.uint64(15)).tolist()
        return [self._suffixes[code] if ok else None for ok, code in zip(same.tolist(), codes, strict=True)]


def _hash(stem: str) -> int:
    digest = hashlib.blake2b(stem.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") & ~15
