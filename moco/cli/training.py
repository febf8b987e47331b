"""Flags of a training, by their groups in --help: how long, how fast, by which optimizer. No torch here."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from moco.cli.common import SWITCH, add_batch_size, add_resume
from moco.cli.parser import Parser, at_least, positive, share
from moco.config import OptimizerConfig, ScheduleConfig
from moco.errors import UserError

DECAY = 0.1  # of a rate at a milestone


def add_training(p: Parser, epochs: int, lr: float | list[float], schedule: list[int], wd: float) -> None:
    """How long and how fast, of main_pretrain.py and main_lincls.py."""
    add, several = p.group("schedule"), isinstance(lr, list)
    add_epochs(p, epochs, f"{epochs}")
    shown = lr[0] if isinstance(lr, list) else lr
    more = "; several, such as 30 10 3, train one classifier each on the same features" if several else ""
    add("--lr", "--learning-rate", default=lr, type=positive, nargs="+" if several else None, metavar="LR",
        help=f"learning rate (default: {shown:g}){more}")  # fmt: skip
    add_milestones(p, schedule, "epochs at which the learning rate drops 10x (default: "
        f"{' '.join(map(str, schedule))})")  # fmt: skip
    add("--cos", "--cosine", action=SWITCH, default=False, help="decay the learning rate by a cosine instead, once per "
        "epoch (with pretraining's --steps: at every step)")  # fmt: skip
    add_sgd(p, wd)
    add_resume(p, "newest", "random seed (default: drawn, logged and kept in checkpoints)")


def add_epochs(p: Parser, default: int | None, text: str, batch: int = 256) -> None:
    """--epochs, --start-epoch and the batch."""
    add = p.group("schedule")
    add("--epochs", default=default, type=at_least(1), metavar="N", help=f"number of epochs (default: {text})")
    add("--start-epoch", default=0, type=at_least(0), metavar="N", help="number of the first epoch, for restarts by "
        "hand (default: 0)")  # fmt: skip
    add_batch_size(p, batch)


def add_sgd(p: Parser, wd: float) -> None:
    """Momentum and weight decay."""
    add = p.group("optimizer")
    add("--momentum", default=0.9, type=at_least(0.0), metavar="M", help="momentum of SGD (default: 0.9)")
    add("--wd", "--weight-decay", default=wd, type=at_least(0.0), metavar="W", dest="weight_decay",
        help=f"weight decay (default: {wd:g})")  # fmt: skip


def add_milestones(p: Parser, default: list[int] | None, text: str) -> None:
    """--schedule and SupContrast's spelling of it."""
    add = p.group("schedule")
    add("--schedule", default=default, nargs="*", type=int, help=text)
    add("--lr-decay-epochs", type=_epoch_list, default=argparse.SUPPRESS, dest="schedule", metavar="E,E",
        help="SupContrast's spelling of --schedule E E")  # fmt: skip
    add("--lr-decay-rate", default=DECAY, type=share(ends="(]"), metavar="X", help="factor of the learning rate at the "
        "epochs of --schedule (default: 0.1)")  # fmt: skip


def _epoch_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def add_warm(p: Parser, when: str) -> None:
    """SupContrast's warm-up: a line from a rate, not from 0, to what the schedule says at its end."""
    add = p.group("schedule")
    add("--warm", action=SWITCH, help=f"warm up: raise the learning rate from --warm-from over --warm-epochs ({when})")
    add("--warm-epochs", default=10, type=at_least(1), metavar="E", help="length of the warm-up --warm in epochs "
        "(default: 10)")  # fmt: skip
    add("--warm-from", default=0.01, type=at_least(0.0), metavar="LR", help="learning rate at which the warm-up --warm "
        "starts (default: 0.01)")  # fmt: skip


def add_optimizer(p: Parser) -> None:
    """What any training can have: timm's optimizers, clipping, a floor of the rate."""
    add = p.group("optimizer")
    add("--opt", default="sgd", metavar="NAME", help="sgd, or an optimizer of timm such as adamw, lars or "
        "lookahead_adamw (default: sgd)")  # fmt: skip
    add("--opt-betas", nargs="+", type=share(), metavar="B", help="betas of an optimizer that has them (default: "
        "timm's, for adamw 0.9 0.999)")  # fmt: skip
    add("--clip-grad", type=positive, metavar="X", help="clip the norm of the gradient at X (default: no clipping)")
    add("--min-lr", default=0.0, type=at_least(0.0), metavar="LR", help="learning rate at which --cos ends and below "
        "which --plateau does not go (default: 0)")  # fmt: skip


