"""Random views of an image: one draw of parameters, and the operations.

``draw`` turns a generator into parameters, ``apply`` is a pure function of image and parameters. The operations equal
those of torchvision on PIL images pixel by pixel, so the published accuracies belong to these views. Of an image of
other channels than one and three each is changed as a grey image, but that contrast is towards the mean of all.

Legend: C channels, s side of a view in pixels, (i, j, h, w) top, left, height and width of a crop.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch.nn import functional
from torchvision.transforms.functional import center_crop, resize

from moco.data.augment.presets import Preset
from moco.data.stack import Picture, Stack

Box = tuple[int, int, int, int]  # i, j, h, w


class ViewParams(NamedTuple):
    """One view: every number that ``apply`` needs. None means that the operation is left out."""

    order: tuple[str, ...]
    box: Box
    jitter: tuple[tuple[str, float], ...] | None  # (operation, factor) in the order they are applied
    grey: bool
    blur: float | None  # sigma in pixels
    flip: bool
    affine: tuple[float, float] | None  # rotation, shear in degrees
    solarize: bool = False
    vflip: bool = False
    turn: int = 0  # quarters of a circle, anticlockwise


# The places of one view's uniform numbers. Every view takes the same fixed number of them, so changing one parameter
# of a preset never moves another draw.
_FLIP, _JITTER, _ORDER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _BLUR, _SIGMA, _ANGLE, _SHEAR = range(12)
_TOP, _LEFT, _FIRST_TRY = 12, 13, 14
_TRIES = 10
_SOLARIZE = _FIRST_TRY + 2 * _TRIES
_VFLIP, _TURN, _QUARTERS = range(_SOLARIZE + 1, _SOLARIZE + 4)
_COUNT = _QUARTERS + 1

_JITTER_ORDERS = tuple(itertools.permutations(range(4)))  # 24


def _between(low: float, high: float, u: float) -> float:
    return low + (high - low) * u


def _draw_box(preset: Preset, width: int, height: int, u: list[float]) -> Box:
    """torchvision's RandomResizedCrop: ten attempts at an area and a ratio that fit, else a central crop."""
    low, high = preset.crop_scale
    log_low, log_high = math.log(preset.crop_ratio[0]), math.log(preset.crop_ratio[1])
    for place in range(_FIRST_TRY, _SOLARIZE, 2):
        area = width * height * _between(low, high, u[place])
        ratio = math.exp(_between(log_low, log_high, u[place + 1]))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(u[_TOP] * (height - h + 1)), int(u[_LEFT] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < preset.crop_ratio[0]:
        h = round(w / preset.crop_ratio[0])
    elif width / height > preset.crop_ratio[1]:
        w = round(h * preset.crop_ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _draw_jitter(preset: Preset, u: list[float]) -> tuple[tuple[str, float], ...] | None:
    if u[_JITTER] >= preset.jitter_p:
        return None
    names, operations = tuple(JITTER), []
    for index in _JITTER_ORDERS[int(u[_ORDER] * 24)]:
        strength = getattr(preset, names[index])
        if strength > 0:
            low, high = (-strength, strength) if names[index] == "hue" else (max(0.0, 1 - strength), 1 + strength)
            operations.append((names[index], _between(low, high, u[_BRIGHTNESS + index])))
    return tuple(operations)


def draw(preset: Preset, width: int, height: int, rng: np.random.Generator) -> ViewParams:
    """The parameters of one view of a ``width`` x ``height`` image; takes the same 38 numbers from ``rng`` always."""
    u = rng.random(_COUNT).tolist()
    affine = None
    if preset.degrees or preset.shear:
        affine = (preset.degrees * (2 * u[_ANGLE] - 1), preset.shear * (2 * u[_SHEAR] - 1))
    return ViewParams(
        order=preset.order,
        box=_draw_box(preset, width, height, u),
        jitter=_draw_jitter(preset, u),
        grey=u[_GREY] < preset.grey_p,
        blur=_between(*preset.blur_sigma, u[_SIGMA]) if u[_BLUR] < preset.blur_p else None,
        flip=u[_FLIP] < preset.flip_p,
        affine=affine,
        solarize=u[_SOLARIZE] < preset.solarize_p,
        vflip=u[_VFLIP] < preset.vflip_p,
        turn=1 + int(3 * u[_QUARTERS]) if u[_TURN] < preset.turn_p else 0,
    )


def _crop(image: Image.Image, params: ViewParams, size: int) -> Image.Image:
    i, j, h, w = params.box
    # Cropped first: resize(box=...) would let the filter see pixels outside the crop, which torchvision does not.
    image = image.crop((j, i, j + w, i + h))
    return image if h == w == size else image.resize((size, size), Image.Resampling.BILINEAR)


def _affine(image: Image.Image, params: ViewParams, size: int) -> Image.Image:
    """Rotation after a horizontal shear about the centre, bilinear, black outside."""
    if params.affine is None:
        return image
    matrix = affine_matrix(params.affine, image.size)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def affine_matrix(affine: tuple[float, float], size: tuple[int, int]) -> tuple[float, ...]:
    """(a, b, c, d, e, f): pixel (x, y) comes from (a x + b y + c, d x + e y + f) of an image of ``size``."""
    angle, shear = math.radians(affine[0]), math.tan(math.radians(affine[1]))
    # PIL asks where each output pixel comes from: the inverse of R(angle) [[1, -shear], [0, 1]], of determinant 1.
    cos, sin = math.cos(angle), math.sin(angle)
    a, b, c, d = cos - shear * sin, sin + shear * cos, -sin, cos
    x, y = size[0] * 0.5, size[1] * 0.5
    return (a, b, x - a * x - b * y, c, d, y - c * x - d * y)


def _brightness(image: Image.Image, factor: float) -> Image.Image:
    return Image.blend(Image.new(image.mode, image.size, 0), image, factor)


_LEVELS = range(256)


def _total(grey: Image.Image) -> int:
    """The sum of the levels."""
    return sum(map(operator.mul, grey.histogram(), _LEVELS))


def _contrast(image: Image.Image, factor: float) -> Image.Image:
    grey = image if image.mode == "L" else image.convert("L")
    mean = int(_total(grey) / (image.width * image.height) + 0.5)
    return Image.blend(Image.new(image.mode, image.size, (mean,) * len(image.getbands())), image, factor)


def _contrast_of_stack(stack: Stack, factor: float) -> Stack:
    """Towards the mean of all channels."""
    mean = int(sum(map(_total, stack.bands)) / (stack.width * stack.height * len(stack.bands)) + 0.5)
    towards = Image.new("L", stack.size, mean)
    return stack.each(lambda band: Image.blend(towards, band, factor))


def _saturation(image: Image.Image, factor: float) -> Image.Image:
    if image.mode == "L":
        return image
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def _hue(image: Image.Image, factor: float) -> Image.Image:
    """Turns the hue by ``factor`` of a circle, truncated to 1/255 towards zero as torchvision does."""
    if image.mode == "L":
        return image
    turn = Image.new("HSV", image.size, (int(factor * 255) & 255, 0, 0))
    # in bytes, which wrap around; a table for point() would be read number by number in Python, for every image
    return ImageChops.add_modulo(image.convert("HSV"), turn).convert("RGB")


JITTER = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation, "hue": _hue}


def _jitter(image: Image.Image, params: ViewParams, size: int) -> Image.Image:
    for name, factor in params.jitter or ():
        image = JITTER[name](image, factor)
    return image


_TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
_OPERATIONS: dict[str, Callable[[Image.Image, ViewParams, int], Image.Image]] = {
    "affine": _affine,
    "crop": _crop,
    "jitter": _jitter,
    "grey": lambda image, p, _: image.convert("L").convert("RGB") if p.grey and image.mode == "RGB" else image,
    "blur": lambda image, p, _: image if p.blur is None else image.filter(ImageFilter.GaussianBlur(p.blur)),
    "solarize": lambda image, p, _: ImageOps.solarize(image) if p.solarize else image,  # levels from 128 on
    "flip": lambda image, p, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if p.flip else image,
    "vflip": lambda image, p, _: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if p.vflip else image,
    "turn": lambda image, p, _: image.transpose(_TURNS[p.turn - 1]) if p.turn else image,
}


def _of_stack(name: str, stack: Stack, params: ViewParams, size: int) -> Stack:
    """An operation made to each channel as to a grey image, which has no hue and no saturation."""
    if name != "jitter":
        return stack.each(lambda band: _OPERATIONS[name](band, params, size))
    for step, factor in params.jitter or ():
        change = functools.partial(JITTER[step], factor=factor)
        stack = _contrast_of_stack(stack, factor) if step == "contrast" else stack.each(change)
    return stack


def to_tensor(image: Picture) -> torch.Tensor:
    """(C, h, w) uint8 of an image in mode "L" or "RGB", or of a stack."""
    if isinstance(image, Stack):
        return torch.from_numpy(np.stack([np.asarray(band) for band in image.bands]))
    pixels = np.atleast_3d(np.asarray(image))  # (h, w, C), read-only
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def apply(image: Picture, params: ViewParams, size: int) -> torch.Tensor:
    """The view of ``image`` (mode "L" or "RGB", or a stack) that ``params`` describe: (C, s, s) uint8, s = ``size``.

    Images of other than three channels pass through grey, saturation and hue unchanged.
    """
    for name in params.order:
        if isinstance(image, Stack):
            image = _of_stack(name, image, params, size)
        else:
            image = _OPERATIONS[name](image, params, size)
    return to_tensor(image)


def shrink_for(boxes: Sequence[Box], size: int) -> int:
    """8, 4, 2 or 1: by how much an image may be shrunk so that every crop still has ``size`` pixels each way."""
    least = min(min(h, w) for _, _, h, w in boxes)
    return next((shrink for shrink in (8, 4, 2) if least >= size * shrink), 1)


def crop_tensor(pixels: torch.Tensor, box: Box, size: int) -> torch.Tensor:
    """(C, s, s) uint8 of (C, H, W) uint8: torchvision's resized_crop of tensors, within two levels of PIL's.

    Each of its two passes rounds weights to 16 bits, PIL to 22, and both round pixels to 8.
    """
    i, j, h, w = box
    part = pixels[None, :, i : i + h, j : j + w]
    return functional.interpolate(part, (size, size), mode="bilinear", antialias=True, align_corners=False)[0]


def crop_shrunk(image: Image.Image, box: Box, shrink: int, size: int) -> Image.Image:
    """s x s: ``box`` of the full image, cut out of one decoded at 1 / ``shrink``, at the same place exactly.

    A box that begins or ends inside a pixel of the shrunk image takes that pixel's share.
    """
    top, left, bottom, right = (x / shrink for x in (box[0], box[1], box[0] + box[2], box[1] + box[3]))
    i, j = int(top), int(left)
    part = image.crop((j, i, min(math.ceil(right), image.width), min(math.ceil(bottom), image.height)))
    inside = (left - j, top - i, min(right - j, part.width), min(bottom - i, part.height))
    return part.resize((size, size), Image.Resampling.BILINEAR, box=inside)


def split_order(order: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The operations up to the crop, and those after it, which :func:`moco.data.augment.by_torch.finish` makes on
    batches."""
    crop = order.index("crop") + 1
    return order[:crop], order[crop:]


LONGEST = 1 << 18  # side of a resized image: at 256 pixels high, 67 million of them


def eval_view(image: Picture, size: int) -> torch.Tensor:
    """(C, s, s) uint8 without randomness.

    From 64 pixels on the protocol of ImageNet probes, 256 to 224 in proportion: short side to round(s 256 / 224), then
    the central s x s. Below, images are taken whole: short side to s, centre. ValueError for an image so narrow that
    it would be resized to more than ``LONGEST`` pixels a side.
    """
    short = round(size * 256 / 224) if size >= 64 else size
    if short * max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width} x {image.height} pixels are too narrow for a view of {size}")
    if isinstance(image, Stack):
        return torch.cat([eval_view(band, size) for band in image.bands])
    return to_tensor(center_crop(resize(image, short), size))  # pyright: ignore[reportArgumentType]
