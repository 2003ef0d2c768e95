"""Our CLIP-GPT2 in plain transformers: a folder with our weights and the exported modules, where there is no raycap."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import png_images
from tiny_clip_gpt2 import images, tiny_clip_gpt2, tiny_config
from torch import Tensor

from raycap.checkpoint import export_weights
from raycap.decoding import search
from raycap.models import hub
from raycap.models.clip_gpt2 import ClipGpt2
from raycap.schema import DecodeSettings
from raycap.text import TextSpec, decode, prompt_ids, save_tokenizer, text_spec, train_wordpiece

torch.set_num_threads(1)

TOKENIZER = train_wordpiece(["a picture of two dogs and one red cat on the hill", "under a big blue kite, then we saw"])
CASES = {  # each tower, mapper and option once
    "clip": {"tower": "clip_vision_model", "mapper": "transformer"},
    "vit": {"tower": "vit", "mapper": "mlp"},
    "siglip": {"tower": "siglip_vision_model", "mapper": "linear_tanh", "normalize_prefix": True},
    "dinov2": {"tower": "dinov2", "mapper": "mlp", "freeze_text": "all"},
}
PROMPTS = ["", "a picture of", "two dogs"]
SCRIPT = """
import json, sys
sys.modules["raycap"] = None  # an import of it fails
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
torch.set_num_threads(1)

root, cases, prompts = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
pictures = [Image.open(f"{root}/{n}.png").convert("RGB") for n in range(3)]
for case in cases:
    folder = f"{root}/{case}"
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model.eval()
    captions = {}
    with torch.no_grad():
        inputs = processor(images=pictures, text=prompts[1], return_tensors="pt")
        output = model(**inputs, labels=inputs["input_ids"])
        for prompt in prompts:
            batch = processor(images=pictures, text=prompt, return_tensors="pt")
            captions[prompt] = processor.batch_decode(model.generate(**batch), skip_special_tokens=True)
        mixed = processor(images=pictures, text=prompts, return_tensors="pt")
        captions["mixed"] = processor.batch_decode(model.generate(**mixed), skip_special_tokens=True)
        captions["nothing but images"] = processor.batch_decode(
            model.generate(**processor(images=pictures, return_tensors="pt")), skip_special_tokens=True
        )
        captions["beams"] = processor.batch_decode(
            model.generate(**batch, num_beams=3, num_return_sequences=3), skip_special_tokens=True
        )
    pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
    said = {
        "one": pipe(pictures[0], text=""),
        "batch": pipe(pictures, text=["", "", ""]),
        "prompt": pipe(pictures[0], text=prompts[1]),
    }
    save_file(
        {"pixel_values": inputs["pixel_values"], "input_ids": inputs["input_ids"], "logits": output.logits.contiguous(), "loss": output.loss},
        f"{root}/{case}.safetensors",
    )
    loading = {name: sorted(map(str, found)) for name, found in loading.items()}
    with open(f"{root}/{case}.json", "w") as file:
        json.dump({"loading": loading, "captions": captions, "pipeline": said, "module": type(model).__module__}, file)
