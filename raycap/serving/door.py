"""What stands between a socket and the endpoint: a bearer token, limits while a body arrives, one shape for every error.

Pure ASGI, no Ray and no web framework. The same Door stands in Ray Serve's proxy, which by itself takes bodies of any
size at any speed into its memory, and in the replica, for clusters whose proxies were started without it. The way of a
request: token, declared size, room; the body, counted and timed; room again; the application, until the deadline.
"""

import asyncio
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from raycap.errors import ErrorKind, RequestErrorKind

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

EXCHANGE = "raycap.exchange"  # where the scope holds the Exchange
OUR_PATHS = frozenset({"/v1/caption", "/v1/models", "/healthz", "/readyz", "/openapi.json"})
OPEN_PATHS = frozenset({"/healthz", "/readyz"})  # need no token and no room: an orchestrator asks them under load
RETRY_AFTER_S = 1
BODIES_ARRIVING = 8  # all unfinished and waiting bodies together hold at most so many times the largest one
SMALL_BYTES = 2**20  # bodies declared to be no larger have room of their own, whoever uploads what
SMALL_ROOM = 64 * 2**20
STALL_S = 1.0  # a body of which nothing came for so long loses its room to one that comes
LINGER_S = 5.0  # how long a refused client may finish sending; a socket closed at once would lose it the answer
CLIENT_GONE = 499  # nginx's number; counted, never sent
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
# With these a client could switch off the time-outs of Serve's proxy, or tell it not to notice that the client left.
_SERVE_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")

log = logging.getLogger("ray.serve")  # Serve's logger: its lines land in the replica's own log file


@dataclass(frozen=True, kw_only=True)
class Limits:
    """max_queue: requests at work at once; 0 sets no limit. request_timeout_s: upload and work together."""

    max_body_bytes: int
    request_timeout_s: float
    max_queue: int = 0


@dataclass(kw_only=True)
class Exchange:
    """One request and what became of it, for the log and the metrics."""

    request_id: str
    method: str
    path: str
    begun: float
    deadline: float
    num_bytes: int = 0
    status: int = 0
    error_kind: str = ""
    answered_here: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun


