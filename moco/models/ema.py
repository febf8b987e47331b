"""Exponential moving averages of a network, which a GPU may call off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def inner_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer that steps: timm's Lookahead has another one inside, and no hooks of its own."""
    return getattr(optimizer, "_base_optimizer", optimizer)


def attach_ema(
    model: nn.Module, optimizer: torch.optim.Optimizer, decay: float | None, decay_epoch: float | None, steps: int
) -> nn.Module:
    """Give ``model`` a moving average of its ``encoder_q`` that moves after every step, ``encoder_ema``; returns the
    encoder to evaluate, which is the average where there is one.

    As a part of the model it is in every checkpoint and resumes with it; no optimizer has it. Readers of checkpoints
    take it before ``encoder_q``.

    Args:
        decay: share of itself that the average keeps at a step.
        decay_epoch: the same for an epoch of ``steps`` steps.
    """
    encoder: nn.Module = model.encoder_q  # type: ignore[assignment]
    average = moving_average(encoder, decay, decay_epoch, steps)
    if average is None:
        return encoder
    model.encoder_ema = average.module.requires_grad_(False)

    def move(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        update_unless(getattr(stepped, "found_inf", None), average, encoder)  # without: a step that did happen

    inner_optimizer(optimizer).register_step_post_hook(move)
    return average.module


def moving_average(network: nn.Module, decay: float | None, decay_epoch: float | None, steps: int) -> Any:
    """timm's moving average of a network's weights and statistics, or None; arguments as in :func:`attach_ema`.

    A decay of an epoch is SupCon-Framework's form: the step's is its ``steps``-th root.
    """
    if decay_epoch is not None:
        decay = decay_epoch ** (1 / steps)
    if decay is None:
        return None
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(network, decay)


def update_unless(called_off: Tensor | None, average: Any, network: nn.Module) -> None:
    """The moving average's step, but not where ``called_off``, () float, is 1: a GPU decides that itself."""
    if called_off is not None and called_off.device.type != "cpu":
        _update_where(called_off, average, network)
    elif called_off is None or not bool(called_off):
        average.update(network)


def _update_where(called_off: Tensor, average: Any, network: nn.Module) -> None:
    pairs = list(zip(average.module.state_dict().values(), network.state_dict().values(), strict=True))
    means, counts = ([pair for pair in pairs if pair[0].is_floating_point() == real] for real in (True, False))
    lerp_unless(called_off, [mean for mean, _ in means], [own for _, own in means], 1.0 - average.decay)
    _copy_unless(called_off, [count for count, _ in counts], [own for _, own in counts])


@torch.no_grad()
def lerp_unless(called_off: Tensor, k: list[Tensor], q: list[Tensor], weight: float) -> None:
    """k <- k + weight (q - k) in one pass over all tensors, but not where ``called_off``, () float32, is 1; the host
    does not ask. With a weight below .5 these are lerp's own operations."""
    alike, odd = fused_groups(k, q, called_off.device)
    for group in alike:
        # SGD with the weight as its rate. Its `maximize` has had another meaning with decay in earlier versions of
        # torch, so both signs are in the numbers.
        torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage, reportCallIssue]
            *group, [], weight_decay=-1.0, momentum=0.0, lr=-weight, dampening=0.0, nesterov=False, maximize=False,
            is_first_step=False, grad_scale=None, found_inf=called_off,
        )  # fmt: skip
    if odd[0]:
        # The weight of foreach_lerp is a number of the host's; chosen, not multiplied: a step that is called off may
        # hold NaN.
        for a, b in zip(*odd, strict=True):
            step = b.to(a.device, a.dtype) - a
            a.copy_(torch.where(called_off.bool().to(a.device), a, a + weight * step))


@torch.no_grad()
def _copy_unless(called_off: Tensor, to: list[Tensor], numbers: list[Tensor]) -> None:
    """The same with weight 1 for whole numbers, exactly."""
    if to and all(x.dtype == torch.int64 for x in to):  # BatchNorm's counters: three launches for all
        step = torch._foreach_sub(numbers, to)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_mul_(step, called_off.eq(0).long())  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(to, step)  # pyright: ignore[reportPrivateImportUsage]
        return
    for old, new in zip(to, numbers, strict=True):
        old.copy_(torch.where(called_off.bool(), old, new))


Lists = tuple[list[Tensor], list[Tensor]]


def fused_groups(k: list[Tensor], q: list[Tensor], device: torch.device) -> tuple[list[Lists], Lists]:
    """Pairs that a fused operator on ``device`` takes together, by dtype, and the pairs that none takes."""
    groups: dict[torch.dtype, Lists] = {}
    odd: Lists = [], []
    for a, b in zip(k, q, strict=True):
        fits = a.device == b.device == device and a.dtype == b.dtype and a.stride() == b.stride()
        group = groups.setdefault(a.dtype, ([], [])) if fits and a.is_floating_point() else odd
        group[0].append(a)
        group[1].append(b)
    return list(groups.values()), odd
