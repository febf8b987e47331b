"""What may be loaded into an optimizer: torch loads the state of any other with as many parameters, and a fused step
then reads and writes beside its tensors.

What an optimizer keeps is found by a step of a copy of it on parameters of the same shapes, so that no list of
optimizers is needed.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

# Settings of this run that a resumed one uses, not the file's; its rate is set at every step.
OF_THE_RUN = ("weight_decay", "momentum", "betas")
# What tells apart optimizers whose groups have the same names, such as Adam and AdamW.
_OF_A_KIND = ("decoupled_weight_decay", "nesterov", "amsgrad")
# What versions of torch and schedulers add to a group; it does not say which optimizer it is.
_OF_ANY = {
    "params", "param_names", "initial_lr", "foreach", "fused", "maximize", "differentiable", "capturable",
    "decoupled_weight_decay",
}  # fmt: skip
_FORMS = ("foreach", "fused", "capturable", "differentiable")  # how a step is computed
_PARTS = {"state": dict, "param_groups": list}
_MOST_STEPS = 1 << 40


def checked(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """A file's state of this optimizer, its tensors in the memory layout of their parameters.

    Raises:
        ValueError: of another optimizer, of parameters of other shapes, or with values that no step leaves behind.
    """
    if not isinstance(state, dict) or not all(isinstance(state.get(name), kind) for name, kind in _PARTS.items()):
        raise ValueError("it has no state of an optimizer")
    groups, by_number = state["param_groups"], state["state"]
    if len(groups) != len(optimizer.param_groups):
        raise ValueError(
            "its weights are in other groups: --exclude-bias-norm or --layer-decay was given there and not here, or "
            "here and not there; give the same"
        )
    made = _after_a_step(optimizer)
    for own, stepped, found in zip(optimizer.param_groups, made.param_groups, groups, strict=True):
        _check_group(own, stepped, found)
    numbers = [number for group in groups for number in group["params"]]
    if len(set(numbers)) < len(numbers) or not set(by_number) <= set(numbers):
        raise ValueError("its parameters are not numbered as an optimizer numbers them")
    weights = zip(numbers, _weights(optimizer, made), strict=True)
    held = {number: (p, like, by_number[number]) for number, (p, like) in weights if number in by_number}
    _check_names(list(held.values()))
    return {**state, "state": {number: _entries(*entry) for number, entry in held.items()}}


def kept(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state for a file, with one more entry: ``kept``, of how many weights there is something, without
    which one that is lost looks like one that never got a gradient."""
    state = optimizer.state_dict()
    return {**state, "kept": len(state["state"])}


def finite(state: Any) -> Any:
    """The same state; only that of a classifier that has diverged, which is trained no more, may be another.

    Raises:
        ValueError: a tensor in it holds NaN or infinity.
    """
    found = state.get("state") if isinstance(state, dict) else None
    for entries in found.values() if isinstance(found, dict) else ():
        for name, value in entries.items() if isinstance(entries, dict) else ():
            plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type != "meta"
            if plain and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name} holds NaN or infinity, which no step leaves behind")
    return state


