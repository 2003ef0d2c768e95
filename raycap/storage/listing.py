"""What is below a root: names, or names with size and etag; sorted, or as a stream."""

import os
from collections.abc import Iterator, Sequence

from raycap.storage import local, s3
from raycap.storage.entry import Entry
from raycap.storage.files import is_url


def list_files(root: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Names of all files below root: relative, '/'-separated, sorted by code point.

    suffixes: keep only names that end with one of them, upper or lower case. Links to folders are followed. Folders are
    not listed. An S3 root with no keys gives []. Raises StorageError for a local root or a bucket that does not exist,
    for a folder that links into itself, and for a local name that is not UTF-8.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    names = [name for name in iter_names(root) if not endings or name.lower().endswith(endings)]
    if not is_url(root):
        local.require_utf8(root, names)
    return sorted(names)


def iter_names(root: str) -> Iterator[str]:
    """What list_files names, as a stream in no order, with one page of S3 in memory.

    Local names that are not UTF-8 are among them, with their bytes as Python's file functions take them. Raises
    StorageError, when it gets there, for what list_files refuses otherwise.
    """
    if is_url(root):
        yield from (entry.name for entry in s3.iter_entries(root))
        return
    with local.errors("list", root):
        for name, _ in local.walk(local.as_path(root), "", ()):
            yield name


def list_entries(root: str) -> list[Entry]:
    """What list_files names, with size and etag, sorted by name: one request per page of S3, one stat per local file.

    A link to nothing has size 0 and etag "". Raises as list_files does.
    """
    if is_url(root):
        entries = list(s3.iter_entries(root))
    else:
        with local.errors("list", root):
            entries = [local.to_entry(name, found) for name, found in local.walk(local.as_path(root), "", ())]
        local.require_utf8(root, [entry.name for entry in entries])
    return sorted(entries, key=lambda entry: entry.name)


def has_files(root: str) -> bool:
    """Whether anything, a folder too, is below root now; one request. Raises StorageError if root cannot be listed."""
    if not is_url(root):
        with local.errors("list", root), os.scandir(local.as_path(root)) as found:
            return any(True for _ in found)
    bucket, prefix = s3.bucket_folder(root)
    first = s3.call("list", root, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
    return bool(first.get("Contents"))
