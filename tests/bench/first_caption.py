"""From a fresh process to its first caption, through the library's door: imports, loading of a tiny checkpoint, one image."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RUNS = 5
MUST_S, AIM_S = 8, 5

PROGRAM = """
import sys
from raycap import Captioner
(result,) = Captioner.load(sys.argv[1]).caption([open(sys.argv[2], "rb").read()])
assert result.caption, result
assert "ray" not in sys.modules
"""


def measure() -> dict[str, Any]:
    """Wall seconds of each run, its interpreter's start included. The first one may find cold disk caches."""
    with tempfile.TemporaryDirectory() as folder:
        # In a process of its own, so that what this one has imported is the same as without it.
        subprocess.run([sys.executable, __file__, folder], cwd=ROOT, check=True)
        values = []
        for _ in range(RUNS):
            begun = time.perf_counter()
            program = [sys.executable, "-c", PROGRAM, f"{folder}/checkpoint", f"{folder}/image.png"]
            subprocess.run(program, cwd=ROOT, check=True)
            values.append(time.perf_counter() - begun)
    return {"name": "first_caption", "values": values, "unit": "s", "must": MUST_S, "aim": AIM_S}


def _write(folder: Path) -> None:
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "unit")]
    from tiny import png_images, tiny_checkpoint

    from raycap.checkpoint import export_weights, save_checkpoint

    spec, model, _ = tiny_checkpoint()
    save_checkpoint(str(folder / "checkpoint"), export_weights(model), spec, {})
    (folder / "image.png").write_bytes(png_images(1)[0])


if __name__ == "__main__":
    _write(Path(sys.argv[1]))
