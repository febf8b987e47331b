"""BatchNorm over parts of a batch on a GPU: two Triton launches forward and two backward, however many parts.

Legend: N images, C channels, h x w pixels, S parts of N/S images. A split is what one program sums.

1. ``statistics``: mean and squared deviations of each split             reads x
2. ``normalise``: merges them, normalises, moves the running statistics  reads x, writes as much
3. ``gradients``: two sums of each split                                 reads x and the gradient
4. ``spread``: merges them; gradients of x, weight and bias              reads both, writes as much

Memory may be contiguous or channels_last. No atomics, and the splits do not depend on the device: the same bits every
time. The numbers are shown by triton's interpreter; its tests also pass on an H200.
Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.kernels import by_triton

# Chosen for what they use of a GPU (benchmarks/speed/kernel_resources.py); not yet timed there.
ENOUGH = 1024  # about as many as a launch has, where the batch is large enough: eight for each of an H100's SMs
TILE = 2048  # elements at a time, 8 a thread of 8 warps
CHANNELS = 32  # at a time in channels_last: 64 bytes in half precision
MOST = 64  # splits of a part and block of channels


class Plan(NamedTuple):
    """How (N, C, ...) is walked: a part as ``images`` pieces of (pixels, C), in blocks that ``splits`` programs share.

    In channels_last the images of a part follow one another without a gap and count as one.
    """

    images: int
    pixels: int
    channels: int
    parts: int
    units: int  # blocks that one program walks
    splits: int
    groups: int  # blocks of channels
    constants: dict[str, int]  # what programs know when they are compiled
    merged: int  # splits that are merged at a time

    @property
    def walk(self) -> tuple[int, ...]:
        """The arguments that all programs have in common."""
        return self[:7]

    @property
    def size(self) -> int:
        """Programs of a launch."""
        return self.groups * self.parts * self.splits

    def partial_sums(self, x: Tensor) -> Tensor:
        """(2, S, splits, C) float32 on the device of x, to be filled."""
        return x.new_empty(2, self.parts, self.splits, self.channels, dtype=torch.float32)


def is_last(x: Tensor) -> bool:
    """Whether x (N, C, ...) is walked with its channels adjacent."""
    if x.dim() == 4 and x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return True
    return x[0].numel() == x.shape[1] > 1  # one pixel


@functools.cache
def plan(shape: tuple[int, ...], last: bool, parts: int) -> Plan:
    """The :class:`Plan` of (N, C, ...) in this memory; parts: S, a divisor of N."""
    images, channels, pixels = shape[0] // parts, shape[1], math.prod(shape[2:])
    if last:
        images, pixels = 1, images * pixels
        block_c = min(CHANNELS, by_triton.power_of_two(channels))
        block_p = TILE // block_c
    else:  # the block of pixels that leaves the fewest lanes idle
        sizes = (256, 128, 64) if pixels > 64 else (by_triton.power_of_two(pixels),)
        block_p = min(sizes, key=lambda size: (-(-pixels // size) * size, -size))
        block_c = min(CHANNELS, TILE // block_p, by_triton.power_of_two(channels))
    groups, units = -(-channels // block_c), images * -(-pixels // block_p)
    each = -(-units // min(MOST, max(1, -(-ENOUGH // (groups * parts)))))
    splits = -(-units // each)
    align = math.gcd(channels if last else pixels, 16)
    constants = {"LAST": last, "ALIGN": align, "BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 8}
    merged = next(size for size in (4, 16, MOST) if splits <= size)
    return Plan(images, pixels, channels, parts, each, splits, groups, constants, merged)


def _walked(x: Tensor, like: Plan) -> Tensor:
    """x with its elements where the plan looks for them; a copy only where they are not."""
    last = like.constants["LAST"] and x.dim() == 4
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def forward(x, weight, bias, running, momentum: float, eps: float, how: Plan) -> tuple[Tensor, Tensor]:
    """(x normalised, the parts' means and 1 / deviations (2, S, C)); x lies as ``how`` says.

    running: mean, unbiased variance (C,) and how often they moved (); they move towards the parts' average.
    """
    partial = how.partial_sums(x)
    kept = x.new_empty(2, how.parts, how.channels, dtype=torch.float32)
    out, code = torch.empty_like(x), by_triton.programs("norm_triton")
    by_triton.run_program(code.statistics, (how.size,), x, partial, *how.walk, **how.constants)
    with_running = how.size + how.groups  # a few programs more for the running statistics
    by_triton.run_program(
        code.normalise, (with_running,), x, out, partial, weight, bias, kept, *running, *how.walk,
        momentum, eps, **how.constants, BLOCK_S=how.merged,
    )  # fmt: skip
    return out, kept


def backward(gradient, x, weight, kept, how: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias; ``gradient`` and x lie as ``how`` says."""
    partial = how.partial_sums(x)
    of_weight, of_bias = x.new_empty(2, how.channels, dtype=torch.float32).unbind()
    of_x, code = torch.empty_like(x), by_triton.programs("norm_triton")
    by_triton.run_program(code.gradients, (how.size,), x, gradient, kept, partial, *how.walk, **how.constants)
    by_triton.run_program(
        code.spread, (how.size + how.groups,), x, gradient, of_x, partial, weight, kept, of_weight, of_bias,
        *how.walk, **how.constants, BLOCK_S=how.merged,
    )  # fmt: skip
    return of_x, of_weight, of_bias


class _SplitBatchNorm(torch.autograd.Function):
    # Not an operator of torch.library: one that moves running statistics in place may have no gradient there, and its
    # wrapper costs the host 20 us a call where this costs 5. A compiler is given the one formula of
    # moco/models/batchnorm.py.
    @staticmethod
    def forward(ctx, x, weight, bias, running, parts, momentum, eps):
        how = plan(tuple(x.shape), is_last(x), parts)
        x = _walked(x, how)
        out, kept = forward(x, weight, bias, running, momentum, eps, how)
        ctx.save_for_backward(x, weight, kept)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, kept = ctx.saved_tensors
        with torch.cuda.device_of(x):
            return *backward(_walked(gradient, ctx.how), x, weight, kept, ctx.how), None, None, None, None


def split_batch_norm(
    x: Tensor, weight: Tensor, bias: Tensor, running: tuple[Tensor, Tensor, Tensor], parts: int, momentum: float,
    eps: float,
) -> Tensor:  # fmt: skip
    """BatchNorm of each of S equal parts of x (N, C, ...), in float32 whatever x is; x's dtype and memory.

    Args:
        weight, bias: (C,) float32.
        running: mean (C,) float32, unbiased variance (C,) float32 and count () int64, which move in place as if by
            ``lerp_(the mean over the parts, momentum)``. The host waits for nothing.
    """
    with torch.cuda.device_of(x):
        return _SplitBatchNorm.apply(x, weight, bias, running, parts, momentum, eps)


def suits(x: Tensor, weight: Tensor | None, parts: int) -> bool:
    """Whether the programs can normalise x (N, C, ...) here: a GPU, its first answers right, no float64."""
    known = x.dtype in by_triton.DTYPES and weight is not None and weight.dtype == torch.float32
    if not by_triton.on_gpu(x) or not known or not 0 < x.numel() // parts < 2**31:
        return False
    last = is_last(x)
    return agrees(x.device, x.dtype, tuple(x.shape[1:]), last, plan(tuple(x.shape), last, parts).merged)


@functools.cache
def agrees(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], last: bool, merged: int) -> bool:
    """Whether the programs run on a device and give torch's numbers for noise of shape (C, ...); warns if not."""
    compare = functools.partial(_difference, device, dtype, shape, last, merged)
    return by_triton.agrees(compare, f"BatchNorm in parts is computed on {device} part by part")


