"""What a checkpoint says of its model: CheckpointSpec, and whether its parts fit each other. Reads no file."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from raycap.checkpoint.folder import shown
from raycap.errors import CheckpointError
from raycap.models import KINDS, ModelSizes, model_sizes
from raycap.schema import DecodeSettings, ImageSpec
from raycap.text import TextSpec, banned_ids, prompt_ids, required_ids

# The largest values that are built, each several times that of any published captioner: numbers beyond are damage.
LARGEST = {
    "hidden_size": 16_384,
    "encoder_hidden_size": 16_384,
    "intermediate_size": 65_536,
    "num_hidden_layers": 256,
    "num_attention_heads": 256,
    "vocab_size": 2_000_000,
    "max_position_embeddings": 65_536,
    "image_size": 4_096,
    "patch_size": 4_096,
    "projection_dim": 16_384,
    "embedding_size": 16_384,
    "n_embd": 16_384,
    "n_inner": 65_536,
    "n_layer": 256,
    "n_head": 256,
    "n_positions": 65_536,
    "prefix_length": 4_096,
    "clip_length": 4_096,
    "num_mapper_layers": 256,
    "num_mapper_heads": 256,
    "vgg_fc_size": 65_536,
}
HEADS = (("hidden_size", "num_attention_heads"), ("n_embd", "n_head"))  # a width, and what it is divided by


@dataclass(frozen=True, kw_only=True)
class CheckpointSpec:
    """Everything about a model but its weights.

    verified: read from a folder whose raycap.json vouches for every file. fingerprint: sha256 (hex) of the checkpoint,
    the same for every copy of the folder, whatever prompt it is opened with; "" of a model that was read from none.
    """

    kind: str
    model_config: dict[str, Any]
    tokenizer: Tokenizer
    text: TextSpec
    image: ImageSpec
    decode: DecodeSettings
    verified: bool = True
    fingerprint: str = ""
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def sizes(self) -> ModelSizes:
        return model_sizes(self.kind, self.model_config)

    @property
    def num_prompt_tokens(self) -> int:
        """Of the prompt, the first token of every text included."""
        return len(prompt_ids(self.tokenizer, self.text))

    @property
    def most_new_tokens(self) -> int | None:
        """The longest caption behind the prompt, in tokens; None for a model without a bound."""
        num_positions = self.sizes.num_positions
        # The last token that is generated is never read.
        return None if num_positions is None else num_positions + 1 - self.num_prompt_tokens

    def check_settings(self, settings: DecodeSettings) -> None:
        """Raises ValueError if captions of this length, behind this prompt, are longer than the model's texts, or too short for
        the words that they must hold; and for words that the tokenizer cannot spell.
        """
        most = self.most_new_tokens
        if most is not None and settings.max_new_tokens > most:
            num_prompt = self.num_prompt_tokens
            raise ValueError(
                f"max_new_tokens={settings.max_new_tokens} behind the prompt {shown(self.text.prompt)} (tokens with the first: {num_prompt}) "
                f"is more than the {most + num_prompt - 1} text tokens the model reads; give "
                + (f"at most {most}" if most > 0 else "a shorter prompt")
            )
        num_required = self.num_required_tokens(settings)
        if num_required > settings.max_new_tokens:
            raise ValueError(
                f"required_words are {settings.required_words!r}, which take {num_required} tokens, and max_new_tokens is "
                f"{settings.max_new_tokens}; raise it to {num_required} or leave words out"
            )

    def num_required_tokens(self, settings: DecodeSettings) -> int:
        """Of all required words, each said for itself. Raises ValueError for words that the tokenizer cannot spell."""
        banned = banned_ids(self.tokenizer, settings.banned_words)
        return sum(len(spellings[-1]) for spellings in required_ids(self.tokenizer, settings.required_words, banned))

    def settings(
        self,
        *,
        num_beams: int = 0,
        max_new_tokens: int = 0,
        num_candidates: int = 0,
        others: str = "",
        for_scorer: bool = False,
    ) -> DecodeSettings:
        """The checkpoint's own, with these values, see DecodeSettings.override. Raises ValueError if they do not fit the model, or
        leave a scorer nothing to choose from.
        """
        settings = self.decode.override(
            num_beams=num_beams, max_new_tokens=max_new_tokens, num_candidates=num_candidates, others=others
        )
        self.check_settings(settings)
        if for_scorer:
            settings.check_choice()
        return settings


def check_spec(spec: CheckpointSpec, source: str) -> None:
    """Raises CheckpointError if the model cannot be built, or its tokenizer and image size are not those of its config."""
    if spec.kind not in KINDS:
        raise CheckpointError(
            f"{source!r} holds a model of kind {shown(spec.kind)}; this raycap knows {', '.join(KINDS)}: install the one that wrote it"
        )
    for name, value in _sizes(spec.model_config, ""):
        largest = LARGEST[name.rpartition(".")[2]]
        if not isinstance(value, int) or not 1 <= value <= largest:
            raise CheckpointError(
                f"config.json of {source!r} asks for {name} = {shown(value)}, which is no number from 1 to {largest}; copy it again"
            )
    for name, part in {"": spec.model_config, **spec.model_config}.items():
        for width, heads in HEADS:
            if isinstance(part, dict) and {width, heads} <= part.keys() and part[width] % part[heads]:
                raise CheckpointError(
                    f"config.json of {source!r} divides {name}.{width} = {part[width]} by {heads} = {part[heads]}, which leaves a "
                    f"rest; copy it again"
                )
    try:
        sizes = spec.sizes
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"config.json of {source!r} lacks {error}; copy it again") from error
    roles = {"first": spec.text.bos_id, "end": spec.text.eos_id, "padding": spec.text.pad_id}
    for name, token_id in roles.items():
        if not isinstance(token_id, int) or not 0 <= token_id < sizes.vocab_size:
            raise CheckpointError(
                f"the {name} token of {source!r} has id {shown(token_id)}, outside its vocab_size = {sizes.vocab_size}; check its "
                f"config.json"
            )
    if spec.tokenizer.get_vocab_size() > sizes.vocab_size:
        raise CheckpointError(
            f"tokenizer.json of {source!r} has {spec.tokenizer.get_vocab_size()} tokens, its config.json a vocab_size of "
            f"{sizes.vocab_size}; check that both files are of the same model"
        )
    if spec.image.size != sizes.image_size or spec.image.size % sizes.patch_size:
        raise CheckpointError(
            f"{source!r} prepares images of {spec.image.size} pixels for a vision tower of {sizes.image_size} pixels in patches of "
            f"{sizes.patch_size}; check preprocessor_config.json and config.json"
        )


def _sizes(config: Mapping[str, Any], above: str) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every size in a config and its parts."""
    for key, value in config.items():
        if key in LARGEST:
            if value is not None or key != "n_inner":  # GPT-2's own default: four times its width
                yield above + key, value
        elif isinstance(value, dict):
            yield from _sizes(value, f"{above}{key}.")
