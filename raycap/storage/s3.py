"""S3: the client of this process, requests repeated while a server is busy, listings by the page, and error sentences.

S3 goes through boto3, imported on first use: its clients serve many threads, own no event loop that a forked worker
would inherit dead, and one `put_object` is conditional for any body up to S3's limit of 5 GB.
"""

import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from raycap.errors import StorageError, StorageOutage
from raycap.storage.entry import ARCHIVED, FORBIDDEN, GONE, REPLACED, Entry

T = TypeVar("T")

_SCHEME = "s3://"
ANONYMOUS, REQUESTER_PAYS = "RAYCAP_S3_ANONYMOUS", "RAYCAP_S3_REQUESTER_PAYS"  # set to 1: without credentials; we pay

# Three attempts at 2.5 s with up to 3 s of backoff: an endpoint that nothing answers is reported after about 10 s.
_CONNECT_TIMEOUT_S = 2.5
_READ_TIMEOUT_S = 20.0
_ATTEMPTS = 3
_MAX_CONNECTIONS = 32
# A server that answers "busy", or has answered before, is worth more patience than one that never did: 23 to 29 s.
_BUSY_DELAYS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
_BUSY_CODES = frozenset(
    {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "OperationAborted", "RequestLimitExceeded"}
    | {"Throttling", "ThrottlingException", "ConditionalRequestConflict", "409", "500", "502", "503", "504"}
)
# What a refused read says of the object itself.
CHANGED_CODES = {
    **dict.fromkeys(("NoSuchKey", "404"), GONE),
    **dict.fromkeys(("AccessDenied", "403"), FORBIDDEN),
    "InvalidObjectState": ARCHIVED,
    **dict.fromkeys(("PreconditionFailed", "412"), REPLACED),
}


def bucket_key(url: str) -> tuple[str, str]:
    """Bucket and key of an s3:// URL, the key verbatim. Raises StorageError for any other URL."""
    if not url.startswith(_SCHEME) or "\0" in url:
        raise StorageError(f"{url!r} is neither an absolute path nor an s3:// URL; give one of them")
    bucket, _, key = url[len(_SCHEME) :].partition("/")
    if not bucket:
        raise StorageError(f"{url!r} names no bucket; write s3://BUCKET/FOLDER")
    return bucket, key


def bucket_folder(root: str) -> tuple[str, str]:
    """Bucket, and what the keys below root begin with."""
    bucket, prefix = bucket_key(root)
    return bucket, f"{prefix}/" if prefix and not prefix.endswith("/") else prefix


def iter_entries(root: str) -> Iterator[Entry]:
    """The files below root, in the server's order; one page of them in memory, and each page with its own retries."""
    bucket, prefix = bucket_folder(root)
    request = {"Bucket": bucket, "Prefix": prefix}
    while True:
        page = call("list", root, lambda client: client.list_objects_v2(**request))
        for item in page.get("Contents", ()):
            # The empty name is the object that consoles create to show a "folder": it is the root itself, not below it.
            if name := item["Key"][len(prefix) :]:
                yield Entry(name, item["Size"], item["ETag"].strip('"'))
        if not page.get("IsTruncated"):
            return
        if page["NextContinuationToken"] == request.get("ContinuationToken"):
            raise StorageError(
                f"cannot list {root!r}: the server answers with the same page again after {page['KeyCount']} keys; "
                f"check AWS_ENDPOINT_URL and try again"
            )
        request["ContinuationToken"] = page["NextContinuationToken"]


Environment = tuple[str | None, ...]
_clients: dict[Environment, Any] = {}
_answered: set[Environment] = set()  # where a request of this process has succeeded
# The driver of a worker of Ray has had answers before it asked for the worker.
_IN_WORKER = sys.argv[0].endswith("default_worker.py")
_clients_lock = threading.Lock()


def _forget_clients() -> None:
    """A forked child must not share sockets, nor a lock that some thread of its parent held."""
    global _clients_lock
    _clients.clear()
    _clients_lock = threading.Lock()


os.register_at_fork(after_in_child=_forget_clients)


def _environment() -> Environment:
    names = "AWS_ENDPOINT_URL AWS_ENDPOINT_URL_S3 AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN AWS_REGION"
    names += f" AWS_DEFAULT_REGION AWS_PROFILE {ANONYMOUS} {REQUESTER_PAYS}"
    return tuple(os.environ.get(name) for name in names.split())


