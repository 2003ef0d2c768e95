"""What a run folder holds -> report.html: one file without scripts that asks for nothing outside itself.

read.py gathers, chart.py places curves, page.py makes the page; the look is raycap/templates. Whatever came from data is
text there: escaped, with its invisible characters written out. Every number is one that a job has written.
"""

from raycap import storage
from raycap.report.page import render
from raycap.report.read import read_report

PAGE = "report.html"


def write_report(out: str) -> str:
    """Writes report.html below the run folder `out`, local or s3://, from what it holds, and returns its URL.

    Raises StorageError if the folder holds nothing to report, or cannot be read or written.
    """
    url = storage.join(out, PAGE)
    storage.put(url, render(read_report(out)).encode())
    return url
