"""The operations of a view after its crop, on whole batches: every image with parameters of its own, on any device.

They are PIL's, number by number: jitter, grey and flip equal PIL's pixels, because PIL's own arithmetic is repeated
(truncation after each blend, hue and saturation of 8 bits, a blur of three box filters in 24-bit fixed point). Images
stay float32 with whole values 0..255 from one operation to the next.

Legend: N images, C channels, h x w pixels, P = 14 numbers a view.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from moco.data.augment.by_pil import JITTER, to_tensor

OPERATIONS = (*JITTER, "grey")
NONE = -1  # of them

# PIL's luminance: ITU-R 601-2 in 16-bit fixed point.
RED, GREEN, BLUE = 19595.0, 38470.0, 7471.0


def pack_params(
    jitter: Sequence[tuple[str, float]] | None, grey: bool, sigma: float | None, flip: bool, solarize: bool = False,
    vflip: bool = False, turn: int = 0,
) -> Tensor:  # fmt: skip
    """(P,) float32, one view's parameters as :func:`finish` reads them.

    A turn of the hue is a whole number of 255ths, cut off here, from the double, as torchvision does.
    """
    steps: list[float] = []
    for name, factor in jitter or ():
        steps += [OPERATIONS.index(name), int(factor * 255) if name == "hue" else factor]
    steps += [NONE, 0.0] * (4 - len(steps) // 2)
    row = [*steps, grey, sigma or 0.0, flip, solarize, vflip, turn]
    return torch.from_numpy(np.array(row, np.float32))  # less work than torch.tensor, once a view


def by_operation(table: Tensor) -> dict[str, np.ndarray]:
    """What (N, P) rows of :func:`pack_params` say of each operation: jitter (N, 4, 2), steps of a number of
    ``OPERATIONS``, or ``NONE``, and its factor; blur (N,) sigmas, 0 for none; turn (N,) quarters; others (N,), not 0
    where it is made."""
    rows = table.numpy()
    others = dict(zip(("grey", "blur", "flip", "solarize", "vflip", "turn"), rows[:, 8:].T, strict=True))
    return {"jitter": rows[:, :8].reshape(-1, 4, 2), **others}


def luminance(images: Tensor) -> Tensor:
    """(n, 1, h, w) whole numbers from (n, 3, h, w): PIL's conversion to "L". Every sum is below 2^24, hence exact.

    Images of other channels are no colours: themselves.
    """
    if images.shape[1] != 3:
        return images
    r, g, b = images.split(1, dim=1)
    return (r * RED).add_(g * GREEN).add_(b * BLUE).add_(32768.0).mul_(2.0**-16).floor_()


def _blend(images: Tensor, towards: Tensor, factor: Tensor) -> Tensor:
    """PIL's Image.blend(towards, images, factor): float32, clipped, truncated. factor: (n, 1, 1, 1)."""
    return (images - towards).mul_(factor).add_(towards).clamp_(0.0, 255.0).floor_()


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Towards black."""
    return (images * factor).clamp_(0.0, 255.0).floor_()


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Towards the grey of the mean luminance, which is rounded to a whole number; without colours of all channels."""
    grey = luminance(images)
    pixels = grey[0].numel()
    exact = torch.float32 if pixels * 255 < 1 << 24 else torch.float64  # in which the sum is a whole number
    total = grey.sum((1, 2, 3), keepdim=True, dtype=exact)
    # In whole numbers: a GPU multiplies by a number's reciprocal, and a half at 224 px then comes out a level lower.
    mean = total.long().mul_(2).add_(pixels).div_(2 * pixels, rounding_mode="floor").float()
    return _blend(images, mean, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards each pixel's own luminance; images without colours stay."""
    return images if images.shape[1] != 3 else _blend(images, luminance(images), factor)


@functools.cache
def hue_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """PIL's conversions as tables, computed in its own mixture of float and double.

    hue: (6 * 256 * 256,) uint8 by which channel is largest and which smallest, by largest - smallest (chroma) and by
    largest - middle. saturation: (256 * 256,) by largest and chroma. weights: (3 * 256,) by channel and hue: how many
    85ths of (value x saturation / 255) a channel lies below the value.
    """
    x = np.arange(256, dtype=np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        share = (x[None, :] / x[:, None]).astype(np.float64)  # [chroma, largest - middle], also [largest, chroma]
    # The smallest channel's share is 1. Rows: (largest, smallest) = rg, rb, gr, gb, br, bg.
    turns = np.stack([share - 1, 1 - share, 3 - share, 1 + share, 3 + share, 5 - share]).astype(np.float32)
    turns[:, 0] = 0.0
    wrapped = np.fmod(np.nan_to_num(turns).astype(np.float64) / 6 + 1, 1).astype(np.float32)
    hue = (np.clip(wrapped.astype(np.float64), 0, 1) * 255).astype(np.uint8)
    saturated = (np.clip(np.nan_to_num(share), 0, 1) * 255).astype(np.uint8).astype(np.float32)
    number = np.arange(256)
    sector, rest = number * 6 // 255, number * 6 % 255 / 3  # rest in 85ths of a sector
    middle = np.where(sector % 2 == 0, 85 - rest, rest)
    kinds = np.array([[0, 1, 2, 2, 1, 0], [1, 0, 0, 1, 2, 2], [2, 2, 1, 0, 0, 1]])  # value, middle, lowest
    weights = np.choose(kinds[:, sector % 6], [np.zeros(256), middle, np.full(256, 85.0)]).astype(np.float32)
    tables = (hue.reshape(-1), saturated.reshape(-1), weights.reshape(-1))
    return tuple(torch.from_numpy(table).to(device) for table in tables)  # pyright: ignore[reportReturnType]


def hue(images: Tensor, turn: Tensor) -> Tensor:
    """A turn by ``turn`` 255ths of a circle, by way of 8-bit HSV; images without colours stay."""
    if images.shape[1] != 3:
        return images
    hues, saturations, weights = hue_tables(images.device)
    n, _, h, w = images.shape
    r, g, b = to_bytes(images).unbind(1)  # (n, h, w) each
    largest, smallest = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    middle, chroma = r ^ g ^ b ^ largest ^ smallest, largest - smallest
    # A tie goes to the earlier channel, as in PIL. 0..5, by (largest, smallest).
    # Written without branches and in bytes, which a CPU does 32 or 64 at a time; a mixture of types costs it ten times.
    red, green = (r == largest).view(torch.uint8), (g == largest).view(torch.uint8)
    of_red, of_others = (g != smallest).view(torch.uint8), (r != smallest).view(torch.uint8) + (4 - 2 * green)
    which = red * of_red + (1 - red) * of_others
    chroma = chroma.int()
    place = which.int().mul_(256).add_(chroma).mul_(256).add_((largest - middle).int()).view(-1)
    turned = hues.index_select(0, place).view(n, h, w) + turn.to(torch.int16).to(torch.uint8).view(n, 1, 1)
    place = largest.int().mul_(256).add_(chroma).view(-1)
    value = largest.float()
    below = saturations.index_select(0, place).view(n, h, w).mul_(value)  # value x saturation, exact
    # value - value saturation weight / (255 x 85), rounded to the nearest: whole numbers below 2^24 and one division.
    # No tie occurs, because 255 x 85 is odd.
    value = value.mul_(255.0 * 85.0)
    place = turned.int().view(-1)
    out = torch.empty_like(images)
    for channel in range(3):
        weight = weights[256 * channel : 256 * (channel + 1)].index_select(0, place).view(n, h, w)
        torch.sub(value, weight.mul_(below), out=weight).div_(255.0 * 85.0)
        out[:, channel] = weight.round_()
    return out


def box_weights(sigma: float) -> list[int]:
    """The weights of PIL's box filter, centre to edge, in 2^-24; three boxes in a row are its Gaussian.

    PIL's BoxBlur.c: a box of radius r + a, whose outermost pixels count by the share a that keeps the variance.
    """
    one, two, three, six = map(np.float32, (1, 2, 3, 6))  # beside a Python number, numpy 1 computes in float64
    variance = np.float32(sigma) * np.float32(sigma) / three
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    edge = (two * whole + one) * (whole * (whole + one) - three * variance)
    radius = whole + edge / (six * (variance - (whole + one) * (whole + one)))
    inner = int(np.float32(1 << 24) / (radius * two + one))
    outer = ((1 << 24) - (int(radius) * 2 + 1) * inner) // 2
    return [inner] * (int(radius) + 1) + [outer]


def _boxes(images: Tensor, weights: Tensor) -> Tensor:
    """Three box filters in a row along dimension 2 of (n, C, h, w) int32. weights: (D, n, 1, 1, 1), centre to edge."""
    n, channels, height, width = images.shape
    reach = len(weights) - 1
    padded = images.new_empty(n, channels, height + 2 * reach, width)
    inside = padded[:, :, reach : reach + height].copy_(images)
    pair, half = images.new_empty(images.shape), images.new_full((1,), 1 << 23)
    for _ in range(3):
        padded[:, :, :reach] = inside[:, :, :1]  # edges are repeated
        padded[:, :, reach + height :] = inside[:, :, -1:]
        total = torch.addcmul(half, inside, weights[0])
        for distance in range(1, reach + 1):
            above = padded[:, :, reach - distance : reach - distance + height]
            below = padded[:, :, reach + distance : reach + distance + height]
            total.addcmul_(torch.add(above, below, out=pair), weights[distance])
        # The sum fills 32 bits without a sign; the shift copies the sign, and the mask takes the copies away.
        torch.bitwise_and(total.bitwise_right_shift_(24), 255, out=inside)
    return inside


def blur(images: Tensor, sigmas: Sequence[float]) -> Tensor:
    """PIL's GaussianBlur of (n, C, h, w), each image by a sigma of its own."""
    boxes = itertools.zip_longest(*map(box_weights, sigmas), fillvalue=0)
    weights = torch.tensor(list(boxes), dtype=torch.int32).to(images.device, non_blocking=True)[..., None, None, None]
    rows = _boxes(images.transpose(2, 3).int().contiguous(), weights)
    return _boxes(rows.transpose(2, 3), weights).float()


def _blurred(images: Tensor, sigmas: np.ndarray) -> Tensor:
    if images.device.type != "cpu":  # on one PIL's own loop is faster
        return blur(images, sigmas.tolist())
    if images.shape[1] not in (1, 3):
        bands = [_blurred(band, sigmas) for band in images.split(1, dim=1)]
        return torch.cat(bands, dim=1)
    pixels = to_bytes(images).permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()  # (n, h, w, 3), or (n, h, w) if grey
    filters = map(ImageFilter.GaussianBlur, sigmas.tolist())
    return torch.stack([to_tensor(Image.fromarray(p).filter(f)) for p, f in zip(pixels, filters, strict=True)]).float()


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of whole values 0..255; by way of int16, which torch converts five times faster on a CPU."""
    return images.to(torch.int16).to(torch.uint8)


def _at(
    images: Tensor, chosen: np.ndarray, drawn: np.ndarray, change: Callable[[Tensor, np.ndarray], Tensor]
) -> Tensor:
    """``images`` with ``change`` made to those that ``chosen`` (N,) marks, by their numbers in ``drawn`` (N,)."""
    rows = np.flatnonzero(chosen)
    if len(rows) == 0:
        return images
    if len(rows) == len(images):
        return change(images, drawn[rows])
    places = torch.from_numpy(rows).to(images.device, non_blocking=True)
    return images.index_copy_(0, places, change(images.index_select(0, places), drawn[rows]))


def _jittered(number: int, images: Tensor, factors: np.ndarray) -> Tensor:
    by = torch.from_numpy(factors).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
    return (brightness, contrast, saturation, hue)[number](images, by)  # as in OPERATIONS


def _turned(images: Tensor, quarters: np.ndarray) -> Tensor:
    for number in (1, 2, 3):
        images = _at(images, quarters == number, quarters, lambda some, _, k=number: some.rot90(k, (2, 3)).contiguous())
    return images


_CHANGES: dict[str, Callable[[Tensor, np.ndarray], Tensor]] = {
    "grey": lambda some, _: luminance(some).expand_as(some).clone(),
    "blur": _blurred,
    "solarize": lambda some, _: torch.where(some < 128, some, 255 - some),
    "flip": lambda some, _: some.flip(3),
    "vflip": lambda some, _: some.flip(2),
    "turn": _turned,
}


@torch.no_grad()
def finish(views: Tensor, table: Tensor, order: Sequence[str]) -> Tensor:
    """(N, C, h, w) uint8: ``views`` (N, C, h, w) uint8 with the rest of their operations made, on their device.

    table: (N, P) on the CPU, rows of :func:`pack_params`; which image takes which operation is decided there, so
    nothing waits for the device. order: the preset's operations; those before and including the crop are left out.
    Turns are of squares, h = w.
    """
    images, drawn = views.float(), by_operation(table)
    for name in order:
        if name in _CHANGES:
            images = _at(images, drawn[name], drawn[name], _CHANGES[name])
        elif name == "jitter":
            for numbers, factors in drawn[name].transpose(1, 2, 0):  # (N,) each, of a step
                for number in set(numbers.tolist()) - {NONE}:
                    images = _at(images, numbers == number, factors, functools.partial(_jittered, int(number)))
    return to_bytes(images)
