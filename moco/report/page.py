"""Writes the page of a report: what became of the runs, their curves, settings, warnings, results and pictures."""

from __future__ import annotations

import base64
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from urllib.parse import quote

import numpy as np

import moco
from moco import files
from moco.errors import UserError
from moco.pictures.page import page, text
from moco.report import curves, ending, figures, found, plotly, runs, settings
from moco.report.curves import Line, Panel
from moco.report.runs import KINDS, Run, number
from moco.report.table import Cell, Table
from moco.report.walk import DEPTH

MOST_WARNINGS = 200
MOST_PICTURES, LARGEST_PICTURE = 24, 3 << 20  # in the page; of larger ones there is a link
# Columns of the table of runs: the last number of a log, and its unit.
LATEST = {
    "loss_ratio": ("loss / chance", 1.0), "top1": ("contrast top-1, %", 1.0),
    "knn": ("k-NN, %", 1.0), "online_val_acc1": ("online probe, %", 1.0), "rankme": ("RankMe", 1.0),
    "val_acc1": ("held-out top-1, %", 1.0), "test_acc1": ("test top-1, %", 1.0),
    "images_per_second": ("images/s", 1.0), "wait_share": ("waiting, %", 100.0),
}  # fmt: skip


@dataclass
class Report:
    """What a page is made of.

    Args:
        runs: as :func:`moco.report.runs.find` has them.
        tables, pictures: what else was found; pictures are titles and paths.
        align: what the curves are drawn over first, of :data:`moco.report.curves.AXES`.
        again: seconds after which an open page is read again; None for a page that is not written again.
    """

    runs: list[Run]
    tables: Sequence[Table] = ()
    pictures: Sequence[tuple[str, str]] = ()
    align: str = "step"
    again: float | None = None

    def __post_init__(self) -> None:
        self.lines = curves.lines_of(self.runs)
        self.endings = [ending.ending(run) for run in self.runs]
        found = {log: [line for line in self.lines if line.run.log == log] for log in curves.DRAWN}
        self.sections = {log: (curves.panels_of(mine), mine) for log, mine in found.items() if mine}

    @property
    def running(self) -> bool:
        """Whether one of the runs is at work."""
        return any(found.state == ending.RUNNING for found in self.endings)


def of(paths: list[str], align: str = "step", depth: int = DEPTH) -> Report:
    """What is to be said of these folders and those so many levels below.

    Raises:
        UserError: a path is no folder, or holds nothing of a run.
    """
    there = runs.find(paths, depth)
    tables, pictures = [], []
    for path in paths:
        mine = found.tables(path, depth)
        if not any(table.rows for table in mine) and not any(_below(run.folder, path) for run in there):
            raise UserError(
                f"{path} holds no log of a run (log.jsonl, lincls.jsonl, semisup.jsonl) and no results; give "
                "the folder of a run, or a folder of runs."
            )
        shown = f"{os.path.basename(os.path.abspath(path))}: " * (len(paths) > 1)
        tables += [replace(table, title=shown + table.title) for table in mine]
        pictures += [(shown + title, picture) for title, picture in found.pictures(path, depth)]
    return Report(there, tables, pictures, align)


def _below(folder: str, top: str) -> bool:
    folder, top = os.path.realpath(folder), os.path.realpath(top)
    return os.path.commonpath([folder, top]) == top


def write(report: Report, path: str, choose: str = "--out") -> None:
    """Write the page as :func:`moco.files.replacing` does; ``choose``: see there."""
    js = plotly.packed()
    shown = [(log, panel, lines) for log, (panels, lines) in report.sections.items() for panel in panels]
    body = [_introduction(report, bool(js)), _runs(report), _controls(report) if js and shown else ""]
    body += _panels(report, bool(js))
    body += [_warnings(report.runs), *map(_table, settings.tables(report.runs)), *map(_table, report.tables)]
    body += [_pictures(report.pictures, path), _notes(report)]
    data = {
        "lines": [{"name": line.name, "colour": line.colour} for line in report.lines],
        "panels": [curves.data_of(panel, lines, report.lines) for _, panel, lines in shown] if js else [],
        "align": report.align, "again": report.again, "plotly": js if shown else "",
    }  # fmt: skip
    count = len(report.runs)
    name = report.runs[0].name if count == 1 else f"{count} runs" if count else "results"
    whole = page(
        f"Report: {name}", body="\n".join(filter(None, body)), data=data, scripts=["report.js"], styles=["report.css"]
    )
    files.write_text(whole, path, choose)


def _introduction(report: Report, interactive: bool) -> str:
    said = [f"Written {time.strftime('%Y-%m-%d %H:%M:%S')} by moco {moco.__version__}."]
    if report.again:
        said.append(f"Written again every {report.again:g} s while a run is at work; this page reads itself again.")
    if not interactive and report.sections:
        said.append("The package plotly is not installed, so the curves are pictures: pip install plotly makes them "
                    "interactive.")  # fmt: skip
    return f'<p class="pale">{" ".join(map(text, said))}</p>'


# ---------------------------------------------------------------------------------------------------------- runs


