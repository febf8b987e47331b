"""The report: one page that shows what runs did. ``python -m moco.report RUN [RUN ...]``; no torch here.

runs.py reads folders, curves.py chooses and thins what is drawn, page.py writes the file.
"""

from __future__ import annotations

import os

from moco import owner
from moco.errors import one_line, tell

FILE = "report.html"


def write_page(folder: str, wanted: bool = True) -> None:
    """Write report.html about the runs of a folder, at the end of one; it never raises. Nothing is written where the
    folder is another run's by now."""
    if not wanted or owner.lost():
        return
    path = os.path.join(folder, FILE)
    try:
        from moco.report import page

        page.write(page.of([folder], depth=0), path, "--save-dir")
    except Exception as error:  # the run has done what it was asked for, and its exit code says so
        tell(f"warning: {path} is not written: {one_line(error)}")