def _after_a_step(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same optimizer after a step on a parameter of each shape, without hooks."""
    made = copy.copy(optimizer)
    made.state = defaultdict(dict)
    made.param_groups = [{**group, "params": _of_each_shape(group["params"])} for group in optimizer.param_groups]
    with contextlib.suppress(Exception), torch.random.fork_rng(devices=[]):
        made.step()  # fails where a step needs more, such as second derivatives: what it keeps is then not known
    return made


def _weights(optimizer: torch.optim.Optimizer, made: torch.optim.Optimizer) -> list[tuple[Tensor, dict[str, Any]]]:
    """Each parameter, and what is kept of one of its shape in its group; nothing where that is not known."""
    found = []
    for group, stepped in zip(optimizer.param_groups, made.param_groups, strict=True):
        by_shape = {p.shape: made.state.get(p) for p in stepped["params"]}
        found += [(p, by_shape[p.shape] or optimizer.state.get(p) or {}) for p in group["params"]]
    return found


def _of_each_shape(weights: list[Tensor]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros_like(p)) for p in {p.shape: p for p in weights}.values()]
    for p in made:
        p.grad = torch.ones_like(p)
    return made


# -------------------------------------------------------------------------------------------------- a group


def _check_group(own: dict[str, Any], stepped: dict[str, Any], found: Any) -> None:
    if not isinstance(found, dict) or not isinstance(found.get("params"), list):
        raise ValueError("it has no groups of an optimizer")
    others = [name for name in _OF_A_KIND if name in own and name in found and own[name] != found[name]]
    if (set(stepped) ^ set(found)) - _OF_ANY - (set(stepped) - set(own)) or others:
        raise ValueError("it was written with another --opt; give that one")
    if len(found["params"]) != len(own["params"]) or not all(type(number) is int for number in found["params"]):
        raise ValueError("its groups have other parameters")
    for name, value in found.items():
        if name in stepped and name != "params" and (wrong := _wrong_setting(name, value, own, stepped)):
            raise ValueError(f"{name} of its groups is {_shown(value)}{wrong}")


def _wrong_setting(name: str, value: Any, own: dict[str, Any], stepped: dict[str, Any]) -> str:
    if name in _FORMS:
        return "" if value is None or isinstance(value, bool) else ", not on or off"
    if name not in own or name in ("step", "lookahead_step"):  # what the optimizer itself counts, in the group
        return "" if _is_count(value) else ", not a number of steps"
    if name in (*OF_THE_RUN, "lr", "initial_lr"):
        return "" if _numbers(value) else ", not a finite number"
    return "" if _same(stepped[name], value) else f" and this run's is {_shown(stepped[name])}"


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        one, other = (x.tolist() if isinstance(x, Tensor) else x for x in (one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def _numbers(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return bool(value) and all(map(_numbers, value))
    number = _number(value)
    return value is None or (number is not None and math.isfinite(number))


def _number(value: Any) -> float | None:
    """Of a number or a tensor of one; None of anything else."""
    if isinstance(value, Tensor):
        plain = value.numel() == 1 and value.layout == torch.strided and value.device.type != "meta"
        value = value.item() if plain and not value.is_quantized else None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _is_count(value: Any) -> bool:
    number = _number(value)
    return number is not None and 0 <= number <= _MOST_STEPS and number.is_integer()


def _shown(value: Any) -> str:
    return repr(value)[:40] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------- a parameter


Held = tuple[Tensor, dict[str, Any], Any]  # a parameter, what is kept of one of its shape, and what a file has


def _check_names(held: list[Held]) -> None:
    """Each parameter with a state has all of it, except what an optimizer begins by itself: momentum that was off."""
    if not all(isinstance(entries, dict) for _, _, entries in held):
        raise ValueError("what it keeps of a weight is no dictionary")
    kinds: dict[str, set[type]] = defaultdict(set)
    for name, value in (entry for _, _, entries in held for entry in entries.items()):
        kinds[name].add(type(value))
    if mixed := [name for name, found in kinds.items() if len(found) > 1]:
        raise ValueError(f"{mixed[0]} is of several types")
    for p, like, entries in held:
        lost = [name for name in like if name not in entries and (name != "momentum_buffer" or name in kinds)]
        if lost:
            raise ValueError(f"it lacks {lost[0]} of a weight of shape {tuple(p.shape)}")


def _entries(p: Tensor, like: dict[str, Any], entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a parameter, in its memory layout: a fused step reads both in the order of the memory."""
    made = {}
    for name, value in entries.items():
        if value is None and name == "momentum_buffer":
            continue  # as older versions of torch write it where momentum is off
        if not _fits(name, value, like[name] if name in like else _unknown(p, value), p):
            has = f"of shape {tuple(value.shape)}, {value.dtype}" if isinstance(value, Tensor) else _shown(value)
            raise ValueError(f"{name} of a weight of shape {tuple(p.shape)} is {has}, which no step leaves behind")
        if isinstance(value, Tensor) and value.shape == p.shape and value.stride() != p.stride():
            value = torch.empty_like(p, dtype=value.dtype, device=value.device).copy_(value)
        made[name] = value
    return made


def _unknown(p: Tensor, value: Any) -> Any:
    """What an entry must be like that a first step does not make: such as its weight, or a number."""
    return p.detach() if isinstance(value, Tensor) else 0.0


def _fits(name: str, value: Any, like: Any, p: Tensor) -> bool:
    if name == "step" or (_number(like) is not None and not (isinstance(like, Tensor) and like.shape == p.shape)):
        number = _number(value)
        return _is_count(value) if name == "step" else number is not None and math.isfinite(number)
    if isinstance(like, Tensor):
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type == "meta":
            return False
        return value.shape == like.shape and value.dtype == like.dtype
    if isinstance(like, (list, tuple)):
        alike = isinstance(value, (list, tuple)) and len(value) == len(like)
        return alike and all(_fits("", *pair, p) for pair in zip(value, like, strict=True))
    return type(value) is type(like)
