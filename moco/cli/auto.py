"""--auto and --pretrained of main_pretrain.py: what data and a file may decide.

What --auto takes is decided once the images are open, by :mod:`moco.train.fit`. No torch here.
"""

from __future__ import annotations

import argparse
from collections.abc import Container

from moco.cli.common import encoder_file
from moco.cli.parser import Parser
from moco.errors import UserError

OF_A_FILE = ("arch", "stem", "size", "channels", "mean", "std")  # what the file of --pretrained may decide
COUNTS = ("n1", "n2", "n3", "n4", "n5", "n6")
OF_A_SET = ("size", "aug", "batch_size", "moco_k", "moco_m", "n_hard", "mochi", *COUNTS, "hard_start_epoch",
            "schedule", "warm_epochs", "bn_splits")  # fmt: skip


def add_auto(p: Parser) -> None:
    p.group("data")("--auto", action="store_true", help="of small sets: choose queue, batch, schedule, size and the "
        "like by the number and the size of the images, where they are not given; the log says what was taken "
        "(default: off, the published recipes' values)")  # fmt: skip
    p.group("model")("--pretrained", default="", metavar="PATH", help="begin from these weights: the folder of a run, "
        "a checkpoint of this project or of many others, or torchvision:NAME for published ones; a run that is resumed "
        "goes on from its own (default: random weights)")  # fmt: skip


def note_open(args: argparse.Namespace, typed: Container[str], filed: Container[str]) -> None:
    """Note what neither the command line (``typed``) nor a file has given."""
    names = dict.fromkeys((*OF_A_FILE, *OF_A_SET))
    args.left_open = [name for name in names if name not in typed and name not in filed]
    if args.aug_plus and "aug" in args.left_open:
        args.left_open.remove("aug")
    args.pretrained = args.begin_with = encoder_file(args.pretrained)


def check_negatives(args: argparse.Namespace) -> None:
    """UserError where the queue has too few rows, or the negatives stop before they start."""
    later = args.left_open if args.auto else ()  # than the images are open
    if args.n_hard < 1:
        raise UserError("--mochi N S S2 mixes the N hardest rows; N must be at least 1.")
    too_many = args.negatives != "moco" and args.n_hard > args.moco_k
    if too_many and "moco_k" not in later and ("mochi" if args.negatives == "mochi" else "n_hard") not in later:
        raise UserError(f"--n-hard {args.n_hard} is more than the queue's {args.moco_k} rows; lower it.")
    stop = args.hard_stop_epoch
    if stop is not None and stop <= (0 if "hard_start_epoch" in later else args.hard_start_epoch):
        raise UserError("--hard-stop-epoch must come after --hard-start-epoch.")
