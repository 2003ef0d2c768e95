"""One file at an absolute path or an s3:// URL: look up, read, create once, replace, remove."""

import errno
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from raycap.errors import StorageError
from raycap.storage import local, s3
from raycap.storage.entry import FORBIDDEN, Entry, EntryError

CHUNK_BYTES = 8 * 2**20  # of one range read of a URL
_READ_THREADS = 16
_READ_AHEAD = 64  # files
_BOM = b"\xef\xbb\xbf"


def is_url(root: str) -> bool:
    """True for `scheme://...`, false for a path."""
    return "://" in root


def join(root: str, *parts: str) -> str:
    """The file `parts` below root. One trailing '/' of root is ignored; parts are kept verbatim, a leading '/' too."""
    return "/".join((root.removesuffix("/"), *parts))


def exists(url: str) -> bool:
    """True if url is a file; false if nothing, or only a folder, is there."""
    if not is_url(url):
        with local.errors("look up", url):
            return local.as_path(url).is_file()
    bucket, key = s3.bucket_key(url)

    def head(client: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            client.head_object(Bucket=bucket, Key=key)
        except ClientError as e:
            if s3.error_code(e) in ("404", "NoSuchKey"):
                return False
            raise
        return True

    return s3.call("look up", url, head)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises StorageError if it is missing or cannot be read."""
    if not is_url(url):
        with local.errors("read", url), open(local.as_path(url), "rb") as f:
            return f.read()
    bucket, key = s3.bucket_key(url)
    return s3.call("read", url, lambda client: bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read()))


def read_each(urls: Sequence[str]) -> Iterator[bytes]:
    """The whole of each file, in order; a few of them are read ahead. Raises as read_bytes does."""
    with ThreadPoolExecutor(_READ_THREADS) as pool:
        for first in range(0, len(urls), _READ_AHEAD):
            yield from pool.map(read_bytes, urls[first : first + _READ_AHEAD])


def read_entry(root: str, entry: Entry) -> bytes:
    """The file as it was listed. Raises EntryError if it is gone, forbidden or replaced since, else StorageError."""
    url = join(root, entry.name)
    if not is_url(url):
        with local.errors("read", url):
            return local.read_as_listed(url, entry)
    bucket, key = s3.bucket_key(url)

    def get(client: Any) -> bytes:
        from botocore.exceptions import ClientError

        try:
            # The server compares, so that not even a file replaced in this moment is taken for the listed one.
            return bytes(client.get_object(Bucket=bucket, Key=key, IfMatch=f'"{entry.etag}"')["Body"].read())
        except ClientError as e:
            reason = s3.CHANGED_CODES.get(s3.error_code(e))
            if reason is None:
                raise
            raise EntryError(f"cannot read {url!r}: {reason} ({s3.error_code(e)})") from e

    return s3.call("read", url, get)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the file, exactly stop - start of them; StorageError if it is shorter."""
    assert 0 <= start <= stop, (start, stop)
    if start == stop:
        return b""
    if not is_url(url):
        with local.errors("read", url), open(local.as_path(url), "rb") as f:
            f.seek(start)
            data = f.read(stop - start)
    else:
        bucket, key = s3.bucket_key(url)
        where = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        data = s3.call("read", url, lambda client: bytes(client.get_object(**where)["Body"].read()))
    if len(data) != stop - start:
        raise StorageError(
            f"cannot read bytes {start} to {stop} of {url!r}: got {len(data)} bytes, not {stop - start}; the file was "
            f"cut or replaced since it was indexed, write it again"
        )
    return data


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
    if not is_url(url):
        with local.errors("read", url), open(local.as_path(url), "rb") as f:
            while chunk := f.read(size):
                yield chunk
        return
    bucket, key = s3.bucket_key(url)
    head = s3.call("read", url, lambda client: client.head_object(Bucket=bucket, Key=key))
    num_bytes = int(head["ContentLength"])
    # Range reads, each with its own retries: one request for gigabytes would start again from nothing when it breaks off.
    for start in range(0, num_bytes, size):
        yield read_range(url, start, min(start + size, num_bytes))


def is_fault_of_file(error: StorageError) -> bool:
    """Whether reading failed because of that one file: missing, forbidden, replaced, no regular file, on a damaged part of
    a disk.

    Anything else (a server that does not answer, a wrong password) would be taken for thousands of bad files.
    """
    cause = error.__cause__
    if isinstance(cause, OSError) and cause.errno is not None:
        return local.is_fault_of_file(cause)
    return isinstance(error, EntryError) or (isinstance(cause, Exception) and s3.error_code(cause) in s3.CHANGED_CODES)


def is_lfs_pointer(head: bytes) -> bool:
    """Whether these first bytes of a file are those that Git leaves in the place of a large one."""
    return head.startswith(b"version https://git-lfs.github.com/spec/")


def _is_refused(error: StorageError) -> bool:
    """Whether access to the file was refused, or the disk failed: its neighbours may be no better off."""
    cause = error.__cause__
    if isinstance(cause, OSError):
        return cause.errno in (errno.EACCES, errno.EPERM, errno.EIO)
    return isinstance(cause, Exception) and s3.CHANGED_CODES.get(s3.error_code(cause)) == FORBIDDEN


class AccessWatch:
    """Tells one file that access is refused to from a storage that refuses all: what could be read is read once more.

    Without it a role that expires half way would be taken for thousands of bad files. Any thread may call it.
    """

    def __init__(self) -> None:
        self._again: Callable[[], object] | None = None
        self._refused: list[StorageError] = []

    def worked(self, again: Callable[[], object]) -> None:
        """Notes a read that succeeded. again: does it once more."""
        self._again = again

    def check(self, error: StorageError) -> None:
        """Notes a failed read. Raises StorageError if access was refused, and is now to what could be read before, too."""
        if not _is_refused(error):
            return
        self._refused.append(error)
        if self._again is None:
            return
        try:
            self._again()
        except StorageError as second:
            if _is_refused(second):
                raise _lost(error) from second
            if not is_fault_of_file(second):
                raise

    def check_all(self, num_files: int) -> None:
        """Raises StorageError if access was refused to every one of the last num_files, more than one; then starts anew."""
        refused, self._refused = self._refused, []
        if len(refused) >= num_files > 1:
            raise _lost(refused[-1])


def _lost(error: StorageError) -> StorageError:
    return StorageError(f"{error}, and so is access to other files there; restore it and run the same command again")


def put_new(url: str, data: bytes) -> bool:
    """Create the file with these bytes if it does not exist: True if this call created it, False if it existed.

    Of any number of writers, in any processes, exactly one gets True, and no reader sees a part of the bytes. After a
    reply that was lost on the network the retry meets our own file and returns False: a caller who must know compares
    the content (units.commit does). Local parents are made.
    """
    if not is_url(url):
        with local.errors("write", url):
            return local.create(local.as_path(url), data)
    bucket, key = s3.bucket_key(url)

    def put(client: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as e:
            if s3.error_code(e) in ("PreconditionFailed", "412"):
                return False
            raise
        return True

    return s3.call("write", url, put)


def put(url: str, data: bytes) -> None:
    """Write the file, replacing it in one step: a reader sees the old bytes or the new ones. Local parents are made."""
    if not is_url(url):
        with local.errors("write", url):
            local.replace(local.as_path(url), lambda f: f.write(data))
        return
    bucket, key = s3.bucket_key(url)
    s3.call("write", url, lambda client: client.put_object(Bucket=bucket, Key=key, Body=data))


def remove(url: str) -> None:
    """Delete the file. A file that is not there is fine."""
    if not is_url(url):
        with local.errors("remove", url):
            local.as_path(url).unlink(missing_ok=True)
        return
    bucket, key = s3.bucket_key(url)
    s3.call("remove", url, lambda client: client.delete_object(Bucket=bucket, Key=key))
