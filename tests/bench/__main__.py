"""`make bench [NAME=x]`: runs one measurement, or all of them, each ending with one JSON line.

Figures that matter are written to LOG.md by hand, with hardware and versions. A benchmark without a peer has "peer": null.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


def line(*, name: str, values: list[float], unit: str, must: float, aim: float, **more: Any) -> Line:
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
    """Wall time of the whole demo after installation, from nothing, the most memory it held, and the CIDEr it ends with."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        process = subprocess.Popen([sys.executable, "jobs/demo.py", "--out", folder], cwd=ROOT)
        peak_bytes = peak_memory_bytes(process)
        wall_s = time.perf_counter() - begun
        if process.returncode:
            sys.exit(f"the demo ended with exit code {process.returncode}")
        metrics = json.loads((Path(folder) / "metrics.json").read_text())["metrics"]
        train_s = json.loads((Path(folder) / "train.json").read_text())["wall_s"]
    return line(
        name="demo",
        values=[wall_s],
        unit="s",
        must=480,
        aim=300,
        train_s=train_s,
        peak_gb=round(peak_bytes / 1e9, 2),
        peak_gb_must=8,
        cider=round(metrics["cider"], 3),
        cider_must=0.8,
        cider_aim=1.5,
    )


def peak_memory_bytes(process: subprocess.Popen[bytes]) -> int:
    """The largest sum, over a process and all its children, of memory with shared pages counted once; waits for its end."""
    peak = 0
    while process.poll() is None:
        held = 0
        with contextlib.suppress(psutil.NoSuchProcess):
            for member in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
                with contextlib.suppress(psutil.Error):
                    held += member.memory_full_info().pss
        peak = max(peak, held)
        time.sleep(1)
    return peak


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
    return line(name="help_time", values=slowest, unit="s", must=1, aim=1)


def imported(module: str, function: str = "measure") -> Callable[[], Line]:
    """A benchmark of a module of this folder; what it returns is made a line."""

    def run() -> Line:
        measured: dict[str, Any] = getattr(import_module(f"tests.bench.{module}"), function)()
        return line(**measured) if "values" in measured else measured

    return run


MODULES = (
    "first_caption",
    "bulk_overhead",
    "serve_noop",
    "preprocess_coco",
    "preprocess_12mp",
    "train_packed5",
    "load_checkpoint",
    "blip_encoder",
    "blip_train_step",
    "ragged_decode",
    "decode_memory",
)
BENCHMARKS: dict[str, Callable[[], Line]] = {
    "help_time": help_time,
    "demo": demo,
    **{module: imported(module) for module in MODULES},
    "loader_vs_webdataset": imported("loaders", "measure_webdataset"),
    "loader_vs_raydata": imported("loaders", "measure_raydata"),
    "loader_vs_dataloader": imported("loaders", "measure_dataloader"),
    "blip_greedy": imported("blip_decode", "measure_greedy"),
    "blip_beam3": imported("blip_decode", "measure_beam3"),
    "blip_beam5": imported("blip_decode", "measure_beam5"),
    "blip_beam5_decode": imported("blip_decode", "measure_beam5_decode"),
    "gpt2_prefix_beam5": imported("gpt2_decode", "measure_prefix_beam5"),
    "clipcap_loop": imported("gpt2_decode", "measure_clipcap_loop"),
    "shuffle_cost": imported("shuffle"),
    "plan_shards": imported("scale", "measure_plan"),
    "rank_scaling": imported("scale", "measure_ranks"),
    "store_bytes": imported("scale", "measure_store"),
}


def run_all() -> None:
    """Every benchmark in a process of its own, because some start Ray; ends with a table."""
    results = []
    for name in BENCHMARKS:
        done = subprocess.run([sys.executable, "-m", "tests.bench", name], cwd=ROOT, stdout=subprocess.PIPE, check=True)
        print(done.stdout.decode(), end="", flush=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    for result in results:
        print(
            f"{result['name']:<14} ours {result['ours']} {result['unit']}; must {result['must']}, aim {result['aim']}"
        )


if __name__ == "__main__":
    if not sys.argv[1:]:
        run_all()
    for name in sys.argv[1:]:
        if name not in BENCHMARKS:
            sys.exit(f"no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
        print(json.dumps(BENCHMARKS[name]()), flush=True)
