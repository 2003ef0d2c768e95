"""The Door: tokens, limits while a body arrives, time-outs, one shape for every error; no Ray, no socket."""

import asyncio
import logging
import pickle
import time
from typing import Any

import pytest
from asgi import Answer, call

import raycap.serving.door as door_module
from raycap.config import ServeConfig
from raycap.image import MAX_BYTES
from raycap.serving.door import (
    App,
    Door,
    Exchange,
    Limits,
    Receive,
    Scope,
    Send,
    front,
    front_environment,
    token_digest,
)

LIMITS = Limits(max_body_bytes=1000, request_timeout_s=30)
TOKEN = "s3cret"


class Echo:
    """Answers with the body it got; keeps the scopes it was called with. gate: what it waits for first."""

    def __init__(self, gate: asyncio.Event | None = None) -> None:
        self.gate = gate
        self.scopes: list[Scope] = []
        self.cancelled = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scopes.append(scope)
        message = await receive()
        assert not message["more_body"]
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
        await send({"type": "http.response.body", "body": message["body"]})


def ask(door: App, **request: Any) -> Answer:
    return asyncio.run(call(door, **request))


def test_a_body_within_the_limit_reaches_the_application_whole() -> None:
    answer = ask(Door(Echo(), LIMITS), body=[b"a" * 600, b"", b"b" * 400])
    assert (answer.status, answer.body) == (200, b"a" * 600 + b"b" * 400)


def test_a_declared_size_above_the_limit_is_refused_before_a_byte_is_taken() -> None:
    echo = Echo()
    answer = ask(Door(echo, LIMITS), body=[b"x"], headers=[(b"content-length", b"1001")])
    assert (answer.status, answer.error_kind, answer.taken) == (413, "too_many_bytes", 0)
    assert not echo.scopes


@pytest.mark.parametrize("declared", [(), ((b"content-length", b"10"),), ((b"content-length", b"x"),)])
def test_a_body_that_turns_out_too_long_is_refused_at_the_piece_that_crosses_the_limit(declared: Any) -> None:
    echo = Echo()
    answer = ask(Door(echo, LIMITS), body=[b"x" * 400] * 50, headers=declared)
    assert (answer.status, answer.error_kind, answer.taken) == (413, "too_many_bytes", 3)
    assert not echo.scopes


def test_in_front_of_serve_a_refused_client_may_finish_sending_and_is_then_cut_off() -> None:
    answer = ask(Door(Echo(), LIMITS, front=True), body=[b"x" * 400] * 50)
    assert (answer.status, answer.headers["connection"], answer.taken) == (413, "close", 50)


def test_a_body_that_arrives_too_slowly_ends_with_408_at_the_deadline() -> None:
    echo = Echo()
    limits = Limits(max_body_bytes=1000, request_timeout_s=0.2)
    begun = time.monotonic()
    answer = ask(Door(echo, limits), body=[b"x", 0.1, b"x", 0.1, b"x", 60.0, b"x"])
    assert 0.1 < time.monotonic() - begun < 5
    assert (answer.status, answer.error_kind) == (408, "timeout")
    assert not echo.scopes


def test_a_client_that_leaves_in_the_middle_of_its_body_gets_nothing_and_is_counted() -> None:
    seen: list[Exchange] = []
    answer = ask(Door(Echo(), LIMITS, report=seen.append), body=[b"x" * 10], leaves=True)
    assert answer.status == 0
    assert [(e.status, e.num_bytes) for e in seen] == [(499, 10)]


def test_more_requests_than_may_be_held_get_429_at_once_and_room_comes_back() -> None:
    async def scenario() -> None:
        held: list[int] = []
        gate = asyncio.Event()
        door = Door(Echo(gate), Limits(max_body_bytes=1000, request_timeout_s=30, max_queue=2), held=held.append)
        first = [asyncio.create_task(call(door)) for _ in range(2)]
        await asyncio.sleep(0)
        refused = await asyncio.wait_for(call(door, body=[b"x", 60.0, b"x"]), 1)
        assert (refused.status, refused.error_kind, refused.headers["retry-after"]) == (429, "overloaded", "1")
        assert refused.taken == 0
        health = asyncio.create_task(call(door, method="GET", path="/healthz"))
        await asyncio.sleep(0)
        gate.set()
        assert [answer.status for answer in await asyncio.gather(*first, health)] == [200, 200, 200]
        assert (await call(door)).status == 200
        assert (max(held), held[-1]) == (2, 0)

    asyncio.run(scenario())


