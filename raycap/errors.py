"""The exception tree and the closed set of error kinds. Owns no behaviour.

A message is one sentence with four facts: what failed, the value, where, and what to do.
"""

from enum import StrEnum

EXIT_FAILURE = 1
EXIT_USER_MISTAKE = 2
EXIT_OUTAGE = 75  # EX_TEMPFAIL of sysexits.h: the same command may work later


class ErrorKind(StrEnum):
    """Why one image has no result. Training counts them, bulk output stores them, the server returns them."""

    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    UNSUPPORTED_MODE = "unsupported_mode"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    TOO_MANY_BYTES = "too_many_bytes"
    TOO_MANY_PIXELS = "too_many_pixels"
    BAD_DIMENSIONS = "bad_dimensions"
    UNREADABLE = "unreadable"  # bulk: listed, but gone, forbidden or replaced when it was read
    DECODER_CRASH = "decoder_crash"  # the child process that decoded it died
    DECODER_TIMEOUT = "decoder_timeout"
    DECODER_MEMORY = "decoder_memory"
    NOT_FINITE = "not_finite"  # the model's probabilities for it are infinite or NaN
    NO_SUCH_CAPTION = "no_such_caption"  # the search found none that holds the required words


class SampleErrorKind(StrEnum):
    """Why one sample of a shard is left out. In the same field as ErrorKind: what is counted is the image that is missing.

    All but SAMPLE_CHANGED are found when a shard is indexed, and again when its bytes are read.
    """

    NO_CAPTION = "no_caption"  # it has none, or only spaces
    DUPLICATE_KEY = "duplicate_key"  # an earlier sample, in this shard or in one before it, has the key
    BAD_NAME = "bad_name"  # its name is not UTF-8, or names no file
    TRUNCATED_SHARD = "truncated_shard"  # the shard ends or is damaged here: this sample and all behind it are lost
    BAD_SAMPLE = "bad_sample"  # not one image with captions that can be read
    SAMPLE_CHANGED = "sample_changed"  # the bytes at its place are no longer those that were indexed


class RequestErrorKind(StrEnum):
    """Why an HTTP request has no result although its image may be fine. In the same field as ErrorKind."""

    BAD_REQUEST = "bad_request"
    UNAUTHORIZED = "unauthorized"
    NOT_FOUND = "not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type"
    OVERLOADED = "overloaded"
    TIMEOUT = "timeout"
    UNAVAILABLE = "unavailable"  # no captioner answers: it is starting, or it died
    INTERNAL = "internal"


class RaycapError(Exception):
    """Base of every error raycap raises on purpose. `exit_code` is what a job's process ends with."""

    exit_code = EXIT_FAILURE


class UserError(RaycapError):
    """The command cannot work as it was given; nothing was written."""

    exit_code = EXIT_USER_MISTAKE


class StorageError(UserError):
    """A path or URL does not hold, or does not accept, what was asked of it."""


class StorageOutage(StorageError):
    """A storage that has answered before does not answer any more. What was written stays; the same command goes on."""

    exit_code = EXIT_OUTAGE


class CheckpointError(UserError):
    """A checkpoint folder is missing, incomplete, damaged, or of a kind that is not loaded."""


class ImageError(RaycapError):
    """One image cannot be decoded. Never ends a run."""

    def __init__(self, kind: ErrorKind, message: str) -> None:
        super().__init__(kind, message)  # both, so that pickle makes it again
        self.kind = kind

    def __str__(self) -> str:
        return str(self.args[1])


class TrainingError(RaycapError):
    """Training cannot go on: a loss that is not finite, workers that died too often."""
