"""All samples of a data set in a random order, sorted through temporary files, so that millions need no memory.

Owns the order in which samples are packed. $TMPDIR holds the files: about 300 bytes a sample, once they are more than
memory takes.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from raycap.errors import StorageError
from raycap.schema import SampleRef

# A file is sorted in memory: one of 128 holds 100,000 of 12 million samples. Each keeps 256 KB before it is on disk.
_NUM_FILES = 128
_SPOOL_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Unit:
    """The samples of one shard, in order. name: of the shard, without suffix. repeated: which of refs have the key of the
    one before them, by position; the first of a key is the same whatever the order of the annotations."""

    name: str
    refs: tuple[SampleRef, ...]
    repeated: frozenset[int]


class SortedRefs:
    """Samples by a hash of (seed, key), so that neighbours are strangers whatever the order they came in.

    num_samples, num_captions: how many they are and have. fingerprint: of all of them, in no order: the sum of their sha256, hex.
    Raises StorageError if the temporary files cannot be written.
    """

    def __init__(self, refs: Iterable[SampleRef], seed: int) -> None:
        self._seed = seed
        self._files = [tempfile.SpooledTemporaryFile(max_size=_SPOOL_BYTES) for _ in range(_NUM_FILES)]  # noqa: SIM115 (they live as long as this object)
        self.num_samples = self.num_captions = total = 0
        for ref in refs:
            line = json.dumps([ref.key, ref.url, ref.captions, ref.image_id]).encode() + b"\n"
            number = place(seed, ref.key)[0] * _NUM_FILES // 256
            try:
                self._files[number].write(line)
            except OSError as e:
                raise StorageError(
                    f"cannot sort the samples in {tempfile.gettempdir()!r}: {e.strerror} after {self.num_samples} of them; "
                    f"set TMPDIR to a folder with 300 bytes for each sample"
                ) from e
            self.num_samples += 1
            self.num_captions += len(ref.captions)
            total += int.from_bytes(hashlib.sha256(line).digest(), "big")
        self.fingerprint = f"{total % 2**256:064x}"

    def __enter__(self) -> "SortedRefs":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            file.close()

    def sizes(self, samples_per_shard: int) -> dict[str, int]:
        """Name of each unit, in order -> its samples."""
        firsts = range(0, self.num_samples, samples_per_shard)
        return {f"shard-{i:05d}": min(samples_per_shard, self.num_samples - first) for i, first in enumerate(firsts)}

    def units(self, samples_per_shard: int) -> Iterator[Unit]:
        """The units, in order; the last one may be short. Holds one unit and one file in memory."""
        refs: list[SampleRef] = []
        repeated: set[int] = set()
        names = iter(self.sizes(samples_per_shard))
        last = None
        for ref in self._sorted():
            if ref.key == last:
                repeated.add(len(refs))
            last = ref.key
            refs.append(ref)
            if len(refs) == samples_per_shard:
                yield Unit(next(names), tuple(refs), frozenset(repeated))
                refs, repeated = [], set()
        if refs:
            yield Unit(next(names), tuple(refs), frozenset(repeated))

    def _sorted(self) -> Iterator[SampleRef]:
        for file in self._files:
            file.seek(0)
            rows = []
            for line in file:
                key, url, captions, image_id = json.loads(line)
                ref = SampleRef(key=key, url=url, captions=tuple(captions), image_id=image_id)
                rows.append((place(self._seed, key), line, ref))
            rows.sort(key=lambda row: row[:2])
            yield from (ref for _, _, ref in rows)


def place(seed: int, key: str) -> bytes:
    """What a sample is sorted by, 16 bytes."""
    return hashlib.blake2b(f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=16).digest()
