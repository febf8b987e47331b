"""The Triton program that draws. draws.py launches it and needs no triton to be imported.

Legend: N queries, C feature width, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn of spec.py).
"""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

RIGHT = tl.constexpr(1.5707963267948966)  # angle


@triton.jit
def _slot(word, H):
    """(B,) int64 in [0, H)."""
    return ((word.to(tl.uint64) * H.to(tl.uint64)) >> 32).to(tl.int64)


@triton.jit
def _direction(word):
    """Cosine and sine of an angle that is uniform in [-pi / 4, 7 pi / 4), from their series in [-pi / 4, pi / 4).

    The compiler's own take any angle, and memory for what reduces a large one.
    """
    x = (((word >> 8) & 4194303).to(tl.float32) * 2.0**-22 - 0.5) * RIGHT
    t = x * x
    sine = x * (1 + t * (-1 / 6 + t * (1 / 120 + t * (-1 / 5040 + t / 362880))))
    cosine = 1 + t * (-1 / 2 + t * (1 / 24 + t * (-1 / 720 + t * (1 / 40320 - t / 3628800))))
    turns = word >> 30  # by right angles
    odd = (turns & 1) == 1
    first, second = tl.where(odd, sine, cosine), tl.where(odd, cosine, sine)
    return tl.where((turns == 1) | (turns == 2), -first, first), tl.where(turns >= 2, -second, second)


@triton.jit
def _normal(one, other):
    """Two numbers of N(0, 1) from two words, by Box and Muller."""
    radius = tl.sqrt(-2.0 * tl.log((one.to(tl.float32) + 1.0) * 2.0**-32))
    first, second = _direction(other)
    return radius * first, radius * second


@triton.jit
def _columns(whole, real, slots_a, slots_b, weights, key, query, part, N, S, Sq, Sp, H, BLOCK_S: tl.constexpr):
    """Slots and weights of BLOCK_S negatives of a query."""
    i = query.to(tl.int64)
    s = part * BLOCK_S + tl.arange(0, BLOCK_S)
    mask = s < S
    stream = tl.load(whole + s, mask=mask, other=0)
    inside = tl.load(whole + S + s, mask=mask, other=0)
    base = tl.load(whole + 2 * S + s, mask=mask, other=0).to(tl.int64)
    width = tl.load(whole + 3 * S + s, mask=mask, other=0).to(tl.int64)
    place = tl.load(whole + 4 * S + s, mask=mask, other=0)
    nothing = tl.zeros((BLOCK_S,), tl.int32)
    a, b, c, _ = tl.philox(key, inside, nothing + query, stream, nothing)
    tl.store(slots_a + i * S + s, _slot(a, H), mask=mask)
    tl.store(slots_b + i * Sp + s - Sq, _slot(b, H), mask=mask & (s >= Sq) & (s < Sq + Sp))
    low, span = tl.load(real + s, mask=mask, other=0.0), tl.load(real + S + s, mask=mask, other=0.0)
    drawn = low + span * ((c >> 8).to(tl.float32) * 2.0**-24)
    slope = tl.load(real + 2 * S + s, mask=mask, other=0.0)
    offset = tl.load(real + 3 * S + s, mask=mask, other=0.0)
    to = weights + base * N + i * width + place
    tl.store(to, slope * drawn + offset, mask=mask)
    twice = mask & (s < Sq + Sp)
    slope = tl.load(real + 4 * S + s, mask=twice, other=0.0)
    offset = tl.load(real + 5 * S + s, mask=twice, other=0.0)
    tl.store(to + width * N, slope * drawn + offset, mask=twice)


@triton.jit
def _noise(whole, noise, key, query, d, S, Sn, C, quarter, BLOCK_C: tl.constexpr):
    """The noise of one negative of a query, a quarter of the features from each of a counter's words."""
    j = tl.arange(0, BLOCK_C)
    column = S - Sn + d
    nothing = tl.zeros((BLOCK_C,), tl.int32)
    stream, inside = tl.load(whole + column), tl.load(whole + S + column)
    a, b, c, e = tl.philox(key, j, nothing + query, nothing + stream, nothing + inside + 1)
    first, second = _normal(a, b)
    third, fourth = _normal(c, e)
    to = noise + (query.to(tl.int64) * Sn + d) * C + j
    ours = j < quarter
    tl.store(to, first, mask=ours)
    tl.store(to + quarter, second, mask=ours & (quarter + j < C))
    tl.store(to + 2 * quarter, third, mask=ours & (2 * quarter + j < C))
    tl.store(to + 3 * quarter, fourth, mask=ours & (3 * quarter + j < C))


@triton.jit(do_not_specialize=["key", "N", "S", "Sq", "Sp", "Sn", "H", "C", "blocks", "quarter"])
def draw(
    whole, real, slots_a, slots_b, weights, noise, key, N, S, Sq, Sp, Sn, H, C, blocks, quarter,
    BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Slots (N, S) and (N, Sp) int64, weights, group after group, and noise (N, Sn, C).

    Grid (N, blocks + Sn): the first ``blocks`` programs of a query draw slots and weights, each of the others the noise
    of one negative. whole (5, S), real (6, S): ``draws.table``.
    """
    query = tl.program_id(0)
    part = tl.program_id(1)
    if part < blocks:
        _columns(whole, real, slots_a, slots_b, weights, key, query, part, N, S, Sq, Sp, H, BLOCK_S)
    else:
        _noise(whole, noise, key, query, part - blocks, S, Sn, C, quarter, BLOCK_C)
