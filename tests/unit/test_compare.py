"""Runs side by side: one table, the same images, and what was not the same said aloud."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Demo
from run_folder import NASTY, SHOWN, poison_run, rows_of, write, write_run
from test_report import Page

from raycap.errors import StorageError
from raycap.report import write_comparison
from raycap.report.compare import read_comparison

NAMES = ["blip", "vgg_lstm"]


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def runs(tmp_path: Path, demo: Demo) -> Path:
    """Two runs that differ in architecture, CIDEr and captions."""
    for number, name in enumerate(NAMES):
        rows = [row | {"caption": f"{name} says {i}"} for i, row in enumerate(rows_of(demo.test))]
        run = Path(write_run(tmp_path / "all" / name, demo.test, rows))
        change(run / "config.json", architecture=f"{name}_tiny", out=str(run))
        change(run / "train.json", num_parameters=1_500_000 + number, num_trained_parameters=1_500_000)
        change(run / "metrics.json", metrics={"bleu_4": 0.25, "cider": 1.5 - number})
    return tmp_path / "all"


def test_the_page_has_a_row_for_each_run_and_the_same_images_with_the_captions_of_all(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert write_comparison(str(runs), NAMES) == f"{runs}/report.html"
    page = Page((runs / "report.html").read_text())
    for words in ("blip_tiny", "vgg_lstm_tiny", "1,500,001", "62 s", "0.030", "1.500", "0.500", "METEOR"):
        assert (words in page.text) == (words != "METEOR")  # a score that no run has gets no column
    assert [a["href"] for tag, a in page.tags if tag == "a"] == ["blip/report.html", "vgg_lstm/report.html"]
    assert len(page.images()) == 12
    first = read_comparison(str(runs), NAMES).images[0]
    assert [name for name, *_ in first.captions] == NAMES
    assert all(caption.startswith(f"{name} says ") for name, caption, _ in first.captions)
    assert len({caption.split()[-1] for _, caption, _ in first.captions}) == 1  # of one image
    assert "All runs were trained with the same settings." in page.text
    table = capsys.readouterr().out
    assert "| blip     | 1,500,000  | 200   | 62 s     | 0.030     | 1.500 | 0.250  |        |         |" in table
    rows = json.loads((runs / "comparison.json").read_text())
    assert [(row["name"], row["scores"]["cider"]) for row in rows] == [("blip", 1.5), ("vgg_lstm", 0.5)]


def test_runs_that_were_not_trained_or_evaluated_alike_say_so(runs: Path) -> None:
    change(runs / "vgg_lstm" / "config.json", lr=0.5)
    change(runs / "vgg_lstm" / "metrics.json", num_images=3)
    comparison = read_comparison(str(runs), NAMES)
    assert comparison.differing == (("lr", ("0.001", "0.5")),)
    assert "lr" not in comparison.common
    assert comparison.notes == ("The runs were evaluated on different images: their scores cannot be compared.",)


@pytest.mark.parametrize("file", ["config.json", "metrics.json"])
def test_a_run_that_was_not_evaluated_is_refused_and_nothing_is_written(runs: Path, file: str) -> None:
    (runs / "vgg_lstm" / file).unlink()
    with pytest.raises(StorageError, match=rf"vgg_lstm': it holds no {file}; train and evaluate it first"):
        write_comparison(str(runs), NAMES)
    assert not (runs / "report.html").exists()


def test_text_from_data_is_shown_in_a_comparison_and_does_nothing(runs: Path) -> None:
    for name in NAMES:
        poison_run(runs / name)
        train = json.loads((runs / name / "train.json").read_text())
        write(runs / name, "train.json", train | {"num_parameters": NASTY, "wall_s": NASTY})
    page = Page(Path(write_comparison(str(runs), NAMES)).read_text())
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"}
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(SHOWN) > 12
