"""The operations of one view after its crop, on a CPU: PIL's pixels, sooner.

As in :mod:`moco.data.augment.by_torch`, which makes them on batches, but written for the cache: a plane is one channel
of one view, 50,176 numbers at 224 px, and every step is an operation of few bytes on planes that stay in a core's
second level. Between operations a view is 8-bit.

Legend: C channels, h x w pixels, n = h w.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moco.data.augment.by_pil import ViewParams
from moco.data.augment.by_torch import BLUE, GREEN, RED, box_weights, hue_tables

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _luminance(view: Bytes) -> Floats:
    """(n,) whole numbers from (3, n): PIL's conversion to "L". Every sum is a whole number of 2^-16, hence exact."""
    total = np.full(view.shape[1], 0.5, np.float32)
    for plane, share in zip(view, (RED, GREEN, BLUE), strict=True):
        torch.from_numpy(total).add_(torch.from_numpy(plane.astype(np.float32)), alpha=share / 65536)
    return np.floor(total, out=total)


def _blend(view: Bytes, towards: Floats | np.float32, factor: np.float32) -> Bytes:
    """PIL's Image.blend(towards, view, factor) of (C, n): float32, clipped where the factor needs it, truncated."""
    out = np.empty_like(view)
    for plane, to in zip(view, out, strict=True):
        values = plane.astype(np.float32)
        values -= towards
        values *= factor
        values += towards
        to[...] = values if factor <= 1 else values.astype(np.int16).clip(0, 255)  # int16 is clipped twice as fast
    return out


def _brightness(view: Bytes, factor: float) -> Bytes:
    return _blend(view, np.float32(0), np.float32(factor))


def _contrast(view: Bytes, factor: float) -> Bytes:
    grey = _luminance(view) if len(view) == 3 else view
    exact = np.float32 if grey.size * 255 < 1 << 24 else np.float64  # in which the sum is a whole number
    mean = int(int(grey.sum(dtype=exact)) / grey.size + 0.5)
    return _blend(view, np.float32(mean), np.float32(factor))


def _saturation(view: Bytes, factor: float) -> Bytes:
    return view if len(view) != 3 else _blend(view, _luminance(view), np.float32(factor))


@functools.cache
def _hues() -> torch.Tensor:
    """(8 * 65536,) uint8: PIL's hue by the three bits of ``_turned``, of which two combinations never occur."""
    rg, rb, gr, gb, br, bg = hue_tables(torch.device("cpu"))[0].view(6, -1)
    return torch.cat([br, bg, gr, gr, br, rg, gb, rb])


def _turned(view: Bytes, largest: Bytes, chroma: Bytes, turn: int) -> Bytes:
    """PIL's 8-bit hue of (3, n), turned by ``turn`` 255ths of a circle."""
    r, g, b = view
    rest = r ^ g ^ b ^ (largest - chroma)  # largest ^ middle
    rest = largest - (rest ^ largest)
    order = (g >= b).view(np.uint8) + (r >= b).view(np.uint8) * np.uint8(2)
    order += order
    order += (r >= g).view(np.uint8)
    place = chroma.astype(np.uint16)
    place <<= np.uint16(8)
    place |= rest.astype(np.uint16)
    whole = order.astype(np.int32)
    whole <<= np.int32(16)
    whole |= place.astype(np.int32)
    hues = _hues().index_select(0, torch.from_numpy(whole)).numpy()
    hues += np.uint8(turn & 255)
    return hues


# A channel lies below the value by value x saturation / 255 times a weight, which falls with the hue's distance from
# the channel's opposite colour: 1 up to 60 degrees, 0 from 120 on. In 85ths of 60 degrees a circle is 510.
_OPPOSITES = (255, 425, 85)  # cyan, magenta, yellow


def _weights(doubled: NDArray[np.int16], opposite: int) -> NDArray[np.int16]:
    """(n,) 0..85, from twice the hue."""
    distance = np.abs(doubled - np.int16(opposite))
    weights = np.int16(170) - distance
    if opposite != 255:  # some distances are shorter the other way round
        distance -= np.int16(510 - 170)
        np.maximum(weights, distance, out=weights)
    return weights.clip(0, 85, out=weights)


