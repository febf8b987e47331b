"""A sweep's results.csv, read back: each setting with its figures over the seeds, and which of them was selected."""

from __future__ import annotations

import csv
import io
import math
import statistics
from dataclasses import dataclass
from typing import Any

CSV = "results.csv"
SELECT, REPORT = "select", "report"  # the stages, as they stand in the file
RUN = ["seed", "status", "exit_code", "seconds"]  # columns of a trial, between its settings and its figures


@dataclass(frozen=True)
class Figure:
    """One metric of one setting: its values over the seeds that have one, of ``seeds`` in all."""

    values: list[float]
    seeds: int

    @property
    def complete(self) -> bool:
        """Whether every seed has a value."""
        return len(self.values) == self.seeds

    @property
    def mean(self) -> float:
        """Over the seeds that have a value, of which there is one at least."""
        return statistics.mean(self.values)

    @property
    def std(self) -> float:
        """Standard deviation over seeds (n - 1 in the denominator); 0 for one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else 0.0

    def summary(self, sign: str = "-") -> str:
        """Mean and standard deviation; how many seeds are missing, if any are. sign: "+" shows that of a gain too."""
        if not self.values:
            return "-"
        spread = f" ± {self.std:.2f}" if len(self.values) > 1 else ""
        missing = "" if self.complete else f" ({len(self.values)} of {self.seeds} seeds)"
        return f"{self.mean:{sign}.2f}{spread}{missing}"


@dataclass(frozen=True)
class Setting:
    """A setting of the grid, as words, with its figures: of the selection (None where nothing is selected) and, for a
    setting that is reported, of the tests."""

    values: dict[str, str]
    choice: Figure | None
    tests: dict[str, Figure]

    @property
    def reported(self) -> bool:
        """Whether the test figures were read: with a selection, whether it was selected."""
        return bool(self.tests)


@dataclass(frozen=True)
class Results:
    """What results.csv says. ``names`` are the settings that were varied, ``choice`` the metric that selected (empty
    for none), ``unfinished`` the folders of trials that are not done, each with its status."""

    names: list[str]
    choice: str
    tests: list[str]
    seeds: int
    settings: list[Setting]
    folders: list[str]
    unfinished: list[str]


def read(text: str) -> Results | None:
    """The results in the text of a results.csv; None for a table of another kind.

    Raises:
        ValueError: a table of a sweep with a row that is cut or a figure that is no number.
    """
    reader = csv.DictReader(io.StringIO(text, newline=""))
    columns = list(reader.fieldnames or ())
    if columns[:1] != ["stage"] or columns[-1:] != ["folder"] or not set(RUN) <= set(columns):
        return None
    at = columns.index(RUN[0])
    names, metrics = columns[1:at], columns[at + len(RUN) : -1]
    rows = list(reader)
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"row {number + 1} has not the columns of the first line")
    stages = {stage: [row for row in rows if row["stage"] == stage] for stage in (SELECT, REPORT)}
    if not metrics:
        raise ValueError("it has no column of a figure")
    choice = metrics[0] if stages[SELECT] else ""  # the selection's column is written first
    tests = [name for name in metrics if name != choice or any(row[name] for row in stages[REPORT])]
    chosen = {stage: _by_setting(found, names) for stage, found in stages.items()}
    settings = [
        Setting(
            dict(zip(names, key, strict=True)),
            _figure(chosen[SELECT][key], choice) if choice else None,
            {test: _figure(chosen[REPORT][key], test) for test in tests} if key in chosen[REPORT] else {},
        )
        for key in dict.fromkeys([*chosen[SELECT], *chosen[REPORT]])
    ]
    folders = list(dict.fromkeys(row["folder"] for row in rows))
    unfinished = [f"{row['folder']}: {row['status']}" for row in rows if row["status"] != "done"]
    return Results(names, choice, tests, len({row["seed"] for row in rows}), settings, folders, unfinished)


def _by_setting(rows: list[dict[str, Any]], names: list[str]) -> dict[tuple, list[dict[str, Any]]]:
    found: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def _figure(rows: list[dict[str, Any]], metric: str) -> Figure:
    values = (float(row[metric]) for row in rows if row[metric])
    return Figure([value for value in values if math.isfinite(value)], len(rows))  # of a diverged trial there is none
