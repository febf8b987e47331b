"""When the state of a run is saved, and when not: a state that is not finite never takes the place of a good one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor
from torch.nn.utils import get_total_norm

from moco.errors import tell


class Saver:
    """Writes the checkpoints of a run into its ``folder``; a ``line`` is told to whom the run talks to.

    ``own`` is what :mod:`moco.train.checkpoint` wants to know of it.
    """

    def __init__(self, folder: str = "", line: Callable[[str], None] = tell) -> None:
        self.folder, self.line = folder, line
        self.own: set[str] = set()

    def write(self, state: dict[str, Any], work: Callable[[dict[str, Any]], None]) -> None:
        """``work(state)``, which writes it, unless it is not finite, which is told."""
        if odd := first_not_finite(state):
            self.line(f"not saved, as {odd} is not finite; older checkpoints stay as they are")
            return
        work(state)


def first_not_finite(state: dict[str, Any]) -> str:
    """The name of an entry with NaN or infinity, on any device; empty where there is none. What belongs to a
    ``diverged`` head, which is trained no more, may be anything."""
    named = {name: value for name, value in _tensors(state) if value.is_floating_point() and value.numel()}
    if not named or get_total_norm(named.values(), float("inf")).isfinite():  # one wait for the device
        return ""
    return next(name for name, value in named.items() if not value.isfinite().all())


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict) and not value.get("diverged"):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _tensors(item, f"{name}.{number}")
