"""Reads what several trainings found: the tables of sweeps and of detections."""

from __future__ import annotations

import os

from moco.files import dictionary_of
from moco.report.gather import AP, CHECKPOINT, FILE, MOST_ROWS, Entries, Finds, Row, relative, text_of
from moco.report.table import Cell, Table
from moco.report.walk import Place
from moco.sweep import results

KINDS = {"bbox": "", "segm": "mask "}  # of predictions, in detectron2's words and in ours
APS = ("AP50", "AP", "AP75")


def of_sweep(finds: Finds, place: Place, path: str) -> None:
    """results.csv of a sweep; its trials are then not rows of other tables."""
    found = results.read(text_of(path))
    if found is None:
        return
    place.leave("trials")
    choice = [f"{found.choice} (selection)", "selected"] if found.choice else []
    rows: list[list[Cell]] = []
    for setting in found.settings[:MOST_ROWS]:
        cells: list[Cell] = [setting.values[name] for name in found.names]
        if setting.choice is not None:
            cells += [setting.choice.summary(), "yes" * setting.reported]
        rows.append([*cells, *(setting.tests[name].summary() if setting.reported else "" for name in found.tests)])
    title = f"Sweep: {relative(place.path, finds.folder)}"
    note = " ".join(_notes(found, _checkpoints(finds, place, found.folders)))
    finds.own.append(Table(title, [*found.names, *choice, *found.tests], rows, note))


def _notes(found: results.Results, checkpoints: str) -> list[str]:
    tests = ", ".join(found.tests)
    notes = [f"Checkpoint: {checkpoints}."] if checkpoints else []
    notes += [f"± is the standard deviation over {found.seeds} seeds."] if found.seeds > 1 else ["One seed."]
    notes += [f"Selected by {found.choice}; {tests} read for selected settings alone."] if found.choice else []
    if found.unfinished:
        notes.append(f"{len(found.unfinished)} trials are not done, the first {found.unfinished[0]}.")
    if len(found.settings) > MOST_ROWS:
        notes.append(f"{len(found.settings) - MOST_ROWS} more settings are left out.")
    return notes


def _checkpoints(finds: Finds, place: Place, folders: list[str]) -> str:
    """What the trials of a sweep began from, as far as they are done and say so."""
    named = {}
    for folder in folders[:MOST_ROWS]:
        path = os.path.join(place.path, "trials", os.path.basename(folder), "result.json")
        try:
            result = Entries.read(path)
        except (OSError, ValueError):
            continue
        if "pretrained" in result:
            named[finds.checkpoint(result["pretrained"], path)] = True
    return ", ".join(named)


def of_detection(finds: Finds, place: Place, path: str) -> None:
    """summary.json of detection/run.py, with the published rows that it is compared with."""
    found = Entries.read(path)
    figures = {kind + name: found.inside(kind + name) for kind in KINDS.values() for name in APS}
    if not any(figures.values()) or "config" not in found:
        return
    place.leave(*(name for name in place.folders if name.startswith("trial_")))
    for who, values in found.inside("published").items():
        if isinstance(values, list) and len(values) == 1 + len(APS):
            finds.add(AP, {CHECKPOINT: f"{who} (published)", "recipe": found.word("config"),
                           **dict(zip(["trials", *APS], map(str, values), strict=True))})  # fmt: skip
    trials = max(len(figure.get("trials", ())) for figure in figures.values())
    cells = {name: figure.cell("mean", "{:.1f}") for name, figure in figures.items()}
    if trials > 1:
        cells = {name: cell and f"{cell} ± {figures[name].cell('std', '{:.1f}')}" for name, cell in cells.items()}
    recipe = " ".join([found.word("config"), *map(str, found.get("opts") or ())])
    _add(finds, path, finds.checkpoint(found.get("checkpoint"), path), recipe, {**cells, "trials": str(trials)})


def of_detector(finds: Finds, place: Place, path: str) -> None:
    """results.json of one training of a detector."""
    found = Entries.read(path)
    cells = {kind + name: found.inside(key).cell(name, "{:.1f}") for key, kind in KINDS.items() for name in APS}
    if any(cells.values()):
        _add(finds, path, _weights_of(place), "", {**cells, "trials": "1", "state": "done"})


def of_training(finds: Finds, place: Place, path: str) -> None:
    """metrics.json of detectron2, a record a line: the last evaluation of a training that has not ended."""
    if "results.json" in place.files:
        return
    last = Entries()
    for line in text_of(path).splitlines():
        if "/AP" in line:
            last = Entries(dictionary_of(line)) or last  # empty for a line that is just being written
    cells = {kind + name: last.cell(f"{key}/{name}", "{:.1f}") for key, kind in KINDS.items() for name in APS}
    if any(cells.values()):
        state = f"at iteration {last.cell('iteration', '{:.0f}')}"
        _add(finds, path, _weights_of(place), "", {**cells, "trials": "1", "state": state})


def _add(finds: Finds, path: str, checkpoint: str, recipe: str, cells: Row) -> None:
    finds.add(AP, {CHECKPOINT: checkpoint, "recipe": recipe, FILE: relative(path, finds.folder), **cells})


def _weights_of(place: Place) -> str:
    """What the config.yaml that detectron2 writes beside its results names as weights."""
    try:
        lines = text_of(os.path.join(place.path, "config.yaml")).splitlines()
    except (OSError, ValueError):
        return "not recorded"
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("  WEIGHTS:"))
    return "/".join(next(named, "not recorded").split("/")[-2:])
