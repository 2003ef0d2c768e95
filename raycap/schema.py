"""The nouns that rooms exchange. Owns their fields and Arrow schemas, no behaviour; imports nothing heavy."""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

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


MAX_LENGTH_PENALTY = 10  # the power of a length of 1,000 tokens that float32 still holds


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodeSettings:
    """How a caption is searched.

    max_new_tokens, min_new_tokens: count tokens after the prompt, the end token included. num_beams: 1 is greedy.
    length_penalty: a beam is ranked by its log-probability divided by its number of new tokens to this power.
    num_candidates: how many of the best beams come back as candidates, best first; 0 gives none.
    """

    max_new_tokens: int = 20
    min_new_tokens: int = 0
    num_beams: int = 1
    length_penalty: float = 1.0
    num_candidates: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}, a caption needs at least 1; give a larger one")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens} and max_new_tokens {self.max_new_tokens}; give a min_new_tokens from 0 to "
                f"max_new_tokens"
            )
        if self.num_beams < 1:
            raise ValueError(f"num_beams is {self.num_beams}; give 1 for greedy search, or more")
        if not 0 <= self.num_candidates <= self.num_beams:
            raise ValueError(
                f"num_candidates is {self.num_candidates} and num_beams {self.num_beams}; a search finds as many captions as it has "
                f"beams, so give a num_candidates from 0 to num_beams"
            )
        if not abs(self.length_penalty) <= MAX_LENGTH_PENALTY:  # nor NaN
            raise ValueError(
                f"length_penalty is {self.length_penalty}; give one from -{MAX_LENGTH_PENALTY} to {MAX_LENGTH_PENALTY}"
            )

    def override(self, *, num_beams: int = 0, max_new_tokens: int = 0, num_candidates: int = 0) -> "DecodeSettings":
        """These settings with the given values where they are not 0. Raises ValueError, naming the values that clash."""
        given = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "num_candidates": num_candidates}
        return replace(self, **{name: value for name, value in given.items() if value})


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptionResult:
    """The answer for one image: either caption or error_kind is set.

    score: mean log-probability of the generated tokens, the end token included. candidates: (caption, score) of the
    best beams, best first, if they were asked for; the first is the caption itself. error: one sentence.
    """

    caption: str | None
    score: float | None = None
    candidates: tuple[tuple[str, float], ...] = ()
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
    checkpoint, settings: fingerprints of what captioned it; verified: whether a raycap.json vouches for the checkpoint.
    """
    import pyarrow as pa

    candidate = pa.struct([("caption", pa.string()), ("score", pa.float32())])
    return pa.schema(
        [
            ("key", pa.string()),
            ("caption", pa.string()),
            ("score", pa.float32()),
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
