"""Files at an absolute path or an s3:// URL: list, read, create once, replace, copy folders.

Owns every byte that enters or leaves storage, and turns what goes wrong into one StorageError sentence. It does not own
what the bytes mean, nor which files make a finished output (raycap/units.py).

S3 keys are used verbatim: no path is normalised, so `a//b`, `./x` and `trail/` are different files. Credentials, region
and endpoint come from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, roles).

S3 goes through boto3, imported on first use: its clients serve many threads, own no event loop that a forked worker
would inherit dead, and one `put_object` is conditional for any body up to S3's limit of 5 GB.
"""

import contextlib
import errno
import glob
import os
import random
import shutil
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from raycap.errors import StorageError

T = TypeVar("T")

_S3 = "s3://"
_TEMPORARY = ".tmp-"  # files that a writer has not finished; no listing shows them

# Three attempts at 2.5 s with up to 3 s of backoff: an endpoint that nothing answers is reported after about 10 s.
_CONNECT_TIMEOUT_S = 2.5
_READ_TIMEOUT_S = 20.0
_ATTEMPTS = 3
_MAX_CONNECTIONS = 32
# A server that answers "busy" is alive, so it is worth more patience than one that does not answer.
_BUSY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_BUSY_CODES = frozenset(
    {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted", "RequestLimitExceeded"}
    | {"Throttling", "ThrottlingException", "ConditionalRequestConflict", "409", "500", "502", "503", "504"}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """A file as a listing shows it. etag: changes when the file does: S3's, or size and time of change of a local file."""

    name: str
    num_bytes: int
    etag: str


class EntryError(StorageError):
    """One listed file is gone, forbidden or replaced. The storage as a whole may be well."""


_GONE, _FORBIDDEN = "it was listed but is gone", "it was listed but access to it is refused"
_REPLACED, _IRREGULAR = "it was replaced since it was listed", "it is no regular file"
_CHANGED_CODES = {
    **dict.fromkeys(("NoSuchKey", "404"), _GONE),
    **dict.fromkeys(("AccessDenied", "403", "InvalidObjectState"), _FORBIDDEN),
    **dict.fromkeys(("PreconditionFailed", "412"), _REPLACED),
}
_CHANGED_ERRNOS = {
    **dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO), _GONE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _FORBIDDEN),
    errno.EISDIR: _IRREGULAR,
}


def is_url(root: str) -> bool:
    """True for `scheme://...`, false for a path."""
    return "://" in root


def join(root: str, *parts: str) -> str:
    """The file `parts` below root. One trailing '/' of root is ignored; parts are kept verbatim, a leading '/' too."""
    return "/".join((root.removesuffix("/"), *parts))


def list_files(root: str, suffixes: Sequence[str] = ()) -> list[str]:
    """Names of all files below root: relative, '/'-separated, sorted by code point.

    suffixes: keep only names that end with one of them, upper or lower case. Links to folders are followed. Folders are
    not listed. An S3 root with no keys gives []. Raises StorageError for a local root or a bucket that does not exist,
    for a folder that links into itself, and for a local name that is not UTF-8.
    """
    endings = tuple(suffix.lower() for suffix in suffixes)
    if is_url(root):
        names = [entry.name for entry in _s3_entries(root)]
        return sorted(name for name in names if not endings or name.lower().endswith(endings))
    with _local_errors("list", root):
        names = [name for name, _ in _walk(_path(root), "", ()) if not endings or name.lower().endswith(endings)]
    _require_utf8(root, names)
    return sorted(names)


def list_entries(root: str) -> list[Entry]:
    """What list_files names, with size and etag, sorted by name: one request per page of S3, one stat per local file.

    A link to nothing has size 0 and etag "". Raises as list_files does.
    """
    if is_url(root):
        entries = _s3_entries(root)
    else:
        with _local_errors("list", root):
            entries = [_local_entry(name, found) for name, found in _walk(_path(root), "", ())]
        _require_utf8(root, [entry.name for entry in entries])
    return sorted(entries, key=lambda entry: entry.name)


