"""Views finished on a GPU: jitter, grey, blur and flip of a whole batch in at most four Triton launches.

Legend: N images, C channels (1 or 3), h x w pixels, S steps an image at most, P numbers an image (``NUMBERS``).

1. ``luminances``: for images that draw contrast, sums of the luminance that it sees      reads the image
2. ``points``: images without a blur, every operation                                     reads it, writes it
3. ``blur``: the others, every operation and three boxes along the rows                   reads it, writes it turned
4. ``blur``: three boxes along what were columns, flip                                    reads it, writes it

The numbers are those of moco/data/augment/by_torch.py, by triton's interpreter and on an H200.
Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from moco.data.augment import by_torch
from moco.data.augment.by_pil import JITTER
from moco.data.augment.by_torch import NONE, OPERATIONS, box_weights, by_operation, hue_tables, pack_params
from moco.kernels import by_triton as fused

STEPS = 5  # S
REACH = 2  # pixels on each side of a box at most, which is enough for SIGMA
SIGMA = 2.4

# A row of the plan: S times (operation, factor), then these, then an image's number in each of three lists.
COUNT, AT_CONTRAST, FLIP, BOXES = 2 * STEPS, 2 * STEPS + 1, 2 * STEPS + 2, 2 * STEPS + 3
CONTRASTED, SHARP, BLURRED = range(BOXES + 1 + REACH, BOXES + 4 + REACH)
NUMBERS = BLURRED + 1

# Chosen for what they use of a GPU (benchmarks/speed/kernel_resources.py); not yet timed on one.
PIXELS = 1024  # pixels a program
BLUR_ROWS = 64  # rows a program of ``blur``, a row a thread
SEGMENT = 64  # and columns


def program_constants(colour: bool) -> dict[str, dict[str, int]]:
    """What each program is compiled for, and how. PIL rounds a product before it adds: no fused multiply-add."""
    known = {"COLOUR": colour, "enable_fp_fusion": False}
    return {
        "luminances": {**known, "LIST": CONTRASTED, "BLOCK": PIXELS},
        "points": {**known, "LIST": SHARP, "BLOCK": PIXELS},
        "blur": {**known, "LIST": BLURRED, "BLOCK": BLUR_ROWS, "SEGMENT": SEGMENT, "num_warps": 2},
    }


def suits(table: Tensor, order: Sequence[str]) -> bool:
    """Whether the programs can: colours before the blur, one contrast a view, every sigma within their reach, nothing
    solarized, turned or flipped upside down."""
    drawn = by_operation(table)
    after = set(order[order.index("blur") :]) if "blur" in order else set()
    contrasts = (drawn["jitter"][:, :, 0] == OPERATIONS.index("contrast")).sum(1).max(initial=0)
    if any(name in order and drawn[name].any() for name in ("solarize", "vflip", "turn")):
        return False
    return not after & {"jitter", "grey"} and contrasts <= 1 and drawn["blur"].max(initial=0) <= np.float32(SIGMA)


def plan_views(table: Tensor, order: Sequence[str]) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(N, P) float32, what the programs read, and how many images draw contrast, have no blur, have one.

    Arguments as of :func:`finish`.
    """
    drawn = by_operation(table)
    sigmas, flips = (drawn[name] * (name in order) for name in ("blur", "flip"))
    drawn["grey"] = np.where(drawn["grey"] != 0, OPERATIONS.index("grey"), NONE)[:, None, None].repeat(2, axis=2)
    found = np.zeros((len(sigmas), NUMBERS), dtype=np.float32)
    colours = (drawn[name] for name in order if name in ("jitter", "grey"))
    steps = np.concatenate([np.empty((len(found), 0, 2)), *colours], axis=1)  # (N, up to S, 2)
    used = steps[:, :, 0] != NONE
    own_first = np.argsort(~used, axis=1, kind="stable")
    found[:, : 2 * steps.shape[1]] = np.take_along_axis(steps, own_first[:, :, None], axis=1).reshape(len(found), -1)
    found[:, COUNT] = used.sum(1)
    contrast = found[:, : 2 * STEPS : 2] == OPERATIONS.index("contrast")
    found[:, AT_CONTRAST] = np.where(contrast.any(1), contrast.argmax(1), NONE)
    found[:, FLIP] = flips != 0
    for image in np.flatnonzero(sigmas):
        weights = box_weights(sigmas[image])
        found[image, BOXES : BOXES + len(weights)] = weights
    lists = [np.flatnonzero(chosen) for chosen in (contrast.any(1), sigmas == 0, sigmas)]
    for place, numbers in enumerate(lists, CONTRASTED):
        found[: len(numbers), place] = numbers
    return found, (len(lists[0]), len(lists[1]), len(lists[2]))


@torch.no_grad()
def by_launches(images: Tensor, table: Tensor, order: Sequence[str]) -> Tensor:
    """``by_torch.finish`` by the programs. Nothing waits for the device. A product of C, h and w stays below 2^31."""
    from moco.data.augment import triton_kernels as code  # ImportError without triton

    numbers, (contrasted, sharp, blurred) = plan_views(table, order)
    with torch.cuda.device_of(images):
        images, tables = images.contiguous(), hue_tables(images.device)
        _, channels, height, width = images.shape
        pixels = height * width
        on_device = torch.from_numpy(numbers).to(images.device, non_blocking=True)
        blocks = -(-pixels // PIXELS)
        partial = images.new_empty(len(images), blocks, dtype=torch.int32)
        out = torch.empty_like(images)
        turned = images.new_empty(blurred, channels, width, height)
        known = program_constants(channels == 3)
        fused.run_program(
            code.luminances, (contrasted, blocks), images, on_device, partial, pixels, *tables, **known["luminances"]
        )
        fused.run_program(
            code.points, (sharp, blocks), images, on_device, partial, out, pixels, width, blocks, *tables,
            **known["points"],
        )  # fmt: skip
        for first, source, to, rows, columns in (
            (True, images, turned, height, width),
            (False, turned, out, width, height),
        ):
            fused.run_program(
                code.blur, (blurred, -(-columns // SEGMENT), -(-rows // BLUR_ROWS)), source, on_device, partial, to,
                rows, columns, blocks, *tables, FIRST=first, **known["blur"],
            )  # fmt: skip
    return out


@functools.cache
def agrees(device: torch.device, shape: tuple[int, ...]) -> bool:
    """Whether ``by_launches`` runs on a device and gives PIL's numbers for noise of shape (C, h, w); warns if not."""
    order = ("jitter", "grey", "blur", "flip")
    noise = torch.randint(256, (4, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    jitter = [(name, 0.1 if name == "hue" else 0.7) for name in JITTER]
    choices = ((False, None, True), (True, None, False), (False, 2.0, True), (True, 0.5, False))
    packed = [pack_params(jitter[step:] + jitter[:step], *chosen) for step, chosen in enumerate(choices)]
    table = torch.stack(packed)

    def compare() -> str:
        found = by_launches(noise.to(device), table, order).cpu()
        return "" if torch.equal(found, by_torch.finish(noise, table, order)) else "its pixels are not PIL's"

    return fused.agrees(compare, f"views are finished on {device} by torch's operators")


def finish(views: Tensor, table: Tensor, order: Sequence[str]) -> Tensor:
    """``by_torch.finish``, on a CUDA device by the programs where they can; the numbers are the same by either way."""
    known = views.shape[1] in (1, 3)
    if known and views.is_cuda and suits(table, order) and agrees(views.device, tuple(views.shape[1:])):
        return by_launches(views, table, order)
    return by_torch.finish(views, table, order)
