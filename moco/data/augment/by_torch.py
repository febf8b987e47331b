"""The operations of a view after its crop, on whole batches: every image with parameters of its own, on any device.

They are PIL's, number by number: jitter, grey and flip equal PIL's pixels, because PIL's own arithmetic is repeated
(truncation after each blend, hue and saturation of 8 bits, a blur of three box filters in 24-bit fixed point). Images
stay float32 with whole values 0..255 from one operation to the next.

Legend: N images, C channels (1 or 3), h x w pixels, P numbers a view (``WIDTH``).
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

from moco.data.augment import by_triton as triton_views
from moco.data.augment.by_pil import JITTER, to_tensor
from moco.data.augment.by_triton import NONE, OPERATIONS
from moco.kernels import by_triton as fused

# A row of parameters: four steps of jitter, each an operation's number and its factor, then grey, sigma of the blur
# (0: none), flip and solarize.
_GREY, _SIGMA, _FLIP, _SOLARIZE, WIDTH = 8, 9, 10, 11, 12

# PIL's luminance: ITU-R 601-2 in 16-bit fixed point.
RED, GREEN, BLUE = 19595.0, 38470.0, 7471.0


def pack_params(
    jitter: Sequence[tuple[str, float]] | None, grey: bool, sigma: float | None, flip: bool, solarize: bool = False
) -> Tensor:
    """(P,) float32, one view's parameters as :func:`finish` reads them.

    A turn of the hue is a whole number of 255ths, cut off here, from the double, as torchvision does.
    """
    steps: list[float] = []
    for name, factor in jitter or ():
        steps += [OPERATIONS.index(name), int(factor * 255) if name == "hue" else factor]
    steps += [NONE, 0.0] * (4 - len(steps) // 2)
    return torch.tensor([*steps, grey, sigma or 0.0, flip, solarize], dtype=torch.float32)


def luminance(images: Tensor) -> Tensor:
    """(n, 1, h, w) whole numbers from (n, 3, h, w): PIL's conversion to "L". Every sum is below 2^24, hence exact."""
    if images.shape[1] == 1:
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
    """Towards the grey of the mean luminance, which is rounded to a whole number."""
    pixels = images.shape[-1] * images.shape[-2]
    exact = torch.float32 if pixels * 255 < 1 << 24 else torch.float64  # in which the sum is a whole number
    total = luminance(images).sum((1, 2, 3), keepdim=True, dtype=exact)
    mean = total.double().div_(pixels).add_(0.5).floor_().float()
    return _blend(images, mean, factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Towards each pixel's own luminance; grey images stay."""
    return images if images.shape[1] == 1 else _blend(images, luminance(images), factor)


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
    """A turn by ``turn`` 255ths of a circle, by way of 8-bit HSV; grey images stay."""
    if images.shape[1] == 1:
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


_JITTER: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)  # of OPERATIONS


def box_weights(sigma: float) -> list[int]:
    """The weights of PIL's box filter, centre to edge, in 2^-24; three boxes in a row are its Gaussian.

    PIL's BoxBlur.c: a box of radius r + a, whose outermost pixels count by the share a that keeps the variance.
    """
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * float(variance) + 1.0))
    whole = np.float32(math.floor((float(length) - 1.0) / 2.0))
    edge = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius = whole + edge / (6 * (variance - (whole + 1) * (whole + 1)))
    inner = int(np.float32(1 << 24) / (np.float32(radius) * 2 + 1))
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


def _blur_by_pil(images: Tensor, sigmas: Sequence[float]) -> Tensor:
    pixels = to_bytes(images).permute(0, 2, 3, 1).squeeze(-1).contiguous().numpy()  # (n, h, w, 3), or (n, h, w) if grey
    filters = map(ImageFilter.GaussianBlur, sigmas)
    return torch.stack([to_tensor(Image.fromarray(p).filter(f)) for p, f in zip(pixels, filters, strict=True)]).float()


def to_bytes(images: Tensor) -> Tensor:
    """uint8 of whole values 0..255; by way of int16, which torch converts five times faster on a CPU."""
    return images.to(torch.int16).to(torch.uint8)


def _at(images: Tensor, chosen: np.ndarray, change: Callable[[Tensor], Tensor]) -> Tensor:
    """``images`` with ``change`` made to those numbered in ``chosen``."""
    if len(chosen) == 0:
        return images
    if len(chosen) == len(images):
        return change(images)
    rows = torch.from_numpy(chosen).to(images.device, non_blocking=True)
    return images.index_copy_(0, rows, change(images.index_select(0, rows)))


def _jittered(images: Tensor, table: np.ndarray) -> Tensor:
    for step in range(0, 8, 2):
        numbers = table[:, step]
        for number in set(numbers.tolist()) - {NONE}:
            chosen = np.flatnonzero(numbers == number)
            factors = torch.from_numpy(table[chosen, step + 1]).to(images.device, non_blocking=True).view(-1, 1, 1, 1)
            operation = _JITTER[int(number)]
            images = _at(images, chosen, lambda some, op=operation, by=factors: op(some, by))
    return images


