"""The Triton program that normalises images. images.py launches it and needs no triton to be imported."""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from moco.kernels import images as launcher

HIGH = tl.constexpr(launcher.HIGH)
LOW = tl.constexpr(launcher.LOW)


@triton.jit
def _of_channel(numbers, channel, CHANNELS: tl.constexpr):
    """The number of each value's channel: a choice among few in registers, not a load a value."""
    found = tl.load(numbers) + tl.zeros(channel.shape, tl.float32)
    for c in tl.static_range(1, CHANNELS):
        found = tl.where(channel == c, tl.load(numbers + c), found)
    return found


@triton.jit(do_not_specialize=["pixels"])
def to_floats(
    source, y, mean, std, pixels, LAST: tl.constexpr, ALIGN: tl.constexpr, CHANNELS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = (source / 255 - mean) / std, source (N, C, h, w) bytes. A program BLOCK values of an image in channels_last
    memory, else of one of its channels, each rounded as the definition rounds."""
    length = pixels * CHANNELS if LAST else pixels
    length = (length // ALIGN) * ALIGN  # the compiler then knows that ALIGN divides it
    blocks = tl.cdiv(length, BLOCK)
    unit = tl.program_id(0) // blocks
    places = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = places < length
    start = unit.to(tl.int64) * length
    if LAST:  # values are written in order and their bytes gathered, which lie in CHANNELS lines
        channel = places % CHANNELS
        x = tl.load(source + start + channel * pixels + places // CHANNELS, mask=mask, other=0)
        centre = _of_channel(mean, channel, CHANNELS)
        spread = _of_channel(std, channel, CHANNELS)
    else:
        x = tl.load(source + start + places, mask=mask, other=0)
        centre = tl.load(mean + unit % CHANNELS)
        spread = tl.load(std + unit % CHANNELS)
    x = x.to(tl.float32)
    value = tl.div_rn(x * HIGH + x * LOW - centre, spread + tl.zeros((BLOCK,), tl.float32))
    tl.store(y + start + places, value.to(y.dtype.element_ty), mask=mask)
