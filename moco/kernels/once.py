"""A head whose gradient is formed with its loss: autograd only scales it.

Legend: N queries, C feature width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .spec import Head

# (q, k, queue, temperature, n_hard, draws, ids, queue_ids, with_gradient=) -> the head and d loss / d q (N, C) or None
Compute = Callable[..., tuple[Head, "Tensor | None"]]


class _Once(torch.autograd.Function):
    """RuntimeError under create_graph: the gradient is a constant, so a second derivative would be silently wrong."""

    @staticmethod
    def forward(ctx, compute, q, *rest):
        head, gradient = compute(q, *rest, with_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.set_materialize_grads(False)  # or backward fills zeros for the statistics, a launch each
        ctx.mark_non_differentiable(head.rank, head.hardest, head.synthetic_mass)
        ctx.arguments = len(rest)
        return tuple(head)

    @staticmethod
    def backward(ctx, grad_loss, *_):
        if torch.is_grad_enabled():  # only under create_graph
            raise RuntimeError("this head has no second derivative; use impl='reference' for one")
        (gradient,) = ctx.saved_tensors
        scaled = None if grad_loss is None else gradient * grad_loss
        return None, scaled, *[None] * ctx.arguments


def once_differentiable(compute: Compute, q: Tensor, *rest) -> Head:
    """The head with its gradient attached, or without forming one where none is wanted."""
    if torch.is_grad_enabled() and q.requires_grad:
        return Head(*_Once.apply(compute, q, *rest))
    with torch.no_grad():
        return compute(q, *rest, with_gradient=False)[0]
