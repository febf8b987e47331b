"""The flags of the commands that show what runs and checkpoints hold; no torch here."""

from __future__ import annotations

import argparse

from moco import doors
from moco.cli.parser import Parser, parse, positive


def report_parser() -> Parser:
    """The parser of moco.report."""
    text = "Write one page that shows what runs did: curves, settings, warnings, and where each stopped."
    p = Parser(doors.typed("report"), text)
    add = p.add_argument
    add("runs", metavar="RUN", nargs="+", help="the folder of a run, or a folder of runs")
    add("--out", metavar="FILE", help="page to write (default: report.html in RUN; of several in the current folder)")
    add("--figures", metavar="DIR", help="also write every figure as PNG into this folder")
    add("--align", choices=("step", "epoch", "time"), default="step", help="what the curves are drawn over, which the "
        "page can change (default: step)")  # fmt: skip
    add("--watch", nargs="?", type=positive, const=30.0, metavar="S", help="write the page again every S seconds until "
        "the runs end (default: 30)")  # fmt: skip
    return p


def parse_report(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.report."""
    return parse(report_parser(), argv, lambda parser, words: parser.parse_intermixed_args(words))
