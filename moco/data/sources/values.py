"""The numbers that an image file holds, and which of them are black and white.

Modes of 8 bits are already what networks get. Of others a file rarely says its range: 16-bit integers are taken as
0..65,535, floats as 0..1 or 0..255, and :class:`Levels` of the user, or of the whole set, in their place.

Legend: H x W pixels, C channels.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.ImageFile import ImageFile
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, SAMPLEFORMAT, TiffImageFile

SIXTEEN = 65535.0
NARROW = 64  # of 256 levels: images that use no more are nearly of one grey
_NATIVE, _OTHER = ("16L", "16B") if sys.byteorder == "little" else ("16B", "16L")
_SWAPPED = {"16L": "16B", "16B": "16L", "16N": _OTHER}  # of an unpacker: it takes the other byte of each value
_BITS = {"1": 1, "I": 32, "F": 32}  # of modes with other than 8
_DEPTH = re.compile(r";(\d+)")  # in what PIL calls the layout of a PNG or PPM: I;16B, L;4, RGB;16
_COLOURS = ("RGB", "RGBA", "RGBX")


class Levels(NamedTuple):
    """The values of a file that come out as 0 (``low``) and 255 (``high``); linear between them, clipped beyond.

    ``floats_only``: they were found for the float images of a set and leave its others alone; else they hold for all.
    """

    low: float
    high: float
    floats_only: bool = False

    def plain(self) -> list[Any]:
        """For a checkpoint."""
        return [self.low, self.high, *(["float"] if self.floats_only else [])]


def levels_of(plain: Sequence[Any] | None) -> Levels | None:
    """What :meth:`Levels.plain` wrote, or what was typed; levels are returned as they are."""
    if plain is None or isinstance(plain, Levels):
        return plain
    return Levels(float(plain[0]), float(plain[1]), len(plain) > 2)


def for_all(levels: Levels | None) -> bool:
    """Whether they hold for images of 8 bits too."""
    return levels is not None and not levels.floats_only


class Stored(NamedTuple):
    """The numbers of one file: ``depth`` "8-bit", "16-bit", "32-bit" or "float", ``values`` (H, W) or (H, W, C), and
    the range that black and white have without :class:`Levels`, None for floats."""

    depth: str
    values: np.ndarray
    full: tuple[float, float] | None


class Looked(NamedTuple):
    """Of one image: its extreme values, those but for one in a thousand (of 8 bits the same), a sample of them, and the
    range of its type."""

    low: float
    high: float
    usual: tuple[float, float]
    sample: np.ndarray
    full: tuple[float, float] | None


@dataclass(frozen=True)
class Kind:
    """What was found of the images of one depth.

    Args:
        depth: "8-bit", "16-bit", "32-bit" or "float".
        images: how many were looked at.
        low, high: their extreme values.
        range: the values that come out as 0 and as 255.
        usual: extremes but for one value in a thousand, of each image; of 8 bits those of all.
        black, white: shares of the values that come out as 0 and as 255.
        below, above: shares of the values that lie outside of the range.
        chosen: whether the range was typed, or is that of a run, and not of the images themselves.
    """

    depth: str
    images: int
    low: float
    high: float
    range: tuple[float, float]
    usual: list[tuple[float, float]]
    black: float
    white: float
    below: float
    above: float
    chosen: bool = False

    def eight_bits(self, black: float, white: float) -> np.ndarray:
        """(n, 2) what ``usual`` comes to where these two values become 0 and 255."""
        return np.clip((np.array(self.usual) - black) * (255 / (white - black)), 0, 255)

    def is_narrow(self, black: float, white: float) -> bool:
        """Whether half of the images, of 8 bits all together, have no more than a quarter of the 256 levels left."""
        return bool(np.mean(np.diff(self.eight_bits(black, white)) <= NARROW) >= 0.5)


@dataclass(frozen=True)
class Ranges:
    """What was found of some images: (width, height) of those that could be read, and their kinds, the most frequent
    one first."""

    sizes: list[tuple[int, int]]
    kinds: list[Kind]


def stored_grey(image: Image.Image) -> Stored | None:
    """Of a decoded image of one channel with more than 8 bits; None for other modes."""
    if image.mode == "F":
        return Stored("float", np.asarray(image), None)
    if not image.mode.startswith("I"):
        return None
    values, bits = np.asarray(image), _tag(image, BITSPERSAMPLE, 16 if ";16" in image.mode else 32)
    unsigned = _tag(image, SAMPLEFORMAT, 1) == 1
    if bits == 32 and unsigned and isinstance(image, TiffImageFile) and values.dtype == np.int32:
        values = values.view(np.uint32)  # PIL has no mode for it
    if bits == 16 and unsigned and _tag(image, PHOTOMETRIC_INTERPRETATION, 1) == 0:
        values = 65535 - values  # white is zero, which PIL heeds for 8 bits alone
    depth = "16-bit" if bits <= 16 or _is_netpbm(image) else "32-bit"
    return Stored(depth, values, (0.0, 2.0**bits - 1 if 8 < bits < 16 else SIXTEEN))


def bits_of(image: Image.Image) -> int:
    """In which a value of an opened file is stored: PIL's modes do not tell it of colours and of fewer than 8."""
    if bits := _tag(image, BITSPERSAMPLE, 0):
        return bits
    if image.mode.startswith("I;"):
        return 16
    tiles = getattr(image, "tile", None)  # how PIL will read the pixels: (decoder, box, offset, layout)
    depth = _DEPTH.search(str(tiles[0][3])) if image.format in ("PNG", "PPM", "TIFF") and tiles else None
    return int(depth[1]) if depth else _BITS.get(image.mode, 8)


