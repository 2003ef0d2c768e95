"""What a listing knows of a file, and the error for one file that is no longer as it was listed."""

from collections.abc import Callable
from dataclasses import dataclass

from raycap.errors import StorageError


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as a listing shows it. etag: changes when the file does: S3's, or size and time of change of a local file."""

    name: str
    num_bytes: int
    etag: str


class EntryError(StorageError):
    """One listed file is gone, forbidden or replaced. The storage as a whole may be well."""


ARCHIVED = "it was listed but is archived"
GONE, FORBIDDEN = "it was listed but is gone", "it was listed but access to it is refused"
REPLACED, IRREGULAR = "it was replaced since it was listed", "it is no regular file"


class AccessWatch:
    """Tells one file that access is refused to from a storage that refuses all: what could be read is read once more.

    Without it a role that expires half way would be taken for thousands of bad files.
    """

    def __init__(self) -> None:
        self._again: Callable[[], object] | None = None

    def worked(self, again: Callable[[], object]) -> None:
        """Notes a read that succeeded. again: does it once more."""
        self._again = again

    def check(self, error: StorageError) -> None:
        """Raises StorageError if what could be read before is refused now, too."""
        if self._again is None:
            return
        try:
            self._again()
        except StorageError as second:
            raise lost(error) from second


def lost(error: StorageError) -> StorageError:
    """That it is the access which was lost, and not a file."""
    return StorageError(f"{error}, and so is access to other files there; restore it and run the same command again")
