"""The Triton programs that finish views after a crop. by_triton.py launches them and needs no triton to be imported.

Legend: N images, C channels (1 or 3), h x w pixels, B pixels or rows at a time, P numbers an image (``plan_views``).

The operations are PIL's, number by number, as moco/data/augment/by_torch.py has them; values are whole, 0..255, in
float32 until they are filtered. A product and the sum after it are rounded each: who launches forbids the compiler to
fuse them.
"""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from moco.data.augment import by_triton

BRIGHTNESS = tl.constexpr(by_triton.OPERATIONS.index("brightness"))
CONTRAST = tl.constexpr(by_triton.OPERATIONS.index("contrast"))
SATURATION = tl.constexpr(by_triton.OPERATIONS.index("saturation"))
HUE = tl.constexpr(by_triton.OPERATIONS.index("hue"))
P = tl.constexpr(by_triton.NUMBERS)
COUNT = tl.constexpr(by_triton.COUNT)
AT_CONTRAST = tl.constexpr(by_triton.AT_CONTRAST)
FLIP = tl.constexpr(by_triton.FLIP)
BOXES = tl.constexpr(by_triton.BOXES)
MARGIN = tl.constexpr(3 * by_triton.REACH)
SIXTEEN_BITS = tl.constexpr(2.0**-16)
SCALE = tl.constexpr(255 * 85)  # of a saturation and of a weight


@triton.jit
def _row(plan, slot, LIST: tl.constexpr):
    """(number of the image in ``slot`` of a list, where its parameters begin)."""
    i = tl.load(plan + slot * P + LIST).to(tl.int64)
    return i, plan + i * P


@triton.jit
def _planes(image, places, plane, mask, COLOUR: tl.constexpr):
    """Three (B,) float32 of bytes; a grey image is one whose channels are equal, which every operation keeps."""
    r = tl.load(image + places, mask=mask, other=0).to(tl.float32)
    g, b = r, r
    if COLOUR:
        g = tl.load(image + plane + places, mask=mask, other=0).to(tl.float32)
        b = tl.load(image + 2 * plane + places, mask=mask, other=0).to(tl.float32)
    return r, g, b


@triton.jit
def _luminance(r, g, b):
    """ITU-R 601-2 in 16-bit fixed point; every sum is below 2^24, hence exact."""
    return tl.floor((r * 19595.0 + g * 38470.0 + b * 7471.0 + 32768.0) * SIXTEEN_BITS)


@triton.jit
def _blend(v, towards, factor):
    return tl.floor(tl.minimum(tl.maximum((v - towards) * factor + towards, 0.0), 255.0))


