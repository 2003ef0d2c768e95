"""README.md tells the truth: its commands parse, its targets exist, its files are there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from raycap.config import (
    CLIP_GPT2_PRESETS,
    TRAIN_PRESETS,
    VGG_LSTM_PRESETS,
    VIT_GPT2_PRESETS,
    CaptionBucketConfig,
    DemoConfig,
    EvaluateConfig,
    FamiliesConfig,
    ImportConfig,
    PrepareConfig,
    ServeConfig,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PRESETS: dict[str, dict[str, Any]] = {
    "train_blip": TRAIN_PRESETS,
    "train_clip_gpt2": CLIP_GPT2_PRESETS,
    "train_vit_gpt2": VIT_GPT2_PRESETS,
    "train_vgg_lstm": VGG_LSTM_PRESETS,
    "prepare_shards": {"coco": PrepareConfig()},
    "evaluate": {"evaluate": EvaluateConfig()},
    "caption_bucket": {"caption_bucket": CaptionBucketConfig()},
    "serve": {"serve": ServeConfig()},
    "demo": {"demo": DemoConfig()},
    "compare_families": {"families": FamiliesConfig()},
    "import_weights": {"import_weights": ImportConfig()},
}


def commands() -> list[str]:
    """Every line that starts a job: in code blocks, in their comments and in tables."""
    blocks: list[str] = re.findall(r"```bash\n(.*?)```", README, re.S)
    lines = [part.strip() for block in blocks for line in block.splitlines() for part in line.split("#")[:1]]
    return [line for line in [*lines, *re.findall(r"`(python jobs/[^`]+)`", README)] if "jobs/" in line]


def test_there_are_commands_to_check() -> None:
    assert len(commands()) >= 10


@pytest.mark.parametrize("command", commands())
def test_every_job_command_of_the_readme_parses(command: str, job_module: ModuleType) -> None:
    words = shlex.split(command)
    at = next(i for i, word in enumerate(words) if word.startswith("jobs/"))
    name = Path(words[at]).stem
    assert (ROOT / words[at]).stat().st_mode & 0o111, "the script must be executable"
    job_module.parse(name, PRESETS[name], words[at + 1 :])


def test_every_make_target_of_the_readme_exists() -> None:
    for target in set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.M)):
        subprocess.run(["make", "-n", target, f"PYTHON={sys.executable}"], cwd=ROOT, check=True, capture_output=True)


def test_every_link_of_the_readme_leads_to_a_file() -> None:
    for target in re.findall(r"\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target


def test_every_module_stands_in_the_architecture_page() -> None:
    page = (ROOT / "raycap" / "README.md").read_text()
    for path in (ROOT / "raycap").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in page, path
