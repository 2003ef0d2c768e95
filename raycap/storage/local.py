"""Local files: walked, read as listed, created once, replaced in one step, and what a user reads when that fails."""

import contextlib
import errno
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from raycap.errors import StorageError
from raycap.storage.entry import FORBIDDEN, GONE, IRREGULAR, REPLACED, Entry, EntryError

_TEMPORARY = ".tmp-"  # files that a writer has not finished; no listing shows them
# What a failed read says of the file itself.
_CHANGED_ERRNOS = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO), GONE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), FORBIDDEN),
    errno.EISDIR: IRREGULAR,
}


def as_path(path: str) -> Path:
    """The path of a local file. Raises StorageError if it is not absolute."""
    if not path.startswith("/") or "\0" in path:
        raise StorageError(f"{path!r} is neither an absolute path nor an s3:// URL; give one of them")
    return Path(path)


def walk(folder: Path, name: str, above: tuple[Path, ...]) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Files below folder, their names behind the prefix `name`. above: the folders on the way, to notice a loop of links."""
    real = folder.resolve()
    if real in above:
        raise StorageError(f"cannot list '{folder}': it links to '{real}', which contains it; remove that link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_folder(entry):
                yield from walk(Path(entry.path), f"{name}{entry.name}/", (*above, real))
            elif not entry.name.startswith(_TEMPORARY):
                yield name + entry.name, entry


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def to_entry(name: str, found: "os.DirEntry[str]") -> Entry:
    """What walk found, with size and etag; one stat."""
    try:
        about = found.stat()
    except OSError:
        return Entry(name, 0, "")  # a link to nothing, or removed in this moment: whoever reads it is told
    return Entry(name, about.st_size, _etag(about))


def _etag(about: os.stat_result) -> str:
    return f"{about.st_size:x}-{about.st_mtime_ns:x}"


def read_as_listed(url: str, entry: Entry) -> bytes:
    """The file if it is the one of entry; else EntryError, or OSError where the disk is at fault."""
    try:
        # Without waiting: a pipe among the images would hold its reader for ever.
        with open(os.open(as_path(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            about = os.fstat(f.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise EntryError(f"cannot read {url!r}: {IRREGULAR}")
            data = f.read() if _etag(about) == entry.etag else None
    except OSError as e:
        reason = _CHANGED_ERRNOS.get(e.errno or 0)
        if reason is None:
            raise
        raise EntryError(f"cannot read {url!r}: {reason} ({e.strerror}, {e.errno})") from e
    if data is None or len(data) != entry.num_bytes:
        raise EntryError(f"cannot read {url!r}: {REPLACED}")
    return data


def require_utf8(root: str, names: Sequence[str]) -> None:
    """Raises StorageError for the first name that is not UTF-8."""
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise StorageError(f"cannot list {root!r}: the file name {name!r} is not UTF-8; rename that file") from None


def create(path: Path, data: bytes) -> bool:
    """Creates the file whole, if it does not exist: whether this call did. Raises OSError."""
    created = False
    if not os.path.lexists(path):  # spares a write; the link below decides
        with _temporary(path) as temporary:
            _write(temporary, lambda f: f.write(data))
            try:
                # A link is the one local operation that fails if the name exists and shows a whole file if it does not.
                path.hardlink_to(temporary)
                created = True
            except (FileExistsError, FileNotFoundError):
                if not os.path.lexists(path):
                    raise
                # Another writer won, and may have swept our temporary file away:
        _sync_folder(path.parent)
    for leftover in path.parent.glob(f"{_TEMPORARY}{glob.escape(path.name)}-*"):
        leftover.unlink(missing_ok=True)  # of a killed writer, or of one that is about to find out that it lost
    return created


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Replaces the file in one step by what write(file) writes. Raises OSError."""
    with _temporary(path) as temporary:
        _write(temporary, write)
        temporary.replace(path)
    _sync_folder(path.parent)


def copy(source: Path, target: Path) -> None:
    """Replaces target in one step by the bytes of source. Raises StorageError that names the one at fault."""
    with errors("read", str(source)):
        f_in = open(source, "rb")  # noqa: SIM115 (closed below; opened here so that a missing source is named as such)
    with f_in, errors("write", str(target)):
        replace(target, lambda f_out: shutil.copyfileobj(f_in, f_out, 1 << 20))


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new name beside path, gone afterwards. The parent folders of path are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{_TEMPORARY}{path.name}-{uuid.uuid4().hex[:12]}")
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with open(path, "xb") as f:
        write(f)
        f.flush()
        os.fsync(f.fileno())  # a name must never survive a power cut that its bytes did not


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def errors(action: str, path: str) -> Iterator[None]:
    """Turns an OSError into the StorageError `cannot {action} {path}`, with the OSError as its cause."""
    try:
        yield
    except OSError as e:
        advice = _advice(action, e.errno)
        raise StorageError(f"cannot {action} {path!r}: {e.strerror or e} ({e.errno}); {advice}") from e


def is_fault_of_file(error: OSError) -> bool:
    """Whether reading failed because of that file, on a damaged part of a disk too."""
    return error.errno in (*_CHANGED_ERRNOS, errno.EIO, errno.ENAMETOOLONG)


def _advice(action: str, number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free space or choose another --out"
    if number in (errno.EACCES, errno.EROFS):
        return "check the permissions or choose another folder"
    if number in (errno.EPERM, errno.ENOTSUP) and action == "write":
        return "choose another --out, on a file system with hard links"
    return "choose another --out" if action == "write" else "check the path"