def _runs(report: Report) -> str:
    """The table of runs, which is the legend of all curves."""
    columns = [name for name in LATEST if any(name in line.figures for line in report.lines)
               or any(name in run.figures for run in report.runs if run.log not in curves.DRAWN)]  # fmt: skip
    if not report.runs:
        return ""
    several = len({run.log for run in report.runs}) > 1
    head = ["run", *["kind"] * several, "outcome", "epochs", "time", *(LATEST[name][0] for name in columns)]
    cells = "".join(_element("th", text(name), i > 1 + several) for i, name in enumerate(head))
    rows = []
    for run, end in zip(report.runs, report.endings, strict=True):
        mine = [(i, line) for i, line in enumerate(report.lines) if line.run is run]
        first = mine[0] if mine else None
        became = f'<div class="became"><span class="state {end.state}">{end.state}</span> {text(_after(end))}'
        if end.next:
            became += f'<br><span class="pale">next:</span> <code>{text(end.next)}</code>'
        became += "</div>"
        numbers = [_so_far(run, curves.epochs_at, "{:.4g}".format), _so_far(run, curves.seconds_at, ending.duration)]
        numbers += _latest(run, columns, first[1] if first else None)
        rows.append(_run_row(_label(run.name, first), [text(run.kind)] * several + [became], numbers))
        for i, line in mine[1:]:
            numbers = ["", "", *_latest(run, columns, line)]
            rows.append(_run_row(_label(line.name, (i, line), "inner"), [""] * several + [""], numbers))
    table = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    many = " many" if len(rows) > 12 else ""
    return f'<h2>Runs</h2>\n<div class="wide{many}"><table id="runs">{table}</table></div>'


def _after(end: ending.Ending) -> str:
    """The sentence behind the word that it begins with."""
    return end.text.removeprefix(end.state).strip(" ,:")


def _label(name: str, line: tuple[int, Line] | None, classes: str = "") -> str:
    if line is None:
        return f'<span class="run {classes}">{text(name)}</span>'
    light, dark = line[1].colour
    box = f'<input type="checkbox" data-line="{line[0]}" checked>'
    swatch = f'<span class="swatch" style="--light:{light};--dark:{dark}"></span>'
    return f'<label class="run {classes}" title="{text(name)}">{box}{swatch}<span>{text(name)}</span></label>'


def _run_row(label: str, words: list[str], numbers: list[str]) -> str:
    cells = [_element("td", label), *(_element("td", word) for word in words)]
    cells += [_element("td", text(cell), True) for cell in numbers]
    return f"<tr>{''.join(cells)}</tr>"


def _so_far(run: Run, axis: Callable[[Run, np.ndarray], np.ndarray | None], shown: Callable[[float], str]) -> str:
    """Where on an axis the last record lies."""
    found = axis(run, np.array([run.step])) if run.log in curves.DRAWN else None
    return "" if found is None else shown(found[0])


