"""The contrastive head: InfoNCE over a positive, a queue and synthetic hard negatives, one operator for all methods.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco.errors import UserError

from . import cpu, fused, reference
from .spec import Draws, Head, hardest_rows

__all__ = ["IMPLEMENTATIONS", "Draws", "Head", "contrastive_head", "hardest_rows", "resolve"]

IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")


def resolve(impl: str, device_type: str) -> str:
    """The implementation that ``impl`` means on a device ("cpu", "cuda", ...), for the dispatch and for the log.

    "auto" is the closed forms, in plain torch on any device. The fused kernel is "triton", chosen by name: its numbers
    are proved by the interpreter and it compiles for four targets, but it has not run on a GPU yet.
    Raises UserError for an unknown name, and for "triton" where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise UserError(f"unknown --head-impl {impl!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return "cpu"
    if impl == "triton" and not fused.available():
        raise UserError("--head-impl triton needs the package triton; install it (pip install triton) or use auto")
    if impl == "triton" and device_type != "cuda" and not fused.interpreted():
        raise UserError(f"--head-impl triton needs a GPU and this process runs on {device_type}; use --head-impl auto")
    return impl


def contrastive_head(
    q: Tensor,
    k: Tensor,
    queue: Tensor,
    *,
    temperature: float,
    n_hard: int = 0,
    draws: Draws | None = None,
    ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    impl: str = "auto",
) -> Head:
    """Mean over queries of -log( e^{q.k/T} / (e^{q.k/T} + sum_j e^{q.n_j/T} + sum_s e^{q.h_s/T}) ) and its statistics.

    n_j are the queue rows, h_s the synthetic negatives that ``draws`` describes (spec.py); h_s is a constant.
    Source: arXiv 1911.05722 eq. 1, with the synthetic negatives of arXiv 2010.01028 and 2410.02401.

    Args:
        q: (N, C) unit rows; the only input that gets a gradient.
        k: (N, C) unit rows, the positives.
        queue: (K, C) unit rows. The closed forms rely on the unit length; in half precision it is measured instead.
        temperature: T, above 0.
        n_hard: H, the size of each query's hardest set; clamped to K. Slots of ``draws`` lie in [0, min(H, K)).
        draws: the synthetic negatives, or None for plain MoCo.
        ids, queue_ids: (N,) and (K,) int64. A queue row with queue_ids[j] == ids[i] is left out for query i: it is
            neither a negative nor a parent of one, and a draw that points at it because fewer than H rows remain
            gives no negative.
        impl: "auto", "reference", "cpu" or "triton", see ``resolve``.

    Computes in float32 (float64 if q is float64) whatever the input dtype and whether or not autocast is on.
    Raises ValueError for shapes that do not fit, UserError for an implementation that does not exist or cannot run.
    """
    _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    head = _implementation(impl, q.device.type, dtype)
    if draws is not None:
        draws = draws.to(q.device, dtype) if draws.slots_a.shape[1] else None
    with torch.autocast(q.device.type, enabled=False):
        q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach()  # the queue's own dtype says if it is unit
        return head(q, k, queue, temperature, min(n_hard, len(queue)), draws, ids, queue_ids)


def _implementation(impl: str, device_type: str, dtype: torch.dtype):
    name = resolve(impl, device_type)
    if name == "triton" and dtype == torch.float64:
        raise UserError("--head-impl triton computes in float32; use reference or cpu for float64 queries")
    return {"reference": reference, "cpu": cpu, "triton": fused}[name].contrastive_head


def _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids) -> None:
    if q.dim() != 2 or k.shape != q.shape or queue.dim() != 2 or queue.shape[1] != q.shape[1] or not len(queue):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}: want (N,C) (N,C) (K,C)")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    if (ids is None) != (queue_ids is None):
        raise ValueError("ids and queue_ids come together")
    if draws is not None and (n_hard < 1 or len(draws.slots_a) != len(q)):
        raise ValueError(f"draws for {len(draws.slots_a)} queries and n_hard {n_hard}: want {len(q)} and at least 1")
