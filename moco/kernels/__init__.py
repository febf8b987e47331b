"""The contrastive head: InfoNCE over a positive, a queue and synthetic hard negatives, one operator for all methods.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moco.errors import UserError

from . import cpu, fused, products, reference
from .labelled import labelled_head
from .products import PRECISIONS, gpu_has_bf16, operands
from .spec import Draws, Head, hardest_rows

__all__ = [
    "IMPLEMENTATIONS",
    "PRECISIONS",
    "Draws",
    "Head",
    "contrastive_head",
    "describe",
    "hardest_rows",
    "labelled_head",
    "resolve",
    "resolve_precision",
]

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


def resolve_precision(precision: str, impl: str, device_type: str) -> str:
    """The precision that ``precision`` means for the operands of an implementation's two matrix products.

    "auto" is bf16 where the closed forms run on a CPU that is faster with it, else fp32; on a GPU neither tf32 nor
    bf16 has run yet, so they are chosen by name there. Float64 queries are computed in float64 whatever this says.
    Raises UserError for an unknown name, and for a precision that the implementation or the device does not have.
    """
    name = resolve(impl, device_type)
    if precision not in PRECISIONS:
        raise UserError(f"unknown --head-precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    if precision == "auto":
        return "bf16" if name == device_type == "cpu" and products.bf16_is_faster() else "fp32"
    if precision != "fp32" and name == "reference":
        raise UserError(f"--head-impl reference has no {precision}; use --head-precision auto or fp32")
    if precision == "tf32" and device_type != "cuda":
        raise UserError(f"--head-precision tf32 needs a GPU and this process runs on {device_type}; use auto")
    if precision == "bf16" and device_type != "cpu" and not (device_type == "cuda" and gpu_has_bf16()):
        raise UserError(f"--head-precision bf16 on {device_type} needs a GPU and torch 2.8; use auto")
    return precision


def describe(impl: str, precision: str, device: torch.device) -> str:
    """What the log says about a choice: "cpu in bf16"."""
    return f"{resolve(impl, device.type)} in {resolve_precision(precision, impl, device.type)}"


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
    precision: str = "auto",
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
        precision: "auto", "fp32", "tf32" or "bf16", of the operands of the two matrix products with the queue, see
            ``resolve_precision``; they are summed in float32.

    Computes in float32 (float64 if q is float64) whatever the input dtype and whether or not autocast is on. All but
    the reference is one operator for torch.compile, ``moco::contrastive_head``, and differentiable once.
    Raises ValueError for shapes that do not fit, UserError for an implementation or precision that cannot be had.
    """
    _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    wants_gradient = q.requires_grad and torch.is_grad_enabled()
    q, k, queue = q.to(dtype), k.detach().to(dtype), queue.detach()  # the queue's own dtype says if it is unit
    if draws is not None and not draws.slots_a.shape[1]:
        draws = None
    n_hard = min(n_hard, len(queue))
    if impl == "reference":
        resolve_precision(precision, impl, q.device.type)
        draws = None if draws is None else draws.to(q.device, dtype)
        with torch.autocast(q.device.type, enabled=False):
            return reference.contrastive_head(q, k, queue, temperature, n_hard, draws, ids, queue_ids)
    tensors = [] if draws is None else draws.tensors()
    *head, _ = _operator(
        q, k, queue, tensors, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient
    )  # fmt: skip
    return Head(*head)


# The operator: opaque to torch.compile, so that neither the choice of an implementation nor a Triton launch is traced.
# Its last result is the gradient (N, C) of its first, formed with it, or empty (0,) where none is wanted.


def _compute(q, k, queue, draws, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient):
    compute, precision = _choose(impl, precision, q)
    d = Draws(*draws).to(q.device, q.dtype) if draws else None
    with torch.autocast(q.device.type, enabled=False), operands("fp32", q.is_cuda):
        head, gradient = compute(
            q, k, queue, temperature, n_hard, d, ids, queue_ids, precision, wants_gradient
        )  # fmt: skip
    return *head, q.new_empty(0) if gradient is None else gradient


def _choose(impl: str, precision: str, q: Tensor):
    name, chosen = resolve(impl, q.device.type), resolve_precision(precision, impl, q.device.type)
    if q.dtype == torch.float64:
        if name == "triton":
            raise UserError("--head-impl triton computes in float32; use reference or cpu for float64 queries")
        if precision not in ("auto", "fp32"):
            raise UserError(f"float64 queries are computed in float64, not {precision}; use --head-precision auto")
        chosen = "fp32"
    return {"cpu": cpu, "triton": fused}[name].compute, chosen


_operator = torch.library.custom_op(
    "moco::contrastive_head",
    _compute,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor queue, Tensor[] draws, Tensor? ids, Tensor? queue_ids, float temperature, "
    "SymInt n_hard, str impl, str precision, bool wants_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _shapes(q, k, queue, draws, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient):
    mean = [q.new_empty(()) for _ in range(3)]
    rank = q.new_empty(q.shape[0], dtype=torch.int64)
    return mean[0], rank, mean[1], mean[2], q.new_empty(q.shape if wants_gradient else (0,))


def _save(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)  # or backward fills zeros for the statistics, a launch each
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(output[-1])
    ctx.draws = [None] * len(inputs[3])


def _backward(ctx, grad_loss, *_):
    if torch.is_grad_enabled():  # only under create_graph: a constant's derivative would be silently wrong
        raise RuntimeError("this head has no second derivative; use impl='reference' for one")
    (gradient,) = ctx.saved_tensors
    scaled = None if grad_loss is None else gradient * grad_loss
    return scaled, None, None, ctx.draws, None, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


def _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids) -> None:
    if q.dim() != 2 or k.shape != q.shape or queue.dim() != 2 or queue.shape[1] != q.shape[1] or not len(queue):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}: want (N,C) (N,C) (K,C)")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    if (ids is None) != (queue_ids is None):
        raise ValueError("ids and queue_ids come together")
    if draws is not None and (n_hard < 1 or len(draws.slots_a) != len(q)):
        raise ValueError(f"draws for {len(draws.slots_a)} queries and n_hard {n_hard}: want {len(q)} and at least 1")