@triton.jit
def _turned_channel(value, below, weights, hue):
    """value - value saturation weight / 21,675, rounded to the nearest whole number; no tie occurs."""
    return ((value * SCALE - tl.load(weights + hue).to(tl.int32) * below + SCALE // 2) // SCALE).to(tl.float32)


@triton.jit
def _hue(r, g, b, turn, hues, saturations, weights):
    """A turn by way of 8-bit HSV, with the tables of moco/data/augment/by_torch.py."""
    r, g, b = r.to(tl.int32), g.to(tl.int32), b.to(tl.int32)
    largest = tl.maximum(tl.maximum(r, g), b)
    smallest = tl.minimum(tl.minimum(r, g), b)
    middle = r ^ g ^ b ^ largest ^ smallest
    chroma = largest - smallest
    # A tie goes to the earlier channel, as in PIL. 0..5, by (largest, smallest): rg, rb, gr, gb, br, bg.
    of_others = tl.where(g == largest, 2, 4) + (r != smallest).to(tl.int32)
    which = tl.where(r == largest, (g != smallest).to(tl.int32), of_others)
    turned = (tl.load(hues + (which * 256 + chroma) * 256 + largest - middle).to(tl.int32) + turn) & 255
    below = tl.load(saturations + largest * 256 + chroma).to(tl.int32) * largest
    return (
        _turned_channel(largest, below, weights, turned),
        _turned_channel(largest, below, weights + 256, turned),
        _turned_channel(largest, below, weights + 512, turned),
    )


@triton.jit
def _changed(r, g, b, steps, stop, mean, hues, saturations, weights):
    """Pixels after an image's first ``stop`` steps, each a number and a factor; mean: what contrast goes towards."""
    for step in range(0, stop):
        operation = tl.load(steps + 2 * step)
        factor = tl.load(steps + 2 * step + 1)
        if operation == BRIGHTNESS:
            r, g, b = _blend(r, 0.0, factor), _blend(g, 0.0, factor), _blend(b, 0.0, factor)
        elif operation == CONTRAST:
            r, g, b = _blend(r, mean, factor), _blend(g, mean, factor), _blend(b, mean, factor)
        elif operation == SATURATION:
            grey = _luminance(r, g, b)
            r, g, b = _blend(r, grey, factor), _blend(g, grey, factor), _blend(b, grey, factor)
        elif operation == HUE:
            r, g, b = _hue(r, g, b, factor.to(tl.int32), hues, saturations, weights)
        else:
            r = _luminance(r, g, b)
            g, b = r, r
    return r, g, b


@triton.jit
def luminances(
    images, plan, partial, pixels, hues, saturations, weights,
    COLOUR: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partial (N, blocks) int32: a block's sum of the luminance that an image's contrast sees. A program a block."""
    i, row = _row(plan, tl.program_id(0), LIST)
    block = tl.program_id(1)
    places = block * BLOCK + tl.arange(0, BLOCK)
    mask = places < pixels
    r, g, b = _planes(images + i * pixels * (3 if COLOUR else 1), places, pixels, mask, COLOUR)
    r, g, b = _changed(r, g, b, row, tl.load(row + AT_CONTRAST).to(tl.int32), 0.0, hues, saturations, weights)
    found = tl.where(mask, _luminance(r, g, b).to(tl.int32), 0)
    tl.store(partial + i * tl.num_programs(1) + block, tl.sum(found, 0))


@triton.jit
def _mean(row, partial, i, blocks, pixels):
    """Mean luminance before an image's contrast, rounded half up; 0 for one that has none, whose sums nobody wrote."""
    lanes = tl.arange(0, 128)
    total = tl.zeros((128,), tl.int64)
    for start in range(0, tl.where(tl.load(row + AT_CONTRAST) < 0, 0, blocks), 128):
        total += tl.load(partial + i * blocks + start + lanes, mask=start + lanes < blocks, other=0).to(tl.int64)
    return ((2 * tl.sum(total, 0) + pixels) // (2 * pixels)).to(tl.float32)


@triton.jit
def points(
    images, plan, partial, out, pixels, width, blocks, hues, saturations, weights,
    COLOUR: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out (N, C, h, w) uint8 of images without a blur: all their operations, one read, one write. A program a block."""
    i, row = _row(plan, tl.program_id(0), LIST)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = places < pixels
    base = i * pixels * (3 if COLOUR else 1)
    r, g, b = _planes(images + base, places, pixels, mask, COLOUR)
    mean = _mean(row, partial, i, blocks, pixels)
    r, g, b = _changed(r, g, b, row, tl.load(row + COUNT).to(tl.int32), mean, hues, saturations, weights)
    if tl.load(row + FLIP) != 0:
        x = places % width
        places += width - 1 - 2 * x
    tl.store(out + base + places, r.to(tl.uint8), mask=mask)
    if COLOUR:
        tl.store(out + base + pixels + places, g.to(tl.uint8), mask=mask)
        tl.store(out + base + 2 * pixels + places, b.to(tl.uint8), mask=mask)


@triton.jit
def _box(window, newest, centre, near, far):
    """(B,) uint32, PIL's box filter of five values: four in the bytes of ``window``, oldest on top, and ``newest``."""
    total = centre * ((window >> 8) & 255) + near * (((window >> 16) & 255) + (window & 255))
    return (total + far * ((window >> 24) + newest) + (1 << 23)) >> 24


@triton.jit
def _pushed(window, newest, place):
    """A window with the value of ``place`` added; what lies before place 0 repeats its value."""
    return tl.where(place <= 0, newest * 0x01010101, (window << 8) | newest)


@triton.jit
def _filtered(first, second, third, newest, place, end, centre, near, far):
    """Three boxes in a row: their windows with the value of ``place`` added, and the result for ``place`` - 6.

    Each box repeats what the one before gave at the edges: place 0, and the last place before ``end``.
    """
    once = tl.where(place - 2 >= end, second & 255, _box(first, newest, centre, near, far))
    twice = tl.where(place - 4 >= end, third & 255, _box(second, once, centre, near, far))
    thrice = _box(third, twice, centre, near, far)
    return (first << 8) | newest, _pushed(second, once, place - 2), _pushed(third, twice, place - 4), thrice


@triton.jit
def blur(
    source, plan, partial, out, height, width, blocks, hues, saturations, weights,
    FIRST: tl.constexpr, COLOUR: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, SEGMENT: tl.constexpr,
):  # fmt: skip
    """Three boxes along the rows of images, written with rows and columns exchanged; twice is both ways.

    FIRST reads image i of N, makes its other operations on the way, and writes (C, w, h) to its slot of the list; the
    other launch reads that and writes (C, h, w) of image i, flipped. A program walks SEGMENT columns of BLOCK rows, and
    six more on each side, with its last values in registers.
    """
    slot = tl.program_id(0).to(tl.int64)
    i, row = _row(plan, slot, LIST)
    start = tl.program_id(1) * SEGMENT
    lane = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    mask = lane < height
    pixels = height * width
    channels = 3 if COLOUR else 1
    image = source + (i if FIRST else slot) * pixels * channels
    target = out + (slot if FIRST else i) * pixels * channels
    centre = tl.load(row + BOXES).to(tl.uint32)
    near = tl.load(row + BOXES + 1).to(tl.uint32)
    far = tl.load(row + BOXES + 2).to(tl.uint32)
    count = tl.load(row + COUNT).to(tl.int32)
    mean = _mean(row, partial, i, blocks, pixels) if FIRST else 0.0
    kept = lane
    if not FIRST:
        kept = tl.where(tl.load(row + FLIP) != 0, height - 1 - lane, lane)

    r1 = tl.zeros((BLOCK,), tl.uint32)
    r2, r3, g1, g2, g3, b1, b2, b3 = r1, r1, r1, r1, r1, r1, r1, r1
    stop = tl.minimum(start + SEGMENT, width)
    for x in range(start - MARGIN, stop + MARGIN):
        here = tl.minimum(tl.maximum(x, 0), width - 1)
        r, g, b = _planes(image, lane * width + here, pixels, mask, COLOUR)
        if FIRST:
            r, g, b = _changed(r, g, b, row, count, mean, hues, saturations, weights)
        to = target + (x - MARGIN) * height + kept
        ours = mask & (x - MARGIN >= start)
        r1, r2, r3, found = _filtered(r1, r2, r3, r.to(tl.uint32), x, width, centre, near, far)
        tl.store(to, found.to(tl.uint8), mask=ours)
        if COLOUR:
            g1, g2, g3, found = _filtered(g1, g2, g3, g.to(tl.uint32), x, width, centre, near, far)
            tl.store(to + pixels, found.to(tl.uint8), mask=ours)
            b1, b2, b3, found = _filtered(b1, b2, b3, b.to(tl.uint32), x, width, centre, near, far)
            tl.store(to + 2 * pixels, found.to(tl.uint8), mask=ours)
