"""Optimizers by name, layer-wise rates, and a rate that follows the score."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from moco.config import OptimizerConfig
from moco.errors import UserError
from moco.models.buffers import put_back
from moco.models.ema import inner_optimizer
from moco.train import optimizer_state


def build_optimizer(config: OptimizerConfig, groups: Any) -> torch.optim.Optimizer:
    """``sgd`` is torch's, as upstream's; every other name is timm's: adamw, lars, lookahead_adamw, lamb and the like.

    Args:
        groups: dictionaries with ``params`` and optionally ``lr`` and ``weight_decay``, or parameters where biases and
            norms are not excluded from weight decay.

    Raises:
        UserError: no such optimizer, or not one with so many betas.
        ValueError: later, when the state of another optimizer is loaded into it.
    """
    optimizer = _named(config, no_decay_for_bias_and_norm(groups) if config.exclude_bias_norm else list(groups))
    inner = inner_optimizer(optimizer)
    inner.register_load_state_dict_pre_hook(_with_own_settings)
    if inner is not optimizer:
        # a fused step can be called off from the device, but only the optimizer that is asked hears of it
        optimizer.defaults = {name: value for name, value in optimizer.defaults.items() if name != "fused"}
    if (limit := config.clip) is not None:
        inner.register_step_pre_hook(lambda stepping, args, kwargs: _clip(stepping, limit))
    return optimizer


def _with_own_settings(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state to load: a file's, if it is one of this optimizer, with the settings of this run in every group."""
    state = optimizer_state.checked(optimizer, state)
    pairs = zip(optimizer.param_groups, state["param_groups"], strict=True)
    names = optimizer_state.OF_THE_RUN
    groups = [{**found, **{name: own[name] for name in names if name in own}} for own, found in pairs]
    return {**state, "param_groups": groups}


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> None:
    trained = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = get_total_norm([p.grad for p in trained])
    clip_grads_with_norm_(trained, limit, torch.nan_to_num(norm, nan=0.0, posinf=0.0))


def _named(config: OptimizerConfig, groups: list[Any]) -> torch.optim.Optimizer:
    name, betas = config.name, config.betas
    if name == "sgd":
        _check_betas(name, betas, 0)
        return torch.optim.SGD(groups, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    import timm.optim

    library: Any = timm.optim  # its __init__ does not say what it exports
    known = [str(word) for word in library.list_optimizers()]
    if name.removeprefix("lookahead_") not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3)) or "sgd, adamw, lars"
        raise UserError(f"--opt {name}: timm has no optimizer of this name; close ones: {close}; or lookahead_NAME.")
    info = library.get_optimizer_info(name.removeprefix("lookahead_"))
    _check_betas(name, betas, info.num_betas if info.has_betas else 0)
    more: dict[str, Any] = {} if betas is None else {"betas": betas}
    more |= {"momentum": config.momentum, "weight_decay": config.weight_decay}
    return library.create_optimizer_v2(groups, name, lr=config.lr, **more)


def _check_betas(name: str, betas: tuple[float, ...] | None, count: int) -> None:
    if betas is not None and len(betas) != count:
        has = f"has {count}" if count else "has none"
        example = "" if name == "adamw" else "; adamw has 2"
        raise UserError(f"--opt-betas gives {len(betas)} numbers and --opt {name} {has}{example}.")


