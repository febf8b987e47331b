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


def warm_up(progress: float, length: float) -> float:
    """A factor on the learning rate that rises linearly from 0 over the first ``length``, in the unit of ``progress``.

    As BEiT's fine-tuning schedule (arXiv 2106.08254), whose cosine then spans the rest.
    """
    return min(1.0, progress / length) if length else 1.0
