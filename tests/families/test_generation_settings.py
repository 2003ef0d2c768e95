"""What a published folder says of its search is followed as transformers follows it, and ours says all of it."""

import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import edit_json, png_images
from tiny_families import tiny_family, write_family
from transformers import AutoModelForImageTextToText, BlipForConditionalGeneration, VisionEncoderDecoderModel

from raycap.captioner import Captioner
from raycap.checkpoint import export_weights, open_checkpoint, save_checkpoint
from raycap.errors import CheckpointError
from raycap.image import decode_image, prepare_image
from raycap.schema import DecodeSettings

pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified")
GIVEN: tuple[dict[str, Any], ...] = (
    {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True, "max_length": 18},
    {"num_beams": 4, "length_penalty": -1, "no_repeat_ngram_size": 2, "max_new_tokens": 9},
    {"repetition_penalty": 1.7, "max_length": 16},
    {"min_length": 14, "max_length": 20},
    {"min_length": 30, "max_length": 18},
    {"min_new_tokens": 6, "max_new_tokens": 8, "max_length": 3},
    {"no_repeat_ngram_size": 1, "num_beams": 2, "early_stopping": "never"},
    {},
)


def written(folder: Path, family: str, given: dict[str, Any], where: str) -> Path:
    """A published folder that has these settings in one of the places that transformers looks into, and no others."""
    write_family(folder, family, sealed=False)
    roles = {
        name: i for name, i in json.loads((folder / "generation_config.json").read_text()).items() if "_id" in name
    }
    (folder / "generation_config.json").unlink()
    if where == "generation_config.json":
        (folder / where).write_text(json.dumps(given | roles))
    elif where == "config.json":
        edit_json(folder / where, lambda config: config.update(given))
    else:
        edit_json(folder / "config.json", lambda config: config[where].update(given))
    return folder


def by_transformers(folder: Path, family: str, **call: Any) -> list[str]:
    """Captions of plain transformers by its own defaults; call: what is given to generate() beside the images."""
    kinds = {"blip": BlipForConditionalGeneration, "vit_gpt2": VisionEncoderDecoderModel}
    code = {"trust_remote_code": True} if family == "clip_gpt2" else {}
    model: Any = kinds.get(family, AutoModelForImageTextToText).from_pretrained(folder, **code).eval()
    spec, _ = open_checkpoint(str(folder))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.image.mean, spec.image.std))
    pixels = [torch.tensor(prepare_image(decode_image(data), spec.image)) for data in png_images(8)]
    ids = model.generate(pixel_values=torch.stack([(image / 255 - mean) / std for image in pixels]), **call)
    return [" ".join(spec.tokenizer.decode(row.tolist(), skip_special_tokens=True).split()) for row in ids]


def by_raycap(folder: Path) -> list[str | None]:
    captioner = Captioner.load(str(folder))
    return [result.caption for result in captioner.caption(png_images(8), captioner.spec.decode)]


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize(
    ("family", "where"),
    [
        ("vit_gpt2", "generation_config.json"),
        ("vit_gpt2", "config.json"),
        ("vit_gpt2", "decoder"),
        ("clip_gpt2", "generation_config.json"),
    ],
)
def test_every_setting_is_followed_as_transformers_follows_it(
    tmp_path: Path, family: str, where: str, given: dict[str, Any]
) -> None:
    folder = written(tmp_path / "published", family, given, where)
    if given.get("min_length") == 30:  # transformers refuses it
        assert open_checkpoint(str(folder))[0].decode.min_new_tokens > 0
        return
    assert by_raycap(folder) == by_transformers(folder, family)


def test_the_top_of_a_config_comes_before_its_decoder(tmp_path: Path) -> None:
    folder = written(
        tmp_path / "published", "vit_gpt2", {"num_beams": 3, "max_length": 9, "repetition_penalty": 1.5}, "decoder"
    )
    edit_json(folder / "config.json", lambda config: config.update(num_beams=2, max_length=14))
    decode = open_checkpoint(str(folder))[0].decode
    assert decode == DecodeSettings(num_beams=2, max_new_tokens=13, repetition_penalty=1.5)
    assert by_raycap(folder) == by_transformers(folder, "vit_gpt2")


def test_a_prompt_counts_in_max_length(tmp_path: Path) -> None:
    folder = written(tmp_path / "published", "vit_gpt2", {"max_length": 12}, "config.json")
    assert open_checkpoint(str(folder))[0].decode.max_new_tokens == 11
    with_prompt, _ = open_checkpoint(str(folder), prompt="two dogs")
    assert with_prompt.decode.max_new_tokens == 12 - with_prompt.num_prompt_tokens
    with pytest.raises(
        CheckpointError, match=r"config.json of .* cannot be followed: max_length is 12, and \d+ tokens stand"
    ):
        open_checkpoint(str(folder), prompt="two dogs " * 8)


