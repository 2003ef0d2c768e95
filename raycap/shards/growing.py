"""A ShardIndex that grows sample by sample, whatever the format of the shard."""

from raycap.errors import SampleErrorKind
from raycap.schema import Sample, SampleError, ShardIndex


class GrowingIndex:
    """Collects the samples of one shard in file order; of samples with one key the first counts."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._places: dict[str, tuple[int, int]] = {}  # key -> offset, checksum
        self._skipped: list[tuple[str, str]] = []
        self._stop = 0

    def add(self, sample: Sample | SampleError, offset: int, stop: int, checksum: int) -> None:
        """offset, stop: where the sample begins and ends, in bytes or rows."""
        if isinstance(sample, SampleError):
            self.skip(sample.key, sample.kind)
        elif sample.key in self._places:
            self.skip(sample.key, SampleErrorKind.DUPLICATE_KEY)
        else:
            self._places[sample.key] = (offset, checksum)
            self._stop = stop

    def skip(self, key: str, kind: SampleErrorKind) -> None:
        """Counts something that is no sample."""
        self._skipped.append((key, kind.value))

    def build(self, num_bytes: int, etag: str) -> ShardIndex:
        """The index of what was added. num_bytes, etag: of the file."""
        return ShardIndex(
            shard=self._name,
            num_bytes=num_bytes,
            etag=etag,
            keys=tuple(self._places),
            offsets=(*(offset for offset, _ in self._places.values()), self._stop),
            checksums=tuple(checksum for _, checksum in self._places.values()),
            skipped=tuple(self._skipped),
        )


def changed(key: str, where: str) -> SampleError:
    """Of a sample whose bytes are not those that were indexed."""
    message = (
        f"the bytes of sample {key!r} in {where!r} are not those that were indexed; restore that file, or prepare or index "
        f"the shards again in another folder"
    )
    return SampleError(key=key, kind=SampleErrorKind.SAMPLE_CHANGED, message=message)
