"""The endpoint's routes: /v1/caption, /v1/models, /healthz, /readyz, /openapi.json. Knows FastAPI, neither Ray nor torch.

Owns what a request may say. Limits, tokens and time-outs are the Door's, in front of it.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from raycap.errors import ErrorKind, ImageError, RequestErrorKind
from raycap.image import Prepared
from raycap.schema import CaptionResult, DecodeSettings, ImageSpec
from raycap.serving.door import EXCHANGE, Refusal

MAX_BEAMS = 10
FORM_FIELD = "image"
# What clients send where they know no better: the content decides. The second is S3's default.
_RAW_TYPES = ("application/octet-stream", "binary/octet-stream", "*/*")
_BASE64_STARTS = (b"/9j/", b"iVBORw0KGgo", b"R0lGOD", b"UklGR")  # JPEG, PNG, GIF, WebP


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a captioner says of itself. max_new_tokens: as many as the model has positions for behind its prompt.
    num_required_tokens: of the words that decode requires, the least max_new_tokens.
    """

    kind: str
    step: int | None
    fingerprint: str
    verified: bool
    scorer: str | None = None  # fingerprint of what picks the captions
    image: ImageSpec
    decode: DecodeSettings
    prompt: str
    max_new_tokens: int
    num_required_tokens: int = 0


class Decoder(Protocol):
    """raycap.decode_pool.DecodePool, or what a benchmark puts in its place."""

    def prepare(self, data: bytes, spec: ImageSpec) -> Prepared: ...

    def close(self) -> None: ...


class Model(Protocol):
    """The captioner behind the endpoint. Both raise Refusal where it does not answer."""

    async def served(self) -> Served: ...

    async def caption(self, pixels: npt.NDArray[np.uint8], settings: DecodeSettings) -> tuple[CaptionResult, str, bool]:
        """The result, and fingerprint and verified of the checkpoint it came from."""
        ...


class Settings(BaseModel):
    """Query parameters of /v1/caption; what is left out is the server's default, which /v1/models tells."""

    model_config = ConfigDict(extra="forbid")

    num_beams: int | None = Field(None, ge=1, le=MAX_BEAMS, description="Beams of the search; 1 is greedy.")
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest caption in tokens; /v1/models tells the model's own bound."
    )
    num_candidates: int | None = Field(
        None, ge=1, le=MAX_BEAMS, description="Best beams to answer as candidates; at most num_beams."
    )

    def over(self, served: Served) -> DecodeSettings:
        """The decode settings of a request. Raises Refusal for more tokens than the model reads, or too few for the required words,
        and for settings that contradict the server's.
        """
        if (self.max_new_tokens or 0) > served.max_new_tokens:
            raise _bad_request(
                f"max_new_tokens is {self.max_new_tokens}, but the model reads at most {served.max_new_tokens} tokens behind its "
                f"prompt; ask for less"
            )
        if self.max_new_tokens and self.max_new_tokens < served.num_required_tokens:
            raise _bad_request(
                f"max_new_tokens is {self.max_new_tokens}, but the words that the server requires in a caption take "
                f"{served.num_required_tokens} tokens; ask for as many or more"
            )
        try:
            settings = served.decode.override(
                num_beams=self.num_beams or 0,
                max_new_tokens=self.max_new_tokens or 0,
                num_candidates=self.num_candidates or 0,
            )
            if served.scorer is not None:
                settings.check_choice()
            return settings
        except ValueError as error:
            raise _bad_request(str(error)) from error


class Candidate(BaseModel):
    """score: mean log-probability of the caption's tokens. log_prob: their sum. match: with the image, of a server with a scorer."""

    caption: str
    score: float
    log_prob: float
    match: float | None


class Caption(BaseModel):
    """score, log_prob, match: see Candidate. width, height: the image's. checkpoint: its fingerprint."""

    caption: str
    score: float | None
    log_prob: float | None
    match: float | None
    candidates: list[Candidate]
    width: int
    height: int
    checkpoint: str
    verified: bool


class ImageInfo(BaseModel):
    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class DecodeInfo(BaseModel):
    num_beams: int
    max_new_tokens: int
    min_new_tokens: int
    length_penalty: float
    length_counts_prompt: bool
    num_candidates: int
    early_stopping: bool | Literal["never"]
    repetition_penalty: float
    no_repeat_ngram_size: int
    banned_words: tuple[str, ...]
    required_words: tuple[str, ...]
    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    seed: int


class ModelInfo(BaseModel):
    id: str
    kind: str
    step: int | None
    fingerprint: str
    verified: bool
    scorer: str | None
    image: ImageInfo
    decode: DecodeInfo
    prompt: str
    max_new_tokens: int
    num_required_tokens: int


