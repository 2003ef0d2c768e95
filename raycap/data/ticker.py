"""A line at intervals while a job works, from a thread: a slow unit must not look like a job that hangs."""

import contextlib
import threading
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def ticking(
    line: Callable[[], str], report: Callable[[str], None], every_s: float, at_end: bool = True
) -> Iterator[None]:
    """Reports line() every every_s seconds, and once at the end if that is asked for."""
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
        if at_end:
            report(line())


def pace(num_done: int, num_left: int, seconds: float) -> tuple[float, str]:
    """How many a second, and `eta_s=... elapsed_s=...` for a line: the time that is left is unknown until one is done."""
    rate = num_done / seconds if seconds else 0.0
    eta = f"{num_left / rate:.0f}" if rate else "unknown"
    return rate, f"eta_s={eta} elapsed_s={seconds:.0f}"
