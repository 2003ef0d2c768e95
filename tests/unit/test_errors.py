"""Every exception of raycap crosses a process boundary as what it is."""

import pickle

import pytest

from raycap.errors import ErrorKind, ImageError, RaycapError, RequestErrorKind
from raycap.serving.door import Refusal
from raycap.storage import EntryError


def below(kind: type[Exception]) -> set[type[Exception]]:
    return {kind}.union(*map(below, kind.__subclasses__()))


@pytest.mark.parametrize(
    "kind", sorted({EntryError} | below(RaycapError) - {ImageError}, key=lambda kind: kind.__name__)
)
def test_an_error_is_pickled_with_its_class_sentence_and_exit_code(kind: type[RaycapError]) -> None:
    again = pickle.loads(pickle.dumps(kind("one sentence")))
    assert (type(again), str(again), again.exit_code) == (kind, "one sentence", kind.exit_code)


def test_an_image_error_keeps_its_kind_and_a_refusal_all_it_says() -> None:
    error = pickle.loads(pickle.dumps(ImageError(ErrorKind.TRUNCATED, "it ends too early")))
    assert (error.kind, str(error)) == (ErrorKind.TRUNCATED, "it ends too early")
    refusal = pickle.loads(pickle.dumps(Refusal(429, RequestErrorKind.OVERLOADED, "busy", {"Retry-After": "1"})))
    assert (refusal.status, refusal.kind, str(refusal), refusal.headers) == (
        429,
        RequestErrorKind.OVERLOADED,
        "busy",
        {"Retry-After": "1"},
    )
    assert b"busy" in refusal.body
