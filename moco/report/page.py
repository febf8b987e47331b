"""Writes the page of a report."""

from __future__ import annotations

import html

from moco import files
from moco.errors import printable
from moco.report.runs import Run


def write(runs: list[Run], path: str) -> None:
    """Write the page as :func:`moco.files.replacing` does."""
    rows = "".join(f"<li>{html.escape(printable(run.name))}: {run.kind}, {run.records} records</li>" for run in runs)
    text = f'<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Report</title><ul>{rows}</ul></html>\n'
    files.write_text(text.encode(errors="replace").decode(), path, "--out")
