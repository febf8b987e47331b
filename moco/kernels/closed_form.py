"""The contrastive head in closed forms: no (N, S, C) tensor, one (n, K) matrix for n queries at a time, own gradient.

Legend: N queries in all, n queries of a group, C feature width, K queue rows, H hardest rows a query, S synthetic
negatives a query (Sq, Sp, Ss, Sn of spec.py; Sr = Ss + Sn), T temperature.

The step, for each group of queries:

1. logits l = q queue^T / T, the only (n, K) matrix, tile by tile, and in place, while a cache holds the tile, e^l, its
   sum and the maxima of buckets; the order of e^l is that of l.
2. The hardest set, exactly (topk.py), and from its similarities the synthetic logits. A draw that mixes the
   query with one row needs no vector at all: q.u = x q.q + y s and |u|^2 = x^2 q.q + y^2 + 2 x y s. A pair of rows
   is read once to get |u|; sign and noise draws read one row each.
3. The weights y / |u| of the synthetic negatives are added to the entries of their rows, and
4. ONE product with the queue gives the gradient:

   T dL/dq = (p_0 - 1) k + sum_j (p_j + W_j) n_j + q sum p x / |u| + sum_r p_r h_r,

   where W_j collects p y / |u| of the draws that read row j, and r runs over the sign and noise draws, whose rows are
   at hand. Backward multiplies by the incoming scalar.

In 1 and 4 each core has its own queue rows, in 2 and 3 its own queries (threads.py). Plain torch but for the
selection on a CPU: the same code runs on any device. On a GPU all queries are one group, no value is read, and 3 adds
up rows in a fixed order where adding to entries of the matrix would take them in any.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.kernels import threads
from moco.kernels.matmul import product
from moco.kernels.reference import lacks_a_parent
from moco.kernels.spec import Draws, LossOutput, mean_hardest
from moco.kernels.topk import bucket_maxima, by_maxima, hardest, on_host

GROUP_ELEMENTS = 1 << 22  # of the (n, K) matrix: 16 MiB in float32, reused by all groups of a call
TILE_ELEMENTS = 1 << 21  # of the matrix that a core multiplies, exponentiates and searches before it goes on
BLOCK_ELEMENTS = 1 << 21  # of a worker's queries at a time, so that a cache holds their rows and the mask beside them
COUNT_COLUMNS = 16384  # columns counted at once, so that the 0/1 matrix stays in the cache
PAIR_ROWS = 4096  # mixed pairs built at once: 2 MiB at C = 128
PIECE = 32  # weighted rows that a program of a GPU sums one after another
SAFE_TEMPERATURE = 0.03  # e^(1/T) and e^(-1/T), and their sums over a queue, are ordinary float32 numbers above it


class SyntheticCosines(NamedTuple):
    """Synthetic negatives of a block of queries, in the column order of Draws: [query | pair | sign | noise]."""

    cosine: Tensor  # (n, S) q.h, -inf where a parent is left out
    inverse: Tensor  # (n, S) 1 / |u|
    rows_a: Tensor  # (n, S) queue rows
    rows_b: Tensor  # (n, Sp)
    read: Tensor  # (n, Sr, C) the u of sign and noise draws
    draws: Draws


def _pair_lengths(queue: Tensor, rows_a: Tensor, rows_b: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """|y n_a + z n_b| of every pair, (n, Sp): the mixed rows are summed where they are read, a few at a time."""
    pairs = torch.stack([rows_a, rows_b], dim=2).view(-1, 2)  # (n Sp, 2)
    weights = torch.stack([y, z], dim=2).view(-1, 2)
    lengths = y.new_empty(len(pairs))
    step = PAIR_ROWS if on_host(queue) else max(1, len(pairs))
    for i in range(0, len(pairs), step):
        part = slice(i, i + step)
        u = F.embedding_bag(pairs[part], queue, mode="sum", per_sample_weights=weights[part])  # (PAIR_ROWS, C)
        torch.linalg.vector_norm(u, dim=1, out=lengths[part])
    return lengths.view_as(y)


def synthetic_cosines(
    q: Tensor, queue: Tensor, row_squares: Tensor | None, rows: Tensor, s: Tensor, d: Draws
) -> SyntheticCosines:
    """Cosines with the query and lengths of the draws ``d``, from the hardest rows (n, H) and similarities s (n, H).

    row_squares (K,) are the |n_j|^2, None where rows are unit.
    """
    n_query, n_pair, n_sign, n_noise = d.counts
    n_read = n_sign + n_noise
    rows_a, rows_b = rows.gather(1, d.slots_a), rows.gather(1, d.slots_b)
    all_there = on_host(s) and bool(s.amin() > -torch.inf)
    left_out = None if all_there else lacks_a_parent(s, d)
    if left_out is not None:
        s = s.nan_to_num(neginf=0.0)
    s_a, pair_a, _ = s.gather(1, d.slots_a).split([n_query, n_pair, n_read], dim=1)

    of_q = q.square().sum(1, keepdim=True)
    query_dot = torch.addcmul(d.query_x * of_q, d.query_y, s_a)
    of_row = d.query_y if row_squares is None else d.query_y * row_squares[rows_a[:, :n_query]]
    query_square = torch.addcmul(d.query_x * query_dot, d.query_y, torch.addcmul(of_row, d.query_x, s_a))

    pair_dot = torch.addcmul(d.pair_y * pair_a, d.pair_z, s.gather(1, d.slots_b))
    pair_length = _pair_lengths(queue, rows_a[:, n_query : n_query + n_pair], rows_b, d.pair_y, d.pair_z)

    # (n, Sr, C)
    read = queue.index_select(0, rows_a[:, n_query + n_pair :].reshape(-1)).view(len(q), n_read, q.shape[1])
    read[:, :n_sign].addcmul_(d.sign_v.unsqueeze(2), q.sign().unsqueeze(1))
    read[:, n_sign:].addcmul_(d.noise_w.unsqueeze(2), d.noise)
    read_dot = torch.bmm(read, q.unsqueeze(2)).squeeze(2)

    # |u|^2 is a sum of terms that cancel for an antipodal pair, so below a few ulps it is only rounding; the floor
    # bounds the weights y / |u| that are scattered, and the clamp the cosine, by what exact arithmetic allows.
    floor = 8 * torch.finfo(q.dtype).eps
    query_length = query_square.clamp_(min=floor).sqrt_()
    length = torch.cat([query_length, pair_length, torch.linalg.vector_norm(read, dim=2)], dim=1)
    inverse = length.clamp_(min=floor**0.5).reciprocal_()
    bound = of_q.sqrt()
    cosine = torch.cat([query_dot, pair_dot, read_dot], dim=1).mul_(inverse).clamp_(-bound, bound)
    if left_out is not None:
        cosine.masked_fill_(left_out, -torch.inf)
    return SyntheticCosines(cosine, inverse, rows_a, rows_b, read, d)


def _count_above(scores: Tensor, positive: Tensor) -> Tensor:
    """(n,) how many scores (n, V) exceed the positive's (n, 1). Compared into floats: summing booleans is slower."""
    return torch.gt(scores, positive, out=torch.empty_like(scores)).sum(1)


