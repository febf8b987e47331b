"""Learning-rate schedules as pure functions."""

from __future__ import annotations

import math
from typing import Any


def learning_rate(
    base: float,
    progress: float,
    total: float,
    *,
    cosine: bool,
    milestones: list[int],
    decay: float = 0.1,
    floor: float = 0.0,
) -> float:
    """The rate at ``progress`` out of ``total`` (both in epochs, or both in steps).

    Cosine: floor + (base - floor) * (1 + cos(pi * progress / total)) / 2, without warm-up (SGDR, arXiv 1608.03983,
    eq. 5; MoCo v2 has floor 0 and one value an epoch). Otherwise ``decay`` times the rate at each milestone, in the
    same unit as ``progress``.
    """
    if cosine:
        return floor + (base - floor) * 0.5 * (1.0 + math.cos(math.pi * progress / total))
    return base * decay ** sum(progress >= m for m in milestones)


def warmed(
    base: float, progress: float, total: float, *, first: float, done: float, length: float, end: float, **shape: Any
) -> float:
    """:func:`learning_rate`, but a line from ``first`` while ``done`` is below ``length``: SupContrast's warm-up.

    It ends where the cosine is then, and without a cosine at the full rate: a milestone that lies inside it lowers the
    rate once it is over (warmup_to of main_supcon.py, which knows no milestones).

    Args:
        done, length: of the warm-up, both in the same unit; length 0: none.
        end: the ``progress`` that the schedule has when the warm-up is over.
        shape: of the schedule, as :func:`learning_rate`'s.
    """
    if done >= length:
        return learning_rate(base, progress, total, **shape)
    top = learning_rate(base, end, total, **{**shape, "milestones": []})
    return first + (top - first) * done / length


def warm_up(progress: float, length: float) -> float:
    """A factor on the learning rate that rises linearly from 0 over the first ``length``, in the unit of ``progress``.

    As BEiT's fine-tuning schedule (arXiv 2106.08254), whose cosine then spans the rest.
    """
    return min(1.0, progress / length) if length else 1.0
