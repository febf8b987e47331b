"""The contrastive head in closed forms: no (N, S, C) tensor, one (n, K) matrix for a block of n queries, own gradient.

Legend: N queries in all, n queries of a block, C feature width, K queue rows, H hardest rows a query, S synthetic
negatives a query (Sq, Sp, Ss, Sn of spec.py; Sr = Ss + Sn), T temperature.

The step, for each block of queries:

1. logits l = q queue^T / T, the only (n, K) matrix; everything later overwrites it.
2. The hardest set, exactly (``_hardest``), and from its similarities the synthetic logits. A draw that mixes the
   query with one row needs no vector at all: q.u = x q.q + y s and |u|^2 = x^2 q.q + y^2 + 2 x y s. A pair of rows
   is read once to get |u|; sign and noise draws read one row each.
3. l becomes e^l in place, the weights y / |u| of the synthetic negatives are added to the entries of their rows, and
4. ONE product with the queue gives the gradient:

   T dL/dq = (p_0 - 1) k + sum_j (p_j + W_j) n_j + q sum p x / |u| + sum_r p_r h_r,

   where W_j collects p y / |u| of the draws that read row j, and r runs over the sign and noise draws, whose rows are
   at hand. Backward multiplies by the incoming scalar.

Plain torch: the same code runs on any device, which is what "auto" uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import cpu_has_bf16, product
from .spec import Draws, Head, hardest_rows, mean_hardest

BLOCK_ELEMENTS = 1 << 22  # of the (n, K) matrix: 16 MiB in float32, reused by all blocks of a call
BUCKETS = 8  # rows a bucket of the selection; best of 4, 8, 16 and 32 at n = 64, K = 65,536, H = 1,024
COUNT_COLUMNS = 16384  # columns counted at once, so that the 0/1 matrix stays in the cache
PAIR_ROWS = 4096  # mixed pairs built at once: 2 MiB at C = 128
SAFE_TEMPERATURE = 0.03  # e^(1/T) and e^(-1/T), and their sums over a queue, are ordinary float32 numbers above it


def bf16_is_faster() -> bool:
    """Whether "auto" multiplies in bf16 on this CPU."""
    return cpu_has_bf16()


@dataclass(frozen=True)
class _Synthetic:
    """Synthetic negatives of a block, in the column order of Draws: [query | pair | sign | noise]."""

    cosine: Tensor  # (n, S) q.h, -inf where a parent is left out
    inverse: Tensor  # (n, S) 1 / |u|
    rows_a: Tensor  # (n, S) queue rows
    rows_b: Tensor  # (n, Sp)
    read: Tensor  # (n, Sr, C) the u of sign and noise draws
    draws: Draws


def _hardest(similarities: Tensor, hard: int) -> tuple[Tensor, Tensor]:
    """``hardest_rows``, faster: rows (n, H) and their similarities (n, H), in the same order. similarities (n, K).

    First the elements that reach a floor at or below the H-th largest, some more than H a query; then the H largest
    of those. A query with a tie at its H-th place, fewer than H rows or NaN is left to the definition.
    """
    n = len(similarities)
    floor, buckets = _best_buckets(similarities, hard)
    values = similarities if buckets is None else _gather_buckets(similarities, buckets)  # (n, V), rows ascending
    width = values.shape[1]
    found, starts = _true_places(values >= floor)  # (M,), (n + 1,)
    query = found // width
    padded = max(int(starts.diff().amax()), hard)
    place = torch.arange(len(found), device=found.device) + (padded * query - starts[query])
    pad = values.new_full((n * padded,), -torch.inf)
    found_values = pad.index_copy_(0, place, values.reshape(-1).index_select(0, found)).view(n, padded)
    column = found.new_zeros(n * padded).index_copy_(0, place, found - width * query)

    least = found_values.topk(hard, dim=1, sorted=False).values.amin(1, keepdim=True)  # (n, 1) the H-th largest
    keep = found_values >= least
    sure = (keep.sum(1) == hard) & (least.squeeze(1) > -torch.inf)
    doubt = not bool(sure.all())
    if doubt:
        keep[~sure] = torch.arange(padded, device=keep.device) < hard  # any H places; replaced below
    kept = keep.flatten().nonzero().squeeze(1)  # (n H,)
    values = found_values.flatten().index_select(0, kept).view(n, hard)
    rows = column.index_select(0, kept).view(n, hard)
    if buckets is not None:
        rows = _rows_of(rows, buckets, similarities.shape[1])
    if doubt:
        rows[~sure], values[~sure] = hardest_rows(similarities[~sure], hard)
    return rows, values


def _best_buckets(similarities: Tensor, hard: int) -> tuple[Tensor, Tensor | None]:
    """A floor (n, 1) that the H largest elements reach; the H buckets (n, H), ascending, that hold all that reach it.

    The columns fall into K / BUCKETS strided buckets. Each of the H buckets with the largest maxima holds an element
    no less than the smallest of those maxima, the floor: so H elements reach it, and unless the maximum of another
    bucket equals the floor, all that reach it lie in these buckets. One pass over the matrix, then H * BUCKETS
    elements a query. Buckets are None for small queues and ties: the floor is the H-th largest element itself.
    """
    width = similarities.shape[1] // BUCKETS
    if 2 * hard <= width:
        maxima = similarities[:, : width * BUCKETS].unflatten(1, (BUCKETS, width)).amax(1)  # (n, K / BUCKETS)
        floor = maxima.topk(hard, dim=1, sorted=False).values.amin(1, keepdim=True)
        reach, starts = _true_places(maxima >= floor)
        if bool((starts.diff() == hard).all()):
            return floor, (reach % width).view(-1, hard)
    return similarities.topk(hard, dim=1, sorted=False).values.amin(1, keepdim=True), None


def _true_places(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Flat places (M,) of the true elements of mask (n, V), ascending, and where each row begins in them (n + 1,)."""
    places = mask.flatten().nonzero().squeeze(1)
    return places, torch.searchsorted(places, torch.arange(len(mask) + 1, device=mask.device) * mask.shape[1])


