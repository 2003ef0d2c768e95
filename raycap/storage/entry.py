"""What a listing knows of a file, and the error for one file that is no longer as it was listed."""

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
