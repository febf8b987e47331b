"""--control of main_pretrain.py: copies of queue rows in place of synthetic negatives. No torch here."""

from __future__ import annotations

import argparse
from typing import Any

from moco.cli.methods import SYNCO_KINDS, drawn
from moco.cli.parser import Parser
from moco.errors import UserError
from moco.methods.registry import CONTROLS

NONE = "none"  # which takes back a file's


def add_control(p: Parser) -> None:
    """The flag."""
    p.group("negatives")("--control", choices=(NONE, *CONTROLS), help="a control of an ablation: in place of the "
        "method's synthetic negatives, as many copies of random queue rows (random) or of the rows that they would be "
        "made from (hardest), or the hardest rows once more each (reweight) (default: none)")  # fmt: skip


def check_control(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    """UserError for a control of nothing; a file's is dropped where a method is typed that has none to control."""
    args.control = None if args.control == NONE else args.control
    kinds = drawn(args)
    if args.control is None:
        return
    if not kinds and "control" not in typed and typed.keys() & {"method", "mochi", *SYNCO_KINDS}:
        args.notes.append(f"the file's --control {args.control} is dropped: there are no synthetic negatives")
        args.control = None
    elif not kinds:
        raise UserError(f"--control {args.control} takes the place of synthetic negatives, and this run has none; give "
                        "--method synco, or --mochi N S S2, whose number it takes.")  # fmt: skip
    elif args.control == "reweight" and len({_start(args, kind) for kind in kinds}) > 1:
        raise UserError("--control reweight weighs one set of rows, but by --type-starts the kinds begin apart; leave "
                        "--type-starts out, or take --control hardest.")  # fmt: skip


def _start(args: argparse.Namespace, kind: str) -> tuple[int, int]:
    return args.type_starts.get(kind, 0), args.type_start_steps.get(kind, 0)
