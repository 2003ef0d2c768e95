"""Files at an absolute path or an s3:// URL: list, read, create once, replace, copy or remove folders.

Owns every byte that enters or leaves storage, and turns what goes wrong into one StorageError sentence. It does not own
what the bytes mean, nor which files make a finished output (raycap/units.py).

S3 keys are used verbatim: no path is normalised, so `a//b`, `./x` and `trail/` are different files. Credentials, region
and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, roles), and with
RAYCAP_S3_ANONYMOUS=1 none are used, with RAYCAP_S3_REQUESTER_PAYS=1 the reader pays.
"""

from raycap.storage.entry import Entry, EntryError
from raycap.storage.files import (
    AccessWatch,
    exists,
    is_fault_of_file,
    is_lfs_pointer,
    is_url,
    join,
    put,
    put_new,
    read_bytes,
    read_each,
    read_entry,
    read_head,
    read_lines,
    read_range,
    remove,
)
from raycap.storage.folders import download_folder, remove_folder, temporary_folder, upload_folder
from raycap.storage.listing import has_files, iter_names, list_entries, list_files

__all__ = [
    "AccessWatch",
    "Entry",
    "EntryError",
    "download_folder",
    "exists",
    "has_files",
    "is_fault_of_file",
    "is_lfs_pointer",
    "is_url",
    "iter_names",
    "join",
    "list_entries",
    "list_files",
    "put",
    "put_new",
    "read_bytes",
    "read_each",
    "read_entry",
    "read_head",
    "read_lines",
    "read_range",
    "remove",
    "remove_folder",
    "temporary_folder",
    "upload_folder",
]
