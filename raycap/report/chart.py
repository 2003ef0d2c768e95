"""Curves of a training run -> where every line and label of their SVG lies. Owns no colours: they are in the style sheet."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import itemgetter
from typing import Any

MAX_POINTS = 400  # of one curve: more than the pixels it has
Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """points: (step, value). kind: "raw" is faint, "line" is plain, "marks" shows every point."""

    name: str
    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Curves over the step, with one scale."""

    title: str
    curves: tuple[Curve, ...]


def training_charts(records: Sequence[Record]) -> tuple[Chart, ...]:
    loss = _points(records, "loss")
    curves = [
        Curve(name="training loss", kind="raw", points=_thin(loss)),
        Curve(name="smoothed", kind="line", points=_thin(_smooth(loss))),
        Curve(name="validation loss", kind="marks", points=_thin(_points(records, "val_loss"))),
    ]
    cider = [Curve(name="validation CIDEr", kind="marks", points=_thin(_points(records, "cider")))]
    charts = (Chart(title="Loss", curves=tuple(curves)), Chart(title="CIDEr", curves=tuple(cider)))
    return tuple(chart for chart in charts if any(curve.points for curve in chart.curves))


def _points(records: Sequence[Record], name: str) -> list[tuple[float, float]]:
    pairs: list[tuple[Any, Any]] = [(record.get("step"), record.get(name)) for record in records]
    return [(x, y) for x, y in pairs if is_number(x) and is_number(y)]


def _smooth(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means over a thirtieth of the run around each point, so that the curve does not lag behind."""
    reach, sums = len(points) // 60 + 1, [0.0, *accumulate(y for _, y in points)]
    spans = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [
        (x, (sums[stop] - sums[first]) / (stop - first)) for (x, _), (first, stop) in zip(points, spans, strict=True)
    ]


def _thin(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most about MAX_POINTS of them: the lowest and the highest of each stretch, so that no spike is lost."""
    size = -(-len(points) // (MAX_POINTS // 2))
    if size <= 2:
        return tuple(points)
    stretches = [points[first : first + size] for first in range(0, len(points), size)]
    value = itemgetter(1)
    return tuple(point for part in stretches for point in sorted({min(part, key=value), max(part, key=value)}))


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# ---- on the page


@dataclass(frozen=True, kw_only=True, slots=True)
class Plot:
    """A chart in the pixels of its SVG. lines, marks: per curve; x_ticks, y_ticks: (pixel, label); marks: (x, y, words)."""

    width: int
    height: int
    left: int
    right: int
    bottom: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    lines: tuple[tuple[str, str], ...]
    marks: tuple[tuple[str, tuple[tuple[float, float, str], ...]], ...]


def plot(chart: Chart, *, width: int = 480, height: int = 250) -> Plot:
    """Where everything of a chart lies. Values begin at 0; where they span more than a factor of 4, they are logarithmic."""
    left, right, top, bottom = 46, width - 14, 12, height - 42
    points = [point for curve in chart.curves for point in curve.points]
    lowest, highest = min(y for _, y in points), max(y for _, y in points)
    logarithmic = 0 < 4 * lowest < highest
    y_ticks = log_ticks(lowest, highest) if logarithmic else ticks(min(0.0, lowest), highest)
    scale = math.log if logarithmic else float
    x_ticks = ticks(0, max(x for x, _ in points))  # all charts of a run begin where it began
    x_stop = max(1, *(x for x, _ in points))  # the axis ends with the run

    def place_x(x: float) -> float:
        return round(left + (right - left) * (x - x_ticks[0]) / (x_stop - x_ticks[0]), 1)

    def place_y(y: float) -> float:
        share = (scale(y) - scale(y_ticks[0])) / (scale(y_ticks[-1]) - scale(y_ticks[0]))
        return round(bottom - (bottom - top) * share, 1)

    def mark(curve: Curve) -> Iterator[tuple[float, float, str]]:
        stride = 1 if curve.kind == "marks" else len(curve.points) // 50 + 1
        for x, y in curve.points[::stride]:
            yield place_x(x), place_y(y), f"step {x:g}, {curve.name}: {y:.4g}"

    return Plot(
        width=width,
        height=height,
        left=left,
        right=right,
        bottom=bottom,
        x_ticks=tuple((place_x(x), f"{x:g}") for x in x_ticks if x <= x_stop),
        y_ticks=tuple((place_y(y), f"{y:g}") for y in y_ticks),
        lines=tuple((c.kind, " ".join(f"{place_x(x)},{place_y(y)}" for x, y in c.points)) for c in chart.curves),
        marks=tuple((c.kind, tuple(mark(c))) for c in chart.curves if c.kind != "raw"),
    )


def ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers at equal distances, from `low` or just below to `high` or just above."""
    if high <= low:
        high = low + 1
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten, from `low` > 0 or just below to `high` or just above."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    marks = [float(f"{factor}e{power}") for power in powers for factor in (1, 2, 5)]
    first, last = max(m for m in marks if m <= low), min(m for m in marks if m >= high)
    return [m for m in marks if first <= m <= last]
