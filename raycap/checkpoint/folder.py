"""The folder of a checkpoint as files: a local copy to read, a new one that appears whole, JSON, sha256."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from reprlib import Repr
from typing import Any

from safetensors import SafetensorError

from raycap import storage
from raycap.errors import CheckpointError, StorageError

_short = Repr()
_short.maxstring = _short.maxother = _short.maxlong = 100
_short.maxdict = _short.maxlist = _short.maxlevel = 3


def shown(value: object) -> str:
    """What a file holds, to be quoted in a sentence: however long or deep it is, it is cut."""
    return _short.repr(value)


def in_short(error: BaseException) -> str:
    """What an error says, on one line and cut."""
    words = " ".join(str(error).split())
    return words if len(words) < 300 else f"{words[:300]}..."


def refuse_pointer(path: Path, source: str) -> None:
    """Raises CheckpointError for what a clone without Git LFS holds in the place of a large file."""
    with suppress(OSError), path.open("rb") as file:
        if storage.is_lfs_pointer(file.read(100)):
            raise CheckpointError(
                f"{path.name!r} of {source!r} is a Git LFS pointer: fetch the file with `git lfs pull`, or download the model again"
            )


def read_json(path: Path, root: str) -> dict[str, Any]:
    """The object in a JSON file of the checkpoint at `root`. Raises CheckpointError."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))  # editors of Windows begin files with a mark
    except FileNotFoundError:
        raise CheckpointError(
            f"{root!r} is no checkpoint folder: it holds no {path.name}; give the folder that training wrote, such as "
            f"<out>/checkpoint"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        refuse_pointer(path, root)
        raise CheckpointError(
            f"{path.name} in {root!r} cannot be read ({in_short(error)}); copy the folder again"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path.name} in {root!r} holds no JSON object; copy the folder again")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def sha256_of_json(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def local_copy(root: str) -> Iterator[Path]:
    """The folder itself, or a temporary copy of an s3:// root. Raises CheckpointError, StorageError."""
    if not storage.is_url(root):
        if not Path(root).is_dir():
            reason = "it is a file; give its folder" if Path(root).exists() else "it does not exist; check the path"
            raise CheckpointError(f"no checkpoint folder at {root!r}: {reason}, or train first")
        yield Path(root)
        return
    if not storage.list_files(root):
        raise CheckpointError(f"no checkpoint folder at {root!r}: no key is below it; check the URL, or train first")
    with storage.temporary_folder("checkpoint") as folder:
        storage.download_folder(root, str(folder))
        yield folder


@contextmanager
def new_folder(root: str, last: str) -> Iterator[Path]:
    """A folder to fill, which becomes `root` (local or s3://) when the block ends well. last: the file that completes it.

    One process at a time writes a root: what killed ones left beside a local root is swept. Raises StorageError.
    """
    if storage.is_url(root):
        with storage.temporary_folder("checkpoint") as folder:
            yield folder
            if storage.exists(storage.join(root, last)):
                storage.remove(storage.join(root, last))  # from here until the new seal, readers refuse the folder
            storage.upload_folder(str(folder), root, last=last)
        return
    target = Path(root)
    fresh = target.with_name(f".{target.name}.new-{os.getpid()}")
    stale = target.with_name(f".{target.name}.old-{os.getpid()}")
    try:
        _sweep(target, "new")
        fresh.mkdir(parents=True)
        yield fresh
        if target.exists():
            shutil.rmtree(stale, ignore_errors=True)
            target.rename(stale)
        try:
            fresh.rename(target)
        except OSError:
            if stale.exists():
                stale.rename(target)
            raise
        _sweep(target, "old")  # only now: a process killed between its renames left the last whole checkpoint there
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write checkpoint {root!r}: {error}; free space or choose another --out") from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _sweep(target: Path, kind: str) -> None:
    """Removes `.<target>.<kind>-<number>` of every process: numbers repeat, as in every new container."""
    prefix = f".{target.name}.{kind}-"
    for path in target.parent.glob(f"{glob.escape(prefix)}*"):
        if path.name.removeprefix(prefix).isdigit():  # not what belongs to a target of a longer name
            shutil.rmtree(path, ignore_errors=True)