def _gather_buckets(similarities: Tensor, buckets: Tensor) -> Tensor:
    """Elements of the buckets (n, H) and of the ragged tail: (n, BUCKETS H + K mod BUCKETS), in order of their rows."""
    width = similarities.shape[1] // BUCKETS
    body = similarities[:, : width * BUCKETS].unflatten(1, (BUCKETS, width))  # (n, BUCKETS, K / BUCKETS)
    inside = body.gather(2, buckets.unsqueeze(1).expand(-1, BUCKETS, -1)).flatten(1)
    tail = similarities[:, width * BUCKETS :]
    return torch.cat([inside, tail], dim=1) if tail.shape[1] else inside


def _rows_of(column: Tensor, buckets: Tensor, total: int) -> Tensor:
    """Queue rows of the columns (n, H) of ``_gather_buckets``."""
    width, hard = total // BUCKETS, buckets.shape[1]
    position = column // hard
    inside = position * width + buckets.gather(1, (column - position * hard).clamp(max=hard - 1))
    return torch.where(position < BUCKETS, inside, column + (width - hard) * BUCKETS)


def _pair_squares(queue: Tensor, rows_a: Tensor, rows_b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """|y n_a + z n_b|^2 of every pair, (n, Sp): the mixed rows are summed where they are read, a few at a time."""
    pairs = torch.stack([rows_a, rows_b], dim=2).view(-1, 2)  # (n Sp, 2)
    weights = torch.stack([y, z], dim=2).view(-1, 2)
    squares = y.new_empty(len(pairs))
    for i in range(0, len(pairs), PAIR_ROWS):
        part = slice(i, i + PAIR_ROWS)
        u = F.embedding_bag(pairs[part], queue, mode="sum", per_sample_weights=weights[part])  # (PAIR_ROWS, C)
        torch.sum(u.square_(), 1, out=squares[part])
    return squares.view_as(y)


def _synthesize(q: Tensor, queue: Tensor, row_squares: Tensor | None, rows: Tensor, s: Tensor, d: Draws) -> _Synthetic:
    """Cosines with the query and lengths of the draws ``d``, from the hardest rows (n, H) and similarities s (n, H).

    row_squares (K,) are the |n_j|^2, None where rows are unit.
    """
    n_query, n_pair, n_sign, n_noise = d.counts
    n_read = n_sign + n_noise
    rows_a, rows_b = rows.gather(1, d.slots_a), rows.gather(1, d.slots_b)
    all_a, s_b = s.gather(1, d.slots_a), s.gather(1, d.slots_b)
    s_a, pair_a, read_a = all_a.nan_to_num(neginf=0.0).split([n_query, n_pair, n_read], dim=1)
    present_b = F.pad(s_b != -torch.inf, (n_query, n_read), value=True)

    x, y = d.query_x, d.query_y
    of_row = y.square() if row_squares is None else y.square() * row_squares[rows_a[:, :n_query]]
    of_q = q.square().sum(1, keepdim=True)
    query_dot = x * of_q + y * s_a
    query_square = x.square() * of_q + of_row + 2 * x * y * s_a

    pair_dot = d.pair_y * pair_a + d.pair_z * s_b.nan_to_num(neginf=0.0)
    pair_square = _pair_squares(queue, rows_a[:, n_query : n_query + n_pair], rows_b, d.pair_y, d.pair_z)

    # (n, Sr, C)
    read = queue.index_select(0, rows_a[:, n_query + n_pair :].flatten()).view(len(q), n_read, q.shape[1])
    read[:, :n_sign].addcmul_(d.sign_v.unsqueeze(2), q.sign().unsqueeze(1))
    read[:, n_sign:].addcmul_(d.noise_w.unsqueeze(2), d.noise)
    read_dot = torch.bmm(read, q.unsqueeze(2)).squeeze(2)

    # |u|^2 is a sum of terms that cancel for an antipodal pair, so below a few ulps it is only rounding; the floor
    # bounds the weights y / |u| that are scattered, and the clamp the cosine, by what exact arithmetic allows.
    square = torch.cat([query_square, pair_square, read.square().sum(2)], dim=1)
    inverse = square.clamp(min=8 * torch.finfo(q.dtype).eps).rsqrt()
    bound = of_q.sqrt()
    cosine = torch.minimum(torch.cat([query_dot, pair_dot, read_dot], dim=1) * inverse, bound).maximum(-bound)
    cosine = cosine.masked_fill((all_a == -torch.inf) | ~present_b, -torch.inf)
    return _Synthetic(cosine, inverse, rows_a, rows_b, read, d)


def _count_above(logits: Tensor, positive: Tensor) -> Tensor:
    """(n,) how many logits (n, K) exceed the positive (n, 1). Compared into floats: summing booleans is far slower."""
    count = logits.new_zeros(len(logits))
    for part in logits.split(COUNT_COLUMNS, dim=1):
        count += torch.gt(part, positive, out=torch.empty_like(part)).sum(1)
    return count.long()


def _weighted_sum(
    out: Tensor, q: Tensor, queue: Tensor, mass: Tensor, of_synthetic: Tensor, syn: _Synthetic, precision: str
):
    """out (n, C) = sum_j mass_j n_j + sum_s of_synthetic_s h_s, from (n, K), which is overwritten, and (n, S)."""
    d = syn.draws
    n_query, n_pair, n_sign, n_noise = d.counts
    weight = of_synthetic * syn.inverse  # (n, S) mass of u itself
    of_query, of_pair, of_read = weight.split([n_query, n_pair, n_sign + n_noise], dim=1)
    scattered = torch.cat([of_query * d.query_y, of_pair * d.pair_y], dim=1)
    mass.scatter_add_(1, syn.rows_a[:, : n_query + n_pair], scattered)
    mass.scatter_add_(1, syn.rows_b, of_pair * d.pair_z)
    product(mass, queue, precision, out=out)
    out += (of_query * d.query_x).sum(1, keepdim=True) * q
    out += torch.bmm(of_read.unsqueeze(1), syn.read).squeeze(1)


def _block(q, k, queue, row_squares, temperature, n_hard, d, left_out, buffer, gradient, precision):
    """One block of queries: loss, rank, largest similarity, synthetic mass, each (n,); fills gradient (n, C)."""
    logits = product(q / temperature, queue.T, precision, out=buffer)  # (n, K)
    if left_out is not None:
        logits.masked_fill_(left_out, -torch.inf)
    positive = (q * k).sum(1, keepdim=True) / temperature  # (n, 1)
    rank = _count_above(logits, positive)
    syn, synthetic, largest = None, positive[:, :0], None
    if d is not None:
        rows, values = _hardest(logits, n_hard)
        largest = values.amax(1, keepdim=True)
        syn = _synthesize(q, queue, row_squares, rows, values * temperature, d)
        synthetic = syn.cosine / temperature  # (n, S)
    if largest is None:
        largest = logits.amax(1, keepdim=True)  # (n, 1)

    if temperature < SAFE_TEMPERATURE:
        # Cosines are at most 1, and only a query that has left out everything keeps a shift at the positive itself.
        shift = torch.cat([positive, largest, synthetic], dim=1).amax(1, keepdim=True)
        logits.sub_(shift)
        synthetic, positive = synthetic - shift, positive - shift
    mass, of_synthetic = logits.exp_(), synthetic.exp()
    synthetic_sum = of_synthetic.sum(1)
    odds = (mass.sum(1) + synthetic_sum).log() - positive.squeeze(1)  # log of (all negatives / positive)
    if gradient is not None:
        if syn is None:
            product(mass, queue, precision, out=gradient)
        else:
            _weighted_sum(gradient, q, queue, mass, of_synthetic, syn, precision)
        # p_j = e^l_j / total with log total = positive + softplus(odds); 1 - p_0 = sigmoid(odds) without cancellation.
        gradient *= torch.exp(F.logsigmoid(-odds) - positive.squeeze(1)).unsqueeze(1)
        gradient -= odds.sigmoid().unsqueeze(1) * k
    share = synthetic_sum * torch.exp(F.logsigmoid(-odds) - positive.squeeze(1))
    return -F.logsigmoid(-odds), rank, largest.squeeze(1) * temperature, share


def compute(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient):
    """``reference.contrastive_head`` in closed forms, block by block: (Head, dloss/dq (N, C) or None).

    Same arguments, same numbers up to rounding, and the precision of the products' operands. Without a gradient to
    form the second product is left out.
    """
    measured = queue.dtype not in (torch.float32, torch.float64)  # rows rounded to half precision are not unit
    queue = queue.to(q.dtype).contiguous()
    row_squares = queue.square().sum(1) if measured else None
    step = max(1, min(len(q), BLOCK_ELEMENTS // max(len(queue), 1)))
    buffer = q.new_empty(step, len(queue))
    gradient = torch.empty_like(q, memory_format=torch.contiguous_format) if want_gradient else None
    parts = []
    for start in range(0, len(q), step):
        part = slice(start, min(start + step, len(q)))
        left_out = None if ids is None else ids[part].unsqueeze(1) == queue_ids
        d = None if draws is None else draws.rows(part.start, part.stop)
        here = None if gradient is None else gradient[part]
        space = buffer[: part.stop - part.start]
        parts.append(
            _block(q[part], k[part], queue, row_squares, temperature, n_hard, d, left_out, space, here, precision)
        )
    loss, rank, largest, share = (torch.cat(column) for column in zip(*parts, strict=True))
    if gradient is not None:
        gradient /= temperature * len(q)
    return Head(loss.mean(), rank, mean_hardest(largest), share.mean()), gradient
