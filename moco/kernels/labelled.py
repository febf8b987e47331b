"""The contrastive head with labels: every queue row of the query's class is a positive too.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query (Sq, Sp, Ss, Sn
of spec.py). Plain torch on any device; the (N, K) similarities are kept for autograd, synthetic negatives have closed
forms as in closed_form.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moco.kernels.closed_form import synthetic_cosines, weighted_rows
from moco.kernels.spec import Draws, LossOutput, mean_hardest
from moco.kernels.topk import hardest, on_host


def labelled_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    labels: Tensor,
    queue_labels: Tensor,
    *,
    temperature: float,
    n_hard: int = 0,
    draws: Draws | None = None,
) -> LossOutput:
    """Mean over queries of -1/|P| sum_{p in P} log( e^{q.p/T} / (e^{q.k/T} + sum_j e^{q.n_j/T} + sum_s e^{q.h_s/T}) ).

    P is the query's own key and every queue row of its label, j runs over all queue rows, h_s are the synthetic
    negatives that ``draws`` describes, made from the hardest rows of OTHER labels; they are constants. With a label
    of its own for every query it is :func:`moco.kernels.contrastive_loss`.
    Source: arXiv 2004.11362, eq. 2, with the memory that its section 4 describes; no code of that was published.

    Args:
        q: (N, C) unit rows; the only input that gets a gradient.
        k: (N, C) unit rows, the own keys. queue: (K, C) unit rows.
        labels: (N,) int64, 0 or more. queue_labels: (K,) int64, -1 for a row that no image has filled: a negative.
        temperature: T, above 0.
        n_hard: H; a class may leave fewer rows, and a draw that points at none of them gives no negative.
        draws: the synthetic negatives, None for none.

    Returns LossOutput; ``rank`` and ``hardest`` are about rows of other labels. In float32 (float64 if q is float64).
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach().to(dtype)
        own = torch.linalg.vecdot(q, k).unsqueeze(1)  # (N, 1)
        s = q @ queue.T  # (N, K)
        same = labels.unsqueeze(1) == queue_labels  # (N, K)
        others = s.detach().masked_fill(same, -torch.inf)  # (N, K) as negatives
        synthetic = own[:, :0]
        if draws is not None and draws.slots_a.shape[1]:
            rows, values = hardest(others, min(n_hard, len(queue)))
            synthetic = _cosines(q, queue, s, rows, values, draws.to(q.device, dtype))  # (N, S)
        logits = torch.cat([own, s, synthetic], dim=1) / temperature  # (N, 1 + K + S)
        log_sum = logits.logsumexp(1)
        of_positives = (own.squeeze(1) + torch.where(same, s, 0).sum(1)) / (1 + same.sum(1)) / temperature
        loss = (log_sum - of_positives).mean()

    with torch.no_grad():
        rank = (others > own).sum(1)
        mass = (logits[:, 1 + len(queue) :] - log_sum.unsqueeze(1)).exp().sum(1).mean()
        return LossOutput(loss, rank, mean_hardest(others.amax(1)), mass)


def _cosines(q: Tensor, queue: Tensor, s: Tensor, rows: Tensor, values: Tensor, d: Draws) -> Tensor:
    """(N, S) q.h with the gradient of a constant h: that of q, over what is a weighted sum of similarities with it."""
    with torch.no_grad():
        made = synthetic_cosines(q, queue, None, rows, values, d)
    n_query, n_pair, _, _ = d.counts
    of_query, of_pair = _picked(q, queue, s, made.rows_a[:, : n_query + n_pair]).split([n_query, n_pair], dim=1)
    of_q = torch.linalg.vecdot(q, q.detach()).unsqueeze(1)
    dots = [
        d.query_x * of_q + d.query_y * of_query,
        d.pair_y * of_pair + d.pair_z * _picked(q, queue, s, made.rows_b),
        torch.bmm(made.read, q.unsqueeze(2)).squeeze(2),
    ]
    cosine = torch.cat(dots, dim=1) * made.inverse
    return cosine.masked_fill(made.cosine == -torch.inf, -torch.inf)


def _picked(q: Tensor, queue: Tensor, s: Tensor, rows: Tensor) -> Tensor:
    """(N, M) similarities s of rows (N, M), with a gradient."""
    return s.gather(1, rows) if on_host(s) else _Picked.apply(q, queue, s.detach(), rows)  # pyright: ignore[reportReturnType]


class _Picked(torch.autograd.Function):
    """A gradient that comes to q from the rows, in a fixed order; gather's own adds to (N, K) in any."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, queue: Tensor, s: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(queue, rows)
        return s.gather(1, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        queue, rows = ctx.saved_tensors
        return weighted_rows(queue, rows, grads[0].contiguous()), None, None, None
