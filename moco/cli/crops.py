"""The flags of small crops (multi-crop), and what those of all views come to. No torch here."""

from __future__ import annotations

import argparse
from typing import Any

from moco.cli.parser import Parser, at_least, share
from moco.config import LocalCropConfig, ViewConfig
from moco.errors import UserError

_SHAPE = ("local_crop_size", "local_crop_scale")


def add_crops(p: Parser) -> None:
    """Named after DINO's local crops, whose spellings are taken too; the defaults are SwAV's, whose query they are."""
    add, own = p.group("data"), LocalCropConfig()
    low, high = own.scale
    add("--local-crops", "--local-crops-number", default=0, type=at_least(0), metavar="N", help="small random crops "
        "per image beside its views, as queries only: against the same keys, queue and synthetic negatives (default: "
        "0; SwAV: 6)")  # fmt: skip
    add("--local-crop-size", "--local-crops-size", type=at_least(8), metavar="PX", help="their side in pixels "
        "(default: 96 beside views of 224, others in proportion)")  # fmt: skip
    add("--local-crop-scale", "--local-crops-scale", nargs=2, default=[low, high], type=share(ends="(]"),
        metavar=("LOW", "HIGH"), help=f"share of an image that they keep (default: {low} {high})")  # fmt: skip


def check_crops(args: argparse.Namespace, typed: dict[str, Any]) -> None:
    """UserError for a shape of crops that there are not, and for a range that is turned around."""
    low, high = args.local_crop_scale
    if low > high:
        raise UserError(f"--local-crop-scale {low:g} {high:g}: give the smaller share first.")
    if not args.local_crops and (idle := [name for name in _SHAPE if name in typed]):
        flag = f"--{idle[0].replace('_', '-')}"
        raise UserError(f"{flag} says what small crops are like, and there are none: give --local-crops N too, such as "
                        "6, or leave it out.")  # fmt: skip


def local_crops(args: argparse.Namespace) -> LocalCropConfig:
    """The small crops of a run."""
    low, high = args.local_crop_scale
    return LocalCropConfig(args.local_crops, args.local_crop_size, (low, high))


def view_config(args: argparse.Namespace, aug: str | None) -> ViewConfig:
    """The views of a run, ``aug`` the name of their preset."""
    mean, std = (None if x is None else tuple(x) for x in (args.mean, args.std))
    settled = args.decode, args.aug_device, args.views, local_crops(args)
    return ViewConfig(args.dataset, args.size, mean, std, aug, *settled)