def no_decay_for_bias_and_norm(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, each as two: what has more than one dimension, and vectors without weight decay.

    Vectors are biases and the scales and shifts of norms. timm's LARS, as BYOL's (arXiv 2006.07733) and MoCo v3's, does
    not adapt the rate of what is not decayed.
    """
    made = []
    for group in groups:
        params = list(group["params"])
        made.append({**group, "params": [p for p in params if p.ndim > 1]})
        made.append({**group, "params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0})
    return [group for group in made if group["params"]]


def layer_groups(
    encoder: nn.Module, head: list[Any], lr_head: float, lr_rest: float, weight_decay: float, layer_decay: float
) -> list[dict[str, Any]]:
    """timm's groups for layer-wise rates: each layer's is ``layer_decay`` times that of the layer above it.

    Vectors (biases, norms) and what the network asks for (positions, class token) are not decayed.
    Source: BEiT, arXiv 2106.08254, and timm.optim.param_groups_layer_decay.

    Args:
        encoder: from :func:`moco.models.encoder.build_encoder`.
        head: parameters of the classifier, whose rate is ``lr_head``.
    """
    import timm.optim

    library: Any = timm.optim
    spared = getattr(encoder, "no_weight_decay", set)()
    groups = library.param_groups_layer_decay(
        encoder, weight_decay=weight_decay, no_weight_decay_list=spared, layer_decay=layer_decay
    )
    own, made = {id(p) for p in head}, []
    for group in groups:
        for lr, is_head in ((lr_head, True), (lr_rest, False)):
            params = [p for p in group["params"] if (id(p) in own) == is_head]
            if params:
                made.append({"params": params, "lr": lr * group["lr_scale"], "weight_decay": group["weight_decay"]})
    return made


# ------------------------------------------------------------------------------------- a step that may be called off


_on_device: WeakKeyDictionary[torch.optim.Optimizer, bool] = WeakKeyDictionary()  # is all that a step changes there?


def use_fused_optimizer_step(optimizer: torch.optim.Optimizer) -> None:
    """Use the optimizer's fused form where it has one: few launches, and it takes "not this step" from the device.

    Momentum starts at zeros: fused SGD would leave its first buffer as it found it if the first step were skipped.
    """
    if "fused" not in optimizer.defaults:
        return
    for group in optimizer.param_groups:
        group.update(fused=True, foreach=False)
        for p in group["params"] if group.get("momentum") else ():
            if p.requires_grad and optimizer.state[p].get("momentum_buffer") is None:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def step_unless(bad: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The optimizer's step where ``bad``, () bool, is false; the gradients are unscaled already.

    A fused form is told. On a GPU others take the step, and what it changed is put back where it was bad; the first
    step that happens shows whether that is all. The host asks for that one, and for each of an optimizer that counts
    its steps itself (LAMB, Lookahead): see :func:`waits`.
    """
    if optimizer.param_groups[0].get("fused"):
        _called_off(optimizer, bad.float())
    elif _on_device.get(optimizer):
        restore = _kept(optimizer)
        _called_off(optimizer, bad.float())
        restore(bad)
    elif not bool(bad):
        _observed(optimizer, bad.device)


def _observed(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """A step; on a GPU, whether it changes what lies there and nothing else is kept for the next ones."""
    if device.type == "cpu":
        optimizer.step()
        return
    before = _numbers(optimizer)
    optimizer.step()
    kept = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    there = all(v.device == device for v in kept) and inner_optimizer(optimizer) is optimizer
    counts = any(isinstance(v, Tensor) for group in optimizer.param_groups for v in group.values())  # LAMB does
    _on_device[optimizer] = there and not counts and before == _numbers(optimizer)


def waits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the host must ask before each step, once one has been taken."""
    return not optimizer.param_groups[0].get("fused") and _on_device.get(optimizer) is False


def _called_off(optimizer: Any, found_inf: Tensor) -> None:
    """What GradScaler hands to fused optimizers, and to hooks behind a step."""
    optimizer.grad_scale, optimizer.found_inf = None, found_inf
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf


def _numbers(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What of the groups and of the state is no tensor."""
    states = (state.items() for state in optimizer.state.values())
    kept = [entry for entries in (*(g.items() for g in optimizer.param_groups), *states) for entry in entries]
    return [(name, value) for name, value in kept if name not in ("params", "lr") and not isinstance(value, Tensor)]


@torch.no_grad()
def _kept(optimizer: torch.optim.Optimizer) -> Callable[[Tensor], None]:
    """Remember what a step changes; returns ``restore(bad)``."""
    weights = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    states = [v for p in weights for v in optimizer.state[p].values() if isinstance(v, Tensor)]
    changed = [*weights, *states]
    copies = torch._foreach_mul(changed, 1)  # pyright: ignore[reportPrivateImportUsage]
    return partial(put_back, list(zip(changed, copies, strict=True)))


class Plateau:
    """A factor on the learning rate that drops 10x whenever a score has not risen for more than ``patience`` epochs.

    torch's ReduceLROnPlateau on a rate of 1, so that it combines with any rates; without ``patience`` always 1.

    Args:
        lowest: value of the factor.
        falling: the score is a loss, which is to fall.
    """

    def __init__(self, patience: int | None, lowest: float = 0.0, falling: bool = False) -> None:
        self._rate = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        self._rule = None
        if patience is not None:
            self._rule = torch.optim.lr_scheduler.ReduceLROnPlateau(
                self._rate, "min" if falling else "max", patience=patience, min_lr=lowest
            )

    @property
    def factor(self) -> float:
        return float(self._rate.param_groups[0]["lr"])

    def note(self, score: float) -> None:
        """The score of an epoch that has ended."""
        if self._rule is not None:
            self._rule.step(score)

    def forget(self) -> None:
        """Compare anew: later scores are of another kind than those so far. The factor stays."""
        if self._rule is not None:
            self._rule.best, self._rule.num_bad_epochs = self._rule.mode_worse, 0

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return {} if self._rule is None else {"factor": self.factor, "rule": self._rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._rule is not None and state:
            # the score's past, not all that torch's own loads: patience and floor are this run's
            for name in ("best", "num_bad_epochs", "last_epoch", "_last_lr"):
                setattr(self._rule, name, state["rule"][name])
            self._rate.param_groups[0]["lr"] = state["factor"]
