"""The Triton programs of the contrastive head. by_triton.py launches them; this file alone needs triton.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query of which Sq mix
the query with one row, Sp mix two rows, Ss step along sgn(q), Sn carry noise (columns in this order), T temperature.
W buckets: disjoint sets of rows whose largest similarities are kept. M chunks of the queue, R the room for a chunk's
candidates. A block of queries, rows, draws or features has the capital letters BLOCK_ before it.

No program writes what another of its launch reads, and nothing is added atomically, so a step gives the same bits every
time. A query's softmax, with l_j logits of negatives only:

    odds = log sum_j e^{l_j} - l_0,   loss = log(1 + e^odds),   1 - p_0 = sigmoid(odds),   p_j = (1 - p_0) e^{l_j} / sum

so that neither the loss nor 1 - p_0 is a difference of nearly equal numbers once the positive wins. The gradient is

    T N dloss/dq = (p_0 - 1) k + sum_j p_j n_j + sum_s p_s u_s / |u_s|.

Sums of exponentials are kept as a pair, the largest s and the sum of e^{(s - largest) / T}, so that any T will do.
"""

# Triton's own stubs fit neither constants given as bool nor what its operators return inside a program.
# pyright: reportArgumentType=false, reportOperatorIssue=false, reportGeneralTypeIssues=false
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl

# |u|^2 of an antipodal pair is rounding; its floor (8 ulps of 1, as in closed_form.py) keeps 1 / |u| finite.
FLOOR = tl.constexpr(8 * 2.0**-23)
NOTHING = tl.constexpr(-(2**31))  # the key of a bucket without rows


@triton.jit
def _key(s):
    """int32 keys in the order of the floats s; the two zeros are one, NaN with its sign bit clear is largest."""
    bits = tl.where(s == 0, 0.0, s).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 2147483647, bits)


@triton.jit
def _operand(x, PRECISION: tl.constexpr):
    """An operand of a matrix product: rounded to bf16, or as it is and rounded, if at all, by the product."""
    if PRECISION == "bf16":
        x = x.to(tl.bfloat16)
    return x