def add_average(p: Parser) -> None:
    """What the training of an encoder can have: the same and a moving average of the weights."""
    add_optimizer(p)
    add = p.group("optimizer")
    add("--exclude-bias-norm", action="store_true", help="exclude biases and norm layers from weight decay and, with "
        "--opt lars, from its adaptation (default: off; --layer-decay does so anyway)")  # fmt: skip
    add("--ema", type=share(ends="()"), metavar="D", help="evaluate and save an exponential moving average of the "
        "weights, with decay D per step (default: off)")  # fmt: skip
    add("--ema-epoch", type=share(ends="()"), metavar="D", help="the moving average of --ema with its decay D given "
        "per epoch instead of per step (default: off)")  # fmt: skip


def add_plateau(p: Parser, text: str) -> None:
    p.group("schedule")("--plateau", type=at_least(0), metavar="E", help=f"instead of {text}")


# ------------------------------------------------------------------------------- what several flags say together


def check_min_lr(args: argparse.Namespace, lr: float, lowered: bool) -> None:
    """``lr``: the rate that --min-lr must be below; ``lowered``: something other than milestones lowers it."""
    if args.min_lr and not lowered:
        ends = "--cos or --plateau ends; give one of them" if hasattr(args, "plateau") else "--cos ends; give it"
        raise UserError(f"--min-lr is where {ends}, or leave it out.")
    if args.min_lr >= lr:
        raise UserError(f"--min-lr {args.min_lr:g} must be below the learning rate {lr:g}.")


def check_average(args: argparse.Namespace) -> None:
    """UserError for two decays of one average."""
    if args.ema is not None and args.ema_epoch is not None:
        raise UserError("--ema is the decay per step and --ema-epoch per epoch; give one of them.")


def check_warm(args: argparse.Namespace, epochs: int, more: str = "") -> None:
    """UserError where --warm never ends."""
    if args.warm and args.warm_epochs >= epochs:
        raise UserError(f"--warm lasts --warm-epochs epochs and needs more --epochs than that{more}.")


def choose_plateau(args: argparse.Namespace, typed: dict[str, Any], filed: frozenset[str]) -> None:
    """One schedule: of --plateau and the flags of another, what is typed wins over what is the file's.

    Raises:
        UserError: both are typed, or both are the file's.
    """
    if args.plateau is None:
        return
    unused = {"schedule": None, "cos": False, "lr_decay_rate": DECAY}
    others = [name for name in unused if name in {*typed, *filed} and getattr(args, name) != unused[name]]
    own = "plateau" in typed
    for name in others:
        if (name in typed) == own:
            last = "--lr-decay-rate is of the epochs of --schedule, and --plateau drops rates 10x; leave it out."
            two = f"--plateau and --{name} are two schedules; give one of them."
            raise UserError(last if name == "lr_decay_rate" else two)
    if not others:
        return
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
    winner, loser, dropped = ("--plateau", flags, others) if own else (flags, "--plateau", ["plateau"])
    args.notes.append(f"{winner} of the command line, in the place of the file's {loser}")
    for name in dropped:
        setattr(args, name, unused.get(name))


# ------------------------------------------------------------------------------------------------- typed settings


def optimizer_config(args: argparse.Namespace, lr: float) -> OptimizerConfig:
    """The flags of :func:`add_optimizer`; ``lr``: the rate of groups that have none of their own."""
    betas = None if args.opt_betas is None else tuple(args.opt_betas)
    return OptimizerConfig(args.opt, lr, args.momentum, args.weight_decay, args.clip_grad, betas)


def encoder_optimizer(args: argparse.Namespace, lr: float) -> OptimizerConfig:
    """The same with the flags of :func:`add_average`."""
    config = optimizer_config(args, lr)
    return replace(config, exclude_bias_norm=args.exclude_bias_norm, ema=args.ema, ema_epoch=args.ema_epoch)


def schedule_config(args: argparse.Namespace, epochs: int) -> ScheduleConfig:
    """What the schedules of all trainings have."""
    return ScheduleConfig(
        epochs=epochs, cosine=args.cos, milestones=tuple(args.schedule or ()), decay=args.lr_decay_rate,
        min_lr=args.min_lr, warm_epochs=args.warm_epochs if args.warm else 0, warm_from=args.warm_from,
        print_freq=args.print_freq,
    )  # fmt: skip
