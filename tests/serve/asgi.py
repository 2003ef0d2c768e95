"""A stand-in for the server in front of an ASGI application: sends a request's messages, keeps what comes back."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from raycap.serving.door import App

Headers = Sequence[tuple[bytes, bytes]]


@dataclass
class Answer:
    """status 0: nothing was answered. taken: pieces of the body that the application asked for."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    closed: bool = False
    taken: int = 0

    @property
    def json(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads(self.body)
        return content

    @property
    def error_kind(self) -> str:
        assert set(self.json) == {"error_kind", "error"}
        kind: str = self.json["error_kind"]
        return kind


async def call(
    app: App,
    method: str = "POST",
    path: str = "/v1/caption",
    *,
    body: Iterable[bytes | float] = (b"",),
    headers: Headers = (),
    query: bytes = b"",
    leaves: bool = False,
) -> Answer:
    """The answer to one request. body: its pieces; a float waits so many seconds. leaves: goes before the body ends."""
    answer = Answer()
    pieces = list(body)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        answer.taken += 1
        while pieces and isinstance(pieces[0], float):
            await asyncio.sleep(pieces.pop(0))  # type: ignore[arg-type]
        if pieces:
            piece = pieces.pop(0)
            return {"type": "http.request", "body": piece, "more_body": bool(pieces) or leaves}
        if not leaves:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": query,
        "headers": [(name.lower(), value) for name, value in headers],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2),
    }
    await app(scope, receive, send)
    for message in sent:
        if message["type"] == "http.response.start":
            assert answer.status == 0, "the application answered twice"
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode() for name, value in message["headers"]}
            assert len(answer.headers) == len(list(message["headers"])), "a header came twice"
        else:
            answer.body += message.get("body", b"")
            answer.closed = not message.get("more_body", False)
    assert answer.status == 0 or answer.closed
    return answer