def _hue(view: Bytes, factor: float) -> Bytes:
    """Turned by ``factor`` of a circle, cut off to 1/255, by way of PIL's 8-bit HSV.

    Each float32 step rounds to PIL's own number, for all 2^24 colours and hues (tests/data/augment/test_by_numpy.py).
    """
    if len(view) != 3:
        return view
    largest = np.maximum(np.maximum(view[0], view[1]), view[2])
    chroma = largest - np.minimum(np.minimum(view[0], view[1]), view[2])
    doubled = _turned(view, largest, chroma, int(factor * 255)).astype(np.int16)
    doubled += doubled
    value = largest.astype(np.float32)
    below = chroma.astype(np.float32)
    below /= (largest | (largest == 0).view(np.uint8)).astype(np.float32)  # black has no chroma
    below *= np.float32(255)
    np.floor(below, out=below)  # the saturation
    below *= value
    below *= np.float32(1 / (255 * 85))
    value += np.float32(0.5)
    out = np.empty_like(view)
    for to, opposite in zip(out, _OPPOSITES, strict=True):
        channel = _weights(doubled, opposite).astype(np.float32)
        channel *= below
        to[...] = np.subtract(value, channel, out=channel)
    return out


_JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _grey(view: Bytes) -> Bytes:
    """(1, n) of three channels: equal ones stay equal, and what is made of one is what PIL makes of three."""
    return view if len(view) != 3 else _luminance(view).astype(np.uint8)[None]


def blur(view: Bytes, sigma: float) -> Bytes:
    """PIL's GaussianBlur of (C, h, w): three boxes along rows, three along columns, each rounded to 8 bits.

    Levels are counted from 128, so that a sum with its weights of 24 bits just fits 32 bits with a sign.
    """
    weights = box_weights(sigma)
    reach, inner, outer = len(weights) - 1, weights[0], weights[-1]
    missing = (1 << 24) - inner * (2 * reach - 1) - 2 * outer  # 0 or 1, as weights are cut off
    half = torch.tensor((1 << 23) - 128 * missing, dtype=torch.int32)
    channels, height, width = view.shape
    stride = width + 2 * reach
    size, first = height * stride, reach * stride
    padded = torch.zeros(size + 2 * first, dtype=torch.int32)  # one plane, and ``reach`` more pixels at each side
    rows = padded.view(-1, stride).numpy()
    middle = padded.numpy()[first : first + size]
    pair, total = torch.empty(2, size, dtype=torch.int32)
    sums = total.numpy()
    passes = []  # what lies beside each pixel along rows, then along columns
    for step, lines in ((1, rows[reach:-reach].T), (stride, rows)):
        left, *core, right = (padded[first + k * step :][:size] for k in range(-reach, reach + 1))
        passes += 3 * [(lines, left, core, right)]
    signed = (view ^ np.uint8(128)).view(np.int8)
    out = np.empty_like(view)
    inside = rows[reach:-reach, reach:-reach]
    for plane, to in zip(signed, out, strict=True):
        inside[...] = plane
        for lines, left, core, right in passes:
            # Of all pixels and those at the sides, which are replaced before they are read: edges are repeated.
            lines[:reach], lines[-reach:] = lines[reach], lines[-reach - 1]
            near = core[0]
            for other in core[1:]:
                near = torch.add(near, other, out=pair)
            torch.add(half, near, alpha=inner, out=total)
            total.add_(torch.add(left, right, out=pair), alpha=outer)
            np.right_shift(sums, 24, out=middle)
        to[...] = inside
    return out ^ np.uint8(128)


# of (C, h, w)
_MOVES: dict[str, Callable[[torch.Tensor, ViewParams], torch.Tensor]] = {
    "flip": lambda planes, _: planes.flip(2),
    "vflip": lambda planes, _: planes.flip(1),
    "turn": lambda planes, params: planes.rot90(params.turn, (1, 2)),
}


def finish(crop: torch.Tensor, params: ViewParams, order: Sequence[str]) -> torch.Tensor:
    """(C, h, w) uint8: ``crop`` (C, h, w) uint8 with the operations of ``order`` that ``params`` describe; after a turn
    (C, w, h)."""
    channels, height, width = crop.shape
    view = np.ascontiguousarray(crop.numpy()).reshape(channels, -1)
    for name in order:
        if name == "jitter":
            for operation, factor in params.jitter or ():
                view = _JITTER[operation](view, factor)
        elif name == "grey" and params.grey:
            view = _grey(view)
        elif name == "blur" and params.blur is not None:
            view = blur(view.reshape(-1, height, width), params.blur).reshape(len(view), -1)
        elif name == "solarize" and params.solarize:
            view = np.where(view < 128, view, 255 - view)
        elif name in _MOVES and getattr(params, name):
            moved = _MOVES[name](torch.from_numpy(view).view(-1, height, width), params)
            view, (height, width) = moved.flatten(1).numpy(), moved.shape[1:]
    return torch.from_numpy(view).expand(channels, -1).reshape(channels, height, width).clone()
