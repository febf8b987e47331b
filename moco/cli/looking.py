"""The flags of the commands that show what runs and checkpoints hold; no torch here."""

from __future__ import annotations

import argparse
import os

from moco import doors, run_folder
from moco.cli.commands import add_read, finish_read
from moco.cli.common import add_launch
from moco.cli.parser import Parser, at_least, parse, positive
from moco.data.registry import DATASETS
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
    add("--align", choices=("step", "epoch", "time"), default="step", help="horizontal axis of the curves, which the "
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
    add("--class", "--class-name", dest="class_name", metavar="NAME", help="choose queries of this class alone")
    add("--worst", action="store_true", help="choose the queries with the most neighbours of another class")
    add("--seed", default=0, type=int, help="seed of the draw (default: 0)")
    add_launch(p)
    return p


def parse_neighbours(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.neighbours."""
    return parse(neighbours_parser(), argv, _finish_neighbours)


def _finish_neighbours(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = finish_read(parser, argv)
    if args.dataset not in (None, "folder") and args.data is not None and not os.path.isdir(args.data):
        args.data, args.images = None, [args.data, *args.images]  # a data set is in a folder, if anywhere
    chosen = {"--queries": args.queries, "--class": args.class_name, "--worst": args.worst or None}
    if args.images and (odd := [flag for flag, value in chosen.items() if value is not None]):
        raise UserError(f"{odd[0]} chooses queries from the data set; leave it out beside pictures of your own.")
    args.queries = len(args.images) or args.queries or 10
    if args.queries * (args.k + 1) > SHOWN:
        raise UserError(f"{args.queries} queries with {args.k} neighbours each are more than {SHOWN:,} images in one "
                        "picture; choose fewer.")  # fmt: skip
    return args


def negatives_parser() -> Parser:
    """The parser of moco.negatives."""
    text = (
        "Show the hardest queue rows and the synthetic negatives of a few queries as images, and count false negatives."
    )
    p = Parser(doors.typed("negatives"), text)
    p.usage = f"{p.prog} [-h] [flags] CKPT [CKPT ...] DIR"
    add = p.add_argument
    add("words", metavar="CKPT DIR", nargs="+", help="a checkpoint of a pretraining with a queue or the folder of a "
        "run, several to see how they differ; then the images that it was pretrained on")  # fmt: skip
    add("--dataset", choices=DATASETS, help="use a known data set instead of an image folder")
    add("--download", action="store_true", help="let --dataset download its files")
    add("--cache", metavar="DIR", help="folder of decoded images, as in pretraining")
    add("--out", default="negatives", metavar="DIR", help="folder to write to (default: negatives)")
    add("--over-checkpoints", action="store_true", help="also show how the figures develop over all "
        "checkpoints in the run's folder")  # fmt: skip
    add("--queries", default=6, type=at_least(1), metavar="N", help="number of queries that are shown (default: 6)")
    add("--image", default=[], nargs="+", metavar="NAME", help="show these images as queries: names, paths or ends of "
        "paths")  # fmt: skip
    add(
        "--sample",
        default=512,
        type=at_least(2),
        metavar="N",
        help="number of queries behind the figures (default: 512)",
    )
    add("--seed", default=0, type=int, help="seed of the choice of queries (default: 0)")
    add("--recipe", choices=("synco", "mochi"), help="synthetic negatives to show (default: the run's own)")
    add("--n-hard", type=at_least(1), metavar="H", help="number of hardest rows from which synthetic negatives are "
        "made (default: the run's)")  # fmt: skip
    add("--other-images", action="store_true", help="go on where the images are not those of the run: names and "
        "classes of queue rows may be wrong")  # fmt: skip
    return p


def parse_negatives(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags of moco.negatives; ``words`` become ``checkpoints`` and ``data``."""
    return parse(negatives_parser(), argv, _finish_negatives)


def _finish_negatives(parser: Parser, argv: list[str]) -> argparse.Namespace:
    args = parser.parse_intermixed_args(argv)
    words, args.data = args.words, None
    named = args.dataset not in (None, "folder")
    # of a known data set the last word may be its root: a folder that is no run's
    if not named or (os.path.isdir(words[-1]) and len(words) > 1 and run_folder.newest(words[-1]) is None):
        *words, args.data = words
    if not words:
        raise UserError("give a checkpoint, and the images that it was pretrained on: a folder or --dataset NAME.")
    args.checkpoints = words
    return args
