"""The contrastive head on a GPU: two matrix products of the library and three Triton launches (programs.py).

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn
of spec.py), T temperature.

A step, forward and backward, is at most six launches, nine with bf16 operands, none of which the host waits for:

1. similarities (N, K) = q queue^T                                       library product; bf16: two roundings first
2. ``select``: the hardest set, exact                                    only with synthetic negatives
3. ``head``: all synthetic logits, softmax, statistics; probabilities replace the similarities, in bf16 beside them
4. ``average``: three means
5. dloss/dq = probabilities queue + a vector a query                     library product, only with a gradient;
                                                                         bf16: an addition after it
6. backward: the gradient times the incoming scalar

Importing this file does not import triton; the first call does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from types import ModuleType

import torch
from torch import Tensor

from .products import add_product_, product
from .spec import Draws, Head

# Chosen so that no target and no width spills a register (benchmarks/kernel_resources.py); not yet timed on a GPU.
BLOCK_K = 2048  # queue rows at a time in ``head``
SELECT_K = 1024  # and in ``select``
TILE = 2048  # elements of the block of draws, C rounded up times BLOCK_S
BLOCK_N = 256
WARPS = 8


@functools.cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def programs() -> ModuleType:
    """The compiled part. Raises ImportError without triton."""
    from . import programs

    return programs


def interpreted() -> bool:
    """Whether triton runs programs on the CPU: TRITON_INTERPRET=1 was set when it was first imported."""
    from triton.runtime.jit import JITFunction

    return not isinstance(programs().head, JITFunction)


def blocks(width: int) -> dict[str, int]:
    """Block sizes of ``head`` for features of this width C."""
    padded = max(16, 1 << (width - 1).bit_length())
    return {"BLOCK_K": BLOCK_K, "BLOCK_S": max(1, TILE // padded), "BLOCK_C": padded}


def _launch(program, size: int, *arguments, **constants) -> None:
    """Every launch passes here, ``size`` programs of WARPS warps."""
    program[(size,)](*arguments, **constants, num_warps=WARPS)


def _by_rows(t: Tensor) -> Tensor:
    """t (N, M) with its elements of a row adjacent; a copy only where they are not."""
    return t if t.stride(1) == 1 or t.shape[1] < 2 else t.contiguous()


def _no_draws(q: Tensor) -> Draws:
    weights, slots = q.new_empty(len(q), 0), q.new_empty(len(q), 0, dtype=torch.int64)
    noise = q.new_empty(len(q), 0, q.shape[1])
    return Draws(slots, slots, weights, weights, weights, weights, weights, weights, noise)


def compute(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient):
    """``reference.contrastive_head`` on a GPU, in float32: (Head, dloss/dq (N, C) or None).

    Same arguments, same numbers up to rounding, and the precision of the products' operands. Without a gradient to
    form the probabilities are not written.
    """
    with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
        return _step(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient)


def _step(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient):
    n, width = q.shape
    total = len(queue)
    measured = queue.dtype != torch.float32  # rows rounded to half precision are not unit: their length is read
    queue = queue.to(torch.float32).contiguous()
    q, k = _by_rows(q), _by_rows(k)
    d = _no_draws(q) if draws is None else draws
    slots_a, slots_b = _by_rows(d.slots_a), _by_rows(d.slots_b)
    weights = [t.contiguous() for t in (d.query_x, d.query_y, d.pair_y, d.pair_z, d.sign_v, d.noise_w, d.noise)]
    hard = 0 if draws is None else n_hard
    operand = queue.bfloat16() if precision == "bf16" else queue  # (K, C), rounded once for both products
    similarities = product(q.to(operand.dtype), operand.T, precision)  # (N, K)
    probabilities = torch.empty_like(similarities, dtype=operand.dtype) if precision == "bf16" else similarities
    rows, values = q.new_empty(n, hard, dtype=torch.int32), q.new_empty(n, hard)
    masks, masked = (None, None), ids is not None
    if masked:
        masks = ids.contiguous(), queue_ids.contiguous()
    if hard:
        _launch(programs().select, n, similarities, *masks, rows, values, total, hard, MASKED=masked, BLOCK_K=SELECT_K)

    loss, largest, share = q.new_empty(3, n).unbind()
    rank = q.new_empty(n, dtype=torch.int64)
    vector = torch.empty_like(q, memory_format=torch.contiguous_format) if want_gradient else None
    _launch(
        programs().head, n, similarities, probabilities, q, q.stride(0), k, k.stride(0), queue, *masks, rows, values,
        slots_a, slots_a.stride(0), slots_b, slots_b.stride(0), *weights, vector, loss, rank, largest, share,
        total, width, hard, *d.counts, 0 if measured else d.counts[0], 1 / temperature, 1 / (temperature * n),
        MASKED=masked, GRADIENT=want_gradient, **blocks(width),
    )  # fmt: skip
    means = [q.new_empty(()) for _ in range(3)]
    _launch(programs().average, 1, loss, largest, share, *means, n, BLOCK_N=BLOCK_N)
    if vector is not None:
        add_product_(vector, probabilities, operand, precision)
    return Head(means[0], rank, means[1], means[2]), vector
