"""Mean and standard deviation of a set's pixels, from the images themselves.

Of all pixels of whole images, decoded as in training and at their own size: each pixel weighs the same, so a large
image weighs more than a small one. Sums are of whole numbers: neither the order of the images nor the number of
processes changes a digit.

Legend: N images, C channels.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from moco import bars, files
from moco.data.loader import EpochSampler, make_loader
from moco.data.sources.base import Source, spread_indices
from moco.data.sources.decode import BadImageError
from moco.errors import UserError

MOST = 10_000  # images of a set whose pixels are counted: the error that is left is far below one level of 255
BATCH = 16  # images that a worker hands over at a time
DIGITS = 6


def sums_of(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(C,) int64 sums of (n, C) uint8 values and of their squares."""
    counts = np.stack([np.bincount(values, minlength=256) for values in pixels.T])  # (C, 256)
    levels = np.arange(256)
    return counts @ levels, counts @ levels**2


def mean_and_std(sums: Sequence[int], squares: Sequence[int], pixels: int) -> tuple[list[float], list[float]]:
    """Of each channel in 0..1, from whole numbers over all pixels, of which there is one at least."""
    mean = [total / pixels / 255 for total in sums]
    # n Q - S^2 in whole numbers: of images of one colour the difference of two floats would not be 0
    std = [(pixels * q - s * s) ** 0.5 / pixels / 255 for s, q in zip(sums, squares, strict=True)]
    return mean, std


@dataclass(eq=False)
class Sums(Dataset):
    """Of each image of ``source`` an item for a loader: (C,) int64 sums of its values and of their squares, and how
    many pixels it has, 0 where it cannot be read."""

    source: Source
    rows: list[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        try:
            pixels = np.asarray(self.source.load(self.rows[key[1]]))
        except BadImageError:
            return self.blank(key)
        pixels = pixels.reshape(-1, self.source.channels)
        sums, squares = sums_of(pixels)
        return {"sums": sums, "squares": squares, "pixels": len(pixels)}

    def blank(self, _: tuple[int, int]) -> dict[str, Any]:
        """An item of an image that cannot be had."""
        none = np.zeros(self.source.channels, dtype=np.int64)
        return {"sums": none, "squares": none, "pixels": 0}


def channel_statistics_of(source: Source, workers: int = 0, most: int = MOST) -> tuple[list[float], list[float], int]:
    """Mean and standard deviation of each channel over all pixels, in 0..1, and the number of images that were read.

    Args:
        workers: loader processes; none: this one reads.
        most: images, spread over a larger set, of which the pixels are counted.

    Raises:
        UserError: none of them can be read.
    """
    rows = spread_indices(len(source), most)
    sampler = EpochSampler(len(rows), min(BATCH, len(rows)), seed=0, drop_last=False, shuffle=False)
    batches = make_loader(Sums(source, rows), sampler, min(workers, len(sampler)))
    sums, squares, pixels, read = [0] * source.channels, [0] * source.channels, 0, 0
    for batch in bars.counted(batches, len(sampler), "mean and standard deviation"):
        sums = [a + b for a, b in zip(sums, batch["sums"].sum(0).tolist(), strict=True)]
        squares = [a + b for a, b in zip(squares, batch["squares"].sum(0).tolist(), strict=True)]
        pixels, read = pixels + int(batch["pixels"].sum()), read + int(torch.count_nonzero(batch["pixels"]))
    if not pixels:
        raise UserError(f"none of {len(rows)} images tried in {source.name} can be read: check the files.")
    return *mean_and_std(sums, squares, pixels), read


@dataclass(frozen=True)
class Measured:
    """Statistics of a set: ``mean`` and ``std`` of each channel, rounded; how many images were read of ``tried``, which
    are of ``every``."""

    mean: list[float]
    std: list[float]
    read: int
    tried: int
    every: int

    def __str__(self) -> str:
        numbers = (" ".join(f"{x:.4g}" for x in values) for values in (self.mean, self.std))
        spread = f", spread over all {self.every:,}" * (self.tried < self.every)
        bad = f", {self.tried - self.read} could not be read" * (self.read < self.tried)
        return f"--stats auto: mean {next(numbers)}, std {next(numbers)} of {self.read:,} images{spread}{bad}"


def measured_once(source: Source, workers: int, folder: str = "") -> Measured:
    """The statistics of a set, from a file of ``folder`` where they were measured before on the same images, and then
    written there; no ``folder``: neither.

    Raises:
        UserError: of images of one value, or none that can be read.
    """
    path = os.path.join(folder, f"statistics-{_key(source)}.json")
    tried = min(MOST, len(source))
    before = found = _known(files.read_json(path) if folder else {}, source.channels)
    if found is None:
        mean, std, read = channel_statistics_of(source, workers, tried)
        found = Measured([round(x, DIGITS) for x in mean], [round(x, DIGITS) for x in std], read, tried, len(source))
    if 0 in found.std:
        raise UserError(
            f"--stats auto: the {found.read} images of {source.name} that were read have one value in all pixels of a "
            "channel, by whose deviation, 0, nothing can be divided: give --mean and --std, or other images."
        )
    if folder and before is None:
        os.makedirs(folder, exist_ok=True)
        files.write_json({"images": source.name, **vars(found)}, path)
    return found


def _key(source: Source) -> str:
    """Sixteen characters of all that the pixels depend on."""
    levels = source.levels.plain() if source.levels else None
    return hashlib.sha256(f"{source.fingerprint()} {source.channels} {levels}".encode()).hexdigest()[:16]


def _known(entries: dict[str, Any], channels: int) -> Measured | None:
    """What the file says; None where it is damaged, and is then written anew."""
    counts: list[Any] = [entries.get(name) for name in ("read", "tried", "every")]
    rows = [row for name in ("mean", "std") if isinstance(row := entries.get(name), list) and len(row) == channels]
    fine = len(rows) == 2 and all(type(x) in (int, float) and 0 <= x <= 1 for row in rows for x in row)
    return Measured(rows[0], rows[1], *counts) if fine and all(type(x) is int for x in counts) else None
