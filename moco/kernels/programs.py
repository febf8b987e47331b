"""The Triton programs of the contrastive head. fused.py launches them; this file alone needs triton.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query of which Sq mix
the query with one row, Sp mix two rows, Ss step along sgn(q), Sn carry noise (columns in this order), T temperature.
Bk, Bs, Bc: a block of queue rows, of draws, of features (all C of them).

``select`` and ``head`` run one program a query; no program writes what another reads, and nothing is added atomically,
so a step gives the same bits every time. A query's softmax, with l_j logits of negatives only:

    odds = log sum_j e^{l_j} - l_0,   loss = log(1 + e^odds),   1 - p_0 = sigmoid(odds),   p_j = (1 - p_0) e^{l_j} / sum

so that neither the loss nor 1 - p_0 is a difference of nearly equal numbers once the positive wins. The gradient,

    T N dloss/dq = (p_0 - 1) k + sum_j p_j n_j + sum_s p_s u_s / |u_s|,

is the matrix product of the p_j, which may replace the similarities, with the queue, plus one vector a query: the draws
are walked twice, first for the logits, then their rows are read and summed in registers.
"""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

# |u|^2 of an antipodal pair is rounding; its floor (8 ulps of 1, as in cpu.py) keeps 1 / |u| finite.
FLOOR = tl.constexpr(8 * 2.0**-23)


@triton.jit
def _similarities(sim, i, j, K, ids, queue_ids, MASKED: tl.constexpr):
    """(Bk,) similarities of query i with rows j, -inf where a row is left out or does not exist."""
    s = tl.load(sim + i * K + j, mask=j < K, other=float("-inf"))
    if MASKED:
        s = tl.where(tl.load(queue_ids + j, mask=j < K, other=0) == tl.load(ids + i), float("-inf"), s)
    return s


