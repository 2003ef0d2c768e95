"""What a user sees of a bulk run: a line every few seconds, and a table at its end."""

import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from raycap.data.tasks import waiting_for
from raycap.data.ticker import ticking

REPORT_S = 5.0
STAGES = ("read", "decode", "caption", "write")


class Progress:
    """Counts units as they are committed. rows: of units that exist; errors, seconds: of the units this run made."""

    def __init__(self, num_images: int, rows: int) -> None:
        self.num_images, self.rows = num_images, rows
        self.made = 0
        self.errors: Counter[str] = Counter()
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._first_rows = rows
        self._begun = time.monotonic()
        self._work_begun: float | None = None

    def add(self, *, num_images: int, made: bool, errors: dict[str, int], seconds: dict[str, float]) -> None:
        """One unit more. made: false if another run had committed it."""
        self.rows += num_images
        self.made += made
        self.errors.update(errors)
        for stage, value in seconds.items():
            self.seconds[stage] += value
        if self._work_begun is None:
            self._work_begun = time.monotonic() - sum(seconds.values())

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self._begun

    def images_per_s(self) -> float:
        """Since work on the first unit began: without the start of processes."""
        if self._work_begun is None:
            return 0.0
        return (self.rows - self._first_rows) / max(time.monotonic() - self._work_begun, 1e-3)

    def line(self) -> str:
        """One line of key=value. read_s and the others: process seconds spent so far, summed over processes."""
        rate = self.images_per_s()
        eta = f"{(self.num_images - self.rows) / rate:.0f}" if rate else "unknown"
        stages = " ".join(f"{stage}_s={self.seconds[stage]:.1f}" for stage in STAGES)
        waiting = waiting_for() if self._work_begun is None and self.rows < self.num_images else ""
        return (
            f"rows={self.rows}/{self.num_images} images_per_s={rate:.1f} errors={self.errors.total()} eta_s={eta} "
            f"elapsed_s={self.elapsed_s:.0f} {stages}{waiting}"
        )


def reporting(progress: Progress, report: Callable[[str], None]) -> AbstractContextManager[None]:
    """Reports a line every REPORT_S, and one at the end."""
    return ticking(progress.line, report, REPORT_S)


def table(summary: dict[str, Any]) -> str:
    """The images with a caption, and the others by error kind, most frequent first."""
    kinds = sorted(summary["errors"].items(), key=lambda item: (-item[1], item[0]))
    return "\n".join(f"{name:<20}{count:>10}" for name, count in [("captioned", summary["num_captioned"]), *kinds])
