"""What is read of result files, before it is tables: rows by measure, and cells from JSON that may say anything."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from typing import Any

from moco.errors import printable
from moco.files import json_of, open_regular
from moco.report.table import Cell, Table

MOST_BYTES = 10_000_000  # of a result file; none of ours is a tenth as long
MOST_ROWS = 200  # of one table
Row = dict[str, str]  # cells by column, an empty one may be missing

CHECKPOINT, FILE = "checkpoint", "result file"
MEASURES = {"precision_at_1": "precision@1, %", "r_precision": "R-precision, %", "map_at_r": "mAP@R, %",
            "map": "mAP, %", "ami": "AMI, %", "nmi": "NMI, %"}  # fmt: skip
# The tables of many files, in this order, with their columns; one that stays empty is left out.
PROBE, RATES, TUNED, SEEDS, KNN, SHOTS, RETRIEVAL, RANGE, AP, DAMAGED = (
    "Linear probe", "Linear probe: each learning rate", "Fine-tuning on a share of the labels",
    "Fine-tuning: mean ± standard deviation over seeds", "k-NN", "Few-shot", "Retrieval and clustering",
    "Learning-rate range test", "Detection", "Files that cannot be read",
)  # fmt: skip
COLUMNS = {
    PROBE: [CHECKPOINT, "top-1, %", "top-5, %", "best top-1, %", "lr", "epochs", "features", "chosen on",
            "training images", "held-out images", "unreadable", FILE],
    RATES: [CHECKPOINT, "lr", "top-1, %", "top-5, %", "best top-1, %", "held-out loss", "outcome", FILE],
    TUNED: [CHECKPOINT, "labels, %", "training images", "weights", "lr encoder", "lr classifier", "epochs", "seed",
            "test top-1, %", "test top-5, %", "best test top-1, %", "validation top-1, %", "best validation top-1, %",
            "best epoch", "few-shot, %", FILE],
    SEEDS: [CHECKPOINT, "labels, %", "weights", "lr encoder", "lr classifier", "epochs", "seeds", "test top-1, %",
            "validation top-1, %"],
    KNN: [CHECKPOINT, "k", "T", "top-1, %", "queries", "each image against the others", "unreadable", FILE],
    SHOTS: [CHECKPOINT, "ways", "shots", "accuracy, %", "episodes", "queries a class", "images", "warning", FILE],
    RETRIEVAL: [CHECKPOINT, "of", *MEASURES.values(), "images", FILE],
    RANGE: [CHECKPOINT, "suggested lr", "lowest loss at", "diverged at", "steps", "warning", FILE],
    AP: [CHECKPOINT, "recipe", "trials", "AP50", "AP", "AP75", "mask AP50", "mask AP", "mask AP75", "state", FILE],
    DAMAGED: [FILE, "what is wrong"],
}  # fmt: skip
NOTES = {  # with the column that they are about
    PROBE: ("chosen on", "A rate that was chosen on the held-out images makes their accuracy optimistic."),
    SHOTS: ("accuracy, %", "± is half the 95 % interval over episodes."),
    AP: ("AP", "± is the standard deviation over trials."),
}


class Unusable(ValueError):
    """What is wrong with a file of ours."""


class Finds:
    """What was found so far: rows by table, and tables of one file each."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.rows: dict[str, list[Row]] = {title: [] for title in COLUMNS}
        self.own: list[Table] = []

    def add(self, title: str, cells: Row) -> None:
        """One more row of a table."""
        self.rows[title].append(cells)

    def tables(self, left_out: str) -> list[Table]:
        """The tables with rows."""
        self.rows[SEEDS] = list(_over_seeds(self.rows[TUNED]))
        for rows in (self.rows[title] for title in COLUMNS if title != AP):  # published rows stay before ours
            rows.sort(key=lambda row: row.get(CHECKPOINT, ""))  # stable: the rows of a file stay in their order
        made = [_table(title, rows) for title, rows in self.rows.items() if rows and title != DAMAGED]
        found = [*made, *self.own, *([_table(DAMAGED, rows)] if (rows := self.rows[DAMAGED]) else [])]
        return [*found, Table("Not looked at", [], [], left_out)] if left_out else found

    def checkpoint(self, named: Any, result: str) -> str:
        """A checkpoint as a reader of ``folder`` knows it: by its path below, else by the last two parts of its name;
        with a word where it was written after the ``result``, which is then of an earlier file."""
        if not isinstance(named, str) or not named or "\0" in named:
            return "random weights" if named == "" else "not recorded"
        beside = os.path.join(self.folder, os.path.basename(named))
        moved = f"/{os.path.abspath(beside)}".endswith("/" + os.path.normpath(named).lstrip("./"))
        path = next((p for p in (named, *([beside] if moved else [])) if os.path.isfile(p)), "")
        if not path:
            return "/".join(os.path.normpath(named).split("/")[-2:])
        shown = relative(path, self.folder)
        shown = "/".join(os.path.normpath(path).split("/")[-2:]) if shown.startswith("..") else shown
        return shown + " (written after this result)" * (os.path.getmtime(path) > os.path.getmtime(result) + 1)