"""


@dataclass
class Export:
    """One of ours, the folder it was written to, and what plain transformers read and said there."""

    ours: ClipGpt2
    text: TextSpec
    folder: Path
    tensors: dict[str, Tensor]
    found: dict[str, Any]

    def captions(self, prompt: str, pixel_values: Tensor, num_beams: int = 1) -> list[str]:
        """By ours, with the prompt in front; all beams of an image, one after the other."""
        ids = prompt_ids(TOKENIZER, TextSpec(**{**_fields(self.text), "prompt": prompt}))
        settings = DecodeSettings(max_new_tokens=10, num_beams=num_beams)
        state = self.ours.encode_image(pixel_values)
        found = search(self.ours, state, torch.tensor(ids), eos_id=self.text.eos_id, settings=settings)
        return [decode(TOKENIZER, [*ids, *beam.ids]) for image in found for beam in image]


def _fields(spec: TextSpec) -> dict[str, Any]:
    return {name: getattr(spec, name) for name in TextSpec.__dataclass_fields__}


def write_export(folder: Path, ours: ClipGpt2, config: dict[str, Any], text: TextSpec) -> None:
    """A folder that plain transformers loads: what a checkpoint of this kind has to hold."""
    folder.mkdir()
    for name, content in hub.module_texts().items():
        (folder / name).write_text(content)
    save_file(export_weights(ours), folder / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(TOKENIZER, text, str(folder))
    image = {
        "image_processor_type": "BlipImageProcessor",
        "processor_class": hub.PROCESSOR,
        "size": {"height": 32, "width": 32},
        "resample": 3,
    }
    files = {
        "config.json": config | {"architectures": [hub.ARCHITECTURE], "auto_map": hub.CONFIG_AUTO_MAP},
        "generation_config.json": {
            "bos_token_id": text.bos_id,
            "eos_token_id": text.eos_id,
            "pad_token_id": text.pad_id,
            "max_new_tokens": 10,
        },
        "preprocessor_config.json": image,
        "processor_config.json": {
            "processor_class": hub.PROCESSOR,
            "auto_map": hub.PROCESSOR_AUTO_MAP,
            "image_processor": image,
        },
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def build(case: str) -> tuple[ClipGpt2, dict[str, Any], TextSpec]:
    text = text_spec(TOKENIZER)
    roles = {"bos_token_id": text.bos_id, "eos_token_id": text.eos_id, "pad_token_id": text.pad_id}
    changes = {"text_config": {"vocab_size": TOKENIZER.get_vocab_size(), **roles}, **CASES[case]}
    return tiny_clip_gpt2(seed=1, **changes), tiny_config(**changes), text


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Export]:
    root = tmp_path_factory.mktemp("hub")
    for n, data in enumerate(png_images(3)):
        (root / f"{n}.png").write_bytes(data)
    models = {case: build(case) for case in CASES}
    for case, (ours, config, text) in models.items():
        write_export(root / case, ours, config, text)
    run_without_raycap([str(root), json.dumps(list(CASES)), json.dumps(PROMPTS)], root)
    return {
        case: Export(
            ours=ours,
            text=text,
            folder=root / case,
            tensors=load_file(root / f"{case}.safetensors"),
            found=json.loads((root / f"{case}.json").read_text()),
        )
        for case, (ours, _, text) in models.items()
    }


def run_without_raycap(arguments: Sequence[str], folder: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("case", CASES)
def test_our_weights_load_into_plain_transformers_with_the_same_logits_and_loss(
    exports: dict[str, Export], case: str
) -> None:
    export = exports[case]
    assert export.found["module"].startswith("transformers_modules.")
    assert not any(export.found["loading"].values())  # no missing, unexpected or mismatched name
    pixel_values, input_ids = export.tensors["pixel_values"], export.tensors["input_ids"]
    state = export.ours.start(export.ours.encode_image(pixel_values), input_ids[0, :1])
    logits_NLV = torch.stack([export.ours.step(state, input_ids[:, i]) for i in range(input_ids.shape[1])], dim=1)
    expected_NLV = export.tensors["logits"]
    assert input_ids[0].tolist() == prompt_ids(TOKENIZER, text_spec(TOKENIZER, prompt=PROMPTS[1]))
    assert (logits_NLV - expected_NLV).abs().max() < 1e-5 * expected_NLV.abs().max()

    labels = torch.where(torch.arange(input_ids.shape[1]) > 0, input_ids, -100)
    loss_sum, num_targets = export.ours(pixel_values, input_ids, labels)
    assert float((loss_sum / num_targets).detach()) == pytest.approx(float(export.tensors["loss"]), rel=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_captions_of_plain_transformers_are_ours(exports: dict[str, Export], case: str) -> None:
    export = exports[case]
    pixel_values, captions = export.tensors["pixel_values"], export.found["captions"]
    for prompt in PROMPTS:
        assert captions[prompt] == export.captions(prompt, pixel_values)
    assert captions["nothing but images"] == captions[""]
    assert captions["mixed"] == [captions[prompt][n] for n, prompt in enumerate(PROMPTS)]  # padded on the left
    assert captions["beams"] == export.captions(PROMPTS[-1], pixel_values, num_beams=3)
    assert len(set(captions[""])) > 1


@pytest.mark.parametrize("case", CASES)
def test_the_pipeline_of_plain_transformers_says_our_captions(exports: dict[str, Export], case: str) -> None:
    export = exports[case]
    said, captions = export.found["pipeline"], export.found["captions"]
    assert [answer["generated_text"].strip() for answer in said["batch"]] == captions[""]
    assert said["one"] == [{"input_text": "", "generated_text": said["batch"][0]["generated_text"]}]
    assert said["prompt"][0]["generated_text"] == captions[PROMPTS[1]][0]


def test_the_exported_modules_name_nothing_of_raycap_and_only_each_other() -> None:
    texts = hub.module_texts()
    for content in texts.values():
        lines = [line.strip() for line in content.splitlines()]
        imports = [line for line in lines if line.startswith(("import ", "from ")) and " import" in f" {line}"]
        assert imports
        assert not any("raycap" in line for line in imports)
        own = [line.split()[1] for line in imports if line.startswith("from .")]
        assert all(f"{name.removeprefix('.')}.py" in texts for name in own)


def test_where_raycap_is_registered_the_folder_loads_without_trust_in_its_code(exports: dict[str, Export]) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    export = exports["clip"]
    model = AutoModelForImageTextToText.from_pretrained(export.folder).eval()
    processor = AutoProcessor.from_pretrained(export.folder)
    assert type(model).__module__ == "raycap.models.hub.modeling_clip_gpt2"
    assert type(processor).__module__ == "raycap.models.hub.processing_clip_gpt2"
    picture = Image.open(export.folder.parent / "0.png").convert("RGB")
    generated = model.generate(**processor(picture, "", return_tensors="pt"))
    assert processor.batch_decode(generated, skip_special_tokens=True) == export.found["captions"][""][:1]


@pytest.mark.parametrize("mapper", ["transformer", "mlp"])
def test_what_plain_transformers_saves_loads_into_ours(mapper: str, tmp_path: Path) -> None:
    from raycap.models.hub.configuration_clip_gpt2 import ClipGpt2Config
    from raycap.models.hub.modeling_clip_gpt2 import ClipGpt2ForConditionalGeneration

    torch.manual_seed(0)
    fresh = ClipGpt2ForConditionalGeneration(ClipGpt2Config(**tiny_config(mapper))).eval()
    fresh.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "clip_gpt2"
    ours = ClipGpt2(config).eval()
    found = ours.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert found.unexpected_keys == []
    assert set(found.missing_keys) == {"gpt.lm_head.weight"}  # tied

    input_ids = torch.randint(4, 58, (2, 6))
    loss_sum, num_targets = ours(images(2), input_ids, input_ids)
    expected = fresh(images(2), input_ids, labels=input_ids).loss
    assert float((loss_sum / num_targets).detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    if mapper == "transformer":
        constant, weight = (fresh.clip_project.get_parameter(n).detach() for n in ("prefix_const", "linear.weight"))
        assert float(constant.std()) == pytest.approx(1, abs=0.2)  # drawn as ours: by torch, not by transformers
        assert float(weight.abs().max()) == pytest.approx(24**-0.5, rel=0.01)
