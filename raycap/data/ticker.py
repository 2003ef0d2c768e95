"""A line at intervals while a job works, from a thread: a slow unit must not look like a job that hangs."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ticking(line: Callable[[], str], report: Callable[[str], None], every_s: float) -> Iterator[None]:
    """Reports line() every every_s seconds, and once at the end."""
    finished = threading.Event()

    def tick() -> None:
        while not finished.wait(every_s):
            report(line())

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        finished.set()
        ticker.join()
        report(line())
