"""The flags of the commands that show what runs and checkpoints hold; no torch here."""

from __future__ import annotations

import argparse
import os

from moco import doors
from moco.cli.commands import add_read, finish_read
from moco.cli.common import add_launch
from moco.cli.parser import Parser, at_least, parse, positive
from moco.errors import UserError

SHOWN = 2000  # images in one picture at most: a page of 40 MB


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


def neighbours_parser() -> Parser:
    """The parser of moco.neighbours."""
    text = "Show images beside the images whose features are the most similar."
    p = Parser(doors.typed("neighbours"), text)
    add_read(p)
    p.group("data")("images", metavar="IMAGE", nargs="*", help="pictures of your own as queries, whose neighbours "
        "among the images of DIR are shown")  # fmt: skip
    add = p.add_argument
    add("--out", default="neighbours", metavar="DIR", help="folder to write to (default: neighbours)")
    add("--k", type=at_least(1), default=10, metavar="N", help="number of neighbours (default: 10)")
    add("--queries", type=at_least(1), metavar="N", help="number of queries, drawn from the held-out images where "
        "there are any, else from all (default: 10)")  # fmt: skip
    add("--class", "--class-name", dest="class_name", metavar="NAME", help="queries of this class alone")
    add("--worst", action="store_true", help="the queries that have the most neighbours of another class")
    add("--seed", default=0, type=int, help="seed of the draw (default: 0)")
    add_launch(p)
    return p


def parse_neighbours(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.neighbours."""
    return parse(neighbours_parser(), argv, _finish_neighbours)


def _finish_neighbours(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = finish_read(parser, argv)
    if args.dataset not in (None, "folder") and args.data is not None and os.path.isfile(args.data):
        args.data, args.images = None, [args.data, *args.images]  # a data set is in a folder, if anywhere
    chosen = {"--queries": args.queries, "--class": args.class_name, "--worst": args.worst or None}
    if args.images and (odd := [flag for flag, value in chosen.items() if value is not None]):
        raise UserError(f"{odd[0]} chooses queries from the data set; leave it out beside pictures of your own.")
    args.queries = len(args.images) or args.queries or 10
    if args.queries * (args.k + 1) > SHOWN:
        raise UserError(f"{args.queries} queries with {args.k} neighbours each are more than {SHOWN:,} images in one "
                        "picture; choose fewer.")  # fmt: skip
    return args
