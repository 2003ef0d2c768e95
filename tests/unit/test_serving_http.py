"""The routes: what a request may say, every error's status and shape, and the OpenAPI document against real answers."""

import asyncio
import base64
import gzip
import io
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from asgi import Answer, call
from PIL import Image
from tiny import png_images

from raycap.errors import ErrorKind, ImageError, RequestErrorKind
from raycap.image import Prepared, prepare_bytes
from raycap.schema import Candidate, CaptionResult, DecodeSettings, ImageSpec
from raycap.serving.door import Door, Limits, Refusal
from raycap.serving.http import Served, build_http

SERVED = Served(
    kind="blip",
    step=7,
    fingerprint="f" * 64,
    verified=True,
    image=ImageSpec(size=32),
    decode=DecodeSettings(max_new_tokens=12),
    prompt="a picture of ",
    max_new_tokens=60,
)
PNG = png_images(1)[0]
JPEG_TYPE = (b"content-type", b"image/jpeg")


class Told:
    """A captioner that says the settings it was asked with; raises `error` instead, if it has one."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    async def served(self) -> Served:
        if self.error:
            raise self.error
        return SERVED

    async def caption(self, pixels: npt.NDArray[np.uint8], settings: DecodeSettings) -> tuple[CaptionResult, str, bool]:
        assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 32, 32))
        words = f"{settings.num_beams} {settings.max_new_tokens} {settings.num_candidates}"
        candidates = tuple(Candidate(words, -0.5 - n, -2.0 - n) for n in range(settings.num_candidates))
        result = CaptionResult(caption=words, score=-0.5, log_prob=-2.0, candidates=candidates)
        return result, SERVED.fingerprint, True


class Requiring(Told):
    """A captioner whose words take 3 tokens, and which finds no caption with them."""

    async def served(self) -> Served:
        decode = replace(SERVED.decode, num_beams=3, required_words=("red kite",))
        return replace(SERVED, decode=decode, num_required_tokens=3)

    async def caption(self, *_: Any) -> tuple[CaptionResult, str, bool]:
        kind = ErrorKind.NO_SUCH_CAPTION.value
        return CaptionResult(caption=None, error_kind=kind, error="no caption"), SERVED.fingerprint, True


class Here:
    """A decoder in this process. error: raised instead."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def prepare(self, data: bytes, spec: ImageSpec) -> Prepared:
        if self.error:
            raise self.error
        return prepare_bytes(data, spec)

    def close(self) -> None:
        pass


def app(model: Told | None = None, decoder: Here | None = None, **limits: Any) -> Door:
    routes = build_http(model or Told(), decoder or Here(), decode_workers=1)
    given: dict[str, Any] = {"max_body_bytes": 100_000, "request_timeout_s": 30} | limits
    return Door(routes, Limits(**given), digest=given.pop("digest", ""), front=True)


def ask(door: Door | None = None, **request: Any) -> Answer:
    return asyncio.run(call(door or app(), **request))


def form(*parts: tuple[str, bytes, str | None]) -> dict[str, Any]:
    """Body and headers of a form; a part is name, content and file name."""
    lines: list[bytes] = []
    for name, content, file in parts:
        disposition = f'form-data; name="{name}"' + (f'; filename="{file}"' if file is not None else "")
        lines += [b"--b0undary", f"Content-Disposition: {disposition}".encode(), b"", content]
    body = b"\r\n".join([*lines, b"--b0undary--", b""])
    return {"body": [body], "headers": [(b"content-type", b"multipart/form-data; boundary=b0undary")]}


TYPES: list[list[tuple[bytes, bytes]]] = [
    [],
    [(b"content-type", b"")],
    [(b"content-type", b"image/png")],
    [JPEG_TYPE],  # of a PNG: the content decides
    [(b"content-type", b"Image/X-Something; q=1")],
    [(b"content-type", b"application/octet-stream")],
    [(b"content-type", b"binary/octet-stream")],  # S3's default
    [(b"content-type", b"*/*")],
    [(b"content-encoding", b"identity")],
]