def has_files(root: str) -> bool:
    """Whether anything, a folder too, is below root now; one request. Raises StorageError if root cannot be listed."""
    if not is_url(root):
        with _local_errors("list", root), os.scandir(_path(root)) as found:
            return any(True for _ in found)
    bucket, prefix = _bucket_folder(root)
    first = _s3("list", root, lambda client: client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1))
    return bool(first.get("Contents"))


def _s3_entries(root: str) -> list[Entry]:
    bucket, prefix = _bucket_folder(root)

    def entries(client: Any) -> list[Entry]:
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [
            Entry(item["Key"][len(prefix) :], item["Size"], item["ETag"].strip('"'))
            for page in pages
            for item in page.get("Contents", ())
        ]

    # The empty name is the object that consoles create to show a "folder": it is the root itself, not a file below it.
    return [entry for entry in _s3("list", root, entries) if entry.name]


def _bucket_folder(root: str) -> tuple[str, str]:
    bucket, prefix = _bucket_key(root)
    return bucket, f"{prefix}/" if prefix and not prefix.endswith("/") else prefix


def exists(url: str) -> bool:
    """True if url is a file; false if nothing, or only a folder, is there."""
    if not is_url(url):
        with _local_errors("look up", url):
            return _path(url).is_file()
    bucket, key = _bucket_key(url)

    def head(client: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            client.head_object(Bucket=bucket, Key=key)
        except ClientError as e:
            if _code(e) in ("404", "NoSuchKey"):
                return False
            raise
        return True

    return _s3("look up", url, head)


def read_bytes(url: str) -> bytes:
    """The whole file. Raises StorageError if it is missing or cannot be read."""
    if not is_url(url):
        with _local_errors("read", url), open(_path(url), "rb") as f:
            return f.read()
    bucket, key = _bucket_key(url)
    return _s3("read", url, lambda client: bytes(client.get_object(Bucket=bucket, Key=key)["Body"].read()))


def read_entry(root: str, entry: Entry) -> bytes:
    """The file as it was listed. Raises EntryError if it is gone, forbidden or replaced since, else StorageError."""
    url = join(root, entry.name)
    if not is_url(url):
        with _local_errors("read", url):
            return _read_as_listed(url, entry)
    bucket, key = _bucket_key(url)

    def get(client: Any) -> bytes:
        from botocore.exceptions import ClientError

        try:
            # The server compares, so that not even a file replaced in this moment is taken for the listed one.
            return bytes(client.get_object(Bucket=bucket, Key=key, IfMatch=f'"{entry.etag}"')["Body"].read())
        except ClientError as e:
            reason = _CHANGED_CODES.get(_code(e))
            if reason is None:
                raise
            raise EntryError(f"cannot read {url!r}: {reason} ({_code(e)})") from e

    return _s3("read", url, get)


def read_range(url: str, start: int, stop: int) -> bytes:
    """Bytes [start, stop) of the file, exactly stop - start of them; StorageError if it is shorter."""
    assert 0 <= start <= stop, (start, stop)
    if start == stop:
        return b""
    if not is_url(url):
        with _local_errors("read", url), open(_path(url), "rb") as f:
            f.seek(start)
            data = f.read(stop - start)
    else:
        bucket, key = _bucket_key(url)
        where = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}"}
        data = _s3("read", url, lambda client: bytes(client.get_object(**where)["Body"].read()))
    if len(data) != stop - start:
        raise StorageError(
            f"cannot read bytes {start} to {stop} of {url!r}: got {len(data)} bytes, not {stop - start}; the file was "
            f"cut or replaced since it was indexed, write it again"
        )
    return data


def put_new(url: str, data: bytes) -> bool:
    """Create the file with these bytes if it does not exist: True if this call created it, False if it existed.

    Of any number of writers, in any processes, exactly one gets True, and no reader sees a part of the bytes. After a
    reply that was lost on the network the retry meets our own file and returns False: a caller who must know compares
    the content (units.commit does). Local parents are made.
    """
    if not is_url(url):
        with _local_errors("write", url):
            return _local_create(_path(url), data)
    bucket, key = _bucket_key(url)

    def put(client: Any) -> bool:
        from botocore.exceptions import ClientError

        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
        except ClientError as e:
            if _code(e) in ("PreconditionFailed", "412"):
                return False
            raise
        return True

    return _s3("write", url, put)