def _rank(scores: Tensor, hardest: Tensor, positive: Tensor) -> Tensor:
    """``_count_above``, from the hardest scores (n, H) alone where the positive exceeds the least of them."""
    if not on_host(scores):
        return _count_above(scores, positive)
    rank = _count_above(hardest, positive)
    beyond = ~(positive >= hardest.amin(1, keepdim=True)).squeeze(1)
    if bool(beyond.any()):
        for part in scores.split(COUNT_COLUMNS, dim=1):
            rank[beyond] += _count_above(part[beyond], positive[beyond])
        rank[beyond] -= _count_above(hardest[beyond], positive[beyond])
    return rank


def weighted_rows(queue: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """sum_m weights_m queue[rows_m] of rows and weights (n, M): (n, C), the same bits every time on any device."""
    n, total = rows.shape
    pieces = (F.pad(t, (0, -total % PIECE)).view(-1, PIECE) for t in (rows, weights))
    index, weight = (piece if total else piece.new_zeros(n, PIECE) for piece in pieces)
    summed = F.embedding_bag(index, queue, mode="sum", per_sample_weights=weight)  # (n M / PIECE, C)
    return summed.view(n, -1, queue.shape[1]).sum(1)


def _add_weights(mass: Tensor, q: Tensor, queue: Tensor, of_synthetic: Tensor, syn: SyntheticCosines) -> Tensor:
    """Adds W, from the masses (n, S) of the synthetic negatives, to mass (n, K); returns what has no queue row, (n, C).

    The sum of both, mass queue + the result, is sum_j mass_j n_j + sum_s of_synthetic_s h_s. On a GPU W queue is part
    of the result, and mass is left as it is.
    """
    d = syn.draws
    n_query, n_pair, n_sign, n_noise = d.counts
    weight = of_synthetic * syn.inverse  # (n, S) mass of u itself
    of_query, of_pair, of_read = weight.split([n_query, n_pair, n_sign + n_noise], dim=1)
    rows_a, weights_a = syn.rows_a[:, : n_query + n_pair], torch.cat([of_query * d.query_y, of_pair * d.pair_y], dim=1)
    rows_b, weights_b = syn.rows_b, of_pair * d.pair_z
    along_q = (of_query * d.query_x).sum(1, keepdim=True)
    beside = torch.addcmul(torch.bmm(of_read.unsqueeze(1), syn.read).squeeze(1), along_q, q)
    if on_host(mass):
        mass.scatter_add_(1, rows_a, weights_a).scatter_add_(1, rows_b, weights_b)
        return beside
    rows, weights = torch.cat([rows_a, rows_b], dim=1), torch.cat([weights_a, weights_b], dim=1)
    return beside + weighted_rows(queue, rows, weights)


class _Columns(NamedTuple):
    """What some columns of the (n, K) matrix say about each query."""

    total: Tensor  # (n,) sum of the masses; of no meaning below SAFE_TEMPERATURE
    largest: Tensor  # (n,) score
    above: Tensor  # (n,) how many exceed the positive; only counted without synthetic negatives
    maxima: Tensor  # (n, W) of disjoint buckets, for the selection; W may be 0

    @staticmethod
    def joined(parts: Sequence[_Columns]) -> _Columns:
        if len(parts) == 1:
            return parts[0]
        total, largest, above, maxima = zip(*parts, strict=True)
        return _Columns(
            torch.stack(total).sum(0), torch.stack(largest).amax(0), torch.stack(above).sum(0), torch.cat(maxima, 1)
        )


def _score(scores: Tensor, left_out: Tensor | None, positive: Tensor | None, early: bool, buckets: bool) -> _Columns:
    """From logits (n, V) that a cache still holds to scores: masses e^l if ``early``, else the logits themselves.

    positive: (n, 1) score to count against, or None.
    """
    if left_out is not None:
        scores.masked_fill_(left_out, -torch.inf)
    if early:
        scores.exp_()
    nothing = scores.new_zeros(len(scores))
    return _Columns(
        scores.sum(1) if early else nothing,
        scores.amax(1) if positive is not None else nothing,
        nothing if positive is None else _count_above(scores, positive),
        bucket_maxima(scores) if buckets else scores[:, :0],
    )


class _Block(NamedTuple):
    """What a block of queries gives, beside the masses that stand in its part of the (n, K) matrix."""

    loss: Tensor  # (n,)
    rank: Tensor  # (n,)
    largest: Tensor  # (n,) similarity
    share: Tensor  # (n,) of the softmax on synthetic negatives
    factor: Tensor  # (n,) 1 / the sum of all masses: p_j = mass_j * factor
    pull: Tensor  # (n,) 1 - p_0
    beside: Tensor  # (n, C) part of the gradient that has no queue row, or (0,)


def _block(scores: Tensor, seen: _Columns, positive: Tensor, q, queue, row_squares, temperature, n_hard, d) -> _Block:
    """Everything between the two products; leaves the masses, weights W included, in ``scores`` (n, K).

    positive: (n, 1) logit.
    """
    early = temperature >= SAFE_TEMPERATURE
    if d is None:
        syn, synthetic, rank = None, positive[:, :0], seen.above
        largest = (seen.largest.log() if early else seen.largest).unsqueeze(1)  # (n, 1) logit
    else:
        rows, hard = hardest(scores, n_hard, seen.maxima, absent=0.0 if early else -torch.inf)
        rank = _rank(scores, hard, positive.exp() if early else positive)
        hard = hard.log_() if early else hard
        largest = hard.amax(1, keepdim=True)
        syn = synthetic_cosines(q, queue, row_squares, rows, hard * temperature, d)
        synthetic = syn.cosine / temperature  # (n, S)

    queue_sum = seen.total
    if not early:
        # Cosines are at most 1, and only a query that has left out everything keeps a shift at the positive itself.
        shift = torch.cat([positive, largest, synthetic], dim=1).amax(1, keepdim=True)
        queue_sum = scores.sub_(shift).exp_().sum(1)
        synthetic, positive = synthetic - shift, positive - shift
    of_synthetic = synthetic.exp()
    synthetic_sum = of_synthetic.sum(1)
    odds = (queue_sum + synthetic_sum).log() - positive.squeeze(1)  # log of (all negatives / positive)
    beside = q.new_empty(0) if syn is None else _add_weights(scores, q, queue, of_synthetic, syn)
    # p_j = e^l_j / total with log total = positive + softplus(odds); 1 - p_0 = sigmoid(odds) without cancellation.
    factor = torch.exp(F.logsigmoid(-odds) - positive.squeeze(1))
    largest = largest.squeeze(1) * temperature
    return _Block(-F.logsigmoid(-odds), rank.long(), largest, synthetic_sum * factor, factor, odds.sigmoid(), beside)


def compute(q, k, queue, temperature, n_hard, draws, ids, queue_ids, precision, want_gradient, shadow=None):
    """``reference.contrastive_loss`` in closed forms, on a CPU group by group: (LossOutput, dloss/dq (N, C) or None).

    Same arguments, same numbers up to rounding, and the precision of the products' operands; ``shadow`` is not read.
    Without a gradient to form the second product is left out.
    """
    measured = queue.dtype not in (torch.float32, torch.float64)  # rows rounded to half precision are not unit
    queue = queue.to(q.dtype).contiguous()
    row_squares = queue.square().sum(1) if measured else None
    positive = torch.linalg.vecdot(q, k).unsqueeze(1) / temperature  # (N, 1)
    early = temperature >= SAFE_TEMPERATURE
    counted = None if draws is not None else positive.exp() if early else positive  # (N, 1)
    buckets = draws is not None and by_maxima(len(queue), n_hard, q.device)
    team = threads.Team(q.device)
    host = on_host(q)
    step = max(1, min(len(q), GROUP_ELEMENTS // len(queue))) if host else len(q)
    buffer = q.new_empty(step, len(queue))
    blocks: list[_Block] = []
    products: list[Tensor] = []  # (n, C) mass queue, of each group
    for start in range(0, len(q), step):
        group = slice(start, min(start + step, len(q)))
        scores, scaled = buffer[: group.stop - start], q[group] / temperature

        def multiply(columns: slice, scores=scores, scaled=scaled, group=group) -> _Columns:
            parts = []
            width = max(1, TILE_ELEMENTS // len(scores)) if host else len(queue)
            for first in range(columns.start, columns.stop, width):
                tile = slice(first, min(first + width, columns.stop))
                product(scaled, queue[tile].T, precision, out=scores[:, tile])
                left_out = None if ids is None else ids[group].unsqueeze(1) == queue_ids[tile]
                against = None if counted is None else counted[group]
                parts.append(_score(scores[:, tile], left_out, against, early, buckets))
            return _Columns.joined(parts)

        seen = _Columns.joined(team.run(multiply, team.shares(len(queue))))

        def negatives(part: slice, scores=scores, seen=seen, start=start) -> _Block:
            here = slice(start + part.start, start + part.stop)
            d = None if draws is None else draws.rows(here.start, here.stop)
            of_part = _Columns(*(value[part] for value in seen))
            return _block(scores[part], of_part, positive[here], q[here], queue, row_squares, temperature, n_hard, d)

        def weigh(columns: slice, scores=scores) -> Tensor:
            return product(scores[:, columns], queue[columns], precision)

        most = BLOCK_ELEMENTS // len(queue) if host else None
        blocks += team.run(negatives, team.shares(len(scores), most))
        if want_gradient:
            products.append(sum(team.run(weigh, team.shares(len(queue))), torch.zeros_like(scaled)))

    loss, rank, largest, share, factor, pull, beside = map(torch.cat, zip(*blocks, strict=True))
    head = LossOutput(loss.mean(), rank, mean_hardest(largest), share.mean())
    if not want_gradient:
        return head, None
    gradient = torch.cat(products) + beside if draws is not None else torch.cat(products)
    gradient = gradient.mul_(factor.unsqueeze(1)).sub_(pull.unsqueeze(1) * k)
    return head, gradient.div_(temperature * len(q))
