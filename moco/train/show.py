"""The views that a pretraining would make, as a picture and in numbers: the work of python -m moco.data show.

Legend: C channels, s side of a view in pixels, (i, j, h, w) top, left, height and width of a crop.
"""

from __future__ import annotations

import math
import statistics
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from moco import data, files, run_folder, seeding
from moco.config import PretrainConfig
from moco.data.augment.by_pil import affine_matrix, to_tensor
from moco.data.sources.base import spread_indices
from moco.errors import tell
from moco.pictures import views as pictures
from moco.train.setup import Views, view_settings

EPOCHS = 200  # whose crops of the shown images the numbers are of
LITTLE = 0.15  # of an image, or of a crop's pixels
MUCH = 4.0  # times more pixels in a view than in its crop


def go_on(args: Namespace) -> tuple[str | None, dict[str, Any]]:
    """The checkpoint that the run would go on from, if any, and what is in it.

    Raises:
        UserError: it cannot be read.
    """
    found = run_folder.newest_good(args.save_dir, None) if args.resume == "auto" else None
    path = found.path if found else args.resume or None
    return path, files.read(path) if path else {}


def show(images: data.Source, args: Namespace, config: PretrainConfig, state: dict[str, Any], command: str) -> None:
    """Write the picture and tell what is in it.

    Args:
        images: of the pretraining.
        args: its flags, with rows, draws and out.
        config: what they come to.
        state: of the checkpoint that the run goes on from, if any.
        command: what to type next.

    Raises:
        UserError: images that cannot be read, or a picture that would be too large.
    """
    view = view_settings(config.views, images)
    seed = seeding.choose_seed(args.seed or 0, state or None)  # of the checkpoint, the flag's, or 0
    fast = config.views.decode == "fast"
    given = {"views": config.views.count, "local": config.views.local}
    views = data.TwoViews(images, view.preset, view.size, seed, fast=fast, **given)
    shown, sizes = [], {}
    for index in spread_indices(len(images), args.rows):
        one, sizes[index] = _image_shown(views, index, args.draws)
        shown.append(one)
    kept, pixels, few = crops(views, sizes)
    summary = crop_words(kept)
    place = pictures.draw(
        shown, f"Views by {view.aug} at {view.size} px", _words(view, images, seed, summary), args.out
    )
    count, draws = len(shown), args.draws
    tell(f"wrote {args.out}: {count} image{'s' * (count > 1)} x {draws} draw{'s' * (draws > 1)}")
    small = count * draws * views.local.count
    also = f" and {small} small crops of {views.local.size} px" * (small > 0)
    tell(f"{len(place) - small} views of {view.aug} at {view.size} px{also}, seed {seed}" + _unseeded(args))
    tell(f"{summary}, by {kept.size:,} crops of these images")
    for line in filter(None, (few_of_image(few, view.preset), pixel_warning(pixels, view.size))):
        tell(line)
    tell(f"next: {command}")


def _unseeded(args: Namespace) -> str:
    asked = args.seed is not None or args.resume
    return "" if asked else ", as no --seed is given: a run without one draws its own"


def _words(view: Views, images: data.Source, seed: int, summary: str) -> list[str]:
    numbers = ("  ".join(f"{x:.4g}" for x in values) for values in (view.mean, view.std))
    mean, std = numbers
    times = pictures.factor(view.size)
    scale = f"; pixels enlarged {times} times" if times > 1 else f"; drawn at 1/{-times}" if times < 0 else ""
    return [
        f"{len(images):,} images of {images.name}; seed {seed}; normalised by mean {mean}, std {std}",
        summary + scale,
    ]


# ---------------------------------------------------------------------------------------------------- one image


def _image_shown(views: data.TwoViews, index: int, draws: int) -> tuple[pictures.ImageShown, tuple[int, int]]:
    """An image with its views in the first epochs, and its (width, height)."""
    items = [views[(epoch, index)] for epoch in range(draws)]
    used = int(items[0]["index"])
    image = views.source.load(used)
    name = views.source.name_of(used)
    lines = (name.rpartition("/")[2], f"{image.width} x {image.height} px")
    replaced = ("in the place of one that cannot be read",) if items[0]["bad"] != -1 else ()
    shown = tuple(_views_shown(views, image.size, item, (epoch, index)) for epoch, item in enumerate(items))
    return pictures.ImageShown(to_tensor(image).numpy(), (*lines, *replaced), shown), image.size


def _views_shown(
    views: data.TwoViews, size: tuple[int, int], item: dict[str, Any], key: tuple[int, int]
) -> tuple[pictures.ViewShown, ...]:
    pixels: Sequence[torch.Tensor] = (item["q"], item["k"], *item.get("more", ()))
    large = zip(pixels, views.drawn(size, *key), strict=True)
    small = zip(item.get("local", ()), views.drawn_local(size, *key), strict=True)
    shown = [_view_shown(one.numpy(), params, size) for one, params in large]
    crops = [_view_shown(one.numpy(), params, size) for one, params in small]
    return (*shown, *(replace(crop, small=True, low=False) for crop in crops))