@triton.jit
def _ordered(s):
    """uint32 keys in the order of the floats s; the two zeros are one, NaN with its sign bit clear is largest."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, ~bits, bits ^ -2147483648).to(tl.uint32, bitcast=True)


@triton.jit
def select(sim, ids, queue_ids, rows, values, K, H, MASKED: tl.constexpr, BLOCK_K: tl.constexpr):
    """The hardest set exactly as ``spec.hardest_rows`` defines and orders it: rows (N, H) int32, values (N, H).

    The H-th largest key is found digit by digit, 8 bits a pass over the query's similarities; a last pass writes what
    lies above it, and of its equals the lowest rows, in ascending order.
    """
    i = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    bins = tl.arange(0, 256)
    prefix = tl.zeros((), tl.uint32)
    wanted = tl.zeros((), tl.int32) + H  # how many of the keys that share the prefix belong to the set
    for digit in tl.static_range(4):
        count = tl.zeros((256,), tl.int32)
        for start in range(0, K, BLOCK_K):
            j = start + lanes
            key = _ordered(_similarities(sim, i, j, K, ids, queue_ids, MASKED))
            ours = j < K
            if digit > 0:
                ours = ours & ((key >> (32 - 8 * digit)) == prefix)
            # tl.histogram counts every lane (its mask is newer than the oldest triton served): the others go to bin 0.
            byte = tl.where(ours, (key >> (24 - 8 * digit)) & 255, 0).to(tl.int32)
            others = BLOCK_K - tl.sum(ours.to(tl.int32), 0)
            count += tl.histogram(byte, 256) - tl.where(bins == 0, others, 0)
        at_least = tl.sum(count, 0) - tl.cumsum(count, 0) + count
        chosen = tl.sum((at_least >= wanted).to(tl.int32), 0) - 1
        wanted -= tl.sum(tl.where(bins > chosen, count, 0), 0)
        prefix = (prefix << 8) | chosen.to(tl.uint32)

    above = H - wanted
    listed = tl.zeros((), tl.int32)
    tied = tl.zeros((), tl.int32)
    for start in range(0, K, BLOCK_K):
        j = start + lanes
        s = _similarities(sim, i, j, K, ids, queue_ids, MASKED)
        key = _ordered(s)
        tie = (j < K) & (key == prefix)
        which = tied + tl.cumsum(tie.to(tl.int32), 0) - 1
        kept = (j < K) & ((key > prefix) | (tie & (which < wanted)))
        left_out = s == float("-inf")
        present = (kept & (s != float("-inf"))).to(tl.int32)
        # Rows left out are in the set only when they are the tie, and then come after all that lie above it.
        place = tl.where(left_out, above + which, listed + tl.cumsum(present, 0) - 1)
        tl.store(rows + i * H + place, j, mask=kept)
        tl.store(values + i * H + place, s, mask=kept)
        listed += tl.sum(present, 0)
        tied += tl.sum(tie.to(tl.int32), 0)


@triton.jit
def _picked(i, s, slots, stride, rows, values, H, inside):
    """(Bs,) queue rows in slots s of query i and their similarities; row 0 with similarity 0 outside."""
    slot = tl.load(slots + i * stride + s, mask=inside, other=0)
    row = tl.load(rows + i * H + slot, mask=inside, other=0)
    return row.to(tl.int64), tl.load(values + i * H + slot, mask=inside, other=0.0)


@triton.jit
def _vectors(base, row, c, C, inside):
    """(Bs, Bc) float32 rows of a matrix C wide; zeros where not inside, and those are not read."""
    mask = inside[:, None] & (c < C)[None, :]
    return tl.load(base + row[:, None] * C + c[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _synthesize(
    i, s, stop, anchor, c, C, H, closed, queue, rows, values, slots_a, stride_a, slots_b, stride_b,
    query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, Sq, Sp, Ss, Sn, READ: tl.constexpr,
):  # fmt: skip
    """u (Bs, Bc), its cosine with the query (Bs,), -inf for no negative, and 1 / |u| (Bs,) of the draws s < stop.

    Draws s < closed take their cosine from similarities alone. Without READ all draws do, and u is zero.
    """
    end_pair, end_sign = Sq + Sp, Sq + Sp + Ss
    is_query = (s < Sq) & (s < stop)
    is_pair = (s >= Sq) & (s < end_pair) & (s < stop)
    row_a, s_a = _picked(i, s, slots_a, stride_a, rows, values, H, s < stop)
    row_b, s_b = _picked(i, s - Sq, slots_b, stride_b, rows, values, H, is_pair)
    present = (s < stop) & (s_a != float("-inf")) & (s_b != float("-inf"))
    s_a = tl.where(s_a == float("-inf"), 0.0, s_a)
    x = tl.load(query_x + i * Sq + s, mask=is_query, other=0.0)
    y = tl.load(query_y + i * Sq + s, mask=is_query, other=1.0)

    square_q = tl.sum(anchor * anchor, 0)
    dot = x * square_q + y * s_a
    square = x * x * square_q + y * y + 2 * x * y * s_a
    u = tl.zeros((s.shape[0], c.shape[0]), tl.float32)
    if READ:
        is_sign = (s >= end_pair) & (s < end_sign) & (s < stop)
        is_noise = (s >= end_sign) & (s < stop)
        y = tl.where(is_pair, tl.load(pair_y + i * Sp + s - Sq, mask=is_pair, other=0.0), y)
        z = tl.load(pair_z + i * Sp + s - Sq, mask=is_pair, other=0.0)
        v = tl.load(sign_v + i * Ss + s - end_pair, mask=is_sign, other=0.0)
        w = tl.load(noise_w + i * Sn + s - end_sign, mask=is_noise, other=0.0)
        sign = (anchor > 0).to(tl.float32) - (anchor < 0).to(tl.float32)
        u = x[:, None] * anchor[None, :] + v[:, None] * sign[None, :]
        u += y[:, None] * _vectors(queue, row_a, c, C, s < stop)
        u += z[:, None] * _vectors(queue, row_b, c, C, is_pair)
        u += w[:, None] * _vectors(noise, i * Sn + s - end_sign, c, C, is_noise)
        dot = tl.where(s < closed, dot, tl.sum(u * anchor[None, :], 1))
        square = tl.where(s < closed, square, tl.sum(u * u, 1))
    inverse = tl.rsqrt(tl.maximum(square, FLOOR))
    bound = tl.sqrt(square_q)
    cosine = tl.maximum(tl.minimum(dot * inverse, bound), -bound)
    return u, tl.where(present, cosine, float("-inf")), inverse


@triton.jit
def _absorb(largest, total, logit):
    """A log-sum-exp in each lane: total is in units of e^largest; any of the numbers may be -inf."""
    larger = tl.maximum(largest, logit)
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp(largest - shift) + tl.exp(logit - shift)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] to float32 accuracy: 2 atanh(x / (2 + x)), whose series ends at 1.5e-9 there."""
    z = x / (2 + x)
    t = z * z
    return 2 * z * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15)))))))


@triton.jit
def _softmax(queue_largest, queue_total, draw_largest, draw_total, positive):
    """What a query's softmax is made of: the shift of its logits, loss, 1 - p_0, (1 - p_0) / sum, synthetic mass."""
    top = tl.maximum(tl.max(queue_largest, 0), tl.max(draw_largest, 0))
    shift = tl.where(top == float("-inf"), 0.0, top)
    of_draws = tl.sum(draw_total * tl.exp(draw_largest - shift), 0)
    total = tl.sum(queue_total * tl.exp(queue_largest - shift), 0) + of_draws
    nothing = total == 0
    odds = tl.where(nothing, float("-inf"), tl.log(tl.where(nothing, 1.0, total)) + shift) - positive
    e = tl.exp(-tl.abs(odds))
    loss = tl.maximum(odds, 0.0) + _log1p(e)
    away = tl.where(odds >= 0, 1.0, e) / (1 + e)
    each = tl.where(nothing, 0.0, away / tl.where(nothing, 1.0, total))
    return shift, loss, away, each, each * of_draws


