"""Where raycap.models is imported, a CLIP-GPT2 folder loads in transformers without trust in its code, whatever was imported first."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_families import write_family

OPEN = """
import os, sys
from pathlib import Path

def check(folder):
    from PIL import Image
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

    AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    fresh = AutoModelForImageTextToText.from_config(config)
    processor = AutoProcessor.from_pretrained(folder)
    pipe = pipeline("image-text-to-text", model=folder)
    parts = (config, model, fresh, processor, pipe.model, pipe.processor)
    assert {type(part).__module__.rpartition(".")[0] for part in parts} == {"raycap.models.hub"}, parts
    assert type(model) is type(fresh) is type(pipe.model)
    image = Image.new("RGB", (40, 30), "red")
    output = model.generate(**processor(image, "", return_tensors="pt"))
    (said,) = processor.batch_decode(output, skip_special_tokens=True)
    assert pipe(image, text="")[0]["generated_text"] == said != ""
    assert not [name for name in sys.modules if name.startswith("transformers_modules")]
    assert not os.path.exists(os.environ["HF_MODULES_CACHE"] + "/transformers_modules")

"""
ORDERS = {
    "transformers first": (
        "from transformers import AutoModelForImageTextToText, AutoProcessor; import raycap.models; check(sys.argv[1])"
    ),
    "raycap.models first": "import raycap.models; assert 'transformers' not in sys.modules; check(sys.argv[1])",
    "our model first": (
        "import raycap.models.hub.modeling_clip_gpt2, raycap.models.hub.processing_clip_gpt2; check(sys.argv[1])"
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("clip_gpt2") / "checkpoint", "clip_gpt2")


def run(code: str, folder: Path) -> None:
    environment = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
        input="n\n",  # transformers asks for trust, where it needs any
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.parametrize("order", ORDERS)
def test_a_folder_loads_without_trust_in_its_code(order: str, folder: Path) -> None:
    run(OPEN + ORDERS[order], folder)


def test_each_auto_class_by_itself_is_enough(folder: Path) -> None:
    run(
        "import sys, raycap.models; from transformers import AutoConfig\n"
        "assert type(AutoConfig.from_pretrained(sys.argv[1])) is type(AutoConfig.for_model('clip_gpt2'))\n"
        "assert AutoConfig.for_model('clip_gpt2', prefix_length=3).prefix_length == 3",
        folder,
    )
    run(
        "import sys, raycap.models; from transformers import AutoProcessor\n"
        "assert AutoProcessor.from_pretrained(sys.argv[1]).__module__ == 'raycap.models.hub.processing_clip_gpt2'",
        folder,
    )


def test_no_other_model_waits_for_the_code_of_this_one(folder: Path) -> None:
    run(
        "import sys, raycap.models\n"
        "assert not [name for name in sys.modules if name.startswith('transformers')]\n"
        "from transformers import BlipConfig, VisionEncoderDecoderConfig\n"
        "assert 'raycap.models.hub.modeling_clip_gpt2' not in sys.modules\n"
        "assert 'transformers.modeling_utils' not in sys.modules",
        folder,
    )
