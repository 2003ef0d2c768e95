"""The report of a run: complete, inert, small, and honest about what is missing."""

import base64
import hashlib
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from conftest import Demo, pack, samples_of
from PIL import Image
from run_folder import SHOWN, poison_run, rows_of, write, write_run

from raycap.errors import StorageError
from raycap.report import write_report
from raycap.report.chart import Chart, Curve, log_ticks, plot, ticks, training_charts
from raycap.report.page import render, visible
from raycap.report.read import read_report
from raycap.schema import Sample
from raycap.shards import read_manifest


class Page(HTMLParser):
    """What a browser makes of the page: tags with their attributes, and text outside of <style>."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.style, self._in_style = "", "", False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_style = tag == "style"

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.style += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._in_style = self._in_style and tag != "style"

    def images(self) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == "img"]


@pytest.fixture
def run(tmp_path: Path, demo: Demo) -> str:
    return write_run(tmp_path / "my-run", demo.test, rows_of(demo.test))


def test_the_report_of_a_whole_run_shows_all_that_its_folder_holds(run: str, demo: Demo) -> None:
    assert write_report(run) == f"{run}/report.html"
    html = Path(run, "report.html").read_text()
    page = Page(html)
    for words in (
        *(
            "my-run",
            "/runs/it/checkpoint",
            "2026-01-02 03:04:05 UTC",
            "3 beams, at most 20 tokens",
            "200 steps in 62 s",
        ),
        *("1.2346", "CIDEr 123.5", "BLEU-4", "0.2500", "validation loss", "497 of 500"),
        *("2 corrupt", "bad-one", "1 truncated", "3 empty", "no bytes", "lr"),
    ):
        assert words in page.text
    assert "Unverified" not in page.text
    assert "a/1.jpg" not in page.text
    images = page.images()
    assert len(images) == 3 * 16  # all of the 16 test images in each gallery
    references = {row["references"][0] for row in rows_of(demo.test)}
    assert {image["alt"] for image in images} == references
    for image in images:
        picture = Image.open(io.BytesIO(base64.b64decode(str(image["src"]).removeprefix("data:image/jpeg;base64,"))))
        assert picture.size == (96, 96)


def test_galleries_are_ordered_by_each_images_own_score_and_the_same_every_time(run: str) -> None:
    galleries = read_report(run).galleries
    scores = {name: [image.cider for image in images] for name, images in galleries.items()}
    assert scores["Worst"] == sorted(scores["Worst"])
    assert scores["Best"] == sorted(scores["Worst"], reverse=True)
    assert sorted(scores["Random"]) == scores["Worst"]
    assert scores["Random"] != scores["Worst"]
    assert read_report(run) == read_report(run)


def test_a_gallery_takes_twenty_and_says_which_words_no_reference_has(tmp_path: Path, demo: Demo) -> None:
    rows = rows_of(demo.train)
    rows[7] |= {"references": ["A dog, running."], "caption": "a cat running", "cider": -1.0}
    galleries = read_report(write_run(tmp_path / "run", demo.train, rows)).galleries
    assert [len(images) for images in galleries.values()] == [20, 20, 20]
    assert galleries["Worst"][0].words == (("a", True), ("cat", False), ("running", True))


def test_text_from_data_is_shown_and_does_nothing(tmp_path: Path, demo: Demo) -> None:
    run = Path(write_run(tmp_path / "run", demo.test, rows_of(demo.test)))
    harmless_tags = {tag for tag, _ in Page(render(read_report(str(run)))).tags}
    poison_run(run)
    html = Path(write_report(str(run))).read_bytes().decode()

    page = Page(html)
    assert {tag for tag, _ in page.tags} == harmless_tags
    assert not {name for _, attributes in page.tags for name in attributes if name.startswith("on") or name == "style"}
    assert page.text.count(SHOWN) > 40
    assert not [c for c in html if not c.isprintable() and c != "\n"]
    assert any(image["alt"] == SHOWN for image in page.images())


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a dog", "a dog"),
        (
            "میت\u200cوین 👩\u200d🚀 ひ\u3000ら",
            "میت\u200cوین 👩\u200d🚀 ひ\u3000ら",
        ),  # joiners that scripts and emoji need
        ("a\tb\r\nc\x7f\x9b", "a⟨U+0009⟩b⟨U+000D⟩⟨U+000A⟩c⟨U+007F⟩⟨U+009B⟩"),
        ("\u200b\ufeff\u2028\U000e0041", "⟨U+200B⟩⟨U+FEFF⟩⟨U+2028⟩⟨U+E0041⟩"),
        ("x" * 1_000_000, "x" * 1000 + "… (1000000 characters)"),
    ],
)
def test_what_would_hide_or_move_text_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_the_page_asks_for_nothing_and_its_policy_allows_nothing_else(run: str) -> None:
    page = Page(render(read_report(run)))
    policy = next(
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    digest = base64.b64encode(hashlib.sha256(page.style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    links = [str(a[name]) for _, a in page.tags for name in ("src", "href", "action", "data", "srcset") if name in a]
    assert len(links) > 48
    assert all(link.startswith(("data:", "#")) for link in links)
    assert "url(" not in page.style
    assert "@import" not in page.style


MISSING = {
    "config.json": "there is no config.json.",
    "metrics.jsonl": "there is no metrics.jsonl.",
    "metrics.json": "there is no metrics.json.",
    "per_image.jsonl": "there is no per_image.jsonl.",
}


@pytest.mark.parametrize("name", [*MISSING, "train.json", "captions/_SUCCESS.json"])
def test_a_part_that_is_missing_is_said_and_the_others_are_shown(run: str, name: str) -> None:
    Path(run, name).unlink()
    after = Page(render(read_report(run)))
    for file, sentence in MISSING.items():
        assert (sentence in after.text) == (file == name)
    if name == "captions/_SUCCESS.json":
        assert "Bulk captioning is not finished: captions/ has no _SUCCESS.json, its files so far: 1." in after.text
    assert "my-run" in after.text


@pytest.mark.parametrize("name", [*MISSING, "train.json", "captions/_SUCCESS.json"])
def test_each_part_alone_makes_a_report(run: str, tmp_path: Path, name: str) -> None:
    alone = tmp_path / "alone" / name
    alone.parent.mkdir(parents=True)
    alone.write_bytes(Path(run, name).read_bytes())
    page = Page(Path(write_report(str(tmp_path / "alone"))).read_text())
    assert page.text.count("there is no") >= 2


def test_a_folder_without_any_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"nothing to report in '.*': it holds no metrics.jsonl.*give the --out"):
        write_report(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*MISSING, "train.json", "captions/_SUCCESS.json", "captions/data/unit-00000.parquet"])
def test_a_damaged_part_is_named_and_the_others_are_shown(run: str, name: str) -> None:
    path = Path(run, name)
    path.write_bytes(path.read_bytes()[:-7])
    report = read_report(run)
    assert len(report.notes) >= 1
    assert path.name in report.notes[0]
    assert "my-run" in Page(render(report)).text


def test_json_of_another_shape_does_not_stop_the_report(run: str) -> None:
    """Each value of each file in turn is something else."""
    metrics = json.loads(Path(run, "metrics.json").read_text())
    write(Path(run), "metrics.json", metrics | {"shards": "/gone"})
    for name in ("config.json", "train.json", "metrics.json", "captions/_SUCCESS.json"):
        content = json.loads(Path(run, name).read_text())
        for key in content:
            for strange in (None, [1], {"a": [2]}, "x", math.inf):
                write(Path(run), name, content | {key: strange})
                assert "my-run" in render(read_report(run))
        write(Path(run), name, [1, 2])
    write(Path(run), "metrics.jsonl", [[], 7, None, {"step": "x", "loss": {}}, {"step": 1, "val_loss": ["y"]}])
    rows = [None, {"cider": 1.0}, {"cider": math.nan}, {"key": 3, "cider": 2, "references": 5}]
    write(Path(run), "per_image.jsonl", rows)
    assert "Images are not shown" in Page(render(read_report(run))).text


def test_an_unverified_checkpoint_is_marked(run: str) -> None:
    metrics = json.loads(Path(run, "metrics.json").read_text())
    write(Path(run), "metrics.json", metrics | {"verified": False})
    assert "Unverified checkpoint: it has no raycap.json" in Page(render(read_report(run))).text


def test_bulk_output_of_another_checkpoint_is_noted(run: str) -> None:
    assert read_report(run).notes == ()
    bulk = json.loads(Path(run, "captions/_SUCCESS.json").read_text())
    write(Path(run), "captions/_SUCCESS.json", bulk | {"checkpoint": "decaf"})
    assert read_report(run).notes == (
        "captions/ was captioned with another checkpoint than the one that was evaluated.",
    )


def test_images_come_with_single_reads_and_only_from_the_shards_that_were_evaluated(tmp_path: Path, demo: Demo) -> None:
    shards = pack(str(tmp_path / "shards"), samples := samples_of(demo.train))
    rows = rows_of(shards)
    for row in rows:
        row["cider"] = None
    chosen = [3, 50, 95]
    for i in chosen:
        rows[i]["cider"] = 1.0
    run = write_run(tmp_path / "run", shards, rows)
    manifest = read_manifest(shards)
    for number, name in enumerate(manifest.shards):  # everything but the chosen samples is destroyed
        original = Path(shards, name).read_bytes()
        data = bytearray(b"\xff" * len(original))
        for at, i in map(manifest.locate, chosen):
            if at == number:
                (start, stop), _ = manifest.places(number, i, i + 1)
                data[start:stop] = original[start:stop]
        Path(shards, name).write_bytes(data)
    report = read_report(run)
    assert report.notes == ()
    assert {image.key for image in report.galleries["Best"]} == {samples[i].key for i in chosen}
    assert all(image.thumbnail for image in report.galleries["Best"])

    Path(shards, manifest.shards[0]).write_bytes(b"\xff" * int(manifest.num_bytes[0]))
    report = read_report(run)
    assert len(report.notes) == 1
    assert report.notes[0].startswith(
        f"The image {samples[3].key} is not shown: the bytes of sample 'shard-00000.tar[3]'"
    )
    assert Page(render(report)).text.count("image not shown") == 3

    metrics = json.loads(Path(run, "metrics.json").read_text())
    write(Path(run), "metrics.json", metrics | {"shards": demo.test})
    assert "no longer those that were evaluated" in read_report(run).notes[0]
    write(Path(run), "metrics.json", metrics | {"shards": str(tmp_path / "gone")})
    assert "there is no 'manifest.parquet'" in read_report(run).notes[0]


def test_sixty_images_of_noise_stay_below_two_megabytes(tmp_path: Path) -> None:
    samples = [
        Sample(key=f"{i:03}", image=noise(i), ext="jpg", captions=(f"image {i} of nothing at all",) * 5)
        for i in range(60)
    ]
    shards = pack(str(tmp_path / "shards"), samples)
    url = write_report(write_run(tmp_path / "run", shards, rows_of(shards)))
    images = Page(Path(url).read_text()).images()
    assert len(images) == 60
    assert max(len(str(image["src"])) for image in images) < 20_000 * 4 / 3 + 100
    assert 200_000 < Path(url).stat().st_size < 2_000_000


def noise(seed: int) -> bytes:
    """Nothing compresses worse."""
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (480, 360, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_ticks_are_round_and_enclose_what_they_measure() -> None:
    rng = np.random.default_rng(0)
    for low, span in zip(rng.uniform(-100, 100, 300), 10 ** rng.uniform(-6, 6, 300), strict=True):
        marks = ticks(low, low + span)
        distances = np.diff(marks)
        assert marks[0] <= low + span * 1e-6
        assert marks[-1] >= low + span - span * 1e-6
        assert 4 <= len(marks) <= 8
        assert np.allclose(distances, distances[0])
        assert re.match(r"^[125](\.0+)?e", f"{distances[0]:.6e}")
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(7, 7) == [7, 7.2, 7.4, 7.6, 7.8, 8]
    assert log_ticks(0.6, 4.7) == [0.5, 1, 2, 5]
    assert log_ticks(1, 10) == [1, 2, 5, 10]


@pytest.mark.parametrize(
    "points",
    [
        [(1, 3.0)],
        [(5, 0.0), (9, 0.0)],
        [(1, 9.0), (2, 0.001)],
        [(1, -3.0), (2, 1e9)],
        [(i, math.sin(i) + 1.1) for i in range(5000)],
    ],
)
def test_every_point_of_a_chart_lies_inside_its_axes(points: list[tuple[float, float]]) -> None:
    chart = Chart(title="Loss", curves=(Curve(name="loss", kind="line", points=tuple(points)),))
    p = plot(chart)
    ((_, line),) = p.lines
    places = [tuple(map(float, pair.split(","))) for pair in line.split()]
    assert len(places) == len(points)
    for x, y in places:
        assert p.left <= x <= p.right
        assert 0 <= y <= p.bottom
    assert all(p.left <= x <= p.right for x, _ in p.x_ticks)
    ((_, marks),) = p.marks
    assert 1 <= len(marks) <= 60


def test_a_long_run_is_thinned_without_losing_a_spike_and_smoothed_without_lag() -> None:
    records = [{"step": i, "loss": 1.0 - i / 200_000} for i in range(100_000)]
    records[31_234]["loss"] = 42.0
    records[77_777]["loss"] = math.nan
    (chart,) = training_charts(records)
    raw, smooth, _ = chart.curves
    assert len(raw.points) <= 400
    assert (31_234, 42.0) in raw.points
    assert [x for x, _ in raw.points] == sorted(x for x, _ in raw.points)
    for x, y in smooth.points:
        if abs(x - 31_234) > 4000 and 4000 < x < 70_000:
            assert y == pytest.approx(1.0 - x / 200_000, abs=1e-4)


def test_bulk_failures_are_read_from_the_first_units_until_there_are_enough(run: str) -> None:
    data = Path(run, "captions", "data")
    for number in range(1, 5):
        rows = [{"key": f"{number}/{i}", "error_kind": "corrupt" if i % 2 else None, "error": "bad"} for i in range(20)]
        (data / f"unit-{number:05}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "unit-00004.jsonl").write_text("never read")
    report = read_report(run)
    assert report.notes == ()
    (bulk,) = [failures for failures in report.failures if failures.door == "Bulk captioning"]
    assert len(bulk.rows) == 20
    assert bulk.rows[:2] == (("a/2.jpg", "empty", "no bytes"), ("1/1", "corrupt", "bad"))
