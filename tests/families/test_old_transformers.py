"""Our BLIP and ViT-GPT2 folders in old versions of transformers, and theirs here: each version in an environment of its own.

An environment is a new one whose torch is this one's, so that it is made in seconds. Where a version cannot be installed its test skips.
"""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch
from test_untied_words import untie
from tiny import png_images
from tiny_families import write_family

from raycap.captioner import Captioner
from raycap.checkpoint import SEAL, export_weights, load_model, open_checkpoint, save_checkpoint
from raycap.image import decode_image, prepare_image
from raycap.schema import DecodeSettings

pytestmark = pytest.mark.filterwarnings("ignore:.* is unverified")
VERSIONS = ("4.26.1", "4.36.2", "4.51.3", "4.57.6")
NUM_IMAGES = 20
SETTINGS = DecodeSettings(max_new_tokens=12)
SCRIPT = """
import json, sys
import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BlipForConditionalGeneration, VisionEncoderDecoderModel

torch.manual_seed(0)
root, family, num_steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
kind = {"blip": BlipForConditionalGeneration, "vit_gpt2": VisionEncoderDecoderModel}[family]
model = kind.from_pretrained(f"{root}/{family}")
pixel_values = torch.tensor(np.load(f"{root}/{family}.npy"))
if num_steps:  # fine-tunes, and saves what came out
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    vocab_size = model.get_output_embeddings().weight.shape[0] if family == "vit_gpt2" else model.config.text_config.vocab_size
    for step in range(num_steps):
        ids = torch.randint(5, vocab_size - 2, (len(pixel_values), 6), generator=torch.Generator().manual_seed(step % 2))
        inputs = {"labels": ids} | ({"input_ids": ids} if family == "blip" else {})
        loss = model(pixel_values=pixel_values, **inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.config.save_pretrained(f"{root}/{family}")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # 4.26 cannot write shared ones itself
    save_file(state, f"{root}/{family}/model.safetensors", metadata={"format": "pt"})
model.eval()
ids = model.generate(pixel_values=pixel_values, max_new_tokens=12, num_beams=1, do_sample=False)
print(json.dumps(ids.tolist()))
"""


@pytest.fixture(scope="session", params=VERSIONS)
def old_python(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The interpreter of an environment with this version of transformers."""
    folder = tmp_path_factory.mktemp(f"transformers-{request.param}")
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(site)]
    done = subprocess.run(
        [*install, f"transformers=={request.param}", "numpy<2"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        pytest.skip(f"transformers {request.param} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    (site / "zz_torch.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")  # after its own packages
    return str(folder / "bin" / "python")


def captions_in(python: str, root: Path, family: str, num_steps: int = 0) -> list[str]:
    spec, _ = open_checkpoint(str(root / family))
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (spec.image.mean, spec.image.std))
    images = [prepare_image(decode_image(data), spec.image) for data in png_images(NUM_IMAGES)]
    np.save(
        root / f"{family}.npy",
        np.stack([(image / np.float32(255) - mean) / std for image in images]).astype(np.float32),
    )
    command = [python, "-c", SCRIPT, str(root), family, str(num_steps)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = json.loads(done.stdout.strip().splitlines()[-1])
    return [" ".join(spec.tokenizer.decode(row, skip_special_tokens=True).split()) for row in ids]


def captions_here(root: Path, family: str) -> list[str | None]:
    return [r.caption for r in Captioner.load(str(root / family)).caption(png_images(NUM_IMAGES), SETTINGS)]


def test_old_versions_say_what_we_say(old_python: str, tmp_path: Path) -> None:
    for family in ("blip", "vit_gpt2"):
        write_family(tmp_path / family, family)
        assert captions_in(old_python, tmp_path, family) == captions_here(tmp_path, family)


def test_old_versions_find_an_output_layer_of_its_own_where_we_write_it(old_python: str, tmp_path: Path) -> None:
    for family in ("blip", "vit_gpt2"):
        folder = write_family(tmp_path / f"{family}_tied", family, sealed=False)
        tied = captions_here(tmp_path, folder.name)
        untie(folder)
        spec, weights = open_checkpoint(str(folder))
        save_checkpoint(str(tmp_path / family), export_weights(load_model(spec, weights, "x")), spec, {"step": 1})
        ours = captions_here(tmp_path, family)
        assert captions_in(old_python, tmp_path, family) == ours
        assert ours != tied


def test_we_say_what_old_versions_say_of_what_they_trained(old_python: str, tmp_path: Path) -> None:
    for family in ("blip", "vit_gpt2"):
        (write_family(tmp_path / family, family) / SEAL).unlink()
        before = captions_here(tmp_path, family)
        theirs = captions_in(old_python, tmp_path, family, num_steps=40)
        assert captions_here(tmp_path, family) == theirs
        assert theirs != before
        assert len(set(theirs)) > 1 or family == "vit_gpt2"
        assert torch.isfinite(next(iter(open_checkpoint(str(tmp_path / family))[1].values()))).all()
