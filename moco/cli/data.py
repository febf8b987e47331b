"""The flags of the commands ``moco data NAME``; no torch here."""

from __future__ import annotations

import argparse

from moco import doors
from moco.cli.parser import Parser, positive


def parse_data(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments of python -m moco.data."""
    p = Parser(doors.typed("data"), "Write the index of an image folder, or pack images into tar shards.")
    commands = p.add_subparsers(dest="command", required=True, parser_class=Parser)
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
    return p.parse_args(argv)
