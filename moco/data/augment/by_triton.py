"""Views finished on a GPU: jitter, grey, blur and flip of a whole batch in at most four Triton launches.

Legend: N images, C channels (1 or 3), h x w pixels, S steps an image at most, P numbers an image (``NUMBERS``).

1. ``luminances``: for images that draw contrast, sums of the luminance that it sees      reads the image
2. ``points``: images without a blur, every operation                                     reads it, writes it
3. ``blur``: the others, every operation and three boxes along the rows                   reads it, writes it turned
4. ``blur``: three boxes along what were columns, flip                                    reads it, writes it

The numbers are those of moco/data/augment/by_torch.py, by triton's interpreter; nothing here has run on a GPU yet.
Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from torch import Tensor

from moco.data.augment.by_pil import JITTER

OPERATIONS = (*JITTER, "grey")
STEPS = 5  # S
NONE = -1
REACH = 2  # pixels on each side of a box at most, which is enough for SIGMA
SIGMA = 2.4

# A row of the plan: S times (operation, factor), then these, then an image's number in each of three lists.
COUNT, AT_CONTRAST, FLIP, BOXES = 2 * STEPS, 2 * STEPS + 1, 2 * STEPS + 2, 2 * STEPS + 3
CONTRASTED, SHARP, BLURRED = range(BOXES + 1 + REACH, BOXES + 4 + REACH)
NUMBERS = BLURRED + 1

# Chosen for what they use of a GPU (benchmarks/speed/kernel_resources.py); not yet timed on one.
BLOCK = 1024  # pixels a program
ROWS = 64  # rows a program of ``blur``, a row a thread
SEGMENT = 64  # and columns


def options(constants: dict[str, int]) -> dict[str, int]:
    """How a program with these constants is compiled. PIL rounds a product before it adds: no fused multiply-add."""
    return {"num_warps": 2 if "SEGMENT" in constants else 4, "enable_fp_fusion": False}


def _launch(program, grid: tuple[int, ...], *arguments, **constants) -> None:
    """Every launch passes here."""
    if grid[0]:
        program[grid](*arguments, **constants, **options(constants))


def plan_views(steps: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> tuple[np.ndarray, tuple[int, int, int]]:
    """(N, P) float32, what the programs read, and how many images draw contrast, have no blur, have one.

    Arguments as of :func:`finish`.
    """
    images = len(steps)
    found = np.zeros((images, NUMBERS), dtype=np.float32)
    used = steps[:, :, 0] != NONE
    order = np.argsort(~used, axis=1, kind="stable")  # an image's own steps first
    found[:, : 2 * steps.shape[1]] = np.take_along_axis(steps, order[:, :, None], axis=1).reshape(images, -1)
    found[:, COUNT] = used.sum(1)
    contrast = found[:, : 2 * STEPS : 2] == OPERATIONS.index("contrast")
    found[:, AT_CONTRAST] = np.where(contrast.any(1), contrast.argmax(1), NONE)
    found[:, FLIP] = flips
    found[:, BOXES:CONTRASTED] = boxes
    lists = [np.flatnonzero(chosen) for chosen in (contrast.any(1), ~boxes.any(1), boxes.any(1))]
    for place, numbers in enumerate(lists, CONTRASTED):
        found[: len(numbers), place] = numbers
    return found, (len(lists[0]), len(lists[1]), len(lists[2]))


@torch.no_grad()
def finish(
    images: Tensor, steps: np.ndarray, boxes: np.ndarray, flips: np.ndarray, tables: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """(N, C, h, w) uint8: images (N, C, h, w) uint8 with their steps made, then blurred, then flipped.

    Nothing waits for the device. A product of C, h and w stays below 2^31.

    Args:
        steps: (N, up to S, 2) float32, numbers of ``OPERATIONS``, ``NONE`` for no step, each with its factor, the hue's
            in 255ths of a turn. At most one contrast an image.
        boxes: (N, 3) float32, the blur's weights in 2^-24, centre to edge (moco.data.augment.by_torch.box_weights);
        zeros: none. flips: (N,) bool. tables: PIL's conversions to HSV and back, of moco.data.augment.by_torch, on the
        images' device.
    """
    from moco.data.augment import triton_kernels as code  # ImportError without triton

    numbers, (contrasted, sharp, blurred) = plan_views(steps, boxes, flips)
    with torch.cuda.device(images.device) if images.is_cuda else contextlib.nullcontext():
        images = images.contiguous()
        _, channels, height, width = images.shape
        pixels, colour = height * width, channels == 3
        on_device = torch.from_numpy(numbers).to(images.device, non_blocking=True)
        blocks = -(-pixels // BLOCK)
        partial = images.new_empty(len(images), blocks, dtype=torch.int32)
        out = torch.empty_like(images)
        turned = images.new_empty(blurred, channels, width, height)
        whole = {"COLOUR": colour, "BLOCK": BLOCK}
        _launch(
            code.luminances, (contrasted, blocks), images, on_device, partial, pixels, *tables, LIST=CONTRASTED, **whole
        )
        _launch(
            code.points, (sharp, blocks), images, on_device, partial, out, pixels, width, blocks, *tables,
            LIST=SHARP, **whole,
        )  # fmt: skip
        for first, source, to, rows, columns in (
            (True, images, turned, height, width),
            (False, turned, out, width, height),
        ):
            _launch(
                code.blur, (blurred, -(-columns // SEGMENT), -(-rows // ROWS)), source, on_device, partial, to, rows,
                columns, blocks, *tables, FIRST=first, COLOUR=colour, LIST=BLURRED, BLOCK=ROWS, SEGMENT=SEGMENT,
            )  # fmt: skip
    return out