@pytest.mark.parametrize("headers", TYPES)
def test_an_image_is_taken_as_the_body_whatever_image_type_it_claims(headers: list[tuple[bytes, bytes]]) -> None:
    answer = ask(body=[PNG[:100], PNG[100:]], headers=headers)
    width, height = Image.open(io.BytesIO(PNG)).size
    assert answer.status == 200, answer.body
    assert answer.json == {
        "caption": "1 12 0",
        "score": -0.5,
        "log_prob": -2.0,
        "match": None,
        "candidates": [],
        "width": width,
        "height": height,
        "checkpoint": SERVED.fingerprint,
        "verified": True,
    }


def test_an_image_is_taken_as_the_file_of_a_form() -> None:
    answer = ask(**form(("image", PNG, "../../etc/photo.exe")))
    assert (answer.status, answer.json["caption"]) == (200, "1 12 0")


FORMS = {
    "no part": form(),
    "another name": form(("photo", PNG, "a.png")),
    "two files": form(("image", PNG, "a.png"), ("image", PNG, "b.png")),
    "three files": form(*[("image", PNG, f"{n}.png") for n in range(3)]),
    "a file and a field": form(("image", PNG, "a.png"), ("num_beams", b"2", None)),
    "a field of the right name": form(("image", b"text", None)),
    "no boundary": {"body": [PNG], "headers": [(b"content-type", b"multipart/form-data")]},
    "another boundary": form(("image", PNG, "a.png"))
    | {"headers": [(b"content-type", b"multipart/form-data; boundary=other")]},
    "a field too long": form(("x", b"y" * 5000, None)),
    "many fields": form(*[(f"f{n}", b"y", None) for n in range(20)]),
}


@pytest.mark.parametrize("case", FORMS)
def test_another_form_is_refused_with_what_to_send(case: str) -> None:
    answer = ask(**FORMS[case])
    assert (answer.status, answer.error_kind) == (400, "bad_request")
    assert "'image'" in answer.json["error"]


@pytest.mark.parametrize(
    "given",
    [b"application/x-www-form-urlencoded", b"text/html; charset=utf-8", b"application/json", b"multipart/mixed"],
)
def test_another_content_type_is_refused_with_the_curl_that_works(given: bytes) -> None:
    answer = ask(body=[PNG], headers=[(b"content-type", given)])
    assert (answer.status, answer.error_kind) == (415, "unsupported_media_type")
    assert given.decode() in answer.json["error"]
    assert "-H 'Content-Type: image/jpeg'" in answer.json["error"]


@pytest.mark.parametrize("encoding", [b"gzip", b"br", b"deflate, gzip"])
def test_an_encoded_body_is_refused_by_the_name_of_its_encoding(encoding: bytes) -> None:
    answer = ask(body=[gzip.compress(PNG)], headers=[JPEG_TYPE, (b"content-encoding", encoding)])
    assert (answer.status, answer.error_kind) == (415, "unsupported_media_type")
    assert f"Content-Encoding '{encoding.decode()}' is not taken" in answer.json["error"]


@pytest.mark.parametrize("start", [b"", b"data:image/png;base64,"])
def test_an_image_as_base64_text_is_refused_by_name(start: bytes) -> None:
    answer = ask(body=[start + base64.b64encode(PNG)], headers=[JPEG_TYPE])
    assert (answer.status, answer.error_kind) == (415, "unsupported_media_type")
    assert "base64 text; send its bytes" in answer.json["error"]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/models"])
def test_monitors_may_ask_with_head(path: str) -> None:
    assert ask(method="HEAD", path=path).status == 200


QUERIES = {
    b"num_beams=3": "3 12 0",
    b"max_new_tokens=60": "1 60 0",
    b"num_beams=10&num_candidates=10&max_new_tokens=1": "10 1 10",
    b"": "1 12 0",
}


@pytest.mark.parametrize("query", QUERIES)
def test_settings_come_from_the_query_over_the_servers_defaults(query: bytes) -> None:
    answer = ask(body=[PNG], query=query)
    assert (answer.status, answer.json["caption"]) == (200, QUERIES[query])
    assert len(answer.json["candidates"]) == int(QUERIES[query].split()[2])