def _tag(image: Image.Image, tag: int, default: int) -> int:
    """The first number of a TIFF's tag."""
    found = image.tag_v2.get(tag) if isinstance(image, TiffImageFile) else None
    return int(found[0] if isinstance(found, tuple) else default if found is None else found)


def _is_netpbm(image: Image.Image) -> bool:
    return image.format == "PPM"


def is_deep_colour(image: Image.Image) -> bool:
    """Whether a file that is opened and not decoded has 16 bits a colour, of which PIL keeps the upper eight."""
    return isinstance(image, ImageFile) and bool(image.tile) and _swapped(image) is not None


def _swapped(image: Any) -> Any:
    """The arguments by which the decoder of the file's one tile takes the lower byte of each value; None where there is
    no such decoder."""
    codec, _, _, args, *_ = image.tile[0]
    name, *more = (args,) if isinstance(args, str) else args
    mode, _, depth = str(name).partition(";")
    if codec == "ppm" and image.mode == "RGB" and more and more[0] > 255:
        return args  # see _netpbm
    if name == "LA;16B" and image.mode == "RGBA":
        return "RGBA"  # all four bytes: grey, grey, alpha, alpha
    if mode not in _COLOURS or depth not in _SWAPPED or image.mode not in _COLOURS:
        return None
    name = f"{mode};{_SWAPPED[depth]}"
    return name if isinstance(args, str) else (name, *more)


def deep_colour(first: Any, again: Any, data: bytes) -> Stored:
    """Of a file of :func:`is_deep_colour`, opened twice, without alpha: PIL keeps one byte of each value, so both are
    decoded. The decoder's own exceptions."""
    if first.tile[0][0] == "ppm":
        return Stored("16-bit", _netpbm(first, data), (0.0, SIXTEEN))
    args = _swapped(first)
    kind = type(again.tile[0])  # a tuple of Pillow 10, later one with names
    again.tile = [(*tile[:3], args) if kind is tuple else kind(*tile[:3], args) for tile in again.tile]
    again.load()
    low = np.asarray(again)
    if args == "RGBA":
        return Stored("16-bit", _joined(low[..., 0], low[..., 1]), (0.0, SIXTEEN))
    first.load()
    return Stored("16-bit", _joined(np.asarray(first)[..., :3], low[..., :3]), (0.0, SIXTEEN))


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return (high.astype(np.uint16) << 8) | low


def _netpbm(image: Any, data: bytes) -> np.ndarray:
    """(H, W, 3) uint16 of a binary PPM, whose values are shares of its own largest one."""
    (width, height), (_, _, start, args, *_) = image.size, image.tile[0]
    values = np.frombuffer(data, ">u2", 3 * width * height, start).reshape(height, width, 3)
    return np.minimum(np.rint(values * (SIXTEEN / args[1])), SIXTEEN).astype(np.uint16)


def range_of(stored: Stored, levels: Levels | None) -> tuple[float, float]:
    """The values that come out as 0 and as 255."""
    if levels is not None and (stored.depth == "float" or for_all(levels)):
        return levels.low, levels.high
    if stored.full is not None:
        return stored.full
    # A float image by itself: values up to 1 are shares of white. Of a set see moco/data/levels.py.
    return 0.0, 1.0 if max(np.nan_to_num(row).max() for row in stored.values) <= 1.0 else 255.0


def stored_array(values: np.ndarray) -> Stored:
    """Of numbers (H, ...) of any type, which are no image of PIL's: whole ones of more than a byte are of 16 bits."""
    kind, size = values.dtype.kind, values.dtype.itemsize
    if kind == "b" or values.dtype == np.uint8:
        return Stored("8-bit", values * np.uint8(255) if kind == "b" else values, (0.0, 255.0))
    if kind == "f":
        return Stored("float", values, None)
    return Stored("16-bit" if size <= 2 else "32-bit", values, (0.0, SIXTEEN))


def to_levels(values: np.ndarray, levels: Levels | None = None) -> np.ndarray:
    """uint8 of numbers (H, ...) of any type: the one scale of all pixels and channels of an image."""
    stored = stored_array(values)
    if stored.depth == "8-bit" and not for_all(levels):
        return stored.values
    return eight_bits(stored.values, *range_of(stored, levels))


def eight_bits(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """``values`` as uint8, ``low`` as 0 and ``high`` as 255, linear between, rounded to the nearest; what is no number
    is black."""
    levels = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), 64):  # of a whole image the parts would be 24 bytes a pixel
        part = values[start : start + 64]
        if values.dtype.kind == "u" and values.dtype.itemsize <= 2:
            levels[start : start + 64] = _table(low, high)[part]
        elif values.dtype.kind in "iu" and (low, high) == (0.0, SIXTEEN):
            levels[start : start + 64] = (np.clip(part.astype(np.int64), 0, 65535) + 128) // 257  # 65,535 = 255 x 257
        else:
            levels[start : start + 64] = _mapped(part, low, high)
    return levels


def _mapped(values: np.ndarray, low: float, high: float) -> np.ndarray:
    values = values if values.dtype == np.float32 else values.astype(np.float64)
    values = np.nan_to_num(np.clip(values, low, high), nan=low)
    return np.rint((values - low) * (255 / (high - low)))


@functools.lru_cache(8)
def _table(low: float, high: float) -> np.ndarray:
    """(65536,) uint8: what becomes of each value of 16 bits."""
    return _mapped(np.arange(65536), low, high).astype(np.uint8)
