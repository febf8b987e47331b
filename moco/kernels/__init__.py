"""The contrastive head: InfoNCE over a positive, a queue and synthetic hard negatives, one operator for all methods.

Legend: N queries, C feature width, K queue rows, H hardest rows a query, S synthetic negatives a query.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from moco.errors import UserError
from moco.kernels import by_triton, closed_form, matmul, reference, trial
from moco.kernels.labelled import labelled_loss
from moco.kernels.matmul import PRECISIONS, gpu_has_bf16, operands
from moco.kernels.spec import Draws, LossOutput, hardest_rows
from moco.kernels.trial import Size

__all__ = [
    "IMPLEMENTATIONS",
    "PRECISIONS",
    "Choice",
    "Draws",
    "Earlier",
    "LossOutput",
    "Size",
    "choose",
    "contrastive_loss",
    "describe",
    "hardest_rows",
    "labelled_loss",
    "resolve",
    "resolve_precision",
]

SOONER = 0.95  # of the usual precision's time; near it two runs may choose otherwise, where none is named
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton")


def resolve(impl: str, device_type: str) -> str:
    """The implementation that ``impl`` names on a device ("cpu", "cuda", ...).

    "auto" on a GPU is the fused step, "triton", where that is installed, before its trial on the device (``choose``);
    anywhere else the closed forms, "cpu", in plain torch.
    Raises UserError for an unknown name, and for "triton" where it cannot run.
    """
    if impl not in IMPLEMENTATIONS:
        raise UserError(f"unknown --head-impl {impl!r}; use one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "auto":
        return "triton" if device_type == "cuda" and by_triton.available() else "cpu"
    if impl == "triton" and not by_triton.available():
        raise UserError("--head-impl triton needs the package triton; install it (pip install triton) or use auto")
    if impl == "triton" and device_type != "cuda" and not by_triton.interpreted():
        raise UserError(f"--head-impl triton needs a GPU and this process runs on {device_type}; use --head-impl auto")
    return impl


def resolve_precision(precision: str, impl: str, device_type: str) -> str:
    """The precision that ``precision`` means for the operands of an implementation's two matrix products.

    "auto" is tf32x3 for the fused step on a GPU (or fp32, where ``choose`` finds that faster), bf16 where the closed
    forms run on a CPU that is faster with it, else fp32 (README.md has the errors). Float64 queries are computed in
    float64 whatever this says.
    Raises UserError for an unknown name, and for a precision that the implementation or the device does not have.
    """
    name = resolve(impl, device_type)
    if precision not in PRECISIONS:
        raise UserError(f"unknown --head-precision {precision!r}; use one of {', '.join(PRECISIONS)}")
    if precision == "auto" and name == "triton" and device_type == "cuda":
        return "tf32x3"
    if precision == "auto":
        return "bf16" if name == device_type == "cpu" and matmul.bf16_is_faster() else "fp32"
    if precision != "fp32" and name == "reference":
        raise UserError(f"--head-impl reference has no {precision}; use --head-precision auto or fp32")
    has_bf16 = name == "triton" or device_type == "cpu" or (device_type == "cuda" and gpu_has_bf16())
    if precision == "bf16" and not has_bf16:
        raise UserError(f"--head-precision bf16 on {device_type} needs a GPU and torch 2.8; use auto")
    if precision.startswith("tf32") and device_type != "cuda" and name != "triton":  # which is interpreted there
        raise UserError(f"--head-precision {precision} needs a GPU and this process runs on {device_type}; use auto")
    if precision == "tf32x3" and name != "triton":
        raise UserError("--head-precision tf32x3 is the fused head's, --head-impl triton; use auto, fp32 or tf32")
    return precision


class Choice(NamedTuple):
    """Names that mean the same in every process and at every step, and why."""

    impl: str
    precision: str
    why: str = ""  # words for the log, empty where names decided

    def __str__(self) -> str:
        return f"{self.impl} in {self.precision}{self.why}"


def by_name(impl: str, precision: str, device_type: str) -> Choice:
    """What names mean on a device, before a trial there: ``resolve`` and ``resolve_precision``."""
    return Choice(resolve(impl, device_type), resolve_precision(precision, impl, device_type))


def describe(impl: str, precision: str, device: torch.device) -> str:
    """What the log says about a choice: "cpu in bf16"."""
    return str(by_name(impl, precision, device.type))


class Earlier(NamedTuple):
    """What a run that goes on has chosen so far, on a device of a type, when ``asked`` impl and precision were."""

    impl: str
    precision: str
    device: str
    asked: list[str]


def choose(
    impl: str,
    precision: str,
    device: torch.device,
    size: Size,
    before: Earlier | None = None,
    worst: Callable[[list[float]], list[float]] = list,
) -> Choice:
    """What ``impl`` and ``precision`` are for steps of a size on a device.

    "auto" on a GPU is the fused step if, on this device, it agrees with the reference (trial.py) and is not slower
    than the closed forms at the size. A run that goes on keeps what it has where it agrees.

    Args:
        before: of the run that goes on; of no account where now others are asked for.
        worst: the largest of each of some numbers over all processes, which all call ``choose``.

    Raises:
        UserError: names that cannot be had, or "triton" by name where it does not agree.
    """
    before = before if before and before.asked == [impl, precision] else None
    if kind(device) != "cuda":
        chosen = by_name(impl, precision, device.type)
        return chosen._replace(why=_not_as_before(chosen, before))
    before = before if before and before.device == "cuda" else None
    if impl in ("auto", "triton"):
        return _tried(impl, precision, device, size, before, worst)
    return by_name(impl, precision, "cuda")


def kind(device: torch.device) -> str:
    """ "cpu", "cuda", ...: the one place that says what a device is to ``choose``."""
    return device.type


def _tried(impl: str, precision: str, device, size: Size, before: Earlier | None, worst) -> Choice:
    if before and before.impl != "triton":
        return Choice(before.impl, before.precision, ", as so far")
    own, why = _objection(impl, before.precision if before else precision, device, size)
    (failed,) = worst([float(bool(why))])
    if failed:
        return _without(impl, precision, why or "another process of this run cannot use it", before)
    checked = f"{', as so far' if before else ''}, checked against the reference"
    alone = precision == "tf32x3" or (precision == "bf16" and not gpu_has_bf16())
    if before or impl == "triton" or alone:
        return Choice("triton", own, checked)
    closed = resolve_precision(precision, "cpu", "cuda")
    own, faster = _faster(precision, own, device, size, worst)
    (share,) = worst([trial.relative_time(device, size, own, closed)])
    if share <= 1:
        return Choice("triton", own, f"{checked}, {faster}{share:.2g} of the closed forms' time")
    return Choice("cpu", closed, f", as triton takes {share:.2g} times as long")


def _faster(precision: str, own: str, device, size: Size, worst) -> tuple[str, str]:
    """For "auto", which of the two precisions with float32's digits takes less time at this size, and words if fp32:
    on an H200 tf32x3 at 32 queries and fp32, whose products are the library's, at 256 (benchmarks/results)."""
    if precision != "auto" or own == "fp32":
        return own, ""
    mine, other = worst([trial.device_time(device, size, name) for name in (own, "fp32")])
    if not other < SOONER * mine:
        return own, ""
    (refused,) = worst([float(bool(_objection("auto", "fp32", device, size)[1]))])
    return (own, "") if refused else ("fp32", f"{other / mine:.2g} of {own}'s time and ")