def test_bodies_that_arrive_together_hold_a_bounded_number_of_bytes() -> None:
    async def scenario() -> None:
        door = Door(Echo(), LIMITS)
        slow = [asyncio.create_task(call(door, body=[b"x" * 999, 0.3, b"x"])) for _ in range(8)]
        await asyncio.sleep(0.05)
        refused = await call(door, body=[b"x" * 500])
        assert (refused.status, refused.error_kind) == (429, "overloaded")
        assert [answer.status for answer in await asyncio.gather(*slow)] == [200] * 8
        assert (await call(door, body=[b"x" * 500])).status == 200

    asyncio.run(scenario())


def test_of_large_bodies_at_once_those_that_fit_are_served_and_the_others_refused_at_once() -> None:
    async def scenario(length: bool) -> list[int]:
        door = Door(Echo(), Limits(max_body_bytes=2 * 2**20, request_timeout_s=30), front=True)
        size = 19 * 2**20 // 10  # as 19 MB are to 20 MB
        headers = [(b"content-length", str(size).encode())] if length else []
        pieces: list[bytes | float] = [p for _ in range(19) for p in (b"x" * (size // 19), 0.002)]
        pieces[-1] = b"x" * (size - 19 * (size // 19))
        answers = await asyncio.gather(*(call(door, body=list(pieces), headers=headers) for _ in range(12)))
        assert (await call(door, body=[b"x"])).status == 200
        return sorted(answer.status for answer in answers)

    assert asyncio.run(scenario(True)) == [200] * 8 + [429] * 4
    assert asyncio.run(scenario(False)) == [200] * 8 + [429] * 4


def test_clients_that_stop_half_way_shut_out_neither_small_requests_nor_for_long_large_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door_module, "STALL_S", 0.1)

    async def scenario() -> None:
        size = 2 * 2**20
        door = Door(Echo(), Limits(max_body_bytes=size, request_timeout_s=30), front=True)
        length = [(b"content-length", str(size).encode())]
        stalled = [asyncio.create_task(call(door, body=[b"x" * size, 20.0, b""], headers=length)) for _ in range(8)]
        await asyncio.sleep(0.02)
        small = await call(door, body=[b"x" * 1000], headers=[(b"content-length", b"1000")])
        assert small.status == 200
        large = [b"x" * size]
        assert (await call(door, body=list(large), headers=length)).status == 429
        await asyncio.sleep(0.15)
        assert (await call(door, body=list(large), headers=length)).status == 200
        for task in stalled:
            task.cancel()
        await asyncio.gather(*stalled, return_exceptions=True)
        assert (door._large._used, door._small._used) == (0, 0)

    asyncio.run(scenario())


def test_as_many_clients_as_the_queue_is_long_get_no_refusal_however_soon_they_ask_again() -> None:
    async def scenario() -> None:
        door = Door(Echo(), Limits(max_body_bytes=1000, request_timeout_s=30, max_queue=8))
        statuses: list[int] = []

        async def client() -> None:
            done = asyncio.Event()

            async def receive() -> dict[str, Any]:
                return {"type": "http.request", "body": b"x", "more_body": False}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                elif not message.get("more_body"):
                    done.set()  # the client has its answer and asks again
                    await asyncio.sleep(0.001)  # while the server's task still waits for its socket

            running = []
            for _ in range(20):
                done.clear()
                scope = {"type": "http", "method": "POST", "path": "/v1/caption", "headers": []}
                running.append(asyncio.create_task(door(scope, receive, send)))
                await done.wait()
            await asyncio.gather(*running)

        await asyncio.gather(*(client() for _ in range(8)))
        assert statuses == [200] * 160

    asyncio.run(scenario())


def test_two_tokens_are_refused_whichever_is_right() -> None:
    right, wrong = (b"authorization", f"Bearer {TOKEN}".encode()), (b"authorization", b"Bearer x")
    door = Door(Echo(), LIMITS, digest=token_digest(TOKEN))
    assert ask(door, headers=[right]).status == 200
    for headers in ([right, wrong], [wrong, right], [right, right]):
        assert ask(door, headers=headers).status == 401


def test_an_application_that_takes_too_long_is_cancelled_and_answered_with_504() -> None:
    async def scenario() -> None:
        echo = Echo(asyncio.Event())
        answer = await call(Door(echo, Limits(max_body_bytes=9, request_timeout_s=0.05)))
        assert (answer.status, answer.error_kind, echo.cancelled) == (504, "timeout", 1)

    asyncio.run(scenario())


def test_an_application_that_fails_answers_500_with_the_id_under_which_the_log_has_the_stack(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        raise ZeroDivisionError("/etc/secret")

    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        answer = ask(Door(broken, LIMITS, front=True))
    assert (answer.status, answer.error_kind) == (500, "internal")
    assert "secret" not in answer.body.decode()
    request_id = answer.headers["x-request-id"]
    assert request_id in answer.json["error"]
    assert request_id in caplog.text
    assert "ZeroDivisionError: /etc/secret" in caplog.text


AUTHORIZATIONS = {
    "none": (None, 401),
    "another token": (b"Bearer other", 401),
    "another scheme": (b"Basic " + TOKEN.encode(), 401),
    "the token alone": (TOKEN.encode(), 401),
    "its digest": (b"Bearer " + token_digest(TOKEN).encode(), 401),
    "bytes": (b"Bearer \xff\xfe", 401),
    "the token": (b"Bearer " + TOKEN.encode(), 200),
    "the scheme in lower case": (b"bearer " + TOKEN.encode(), 200),
}


@pytest.mark.parametrize("case", AUTHORIZATIONS)
def test_with_a_token_set_only_requests_that_bear_it_pass(case: str) -> None:
    given, status = AUTHORIZATIONS[case]
    headers = [(b"authorization", given)] if given is not None else []
    echo = Echo()
    answer = ask(Door(echo, LIMITS, digest=token_digest(TOKEN)), body=[b"x", b"y"], headers=headers)
    assert answer.status == status
    if status == 401:
        assert (answer.error_kind, answer.headers["www-authenticate"], answer.taken) == ("unauthorized", "Bearer", 0)
        assert not echo.scopes


def test_the_answer_does_not_tell_a_missing_token_from_a_wrong_one() -> None:
    door = Door(Echo(), LIMITS, digest=token_digest(TOKEN))
    missing, wrong = ask(door), ask(door, headers=[(b"authorization", b"Bearer x")])
    assert missing == wrong


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_needs_no_token(path: str) -> None:
    assert ask(Door(Echo(), LIMITS, digest=token_digest(TOKEN)), method="GET", path=path).status == 200


def test_what_the_scope_holds_can_be_pickled_as_serves_proxy_does() -> None:
    echo = Echo()
    ask(Door(echo, LIMITS, front=True), body=[b"x"])
    assert pickle.loads(pickle.dumps(echo.scopes[0][door_module.EXCHANGE])).path == "/v1/caption"


def test_no_token_has_no_digest() -> None:
    assert token_digest("") == ""
    assert len(token_digest(TOKEN)) == 64


def serve_says(status: int, headers: Any, *, silent: bool = False) -> App:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        if silent:
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"Request abc timed out"})

    return app


PLAIN = [[b"content-type", b"text/plain; charset=utf-8"], (b"x-request-id", b"of-serve")]


@pytest.mark.parametrize(
    ("status", "path", "becomes", "kind"),
    [
        (404, "/v2/caption", 404, "not_found"),
        (404, "/v1/caption", 503, "unavailable"),  # Serve listens before the application is deployed
        (408, "/v1/caption", 504, "timeout"),
        (429, "/v1/caption", 429, "overloaded"),
        (503, "/v1/caption", 503, "unavailable"),
        (500, "/v1/caption", 500, "internal"),
    ],
)
def test_plain_text_errors_of_serves_proxy_become_json(status: int, path: str, becomes: int, kind: str) -> None:
    seen: list[Exchange] = []
    answer = ask(Door(serve_says(status, PLAIN), LIMITS, front=True, report=seen.append), path=path)
    assert (answer.status, answer.error_kind) == (becomes, kind)
    assert [(e.status, e.error_kind) for e in seen] == [(becomes, kind)]
    assert ("retry-after" in answer.headers) == (becomes in (429, 503))


def test_a_plain_text_error_of_another_application_stays_its_own() -> None:
    headers = [*PLAIN, (b"content-length", b"21")]
    seen: list[Exchange] = []
    answer = ask(Door(serve_says(404, headers), LIMITS, front=True, report=seen.append))
    assert (answer.status, answer.body) == (404, b"Request abc timed out")
    assert not seen  # counted where it was answered


def test_a_proxy_that_says_nothing_because_the_replica_died_is_answered_for() -> None:
    answer = ask(Door(serve_says(0, [], silent=True), LIMITS, front=True))
    assert (answer.status, answer.error_kind, answer.headers["retry-after"]) == (503, "unavailable", "1")


def test_headers_that_steer_or_break_serves_proxy_do_not_reach_it() -> None:
    echo = Echo()
    sent = [
        (b"x-request-timeout-seconds", b"-1"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-\xff", b"1"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"accept", b"*/*"),
    ]
    assert ask(Door(echo, LIMITS, front=True), headers=sent).status == 200
    assert [name for name, _ in echo.scopes[0]["headers"]] == [b"accept", b"x-request-id"]


@pytest.mark.parametrize("given", [b"", b"a" * 65, b"a b", b'"}\n{"', b"\xff"])
def test_a_request_id_that_is_not_safe_to_log_is_replaced(given: bytes) -> None:
    answer = ask(Door(Echo(), LIMITS, front=True), headers=[(b"x-request-id", given)])
    assert len(answer.headers["x-request-id"]) == 32


def test_a_request_id_of_the_client_comes_back_and_goes_on() -> None:
    echo = Echo()
    answer = ask(Door(echo, LIMITS, front=True), headers=[(b"x-request-id", b"my.id-1")])
    assert answer.headers["x-request-id"] == "my.id-1"
    assert (b"x-request-id", b"my.id-1") in echo.scopes[0]["headers"]


def test_the_environment_of_a_proxy_makes_it_stand_behind_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(max_body_bytes=7, request_timeout_s=3, max_queue=2)
    environment = front_environment(limits, token_digest(TOKEN))
    assert TOKEN not in str(environment)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (middleware,) = front()
    door = middleware.cls(Echo(), *middleware.args, **middleware.kwargs | {"report": lambda _: None})
    bearer = [(b"authorization", f"Bearer {TOKEN}".encode())]
    assert ask(door, body=[b"12345678"], headers=bearer).status == 413
    assert ask(door, body=[b"1234567"], headers=bearer).status == 200
    assert ask(door, body=[b"1"]).status == 401
    assert ask(door, body=[b"1"], path="/of-another-application").status == 200


def test_a_proxy_started_without_limits_has_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAYCAP_SERVE_FRONT", raising=False)
    monkeypatch.setenv("RAYCAP_TOKEN", TOKEN)
    (middleware,) = front()
    assert middleware.args[0] == Limits(max_body_bytes=20 * 2**20, request_timeout_s=30.0)
    assert middleware.kwargs["digest"] == token_digest(TOKEN)


def test_the_largest_body_that_can_be_allowed_is_the_largest_image_that_is_read() -> None:
    assert ServeConfig(max_body_bytes=MAX_BYTES).max_body_bytes == MAX_BYTES
    with pytest.raises(ValueError, match=f"at most {MAX_BYTES}, got {MAX_BYTES + 1}"):
        ServeConfig(max_body_bytes=MAX_BYTES + 1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 0},
        {"port": 65536},
        {"max_queue": 0},
        {"num_gpus": 1.5},
        {"num_gpus": 0.0},
        {"request_timeout_s": 0.0},
        {"batch_wait_s": -1.0},
        {"num_beams": -1},
    ],
)
def test_a_setting_out_of_bounds_is_refused_by_its_flag(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}"):
        ServeConfig(**wrong)
