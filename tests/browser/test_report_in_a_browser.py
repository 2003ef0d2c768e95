"""The report as people see it: in a real browser, which may reach nothing, in light and dark, on a desk and a phone."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import Tab, chromium_tab, find_chromium
from conftest import Demo
from PIL import Image
from run_folder import SHOWN, poison_run, rows_of, write_run

from raycap.report import write_comparison, write_report

VIEWS = {
    "desk": (1200, 900, False),
    "dark desk": (1200, 900, True),
    "phone": (380, 800, False),
    "dark phone": (320, 640, True),
}
# Every text's contrast with the nearest background behind it, by WCAG's formula: the lowest as [ratio, text].
LOWEST_CONTRAST = """(() => {
  const channels = color => color.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255).map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) { const c = channels(getComputedStyle(e).backgroundColor);
    if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const ratios = [];
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const parent = walk.currentNode.parentElement, text = walk.currentNode.data.trim();
    if (!text || !parent.checkVisibility() || parent.closest("title")) continue;
    const style = getComputedStyle(parent), color = parent.closest("svg") ? style.fill : style.color;
    const [a, b] = [light(channels(color)), light(behind(parent))].sort((x, y) => y - x);
    ratios.push([(a + .05) / (b + .05), text]);
  }
  return ratios.sort((x, y) => x[0] - y[0])[0];
})()"""


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on PATH: install Debian's chromium, or name one in RAYCAP_TEST_CHROMIUM")
    with chromium_tab(program, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture(scope="module")
def reports(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """URLs: a usual run, one whose every text wants to do harm, one of which only the scores are left; two side by side."""
    root = tmp_path_factory.mktemp("runs")
    runs = {
        name: Path(write_run(root / name, demo.test, rows_of(demo.test))) for name in ("usual", "hostile", "scores")
    }
    poison_run(runs["hostile"])
    for file in runs["scores"].rglob("*"):
        if file.is_file() and file.name != "metrics.json":
            file.unlink()
    urls = {name: Path(write_report(str(run))).as_uri() for name, run in runs.items()}
    return urls | {"comparison": Path(write_comparison(str(root), ["usual", "hostile"])).as_uri()}


def text_of_a_sound_page(tab: Tab, url: str, view: str, num_images: int) -> str:
    """What the page says; it is whole, asks for nothing, fits its width, and can be read."""
    width, height, dark = VIEWS[view]
    tab.resize(width, height, dark=dark)
    tab.requests.clear()
    tab.open(url)
    images = tab.evaluate("Promise.all([...document.images].map(i => i.decode().then(() => i.naturalWidth)))")
    assert images == [96] * num_images
    assert {url for url in tab.requests if not url.startswith("data:")} == {url}
    assert tab.complaints == []
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    ratio, text = tab.evaluate(LOWEST_CONTRAST)
    assert ratio >= 4.5, text
    picture = Image.open(io.BytesIO(tab.screenshot())).convert("L")
    assert picture.width == width
    assert (picture.getpixel((2, 2)) < 60) == dark  # type: ignore[operator]  # one band: a number
    assert picture.getextrema()[1] - picture.getextrema()[0] > 150  # type: ignore[operator]
    said: str = tab.evaluate("document.body.innerText")
    return said


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", ["usual", "hostile", "scores"])
def test_a_report_is_whole_readable_and_silent(tab: Tab, reports: dict[str, str], name: str, view: str) -> None:
    text = text_of_a_sound_page(tab, reports[name], view, num_images=0 if name == "scores" else 48)
    assert "1.2346" in text
    assert (SHOWN in text) == (name == "hostile")


@pytest.mark.parametrize("view", VIEWS)
def test_a_comparison_is_whole_readable_and_silent_whatever_its_runs_say(
    tab: Tab, reports: dict[str, str], view: str
) -> None:
    text = text_of_a_sound_page(tab, reports["comparison"], view, num_images=12)
    assert text.count("1.235") == 2
    assert SHOWN in text


def test_the_galleries_are_chosen_with_the_keyboard(tab: Tab, reports: dict[str, str]) -> None:
    tab.resize(1200, 900)
    tab.open(reports["usual"])
    shown = """[...document.querySelectorAll(".panel")].filter(p => p.checkVisibility()).map(p => p.ariaLabel).join()"""
    assert tab.evaluate(shown) == "Random"
    tab.evaluate("document.querySelector('[type=radio]').focus()")
    for name in ("Worst", "Best", "Random"):
        tab.press("ArrowRight")
        assert tab.evaluate(shown) == name
    tab.press("Tab")
    assert tab.evaluate("document.activeElement.tagName") != "INPUT"


def test_paper_shows_every_gallery_in_dark_ink(tab: Tab, reports: dict[str, str]) -> None:
    tab.resize(1200, 900, dark=True)
    tab.open(reports["usual"])
    tab.send("Emulation.setEmulatedMedia", media="print")
    try:
        assert tab.evaluate("[...document.querySelectorAll('.panel')].every(p => p.checkVisibility())")
        ratio, _ = tab.evaluate(LOWEST_CONTRAST)
        assert ratio >= 4.5
        assert Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2)) == 255
    finally:
        tab.send("Emulation.setEmulatedMedia", media="")


def test_the_page_cannot_run_a_script_or_send_anything(tab: Tab, reports: dict[str, str]) -> None:
    """Its policy holds even where an escape would be forgotten."""
    tab.open(reports["usual"])
    tab.evaluate("""(() => {
      const script = document.createElement("script"); script.textContent = "window.ran = true"; document.body.append(script);
      const image = new Image(); image.src = "https://example.org/x.png"; document.body.append(image);
    })()""")
    assert tab.evaluate("window.ran") is None
    assert len(tab.complaints) >= 2
    assert all("Content Security Policy" in complaint for complaint in tab.complaints)
    tab.complaints.clear()
