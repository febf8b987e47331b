"""The settings in which runs differ from each other, or one run from the defaults."""

from __future__ import annotations

import argparse
from typing import Any

from moco import cli
from moco.cli.parser import Parser, spelling
from moco.report.runs import Run, shown
from moco.report.table import Cell, Table

_PARSERS = {"log": cli.pretrain_parser, "semisup": cli.semisup_parser}  # of all other logs: main_lincls.py
# Where a run writes and how it was started says nothing of what it learned.
_PLACES = {"save_dir", "trial", "resume", "config", "overwrite", "world_size", "rank", "dist_url", "gpu",
           "dist_backend", "multiprocessing_distributed", "nproc", "report"}  # fmt: skip
WIDEST = 6  # runs that are columns; more are rows


def tables(runs: list[Run]) -> list[Table]:
    """A table for each kind of run in which something differs."""
    found = []
    for parser in dict.fromkeys(map(_parser_of, runs)):
        mine = [run for run in runs if _parser_of(run) is parser and run.settings]
        if len(mine) == 1:
            found.append(_from_defaults(mine[0], parser()))
        elif mine:
            found.append(_differences(mine, parser()))
    return [table for table in found if table.rows or table.note]


def _parser_of(run: Run) -> Any:
    return _PARSERS.get(run.log, cli.lincls_parser)


def _flags(parser: Parser) -> dict[str, tuple[str, Any]]:
    """Flag and default of each setting."""
    # a flag without a default of its own is another spelling of one that has it
    actions = [a for a in parser.actions() if a.dest not in _PLACES and a.default is not argparse.SUPPRESS]
    return {action.dest: (spelling(action), action.default) for action in actions}


def _plain(value: Any) -> Any:
    """As JSON has it; of a flag that is read into a dictionary, an empty one is its empty list."""
    return list(value) if isinstance(value, tuple) or value == {} else value


def _from_defaults(run: Run, parser: Parser) -> Table:
    rows: list[list[Cell]] = []
    for dest, (flag, default) in _flags(parser).items():
        if dest in run.settings and _plain(run.settings[dest]) != _plain(default):
            usual = "–" if default is None else shown(_plain(default))
            rows.append([flag, shown(run.settings[dest]), usual])
    note = "" if rows else "No setting differs from its default."
    return Table(f"Settings that differ from the defaults: {run.name}", ["setting", "value", "default"], rows, note)


def _differences(runs: list[Run], parser: Parser) -> Table:
    rows: list[list[Cell]] = []
    for dest, (flag, _) in _flags(parser).items():
        values = [shown(run.settings[dest]) if dest in run.settings else "" for run in runs]
        if len(set(values)) > 1:
            rows.append([flag, *values])
    kinds = "" if len({run.kind for run in runs}) > 1 else f" ({runs[0].kind})"
    title = f"Settings in which the runs differ{kinds}"
    note = "" if rows else f"The {len(runs)} runs have the same settings."
    columns = ["setting", *(run.name for run in runs)]
    if len(runs) > WIDEST and rows:
        turned = list(zip(columns, *rows, strict=True))
        (_, *columns), rows = turned[0], [list(row) for row in turned[1:]]
        columns = ["run", *map(str, columns)]
    return Table(title, columns, rows, note)