@triton.jit
def _product(a, b, sum, PRECISION: tl.constexpr):
    """sum + a @ b in float32, the operands in PRECISION."""
    if PRECISION == "bf16":
        return tl.dot(a, b, sum)
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def score(
    q, stride_q, k, stride_k, queue, sim, stride_s, ids, queue_ids, maxima, largest, total, above,
    N, K, C, W, tiles, inverse_t,
    MASKED: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr, BUCKET: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Similarities (N, K), and of each tile of BLOCK_K rows what they say, while they are in registers.

    Writes sim, -inf where a row is left out; (N, tiles) the largest similarity, the sum of exponentials in its units
    and how many exceed the positive; (N, W) keys of the maxima of buckets, BUCKET rows each, where BUCKET is not 0.
    Without PRODUCT the similarities are in sim already, from the library.
    """
    tile = tl.program_id(0).to(tl.int64)  # first, so that what runs at a time shares q and k in the L1
    i = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    j = tile * BLOCK_K + tl.arange(0, BLOCK_K)
    is_query, is_row = i < N, j < K
    positive = tl.zeros((BLOCK_N,), tl.float32)
    s = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        of_query = is_query[:, None] & (c < C)[None, :]
        anchor = tl.load(q + i[:, None] * stride_q + c[None, :], mask=of_query, other=0.0)
        key = tl.load(k + i[:, None] * stride_k + c[None, :], mask=of_query, other=0.0)
        positive += tl.sum(anchor * key, 1)
        if PRODUCT:
            row = tl.load(queue + j[:, None] * C + c[None, :], mask=is_row[:, None] & (c < C)[None, :], other=0.0)
            s = _product(_operand(row, PRECISION), tl.trans(_operand(anchor, PRECISION)), s, PRECISION)

    # A row of similarities is padded to a multiple of 16, whatever K is: loads and stores stay wide.
    there = (j < stride_s)[:, None] & is_query[None, :]
    place = sim + i[None, :] * stride_s + j[:, None]
    if not PRODUCT:
        s = tl.load(place, mask=there, other=float("-inf"))
    if MASKED:
        of_row = tl.load(queue_ids + j, mask=is_row, other=0)
        s = tl.where(of_row[:, None] == tl.load(ids + i, mask=is_query, other=0)[None, :], float("-inf"), s)
    s = tl.where(is_row[:, None], s, float("-inf"))
    if PRODUCT or MASKED:
        tl.store(place, s, mask=there)
    top = tl.max(s, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    at = i * tiles + tile
    tl.store(largest + at, top, mask=is_query)
    tl.store(total + at, tl.sum(tl.exp((s - shift[None, :]) * inverse_t), 0), mask=is_query)
    tl.store(above + at, tl.sum((s > positive[None, :]).to(tl.int32), 0), mask=is_query)
    if BUCKET > 0:
        keys = tl.where(is_row[:, None], _key(s), NOTHING)
        most = tl.max(tl.reshape(keys, (BUCKET, BLOCK_K // BUCKET, BLOCK_N)), 0)
        w = tile * (BLOCK_K // BUCKET) + tl.arange(0, BLOCK_K // BUCKET)
        tl.store(maxima + i[None, :] * W + w[:, None], most, mask=is_query[None, :])


@triton.jit
def _narrow(low, high, many, n_a, n_b, n_c, a, b, c, H):
    """The interval of a search after the counts n of keys that reach a <= b <= c: ``low`` is reached by H or more."""
    low = tl.where(n_c >= H, c, tl.where(n_b >= H, b, tl.where(n_a >= H, a, low)))
    many = tl.where(n_c >= H, n_c, tl.where(n_b >= H, n_b, tl.where(n_a >= H, n_a, many)))
    high = tl.where(n_a < H, a, tl.where(n_b < H, b, tl.where(n_c < H, c, high)))
    return low, high, many


@triton.jit
def compact(
    sim, stride_s, maxima, near, near_rows, counts, floors, K, H, W, chunk, spare,
    R: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Candidates of a query for its hardest set, chunk by chunk in the order of their rows.

    A floor that H to H + ``spare`` of the bucket maxima reach, or their exact H-th largest, is reached by at least H
    rows and by few more. Every program finds it by itself, with three thresholds at a time: 16 steps at most.
    Writes near, near_rows (N, M, R), the first R that a chunk has; counts (N, M), all that it has; floors (N,).
    """
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    w = tl.arange(0, BLOCK_W)
    most = tl.load(maxima + i * W + w, mask=w < W, other=NOTHING)
    low = tl.min(tl.where(most == NOTHING, 2147483647, most), 0).to(tl.int64)
    high = tl.max(most, 0).to(tl.int64) + 1
    many = tl.sum((most >= low.to(tl.int32)).to(tl.int32), 0)
    while (high - low > 1) & (many > H + spare):
        step = (high - low + 3) // 4
        a, b, c = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        n_a = tl.sum((most > (a - 1).to(tl.int32)).to(tl.int32), 0)
        n_b = tl.sum((most > (b - 1).to(tl.int32)).to(tl.int32), 0)
        n_c = tl.sum((most > (c - 1).to(tl.int32)).to(tl.int32), 0)
        low, high, many = _narrow(low, high, many, n_a, n_b, n_c, a, b, c, H)
    floor = low.to(tl.int32)

    chunks = tl.num_programs(1)
    list_at = (i * chunks + part) * R
    end = tl.minimum(part * chunk + chunk, stride_s)
    found = tl.zeros((), tl.int32)
    for start in range(part * chunk, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        s = tl.load(sim + i * stride_s + j, mask=j < end, other=float("-inf"))
        kept = (j < end) & (j < K) & (_key(s) >= floor)
        place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
        fits = kept & (place < R)
        tl.store(near + list_at + place, s, mask=fits)
        tl.store(near_rows + list_at + place, j.to(tl.int32), mask=fits)
        found += tl.sum(kept.to(tl.int32), 0)
    tl.store(counts + i * chunks + part, found)
    tl.store(floors + i, floor, mask=part == 0)


@triton.jit
def _list(values, m, pitch, limit, start, STEP: tl.constexpr):
    """(chunks, STEP) places from ``start`` in each list, which of them exist, and their similarities."""
    at = start + tl.arange(0, STEP)
    inside = at[None, :] < limit[:, None]
    place = m[:, None] * pitch + at[None, :]
    return place, inside, tl.load(values + place, mask=inside, other=0.0)


@triton.jit
def _largest(values, m, pitch, limit, longest, floor, H, STEP: tl.constexpr):
    """A key that H keys of all lists reach and, unless these are exactly H, the H-th largest; all H reach ``floor``."""
    lowest = tl.zeros((), tl.int32) + 2147483647
    highest = tl.zeros((), tl.int32) + NOTHING
    many = tl.zeros((), tl.int32)
    for start in range(0, longest, STEP):
        _, inside, s = _list(values, m, pitch, limit, start, STEP)
        key = _key(s)
        inside = inside & (key >= floor)
        lowest = tl.minimum(lowest, tl.min(tl.min(tl.where(inside, key, 2147483647), 1), 0))
        highest = tl.maximum(highest, tl.max(tl.max(tl.where(inside, key, NOTHING), 1), 0))
        many += tl.sum(tl.sum(inside.to(tl.int32), 1), 0)
    low, high = lowest.to(tl.int64), highest.to(tl.int64) + 1
    while (high - low > 1) & (many != H):
        step = (high - low + 3) // 4
        a, b, c = low + step, tl.minimum(low + 2 * step, high), tl.minimum(low + 3 * step, high)
        n_a = tl.zeros((), tl.int32)
        n_b = tl.zeros((), tl.int32)
        n_c = tl.zeros((), tl.int32)
        for start in range(0, longest, STEP):
            _, inside, s = _list(values, m, pitch, limit, start, STEP)
            key = _key(s)
            n_a += tl.sum(tl.sum((inside & (key > (a - 1).to(tl.int32))).to(tl.int32), 1), 0)
            n_b += tl.sum(tl.sum((inside & (key > (b - 1).to(tl.int32))).to(tl.int32), 1), 0)
            n_c += tl.sum(tl.sum((inside & (key > (c - 1).to(tl.int32))).to(tl.int32), 1), 0)
        low, high, many = _narrow(low, high, many, n_a, n_b, n_c, a, b, c, H)
    return low.to(tl.int32)


@triton.jit
def exact(
    sim, stride_s, near, near_rows, counts, floors, rows, values, K, H, chunk,
    WHOLE: tl.constexpr, M: tl.constexpr, OWN: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The hardest set exactly as ``spec.hardest_rows`` defines and orders it: rows (N, H) int32, values (N, H).

    The H-th largest key of the candidates is found with three thresholds at a time, 16 steps at most, by every program;
    each lists what OWN of the M chunks have above it, and of its equals the lowest rows. Where a chunk has more
    candidates than room (ties without number, rows left out, an order that defeats the buckets), and with WHOLE always,
    the rows themselves are the list.
    """
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1).to(tl.int64)
    m = tl.arange(0, M).to(tl.int64)
    own = part * OWN + tl.arange(0, OWN).to(tl.int64)
    limit = tl.maximum(tl.minimum(K - m * chunk, chunk), 0).to(tl.int32)
    own_limit = tl.maximum(tl.minimum(K - own * chunk, chunk), 0).to(tl.int32)
    base, pitch, whole = sim + i * stride_s, chunk, tl.zeros((), tl.int32) == 0
    floor = tl.zeros((), tl.int32) + NOTHING
    if not WHOLE:
        count = tl.load(counts + i * M + m)
        floor = tl.load(floors + i)
        whole = tl.max(count, 0) > R
        pitch = tl.where(whole, chunk, R)
        if not whole:
            base, limit = near + i * M * R, count
            own_limit = tl.load(counts + i * M + own)
    longest = tl.max(limit, 0)

    least = _largest(base, m, pitch, limit, longest, floor, H, STEP)

    # Of the keys that equal the least, as many as are wanted; a search that has met H keys early may have none.
    above = tl.zeros((M,), tl.int32)
    ties = tl.zeros((M,), tl.int32)
    for start in range(0, longest, STEP):
        _, inside, s = _list(base, m, pitch, limit, start, STEP)
        above += tl.sum((inside & (_key(s) > least)).to(tl.int32), 1)
        ties += tl.sum((inside & (_key(s) == least)).to(tl.int32), 1)
    all_above = tl.sum(above, 0)
    wanted = H - all_above
    earlier = tl.sum(tl.where(m[None, :] < m[:, None], ties[None, :], 0), 1)
    taken = tl.minimum(tl.maximum(wanted - earlier, 0), ties)
    before = m[None, :] < own[:, None]
    tied = tl.sum(tl.where(before, ties[None, :], 0), 1)
    # Rows left out are in the set only when they are the tie, and then come after all that lie above it.
    left_out = least == _key(tl.zeros((), tl.float32) + float("-inf"))
    listed = tl.sum(tl.where(before, tl.where(left_out, above, above + taken)[None, :], 0), 1)
    for start in range(0, tl.max(own_limit, 0), STEP):
        place, inside, s = _list(base, own, pitch, own_limit, start, STEP)
        key = _key(s)
        tie = inside & (key == least)
        which = tied[:, None] + tl.cumsum(tie.to(tl.int32), 1) - 1
        kept = (inside & (key > least)) | (tie & (which < wanted))
        ordered = (kept & ((key > least) | (left_out == 0))).to(tl.int32)
        to = tl.where(tie & left_out, all_above + which, listed[:, None] + tl.cumsum(ordered, 1) - 1)
        row = tl.load(near_rows + i * M * R + place, mask=inside & (whole == 0), other=0)
        row = tl.where(whole, place.to(tl.int32), row)
        tl.store(rows + i * H + to, row, mask=kept)
        tl.store(values + i * H + to, s, mask=kept)
        tied += tl.sum(tie.to(tl.int32), 1)
        listed += tl.sum(ordered, 1)


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
    return tl.load(base + row[:, None] * C + c[None, :], mask=mask, other=0.0)


@triton.jit
def draws(
    q, stride_q, queue, rows, values, slots_a, stride_a, slots_b, stride_b,
    query_x, query_y, pair_y, pair_z, sign_v, noise_w, noise, largest, total, vectors,
    C, H, Sq, Sp, Ss, Sn, closed, inverse_t, GRADIENT: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_S synthetic negatives of a query: their largest cosine, the sum of e^{(cosine - largest) / T}, and with
    GRADIENT the sum of e^{(cosine - largest) / T} u / |u|. Writes (N, blocks), (N, blocks) and (N, blocks, C).

    Draws before ``closed`` take their cosine and length from similarities alone.
    """
    i = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    c = tl.arange(0, BLOCK_C)
    end_pair, end_sign, S = Sq + Sp, Sq + Sp + Ss, Sq + Sp + Ss + Sn
    first, last = block * BLOCK_S, block * BLOCK_S + BLOCK_S
    is_query, is_pair = s < Sq, (s >= Sq) & (s < end_pair)
    is_sign, is_noise = (s >= end_pair) & (s < end_sign), (s >= end_sign) & (s < S)
    row_a, s_a = _picked(i, s, slots_a, stride_a, rows, values, H, s < S)
    u = _vectors(queue, row_a, c, C, s < S)
    anchor = tl.load(q + i * stride_q + c, mask=c < C, other=0.0)
    square_q = tl.sum(anchor * anchor, 0)
    present = (s < S) & (s_a != float("-inf"))
    s_a = tl.where(s_a == float("-inf"), 0.0, s_a)
    x = tl.load(query_x + i * Sq + s, mask=is_query, other=0.0)
    y = tl.load(query_y + i * Sq + s, mask=is_query, other=1.0)
    dot = x * square_q + y * s_a
    square = x * x * square_q + y * y + 2 * x * y * s_a
    # Each group's operands are read by the blocks that have draws of it.
    y = tl.where(is_pair, tl.load(pair_y + i * Sp + s - Sq, mask=is_pair, other=0.0), y)
    u = x[:, None] * anchor[None, :] + y[:, None] * u
    if (first < end_pair) & (last > Sq):
        row_b, s_b = _picked(i, s - Sq, slots_b, stride_b, rows, values, H, is_pair)
        present = present & (s_b != float("-inf"))
        z = tl.load(pair_z + i * Sp + s - Sq, mask=is_pair, other=0.0)
        u += z[:, None] * _vectors(queue, row_b, c, C, is_pair)
    if (first < end_sign) & (last > end_pair):
        v = tl.load(sign_v + i * Ss + s - end_pair, mask=is_sign, other=0.0)
        u += v[:, None] * ((anchor > 0).to(tl.float32) - (anchor < 0).to(tl.float32))[None, :]
    if last > end_sign:
        w = tl.load(noise_w + i * Sn + s - end_sign, mask=is_noise, other=0.0)
        u += w[:, None] * _vectors(noise, i * Sn + s - end_sign, c, C, is_noise)
    dot = tl.where(s < closed, dot, tl.sum(u * anchor[None, :], 1))
    square = tl.where(s < closed, square, tl.sum(u * u, 1))
    inverse = tl.rsqrt(tl.maximum(square, FLOOR))
    bound = tl.sqrt(square_q)
    cosine = tl.where(present, tl.maximum(tl.minimum(dot * inverse, bound), -bound), float("-inf"))
    top = tl.max(cosine, 0)
    weight = tl.exp((cosine - tl.where(top == float("-inf"), 0.0, top)) * inverse_t)
    at = i * tl.num_programs(1) + block
    tl.store(largest + at, top)
    tl.store(total + at, tl.sum(weight, 0))
    if GRADIENT:
        tl.store(vectors + at * C + c, tl.sum((weight * inverse)[:, None] * u, 0), mask=c < C)


@triton.jit
def _absorb(largest, total, more, its_total, inverse_t):
    """The sum of two sums of exponentials, in each lane; any of the numbers may be -inf."""
    larger = tl.maximum(largest, more)
    shift = tl.where(larger == float("-inf"), 0.0, larger)
    return larger, total * tl.exp((largest - shift) * inverse_t) + its_total * tl.exp((more - shift) * inverse_t)


@triton.jit
def _gathered(largest, total, size, inverse_t, BLOCK: tl.constexpr):
    """The sum of ``size`` sums of exponentials: its largest, and the sum in its units."""
    lanes = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        at = start + lanes
        more = tl.load(largest + at, mask=at < size, other=float("-inf"))
        top, sum = _absorb(top, sum, more, tl.load(total + at, mask=at < size, other=0.0), inverse_t)
    all_top = tl.max(top, 0)
    shift = tl.where(all_top == float("-inf"), 0.0, all_top)
    return all_top, tl.sum(sum * tl.exp((top - shift) * inverse_t), 0)


@triton.jit
def _log1p(x):
    """log(1 + x) for x in [0, 1] to float32 accuracy: 2 atanh(x / (2 + x)), whose series ends at 1.5e-9 there."""
    z = x / (2 + x)
    t = z * z
    return 2 * z * (1 + t * (1 / 3 + t * (1 / 5 + t * (1 / 7 + t * (1 / 9 + t * (1 / 11 + t * (1 / 13 + t / 15)))))))


@triton.jit
def combine(
    q, stride_q, k, stride_k, largest, total, above, of_draws, total_of_draws, vectors,
    vector, tops, weights, loss, rank, hardest, share, C, tiles, blocks, inverse_t, scale,
    GRADIENT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Loss, rank, largest similarity and synthetic mass of a query, each (N,), from those of its tiles and blocks of
    draws; with GRADIENT also scale times all of the gradient that is not p @ queue, PART features a program, and what
    makes a similarity a probability: scale p_j = weights e^{(s_j - tops) / T}, both (N,).
    """
    i = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    c = tl.arange(0, BLOCK_C)
    anchor = tl.load(q + i * stride_q + c, mask=c < C, other=0.0)
    positive = tl.sum(anchor * tl.load(k + i * stride_k + c, mask=c < C, other=0.0), 0)

    queue_top, queue_sum = _gathered(largest + i * tiles, total + i * tiles, tiles, inverse_t, BLOCK_T)
    draws_top, draws_sum = _gathered(of_draws + i * blocks, total_of_draws + i * blocks, blocks, inverse_t, BLOCK_S)
    top = tl.maximum(queue_top, draws_top)
    top = tl.where(top == float("-inf"), 0.0, top)
    draws_sum *= tl.exp((draws_top - top) * inverse_t)
    sum = queue_sum * tl.exp((queue_top - top) * inverse_t) + draws_sum
    nothing = sum == 0
    odds = tl.where(nothing, float("-inf"), tl.log(tl.where(nothing, 1.0, sum)) + (top - positive) * inverse_t)
    e = tl.exp(-tl.abs(odds))
    away = tl.where(odds >= 0, 1.0, e) / (1 + e)
    each = tl.where(nothing, 0.0, away / tl.where(nothing, 1.0, sum))

    if part == 0:
        lanes = tl.arange(0, BLOCK_T)
        beaten = tl.zeros((BLOCK_T,), tl.int32)
        for start in range(0, tiles, BLOCK_T):
            at = start + lanes
            beaten += tl.load(above + i * tiles + at, mask=at < tiles, other=0)
        tl.store(loss + i, tl.maximum(odds, 0.0) + _log1p(e))
        tl.store(rank + i, tl.sum(beaten, 0).to(tl.int64))
        tl.store(hardest + i, queue_top)
        tl.store(share + i, each * draws_sum)
    if GRADIENT:
        b = tl.arange(0, BLOCK_S)
        c = part * PART + tl.arange(0, PART)
        key = tl.load(k + i * stride_k + c, mask=c < C, other=0.0)
        pushed = tl.zeros((BLOCK_S, PART), tl.float32)
        for start in range(0, blocks, BLOCK_S):
            at = i * blocks + start + b
            inside = start + b < blocks
            lift = tl.exp((tl.load(of_draws + at, mask=inside, other=float("-inf")) - top) * inverse_t)
            mask = inside[:, None] & (c < C)[None, :]
            pushed += lift[:, None] * tl.load(vectors + at[:, None] * C + c[None, :], mask=mask, other=0.0)
        tl.store(vector + i * C + c, scale * (each * tl.sum(pushed, 0) - away * key), mask=c < C)
        tl.store(tops + i, top, mask=part == 0)
        tl.store(weights + i, scale * each, mask=part == 0)


@triton.jit
def weigh(sim, stride_s, tops, weights, K, inverse_t, BLOCK_K: tl.constexpr):
    """Similarities (N, K) become scale p, in place: what the library's second product takes."""
    i = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    s = tl.load(sim + i * stride_s + j, mask=j < stride_s, other=float("-inf"))
    s = tl.where(j < K, s, float("-inf"))
    p = tl.load(weights + i) * tl.exp((s - tl.load(tops + i)) * inverse_t)
    tl.store(sim + i * stride_s + j, p, mask=j < stride_s)


@triton.jit
def pull(
    sim, stride_s, tops, weights, queue, partial, N, K, C, chunk, inverse_t,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial (splits, N, C): scale p @ queue over ``chunk`` rows each; p is formed from similarities in registers."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    c = tl.program_id(2).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    is_query = i < N
    top = tl.load(tops + i, mask=is_query, other=0.0)
    weight = tl.load(weights + i, mask=is_query, other=0.0)
    end = tl.minimum(split * chunk + chunk, stride_s)
    sum = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(split * chunk, end, BLOCK_K):
        j = start + tl.arange(0, BLOCK_K)
        there = is_query[:, None] & (j < end)[None, :]
        s = tl.load(sim + i[:, None] * stride_s + j[None, :], mask=there, other=float("-inf"))
        s = tl.where((j < K)[None, :], s, float("-inf"))
        p = weight[:, None] * tl.exp((s - top[:, None]) * inverse_t)
        row = tl.load(queue + j[:, None] * C + c[None, :], mask=(j < K)[:, None] & (c < C)[None, :], other=0.0)
        sum = _product(_operand(p, PRECISION), _operand(row, PRECISION), sum, PRECISION)
    place = partial + (split * N + i)[:, None] * C + c[None, :]
    tl.store(place, sum, mask=is_query[:, None] & (c < C)[None, :])


@triton.jit
def finish(
    partial, vector, loss, hardest, share, mean_loss, mean_hardest, synthetic_mass, N, C, splits,
    GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """vector (N, C) += the sum of ``splits`` partial products, PART features of a query a program; the first program
    also means over queries, of the largest similarity over those that have a negative."""
    i = tl.program_id(0).to(tl.int64)
    if GRADIENT:
        c = tl.program_id(1) * PART + tl.arange(0, PART)
        m = tl.arange(0, BLOCK_M).to(tl.int64)
        sum = tl.zeros((BLOCK_M, PART), tl.float32)
        for start in range(0, splits, BLOCK_M):
            at = (start + m) * N + i
            mask = (start + m < splits)[:, None] & (c < C)[None, :]
            sum += tl.load(partial + at[:, None] * C + c[None, :], mask=mask, other=0.0)
        own = tl.load(vector + i * C + c, mask=c < C, other=0.0)
        tl.store(vector + i * C + c, own + tl.sum(sum, 0), mask=c < C)
    if (i == 0) & (tl.program_id(1) == 0):
        lanes = tl.arange(0, BLOCK_N)
        of_loss = tl.zeros((BLOCK_N,), tl.float32)
        of_share = tl.zeros((BLOCK_N,), tl.float32)
        of_hardest = tl.zeros((BLOCK_N,), tl.float32)
        some = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + lanes
            of_loss += tl.load(loss + n, mask=n < N, other=0.0)
            of_share += tl.load(share + n, mask=n < N, other=0.0)
            s = tl.load(hardest + n, mask=n < N, other=float("-inf"))
            of_hardest += tl.where(s == float("-inf"), 0.0, s)
            some += (s != float("-inf")).to(tl.float32)
        tl.store(mean_loss, tl.sum(of_loss, 0) / N)
        tl.store(mean_hardest, tl.sum(of_hardest, 0) / tl.maximum(tl.sum(some, 0), 1.0))
        tl.store(synthetic_mass, tl.sum(of_share, 0) / N)
