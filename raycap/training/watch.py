"""How a run is seen while it trains: records from rank 0 reach the driver's terminal and metrics.jsonl."""

import json
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import ray
from rich.console import Console
from rich.live import Live
from rich.text import Text

from raycap import storage

Record = dict[str, Any]
POLL_S = 0.3


@ray.remote(num_cpus=0)
class Board:
    """Carries records from the workers to the driver, and the error that no restart would mend."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self._error: str | None = None

    def post(self, record: Record) -> None:
        self._records.append(record)

    def fail(self, message: str) -> None:
        self._error = self._error or message

    def error(self) -> str | None:
        return self._error

    def take(self) -> list[Record]:
        records, self._records = self._records, []
        return records


def read_records(out: str) -> list[Record]:
    """The records of metrics.jsonl; a line that a kill or a full disk cut short is none."""
    url = storage.join(out, "metrics.jsonl")
    records = []
    for line in storage.read_bytes(url).splitlines() if storage.exists(url) else ():
        with suppress(ValueError):
            records.append(json.loads(line))
    return [record for record in records if isinstance(record, dict) and "step" in record]


class MetricsFile:
    """metrics.jsonl in the output root, one record a line. A resumed run drops what came after its checkpoint."""

    def __init__(self, out: str, step: int) -> None:
        self._url = storage.join(out, "metrics.jsonl")
        self._lines: list[str] = []
        if storage.exists(self._url):
            self._lines = [json.dumps(record) for record in read_records(out) if record["step"] <= step]
        self._local = not storage.is_url(out)
        self.flush()

    def append(self, record: Record) -> None:
        line = json.dumps(record)
        self._lines.append(line)
        if self._local:
            with open(self._url, "a") as file:
                file.write(line + "\n")

    def resumed(self, step: int) -> Record:
        """Notes that the run goes on from this step; returns the record."""
        record = {"step": step, "resumed_from": step}
        self.append(record)
        self.flush()
        return record

    def flush(self) -> None:
        """Object stores cannot append: there the whole file is written again, at checkpoints."""
        storage.put(self._url, "".join(line + "\n" for line in self._lines).encode())


def show(record: Record, write: Callable[[str], None]) -> None:
    """One key=value line, or a few for the samples of an evaluation."""
    samples = record.get("samples", [])
    write(" ".join(f"{key}={_short(value)}" for key, value in record.items() if key not in ("samples", "batch_digest")))
    for sample in samples:
        write(f"  {sample['key']}: {sample['caption']!r} (reference: {sample['reference']!r})")


class Display:
    """While open, a thread takes the board's records and prints them: one live line on a terminal, lines otherwise."""

    def __init__(self, board: Any, num_steps: int) -> None:
        self._board = board
        self._num_steps = num_steps
        self.finished: Record = {}
        """The last record of a run that reached its end."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="raycap-display", daemon=True)
        self._console = Console()
        self._live = (
            Live(Text("starting the workers"), console=self._console, refresh_per_second=4, transient=True)
            if sys.stdout.isatty()
            else None
        )

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        if self._live:
            self._live.stop()

    def _run(self) -> None:
        stopping = False
        while not stopping:
            stopping = self._stop.wait(POLL_S)
            try:
                records: list[Record] = ray.get(self._board.take.remote())
            except ray.exceptions.RayError:
                return  # the cluster is gone; the run's own error says so
            for record in records:
                self._print(record)

    def _print(self, record: Record) -> None:
        if "finished" in record:
            self.finished = record
        elif "resumed_from" in record:
            self._console.print(f"resuming from step {record['resumed_from']}", highlight=False)
        elif self._live is None:
            show(record, lambda line: print(line, flush=True))
        elif "lr" in record:
            bar = "━" * round(8 * record["step"] / self._num_steps)
            self._live.update(
                Text(
                    f"{bar:<8} {record['step']}/{self._num_steps} ETA {record['eta_s']} s loss {record['loss']:.3f} "
                    f"lr {record['lr']:.0e} wait {record['data_wait_percent']:.0f} % "
                    f"{record['images_per_s']:.0f} images/s {record['captions_per_s']:.0f} captions/s",
                    no_wrap=True,
                    overflow="ellipsis",
                )
            )
        else:
            show(record, lambda line: self._console.print(line, highlight=False))


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