def _greyed(images: Tensor, table: np.ndarray) -> Tensor:
    return _at(images, np.flatnonzero(table[:, _GREY]), lambda some: luminance(some).expand_as(some).clone())


def _blurred(images: Tensor, table: np.ndarray) -> Tensor:
    chosen = np.flatnonzero(table[:, _SIGMA])
    change = _blur_by_pil if images.device.type == "cpu" else blur  # PIL's own loop is faster there
    return _at(images, chosen, lambda some: change(some, table[chosen, _SIGMA].tolist()))


def _solarized(images: Tensor, table: np.ndarray) -> Tensor:
    chosen = np.flatnonzero(table[:, _SOLARIZE])
    return _at(images, chosen, lambda some: torch.where(some < 128, some, 255 - some))


def _flipped(images: Tensor, table: np.ndarray) -> Tensor:
    return _at(images, np.flatnonzero(table[:, _FLIP]), lambda some: some.flip(3))


_STAGES = {"jitter": _jittered, "grey": _greyed, "blur": _blurred, "solarize": _solarized, "flip": _flipped}


def one_by_one(views: Tensor, rows: np.ndarray, order: Sequence[str]) -> Tensor:
    """``finish`` by torch's operators, one operation after another."""
    images = views.float()
    for name in order:
        if name in _STAGES:
            images = _STAGES[name](images, rows)
    return to_bytes(images)


def suits_triton(rows: np.ndarray, order: Sequence[str]) -> bool:
    """Whether ``by_triton`` can: colours before the blur, one contrast a view, every sigma within its reach, nothing
    solarized."""
    after = set(order[order.index("blur") :]) if "blur" in order else set()
    contrasts = (rows[:, 0:8:2] == OPERATIONS.index("contrast")).sum(1).max(initial=0)
    if "solarize" in order and rows[:, _SOLARIZE].any():
        return False
    return not after & {"jitter", "grey"} and contrasts <= 1 and rows[:, _SIGMA].max(initial=0) <= triton_views.SIGMA


def by_triton(views: Tensor, rows: np.ndarray, order: Sequence[str]) -> Tensor:
    """``finish`` by the launches of moco/data/augment/by_triton.py."""
    grey = np.where(rows[:, _GREY] != 0, OPERATIONS.index("grey"), NONE)[:, None, None].repeat(2, axis=2)
    steps = {"jitter": rows[:, :8].reshape(-1, 4, 2), "grey": grey}
    taken = [np.empty((len(rows), 0, 2)), *(steps[name] for name in order if name in steps)]
    boxes = np.zeros((len(rows), 1 + triton_views.REACH), dtype=np.float32)
    for image in np.flatnonzero(rows[:, _SIGMA] * ("blur" in order)):
        weights = box_weights(rows[image, _SIGMA])
        boxes[image, : len(weights)] = weights
    flips = (rows[:, _FLIP] != 0) & ("flip" in order)
    joined = np.concatenate(taken, axis=1, dtype=np.float32)
    return triton_views.finish(views, joined, boxes, flips, hue_tables(views.device))


@functools.cache
def triton_agrees(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether ``by_triton`` runs on a device and gives PIL's numbers for noise of shape (C, h, w); warns if not.

    Asked once a process and shape, so that a run neither ends where triton cannot compile nor trains on wrong pixels.
    """
    order = ("jitter", "grey", "blur", "flip")
    noise = torch.randint(256, (4, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    jitter = [(name, 0.1 if name == "hue" else 0.7) for name in JITTER]
    choices = ((False, None, True), (True, None, False), (False, 2.0, True), (True, 0.5, False))
    packed = [pack_params(jitter[step:] + jitter[:step], *chosen) for step, chosen in enumerate(choices)]
    rows = torch.stack(packed).numpy()

    def compare() -> str:
        found = by_triton(noise.to(device), rows, order).cpu()
        return "" if torch.equal(found, one_by_one(noise, rows, order)) else "its pixels are not PIL's"

    return fused.agrees(compare, f"views are finished on {device} by torch's operators")


@torch.no_grad()
def finish(views: Tensor, table: Tensor, order: Sequence[str]) -> Tensor:
    """(N, C, h, w) uint8: ``views`` (N, C, h, w) uint8 with the rest of their operations made, on their device.

    table: (N, P) on the CPU, rows of :func:`pack_params`; which image takes which operation is decided there, so
    nothing waits for the device. order: the preset's operations; those before and including the crop are left out.
    On a CUDA device by Triton where it can; the numbers are the same by either way.
    """
    rows = table.numpy()
    if views.is_cuda and suits_triton(rows, order) and triton_agrees(views.device, tuple(views.shape[1:])):
        return by_triton(views, rows, order)
    return one_by_one(views, rows, order)
