"""Whole folders: copied up or down file by file, removed, or there for a while."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from raycap.errors import StorageError
from raycap.storage import local, s3
from raycap.storage.files import is_url, join, remove
from raycap.storage.listing import list_files

_LEFT_S = 3600.0


def upload_folder(local_dir: str, url: str, last: str) -> None:
    """Copy all files below local_dir to url, the file `last` after all others, so that its presence means "complete".

    Each file appears whole. A `last` from an earlier upload is removed first, so it never marks a mixture. Raises
    StorageError if local_dir has no file `last`.
    """
    names = list_files(local_dir)
    if last not in names:
        raise StorageError(
            f"cannot upload {local_dir!r}: there is no {last!r} among its {len(names)} files; write that file first"
        )
    remove(join(url, last))
    for name in [*(n for n in names if n != last), last]:
        _upload(join(local_dir, name), join(url, name))


def _upload(source: str, target: str) -> None:
    if not is_url(target):
        local.copy(local.as_path(source), local.as_path(target))
        return
    bucket, key = s3.bucket_key(target)
    # boto3 reads the file in parts, so a checkpoint of many gigabytes neither fills memory nor meets the 5 GB limit.
    s3.call("write", target, lambda client: client.upload_file(source, bucket, key))


def download_folder(url: str, local_dir: str) -> None:
    """Copy all files below url into local_dir. Each file appears whole. StorageError if there are none."""
    names = list_files(url)
    if not names:
        raise StorageError(f"no files below {url!r} to download to {local_dir!r}; check the URL")
    for name in names:
        source, target = join(url, name), join(local_dir, name)
        # A key such as `../x` or `a//b` is no name of a file below local_dir.
        if any(part in ("", ".", "..") for part in name.split("/")):
            raise StorageError(
                f"cannot write {target!r}: the key {name!r} below {url!r} is no file name; rename the key"
            )
        _download(source, target)


def _download(source: str, target: str) -> None:
    if not is_url(source):
        local.copy(local.as_path(source), local.as_path(target))
        return
    bucket, key = s3.bucket_key(source)

    def fetch(f: BinaryIO) -> None:
        def request(client: Any) -> None:
            f.seek(0)
            f.truncate()  # of an attempt that the server broke off
            client.download_fileobj(bucket, key, f)

        s3.call("read", source, request)

    with local.errors("write", target):
        local.replace(local.as_path(target), fetch)


def remove_folder(url: str) -> None:
    """Delete all files below url, and a local folder with them. A folder that is not there is fine."""
    if is_url(url):
        for name in list_files(url):
            remove(join(url, name))
        return
    with local.errors("remove", url):
        path = local.as_path(url)
        if path.exists():
            shutil.rmtree(path)


@contextlib.contextmanager
def temporary_folder(kind: str) -> Iterator[Path]:
    """A local folder for the length of a block. What killed processes left of the same kind on this machine is removed first.

    That is what no process of this number uses and nobody wrote to for an hour: containers that share the folder count for themselves.
    """
    prefix = f"raycap-{kind}-"
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid = path.name.removeprefix(prefix).partition("-")[0]
        with contextlib.suppress(OSError):  # another process sweeps too
            if pid.isdigit() and not _is_alive(int(pid)) and time.time() - path.stat().st_mtime > _LEFT_S:
                shutil.rmtree(path, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True