class Refusal(Exception):
    """A request that gets no result. Its message is one sentence for the client."""

    def __init__(
        self, status: int, kind: ErrorKind | RequestErrorKind, message: str, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(status, kind, message, headers or {})  # all, so that pickle makes it again
        self.status = status
        self.kind = kind
        self.headers = headers or {}

    def __str__(self) -> str:
        return str(self.args[2])

    @property
    def body(self) -> bytes:
        return json.dumps({"error_kind": self.kind.value, "error": str(self)}).encode()


def overloaded(message: str) -> Refusal:
    """The 429 of every place that is full."""
    return Refusal(429, RequestErrorKind.OVERLOADED, message, {"Retry-After": str(RETRY_AFTER_S)})


def too_large(max_body_bytes: int) -> Refusal:
    return Refusal(
        413,
        ErrorKind.TOO_MANY_BYTES,
        f"the request body holds more than {max_body_bytes} bytes; send a smaller image, or raise --max-body-bytes of the server",
    )


def token_digest(token: str) -> str:
    """sha256 of a bearer token, hex; "" for none. Only this leaves the process that was given the token."""
    return hashlib.sha256(token.encode()).hexdigest() if token else ""


class Door:
    """An ASGI application around another one.

    digest: token_digest of the token that requests need; "" needs none. guards: which paths need it. front: stands
    before Serve's proxy, whose own plain text errors become ours. report: told of every request that was answered
    here, and by a Door that is not in front of all others. held: told how many requests are at work.
    """

    def __init__(
        self,
        app: App,
        limits: Limits,
        *,
        digest: str = "",
        guards: Callable[[str], bool] = lambda _: True,
        front: bool = False,
        report: Callable[[Exchange], None] = lambda _: None,
        held: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._app = app
        self._limits = limits
        self._digest = digest
        self._guards = guards
        self._front = front
        self._report = report
        self._tell_held = held
        self._held = 0
        self._large = _Room(BODIES_ARRIVING * limits.max_body_bytes)
        self._small = _Room(SMALL_ROOM)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun = time.monotonic()
        scope = _without_traps(scope) if self._front else scope
        exchange = Exchange(
            request_id=_request_id(scope),
            method=scope["method"],
            path=scope["path"],
            begun=begun,
            deadline=begun + self._limits.request_timeout_s,
        )
        scope[EXCHANGE] = exchange
        reply = _Reply(send, exchange, self._front)
        body, arrival = _Body(receive), _Arrival()
        try:
            await self._serve(scope, body, reply, exchange, arrival)
        except asyncio.CancelledError:
            exchange.status = exchange.status or CLIENT_GONE
            raise
        except _ClientGone:
            exchange.status, exchange.answered_here = CLIENT_GONE, True
        except Refusal as refusal:
            arrival.give_back()  # before the client is heard out
            await reply.refuse(refusal, body if self._front else None)
        except Exception:
            log.exception(json.dumps({"request_id": exchange.request_id, "error": "the application failed"}))
            if not reply.started:
                await reply.refuse(_internal(exchange), body if self._front else None)
        finally:
            arrival.give_back()
            if exchange.answered_here or not self._front:
                self._report(exchange)

    async def _serve(
        self, scope: Scope, body: "_Body", reply: "_Reply", exchange: Exchange, arrival: "_Arrival"
    ) -> None:
        open_to_all = exchange.path in OPEN_PATHS
        if self._digest and not open_to_all and self._guards(exchange.path):
            _check_token(scope, self._digest)
        declared = _declared_size(scope, self._limits.max_body_bytes)
        if not open_to_all:
            self._check_room()
        try:
            async with asyncio.timeout(exchange.deadline - time.monotonic()):
                await self._read(body, exchange, arrival, declared)
        except TimeoutError:
            raise Refusal(
                408,
                RequestErrorKind.TIMEOUT,
                f"the request body did not arrive within {self._limits.request_timeout_s:g} s; send it faster, or raise "
                f"--request-timeout-s of the server",
            ) from None
        if not open_to_all:
            self._check_room()
            self._hold(1)
            reply.before_last = lambda: self._hold(-1)  # a client that has its answer may ask again at once
        try:
            async with asyncio.timeout(exchange.deadline - time.monotonic()):
                await self._app(scope, body.replay, reply)
        except TimeoutError:
            if not reply.started:
                raise Refusal(
                    504,
                    RequestErrorKind.TIMEOUT,
                    f"no answer within {self._limits.request_timeout_s:g} s; try again later, or raise --request-timeout-s "
                    f"of the server",
                ) from None
        finally:
            reply.finish()
        if body.client_gone and not reply.started:
            raise _ClientGone
        if not reply.started:  # Serve's proxy says nothing when the replica died under the request
            raise Refusal(
                503, RequestErrorKind.UNAVAILABLE, "the server lost its process for this request; try again", _RETRY
            )

    def _check_room(self) -> None:
        if self._limits.max_queue and self._held >= self._limits.max_queue:
            raise overloaded(f"{self._held} requests are at work, as many as --max-queue allows; try again later")

    def _hold(self, change: int) -> None:
        self._held += change
        self._tell_held(self._held)

    async def _read(self, body: "_Body", exchange: Exchange, arrival: "_Arrival", declared: int | None) -> None:
        """Reads the whole body. Room is taken for what is declared before a byte is read, and else as the bytes come.

        Raises Refusal where there is no room, at the first byte too many, and for a body that stalled while others came.
        """
        room = self._small if declared is not None and declared <= SMALL_BYTES else self._large
        room.take(arrival, declared or 0)
        while not body.complete:
            try:
                size = await body.read_more()
            except asyncio.CancelledError:
                if not arrival.evicted or arrival.task is None:
                    raise
                arrival.task.uncancel()
                raise Refusal(
                    408,
                    RequestErrorKind.TIMEOUT,
                    f"nothing of the request body came for {STALL_S:g} s and others needed its room; send it again",
                ) from None
            exchange.num_bytes += size
            if exchange.num_bytes > self._limits.max_body_bytes:
                raise too_large(self._limits.max_body_bytes)
            room.take(arrival, max(0, exchange.num_bytes - arrival.num_bytes))
        arrival.task = None


@dataclass(eq=False)
class _Arrival:
    """A body and the bytes that room is taken for. task: that reads it, until it is whole. last: when bytes came."""

    room: "_Room | None" = None
    num_bytes: int = 0
    last: float = 0.0
    evicted: bool = False
    task: asyncio.Task[Any] | None = None

    def give_back(self) -> None:
        if self.room is not None:
            self.room.give_back(self)


class _Room:
    """Bytes that bodies may hold together."""

    def __init__(self, num_bytes: int) -> None:
        self._size, self._used = num_bytes, 0
        self._arrivals: set[_Arrival] = set()

    def take(self, arrival: _Arrival, num_bytes: int) -> None:
        """Raises Refusal if there is not so much, not even without the bodies that have stalled."""
        arrival.room, arrival.last, arrival.task = self, time.monotonic(), asyncio.current_task()
        if self._used + num_bytes > self._size:
            stalled = [a for a in self._arrivals if a.task and arrival.last - a.last > STALL_S]
            for other in sorted(stalled, key=lambda a: a.last):
                if self._used + num_bytes <= self._size:
                    break
                other.evicted = True
                if other.task is not None:
                    other.task.cancel()
                self.give_back(other)
        if self._used + num_bytes > self._size:
            raise overloaded(f"bodies of more than {self._size} bytes are arriving at once; try again later")
        self._used += num_bytes
        arrival.num_bytes += num_bytes
        self._arrivals.add(arrival)

    def give_back(self, arrival: _Arrival) -> None:
        self._used -= arrival.num_bytes
        arrival.num_bytes = 0
        self._arrivals.discard(arrival)


_RETRY = {"Retry-After": str(RETRY_AFTER_S)}


class _ClientGone(Exception):
    """The client closed the connection before its body was complete."""


class _Body:
    """A request body: read in pieces, then replayed as one message."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._chunks: list[bytes] = []
        self._replayed = False
        self.complete = False
        self.client_gone = False

    async def read_more(self, *, keep: bool = True) -> int:
        """Bytes of the next piece. Raises _ClientGone."""
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _ClientGone
        chunk: bytes = message.get("body", b"")
        if keep and chunk:
            self._chunks.append(chunk)
        self.complete = not message.get("more_body", False)
        return len(chunk)

    async def replay(self) -> Message:
        if self._replayed:
            message = await self._receive()
            self.client_gone = message["type"] == "http.disconnect"
            return message
        self._replayed = True
        body = b"".join(self._chunks)
        self._chunks.clear()
        return {"type": "http.request", "body": body, "more_body": False}

    async def discard(self) -> None:
        """Lets the client finish what it is sending, for a while."""
        self._chunks.clear()
        with suppress(TimeoutError, _ClientGone):
            async with asyncio.timeout(LINGER_S):
                while not self.complete:
                    await self.read_more(keep=False)


class _Reply:
    """The `send` of one request: notes the status, and turns what is not our JSON into it."""

    def __init__(self, send: Send, exchange: Exchange, front: bool) -> None:
        self._send = send
        self._exchange = exchange
        self._front = front
        self._replaced = False
        self.started = False
        self.before_last: Callable[[], None] | None = None  # called once, before the last piece leaves

    def finish(self) -> None:
        if self.before_last is not None:
            before_last, self.before_last = self.before_last, None
            before_last()

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.finish()
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            self.started = True
            if self._front and _is_serves_own(message):
                self._replaced = True
                await self._answer(_instead(message, self._exchange), more_body=False)
                return
            self._exchange.status = message["status"]
            if self._front:
                message = dict(message) | {"headers": self._headers(message.get("headers", ()))}
        await self._send(message)

    async def refuse(self, refusal: Refusal, body: _Body | None) -> None:
        """Answers with the refusal. body: what the client may still be sending; it is heard out, then cut off."""
        if self.started:
            return
        self.started = True
        unread = body is not None and not body.complete
        await self._answer(refusal, more_body=unread)
        if body is not None and unread:
            await body.discard()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _answer(self, refusal: Refusal, *, more_body: bool) -> None:
        exchange = self._exchange
        exchange.status, exchange.error_kind, exchange.answered_here = refusal.status, refusal.kind.value, True
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(refusal.body)).encode())]
        headers += [(name.lower().encode(), value.encode()) for name, value in refusal.headers.items()]
        if more_body:
            headers.append((b"connection", b"close"))
        await self._send(
            {
                "type": "http.response.start",
                "status": refusal.status,
                "headers": self._headers(headers) if self._front else headers,
            }
        )
        await self._send({"type": "http.response.body", "body": refusal.body, "more_body": more_body})

    def _headers(self, headers: Any) -> list[tuple[bytes, bytes]]:
        kept = [(bytes(name), bytes(value)) for name, value in headers if name.lower() != b"x-request-id"]
        return [*kept, (b"x-request-id", self._exchange.request_id.encode())]


def _without_traps(scope: Scope) -> Scope:
    """The scope without headers that Serve's proxy would obey or fail on, and with a request id that is safe to log."""
    headers = []
    for name, value in scope["headers"]:
        if name in _SERVE_HEADERS or name == b"x-request-id" or not (_is_text(name) and _is_text(value)):
            continue
        headers.append((name, value))
    given = [value for name, value in scope["headers"] if name == b"x-request-id"]
    request_id = given[0] if given and _REQUEST_ID.fullmatch(given[0]) else secrets.token_hex(16).encode()
    return {**scope, "headers": [*headers, (b"x-request-id", request_id)]}


def _is_text(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _request_id(scope: Scope) -> str:
    return next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-id"), "")[:64]


def _check_token(scope: Scope, digest: str) -> None:
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")  # of two, none is taken for the right one
    shown = hashlib.sha256(token.strip()).hexdigest()
    if not (hmac.compare_digest(shown, digest) and scheme.lower() == b"bearer"):
        raise Refusal(
            401,
            RequestErrorKind.UNAUTHORIZED,
            "the bearer token is missing, wrong or there twice; send one header 'Authorization: Bearer TOKEN'",
            {"WWW-Authenticate": "Bearer"},
        )


def _declared_size(scope: Scope, max_body_bytes: int) -> int | None:
    """The bytes that the body is declared to have; None where that is not said. Raises Refusal for too many."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if not declared.isdigit():
        return None
    if int(declared[:20]) > max_body_bytes:
        raise too_large(max_body_bytes)
    return int(declared)


def _is_serves_own(message: Message) -> bool:
    """Whether Serve's proxy wrote this error itself: plain text without a length, which no application server sends."""
    headers = {bytes(name).lower(): bytes(value) for name, value in message.get("headers", ())}
    plain = headers.get(b"content-type", b"").startswith(b"text/plain")
    return bool(message["status"] >= 400 and plain and b"content-length" not in headers)


def _instead(message: Message, exchange: Exchange) -> Refusal:
    """Our words for an error of Serve's proxy."""
    status = message["status"]
    if status == 404 and exchange.path in OUR_PATHS:  # Serve listens before the application is deployed
        return Refusal(
            503,
            RequestErrorKind.UNAVAILABLE,
            "no endpoint is deployed here: it is starting, or was stopped; try again later",
            _RETRY,
        )
    if status == 404:
        return Refusal(
            404, RequestErrorKind.NOT_FOUND, f"no application is served at {exchange.path!r}; check the path"
        )
    if status == 408:
        return Refusal(504, RequestErrorKind.TIMEOUT, "no answer within the time-out of Ray Serve; try again later")
    if status == 429:
        return overloaded("more requests are waiting than the server holds; try again later")
    if status == 503:
        return Refusal(
            503, RequestErrorKind.UNAVAILABLE, "the server is not ready for requests; try again later", _RETRY
        )
    return _internal(exchange)


def _internal(exchange: Exchange) -> Refusal:
    return Refusal(
        500,
        RequestErrorKind.INTERNAL,
        f"the server failed on request {exchange.request_id!r}; its log says why under this id",
    )


FRONT_VARIABLE = "RAYCAP_SERVE_FRONT"
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"


def front_environment(limits: Limits, digest: str) -> dict[str, str]:
    """Environment variables that make Serve's proxies stand behind a Door."""
    front = {
        "max_body_bytes": limits.max_body_bytes,
        "request_timeout_s": limits.request_timeout_s,
        "max_queue": limits.max_queue,
    }
    return {CALLBACK_VARIABLE: "raycap.serving.door:front", FRONT_VARIABLE: json.dumps(front | {"digest": digest})}


def front() -> list[Any]:
    """What Serve's proxy calls when it starts, where $RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH names it.

    Limits come from $RAYCAP_SERVE_FRONT, JSON with max_body_bytes, request_timeout_s, max_queue and digest; what it
    leaves out is ServeConfig's default, without a limit of requests, and the digest of $RAYCAP_TOKEN.
    """
    from starlette.middleware import Middleware

    from raycap.config import ServeConfig
    from raycap.serving.observe import Metrics

    given = json.loads(os.environ.get(FRONT_VARIABLE) or "{}")
    limits = Limits(
        max_body_bytes=given.get("max_body_bytes", ServeConfig.max_body_bytes),
        request_timeout_s=given.get("request_timeout_s", ServeConfig.request_timeout_s),
        max_queue=given.get("max_queue", 0),
    )
    digest = given.get("digest") or token_digest(os.environ.get("RAYCAP_TOKEN", ""))
    # Other applications of the same Serve share the limits, not the token.
    return [
        Middleware(
            Door,
            limits,
            digest=digest,
            guards=lambda path: path.startswith("/v1/") or path == "/-/routes",
            front=True,
            report=Metrics().request,
        )
    ]
