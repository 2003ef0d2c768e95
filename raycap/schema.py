"""The nouns that rooms exchange. Owns their fields and Arrow schemas, no behaviour; imports nothing heavy."""

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from raycap.errors import SampleErrorKind

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRef:
    """A sample whose image has not been read yet: what a reader of a data set yields.

    key: stable id of the image, its path below the images root without suffix. url: absolute path or URL of its file.
    image_id: the id in the source's annotations (COCO's result format wants an int back), or None.
    """

    key: str
    url: str
    captions: tuple[str, ...]
    image_id: int | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training row: key, encoded image bytes, reference captions. ext: the image's suffix without a dot."""

    key: str
    image: bytes
    ext: str
    captions: tuple[str, ...]
    image_id: int | str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleError:
    """A sample of a shard that cannot be used. key: its own, else "<shard>[<index>]". message: one sentence."""

    key: str
    kind: SampleErrorKind
    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageSpec:
    """How an image becomes pixel_values. Stored in the checkpoint, so that no door can differ.

    size: side S in pixels. fit: "squash" resizes the image to S x S without keeping its aspect, as BLIP and ViT do; "crop"
    resizes its shorter side and keeps the middle, S x S, as CLIP does. shorter_side: what "crop" resizes that side to, from S
    to 2 S, as DINOv2's 256 for 224; 0 means S. resample: the filter of Pillow that both resize with.
    mean, std: per channel (R, G, B), applied on the model's device to pixels scaled to [0, 1].
    decode: "exact" takes every pixel of the file; "fast" lets a JPEG of at least twice the size that it is resized to be decoded
    at a fraction of its own.
    """

    size: int
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, as in BLIP's configuration
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)
    decode: Literal["exact", "fast"] = "exact"
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    fit: Literal["squash", "crop"] = "squash"
    shorter_side: int = 0

    def __post_init__(self) -> None:
        allowed = {"decode": ("exact", "fast"), "resample": ("bicubic", "bilinear"), "fit": ("squash", "crop")}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} of an image is {' or '.join(map(repr, values))}, not {getattr(self, name)!r}; give one of the two"
                )

        if self.shorter_side and (self.fit != "crop" or not self.size <= self.shorter_side <= 2 * self.size):
            raise ValueError(
                f"shorter_side of an image is {self.shorter_side}, its size {self.size} and its fit {self.fit!r}; give one from size to "
                f"twice size, with fit 'crop', or 0 for size"
            )

    def to_dict(self) -> dict[str, Any]:
        # A shorter_side of 0 is left out, as before there was such a field: what is sealed and hashed stays the same.
        return {name: value for name, value in asdict(self).items() if name != "shorter_side" or value}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "ImageSpec":
        # Fields that older checkpoints lack have their defaults.
        younger = {name: d[name] for name in ("decode", "resample", "fit", "shorter_side") if name in d}
        return cls(size=int(d["size"]), mean=_triple(d["mean"]), std=_triple(d["std"]), **younger)


def _triple(values: Any) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b