def _view_shown(pixels: np.ndarray, params: data.ViewParams, size: tuple[int, int]) -> pictures.ViewShown:
    _, _, h, w = params.box
    share = h * w / (size[0] * size[1])
    words = f"crop {_percent(share)}, {w} x {h} px"
    return pictures.ViewShown(pixels, corners(params, size), words, keeps_little(w, h, size), described(params))


def keeps_little(w: int, h: int, size: tuple[int, int]) -> bool:
    """Whether a crop keeps less than ``LITTLE`` of an image, before its sides are rounded to whole pixels."""
    return (w + 0.5) * (h + 0.5) < LITTLE * size[0] * size[1]


def corners(params: data.ViewParams, size: tuple[int, int]) -> np.ndarray:
    """(4, 2) x, y: the crop's corners in an image of ``size`` as it is in its file, before what precedes the crop."""
    i, j, h, w = params.box
    found = np.array([(j, i), (j + w, i), (j + w, i + h), (j, i + h)], dtype=np.float64)
    for name in reversed(params.order[: params.order.index("crop")]):
        if name == "flip" and params.flip:
            found[:, 0] = size[0] - found[:, 0]
        elif name == "vflip" and params.vflip:
            found[:, 1] = size[1] - found[:, 1]
        elif name == "affine" and params.affine is not None:
            a, b, c, d, e, f = affine_matrix(params.affine, size)
            found = found @ np.array([(a, d), (b, e)]) + (c, f)
    return found


DEGREES = "\N{DEGREE SIGN}"


def described(params: data.ViewParams) -> tuple[str, ...]:
    """What was drawn, in the order in which it is made, without the crop; what is left out is not named."""
    said = {
        "affine": params.affine and _affine(*params.affine),
        "grey": params.grey and "grey",
        "blur": params.blur is not None and f"blur {params.blur:.2f} px",
        "solarize": params.solarize and "solarized",
        "flip": params.flip and "flipped",
        "vflip": params.vflip and "upside down",
        "turn": params.turn and f"turned {90 * params.turn}{DEGREES}",
    }
    found: list[str] = []
    for name in params.order:
        if name == "jitter":
            found += [_factor(*step) for step in params.jitter or ()]
        elif said.get(name):
            found.append(str(said[name]))
    return tuple(found)


def _affine(angle: float, shear: float) -> str:
    return f"rotated {angle:+.0f}{DEGREES}, sheared {shear:+.0f}{DEGREES}"


def _factor(name: str, factor: float) -> str:
    return f"hue {360 * factor:+.0f}{DEGREES}" if name == "hue" else f"{name} {factor:.2f}"


# ---------------------------------------------------------------------------------------------------- the numbers


def crops(views: data.TwoViews, sizes: dict[int, tuple[int, int]]) -> tuple[np.ndarray, np.ndarray, float]:
    """(n,) share of its image, and (n,) pixels, of each crop of these images in the first epochs, and how large a share
    of the crops :func:`keeps_little`; sizes: (width, height) by the image's number."""
    boxes = [
        (params.box[2] * params.box[3], size[0] * size[1], keeps_little(params.box[3], params.box[2], size))
        for index, size in sizes.items()
        for epoch in range(EPOCHS)
        for params in views.drawn(size, epoch, index)
    ]
    own, whole, few = np.array(boxes, dtype=np.float64).T
    return own / whole, own, float(few.mean())


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"


def crop_words(kept: np.ndarray) -> str:
    """The shares that crops keep of their images, in words."""
    low, middle, high = (_percent(float(x)) for x in (kept.min(), np.median(kept), kept.max()))
    return f"crops keep {low} to {high} of an image's area, median {middle}"


def few_of_image(few: float, preset: data.Preset) -> str:
    """A sentence where a share of the crops keeps little of its images, and the flag that changes it; else nothing."""
    if not few:
        return ""
    low = min(preset.of_view(view).crop_scale[0] for view in (0, 1))
    change = f"--crop-min {LITTLE} (now {low:g}), or crop_scale in a file for --aug, keeps more."
    if low >= LITTLE:
        change = "these images are long and narrow: a wider crop_ratio in a file for --aug keeps more."
    return f"warning: {_percent(few)} of the crops keep less than {_percent(LITTLE)} of their image; {change}"


def pixel_warning(pixels: np.ndarray, size: int) -> str:
    """A sentence where views have far fewer or far more pixels than their crops; else nothing.

    Args:
        pixels: of each crop.
        size: s.
    """
    middle = statistics.median(pixels.tolist())
    share, side = size * size / middle, math.sqrt(middle)
    if share < LITTLE:
        return (
            f"warning: a view of {size} px keeps {_percent(share)} of the pixels of its crop (median), and what is "
            f"smaller than {side / size:.1f} pixels of the image is lost: a larger --size keeps more."
        )
    if share > MUCH:
        return (
            f"warning: a view of {size} px is made from {side:.0f} x {side:.0f} pixels (median), enlarged "
            f"{size / side:.1f} times: a smaller --size shows the same."
        )
    return ""