def _objection(impl: str, precision: str, device, size: Size) -> tuple[str, str]:
    """The precision of the fused step, and what speaks against it."""
    if not by_triton.available():  # which other processes of the run may have: said after all have asked
        return "", "the package triton is not installed (pip install triton)"
    own = resolve_precision(precision, "triton", "cuda")
    return own, trial.objection(device, size.width, size.masked, own) or trial.objection_at(device, size, own)


def _without(impl: str, precision: str, why: str, before: Earlier | None) -> Choice:
    """The closed forms on a GPU because of what is wrong with the fused step."""
    if impl == "triton" or precision == "tf32x3":
        asked = "--head-impl triton" if impl == "triton" else "--head-precision tf32x3"
        raise UserError(f"{asked} cannot be had on this GPU, as the fused head fails its check: {why}; use auto")
    closed = Choice("cpu", resolve_precision(precision, "cpu", "cuda"))
    return closed._replace(why=f"{NOT_FUSED}{why}{_not_as_before(closed, before)}")


NOT_FUSED = ", not by triton: "


def _not_as_before(chosen: Choice, before: Earlier | None) -> str:
    if not before or chosen[:2] == before[:2]:
        return ""
    so_far = f"{before.impl} in {before.precision}"
    return f" (so far by {so_far}, which cannot be had here: the rest is equal to rounding, not bit for bit)"


_chosen: dict[tuple, Choice] = {}  # by (device, C, masked, precision): what "auto" is in this process