MAX_DRAWS = 100  # of one image
MAX_BEAMS = 1_000  # of one image: each is a row of the model's caches, some hundred kilobytes of BLIP base
MAX_NEW_TOKENS = 2**16  # the most positions of any text model that is loaded (raycap/checkpoint/spec.py, LARGEST)
_TYPES: dict[type, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    tuple: ((tuple, list), "a list of words"),
}
MAX_LENGTH_PENALTY = 10  # the power of a length of 1,000 tokens that float32 still holds


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How a caption is searched. Names and meanings are those of transformers' generate(), where it has them.

    max_new_tokens, min_new_tokens: tokens after the prompt; the end token counts in the first and not in the second. num_beams: 1 is greedy.
    length_penalty: a beam is ranked by its log-probability divided by its number of new tokens to this power.
    length_counts_prompt: that number is then of prompt and caption, the first token in and the end token out, and an image stops
    as in the transformers 4.15 with which BLIP's scores were published.
    num_candidates: how many of the best beams come back as candidates, best first; 0 gives none. Of a sampled caption: how
    many are drawn, in the order of their draws; the first is the caption.
    early_stopping: False stops an image when no running beam, at its present length, can beat the worst finished one; True
    as soon as num_beams are finished; "never" when none could at any length up to max_new_tokens.

    repetition_penalty: what was said, in the prompt too, has its logit divided by it if positive, else multiplied.
    no_repeat_ngram_size: no so many tokens follow each other twice; 0 allows it. banned_words: are not said as
    the tokenizer spells them, at the start or behind a space. required_words: stand in every caption that comes back, each as a word
    of its own and written as here; a search for them takes num_beams > 1, and num_beams more rows for each of their tokens.
    do_sample: draws each token instead of taking the likeliest. temperature divides the logits; then the top_k likeliest
    tokens stay (0: all), then the likeliest that reach top_p together. seed: of the draws, with the image's own pixels: a
    caption depends on neither its batch nor its place in it.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    length_counts_prompt: bool = False
    num_candidates: int = 0
    early_stopping: bool | Literal["never"] = False
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    banned_words: tuple[str, ...] = ()
    required_words: tuple[str, ...] = ()
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for setting in fields(self):
            value, kind = getattr(self, setting.name), type(setting.default)
            types, wanted = _TYPES[kind]
            if setting.name != "early_stopping" and (
                not isinstance(value, types) or (value is True or value is False) != (kind is bool)
            ):
                raise ValueError(f"{setting.name} is {value!r}; give {wanted}")
            if kind is tuple:
                object.__setattr__(self, setting.name, tuple(value))  # JSON has lists
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, a caption needs at least 1; give a larger one")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; give a min_new_tokens from 0 to "
                f"max_new_tokens"
            )
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise ValueError(f"num_beams is {self.num_beams}; give 1 for greedy search, or more, up to {MAX_BEAMS}")
        if self.max_new_tokens > MAX_NEW_TOKENS:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; give {MAX_NEW_TOKENS} at most")
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample and num_beams={self.num_beams} exclude each other; give one of them")
        most = MAX_DRAWS if self.do_sample else self.num_beams
        if not 0 <= self.num_candidates <= most:
            beams = f" and num_beams {self.num_beams}; a search finds as many captions as it has beams, so give"
            raise ValueError(
                f"num_candidates is {self.num_candidates}{'; give' if self.do_sample else beams} one from 0 to {most}"
            )
        for name, lowest, highest in (
            ("length_penalty", -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
            ("repetition_penalty", 0.01, 100),
            ("temperature", 0.01, 100),
            ("top_p", 1e-6, 1),
            ("no_repeat_ngram_size", 0, 1000),
            ("top_k", 0, 10**9),
        ):
            if not lowest <= getattr(self, name) <= highest:  # nor NaN
                raise ValueError(f"{name} is {getattr(self, name)}; give one from {lowest} to {highest}")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}; give False, True or 'never'")
        for name in ("banned_words", "required_words"):
            words = getattr(self, name)
            if not all(isinstance(word, str) and word.strip() for word in words):
                raise ValueError(f"{name} are {words!r}; give words that are not empty")
        self._check_required_words()
        drawn = ("temperature", "top_k", "top_p", "seed")
        given = [f for f in fields(self) if f.name in drawn and getattr(self, f.name) != f.default]
        if given and not self.do_sample:
            name = given[0].name
            raise ValueError(
                f"{name}={getattr(self, name)} is for sampling; give do_sample and one beam, or leave it out"
            )
        for name in ("early_stopping", "length_counts_prompt"):
            if getattr(self, name) is not False and self.num_beams == 1:
                raise ValueError(f"{name}={getattr(self, name)!r} is for beams; give num_beams too, or leave it out")

    def _check_required_words(self) -> None:
        if not self.required_words:
            return
        if both := {word.strip() for word in self.banned_words} & {word.strip() for word in self.required_words}:
            raise ValueError(f"banned_words and required_words both hold {min(both)!r}; give it in one of them")
        if self.do_sample:
            raise ValueError(
                f"do_sample and required_words={self.required_words!r} exclude each other; give one of them"
            )
        if self.num_beams == 1:
            raise ValueError(
                f"required_words are {self.required_words!r} and num_beams is 1; a search for them has beams, so give 2 or more"
            )
        if self.no_repeat_ngram_size:
            raise ValueError(
                f"required_words are {self.required_words!r} and no_repeat_ngram_size is {self.no_repeat_ngram_size}, which may "
                f"forbid them; give one of them"
            )

    def __str__(self) -> str:
        """num_beams and max_new_tokens, and what is not the default."""
        always = ("max_new_tokens", "num_beams")
        return " ".join(
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.name in always or getattr(self, field.name) != field.default
        )

    def override(
        self, *, num_beams: int = 0, max_new_tokens: int = 0, num_candidates: int = 0, others: str = ""
    ) -> "DecodeSettings":
        """These settings with the given values where they are not 0. others: a JSON object of any of them.

        Raises ValueError, naming the values that clash, and what is no setting.
        """
        given: dict[str, Any] = {
            "num_beams": num_beams,
            "max_new_tokens": max_new_tokens,
            "num_candidates": num_candidates,
        }
        given = {name: value for name, value in given.items() if value}
        if others:
            try:
                more = json.loads(others, object_pairs_hook=_once)
            except ValueError as error:
                raise ValueError(f"{others!r} is no JSON ({error}); give an object in quotes") from error
            names = [field.name for field in fields(self)]
            if not isinstance(more, dict) or (unknown := sorted(more.keys() - names)):
                what = f"names {unknown[0]!r}" if isinstance(more, dict) else "is no JSON object"
                raise ValueError(f"{others!r} {what}; settings are {', '.join(names)}")
            for name in given.keys() & more.keys():
                if given[name] != more[name]:
                    raise ValueError(f"{name} is {given[name]} and in {others!r} {more[name]!r}; give it once")
            given = more | given
        return replace(self, **given)

    def check_choice(self) -> None:
        """Raises ValueError if the search finds a single caption of an image: a scorer then has nothing to choose from."""
        if self.do_sample and self.num_candidates < 2:
            raise ValueError(
                f"num_candidates is {self.num_candidates} with do_sample, which draws a single caption, and a scorer chooses from "
                f"several; give num_candidates of 2 or more, or no scorer"
            )
        if not self.do_sample and self.num_beams == 1:
            raise ValueError(
                "num_beams is 1, which finds a single caption, and a scorer chooses from several; give num_beams of 2 or more, "
                "do_sample with num_candidates of 2 or more, or no scorer"
            )


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands in it twice")
    return dict(pairs)


