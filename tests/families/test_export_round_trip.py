"""A saved checkpoint says the same in plain transformers, where there is no raycap, and what that saves says the same here again."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import png_images, tiny_checkpoint
from tiny_families import TEXT, TOKENIZER, tiny_clip_gpt2_family, tiny_family, tiny_vit_gpt2_family
from tiny_gpt2 import tiny_vit_gpt2_pair
from torch import Tensor
from transformers import BlipConfig, BlipImageProcessorPil, VisionEncoderDecoderConfig, ViTImageProcessorPil

from raycap.captioner import Captioner
from raycap.checkpoint import (
    CheckpointSpec,
    export_weights,
    import_published,
    load_model,
    open_checkpoint,
    save_checkpoint,
)
from raycap.models import TIED_NAMES, CaptionModel
from raycap.text import save_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified")

PROMPT = "a picture of "
NUM_IMAGES, NUM_BEAMS, MAX_NEW_TOKENS = 6, 3, 12
CASES = {
    "blip": lambda: tiny_family("blip"),
    "blip with a prompt": lambda: tiny_family("blip", PROMPT),
    "vit_gpt2": lambda: tiny_vit_gpt2_family(),
    "vit_gpt2 without a pooler": lambda: tiny_vit_gpt2_family(pooler=False),
    "clip_gpt2 clip linear_tanh": lambda: tiny_clip_gpt2_family("clip_vision_model", "linear_tanh"),
    "clip_gpt2 clip mlp with a prompt": lambda: tiny_clip_gpt2_family("clip_vision_model", "mlp", prompt=PROMPT),
    "clip_gpt2 clip transformer": lambda: tiny_clip_gpt2_family("clip_vision_model", "transformer"),
    "clip_gpt2 vit mlp": lambda: tiny_clip_gpt2_family("vit", "mlp"),
    "clip_gpt2 siglip mlp": lambda: tiny_clip_gpt2_family("siglip_vision_model", "mlp", normalize_prefix=True),
    "clip_gpt2 dinov2 transformer": lambda: tiny_clip_gpt2_family("dinov2", "transformer"),
}
SCRIPT = """
import json, sys

class NoRaycap:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "raycap":
            raise ImportError("there is no raycap here")

sys.meta_path.insert(0, NoRaycap())
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BlipForConditionalGeneration,
    BlipProcessor,
    VisionEncoderDecoderModel,
    pipeline,
)
torch.set_num_threads(1)

root, cases, num_images, num_beams, max_new_tokens = json.loads(sys.argv[1])
images = [Image.open(f"{root}/{n}.png").convert("RGB") for n in range(num_images)]


def load(folder):
    if "clip_gpt2" in folder:
        model, loading = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        return model, loading, [AutoProcessor.from_pretrained(folder, trust_remote_code=True)]
    if "vit_gpt2" in folder:
        model, loading = VisionEncoderDecoderModel.from_pretrained(folder, output_loading_info=True)
        return model, loading, [AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)]
    model, loading = BlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    return model, loading, [BlipProcessor.from_pretrained(folder)]


for case, (prompt, text_ids) in cases.items():
    folder = f"{root}/{case}"
    model, loading, processors = load(folder)
    model.eval()
    text = {"text": [prompt] * num_images} if prompt else {}
    inputs = processors[0](images, return_tensors="pt", **text)
    ids = torch.tensor(text_ids).expand(num_images, -1)
    text = {"decoder_input_ids": ids} if "vit_gpt2" in case else {"input_ids": ids}
    with torch.no_grad():
        logits = model(pixel_values=inputs["pixel_values"], **text).logits
    captions = {}
    for beams in (1, num_beams):
        output = model.generate(**inputs, num_beams=beams, max_new_tokens=max_new_tokens, do_sample=False)
        texts = processors[-1].batch_decode(output, skip_special_tokens=True)
        captions[beams] = [text.removeprefix(prompt.strip()).strip() for text in texts]
    if "clip_gpt2" in case:
        pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
        said = pipe(images, text=[prompt] * num_images, generate_kwargs={"max_new_tokens": max_new_tokens})
        captions["pipeline"] = [answer["generated_text"].removeprefix(prompt.strip()).strip() for answer in said]
    for part in (model, *processors):
        part.save_pretrained(f"{folder} back")
    save_file({"pixel_values": inputs["pixel_values"], "logits": logits.contiguous()}, f"{folder}.safetensors")
    loading = {name: sorted(map(str, found)) for name, found in loading.items()}
    with open(f"{folder}.json", "w") as file:
        json.dump({"loading": loading, "captions": captions}, file)