class Models(BaseModel):
    models: list[ModelInfo]


class Status(BaseModel):
    status: str


class Error(BaseModel):
    """What every answer but a 200 holds. error_kind: from a closed set; error: one sentence."""

    error_kind: ErrorKind | RequestErrorKind
    error: str


_WHY = {
    400: "a parameter or form field that is unknown or out of bounds",
    401: "no token, or a wrong one, where the server needs one",
    405: "another method than the path has",
    408: "the body did not arrive in time",
    413: "more bytes than the server takes",
    415: "another Content-Type",
    422: "the bytes are no image that is read, or the image has no caption: error_kind tells",
    429: "the server is full; Retry-After says when to come back",
    500: "a fault of the server; its log tells more under the X-Request-ID",
    503: "no captioner answers yet, or again; Retry-After says when to come back",
    504: "no caption in time",
}
_RAW = {"schema": {"type": "string", "format": "binary"}}
_FORM = {
    "schema": {
        "type": "object",
        "required": [FORM_FIELD],
        "additionalProperties": False,
        "properties": {FORM_FIELD: {"type": "string", "format": "binary"}},
    }
}
_BODY = {
    "requestBody": {
        "required": True,
        "description": "One image: as the body itself, or as the only file of a form. Its content decides the format.",
        "content": {"image/*": _RAW, "application/octet-stream": _RAW, "multipart/form-data": _FORM},
    }
}


