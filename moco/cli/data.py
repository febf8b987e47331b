"""The flags of the commands ``moco data NAME``; no torch here."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moco import doors
from moco.cli.common import add_levels
from moco.cli.parser import Parser, at_least, positive, whole
from moco.cli.pretrain import parse_pretrain
from moco.data.registry import DATASETS, MOST_CHANNELS

SHOW = "write a picture of the views that a pretraining would make of images"


def parse_data(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of python -m moco.data."""
    p = Parser(
        doors.typed("data"), "Check a data set, show views, write the index of an image folder, or pack tar shards."
    )
    commands = p.add_subparsers(dest="command", required=True, parser_class=Parser)
    _add_check(commands)
    index = commands.add_parser("index", help="write BEiT-3's index of an image folder")
    index.add_argument("folder", metavar="DIR", help="folder with train and val, each with one folder per class")
    index.add_argument("--out", metavar="FOLDER", help="folder to write the index to (default: DIR)")
    pack = commands.add_parser("pack", help="pack an image folder or list into tar shards")
    pack.add_argument("source", metavar="DIR", help="image folder (with or without train/ and val/) or list of paths")
    pack.add_argument(
        "out", metavar="OUT", help="new or empty folder to write to; train/ and val/ become folders in it"
    )
    pack.add_argument(
        "--shard-mb", type=positive, default=200, metavar="MB", help="size of a shard in MB (default: 200)"
    )
    pack.add_argument("--seed", type=int, default=0, help="seed of the order of the images (default: 0)")
    _add_show(commands.add_parser("show", help=SHOW))
    words = sys.argv[1:] if argv is None else argv
    return _parse_show(words[1:]) if words[:1] == ["show"] else p.parse_args(words)


def show_parser() -> Parser:
    """The parser of moco data show; what it does not know is main_pretrain.py's."""
    p = Parser(f"{doors.typed('data')} show", f"W{SHOW[1:]}. Takes DIR and the flags of main_pretrain.py.")
    _add_show(p)
    return p


def _add_show(p: Parser) -> None:
    p.add_argument("--out", default="views.png", metavar="FILE", help="picture to write (default: views.png)")
    p.add_argument("--images", dest="rows", type=at_least(1), default=6, metavar="N", help="number of images, spread "
        "over the set (default: 6)")  # fmt: skip
    p.add_argument("--draws", type=at_least(1), default=3, metavar="N", help="number of draws, the views of so many "
        "epochs (default: 3)")  # fmt: skip


def _parse_show(words: list[str]) -> argparse.Namespace:
    asked, rest = show_parser().parse_known_args(words)
    args = parse_pretrain(rest, any_demo=True)
    asked.command, asked.words = "show", rest
    return argparse.Namespace(**{**vars(args), **vars(asked)})


def _add_check(commands: Any) -> None:
    check = commands.add_parser("check", help="read every image and say what runs would take of a data set")
    add = check.add_argument
    add("data", metavar="DIR", nargs="?", help="image folder, list of paths or tar shards; with --dataset its root")
    add("--dataset", choices=DATASETS, help="check a known data set instead of an image folder")
    add("--download", action="store_true", help="let --dataset download its files")
    add(
        "--val-data", metavar="PATH", help="held-out images: a folder, a list or shards (default: val/ or test/ of DIR)"
    )
    add("--channels", type=whole(1, MOST_CHANNELS), metavar="N", help="decode to grey (1), colour (3) or N channels, "
        "as in the run")  # fmt: skip
    add_levels(check, "those of")
    add("--max-bad-images", default=100, type=at_least(0), metavar="N", help="refuse a split of which more than N "
        "images are unreadable, as main_pretrain.py (default: 100)")  # fmt: skip
    add("--workers", type=at_least(0), metavar="N", help="processes that read; 0 for none (default: as many as cores, "
        "at most 8)")  # fmt: skip
    add("--json", metavar="FILE", help="also write all of it to this file; - writes it to standard output instead")
