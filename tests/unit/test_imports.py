"""What a process loads: --help is instant because nothing heavy is imported before a job starts."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py"))
HEAVY = {"torch", "ray", "transformers", "pyarrow", "numpy", "tokenizers", "deepspeed", "PIL"}


def loaded(*command: str) -> tuple[set[str], str]:
    """Top-level packages that a fresh interpreter imports for a command, and its standard output."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    assert len(lines) > 20
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}, done.stdout


@pytest.mark.parametrize("module", ["raycap", "raycap.config", "raycap.errors", "raycap.schema"])
def test_the_lowest_floor_loads_nothing_heavy(module: str) -> None:
    names, _ = loaded("-c", f"import {module}")
    assert "raycap" in names
    assert not names & HEAVY


def test_the_captioner_is_found_at_the_top_of_the_package() -> None:
    import raycap
    from raycap.captioner import Captioner
    from raycap.schema import DecodeSettings
    from raycap.scorer import Scorer

    assert raycap.Captioner is Captioner
    assert raycap.__all__ == ["Captioner", "DecodeSettings", "Scorer"]
    assert raycap.Scorer is Scorer
    assert raycap.DecodeSettings is DecodeSettings
    with pytest.raises(AttributeError, match="module 'raycap' has no attribute 'captoner'"):
        _ = raycap.captoner


def test_the_captioner_loads_no_ray() -> None:
    names, _ = loaded("-c", "from raycap import Captioner")
    assert "torch" in names
    assert not names & {"ray", "deepspeed", "tyro"}


@pytest.mark.parametrize("job", JOBS)
def test_the_help_of_a_job_is_instant(job: str) -> None:
    begun = time.perf_counter()
    names, text = loaded(f"jobs/{job}.py", "--help")
    elapsed_s = time.perf_counter() - begun
    assert "--" in text
    assert not names & HEAVY
    assert elapsed_s < 3  # 0.3 s on an idle machine
