"""Report -> HTML. Owns what every page shares: base.html and style.css of raycap/templates, and how text is made harmless."""

import base64
import hashlib
from functools import cache
from importlib.metadata import version
from typing import Any

import jinja2
from markupsafe import Markup

from raycap.report.chart import plot
from raycap.report.compare import Comparison
from raycap.report.read import Report

SCORE_NAMES = {"cider": "CIDEr", "meteor": "METEOR", "rouge_l": "ROUGE-L"} | {
    f"bleu_{n}": f"BLEU-{n}" for n in (1, 2, 3, 4)
}
MAX_TEXT = 1000  # characters of one value; a caption that a broken model or an attacker made may have millions
HARMLESS = "\u200c\u200d\u00a0\u3000"  # joiners, which scripts and emoji need, and two spaces


def visible(text: str) -> str:
    """The text as it can be shown: what would hide, move or reorder its neighbours is written out; long text is cut."""
    shown = "".join(c if c.isprintable() or c in HARMLESS else f"⟨U+{ord(c):04X}⟩" for c in text[:MAX_TEXT])
    return shown if len(text) <= MAX_TEXT else f"{shown}… ({len(text)} characters)"


def render(report: Report) -> str:
    """The page of a report: HTML with its styles and images inside. The same report gives the same page."""
    charts = [(chart, plot(chart)) for chart in report.charts]
    return render_page("report.html", report=report, charts=charts, names=SCORE_NAMES)


def render_comparison(comparison: Comparison) -> str:
    """The page of several runs side by side."""
    scores = [name for name in SCORE_NAMES if any(name in row.scores for row in comparison.rows)]
    best = {name: max(row.scores[name] for row in comparison.rows if name in row.scores) for name in scores}
    return render_page("comparison.html", comparison=comparison, scores=scores, best=best, names=SCORE_NAMES)


def render_page(template: str, **values: Any) -> str:
    """A page of raycap/templates in the common look: base.html, style.css."""
    css = _environment().get_template("style.css").render()
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    common = {"css": Markup(css), "css_hash": f"sha256-{digest}", "raycap_version": version("raycap")}
    return _environment().get_template(template).render(common | values)


@cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("raycap"),
        autoescape=True,
        finalize=lambda value: (
            value if isinstance(value, Markup) else visible(str(value))
        ),  # all of a page, none forgotten
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
