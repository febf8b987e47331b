"""Learning-rate schedules as pure functions."""

from __future__ import annotations

import math


def learning_rate(base: float, progress: float, total: float, *, cosine: bool, milestones: list[int]) -> float:
    """The rate at ``progress`` out of ``total`` (both in epochs, or both in steps).

    Cosine: base * (1 + cos(pi * progress / total)) / 2, without warm-up (SGDR, arXiv 1608.03983, as MoCo v2 uses it:
    one value an epoch). Otherwise 10x lower at each milestone, in the same unit as ``progress``.
    """
    if cosine:
        return base * 0.5 * (1.0 + math.cos(math.pi * progress / total))
    return base * 0.1 ** sum(progress >= m for m in milestones)
