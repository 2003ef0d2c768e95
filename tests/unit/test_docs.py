"""The documents say what the code does: the help in jobs/README.md is the jobs' own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))
START = "The help below is generated"


def help_of(job: str) -> str:
    """The help text, 100 columns wide, with the home folder's place left open."""
    result = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--help"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", "HOME": "/home/you", "TERM": "dumb"},
        capture_output=True,
        text=True,
        check=True,
    )
    return "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())


def generated() -> str:
    """jobs/README.md as it has to be."""
    text = (ROOT / "jobs" / "README.md").read_text()
    head = text[: text.index("\n", text.index(START)) + 1]
    return head + "".join(f"\n## {job}\n\n```text\n{help_of(job)}\n```\n" for job in JOBS)


def test_the_jobs_readme_holds_the_help_of_every_job() -> None:
    assert (ROOT / "jobs" / "README.md").read_text() == generated(), "run make docs"


@pytest.mark.parametrize("job", JOBS)
def test_the_help_explains_every_flag(job: str) -> None:
    flags = [line for line in help_of(job).splitlines() if line.startswith("│ --")]
    assert 4 <= len(flags) <= 32


if __name__ == "__main__":
    (ROOT / "jobs" / "README.md").write_text(generated())