assert not [name for name in sys.modules if name.partition(".")[0] == "raycap"]
"""


@dataclass
class Export:
    """A checkpoint of ours, and what plain transformers read, computed and said of its folder, and saved in another."""

    spec: CheckpointSpec
    model: CaptionModel
    folder: Path
    back: Path
    tensors: dict[str, Tensor]
    found: dict[str, Any]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root = tmp_path_factory.mktemp("exports")
    for n, data in enumerate(png_images(NUM_IMAGES)):
        (root / f"{n}.png").write_bytes(data)
    families = {case: build() for case, build in CASES.items()}
    for case, (spec, model) in families.items():
        save_checkpoint(str(root / case), export_weights(model), spec, {})
    given = {case: (spec.text.prompt, text_ids(spec)) for case, (spec, _) in families.items()}
    run_alone(SCRIPT, json.dumps([str(root), given, NUM_IMAGES, NUM_BEAMS, MAX_NEW_TOKENS]), root)
    return {
        case: Export(
            spec=spec,
            model=model,
            folder=root / case,
            back=root / f"{case} back",
            tensors=load_file(root / f"{case}.safetensors"),
            found=json.loads((root / f"{case}.json").read_text()),
        )
        for case, (spec, model) in families.items()
    }


def text_ids(spec: CheckpointSpec) -> list[int]:
    """A whole text: its logits are compared."""
    return [spec.text.bos_id, *TOKENIZER.encode("two red dogs under a kite", add_special_tokens=False).ids]


def run_alone(script: str, argument: str, folder: Path) -> None:
    """In a fresh process that finds nothing but what is installed."""
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, argument],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def logits_of(model: CaptionModel, spec: CheckpointSpec, pixel_values: Tensor) -> Tensor:
    ids = torch.tensor(text_ids(spec))
    state = model.start(model.encode_image(pixel_values), ids[:1])
    return torch.stack([model.step(state, token.expand(len(pixel_values))) for token in ids], dim=1)


def captions_of(captioner: Captioner, folder: Path, num_beams: int) -> list[str]:
    images = [(folder.parent / f"{n}.png").read_bytes() for n in range(NUM_IMAGES)]
    settings = replace(captioner.spec.decode, num_beams=num_beams, max_new_tokens=MAX_NEW_TOKENS)
    # Random weights may begin with the inner piece of a word, which transformers glues to the prompt.
    return [(result.caption or "").removeprefix("##") for result in captioner.caption(images, settings)]


def assert_close(ours_NLV: Tensor, theirs_NLV: Tensor) -> None:
    assert ours_NLV.std() > 0.1
    assert (ours_NLV - theirs_NLV).abs().max() < 1e-5 * theirs_NLV.abs().max()


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_loads_every_weight_and_computes_our_logits(exports: dict[str, Export], case: str) -> None:
    export = exports[case]
    not_found = {name for names in export.found["loading"].values() for name in names}
    # transformers always builds a pooler, and never reads it.
    assert {"pooler" in name for name in not_found} == ({True} if case.endswith("without a pooler") else set())
    pixel_values = export.tensors["pixel_values"]
    assert_close(logits_of(export.model, export.spec, pixel_values), export.tensors["logits"])


@pytest.mark.parametrize("case", CASES)
def test_plain_transformers_says_the_captions_of_our_captioner(exports: dict[str, Export], case: str) -> None:
    export = exports[case]
    captioner = Captioner.load(export.folder)
    assert captioner.verified
    said = export.found["captions"]
    greedy, beams = (captions_of(captioner, export.folder, n) for n in (1, NUM_BEAMS))
    assert [c.removeprefix("##") for c in said["1"]] == greedy
    assert [c.removeprefix("##") for c in said[str(NUM_BEAMS)]] == beams
    assert [c.removeprefix("##") for c in said.get("pipeline", greedy)] == greedy
    assert len(set(greedy)) > 2
    assert greedy != beams


@pytest.mark.parametrize("case", CASES)
def test_what_plain_transformers_saves_again_is_ours_again(exports: dict[str, Export], case: str) -> None:
    export = exports[case]
    assert not (export.back / "raycap.json").exists()
    captioner = Captioner.load(export.back, prompt=export.spec.text.prompt)
    assert not captioner.verified
    assert captioner.spec.image == export.spec.image
    pixel_values = export.tensors["pixel_values"]
    # Not the captioner's own model, which does not take normalised pixels.
    model = load_model(*open_checkpoint(str(export.back)), str(export.back)).eval()
    assert_close(logits_of(model, export.spec, pixel_values), export.tensors["logits"])
    sealed = Captioner.load(export.folder)
    for num_beams in (1, NUM_BEAMS):
        assert captions_of(captioner, export.folder, num_beams) == captions_of(sealed, export.folder, num_beams)


# ---- and the other way round: a folder of transformers that only passes through here


@pytest.mark.parametrize("family", ["blip", "vit_gpt2", "vit_gpt2 without a pooler"])
def test_a_folder_of_transformers_is_written_back_with_the_same_configuration_and_bits(
    family: str, tmp_path: Path
) -> None:
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    if family == "blip":
        published, kind = tiny_checkpoint()[2], BlipConfig
    else:
        pooler = family == "vit_gpt2"
        published, kind = (
            tiny_vit_gpt2_pair(pooler=pooler, vocab_size=TOKENIZER.get_vocab_size())[1],
            VisionEncoderDecoderConfig,
        )
    published.save_pretrained(theirs)
    save_tokenizer(TOKENIZER, TEXT, str(theirs))
    processor = BlipImageProcessorPil if family == "blip" else ViTImageProcessorPil
    processor(size={"height": 32, "width": 32}).save_pretrained(theirs)

    spec, weights = import_published(str(theirs), prompt="", max_tokens=20)
    model = load_model(spec, weights, "it")
    for given in (weights, export_weights(model)):  # as they were read, and as a model holds them
        save_checkpoint(str(back), given, spec, {})
        before, after = load_file(theirs / "model.safetensors"), load_file(back / "model.safetensors")
        twice = TIED_NAMES["blip"].keys() - before.keys() if family == "blip" else set()  # for older versions
        assert after.keys() == before.keys() | twice
        assert len(before) < len(published.state_dict())  # the tied head is there once
        assert {tensor.dtype for tensor in after.values()} == {torch.float32}
        assert all(torch.equal(after[name].view(torch.int32), before[name].view(torch.int32)) for name in before)
    configs = [kind.from_pretrained(folder).to_dict() for folder in (theirs, back)]
    for config in configs:  # whether there is a pooler is no field of transformers' own; raycap notes it
        config.get("encoder", {}).pop("add_pooling_layer", None)
    assert configs[0] == configs[1]
