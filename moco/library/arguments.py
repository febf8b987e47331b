"""Keyword arguments of the public classes, and what they may be: the ranges of the flags of the same names.

No torch here.
"""

from __future__ import annotations

import functools
from argparse import Action
from typing import Any, TypedDict

from moco.cli.parser import NumberRange
from moco.cli.pretrain import pretrain_parser
from moco.errors import UserError

_FLAGS = {  # of arguments that are not called like their flag
    "dim": "--moco-dim",
    "K": "--moco-k",
    "T": "--moco-t",
    "m": "--moco-m",
    "s": "--mochi",
    "s2": "--mochi",
    "start_epoch": "--hard-start-epoch",
    "start_step": "--hard-start-epoch",
    "stop_epoch": "--hard-start-epoch",
    "impl": "--head-impl",
    "precision": "--head-precision",
}
_OPTIONAL = ("base_temperature", "stop_epoch", "bn_splits", "control")  # of which None means something


class QueueArguments(TypedDict, total=False):
    """Of every loss with a queue."""

    seed: int
    impl: str
    precision: str


class NegativesArguments(QueueArguments, total=False):
    """Of every loss with synthetic negatives."""

    start_epoch: int
    stop_epoch: int | None
    start_step: int
    control: str | None


class MoCHiArguments(NegativesArguments, total=False):
    """Those of :class:`moco.config.MoCHiConfig` beside them."""

    s: int
    s2: int


class SynCoArguments(NegativesArguments, total=False):
    """Those of :class:`moco.config.SynCoConfig` beside them."""

    n1: int
    n2: int
    n3: int
    n4: int
    n5: int
    n6: int
    sigma: float
    delta: float
    eta: float
    extrapolation: str


class MoCoArguments(TypedDict, total=False):
    """Of :class:`moco.library.momentum.MoCo`."""

    width: int | None
    symmetric: bool
    accum: int
    shuffle: bool
    bn_splits: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


def taken(given: dict[str, Any], *names: str) -> dict[str, Any]:
    """Those of the given arguments that have these names, which are then gone from ``given``."""
    return {name: given.pop(name) for name in names if name in given}


def check(**values: Any) -> None:
    """UserError for the first of the arguments that its flag would refuse."""
    for name, value in values.items():
        if value is not None or name not in _OPTIONAL:
            _check_one(name, value)


def _check_one(name: str, value: Any) -> None:
    if name == "seed":
        _refuse_unless(type(value) is int, name, "must be a whole number", value)
        return
    flag = _flags()[_FLAGS.get(name, "--" + name.replace("_", "-"))]
    if flag.choices is not None:
        choices = [*flag.choices]
        _refuse_unless(value in choices, name, f"must be one of {', '.join(choices)}", value)
        return
    limits = flag.type
    assert isinstance(limits, NumberRange)
    whole = limits.kind is int
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    _refuse_unless(fits, name, f"must be a {'whole ' * whole}number", value)
    _refuse_unless(limits.holds(value), name, limits.sentence, value)


def _refuse_unless(fits: bool, name: str, sentence: str, value: Any) -> None:
    if not fits:
        raise UserError(f"{name} {sentence}, not {value!r}.")


@functools.cache
def _flags() -> dict[str, Action]:
    return pretrain_parser().flags()
