"""The report: one page that shows what runs did. ``python -m moco.report RUN [RUN ...]``; no torch here.

runs.py reads folders, curves.py chooses and thins what is drawn, page.py writes the file.
"""

from __future__ import annotations

import os

from moco import owner
from moco.errors import one_line, tell

FILE = "report.html"


def write_page(folder: str, wanted: bool = True, below: bool = False) -> str:
    """Write report.html about the runs of a folder, and with ``below`` about those in it, at the end of one: the path.
    It never raises; nothing is written, and the path is empty, where it cannot be or the folder is another run's by
    now."""
    if not wanted or owner.lost():
        return ""
    path = os.path.join(folder, FILE)
    try:
        from moco.report import page, walk

        page.write(page.of([folder], depth=walk.DEPTH if below else 0), path, "--save-dir")
    except Exception as error:  # the run has done what it was asked for, and its exit code says so
        tell(f"warning: {path} is not written: {one_line(error)}")
        return ""
    return path
