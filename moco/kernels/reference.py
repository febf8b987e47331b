"""The definition of the contrastive head: every synthetic negative is built, every logit kept, autograd does the rest.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query; S splits into
Sq, Sp, Ss, Sn as in spec.py. Written to be read and to be compared with; closed_form.py computes the same numbers fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.kernels.spec import Draws, LossOutput, hardest_rows, mean_hardest


def synthesize(q: Tensor, queue: Tensor, rows: Tensor, draws: Draws) -> Tensor:
    """Synthetic negatives h (N, S, C), unit rows, of queries q (N, C) from their hardest rows (N, H) of the queue.

    Source: MoCHi, arXiv 2010.01028 (pair, interpolation); SynCo, arXiv 2410.02401 (the others).
    """
    n_query, n_pair, n_sign, n_noise = draws.counts
    parent_a = queue[rows.gather(1, draws.slots_a)]  # (N, S, C)
    of_query, of_pair, of_sign, of_noise = parent_a.split([n_query, n_pair, n_sign, n_noise], dim=1)
    parent_b = queue[rows.gather(1, draws.slots_b)]  # (N, Sp, C)
    anchor = q.unsqueeze(1)  # (N, 1, C)
    mixed = [
        draws.query_x.unsqueeze(2) * anchor + draws.query_y.unsqueeze(2) * of_query,
        draws.pair_y.unsqueeze(2) * of_pair + draws.pair_z.unsqueeze(2) * parent_b,
        of_sign + draws.sign_v.unsqueeze(2) * anchor.sign(),
        of_noise + draws.noise_w.unsqueeze(2) * draws.noise,
    ]
    return F.normalize(torch.cat(mixed, dim=1), dim=2, eps=1e-12)


def lacks_a_parent(values: Tensor, draws: Draws) -> Tensor:
    """(N, S) bool: a parent of the draw is a left-out row. values (N, H): similarities of the hardest set."""
    n_query, _, n_sign, n_noise = draws.counts
    absent = values == -torch.inf  # (N, H)
    of_b = F.pad(absent.gather(1, draws.slots_b), (n_query, n_sign + n_noise), value=False)
    return absent.gather(1, draws.slots_a) | of_b


def contrastive_loss(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    temperature: float,
    n_hard: int,
    draws: Draws | None,
    ids: Tensor | None,
    queue_ids: Tensor | None,
) -> LossOutput:
    """InfoNCE (arXiv 1911.05722, eq. 1) over the positive, the queue and the synthetic negatives.

    Shapes and meaning as in ``moco.kernels.contrastive_loss``, which has brought q, k and draws to the loss's dtype.
    """
    queue = queue.to(q.dtype)
    positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)  # (N, 1)
    similarity = torch.einsum("nc,ck->nk", q, queue.T)  # (N, K)
    if ids is not None and queue_ids is not None:
        similarity = similarity.masked_fill(ids.unsqueeze(1) == queue_ids, -torch.inf)
    cosines = [positive, similarity]
    if draws is not None:
        rows, values = hardest_rows(similarity.detach(), n_hard)
        h = synthesize(q.detach(), queue, rows, draws)  # (N, S, C): a constant, no gradient flows through it
        synthetic = torch.einsum("nc,nsc->ns", q, h)  # (N, S)
        cosines.append(synthetic.masked_fill(lacks_a_parent(values, draws), -torch.inf))
    logits = torch.cat(cosines, dim=1) / temperature  # (N, 1 + K + S)
    loss = F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.long, device=q.device))

    with torch.no_grad():
        rank = (similarity > positive).sum(1)
        mass = logits.softmax(1)[:, 1 + len(queue) :].sum(1).mean()
        return LossOutput(loss, rank, mean_hardest(similarity.amax(1)), mass)