def build_http(
    model: Model,
    decoder: Decoder,
    *,
    decode_workers: int,
    decoded: Callable[[float], None] = lambda _: None,
) -> FastAPI:
    """The routes over a captioner. decoder's prepare blocks, so it runs in decode_workers threads. decoded: told the
    seconds of every decoding, waiting included."""
    app = FastAPI(
        title="raycap",
        version=version("raycap"),
        summary="Image in, caption out.",
        docs_url=None,  # the interactive pages load their scripts from a CDN
        redoc_url=None,
        exception_handlers={
            Refusal: _on_refusal,
            ImageError: _on_image_error,
            HTTPException: _on_http_exception,
            RequestValidationError: _on_validation,
            Exception: _on_exception,
        },
    )
    threads = ThreadPoolExecutor(decode_workers, thread_name_prefix="decode")
    known: list[Served] = []  # of the last captioner that was asked

    async def ask(*, again: bool = False) -> Served:
        if again or not known:
            known[:] = [await model.served()]
        return known[0]

    @app.post(
        "/v1/caption",
        responses=_errors(400, 401, 405, 408, 413, 415, 422, 429, 500, 503, 504),
        openapi_extra=_BODY,
        summary="Caption of one image",
    )
    async def caption(request: Request, query: Annotated[Settings, Query()]) -> Caption:
        names = [name for name, _ in request.query_params.multi_items()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise _bad_request(f"query parameter {twice[:40]!r} is there {names.count(twice)} times; give it once")
        data = await _image_bytes(request)
        served = await ask()
        settings = query.over(served)
        begun = time.perf_counter()
        prepared = await asyncio.get_running_loop().run_in_executor(threads, decoder.prepare, data, served.image)
        decoded(time.perf_counter() - begun)
        result, fingerprint, verified = await model.caption(prepared.pixels, settings)
        if fingerprint != served.fingerprint:  # a captioner that started later, on a folder that was replaced
            await ask(again=True)
        if result.caption is None:
            assert result.error_kind is not None
            raise ImageError(ErrorKind(result.error_kind), result.error or "")
        return Caption(
            caption=result.caption,
            score=result.score,
            log_prob=result.log_prob,
            match=result.match,
            candidates=[Candidate(**candidate._asdict()) for candidate in result.candidates],
            width=prepared.width,
            height=prepared.height,
            checkpoint=fingerprint,
            verified=verified,
        )

    @app.get("/v1/models", responses=_errors(401, 405, 429, 500, 503, 504), summary="What is served")
    async def models() -> Models:
        served = await ask(again=True)
        about = asdict(served)
        return Models(models=[ModelInfo(id=f"{served.kind}-{served.fingerprint[:12]}", **about)])

    @app.get("/healthz", responses=_errors(405), summary="The process answers")
    async def healthz() -> Status:
        return Status(status="ok")

    @app.get("/readyz", responses=_errors(405, 429, 500, 503, 504), summary="A captioner is loaded and answers")
    async def readyz() -> Status:
        await ask(again=True)
        return Status(status="ready")

    for path, answer in (("/v1/models", models), ("/healthz", healthz), ("/readyz", readyz)):
        app.head(path, include_in_schema=False)(answer)  # which monitors ask
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": Error, "description": _WHY[status]} for status in statuses}


async def _image_bytes(request: Request) -> bytes:
    """The encoded image of a request, as its body or as the only file of a form. Raises Refusal."""
    given = request.headers.get("content-type", "")
    kind = given.partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _form_image(request)
    if (encoding := request.headers.get("content-encoding", "identity").strip().lower()) not in ("", "identity"):
        raise _unsupported(
            f"Content-Encoding {encoding[:40]!r} is not taken; send the image as it is, which compression makes no smaller"
        )
    if kind and kind not in _RAW_TYPES and not kind.startswith("image/"):
        raise _unsupported(
            f"Content-Type {given[:100]!r} is not taken; send the image itself as image/* or application/octet-stream, or a form with "
            f"one file named {FORM_FIELD!r}: curl --data-binary @photo.jpg -H 'Content-Type: image/jpeg', or curl -F "
            f"{FORM_FIELD}=@photo.jpg"
        )
    body = await request.body()
    if body[:5] == b"data:" or body.startswith(_BASE64_STARTS):
        raise _unsupported("the body is an image as base64 text; send its bytes: curl --data-binary @photo.jpg")
    return body


def _unsupported(message: str) -> Refusal:
    return Refusal(415, RequestErrorKind.UNSUPPORTED_MEDIA_TYPE, message)


async def _form_image(request: Request) -> bytes:
    body = await request.body()

    async def once() -> AsyncGenerator[bytes, None]:
        yield body

    parser = MultiPartParser(request.headers, once(), max_files=2, max_fields=4, max_part_size=1024)
    parser.spool_max_size = len(body) + 1  # in memory, where the body is already, and never on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        message = getattr(error, "message", "") or "no boundary"
        raise _bad_request(
            f"the form cannot be read ({message}); send one file named {FORM_FIELD!r}: curl -F {FORM_FIELD}=@photo.jpg"
        ) from error
    parts = form.multi_items()
    if [name for name, _ in parts] != [FORM_FIELD] or not isinstance(parts[0][1], UploadFile):
        names = ", ".join(
            f"{name[:40]!r}{'' if isinstance(part, UploadFile) else ' (no file)'}" for name, part in parts
        )
        raise _bad_request(
            f"the form holds {names or 'nothing'}; send exactly one file, named {FORM_FIELD!r}, and settings in the query"
        )
    return await parts[0][1].read()


def _bad_request(message: str) -> Refusal:
    return Refusal(400, RequestErrorKind.BAD_REQUEST, message)


def _answer(request: Request, refusal: Refusal) -> Response:
    exchange = request.scope.get(EXCHANGE)
    if exchange:
        exchange.error_kind = refusal.kind.value
    return Response(refusal.body, refusal.status, refusal.headers, "application/json")


async def _on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return _answer(request, error)


async def _on_image_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ImageError)
    return _answer(request, Refusal(413 if error.kind is ErrorKind.TOO_MANY_BYTES else 422, error.kind, str(error)))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """What the router itself refuses: an unknown path, another method."""
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        refusal = Refusal(
            404, RequestErrorKind.NOT_FOUND, f"no path {request.url.path[:200]!r}; POST an image to /v1/caption"
        )
    elif error.status_code == 405:
        allowed = dict(error.headers or {})
        refusal = Refusal(
            405,
            RequestErrorKind.METHOD_NOT_ALLOWED,
            f"{request.url.path} takes no {request.method[:20]}; use {allowed.get('Allow', 'another method')}",
            allowed,
        )
    else:
        refusal = Refusal(error.status_code, RequestErrorKind.BAD_REQUEST, str(error.detail))
    return _answer(request, refusal)


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    name, given = str(first["loc"][-1])[:40], str(first.get("input"))[:40]
    if first["type"] == "extra_forbidden":
        said = f"query parameter {name!r} is unknown"
    else:
        said = f"query parameter {name!r} is {given!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return _answer(request, _bad_request(f"{said}; there are {', '.join(Settings.model_fields)}"))


async def _on_exception(request: Request, _: Exception) -> Response:
    """A fault of ours. The Door logs it with its stack; the client gets the id to ask about."""
    exchange = request.scope.get(EXCHANGE)
    request_id = exchange.request_id if exchange else ""
    return _answer(
        request,
        Refusal(
            500,
            RequestErrorKind.INTERNAL,
            f"the server failed on request {request_id!r}; its log says why under this id",
        ),
    )