@triton.jit
def head(
    sim, probability, q, stride_q, k, stride_k, queue, ids, queue_ids, rows, values,
    slots_a, stride_a, slots_b, stride_b,
    query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, vector, loss, rank, largest, share,
    K, C, H, Sq, Sp, Ss, Sn, closed, inverse_t, scale,
    MASKED: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Loss, rank, largest similarity and synthetic mass of a query, each (N,); with GRADIENT also its two parts.

    probability (N, K), which may be sim, becomes scale * p in its own type, vector (N, C) scale times all of the
    gradient that is not p @ queue.
    """
    i = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    draws = tl.arange(0, BLOCK_S)
    lanes = tl.arange(0, BLOCK_K)
    anchor = tl.load(q + i * stride_q + c, mask=c < C, other=0.0)
    key = tl.load(k + i * stride_k + c, mask=c < C, other=0.0)
    positive = tl.sum(anchor * key, 0)
    S = Sq + Sp + Ss + Sn

    draw_largest = tl.full((BLOCK_S,), float("-inf"), tl.float32)
    draw_total = tl.zeros((BLOCK_S,), tl.float32)
    for start in range(0, closed, BLOCK_S):
        _, cosine, _ = _synthesize(
            i, start + draws, closed, anchor, c, C, H, closed, queue, rows, values, slots_a, stride_a, slots_b,
            stride_b, query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, Sq, Sp, Ss, Sn, False,
        )  # fmt: skip
        draw_largest, draw_total = _absorb(draw_largest, draw_total, cosine * inverse_t)
    for start in range(closed, S, BLOCK_S):
        _, cosine, _ = _synthesize(
            i, start + draws, S, anchor, c, C, H, closed, queue, rows, values, slots_a, stride_a, slots_b,
            stride_b, query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, Sq, Sp, Ss, Sn, True,
        )  # fmt: skip
        draw_largest, draw_total = _absorb(draw_largest, draw_total, cosine * inverse_t)

    queue_largest = tl.full((BLOCK_K,), float("-inf"), tl.float32)
    queue_total = tl.zeros((BLOCK_K,), tl.float32)
    beaten = tl.zeros((BLOCK_K,), tl.int32)
    for start in range(0, K, BLOCK_K):
        s = _similarities(sim, i, start + lanes, K, ids, queue_ids, MASKED)
        queue_largest, queue_total = _absorb(queue_largest, queue_total, s * inverse_t)
        beaten += (s > positive).to(tl.int32)

    shift, its_loss, away, each, mass = _softmax(
        queue_largest, queue_total, draw_largest, draw_total, positive * inverse_t
    )
    tl.store(loss + i, its_loss)
    tl.store(rank + i, tl.sum(beaten, 0).to(tl.int64))
    tl.store(largest + i, tl.max(queue_largest, 0) / inverse_t)
    tl.store(share + i, mass)
    if GRADIENT:
        for start in range(0, K, BLOCK_K):
            j = start + lanes
            s = _similarities(sim, i, j, K, ids, queue_ids, MASKED)
            p = scale * each * tl.exp(s * inverse_t - shift)
            tl.store(probability + i * K + j, p.to(probability.dtype.element_ty), mask=j < K)
        weighted = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
        for start in range(0, S, BLOCK_S):
            u, cosine, inverse = _synthesize(
                i, start + draws, S, anchor, c, C, H, closed, queue, rows, values, slots_a, stride_a, slots_b,
                stride_b, query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, Sq, Sp, Ss, Sn, True,
            )  # fmt: skip
            weighted += (tl.exp(cosine * inverse_t - shift) * inverse)[:, None] * u
        tl.store(vector + i * C + c, scale * (each * tl.sum(weighted, 0) - away * key), mask=c < C)


@triton.jit
def average(loss, largest, share, mean_loss, hardest, synthetic_mass, N, BLOCK_N: tl.constexpr):
    """Means over queries, in one program; the largest similarity over those queries that have a negative."""
    lanes = tl.arange(0, BLOCK_N)
    of_loss = tl.zeros((BLOCK_N,), tl.float32)
    of_share = tl.zeros((BLOCK_N,), tl.float32)
    of_largest = tl.zeros((BLOCK_N,), tl.float32)
    some = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        i = start + lanes
        of_loss += tl.load(loss + i, mask=i < N, other=0.0)
        of_share += tl.load(share + i, mask=i < N, other=0.0)
        s = tl.load(largest + i, mask=i < N, other=float("-inf"))
        of_largest += tl.where(s == float("-inf"), 0.0, s)
        some += (s != float("-inf")).to(tl.float32)
    tl.store(mean_loss, tl.sum(of_loss, 0) / N)
    tl.store(hardest, tl.sum(of_largest, 0) / tl.maximum(tl.sum(some, 0), 1.0))
    tl.store(synthetic_mass, tl.sum(of_share, 0) / N)
