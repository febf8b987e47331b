"""Microseconds of finishing 256 pairs of views at 224 px on the card, by Triton and by torch's operators."""

from __future__ import annotations

import functools

from moco.data.augment import by_torch, by_triton

from . import clock
from .findings import Findings
from .views import ORDER, drawn, noise


def run(found: Findings) -> None:
    n, size = (2, 5) if found.dry else (256, 224)
    images, rows = noise((n, 3, size, size)).to(found.device), drawn("v2", n)
    for name, way in (("Triton", by_triton.by_launches), ("torch's operators", by_torch.finish)):
        with found.guarded(f"views by {name}"):
            call = functools.partial(way, images, rows, ORDER)
            found.note(f"{n} views at {size} px by {name}", clock.microseconds(call, found.device, 10, 3), "us")
            if not found.dry:
                seen = clock.kernels(call)
                taken, launches = clock.total(seen)
                found.note(f"views by {name}, kernels", taken, f"us in {launches:.0f}: {clock.longest(seen)}")
