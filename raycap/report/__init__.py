"""What a run folder holds -> report.html: one file without scripts that asks for nothing outside itself.

read.py and compare.py gather, chart.py places curves, page.py makes the page; the look is raycap/templates. Whatever came
from data is text there: escaped, with its invisible characters written out. Every number is one that a job has written.
"""

from collections.abc import Sequence

from raycap import storage
from raycap.report.compare import as_json, as_text, read_comparison
from raycap.report.page import render, render_comparison
from raycap.report.read import read_report

PAGE = "report.html"


def write_report(out: str) -> str:
    """Writes report.html below the run folder `out`, local or s3://, from what it holds, and returns its URL.

    Raises StorageError if the folder holds nothing to report, or cannot be read or written.
    """
    url = storage.join(out, PAGE)
    storage.put(url, render(read_report(out)).encode())
    return url


def write_comparison(out: str, names: Sequence[str]) -> str:
    """Writes report.html and comparison.json below `out` for the run folders `names` in it, prints the table, returns the URL.

    Raises StorageError if one of them was not trained and evaluated, or if `out` cannot be written.
    """
    comparison = read_comparison(out, names)
    url = storage.join(out, PAGE)
    storage.put(storage.join(out, "comparison.json"), as_json(comparison).encode())
    storage.put(url, render_comparison(comparison).encode())
    print(as_text(comparison), flush=True)
    return url
