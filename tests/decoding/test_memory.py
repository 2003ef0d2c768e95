"""A batch that memory does not hold is captioned in parts: in a process whose address space is limited."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tiny import tiny_checkpoint

from raycap.checkpoint import export_weights, save_checkpoint
from raycap.models import build_model
from raycap.schema import ImageSpec

TESTS = Path(__file__).parents[1]
# The limit counts from what is mapped once everything has run on one image.
LIMITED = """
import json, resource, sys, warnings
import numpy as np, torch
from raycap.captioner import Captioner
from raycap.errors import UserError
from raycap.schema import DecodeSettings

torch.set_num_threads(1)
checkpoint, num_images, mib, num_beams = sys.argv[1], *map(int, sys.argv[2:])
captioner = Captioner.load(checkpoint)
settings = DecodeSettings(max_new_tokens=3, num_beams=num_beams)
fields = np.random.default_rng(0).integers(0, 256, (num_images, 3, 4, 4), np.uint8)
pixels = fields.repeat(96, axis=2).repeat(96, axis=3)
captioner.caption_prepared(pixels[:1], DecodeSettings(max_new_tokens=3, num_beams=4))
if mib:
    mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + mib * 2**20,) * 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        captions = [result.caption for result in captioner.caption_prepared(pixels, settings)]
        first = len(caught)
        assert not mib or captions == [result.caption for result in captioner.caption_prepared(pixels, settings)]
        later = [str(warning.message) for warning in caught[first:]]
        assert not any(message.startswith(f"{num_images} ") for message in later), "what does not fit is remembered"
    except UserError as error:
        captions = str(error)
print(json.dumps([captions, [str(warning.message) for warning in caught]]))
"""


def caption(
    checkpoint: Path, *, num_images: int, mib: int = 0, num_beams: int = 4
) -> tuple[list[str] | str, list[str]]:
    """Captions, or the error's sentence, and the warnings. mib: of memory beyond the first image's; 0 for no limit."""
    command = [sys.executable, "-c", LIMITED, str(checkpoint), *map(str, (num_images, mib, num_beams))]
    done = subprocess.run(command, cwd=TESTS.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    captions, warned = json.loads(done.stdout.splitlines()[-1])
    return captions, warned


def test_a_batch_that_does_not_fit_is_halved_until_it_does_and_says_the_same(tmp_path: Path) -> None:
    spec, _, _ = tiny_checkpoint()
    vision = spec.model_config["vision_config"] | {"image_size": 384}
    spec = replace(spec, image=ImageSpec(size=384), model_config=spec.model_config | {"vision_config": vision})
    torch.manual_seed(0)
    model = build_model("blip", spec.model_config)
    with torch.no_grad():  # as drawn, it says the same of every image
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    save_checkpoint(str(tmp_path / "c"), export_weights(model), spec, {})
    expected, warned = caption(tmp_path / "c", num_images=16)
    assert (len(set(expected)) > 1, warned) == (True, [])
    found, warned = caption(tmp_path / "c", num_images=16, mib=20)
    assert found == expected
    assert warned
    assert warned[0].startswith("16 images do not fit into the memory of device 'cpu', so 8 are captioned at once")
    refused, _ = caption(tmp_path / "c", num_images=2, mib=1, num_beams=1000)
    assert "does not hold the search of one image with max_new_tokens=3 num_beams=1000" in refused