BAD_QUERIES = {
    b"num_beams=11": "num_beams",
    b"num_beams=0": "num_beams",
    b"num_beams=two": "'two'",
    b"num_beams=": "num_beams",
    b"num_beams=99999999999999999999999": "num_beams",
    b"max_new_tokens=61": "at most 60",
    b"max_new_tokens=-1": "max_new_tokens",
    b"num_candidates=2": "num_candidates",  # more than beams
    b"num_beams=1&num_beams=3": "'num_beams' is there 2 times",
    b"num_bems=3": "'num_bems' is unknown",
    b"temperature=0.1": "there are num_beams, max_new_tokens, num_candidates",
}


@pytest.mark.parametrize("query", BAD_QUERIES)
def test_a_setting_that_is_unknown_or_out_of_bounds_is_refused_by_name(query: bytes) -> None:
    answer = ask(body=[PNG], query=query)
    assert (answer.status, answer.error_kind) == (400, "bad_request")
    assert BAD_QUERIES[query] in answer.json["error"]


def test_words_that_the_server_requires_bound_what_a_request_may_say() -> None:
    door = app(Requiring())
    (model,) = ask(door, method="GET", path="/v1/models").json["models"]
    assert (model["decode"]["required_words"], model["num_required_tokens"]) == (["red kite"], 3)
    for query, sentence in (
        (b"num_beams=1", "required_words are ('red kite',) and num_beams is 1"),
        (b"max_new_tokens=2", "the words that the server requires in a caption take 3 tokens; ask for as many or more"),
    ):
        answer = ask(door, body=[PNG], query=query)
        assert (answer.status, answer.error_kind) == (400, "bad_request")
        assert sentence in answer.json["error"]


def test_an_image_for_which_the_captioner_has_no_caption_answers_422_with_the_kind_of_its_result() -> None:
    answer = ask(app(Requiring()), body=[PNG], query=b"max_new_tokens=3")
    assert (answer.status, answer.json) == (422, {"error_kind": "no_such_caption", "error": "no caption"})


