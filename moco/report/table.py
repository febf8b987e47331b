"""A table of the report."""

from __future__ import annotations

from dataclasses import dataclass

Cell = str | float | None


@dataclass
class Table:
    """Columns of text and numbers under a title.

    Args:
        rows: as many cells each as there are ``columns``; None is an empty cell.
        note: a sentence below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
