"""`make bench [NAME=x]`: runs one measurement, or all of them, each ending with one JSON line.

Figures that matter are written to LOG.md by hand, with hardware and versions. A benchmark without a peer has "peer": null.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


def line(name: str, values: list[float], unit: str, must: float, aim: float, **more: Any) -> Line:
    """The result of one benchmark: the median of its values, and their spread."""
    spread = (max(values) - min(values)) / statistics.median(values)
    return {
        "name": name,
        "ours": round(statistics.median(values), 3),
        "peer": None,
        "unit": unit,
        "ratio": None,
        "must": must,
        "aim": aim,
        "spread": round(spread, 3),
        "identical": None,
        **more,
    }


def demo() -> Line:
    """Wall time of the whole demo after installation, from nothing, and the CIDEr it ends with on unseen pairs."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "jobs/demo.py", "--out", folder], cwd=ROOT, check=True)
        wall_s = time.perf_counter() - begun
        metrics = json.loads((Path(folder) / "metrics.json").read_text())["metrics"]
        train_s = json.loads((Path(folder) / "train.json").read_text())["wall_s"]
    return line(
        "demo",
        [wall_s],
        "s",
        420,
        240,
        train_s=train_s,
        cider=round(metrics["cider"], 3),
        cider_must=0.8,
        cider_aim=1.5,
    )


def help_time() -> Line:
    """Wall time of `--help`, the slowest job, five times each."""
    slowest: list[float] = []
    for job in sorted((ROOT / "jobs").glob("[!_]*.py")):
        times = []
        for _ in range(5):
            begun = time.perf_counter()
            subprocess.run([sys.executable, str(job), "--help"], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begun)
        if not slowest or statistics.median(times) > statistics.median(slowest):
            slowest = times
    return line("help_time", slowest, "s", 1, 1)


BENCHMARKS: dict[str, Callable[[], Line]] = {"help_time": help_time, "demo": demo}

if __name__ == "__main__":
    chosen = sys.argv[1:] or list(BENCHMARKS)
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    results = [BENCHMARKS[name]() for name in chosen]
    for result in results:
        print(json.dumps(result))
    if len(results) > 1:
        for result in results:
            print(
                f"{result['name']:<12} {result['ours']:>10} {result['unit']:<4} must {result['must']} aim {result['aim']}"
            )
