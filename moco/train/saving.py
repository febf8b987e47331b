"""When the state of a run is saved, and how; one that is not finite never takes the place of a good one."""

from __future__ import annotations

import copy
import math
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from moco import distributed
from moco.errors import tell
from moco.train.outage import Patience

State = dict[str, Any]


class Saver:
    """Writes the checkpoints of a run into its ``folder``, and knows when the next one is due inside an epoch.

    ``own`` is what :mod:`moco.train.checkpoint` wants to know of it.

    Args:
        line: tells a sentence.
        minutes: since the last save, by the main process's clock, after which the next one is due; None: never.
        steps: the same in steps, which the loop counts in ``steps``.
        beside: write in a thread while the run goes on, from a copy in the host's memory. Two writes are never under
            way; an error of one is raised by the next, or by :meth:`wait`.
        patience: for a disk that is full.
    """

    def __init__(
        self, folder: str = "", line: Callable[[str], None] = tell, minutes: float | None = None,
        steps: int | None = None, beside: bool | None = None, patience: Patience | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.line, self.patience = folder, line, patience or Patience()
        self.seconds = math.inf if minutes is None else 60.0 * minutes
        self.every = math.inf if steps is None else steps
        self.beside = torch.cuda.is_available() if beside is None else beside
        self.own: set[str] = set()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.restart()

    def restart(self) -> None:
        """A save: the next one is due so much later. Every process has to call."""
        self._since, self.steps, self.asked = time.monotonic(), 0, False

    def late(self) -> bool:
        """Whether the time is over, on the main process; it asks the others in :func:`moco.train.stop.outcome`."""
        return distributed.is_main() and time.monotonic() - self._since > self.seconds

    def due(self) -> bool:
        """Whether to save now: on every process the same."""
        return self.asked or self.steps >= self.every

    def write(self, state: State, work: Callable[[State], None], last: bool = False) -> None:
        """``work(state)``, which writes it, unless it is not finite, which is told. In the main process.

        last: return only when it is written.
        """
        self.wait()
        if odd := first_not_finite(state):
            self.line(f"warning: not saved, as {odd} is not finite; older checkpoints stay as they are")
        elif not self.beside:
            self.patience.keep_trying(partial(work, state))
        else:
            copied = on_host(state)
            self._thread = threading.Thread(target=self._work, args=(work, copied), name="checkpoint")
            self._thread.start()
        if last:
            self.wait()

    def wait(self) -> None:
        """Return when the last write has ended; raise its error."""
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, *raised: object) -> None:
        if raised[0] is None:
            self.wait()
            return
        try:  # what has ended the run is what is to be told
            self.wait()
        except Exception as error:
            self.line(f"warning: the last checkpoint was not written: {error}")

    def _work(self, work: Callable[[State], None], state: State) -> None:
        try:
            self.patience.keep_trying(partial(work, state))
        except BaseException as error:
            self._error = error


def on_host(state: State) -> State:
    """The same in memory of its own on the host, what shares memory sharing it again: from a CPU the same file would be
    written of both. From a GPU by way of pinned memory, and all at once."""
    made: dict[tuple, Tensor] = {}

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
            if not value.numel() or key not in made:
                made[key] = _copy(value)
            return made[key].detach()
        if isinstance(value, dict):
            new = copy.copy(value)  # torch's have attributes
            for name, item in value.items():
                new[name] = copied(item)
            return new
        return type(value)(map(copied, value)) if type(value) in (list, tuple) else value

    found = copied(state)
    if any(value.is_pinned() for value in made.values()):
        torch.cuda.synchronize()
    return found


def _copy(value: Tensor) -> Tensor:
    if not value.is_cuda:
        return value.detach().clone()
    return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value.detach(), non_blocking=True)


def first_not_finite(state: State) -> str:
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
