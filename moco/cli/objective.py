"""What main_semisup.py minimises. No torch here."""

from __future__ import annotations

import argparse

from moco.cli.parser import Parser, at_least, positive, share
from moco.config import ObjectiveConfig
from moco.errors import UserError

TUNING_LOSSES = ("ce", "supcon", "simclr", "schane")


def add_objective(p: Parser) -> None:
    """The loss of fine-tuning and what is done to its images."""
    add = p.group("objective")
    add("--loss", type=str.lower, choices=TUNING_LOSSES, default="ce", help="ce: cross-entropy; the others: (1 - "
        "alpha) cross-entropy + alpha times the contrastive loss of two views an image (default: ce)")  # fmt: skip
    add("--alpha", type=share(ends="[]"), metavar="A", help="weight of the contrastive loss (default: 0.9)")
    add("--temp", type=positive, metavar="T", help="temperature of the contrastive loss (default: 0.5)")
    add("--estimator", choices=("hard", "easy"), help="schane: weigh hard negatives, or all alike, which is supcon "
        "(default: hard)")  # fmt: skip
    add("--beta", type=at_least(0.0), metavar="B", help="schane: how much more hard negatives weigh (1)")
    add("--smoothing", "--label-smoothing", default=0.0, type=share(), metavar="E", help="of cross-entropy (default: "
        "0)")  # fmt: skip
    add("--mixup", default=0.0, type=at_least(0.0), metavar="A", help="of cross-entropy's images, timm's (default: 0, "
        "off)")  # fmt: skip
    add("--cutmix", default=0.0, type=at_least(0.0), metavar="A", help="the same by rectangles (default: 0, off)")
    add("--reprob", default=0.0, type=share(ends="[]"), metavar="P", help="probability of erasing a rectangle "
        "(default: 0)")  # fmt: skip
    add = p.group("data")
    add("--aa", default="", metavar="POLICY", help="timm's AutoAugment or RandAugment, such as rand-m9-mstd0.5-inc1, "
        "after the random crop (default: none)")  # fmt: skip
    add("--aug", choices=("v1", "v2", "cifar", "supcon", "digits"),
        help="a pretraining's views in place of crop and flip")  # fmt: skip


def choose_objective(args: argparse.Namespace) -> None:
    """The defaults of the loss; UserError for the settings of another."""
    own = {"alpha": TUNING_LOSSES[1:], "temp": TUNING_LOSSES[1:], "estimator": ("schane",), "beta": ("schane",)}
    defaults = {"alpha": 0.9, "temp": 0.5, "estimator": "hard", "beta": 1.0}
    for name, losses in own.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[name])
        elif args.loss not in losses:
            raise UserError(f"--{name} is for --loss {', '.join(losses)}; {args.loss} has none.")
    if args.loss != "ce" and args.weights == "freeze":
        raise UserError(f"--loss {args.loss} trains the encoder, which --weights freeze keeps; leave one of them out.")


def objective_config(args: argparse.Namespace) -> ObjectiveConfig:
    """What fine-tuning minimises."""
    return ObjectiveConfig(
        args.loss, args.alpha, args.temp, args.estimator, args.beta, args.smoothing, args.mixup, args.cutmix,
        args.reprob,
    )  # fmt: skip
