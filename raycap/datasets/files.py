"""Which image files of a large data set are there, in little memory: what the readers of dead links need to know."""

import array
import hashlib
import os
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt


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
