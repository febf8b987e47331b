"""What a sweep found: one setting a group selected by its mean over seeds, and tables and a picture of all of them.

Selection sees the figures of ``select`` alone. The figures of ``report`` are read for selected settings only (for all
of them when nothing is selected).
"""

from __future__ import annotations

import csv
import io
import os
from typing import Any

from moco import files
from moco.sweep import trial as trials
from moco.sweep.commands import plain
from moco.sweep.paired import words
from moco.sweep.picture import draw_results
from moco.sweep.results import CSV, REPORT, RUN, SELECT
from moco.sweep.spec import Spec, Stage, Trial
from moco.sweep.trial import difference, figure

TABLE, PLOT = "results.md", "results.png"


def selected(spec: Spec) -> list[dict[str, Any]]:
    """The setting of each group with the best mean over seeds (the first of equals); all settings without ``select``.

    A setting without a figure for every seed is no candidate: a mean over fewer seeds cannot be compared.
    """
    if spec.select is None:
        return spec.settings
    best: dict[tuple, tuple[float, dict[str, Any]]] = {}
    for setting in spec.settings:
        found = figure(spec, spec.select, setting, spec.select.metrics[0])
        if not found.complete:
            continue
        score = found.mean if spec.select.mode == "max" else -found.mean
        group = spec.group(setting)
        if group not in best or score > best[group][0]:
            best[group] = (score, setting)
    return [setting for _, setting in best.values()]


def passes(spec: Spec, chosen: list[dict[str, Any]]) -> list[tuple[str, Stage, list[Trial]]]:
    """(name, stage, trials) of all that the sweep runs, given the selected settings."""
    first = [(SELECT, spec.select, spec.trials(spec.select))] if spec.select else []
    return [*first, (REPORT, spec.report, spec.trials(spec.report, chosen))]


def write_tables(spec: Spec, chosen: list[dict[str, Any]]) -> str:
    """Write results.csv, results.md and results.png into the sweep's folder; returns the Markdown."""
    text = markdown(spec, chosen)
    files.write_text(_csv(spec, chosen), os.path.join(spec.out, CSV), "--out")
    files.write_text(text, os.path.join(spec.out, TABLE), "--out")
    draw_results(spec, chosen, os.path.join(spec.out, PLOT))
    return text


def _csv(spec: Spec, chosen: list[dict[str, Any]]) -> str:
    """One row a trial and stage, with that stage's figures alone."""
    names = list(spec.settings[0])
    metrics = dict.fromkeys(metric for stage in spec.stages for metric in stage.metrics)
    file = io.StringIO()
    columns = ["stage", *names, *RUN, *metrics, "folder"]
    rows = csv.DictWriter(file, columns, lineterminator="\n")
    rows.writeheader()
    for name, stage, mine in passes(spec, chosen):
        for trial in mine:
            record = trials.read_record(trial.folder) or trials.Record("not run")
            entry = {"stage": name, **trial.settings, "seed": trial.seed, "status": record.status}
            entry |= {"exit_code": record.exit_code, "seconds": record.seconds, "folder": trial.folder}
            rows.writerow({**entry, **{metric: trials.number(trial, metric) for metric in stage.metrics}})
    return file.getvalue()


def markdown(spec: Spec, chosen: list[dict[str, Any]]) -> str:
    """A table with a row a setting, what was selected and how, and the trials that did not finish."""
    names, tests = list(spec.settings[0]), spec.report.metrics
    choice = [f"{spec.select.metrics[0]} (selection)", "selected"] if spec.select else []
    title = f"# {os.path.basename(spec.main)}: {os.path.basename(spec.path)}"
    head = [*names, *choice, *(column for test in tests for column in (test, *_minus(spec, test)))]
    lines = [title, "", _row(head), _row(["---"] * len(head))]
    for setting in spec.settings:
        cells = [_cell(setting[name]) for name in names]
        mine = setting in chosen
        if spec.select:
            cells += [figure(spec, spec.select, setting, spec.select.metrics[0]).summary(), "yes" if mine else ""]
        cells += [cell for test in tests for cell in _reported(spec, setting if mine else None, chosen, test)]
        lines.append(_row(cells))
    lines += ["", " ".join([_how(spec), *(f"Note: {note}." for note in spec.notes)])]
    for name, stage, mine in passes(spec, chosen):
        lines += dict.fromkeys(f"- {name}, {why}" for trial in mine if (why := why_unfinished(trial, stage)))
    return "\n".join(lines) + "\n"


def _minus(spec: Spec, test: str) -> list[str]:
    """The head of the column of differences; none without a baseline."""
    return [f"{test} minus {words(spec.baseline)}"] if spec.baseline else []


def _reported(spec: Spec, setting: dict[str, Any] | None, chosen: list[dict[str, Any]], test: str) -> list[str]:
    """A test's cells of a setting, None for one that is not reported: its figure and, with a baseline, the gain."""
    if setting is None:
        return [""] * (1 + bool(spec.baseline))
    other, cells = spec.baseline_of(setting, chosen), [figure(spec, spec.report, setting, test).summary()]
    if other is not None:
        cells.append(difference(spec, spec.report, setting, other, test).summary("+"))
    return [*cells, ""][: 1 + bool(spec.baseline)]


def why_unfinished(trial: Trial, stage: Stage) -> str:
    """What is wrong with a trial, empty when nothing is."""
    record = trials.read_record(trial.folder)
    if record is None:
        why = "not run"
    elif record.status != trials.DONE:
        why = record.summary()
    else:
        lacking = [metric for metric in stage.metrics if trials.number(trial, metric) is None]
        if len(lacking) < len(stage.metrics):
            lacking = [metric for metric in lacking if not trials.not_measured(trial, metric)]
        why = f"done, but without a finite {lacking[0]}" if lacking else ""
    return why and f"{trial.folder}: {why}"


def _how(spec: Spec) -> str:
    seeds = f"Mean ± standard deviation over {len(spec.seeds)} seeds" if len(spec.seeds) > 1 else "One seed"
    if spec.baseline and len(spec.seeds) > 1:
        seeds += f", also of the differences to {words(spec.baseline)}, each between two runs of one seed"
    if spec.select is None:
        return f"{seeds}; nothing was selected."
    best = {"max": "highest", "min": "lowest"}[spec.select.mode]
    each = f" for each {', '.join(spec.group_by)}" if spec.group_by else ""
    return (
        f"{seeds}. Selected{each}: the {best} mean of {spec.select.metrics[0]} among settings whose seeds all "
        f"finished; {', '.join(spec.report.metrics)} read for selected settings alone."
    )


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(setting: Any) -> str:
    return "" if setting is None else plain(setting).replace("|", "\\|")
