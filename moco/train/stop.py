"""Why a run ends before it is done: a signal, a time limit, or numbers that are not finite."""

from __future__ import annotations

import math
import signal
import threading
import time
from typing import Any

import torch
from torch import Tensor

from moco import distributed
from moco.errors import SIGTERM_EXIT

LOOK_STEPS = 10  # the host never runs further ahead: a signal is answered after so many steps at most


def steps_between_looks(device: torch.device, print_freq: int = LOOK_STEPS) -> int:
    """Steps after which the host asks the device what became of them; on a CPU, where asking costs nothing, 1."""
    return 1 if device.type == "cpu" else min(print_freq, LOOK_STEPS)


class StopRequest:
    """SIGTERM, SIGUSR1 and a time limit, all answered by finishing the step, saving and leaving.

    Exit code 143 after SIGTERM, 0 after SIGUSR1 (a scheduler's early warning) and at the time limit.
    """

    def __init__(self, max_minutes: float | None):
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.terminated = self.asked = False
        if threading.current_thread() is threading.main_thread():  # only it may set handlers
            signal.signal(signal.SIGTERM, self._on_signal)
            signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.terminated |= number == signal.SIGTERM
        self.asked = True

    def flags(self) -> tuple[bool, bool]:
        """(SIGTERM seen, any reason to stop) on this process."""
        return self.terminated, self.asked or time.monotonic() > self.deadline

    def exit_code(self) -> int | None:
        """With which every process must stop now, because of any of them; None to go on. Every process has to call."""
        terminated, ends = distributed.any_rank(*self.flags())
        return None if not ends else SIGTERM_EXIT if terminated else 0


def outcome(losses: list[Tensor], norm: Tensor, stop: StopRequest) -> Tensor:
    """(4,) int32, in one small reduction: on any process, is a loss not finite, is anything, was SIGTERM seen, is this
    step to be the last? The host does not wait for it."""
    values = torch.stack([*losses, norm])
    odd = (values - values).ne(0)  # inf - inf is no number; isfinite would be four launches
    asked = [odd.new_full((), flag) for flag in stop.flags()]  # filled in, not copied from the host
    return distributed.max_over_ranks(torch.stack([odd[:-1].any(), odd.any(), *asked]).int())