class Candidate(NamedTuple):
    """score: mean log-probability, under the model, of the generated tokens, the end token included. log_prob: their sum.
    match: the probability that caption and image belong together; None without a scorer.
    """

    caption: str
    score: float
    log_prob: float
    match: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionResult:
    """The answer for one image: either caption or error_kind is set.

    score, log_prob, match: of the caption, see Candidate. candidates: of a search the best beams, best first, of sampling what
    was drawn, if they were asked for; with a scorer either by match, highest first. The first is the caption itself. error: one
    sentence.
    """

    caption: str | None
    score: float | None = None
    log_prob: float | None = None
    match: float | None = None
    candidates: tuple[Candidate, ...] = ()
    error_kind: str | None = None
    error: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardIndex:
    """What is known of one shard before it is read.

    shard: file name below the manifest's folder. num_bytes, etag: of the file; etag is its sha256, hex. keys: of the
    samples that can be used, in file order. offsets, num_samples + 1 values: of a tar, the byte at which each sample's first
    header begins, and the byte behind the last sample, so that a run of neighbours is one range read; of a Parquet file,
    row numbers. checksums: crc32 of each sample's own bytes in a tar, headers included; of its image's bytes in a
    Parquet file. skipped: (key, SampleErrorKind) of what is not among keys.
    """

    shard: str
    num_bytes: int
    etag: str
    keys: tuple[str, ...]
    offsets: tuple[int, ...]
    checksums: tuple[int, ...]
    skipped: tuple[tuple[str, str], ...] = ()

    @property
    def num_samples(self) -> int:
        return len(self.keys)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> "ShardIndex":
        """What asdict gave, after a way through JSON."""
        lists = {name: tuple(d[name]) for name in ("keys", "offsets", "checksums")}
        return cls(**{**d, **lists, "skipped": tuple((key, kind) for key, kind in d["skipped"])})


def manifest_schema() -> "pa.Schema":
    """Arrow schema of manifest.parquet: one row per shard, see ShardIndex. Keys are not in it; they come with the samples."""
    import pyarrow as pa

    return pa.schema(
        [
            ("shard", pa.string()),
            ("num_samples", pa.int64()),
            ("num_bytes", pa.int64()),
            ("etag", pa.string()),
            ("offsets", pa.list_(pa.int64())),
            ("checksums", pa.list_(pa.uint32())),
            ("skipped", pa.list_(pa.struct([("key", pa.string()), ("kind", pa.string())]))),
        ]
    )


def bulk_manifest_schema() -> "pa.Schema":
    """Arrow schema of a bulk output's manifest.parquet: one row per image, sorted by key. etag: as storage lists it."""
    import pyarrow as pa

    return pa.schema([("key", pa.string()), ("num_bytes", pa.int64()), ("etag", pa.string())])


def caption_schema() -> "pa.Schema":
    """Arrow schema of bulk captions: one row per image of the manifest, in its order.

    Either caption or error_kind is null. width, height: pixels of the image upright, null if it could not be decoded.
    match: null without a scorer. checkpoint, settings: fingerprints of what captioned it, settings with the scorer's; verified:
    whether a raycap.json vouches for the checkpoint.
    """
    import pyarrow as pa

    candidate = pa.struct(
        [("caption", pa.string()), ("score", pa.float32()), ("log_prob", pa.float32()), ("match", pa.float32())]
    )
    return pa.schema(
        [
            ("key", pa.string()),
            ("caption", pa.string()),
            ("score", pa.float32()),
            ("log_prob", pa.float32()),
            ("match", pa.float32()),
            ("candidates", pa.list_(candidate)),
            ("error_kind", pa.string()),
            ("error", pa.string()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("num_bytes", pa.int64()),
            ("etag", pa.string()),
            ("checkpoint", pa.string()),
            ("settings", pa.string()),
            ("verified", pa.bool_()),
        ]
    )
