"""The operations of one view after its crop, on a CPU: PIL's pixels, in a third to two thirds of its time.

As in :mod:`moco.data.pixels`, which makes them on batches, but written for the cache: a plane is one channel of one
view, 50,176 numbers at 224 px, and every step is an operation of few bytes on planes that stay in a core's second
level. Between operations a view is 8-bit.

Legend: C channels (1 or 3), h x w pixels, n = h w.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from moco.data.pixels import BLUE, GREEN, RED, box_weights, hue_table
from moco.data.views import ViewParams

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _luminance(view: Floats) -> Floats:
    """(n,) whole numbers from (3, n): PIL's conversion to "L". Every sum is a whole number of 2^-16, hence exact."""
    r, g, b = torch.from_numpy(view)
    total = torch.add(torch.tensor(0.5), r, alpha=RED / 65536)
    return total.add_(g, alpha=GREEN / 65536).add_(b, alpha=BLUE / 65536).floor_().numpy()


def _to_bytes(values: Floats, factor: np.float32, out: Bytes) -> None:
    """Truncated, and clipped where a blend by ``factor`` leaves 0..255; by way of int16, twice as fast to clip."""
    out[...] = values if factor <= 1 else values.astype(np.int16).clip(0, 255)


def _blend(view: Floats, towards: Floats | np.float32, factor: np.float32) -> Bytes:
    """PIL's Image.blend(towards, view, factor) of (C, n); ``view`` is overwritten."""
    out = np.empty(view.shape, np.uint8)
    for plane, to in zip(view, out, strict=True):
        plane -= towards
        plane *= factor
        plane += towards
        _to_bytes(plane, factor, to)
    return out


def _brightness(view: Bytes, factor: float) -> Bytes:
    out = np.empty_like(view)
    for plane, to in zip(view, out, strict=True):
        _to_bytes(plane * np.float32(factor), np.float32(factor), to)
    return out


def _contrast(view: Bytes, factor: float) -> Bytes:
    values = view.astype(np.float32)
    grey = values[0] if len(view) == 1 else _luminance(values)
    exact = np.float32 if grey.size * 255 < 1 << 24 else np.float64  # in which the sum is a whole number
    mean = int(grey.sum(dtype=exact)) / grey.size + 0.5
    return _blend(values, np.float32(int(mean)), np.float32(factor))


def _saturation(view: Bytes, factor: float) -> Bytes:
    if len(view) == 1:
        return view
    values = view.astype(np.float32)
    return _blend(values, _luminance(values), np.float32(factor))


def _sector(view: Bytes, largest: Bytes, smallest: Bytes) -> Bytes:
    """0..5, by which channel is largest and which smallest, as ``hue_table`` counts; ties go to the earlier channel."""
    red, green = ((plane == largest).view(np.uint8) for plane in view[:2])
    of_others, of_red = ((plane != smallest).view(np.uint8) for plane in view[:2])
    of_others += np.uint8(4)
    of_others -= green + green
    of_others *= red ^ np.uint8(1)
    of_red *= red
    return of_red + of_others


def _turned(view: Bytes, largest: Bytes, chroma: Bytes, turn: int) -> Bytes:
    """PIL's 8-bit hue of (3, n), turned by ``turn`` 255ths of a circle."""
    smallest = largest - chroma
    middle = view[0] ^ view[1] ^ view[2] ^ largest ^ smallest
    place = chroma.astype(np.uint16)
    place <<= np.uint16(8)
    place |= (largest - middle).astype(np.uint16)
    whole = _sector(view, largest, smallest).astype(np.int32)
    whole <<= np.int32(16)
    whole |= place.astype(np.int32)
    hues = hue_table().index_select(0, torch.from_numpy(whole)).numpy()
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

    In float32 each step rounds to PIL's own number, for all 2^24 colours and all hues (tests/test_planes.py).
    """
    if len(view) == 1:
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


_JITTER: dict[str, Callable[[Bytes, float], Bytes]] = {
    "brightness": _brightness,
    "contrast": _contrast,
    "saturation": _saturation,
    "hue": _hue,
}


def _grey(view: Bytes) -> Bytes:
    return view if len(view) == 1 else np.broadcast_to(_luminance(view.astype(np.float32)).astype(np.uint8), view.shape)


def blur(view: Bytes, sigma: float) -> Bytes:
    """PIL's GaussianBlur of (C, h, w): three boxes along rows, three along columns, each rounded to 8 bits.

    Levels are counted from 128, so that a sum with its weights of 24 bits just fits 32 bits with a sign.
    """
    weights = box_weights([sigma])[0]
    reach, inner, outer = len(weights) - 1, weights[0], weights[-1]
    missing = (1 << 24) - inner * (2 * reach - 1) - 2 * outer  # 0 or 1, as weights are cut off
    half = torch.tensor((1 << 23) - 128 * missing, dtype=torch.int32)
    channels, height, width = view.shape
    stride = width + 2 * reach
    size, first = height * stride, reach * stride
    padded = torch.zeros(size + 2 * first, dtype=torch.int32)  # one plane, and ``reach`` more pixels at each side
    rows = padded.view(-1, stride).numpy()
    pair, total = torch.empty(2, size, dtype=torch.int32)

    def box(step: int) -> None:
        """Of all pixels and those at the sides, whose values are replaced before they are read."""
        left, *core, right = (padded[first + k * step :][:size] for k in range(-reach, reach + 1))
        middle, near = core[reach - 1], core[0]
        for other in core[1:]:
            near = torch.add(near, other, out=pair)
        torch.add(half, near, alpha=inner, out=total).add_(torch.add(left, right, out=pair), alpha=outer)
        np.right_shift(total.numpy(), 24, out=middle.numpy())

    out = np.empty_like(view)
    inside = slice(reach, -reach)
    for plane, to in zip(view, out, strict=True):
        np.subtract(plane, 128, out=rows[inside, inside], dtype=np.int32)
        for step, lines in ((1, rows[inside].T), (stride, rows)):
            for _ in range(3):
                lines[:reach], lines[-reach:] = lines[reach], lines[-reach - 1]  # edges are repeated
                box(step)
        to[...] = rows[inside, inside] + np.int32(128)
    return out


def finish(crop: torch.Tensor, params: ViewParams, order: Sequence[str]) -> torch.Tensor:
    """(C, h, w) uint8: ``crop`` (C, h, w) uint8 with the operations of ``order`` that ``params`` describe."""
    shape = tuple(crop.shape)
    view = np.ascontiguousarray(crop.numpy()).reshape(shape[0], -1)
    for name in order:
        if name == "jitter":
            for operation, factor in params.jitter or ():
                view = _JITTER[operation](view, factor)
        elif name == "grey" and params.grey:
            view = _grey(view)
        elif name == "blur" and params.blur is not None:
            view = blur(view.reshape(shape), params.blur).reshape(shape[0], -1)
        elif name == "flip" and params.flip:
            view = torch.from_numpy(np.ascontiguousarray(view)).view(shape).flip(2).flatten(1).numpy()
    return torch.from_numpy(np.ascontiguousarray(view)).view(shape)
