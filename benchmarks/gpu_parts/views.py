"""Views finished on the card: their pixels against PIL's arithmetic on the CPU, and whether they ask the host.

Legend: N images, C channels, h x w pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moco.data import PRESETS
from moco.data.augment import by_torch, by_triton
from moco.data.augment.by_pil import draw

from . import clock
from .findings import Findings

ORDER = ("jitter", "grey", "blur", "flip")
SIZES = ((64, 3, 224, 224), (64, 3, 32, 32), (33, 1, 28, 28), (17, 3, 97, 65), (8, 3, 384, 384))  # N, C, h, w


def drawn(preset: str, n: int) -> Tensor:
    """(N, P) what the views of a preset drew."""
    rng = np.random.default_rng(0)
    params = [draw(PRESETS[preset], 500, 400, rng) for _ in range(n)]
    return torch.stack(
        [by_torch.pack_params(p.jitter, p.grey, p.blur, p.flip, p.solarize, p.vflip, p.turn) for p in params]
    )


def noise(shape: tuple[int, ...]) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def run(found: Findings) -> None:
    for preset in ("v1", "v2"):
        for shape in ((2, 3, 5, 6), (2, 1, 4, 4)) if found.dry else SIZES:
            with found.guarded(f"views {preset} {shape}"):
                compared(found, preset, shape)


def compared(found: Findings, preset: str, shape: tuple[int, ...]) -> None:
    images, rows = noise(shape), drawn(preset, shape[0])
    after = tuple(name for name in PRESETS[preset].order if name in ORDER)
    expected = by_torch.finish(images, rows, after)
    there = images.to(found.device)
    name = f"views {preset}, {shape[0]} of {'x'.join(map(str, shape[1:]))}"
    for way, finish in (("by_triton", by_triton.by_launches), ("one_by_one", by_torch.finish)):
        if way == "by_triton" and not by_triton.suits(rows, after):
            continue
        clock.poison(found.device)
        off = int((finish(there, rows, after).cpu() != expected).sum())
        found.note(f"{name}, {way}", off, "pixels differ from PIL's", off == 0)
    if not found.dry:
        by_triton.finish(there, rows, after)
        with clock.counted_waits() as waits:
            by_triton.finish(there, rows, after)
        found.note(f"{name}, host waits", len(waits), "; ".join(waits)[:160], not waits)