def test_an_end_token_of_the_generation_settings_ends_captions(tmp_path: Path) -> None:
    folder = written(tmp_path / "published", "vit_gpt2", {}, "generation_config.json")
    spec, _ = open_checkpoint(str(folder))
    word = spec.tokenizer.token_to_id("a")
    edit_json(folder / "generation_config.json", lambda content: content.update(eos_token_id=[word]))
    assert open_checkpoint(str(folder))[0].text.eos_id == word
    assert open_checkpoint(str(folder))[0].fingerprint != spec.fingerprint


def test_blip_follows_the_file_that_transformers_does_not_read_and_says_so(tmp_path: Path) -> None:
    given = {"num_beams": 3, "max_new_tokens": 9, "length_penalty": 2.0}
    folder = written(tmp_path / "published", "blip", given, "generation_config.json")
    with pytest.warns(UserWarning, match=r"is followed \(.*num_beams=3.*\); plain transformers reads none for BLIP"):
        ours = by_raycap(folder)
    assert ours == by_transformers(folder, "blip", **given)


def test_what_raycap_has_no_setting_for_is_named(tmp_path: Path) -> None:
    given = {
        "num_beams": 2,
        "forced_bos_token_id": 5,
        "diversity_penalty": 0.5,
        "typical_p": 1.0,
        "suppress_tokens": [],
        "top_k": 50,
    }
    folder = written(tmp_path / "published", "vit_gpt2", given, "generation_config.json")
    with pytest.warns(UserWarning, match="sets diversity_penalty, forced_bos_token_id, which raycap does not follow"):
        open_checkpoint(str(folder))
    edit_json(folder / "generation_config.json", lambda content: content.update(do_sample=True))
    with pytest.warns(UserWarning, match="do_sample with num_beams, which raycap does not follow"):
        assert not open_checkpoint(str(folder))[0].decode.do_sample
    edit_json(folder / "generation_config.json", lambda content: content.update(num_beams=1, temperature=2))
    with pytest.warns(UserWarning, match="sets diversity_penalty"):
        assert open_checkpoint(str(folder))[0].decode == DecodeSettings(do_sample=True, top_k=50, temperature=2.0)


def test_settings_that_mean_nothing_to_transformers_mean_nothing_here(tmp_path: Path) -> None:
    given = {"temperature": 0.3, "top_k": 7, "length_penalty": 3.0, "early_stopping": True, "max_length": 20}
    folder = written(tmp_path / "published", "vit_gpt2", given, "config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_checkpoint(str(folder))[0].decode == DecodeSettings(max_new_tokens=19, length_penalty=3.0)


EXPORTED = (
    DecodeSettings(max_new_tokens=9, num_beams=3, length_penalty=0.5, early_stopping=True, no_repeat_ngram_size=2),
    DecodeSettings(max_new_tokens=7, min_new_tokens=5, repetition_penalty=1.8),
    DecodeSettings(max_new_tokens=7, do_sample=True, temperature=0.7, top_k=9, top_p=0.8),
)


@pytest.mark.parametrize("family", ["vit_gpt2", "clip_gpt2", "blip"])
@pytest.mark.parametrize("settings", EXPORTED, ids=str)
def test_what_we_write_says_every_setting(tmp_path: Path, family: str, settings: DecodeSettings) -> None:
    spec, model = tiny_family(family)
    save_checkpoint(str(tmp_path / "saved"), export_weights(model), replace(spec, decode=settings), {"step": 1})
    (tmp_path / "saved" / "raycap.json").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert open_checkpoint(str(tmp_path / "saved"))[0].decode == settings


@pytest.mark.parametrize("prompt", ["", "a picture of "])
@pytest.mark.parametrize("family", ["blip", "vit_gpt2", "clip_gpt2"])
def test_the_call_on_the_card_gives_the_captions_that_we_give(tmp_path: Path, family: str, prompt: str) -> None:
    spec, model = tiny_family(family, prompt)
    settings = DecodeSettings(max_new_tokens=9, num_beams=3, length_penalty=0.5, repetition_penalty=1.2)
    folder = tmp_path / "saved"
    save_checkpoint(str(folder), export_weights(model), replace(spec, decode=settings), {"step": 1})
    (tmp_path / "photo.png").write_bytes(png_images(3)[2])
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    code = code.replace('folder = "."', f"folder = {str(folder)!r}").replace("photo.jpg", str(tmp_path / "photo.png"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    (result,) = Captioner.load(str(folder)).caption([(tmp_path / "photo.png").read_bytes()], settings)
    assert done.stdout.strip() == f"{prompt}{result.caption}".strip()


def test_the_card_says_that_transformers_counts_no_prompt_in_a_length(tmp_path: Path) -> None:
    spec, model = tiny_family("blip")
    settings = DecodeSettings(num_beams=3, length_counts_prompt=True)
    folder = tmp_path / "saved"
    save_checkpoint(str(folder), export_weights(model), replace(spec, decode=settings), {"step": 1})
    assert "transformers has no length_counts_prompt." in (folder / "README.md").read_text()
    assert "length_counts_prompt" not in (folder / "generation_config.json").read_text()
    assert open_checkpoint(str(folder))[0].decode == settings
