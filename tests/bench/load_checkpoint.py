"""Seconds and memory until a checkpoint of BLIP base is a model: ours against transformers' from_pretrained, same folder.

224 million parameters in float32, 0.9 GB in the page cache. Each loading has a process of its own; imports are done before.
from_pretrained maps the file: it returns before a weight was read, checks no byte, and its parameters follow the file until
they are written to. Ours reads the file once, checks its sha256 and its values, and needs the file no more. So a model counts
as loaded when every weight was read once (a sum of each tensor, one thread); until the call returns is told apart, and so is
from_pretrained(disable_mmap=True), which like ours holds the weights in memory of its own.

Memory is the peak of resident memory (VmHWM) over what the imports left, up to the same moment; the mapped pages of the file
that the peer has read are in it, although the kernel could drop them. Private (anonymous) memory is told apart.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
ROUNDS = 5

PROGRAM = """
import json, sys, time
import torch
from transformers import BlipConfig, BlipForConditionalGeneration
from raycap.checkpoint import load_checkpoint, load_model

def ours(folder):
    spec, weights = load_checkpoint(folder)
    return load_model(spec, weights, folder)

def memory():
    lines = open("/proc/self/status").read().splitlines()
    return {key: int(rest.split()[0]) / 1e3 for key, _, rest in (l.partition(":") for l in lines) if "kB" in rest}

load = {
    "ours": ours,
    "mapped": BlipForConditionalGeneration.from_pretrained,
    "private": lambda folder: BlipForConditionalGeneration.from_pretrained(folder, disable_mmap=True),
}[sys.argv[1]]
torch.set_num_threads(1)
open("/proc/self/clear_refs", "w").write("5")  # VmHWM counts from here
before = memory()
begun, begun_cpu = time.perf_counter(), time.process_time()
model = load(sys.argv[2])
returned_s = time.perf_counter() - begun
with torch.no_grad():
    total = sum(float(parameter.sum()) for parameter in model.parameters())
loaded_s, cpu_s = time.perf_counter() - begun, time.process_time() - begun_cpu
after = memory()
print(json.dumps({
    "loaded_s": loaded_s, "returned_s": returned_s, "cpu_s": cpu_s, "total": total,
    "peak_mb": after["VmHWM"] - before["VmRSS"], "private_mb": after["RssAnon"] - before["RssAnon"],
}))
"""


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as parent:
        folder = f"{parent}/checkpoint"
        # In a process of its own: where the file was written, memory is in pieces.
        subprocess.run([sys.executable, __file__, folder], cwd=ROOT, check=True)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "mapped": [], "private": []}
        for number in range(ROUNDS + 1):
            for name in runs:
                command = [sys.executable, "-c", PROGRAM, name, folder]
                # The line is the last one; transformers draws its progress before.
                done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
                if number:  # the first round warms up
                    runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    assert len({run["total"] for name in runs for run in runs[name]}) == 1, "the weights differ"

    def median(name: str, figure: str) -> float:
        return statistics.median(run[figure] for run in runs[name])

    peer_s = median("mapped", "loaded_s")
    return {
        "name": "load_checkpoint",
        "values": [round(run["loaded_s"], 3) for run in runs["ours"]],
        "peer": round(peer_s, 3),
        "unit": "s",
        "ratio": round(median("ours", "loaded_s") / peer_s, 2),
        "must": 1.2,
        "aim": 1.0,
        "identical": True,
        "memory_ratio": round(median("ours", "peak_mb") / median("mapped", "peak_mb"), 3),
        "memory_must": 1.2,
        "memory_aim": 1.0,
        "ratio_to_private": round(median("ours", "loaded_s") / median("private", "loaded_s"), 2),
        "memory_ratio_to_private": round(median("ours", "peak_mb") / median("private", "peak_mb"), 3),
        **{
            f"{figure}_{name}": round(median(name, figure), 2)
            for figure in ("returned_s", "cpu_s", "peak_mb", "private_mb")
            for name in runs
        },
    }


def _write(folder: str) -> None:
    """A checkpoint of BLIP base with fresh weights, which transformers is asserted to read as we do."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
    from dataclasses import replace

    from tiny import tiny_checkpoint
    from transformers import BlipForConditionalGeneration

    from raycap.checkpoint import complete_config, export_weights, load_checkpoint, load_model, save_checkpoint
    from raycap.models import build_model
    from raycap.models.presets import BLIP_BASE_384
    from raycap.schema import ImageSpec

    torch.manual_seed(0)
    config = complete_config(BLIP_BASE_384, "the preset")
    spec = replace(tiny_checkpoint()[0], model_config=config, image=ImageSpec(size=384))
    save_checkpoint(folder, export_weights(build_model("blip", config)), spec, {"step": 0})
    published = BlipForConditionalGeneration.from_pretrained(folder).state_dict()
    ours = load_model(*load_checkpoint(folder), folder).state_dict()
    assert ours.keys() == published.keys()
    assert all(torch.equal(tensor, published[name]) for name, tensor in ours.items()), "the weights differ"


if __name__ == "__main__":
    _write(sys.argv[1])
