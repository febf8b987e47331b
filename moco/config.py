"""What the flags of a program come to. No torch here.

A checkpoint keeps the flags of its run, so that one which goes on from it can be told from another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

Flags = dict[str, Any]  # plain values by flag, such as {"--lr": 0.03, "--schedule": [120, 160]}


class Classes(NamedTuple):
    """The flags of one program; DIR is its positional argument, and names without dashes are choices that several
    flags make together.

    fixed: another value is refused: it changes what the saved state means, or what the run's result is called.
    free: another value is used from here on, and said.
    silent: the course of the training does not depend on it, or the file decides (--seed), or another entry says it
    (DIR: the data; --aug-plus: --aug; --cos of a tuning: --schedule).
    data: whether other images may be gone on with at an epoch's end.
    """

    fixed: frozenset[str]
    free: frozenset[str]
    silent: frozenset[str]
    data: bool


def typed(value: Any) -> str:
    """A setting as it is typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list):
        return " ".join(map(typed, value)) or "none"
    return "none" if value is None or value == "" else f"{value:.12g}" if isinstance(value, float) else str(value)
