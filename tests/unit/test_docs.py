"""The documents say what the code does: the help in jobs/README.md is the jobs' own, the tree in README.md the files' own words."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("*.py") if not path.stem.startswith("_"))
START = "The help below is generated"
TREE = ("<!-- tree -->\n```text\n", "```\n<!-- end of tree -->\n")


def help_of(job: str) -> str:
    """The help text, 100 columns wide, with the home folder's place left open."""
    result = subprocess.run(
        [sys.executable, f"jobs/{job}.py", "--help"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "COLUMNS": "100", "HOME": "/home/you", "TERM": "dumb"},
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


def caption_of(path: Path) -> str:
    """What a file says of itself first: the first sentence of its docstring, or its first comment or heading."""
    text = path.read_text()
    if path.suffix == ".py":
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0]
    else:
        comments = (re.match(r"(?:# |<!-- |{# |/\* )(.*?)(?: -->| #}| \*/)?$", line) for line in text.splitlines())
        said = next((comment.group(1) for comment in comments if comment), "")
    sentence = re.split(r"(?<!et al)\. ", " ".join(said.split()))[0].rstrip(".")
    assert sentence, f"{path} says nothing of itself in its first lines"
    return sentence


def tree() -> str:
    """Every file that a user or developer opens, with what it says of itself; tests by folder."""
    lines = []
    for top in ("jobs", "raycap", "cluster", "tests"):
        lines.append(f"{top}/")
        for path in sorted((ROOT / top).rglob("*"), key=lambda p: (p.parent, p.name)):
            name = path.relative_to(ROOT / top).as_posix()
            empty = path.name == "__init__.py" and path.parent != ROOT / "raycap"
            if path.is_dir() or "__pycache__" in name or path.suffix == ".md" or empty or path.name == "py.typed":
                continue
            if top != "tests" or path.name == "conftest.py":
                lines.append(f"  {name:<26} {caption_of(path)}")
        if top == "tests":
            for folder in sorted(p for p in (ROOT / top).iterdir() if any(p.glob("*.py"))):
                lines.append(f"  {folder.name + '/':<26} {TESTS[folder.name]}")
    return "\n".join(lines) + "\n"


TESTS = {
    "bench": "measurements: make bench; figures in LOG.md",
    "browser": "the pages in a real browser; skipped where there is none",
    "decoding": "the search against transformers' generate(), enumeration and itself in other batches",
    "families": "models learnt by heart, imported, exported to plain transformers, damaged",
    "fuzz": "thousands of damaged images",
    "metrics": "our metrics against pycocoevalcap's",
    "ray": "jobs, training, bulk and parity of the doors on one local Ray",
    "s3": "the same on an S3 server process",
    "serve": "the endpoint, asked by real clients",
    "unit": "everything that needs no Ray",
}


def readme() -> str:
    """README.md as it has to be."""
    text = (ROOT / "README.md").read_text()
    head, tail = text[: text.index(TREE[0]) + len(TREE[0])], text[text.index(TREE[1]) :]
    return head + tree() + tail


def test_the_jobs_readme_holds_the_help_of_every_job() -> None:
    assert (ROOT / "jobs" / "README.md").read_text() == generated(), "run make docs"


def test_the_readme_holds_the_tree() -> None:
    assert (ROOT / "README.md").read_text() == readme(), "run make docs"


@pytest.mark.parametrize("job", JOBS)
def test_the_help_explains_every_flag(job: str) -> None:
    flags = [line for line in help_of(job).splitlines() if line.startswith("│ --")]
    assert 4 <= len(flags) <= 35


if __name__ == "__main__":
    (ROOT / "jobs" / "README.md").write_text(generated())
    (ROOT / "README.md").write_text(readme())