def put(url: str, data: bytes) -> None:
    """Write the file, replacing it in one step: a reader sees the old bytes or the new ones. Local parents are made."""
    if not is_url(url):
        with _local_errors("write", url):
            _local_replace(_path(url), lambda f: f.write(data))
        return
    bucket, key = _bucket_key(url)
    _s3("write", url, lambda client: client.put_object(Bucket=bucket, Key=key, Body=data))


def remove(url: str) -> None:
    """Delete the file. A file that is not there is fine."""
    if not is_url(url):
        with _local_errors("remove", url):
            _path(url).unlink(missing_ok=True)
        return
    bucket, key = _bucket_key(url)
    _s3("remove", url, lambda client: client.delete_object(Bucket=bucket, Key=key))


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
        _local_copy(_path(source), _path(target))
        return
    bucket, key = _bucket_key(target)
    # boto3 reads the file in parts, so a checkpoint of many gigabytes neither fills memory nor meets the 5 GB limit.
    _s3("write", target, lambda client: client.upload_file(source, bucket, key))


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
        _local_copy(_path(source), _path(target))
        return
    bucket, key = _bucket_key(source)

    def fetch(f: BinaryIO) -> None:
        def request(client: Any) -> None:
            f.seek(0)
            f.truncate()  # of an attempt that the server broke off
            client.download_fileobj(bucket, key, f)

        _s3("read", source, request)

    with _local_errors("write", target):
        _local_replace(_path(target), fetch)


# ---- local files


def _path(path: str) -> Path:
    if not path.startswith("/") or "\0" in path:
        raise StorageError(f"{path!r} is neither an absolute path nor an s3:// URL; give one of them")
    return Path(path)


def _walk(folder: Path, name: str, above: tuple[Path, ...]) -> Iterator[tuple[str, "os.DirEntry[str]"]]:
    """Files below folder, their names behind the prefix `name`. above: the folders on the way, to notice a loop of links."""
    real = folder.resolve()
    if real in above:
        raise StorageError(f"cannot list '{folder}': it links to '{real}', which contains it; remove that link")
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(Path(entry.path), f"{name}{entry.name}/", (*above, real))
            elif not entry.name.startswith(_TEMPORARY):
                yield name + entry.name, entry


def _local_entry(name: str, found: "os.DirEntry[str]") -> Entry:
    try:
        about = found.stat()
    except OSError:
        return Entry(name, 0, "")  # a link to nothing, or removed in this moment: whoever reads it is told
    return Entry(name, about.st_size, _local_etag(about))


def _local_etag(about: os.stat_result) -> str:
    return f"{about.st_size:x}-{about.st_mtime_ns:x}"


