"""How captions are searched, as a folder in Hugging Face's layout says it: generation_config.json, written and read as transformers does."""

import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from raycap.checkpoint.folder import in_short, read_json, shown
from raycap.checkpoint.spec import CheckpointSpec
from raycap.errors import CheckpointError
from raycap.schema import DecodeSettings
from raycap.text import TextSpec

FILE = "generation_config.json"
SAMPLING_TOP_K = 50  # of transformers, where a folder samples and names no top_k
_SAME = ("max_new_tokens", "min_new_tokens", "num_beams", "repetition_penalty", "no_repeat_ngram_size")
_OF_BEAMS = ("length_penalty", "early_stopping")
_OF_SAMPLING = ("temperature", "top_k", "top_p")
_ROLES = {"decoder_start_token_id": "bos_id", "eos_token_id": "eos_id", "pad_token_id": "pad_id"}
_NOT_FOLLOWED = {  # what else changes captions in generate() -> the value that changes nothing; null never does
    "bad_words_ids": (),
    "begin_suppress_tokens": (),
    "diversity_penalty": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": (),
    "force_words_ids": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": 1,
    "min_p": 0,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0,
    "remove_invalid_values": False,
    "renormalize_logits": False,
    "sequence_bias": (),
    "stop_strings": (),
    "suppress_tokens": (),
    "top_h": (),
    "typical_p": 1,
}


def generation_config(spec: CheckpointSpec) -> dict[str, Any]:
    """generation_config.json of a checkpoint: every setting that transformers has too, where its search uses it."""
    settings = spec.decode
    content: dict[str, Any] = {
        "bos_token_id": spec.text.bos_id,
        "eos_token_id": spec.text.eos_id,
        "pad_token_id": spec.text.pad_id,
    }
    if spec.kind == "vision-encoder-decoder":
        content["decoder_start_token_id"] = spec.text.bos_id
    return content | generate_arguments(settings)


def generate_arguments(settings: DecodeSettings) -> dict[str, Any]:
    """The arguments with which transformers' generate() searches in this way. Left out is what it warns of as unused."""
    given: dict[str, Any] = {name: getattr(settings, name) for name in ("max_new_tokens", "num_beams", "do_sample")}
    if settings.min_new_tokens:
        given["min_new_tokens"] = settings.min_new_tokens
    if settings.num_beams > 1:
        given |= {name: getattr(settings, name) for name in _OF_BEAMS}
    if settings.do_sample:
        given |= {name: getattr(settings, name) for name in _OF_SAMPLING}
    neutral = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
    return given | {n: getattr(settings, n) for n, value in neutral.items() if getattr(settings, n) != value}


def read_generation(spec: CheckpointSpec, folder: Path, source: str) -> CheckpointSpec:
    """The spec of a published folder, with the search and the special tokens that transformers 5 takes from it.

    That is what generation_config.json says; without one, config.json, its decoder's part included. For BLIP transformers
    reads neither; raycap follows a generation_config.json, which somebody wrote for a reason, and says so. What raycap has no
    setting for is named in a warning. Raises CheckpointError for what cannot be followed.
    """
    has_file = (folder / FILE).exists()
    name = FILE if has_file else "config.json"
    if not has_file and spec.kind == "blip":
        return spec
    given = read_json(folder / FILE, source) if has_file else _of_config(read_json(folder / "config.json", source))
    given = {key: value for key, value in given.items() if value is not None}
    roles: dict[str, Any] = (
        {} if spec.kind == "blip" else {field: given[key] for key, field in _ROLES.items() if key in given}
    )
    ignored = [key for key, neutral in _NOT_FOLLOWED.items() if key in given and given[key] not in (neutral, [], {})]
    ignored += [key for key, field in _ROLES.items() if isinstance(roles.get(field), list) and len(roles[field]) != 1]
    roles = {field: value[0] if isinstance(value, list) else value for field, value in roles.items() if value != []}
    try:
        text = replace(spec.text, **{field: _whole(field, value) for field, value in roles.items()})
        settings = _settings(given, _num_counted(spec, text), ignored)
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{name} of {source!r} cannot be followed: {in_short(error)}; correct it there"
        ) from error
    if ignored:
        warnings.warn(f"{name} of {source!r} sets {', '.join(ignored)}, which raycap does not follow", stacklevel=2)
    if spec.kind == "blip" and settings != DecodeSettings():
        warnings.warn(
            f"{FILE} of {source!r} is followed ({settings}); plain transformers reads none for BLIP: give it these settings in the call",
            stacklevel=2,
        )
    return replace(spec, text=text, decode=settings)


def _of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What generate() finds in a config.json: what stands at its top, then what its decoder's part says."""
    part: dict[str, Any] = next(
        (config[name] for name in ("decoder", "text_config") if isinstance(config.get(name), dict)), {}
    )
    return {**part, **{name: value for name, value in config.items() if value is not None}}


def _num_counted(spec: CheckpointSpec, text: TextSpec) -> int:
    """Tokens in front of a caption that max_length and min_length count: prompt and first token, or visual tokens and prompt."""
    spec = replace(spec, text=text)
    prefix = spec.model_config["prefix_length"] - 1 if spec.kind == "clip_gpt2" else 0
    return spec.num_prompt_tokens + int(prefix)


def _settings(given: Mapping[str, Any], num_counted: int, ignored: list[str]) -> DecodeSettings:
    """The settings that generate() searches by. ignored: is told what they have no place for. Raises ValueError."""
    for name in ("max_new_tokens", "min_new_tokens", "max_length", "min_length", "num_beams", "top_k"):
        if name in given:
            _whole(name, given[name])
    chosen: dict[str, Any] = {name: given[name] for name in _SAME if name in given}
    if "max_new_tokens" not in given and "max_length" in given:
        chosen["max_new_tokens"] = given["max_length"] - num_counted
        if chosen["max_new_tokens"] < 1:
            raise ValueError(
                f"max_length is {given['max_length']}, and {num_counted} tokens stand in front of a caption already"
            )
    if "min_new_tokens" not in given and "min_length" in given:
        most = chosen.get("max_new_tokens", DecodeSettings().max_new_tokens)
        chosen["min_new_tokens"] = min(max(given["min_length"] - num_counted, 0), most)
    beams = _OF_BEAMS if given.get("num_beams", 1) > 1 else ("length_penalty",)
    chosen |= {name: given[name] for name in beams if name in given}
    if given.get("do_sample") and given.get("num_beams", 1) > 1:
        ignored.append("do_sample with num_beams")
    elif given.get("do_sample"):
        chosen |= {"do_sample": True, "top_k": SAMPLING_TOP_K}
        chosen |= {name: given[name] for name in _OF_SAMPLING if name in given}
    floats = {"length_penalty", "repetition_penalty", "temperature", "top_p"}
    for name in floats & chosen.keys():
        chosen[name] = float(chosen[name]) if type(chosen[name]) is int else chosen[name]
    return DecodeSettings(**chosen)


def _whole(name: str, value: Any) -> Any:
    if type(value) is not int:
        raise ValueError(f"{name} is {shown(value)}, which is no whole number")
    return value