BODIES = {
    "nothing": (b"", 422, "empty"),
    "HTML": (b"<!doctype html><html>", 422, "not_an_image"),
    "half an image": (PNG[: len(PNG) // 2], 422, None),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422, "unsupported_format"),
}


@pytest.mark.parametrize("case", BODIES)
def test_bytes_that_are_no_image_answer_422_with_the_kind_that_every_door_gives(case: str) -> None:
    data, status, kind = BODIES[case]
    for request in ({"body": [data]}, form(("image", data, "a.jpg"))):
        answer = ask(**request)
        with pytest.raises(ImageError) as raised:
            prepare_bytes(data, SERVED.image)
        assert (answer.status, answer.error_kind) == (status, raised.value.kind.value)
        assert kind in (None, raised.value.kind.value)


def test_a_decoder_that_finds_too_many_bytes_answers_413() -> None:
    answer = ask(app(decoder=Here(ImageError(ErrorKind.TOO_MANY_BYTES, "too many"))), body=[PNG])
    assert (answer.status, answer.error_kind) == (413, "too_many_bytes")


def test_an_unknown_path_and_another_method_answer_in_the_same_shape() -> None:
    unknown = ask(path="/v2/caption", body=[PNG])
    assert (unknown.status, unknown.error_kind) == (404, "not_found")
    method = ask(method="GET")
    assert (method.status, method.error_kind, method.headers["allow"]) == (405, "method_not_allowed", "POST")


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_pages_that_load_scripts_from_elsewhere_are_off(path: str) -> None:
    assert ask(method="GET", path=path).status == 404


def test_the_model_is_described() -> None:
    answer = ask(method="GET", path="/v1/models")
    (model,) = answer.json["models"]
    assert model["id"] == "blip-ffffffffffff"
    assert (model["kind"], model["step"], model["verified"], model["prompt"]) == ("blip", 7, True, "a picture of ")
    assert model["image"]["size"] == 32
    assert model["decode"]["max_new_tokens"] == 12


def test_without_a_captioner_the_process_is_healthy_but_not_ready() -> None:
    door = app(Told(Refusal(503, RequestErrorKind.UNAVAILABLE, "no captioner answers", {"Retry-After": "1"})))
    assert ask(door, method="GET", path="/healthz").json == {"status": "ok"}
    for request in ({"method": "GET", "path": "/readyz"}, {"body": [PNG]}):
        answer = ask(door, **request)
        assert (answer.status, answer.error_kind, answer.headers["retry-after"]) == (503, "unavailable", "1")
    assert ask(app(), method="GET", path="/readyz").json == {"status": "ready"}


def test_an_image_that_the_model_has_no_caption_for_answers_422_with_its_kind() -> None:
    class Overflowing(Told):
        async def caption(self, *_: Any) -> tuple[CaptionResult, str, bool]:
            result = CaptionResult(caption=None, error_kind="not_finite", error="the probabilities are infinite")
            return result, SERVED.fingerprint, True

    answer = ask(app(Overflowing()), body=[PNG])
    assert (answer.status, answer.error_kind) == (422, "not_finite")
    assert answer.json["error"] == "the probabilities are infinite"


def every_answer() -> Iterable[tuple[str, str, Answer]]:
    """Path, method and answer: each status that the endpoint can give, by a request that makes it."""
    unavailable = app(Told(Refusal(503, RequestErrorKind.UNAVAILABLE, "no captioner")))
    broken = app(Told(ZeroDivisionError()))
    slow = app(request_timeout_s=0.05)
    locked = Door(app(), Limits(max_body_bytes=9, request_timeout_s=30), digest="0" * 64)
    full = app(Told(Refusal(429, RequestErrorKind.OVERLOADED, "full")))
    late = app(Told(Refusal(504, RequestErrorKind.TIMEOUT, "late")))
    post = "/v1/caption", "post"
    for door, request in [
        (None, {"body": [PNG]}),
        (None, {"body": [PNG], "query": b"num_candidates=2&num_beams=2"}),
        (None, {"query": b"x=1"}),
        (locked, {}),
        (slow, {"body": [b"x", 1.0, b"x"]}),
        (None, {"body": [b"x" * 100_001]}),
        (None, {"headers": [(b"content-type", b"text/html")]}),
        (None, {"body": [b"no image"]}),
        (full, {"body": [PNG]}),
        (broken, {"body": [PNG]}),
        (unavailable, {"body": [PNG]}),
        (late, {"body": [PNG]}),
    ]:
        yield *post, ask(door, **request)
    yield *post, ask(method="PUT")
    for path in ("/v1/models", "/healthz", "/readyz"):
        for door in (None, locked, unavailable, broken, full, late):
            yield path, "get", ask(door, method="GET", path=path)
        yield path, "get", ask(method="DELETE", path=path)


def test_the_openapi_document_describes_what_is_answered() -> None:
    answer = ask(method="GET", path="/openapi.json")
    document = json.loads(answer.body)
    assert set(document["paths"]) == {"/v1/caption", "/v1/models", "/healthz", "/readyz"}
    content = document["paths"]["/v1/caption"]["post"]["requestBody"]["content"]
    assert set(content) == {"image/*", "application/octet-stream", "multipart/form-data"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    seen: dict[tuple[str, str], set[str]] = {}
    for path, method, got in every_answer():
        described = document["paths"][path][method]["responses"]
        assert str(got.status) in described, (path, got)
        schema = described[str(got.status)]["content"]["application/json"]["schema"]
        assert got.headers["content-type"] == "application/json"
        matches(got.json, schema, document)
        seen.setdefault((path, method), set()).add(str(got.status))
    for path in document["paths"]:
        for method in document["paths"][path]:
            assert set(document["paths"][path][method]["responses"]) == seen[path, method]


def matches(value: Any, schema: dict[str, Any], document: dict[str, Any]) -> None:
    """Fails unless value is what the schema says: the part of JSON Schema that FastAPI writes for these answers."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema:
        fitting = []
        for option in schema["anyOf"]:
            try:
                matches(value, option, document)
                fitting.append(option)
            except AssertionError:
                continue
        assert fitting, (value, schema)
        return
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "number": (int, float),
        "integer": int,
        "boolean": bool,
        "null": type(None),
    }
    if "type" in schema:
        assert isinstance(value, kinds[schema["type"]]), (value, schema)
    if "enum" in schema:
        assert value in schema["enum"]
    if isinstance(value, dict):
        assert set(value) == set(schema["properties"]) == set(schema["required"])
        for name, part in value.items():
            matches(part, schema["properties"][name], document)
    if isinstance(value, list):
        for n, part in enumerate(value):
            items = schema["prefixItems"][n] if "prefixItems" in schema else schema["items"]
            matches(part, items, document)