def _latest(run: Run, columns: list[str], line: Line | None) -> list[str]:
    found = []
    for name in columns:
        figure = name if line is None else line.figures.get(name, "")
        values = run.figures.get(figure, ((), ()))[1]
        value = next((value for value in reversed(values) if math.isfinite(value)), None)
        value = None if value is None else LATEST[name][1] * value
        found.append("" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    return found


# -------------------------------------------------------------------------------------------------------- curves


def _controls(report: Report) -> str:
    options = "".join(
        f'<option value="{axis}"{" selected" * (axis == report.align)}>{name}</option>'
        for axis, name in curves.AXES.items()
    )
    return (
        f'<div id="controls"><label>drawn over <select id="align">{options}</select></label>'
        '<label>smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0"></label>'
        '<button id="all" type="button">show all</button><button id="none" type="button">hide all</button>'
        '<span class="pale">Drag to zoom, double-click to see all.</span></div>'
    )


def _panels(report: Report, interactive: bool) -> list[str]:
    """A section for each kind of training."""
    found, number_ = [], 0
    for log, (panels, lines) in report.sections.items():
        figures_ = []
        for panel in panels:
            if interactive:
                inner = f'<div class="plot" data-panel="{number_}" role="img" aria-label="{text(panel.title)}"></div>'
            else:
                uri = figures.uri(panel, lines, report.align)
                inner = (
                    f'<img src="{uri}" alt="{text(panel.title)}">' if uri else f"no run has this over {report.align}"
                )
            number_ += 1
            figures_.append(f'<figure class="panel">{_caption(panel, lines)}{inner}</figure>')
        kind = KINDS[log][0].upper() + KINDS[log][1:]
        if figures_:
            found.append(f'<h2>{kind}</h2>\n<div class="panels">{"".join(figures_)}</div>')
    return found


def _caption(panel: Panel, lines: list[Line]) -> str:
    unit = f' <span class="pale">{text(panel.unit)}</span>' if panel.unit else ""
    there = {label for name, label in panel.names.items() for line in lines if name in line.figures and label}
    labels = [(i, label) for i, label in enumerate(dict.fromkeys(panel.names.values())) if label in there]
    keys = (
        "" if len(labels) < 2 else "".join(f'<span class="key dash{i % 4}">{text(label)}</span>' for i, label in labels)
    )
    note = f'<div class="pale">{text(panel.note)}</div>' if panel.note else ""
    return f"<figcaption><b>{text(panel.title)}</b>{unit} {keys}{note}</figcaption>"


# ------------------------------------------------------------------------------------------- tables and pictures


def _table(table: Table) -> str:
    note = f'<p class="pale">{text(table.note)}</p>' if table.note else ""
    if not table.rows:
        return f"<h2>{text(table.title)}</h2>\n{note}"
    numeric = [all(_is_number(row[i]) for row in table.rows) for i in range(len(table.columns))]
    heads = "".join(map(partial(_element, "th"), map(text, table.columns), numeric))
    rows = ("".join(map(partial(_element, "td"), map(_cell, row), numeric)) for row in table.rows)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    inner = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{text(table.title)}</h2>\n<div class="wide">{inner}</div>{note}'


def _element(name: str, inner: str, right: bool = False) -> str:
    """A cell of a table; ``right``: of numbers."""
    return f'<{name} class="number">{inner}</{name}>' if right else f"<{name}>{inner}</{name}>"


def _is_number(cell: Cell) -> bool:
    if isinstance(cell, str):
        try:
            float(cell.split(" ± ")[0].replace(",", "") or "0")
        except ValueError:
            return False
    return True


def _cell(cell: Cell) -> str:
    if cell is None or isinstance(cell, str):
        return text(cell or "")
    return text(f"{cell:,.0f}" if float(cell).is_integer() and abs(cell) < 1e15 else f"{cell:.6g}")


def _warnings(found: list[Run]) -> str:
    """The warnings of all logs; the same sentence of a run is one row."""
    rows: dict[tuple[str, str], list[Cell]] = {}
    count: dict[tuple[str, str], int] = {}
    for run in found:
        for event in run.events:
            if event["kind"] == "warning":
                key = run.name, str(event.get("text") or "")
                count[key] = count.get(key, 0) + 1
                step, epoch = (number(event.get(name)) for name in ("step", "epoch"))
                rows[key] = rows.get(key) or [run.name, epoch, step, key[1], None]
    if not rows:
        recorded = [run for run in found if run.events]
        return "<h2>Warnings</h2>\n<p>None.</p>" if recorded else ""
    for key, row in rows.items():
        row[4] = float(count[key])
    kept = list(rows.values())[-MOST_WARNINGS:]
    note = f"The first {len(rows) - len(kept)} are left out." if len(kept) < len(rows) else ""
    return _table(Table("Warnings", ["run", "epoch", "step", "warning", "times"], kept, note))


def _pictures(pictures: Sequence[tuple[str, str]], page_path: str) -> str:
    found = []
    for title, path in pictures[:MOST_PICTURES]:
        link = quote(os.path.relpath(path, os.path.dirname(page_path) or "."))
        try:
            with open(files.regular_handle(path, LARGEST_PICTURE), "rb") as file:
                inner = (
                    f'<img src="data:image/png;base64,{base64.b64encode(file.read()).decode()}" alt="{text(title)}">'
                )
        except OSError:
            inner = f'<a href="{link}">{text(path)}</a>'
        beside = f"{os.path.splitext(path)[0]}.html"
        page_ = f' <a href="{link[:-4]}.html">open the page</a>' if os.path.isfile(beside) else ""
        found.append(f"<figure><figcaption><b>{text(title)}</b>{page_}</figcaption>{inner}</figure>")
    if not found:
        return ""
    left = len(pictures) - len(found)
    note = f'<p class="pale">{left} more pictures are left out.</p>' if left else ""
    return f'<h2>Pictures</h2>\n<div class="pictures">{"".join(found)}</div>{note}'


def _notes(report: Report) -> str:
    """What a reader must know of what is not drawn."""
    said = []
    for run in report.runs:
        name = os.path.basename(run.path())
        if run.damaged:
            lines = "1 line" if run.damaged == 1 else f"{run.damaged} lines"
            left_out = "is left out" if run.damaged == 1 else "are left out"
            said.append(f"{run.name}: {lines} of {name} cannot be read and {left_out}.")
        timed = run.figures["time"][0][0] if "time" in run.figures else math.inf  # the first step that says when
        if run.log in curves.DRAWN and timed > min((steps[0] for steps, _ in run.figures.values()), default=math.inf):
            part, it = (f" before step {timed:.0f}", "that part") if timed < math.inf else ("", "it")
            said.append(f"{run.name}: {name} has no times{part} (an older version wrote {it}); {it} is not drawn over "
                        "time.")  # fmt: skip
        most = curves.most_points(len(report.lines))
        if run.log in curves.DRAWN and run.records > most:
            said.append(f"{run.name}: {name} has {run.records:,} records; a curve shows about {most:,} of them, the "
                        "least and the largest value of each section among them.")  # fmt: skip
    return "<h2>Notes</h2>\n<ul>" + "".join(f"<li>{text(s)}</li>" for s in said) + "</ul>" if said else ""