def _read_as_listed(url: str, entry: Entry) -> bytes:
    try:
        # Without waiting: a pipe among the images would hold its reader for ever.
        with open(os.open(_path(url), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as f:
            about = os.fstat(f.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise EntryError(f"cannot read {url!r}: {_IRREGULAR}")
            data = f.read() if _local_etag(about) == entry.etag else None
    except OSError as e:
        reason = _CHANGED_ERRNOS.get(e.errno or 0)
        if reason is None:
            raise
        raise EntryError(f"cannot read {url!r}: {reason} ({e.strerror}, {e.errno})") from e
    if data is None or len(data) != entry.num_bytes:
        raise EntryError(f"cannot read {url!r}: {_REPLACED}")
    return data


def _require_utf8(root: str, names: Sequence[str]) -> None:
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise StorageError(f"cannot list {root!r}: the file name {name!r} is not UTF-8; rename that file") from None


def _local_create(path: Path, data: bytes) -> bool:
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


def _local_replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    with _temporary(path) as temporary:
        _write(temporary, write)
        temporary.replace(path)
    _sync_folder(path.parent)


def _local_copy(source: Path, target: Path) -> None:
    with _local_errors("read", str(source)):
        f_in = open(source, "rb")  # noqa: SIM115 (closed below; opened here so that a missing source is named as such)
    with f_in, _local_errors("write", str(target)):
        _local_replace(target, lambda f_out: shutil.copyfileobj(f_in, f_out, 1 << 20))


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
def _local_errors(action: str, path: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        advice = _advice(action, e.errno)
        raise StorageError(f"cannot {action} {path!r}: {e.strerror or e} ({e.errno}); {advice}") from e


def _advice(action: str, number: int | None) -> str:
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "free space or choose another --out"
    if number in (errno.EACCES, errno.EROFS):
        return "check the permissions or choose another folder"
    if number in (errno.EPERM, errno.ENOTSUP) and action == "write":
        return "choose another --out, on a file system with hard links"
    return "choose another --out" if action == "write" else "check the path"


# ---- S3


def _bucket_key(url: str) -> tuple[str, str]:
    if not url.startswith(_S3) or "\0" in url:
        raise StorageError(f"{url!r} is neither an absolute path nor an s3:// URL; give one of them")
    bucket, _, key = url[len(_S3) :].partition("/")
    if not bucket:
        raise StorageError(f"{url!r} names no bucket; write s3://BUCKET/FOLDER")
    return bucket, key


_clients: dict[tuple[str | None, ...], Any] = {}
_clients_lock = threading.Lock()


def _forget_clients() -> None:
    """A forked child must not share sockets, nor a lock that some thread of its parent held."""
    global _clients_lock
    _clients.clear()
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def _client() -> Any:
    """One S3 client for this process and environment; it may be used by many threads."""
    names = "AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION"
    environment = tuple(os.environ.get(name) for name in [*names.split(), "AWS_DEFAULT_REGION", "AWS_PROFILE"])
    with _clients_lock:
        if environment not in _clients:
            import boto3.session
            from botocore.config import Config

            config = Config(
                connect_timeout=_CONNECT_TIMEOUT_S,
                read_timeout=_READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                max_pool_connections=_MAX_CONNECTIONS,
            )
            # boto3's shared default session is not safe across threads; a session of our own is.
            _clients[environment] = boto3.session.Session().client("s3", config=config)
        return _clients[environment]


def _s3(action: str, url: str, request: Callable[[Any], T]) -> T:
    """request(client), repeated while the server is busy; every failure becomes a StorageError about url."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    for delay_s in (*_BUSY_DELAYS_S, None):
        try:
            return request(_client())
        except (ClientError, BotoCoreError, Boto3Error) as e:
            if delay_s is None or not _is_passing(e):
                raise StorageError(f"cannot {action} {url!r}: {_reason(e, url)}") from e
        time.sleep(delay_s * random.uniform(0.5, 1.0))  # jitter, so that a cluster does not come back in step
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_passing(e: Exception) -> bool:
    """Whether a living server may answer the same request differently in a moment."""
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError

    # The latter two: botocore itself repeats no request whose answer broke off while its body was read.
    return _code(e) in _BUSY_CODES or isinstance(e, IncompleteReadError | ResponseStreamingError)


def _code(e: Exception) -> str:
    """The server's error code, such as NoSuchKey or 404; '' where no server answered."""
    cause = e.__cause__ or e.__context__ if not hasattr(e, "response") else e  # boto3 wraps the error of an upload
    response = getattr(cause, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _reason(e: Exception, url: str) -> str:
    """Why the request failed, and what to do."""
    from botocore import exceptions as boto

    bucket, _ = _bucket_key(url)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
    code = _code(e)
    if code == "NoSuchBucket":
        return f"bucket {bucket!r} does not exist at {endpoint}; create it or check the URL"
    if code in ("NoSuchKey", "404"):
        return f"bucket {bucket!r} has no such key at {endpoint}; check the URL"
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return f"{endpoint} refuses access ({code}); check AWS_ACCESS_KEY_ID and the bucket's policy"
    if code in ("InvalidRange", "416"):
        return f"the object is shorter than expected ({code}); it was replaced since it was indexed, write it again"
    if isinstance(e, boto.NoCredentialsError | boto.PartialCredentialsError):
        return f"there are no credentials for {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if isinstance(e, boto.EndpointConnectionError | boto.ConnectTimeoutError | boto.ReadTimeoutError):
        return f"nothing answers at {endpoint} ({type(e).__name__}); check AWS_ENDPOINT_URL and the network"
    return f"{endpoint} answers {code or type(e).__name__} ({e}); check AWS_ENDPOINT_URL and try again"