def _client() -> Any:
    """One S3 client for this process and environment; it may be used by many threads. Raises StorageError."""
    environment = _environment()
    with _clients_lock:
        if environment not in _clients:
            import boto3.session
            from botocore import UNSIGNED
            from botocore.config import Config

            endpoint = _endpoint()
            if "://" not in endpoint and endpoint != "AWS":
                raise StorageError(
                    f"AWS_ENDPOINT_URL is {endpoint!r}, which is no URL; write http://{endpoint} or https://{endpoint}"
                )
            config = Config(
                connect_timeout=_CONNECT_TIMEOUT_S,
                read_timeout=_READ_TIMEOUT_S,
                retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
                max_pool_connections=_MAX_CONNECTIONS,
                signature_version=UNSIGNED if os.environ.get(ANONYMOUS) else None,
            )
            # boto3's shared default session is not safe across threads; a session of our own is.
            client = boto3.session.Session().client("s3", config=config)
            if os.environ.get(REQUESTER_PAYS):
                client.meta.events.register("provide-client-params.s3", _pay)
            _clients[environment] = client
        return _clients[environment]


def _pay(params: dict[str, Any], model: Any, **_: Any) -> None:
    """Says, of every request that may, that its sender pays."""
    if "RequestPayer" in model.input_shape.members:
        params.setdefault("RequestPayer", "requester")


def _endpoint() -> str:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"


def call(action: str, url: str, request: Callable[[Any], T]) -> T:
    """request(client), repeated while a server that lives is busy or does not answer; every failure becomes a StorageError about
    url, a StorageOutage if that lasts.
    """
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    for delay_s in (*_BUSY_DELAYS_S, None):
        try:
            answer = request(_client())
        except (ClientError, BotoCoreError, Boto3Error) as e:
            is_passing = _is_passing(e)
            if delay_s is None or not is_passing:
                kind = StorageOutage if is_passing else StorageError
                raise kind(f"cannot {action} {url!r}: {_reason(e, url)}") from e
        else:
            _answered.add(_environment())
            return answer
        time.sleep(delay_s * random.uniform(0.5, 1.0))  # jitter, so that a cluster does not come back in step
    raise AssertionError("unreachable: the last attempt returns or raises")


def _is_passing(e: Exception) -> bool:
    """Whether a living server may answer the same request differently in a moment."""

    from botocore import exceptions as boto

    # The first two: botocore itself repeats no request whose answer broke off while its body was read.
    if error_code(e) in _BUSY_CODES or isinstance(e, boto.IncompleteReadError | boto.ResponseStreamingError):
        return True
    return isinstance(e, boto.HTTPClientError | boto.ConnectionError) and (
        _IN_WORKER or _environment() in _answered
    )  # refused, reset, closed, timed out


def error_code(e: Exception) -> str:
    """The server's error code, such as NoSuchKey or 404; '' where no server answered."""
    cause = e.__cause__ or e.__context__ if not hasattr(e, "response") else e  # boto3 wraps the error of an upload
    response = getattr(cause, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _reason(e: Exception, url: str) -> str:
    """Why the request failed, and what to do."""
    from botocore import exceptions as boto

    bucket, _ = bucket_key(url)
    endpoint = _endpoint()
    code = error_code(e)
    if code == "NoSuchBucket":
        return f"bucket {bucket!r} does not exist at {endpoint}; create it or check the URL"
    if code in ("NoSuchKey", "404"):
        return f"bucket {bucket!r} has no such key at {endpoint}; check the URL"
    if code in ("AccessDenied", "403", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken"):
        return f"{endpoint} refuses access ({code}); check AWS_ACCESS_KEY_ID and the bucket's policy"
    if code in ("InvalidRange", "416"):
        return f"the object is shorter than expected ({code}); it was replaced since it was indexed, write it again"
    if isinstance(e, boto.NoCredentialsError | boto.PartialCredentialsError):
        where = f" on the Ray node {socket.gethostname()!r}, and start Ray there again" if _IN_WORKER else ""
        return (
            f"there are no credentials for {endpoint}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY{where}, or {ANONYMOUS}=1 for a "
            f"public bucket"
        )
    if isinstance(e, boto.HTTPClientError | boto.ConnectionError):
        if _is_passing(e):
            return f"{endpoint} has stopped answering ({type(e).__name__}); run the same command again when it does"
        return f"nothing answers at {endpoint} ({type(e).__name__}); check AWS_ENDPOINT_URL and the network"
    return f"{endpoint} answers {code or type(e).__name__} ({e}); check AWS_ENDPOINT_URL and try again"
