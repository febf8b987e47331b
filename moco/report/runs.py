"""Finds the runs in folders and reads what they have left: log, settings, events, and whether they are still at work.

Nothing here raises for a damaged file: what can be read is shown, and what cannot is counted.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from dataclasses import dataclass, field
from typing import Any

from moco import files
from moco.errors import UserError
from moco.report.walk import DEPTH, Walk

# What a log's name says of its run: NAME.jsonl of moco.train.runlog.RunLog.
KINDS = {
    "log": "pretraining", "lincls": "linear probe", "semisup": "fine-tuning", "evaluate": "evaluation",
    "knn": "k-NN", "few_shot": "few-shot episodes", "lr_find": "rate search",
}  # fmt: skip
MOST_BYTES = 4 << 30  # of a log
LARGEST = 1e100  # of a number: no float32 is a hundredth as long, and sums of them are finite


@dataclass
class Run:
    """One run: a log and what lies beside it.

    Args:
        folder: where it is. log: name of its log without .jsonl.
        name: what tells it apart from the other runs of a report.
        figures: the numbers of the log by name, NaN where it has null: steps and values of equal lengths.
        records: how many it has. step: of the last one. damaged: lines of the log that cannot be read.
    """

    folder: str
    log: str
    name: str = ""
    figures: dict[str, tuple[array, array]] = field(default_factory=dict)
    records: int = 0
    step: float = 0.0
    damaged: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """What it was, for people."""
        return KINDS[self.log]

    def path(self, ending: str = ".jsonl") -> str:
        """Of its log, or of what lies beside it: ``_settings.json``, ``_events.jsonl``."""
        return os.path.join(self.folder, self.log + ending)


def find(paths: list[str], depth: int = DEPTH) -> list[Run]:
    """The runs in these folders and so many levels below, read and named; none for folders without a log.

    Raises:
        UserError: a path is no folder.
    """
    found: dict[str, Run] = {}
    for path in paths:
        if not os.path.isdir(path):
            what = "a file" if os.path.exists(path) else "missing"
            raise UserError(f"{path} is {what}; give the folder of a run, or a folder of runs.")
        places = sorted(Walk(path, depth), key=lambda place: place.path)
        for run in (Run(place.path, log) for place in places for log in KINDS if f"{log}.jsonl" in place.files):
            found.setdefault(os.path.realpath(run.path()), run)
    runs = list(found.values())
    for run in runs:
        _read(run)
    _name(runs)
    return runs


def _name(runs: list[Run]) -> None:
    """Names that tell the runs apart: their folders without what all have in common, and the kind where one folder
    holds several."""
    if not runs:
        return
    folders = [os.path.realpath(run.folder) for run in runs]
    common = os.path.commonpath(folders)
    several = {folder for folder in folders if folders.count(folder) > 1}
    for run, folder in zip(runs, folders, strict=True):
        name = os.path.relpath(folder, common)
        name = os.path.basename(common) if name == "." else name
        run.name = f"{name} ({run.kind})" if folder in several else name


# ------------------------------------------------------------------------------------------------------- one run


def _read(run: Run) -> None:
    _read_log(run)
    run.settings = _dictionary(run.path("_settings.json"))
    run.events = [event for event in files.records(run.path("_events.jsonl")) if isinstance(event.get("kind"), str)]


def _read_log(run: Run) -> None:
    try:
        lines = os.fdopen(files.regular_handle(run.path(), MOST_BYTES), encoding="utf-8", errors="replace")
    except OSError:
        return
    with lines:
        for line in lines:
            record = _record(line)
            if record is not None:
                _add(run, record)
            elif line.strip() and line.endswith("\n"):  # the last line may just be being written
                run.damaged += 1


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = files.json_of(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and number(record.get("step")) is not None else None


def _add(run: Run, record: dict[str, Any]) -> None:
    run.records += 1
    run.step = step = float(record.pop("step"))
    for name, value in record.items():
        value = math.nan if value is None else number(value)
        if value is not None:
            steps, values = run.figures.setdefault(name, (array("d"), array("d")))
            steps.append(step)
            values.append(value)


def number(value: Any) -> float | None:
    """A JSON number as a float; None for all else, and beyond LARGEST."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) <= LARGEST else None


def _dictionary(path: str) -> dict[str, Any]:
    try:
        with open(files.regular_handle(path, 1 << 24), encoding="utf-8", errors="replace") as file:
            return files.dictionary_of(file.read())
    except OSError:
        return {}


def shown(value: Any) -> str:
    """A setting as text: "–" for None, "on" and "off" for switches, a list as it is typed."""
    if isinstance(value, list):
        return " ".join(map(shown, value))
    if isinstance(value, bool) or value is None:
        return {None: "–", True: "on", False: "off"}[value]
    return value if isinstance(value, str) else json.dumps(value)
