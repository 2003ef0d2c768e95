"""Peak memory above the weights of beam search with 5 beams, BLIP base at 384 pixels, 8 images: ours over transformers' generate().

`ratio` is ours / peer: smaller is better. From pixels to tokens; the figures with `decode_` are without the vision tower. Each
side runs in a process of its own, which holds its model alone and has captioned one image before. Then freed memory is given
back to the system (malloc_trim), the process's mark of its highest RSS is reset (5 into /proc/self/clear_refs, so Linux alone),
and the mark after the batch is read (VmHWM), minus the RSS before it. One thread; captions are asserted to be the same.
"""

import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tests.bench import blip_decode
from tests.bench.sides import same

NUM_BEAMS = 5
ROOT = Path(__file__).parents[2]


def measure() -> dict[str, Any]:
    runs = {(side, what): _run(side, what) for what in ("pixels", "states") for side in ("ours", "peer")}
    for what in ("pixels", "states"):
        same(runs["ours", what]["captions"], runs["peer", what]["captions"])
    mb = {key: run["peak_mb"] for key, run in runs.items()}
    return {
        "name": "decode_memory",
        "values": [mb["ours", "pixels"]],
        "peer": mb["peer", "pixels"],
        "unit": "MB",
        "ratio": round(mb["ours", "pixels"] / mb["peer", "pixels"], 3),
        "must": 0.5,
        "aim": 0.3,
        "identical": True,
        "decode_ours": mb["ours", "states"],
        "decode_peer": mb["peer", "states"],
        "decode_ratio": round(mb["ours", "states"] / mb["peer", "states"], 3),
        "held_before_ours": runs["ours", "pixels"]["before_mb"],
        "held_before_peer": runs["peer", "pixels"]["before_mb"],
    }


def _run(side: str, what: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.bench.decode_memory", side, what]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def _child(side: str, what: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    published = blip_decode.build_published()
    pixels = blip_decode.draw_pixels()
    states = torch.randn(blip_decode.NUM_IMAGES, 577, 768, generator=torch.Generator().manual_seed(1))
    inputs = pixels if what == "pixels" else states
    if side == "ours":
        ours = blip_decode.build_ours(published.state_dict())
        del published
        caption = blip_decode.our_captions_of if what == "pixels" else blip_decode.our_captions

        def run(num_images: int, num_beams: int) -> list[list[int]]:
            return caption(ours, inputs[:num_images], num_beams)
    else:
        generate = blip_decode.generated_captions_of if what == "pixels" else blip_decode.generated_captions

        def run(num_images: int, num_beams: int) -> list[list[int]]:
            return generate(published, inputs[:num_images], num_beams)

    run(1, 1)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_mb = _memory_mb("VmRSS")
    captions = run(len(inputs), NUM_BEAMS)
    peak_mb = _memory_mb("VmHWM") - before_mb
    return {"peak_mb": round(peak_mb, 1), "before_mb": round(before_mb, 1), "captions": captions}


def _memory_mb(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