def _table(title: str, rows: list[Row]) -> Table:
    columns = [name for name in COLUMNS[title] if any(row.get(name) for row in rows)]
    cells: list[list[Cell]] = [[row.get(name, "") for name in columns] for row in rows[:MOST_ROWS]]
    more = f"{len(rows) - MOST_ROWS} more rows are left out." if len(rows) > MOST_ROWS else ""
    about, note = NOTES.get(title, ("", ""))
    return Table(title, columns, cells, " ".join(filter(None, [note * (about in columns), more])))


def _over_seeds(rows: list[Row]) -> Iterator[Row]:
    """A row for each setting that was fine-tuned under several seeds."""
    from moco.sweep.results import Figure

    same = [name for name in COLUMNS[SEEDS] if name != "seeds" and "top-1" not in name]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(name, "") for name in same), []).append(row)
    for key, mine in groups.items():
        seeds = {row.get("seed", "") for row in mine}
        if 1 < len(seeds) == len(mine):
            columns = ("test top-1, %", "validation top-1, %")
            values = {name: [float(row[name]) for row in mine if row.get(name)] for name in columns}
            means = {name: Figure(found, len(mine)).summary() if found else "" for name, found in values.items()}
            yield {**dict(zip(same, key, strict=True)), "seeds": str(len(mine)), **means}


# ------------------------------------------------------------------------------------------------- files and cells


def text_of(path: str) -> str:
    """A file of a sensible size; OSError for a pipe or a longer one.

    Raises:
        Unusable: bytes that are no text.
    """
    with open_regular(path, MOST_BYTES) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError as error:
            raise Unusable("it is no text") from error


class Entries(dict[str, Any]):
    """A dictionary from a JSON file that may say anything, and its entries as cells: empty for what is not there."""

    @classmethod
    def read(cls, path: str) -> Entries:
        """The dictionary in a file, an empty one for another kind of JSON.

        Raises:
            OSError, Unusable: no file that can be read, or no JSON.
        """
        text = text_of(path)
        try:
            found = json_of(text)
        except ValueError as error:
            raise Unusable(f"it is no whole JSON: {error}") from error
        return cls(found if isinstance(found, dict) else {})

    def number(self, key: str) -> float | None:
        """The number under ``key``, None for none; :class:`Unusable` for something else."""
        value = self.get(key)
        if value is None or (type(value) in (int, float) and (type(value) is float or abs(value) < 1e300)):
            return value
        raise Unusable(f"{printable(repr(value))[:60]} under {key!r} is no number")

    def cell(self, key: str, form: str = "{:g}") -> str:
        """The number in this form."""
        value = self.number(key)
        return "" if value is None else form.format(value)

    def percent(self, key: str) -> str:
        """The number with two digits."""
        return self.cell(key, "{:.2f}")

    def count(self, key: str) -> str:
        """The whole number; empty for zero."""
        value = self.number(key)
        return f"{int(value):,}" if value and math.isfinite(value) else ""

    def word(self, key: str) -> str:
        """The text."""
        value = self.get(key)
        return value if isinstance(value, str) else ""

    def inside(self, key: str) -> Entries:
        """The dictionary under ``key``."""
        value = self.get(key)
        return Entries(value if isinstance(value, dict) else {})

    def each(self, key: str) -> list[Entries]:
        """The dictionaries of the list under ``key``."""
        value = self.get(key)
        return [Entries(one) for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def relative(path: str, folder: str) -> str:
    """The path as seen from the folder."""
    return os.path.relpath(os.path.realpath(path), os.path.realpath(folder))