def _at_first_call(precision: str, device: torch.device, size: Size) -> Choice:
    """``choose`` of "auto" on a GPU, once a process; warns where that is not the fused step because that fails.

    While a CUDA graph is captured nothing can be tried: then the closed forms compute, unless a choice was made, and
    tf32x3, which they do not have, is refused.
    """
    key = (device, size.width, size.masked, precision)
    if key in _chosen:
        return _chosen[key]
    if not _capturing(device):
        chosen = _chosen[key] = choose("auto", precision, device, size)
    elif precision == "tf32x3":
        raise UserError(
            "call contrastive_loss once before a CUDA graph is captured: its first call checks the fused head, whose "
            "tf32x3 is"
        )
    else:
        chosen = _without("auto", precision, "a CUDA graph is captured before any other call", None)
    if chosen.why.startswith(NOT_FUSED):
        warnings.warn(f"loss by {chosen}", RuntimeWarning, stacklevel=2)
    return chosen


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def contrastive_loss(
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
    shadow: Tensor | None = None,
) -> LossOutput:
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
        impl: "auto", "reference", "cpu" or "triton", see ``resolve``. "auto" on a GPU is on trial at a process's first
            call with a device, C, masks and precision, see ``choose``, and fixed by it; names are not tried.
        precision: "auto", "fp32", "tf32", "tf32x3" or "bf16", of the operands of the two matrix products with the
            queue, see ``resolve_precision``; they are summed in float32.
        shadow: the same queue (K, C) in bfloat16, where the caller keeps one: the fused step then rounds none in bf16.

    Computes in float32 (float64 if q is float64) whatever the input dtype and whether or not autocast is on. All but
    the reference is one operator for torch.compile, ``moco::contrastive_loss``, and differentiable once.
    Raises ValueError for shapes that do not fit, UserError for an implementation or precision that cannot be had.
    """
    _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids)
    if shadow is not None and (shadow.shape != queue.shape or shadow.dtype != torch.bfloat16):
        raise ValueError(f"shadow {tuple(shadow.shape)} {shadow.dtype}: want {tuple(queue.shape)} torch.bfloat16")
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
            return reference.contrastive_loss(q, k, queue, temperature, n_hard, draws, ids, queue_ids)
    tensors = [] if draws is None else draws.tensors()
    call = _operator if torch.compiler.is_compiling() else _Eager.apply
    *head, _ = call(
        q, k, queue, tensors, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient, shadow
    )  # fmt: skip
    return LossOutput(*head)


# The operator: opaque to torch.compile, so that neither the choice of an implementation nor a Triton launch is traced.
# Its last result is the gradient (N, C) of its first, formed with it, or empty (0,) where none is wanted.
# No argument has a default: the dispatcher drops one that equals it, and torch 2.6 then expects one gradient less.


def _compute(q, k, queue, draws, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient, shadow):
    d = Draws(*draws).to(q.device, q.dtype) if draws else None
    if impl == "auto" and kind(q.device) == "cuda" and q.dtype == torch.float32:
        counts = d.counts if d else (0, 0, 0, 0)
        size = Size(len(q), len(queue), q.shape[1], n_hard, counts, ids is not None, temperature)
        impl, precision, _ = _at_first_call(precision, q.device, size)
    module, precision = _implementation(impl, precision, q)
    with torch.autocast(q.device.type, enabled=False), operands("fp32", q.is_cuda):
        head, gradient = module.compute(
            q, k, queue, temperature, n_hard, d, ids, queue_ids, precision, wants_gradient, shadow
        )  # fmt: skip
    return *head, q.new_empty(0) if gradient is None else gradient


def _implementation(impl: str, precision: str, q: Tensor) -> tuple[ModuleType, str]:
    impl = "cpu" if impl == "auto" else impl  # for float64 queries on a GPU; others there are decided
    name, chosen, _ = by_name(impl, precision, q.device.type)
    if q.dtype == torch.float64:
        if name == "triton":
            raise UserError("--head-impl triton computes in float32; use reference or cpu for float64 queries")
        if precision not in ("auto", "fp32"):
            raise UserError(f"float64 queries are computed in float64, not {precision}; use --head-precision auto")
        chosen = "fp32"
    return by_triton if name == "triton" else closed_form, chosen


_operator = torch.library.custom_op(
    "moco::contrastive_loss",
    _compute,
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor queue, Tensor[] draws, Tensor? ids, Tensor? queue_ids, float temperature, "
    "SymInt n_hard, str impl, str precision, bool wants_gradient, Tensor? shadow) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_operator.register_fake
def _shapes(q, k, queue, draws, ids, queue_ids, temperature, n_hard, impl, precision, wants_gradient, shadow):
    loss, hardest, mass = (q.new_empty(()) for _ in range(3))
    rank = q.new_empty(q.shape[0], dtype=torch.int64)
    return loss, rank, hardest, mass, q.new_empty(q.shape if wants_gradient else (0,))


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
    return scaled, None, None, ctx.draws, None, None, None, None, None, None, None, None


_operator.register_autograd(_backward, setup_context=_save)


class _Eager(torch.autograd.Function):
    """The operator without torch's dispatch of one written in Python, which is two fifths of what the host does beside
    the launches (benchmarks/speed/host_time.py)."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _compute(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx, *gradients):
        scaled, *others = _backward(ctx, *gradients)
        return scaled, *(None for _ in others)  # of a list's tensors it knows nothing


def _check(q, k, queue, temperature, n_hard, draws, ids, queue_ids) -> None:
    if q.dim() != 2 or k.shape != q.shape or queue.dim() != 2 or queue.shape[1] != q.shape[1] or not len(queue):
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)}, queue {tuple(queue.shape)}: want (N,C) (N,C) (K,C)")
    if temperature <= 0:
        raise ValueError(f"temperature {temperature} is not above 0")
    if (ids is None) != (queue_ids is None):
        raise ValueError("ids and queue_ids come together")
    if draws is not None and (n_hard < 1 or len(draws.slots_a) != len(q)):
        raise ValueError(f"draws for {len(draws.slots_a)} queries and n_hard {n_hard}: want {len(q)} and at least 1")
