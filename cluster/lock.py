"""Prints requirements.lock: every package that raycap and its demo need, with the version installed in this environment.

    python cluster/lock.py > cluster/requirements.lock

Only what pyproject.toml leads to, not what else is installed. Names and versions only: no hash, no index, no local
version, so that the same file takes a CPU or a CUDA build of torch, whichever the index offers.
"""

import sys
import tomllib
from importlib.metadata import requires, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("demo",)  # so that the image can try itself out: python /opt/raycap/jobs/demo.py


def direct() -> list[Requirement]:
    """What pyproject.toml asks for, with the extras that are locked too."""
    project = tomllib.loads(PROJECT.read_text())["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def needed_by(requirement: Requirement) -> list[Requirement]:
    """What an installed distribution needs on this platform, with the extras that are asked of it."""
    found = [Requirement(line) for line in requires(requirement.name) or []]
    extras = requirement.extras or {""}
    return [r for r in found if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def closure() -> dict[str, str]:
    """Name -> installed version of everything needed, sorted by name. Raises PackageNotFoundError for one not installed."""
    queue, seen = direct(), set()
    while queue:
        requirement = queue.pop()
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key not in seen:
            seen.add(key)
            queue += needed_by(requirement)
    return {name: Version(version(name)).public for name in sorted({name for name, _ in seen})}


def lock() -> str:
    """The text of requirements.lock."""
    lines = [
        f"# Versions the tests ran with, Python {sys.version_info.major}.{sys.version_info.minor}, Linux x86_64.",
        "# Made by: python cluster/lock.py > cluster/requirements.lock",
        "# A CUDA build of torch pins the packages it needs beyond these by itself.",
        *(f"{name}=={number}" for name, number in closure().items()),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(lock(), end="")