@torch.no_grad()
def _difference(device: torch.device, dtype: torch.dtype, shape: tuple[int, ...], last: bool, merged: int) -> str:
    """Which result is wrong for four images in two parts, or an empty string."""
    noise = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(4, *shape, generator=noise).add_(i).to(device, dtype) for i in (3, 0))
    weight, bias, mean, variance = torch.rand(4, shape[0], generator=noise).to(device).unbind()
    running = (mean.clone(), variance.clone(), torch.zeros((), dtype=torch.int64, device=device))
    how = plan(tuple(x.shape), last, 2)
    how = how._replace(merged=max(merged, how.merged))
    x, gradient = _walked(x, how), _walked(gradient, how)
    with torch.cuda.device_of(x):
        out, kept = forward(x, weight, bias, running, 0.25, 1e-5, how)
        found = [out, *running[:2], *backward(gradient, x, weight, kept, how)]
    wanted = _by_torch(*(t.double() for t in (x, gradient, weight, bias, mean, variance)))
    for name, a, b in zip(("output", "mean", "variance", "gradient", "weight's", "bias's"), found, wanted, strict=True):
        digits = 2 * torch.finfo(a.dtype).eps + 1e-5
        if not bool((a - b).abs().max() <= digits * b.abs().max()):
            return f"its {name} is not torch's"
    return "" if int(running[2]) == 1 else "its count is wrong"


@torch.enable_grad()
def _by_torch(x, gradient, weight, bias, mean, variance) -> tuple[Tensor, ...]:
    """What :func:`forward` and :func:`backward` should give in two parts, momentum 1/4."""
    running = torch.stack([mean, mean, variance, variance]).view(2, 2, -1)  # of each part
    given = [t.requires_grad_() for t in (x, weight, bias)]
    parts = zip(x.chunk(2), *running, strict=True)
    own = torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)  # not of a checkpoint around the caller
    with own:
        out = torch.cat([F.batch_norm(part, m, v, weight, bias, True, 0.25, 1e-5) for part, m, v in parts])
        return out.detach(), *running.mean(1), *torch.autograd.grad(out, given, gradient)
