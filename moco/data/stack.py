"""Images of other numbers of channels than one and three, which PIL has no mode for: a grey image a channel.

Legend: H x W pixels, C channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from moco.errors import tell


class Stack:
    """C grey images of one size, the channels of one image: what PIL makes of a grey image is made of each.

    bands: C images in mode "L". size, width, height: in pixels, as PIL has them.
    """

    mode = "stack"  # none of PIL's

    def __init__(self, bands: Sequence[Image.Image]) -> None:
        self.bands: tuple[Image.Image, ...] = tuple(bands)
        self.size: tuple[int, int] = bands[0].size
        self.width, self.height = self.size

    @classmethod
    def of(cls, levels: np.ndarray) -> Stack:
        """The channels of (H, W, C) uint8."""
        return cls([Image.fromarray(np.ascontiguousarray(levels[..., c])) for c in range(levels.shape[2])])

    def each(self, change: Callable[[Image.Image], Image.Image]) -> Stack:
        """``change`` made to every channel."""
        return Stack([change(band) for band in self.bands])

    def crop(self, box: tuple[int, int, int, int]) -> Stack:
        return self.each(lambda band: band.crop(box))

    def resize(self, size: tuple[int, int], *more: Any, **named: Any) -> Stack:
        return self.each(lambda band: band.resize(size, *more, **named))

    def transpose(self, method: Image.Transpose) -> Stack:
        return self.each(lambda band: band.transpose(method))

    def levels(self) -> np.ndarray:
        """(H, W, C) uint8."""
        return np.stack([np.asarray(band) for band in self.bands], axis=2)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.levels() if dtype is None else self.levels().astype(dtype)

    def tobytes(self) -> bytes:
        """H W C bytes, row by row, the channels of a pixel beside one another: as PIL writes colours."""
        return self.levels().tobytes()

    def convert(self, mode: str) -> Image.Image:
        """A picture of it for people, in one of PIL's modes: see :func:`shown`."""
        return shown(self).convert(mode)


Picture = Image.Image | Stack


def from_bytes(pixels: bytes, size: tuple[int, int], channels: int) -> Picture:
    """The image of ``size`` (W, H) whose ``tobytes`` were ``pixels``."""
    if channels in (1, 3):
        return Image.frombytes("L" if channels == 1 else "RGB", size, pixels)
    return Stack.of(np.frombuffer(pixels, np.uint8).reshape(size[1], size[0], channels))


def from_levels(levels: np.ndarray) -> Picture:
    """The image of (H, W), (H, W, 1), (H, W, 3) or (H, W, C) uint8."""
    if levels.ndim == 2 or levels.shape[2] in (1, 3):
        return Image.fromarray(levels[..., 0] if levels.shape[2:] == (1,) else levels)
    return Stack.of(levels)


def black(size: tuple[int, int], channels: int) -> Picture:
    """An image of ``size`` (W, H) in which every level is 0."""
    return from_bytes(bytes(size[0] * size[1] * channels), size, channels)


def shown(image: Picture) -> Image.Image:
    """What a page shows of an image: itself, or of a stack the first three channels as red, green and blue, of two the
    first as grey, which is told once."""
    if isinstance(image, Image.Image):
        return image
    _say(len(image.bands))
    bands = list(image.bands)
    return bands[0] if len(bands) < 3 else Image.merge("RGB", bands[:3])


@functools.cache
def _say(channels: int) -> None:
    how = "the first of them as grey" if channels < 3 else "the first three as red, green and blue"
    tell(f"pictures of images of {channels} channels show {how}", error=True)
