"""The Triton programs of BatchNorm over parts. norm.py launches them and needs no triton to be imported.

Legend: S parts, C channels, B pixels and D channels at a time, P splits of a part. A part is ``pieces`` times
(pixels, C); a unit is B pixels of one piece; a split is ``each`` units in a row. LAST: the channels of a pixel are
adjacent, else the pixels of a channel. Sums of a split are (2, S, P, C) float32.
"""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from moco.kernels import norm

ROWS = tl.constexpr(norm.MOST)  # splits of several parts at a time

# Neither 1 nor a multiple of 16 is worth a program of its own: ALIGN says what memory needs to know.
SIZES = ["pieces", "pixels", "channels", "parts", "each", "splits", "groups"]


@triton.jit
def _place(number, parts, splits, groups):
    """(part, split, block of channels) of a program; neighbours share rows of memory."""
    rest = number // groups
    return rest // splits, rest % splits, number % groups


@triton.jit
def _multiple(n, ALIGN: tl.constexpr):
    """n, of which the compiler then knows that ALIGN divides it: triton asks for 16 or knows nothing."""
    return (n // ALIGN) * ALIGN


@triton.jit
def _tile(part, unit, group, pieces, pixels, channels, LAST: tl.constexpr, ALIGN: tl.constexpr,
          BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """(where a unit begins, (B, D) offsets from there, (B, 1) its pixels that exist, (1, D) its channels)."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    piece = part.to(tl.int64) * pieces + unit // blocks
    first = (unit % blocks) * BLOCK_P
    p = tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    if LAST:
        width = _multiple(channels, ALIGN)
        start = (piece * pixels + first) * width + group * BLOCK_C
        offsets = p * width + c
    else:
        width = _multiple(pixels, ALIGN)
        start = (piece * channels + group * BLOCK_C) * width + first
        offsets = c * width + p
    return start, offsets, first + p < (pixels if LAST else width), group * BLOCK_C + c < (width if LAST else channels)


@triton.jit
def _before(unit, pixels, BLOCK_P: tl.constexpr):
    """How many elements of a channel the units before this one have, float32."""
    blocks = tl.cdiv(pixels, BLOCK_P)
    return ((unit // blocks) * pixels + tl.minimum((unit % blocks) * BLOCK_P, pixels)).to(tl.float32)


@triton.jit
def _total(partials, which, part, parts, splits, channels, c, real, PARTS: tl.constexpr, BLOCK_S: tl.constexpr):
    """(PARTS, BLOCK_S, D) sums of the splits of the parts from ``part`` on, 0 for what does not exist."""
    p = part + tl.arange(0, PARTS)[:, None, None]
    s = tl.arange(0, BLOCK_S)[None, :, None]
    rows = (which * parts + p).to(tl.int64) * splits + s
    mask = (p < parts) & (s < splits) & real[None, :, :]
    return tl.load(partials + rows * channels + c[None, :, :], mask=mask, other=0.0)


@triton.jit
def _merged(partials, part, count, pieces, pixels, channels, parts, each, splits, c, real,
            PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """(PARTS, D) means and sums of squared deviations of parts, from those of their splits (Chan's formula)."""
    means = _total(partials, 0, part, parts, splits, channels, c, real, PARTS, BLOCK_S)
    squares = _total(partials, 1, part, parts, splits, channels, c, real, PARTS, BLOCK_S)
    s = tl.arange(0, BLOCK_S)
    units = pieces * tl.cdiv(pixels, BLOCK_P)
    n = _before(tl.minimum((s + 1) * each, units), pixels, BLOCK_P)
    n = (n - _before(tl.minimum(s * each, units), pixels, BLOCK_P))[None, :, None]
    first = tl.sum(tl.where(s[None, :, None] == 0, means, 0.0), 1)
    apart = means - tl.expand_dims(first, 1)  # differences are small where values need not be
    shift = tl.sum(n * apart, 1) / count
    apart -= tl.expand_dims(shift, 1)
    return first + shift, tl.sum(squares + n * apart * apart, 1)


@triton.jit(do_not_specialize=SIZES)
def statistics(
    x, partials, pieces, pixels, channels, parts, each, splits, groups,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials (2, S, P, C): mean and sum of squared deviations of each split. A program a split and D channels.

    A lane sums deviations from the first value that it met, so that its squares are exact up to as many roundings as
    it has summands, however far the mean is from 0.
    """
    part, split, group = _place(tl.program_id(0), parts, splits, groups)
    start = split * each
    stop = tl.minimum(start + each, pieces * tl.cdiv(pixels, BLOCK_P))
    at, offsets, rows, real = _tile(part, start, group, pieces, pixels, channels, LAST, ALIGN, BLOCK_P, BLOCK_C)
    step = 1 if LAST else pixels
    any_value = tl.load(x + at + tl.arange(0, BLOCK_C)[None, :] * step, mask=real, other=0.0).to(tl.float32)
    own = tl.load(x + at + offsets, mask=rows & real, other=0.0).to(tl.float32)
    shift = tl.where(rows, own, any_value)
    n = rows.to(tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for unit in range(start + 1, stop):
        at, offsets, rows, real = _tile(part, unit, group, pieces, pixels, channels, LAST, ALIGN, BLOCK_P, BLOCK_C)
        value = tl.load(x + at + offsets, mask=rows & real, other=0.0).to(tl.float32)
        apart = tl.where(rows, value - shift, 0.0)
        sums += apart
        squares += apart * apart
        n += rows.to(tl.float32)
    inverse = 1.0 / tl.maximum(n, 1.0)
    count = tl.sum(n, 0)
    apart = shift - any_value + sums * inverse  # of a lane's mean
    mean = tl.sum(n * apart, 0) / count
    apart -= mean[None, :]
    deviations = tl.sum(tl.maximum(squares - sums * sums * inverse, 0.0) + n * apart * apart, 0)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)
    place = partials + (part.to(tl.int64) * splits + split) * channels + c
    tl.store(place, tl.sum(any_value, 0) + mean, mask=c < channels)
    tl.store(place + parts.to(tl.int64) * splits * channels, deviations, mask=c < channels)


@triton.jit
def _lerp(old, new, weight):
    """torch's: exact at both ends."""
    return tl.where(weight < 0.5, old + weight * (new - old), new - (new - old) * (1.0 - weight))


@triton.jit
def _move(partials, running_mean, running_variance, tracked, group, count, pieces, pixels, channels, parts, each,
          splits, momentum, c, real, PARTS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
          BLOCK_S: tl.constexpr):  # fmt: skip
    """Running statistics go towards the average over the parts, the variance unbiased."""
    means = tl.zeros((BLOCK_C,), tl.float32)
    variances = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, parts, PARTS):
        mean, squares = _merged(partials, part, count, pieces, pixels, channels, parts, each, splits, c, real,
                                PARTS, BLOCK_P, BLOCK_S)  # fmt: skip
        means += tl.sum(mean, 0)
        variances += tl.sum(squares, 0)
    places = group * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = places < channels
    mean = tl.load(running_mean + places, mask=mask)
    variance = tl.load(running_variance + places, mask=mask)
    tl.store(running_mean + places, _lerp(mean, means / parts, momentum), mask=mask)
    tl.store(running_variance + places, _lerp(variance, variances / (count - 1.0) / parts, momentum), mask=mask)
    if group == 0:
        tl.store(tracked, tl.load(tracked) + 1)


@triton.jit(do_not_specialize=SIZES)
def normalise(
    x, y, partials, weight, bias, kept, running_mean, running_variance, tracked, pieces, pixels, channels, parts, each,
    splits, groups, momentum, eps,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y = (x - mean) / sqrt(variance + eps) weight + bias; kept (2, S, C): means and 1 / deviations.

    The first program of each D channels moves the running statistics instead, while others normalise.
    """
    group = tl.program_id(0) % groups
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    count = pieces.to(tl.float32) * pixels
    if tl.program_id(0) < groups:
        _move(partials, running_mean, running_variance, tracked, group, count, pieces, pixels, channels, parts, each,
              splits, momentum, c, real, ROWS // BLOCK_S, BLOCK_P, BLOCK_C, BLOCK_S)  # fmt: skip
    else:
        part, split, group = _place(tl.program_id(0) - groups, parts, splits, groups)
        mean, squares = _merged(partials, part, count, pieces, pixels, channels, parts, each, splits, c, real,
                                1, BLOCK_P, BLOCK_S)  # fmt: skip
        inverse = tl.div_rn(1.0, tl.sqrt_rn(squares / count + eps))
        if split == 0:
            tl.store(kept + part * channels + c, mean, mask=real)
            tl.store(kept + (parts + part) * channels + c, inverse, mask=real)
        scale = inverse * tl.load(weight + c, mask=real, other=0.0)
        shift = tl.load(bias + c, mask=real, other=0.0)
        start = split * each
        for unit in range(start, tl.minimum(start + each, pieces * tl.cdiv(pixels, BLOCK_P))):
            at, offsets, rows, here = _tile(part, unit, group, pieces, pixels, channels, LAST, ALIGN, BLOCK_P, BLOCK_C)
            value = tl.load(x + at + offsets, mask=rows & here, other=0.0).to(tl.float32)
            tl.store(y + at + offsets, ((value - mean) * scale + shift).to(y.dtype.element_ty), mask=rows & here)


@triton.jit(do_not_specialize=SIZES)
def gradients(
    x, dy, kept, partials, pieces, pixels, channels, parts, each, splits, groups,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partials (2, S, P, C): sums of the gradient, and of it times x normalised. A program a split and D channels."""
    part, split, group = _place(tl.program_id(0), parts, splits, groups)
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean = tl.load(kept + part * channels + c, mask=c < channels, other=0.0)
    start = split * each
    sums = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for unit in range(start, tl.minimum(start + each, pieces * tl.cdiv(pixels, BLOCK_P))):
        at, offsets, rows, real = _tile(part, unit, group, pieces, pixels, channels, LAST, ALIGN, BLOCK_P, BLOCK_C)
        value = tl.load(x + at + offsets, mask=rows & real, other=0.0).to(tl.float32)
        towards = tl.load(dy + at + offsets, mask=rows & real, other=0.0).to(tl.float32)
        sums += towards
        products += towards * (value - mean)
    inverse = tl.load(kept + (parts + part) * channels + c, mask=c < channels, other=0.0)
    place = partials + (part.to(tl.int64) * splits + split) * channels + c
    tl.store(place, tl.sum(sums, 0)[None, :], mask=c < channels)
    tl.store(place + parts.to(tl.int64) * splits * channels, tl.sum(products, 0)[None, :] * inverse, mask=c < channels)


@triton.jit
def _of_parameters(partials, of_weight, of_bias, group, channels, parts, splits, c, real, PARTS: tl.constexpr,
                   BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    biases = tl.zeros((BLOCK_C,), tl.float32)
    weights = tl.zeros((BLOCK_C,), tl.float32)
    for part in range(0, parts, PARTS):
        sums = _total(partials, 0, part, parts, splits, channels, c, real, PARTS, BLOCK_S)
        products = _total(partials, 1, part, parts, splits, channels, c, real, PARTS, BLOCK_S)
        biases += tl.sum(tl.sum(sums, 1), 0)
        weights += tl.sum(tl.sum(products, 1), 0)
    places = group * BLOCK_C + tl.arange(0, BLOCK_C)
    tl.store(of_bias + places, biases, mask=places < channels)
    tl.store(of_weight + places, weights, mask=places < channels)


@triton.jit(do_not_specialize=SIZES)
def spread(
    x, dy, dx, partials, weight, kept, of_weight, of_bias, pieces, pixels, channels, parts, each, splits, groups,
    LAST: tl.constexpr, ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dx = weight / deviation (g - mean g - x^ mean(g x^)) with x^ normalised; of_weight, of_bias (C,): sums of both.

    The first program of each D channels writes the latter instead.
    """
    group = tl.program_id(0) % groups
    c = group * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    real = c < channels
    if tl.program_id(0) < groups:
        _of_parameters(partials, of_weight, of_bias, group, channels, parts, splits, c, real, ROWS // BLOCK_S, BLOCK_C,
                       BLOCK_S)  # fmt: skip
    else:
        part, split, group = _place(tl.program_id(0) - groups, parts, splits, groups)
        count = pieces.to(tl.float32) * pixels
        share = tl.sum(_total(partials, 0, part, parts, splits, channels, c, real, 1, BLOCK_S), 1) / count
        along = tl.sum(_total(partials, 1, part, parts, splits, channels, c, real, 1, BLOCK_S), 1) / count
        mean = tl.load(kept + part * channels + c, mask=real, other=0.0)
        inverse = tl.load(kept + (parts + part) * channels + c, mask=real, other=0.0)
        scale = inverse * tl.load(weight + c, mask=real, other=0.0)
        along *= inverse
        start = split * each
        for unit in range(start, tl.minimum(start + each, pieces * tl.cdiv(pixels, BLOCK_P))):
            at, offsets, rows, here = _tile(part, unit, group, pieces, pixels, channels, LAST, ALIGN, BLOCK_P, BLOCK_C)
            value = tl.load(x + at + offsets, mask=rows & here, other=0.0).to(tl.float32)
            towards = tl.load(dy + at + offsets, mask=rows & here, other=0.0).to(tl.float32)
            found = (towards - share - (value - mean) * along) * scale
            tl.store(dx + at + offsets, found.to(dx.dtype.element_ty), mask=rows & here)
