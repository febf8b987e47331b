"""Which dictionary of a file holds the encoder, and which of several encoders is taken.

Most projects keep their weights in ``state_dict`` or ``model``. Others have a dictionary for each network, and the one
is taken that the project's own evaluation takes:

    DINO, iBOT, DINOv2   teacher, not student
    BYOL                 the online network, not the target (arXiv 2006.07733, section 3: only its encoder is kept)
    I-JEPA, MSN          target_encoder, not encoder

The same words choose between the prefixes of one dictionary (``teacher.backbone.``, ``student.backbone.``). What is
chosen so is a guess, and :attr:`Nest.others` names the rest for the line that says it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

KNOWN = ("state_dict", "model")  # taken before all others
_DEEPEST = 6
_NO_NETWORK = re.compile(r"optim|sched|scaler|\bamp\b|hyper|callbacks|loops")
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# By the words of a name, the first that fits: the lower the number, the sooner that encoder is taken.
_PREFERENCE = (
    (r"teacher", 0),
    (r"online|query", 1),
    (r"target_encoder", 2),
    (r"student", 4),
    (r"target|momentum|(^|[._])(ema|key|k|swa|avg)([._]|$)", 5),
)
_OTHER = 3
COPY = 5  # of a moving average, which no project above evaluates


class Nest(NamedTuple):
    """A dictionary of tensors in a file."""

    name: str  # such as teacher, or classy_state_dict.base_model; empty for the file itself
    tensors: dict[str, Tensor]  # without the prefixes of wrappers (DDP, torch.compile, FSDP)
    others: tuple[str, ...] = ()  # what is in the file as well with the same names, where one of them was chosen


def preference(name: str) -> int:
    """How soon an encoder of this name is taken, the lowest first."""
    return next((rank for words, rank in _PREFERENCE if re.search(words, name.lower())), _OTHER)


def choose_nest(state: dict, known: Callable[[dict[str, Tensor]], bool]) -> Nest:
    """The dictionary of tensors that the encoder lies in; without tensors where there is none.

    Args:
        known: whether such tensors are of an architecture that is known by their shapes.
    """
    name = next((name for name in KNOWN if isinstance(state.get(name), dict)), "")
    found = list(_nests(state))
    if name and (first := _tensors(state[name])):
        chosen = Nest(name, first)
    elif not found:
        return Nest("", {})
    else:
        most = max(len(nest.tensors) for nest in found)

        def late(nest: Nest) -> tuple[bool, bool, int, int]:
            few = 2 * len(nest.tensors) < most  # a head beside its backbone
            return not known(nest.tensors), few, preference(nest.name), -len(nest.tensors)

        chosen = min(found, key=late)
    return chosen._replace(others=tuple(nest.name for nest in found if _like(nest, chosen)))


def _nests(state: dict, name: str = "", depth: int = 0) -> Iterator[Nest]:
    """All dictionaries with tensors, a network's state by its nature, the outer ones first."""
    if own := _tensors(state):
        yield Nest(name, own)
    for key, value in state.items() if depth < _DEEPEST else ():
        if isinstance(value, dict) and isinstance(key, str) and not _NO_NETWORK.search(key.lower()):
            yield from _nests(value, f"{name}.{key}" if name else key, depth + 1)


def _tensors(state: dict) -> dict[str, Tensor]:
    """The tensors by name; numpy's arrays where there are no tensors at all (weights that came from JAX)."""
    named = {name: value for name, value in state.items() if isinstance(name, str)}
    found = {name: value for name, value in named.items() if isinstance(value, Tensor)}
    found = found or _of_arrays({name: value for name, value in named.items() if _numeric(value)})
    return {_WRAPPER.sub("", name): value for name, value in found.items()}


def _of_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """An array that has several names is copied once."""
    copies = {id(value): torch.from_numpy(value.astype(value.dtype.newbyteorder("="))) for value in arrays.values()}
    return {name: copies[id(value)] for name, value in arrays.items()}


def _numeric(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiub"


def _like(nest: Nest, chosen: Nest) -> bool:
    """Whether two dictionaries are networks of the same kind."""
    common = nest.tensors.keys() & chosen.tensors.keys()
    return nest.name != chosen.name and 2 * len(common) > min(len(nest.tensors), len(chosen.tensors))


def prefixes(names: dict[str, Tensor], signs: tuple[str, ...], but: tuple[str, ...]) -> list[str]:
    """Prefixes under which an encoder may lie, the one to be taken first; moving averages are none.

    Args:
        signs: names that an encoder has, without prefix.
        but: prefixes that are known already.
    """
    ends = tuple(f".{sign}" for sign in signs)
    found = dict.fromkeys(n[: -len(end)] for n in names for end in ends if n.endswith(end))
    return sorted((p for p in found if p not in but and preference(p) < COPY), key=preference)
