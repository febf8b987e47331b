"""Why a run ends before it is done: a signal, a time limit, or numbers that are not finite; and what processes ask of
each other after a step."""

from __future__ import annotations

import math
import signal
import time

import torch
from torch import Tensor

from moco import distributed, owner, signals

LOOK_STEPS = 10  # the host never runs further ahead: a signal is answered after so many steps at most


def steps_between_looks(device: torch.device, print_freq: int = LOOK_STEPS) -> int:
    """Steps after which the host asks the device what became of them; on a CPU, where asking costs nothing, 1."""
    return 1 if device.type == "cpu" else min(print_freq, LOOK_STEPS)


class StopRequest:
    """Signals and a time limit, all answered by finishing the step, saving and leaving.

    The exit code is that of :data:`moco.signals.CODES`, the largest of several; at the time limit that of SIGUSR1.
    """

    def __init__(self, max_minutes: float | None):
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes

    def asked(self) -> int:
        """1 + the exit code with which this process wants to stop, 0 to go on. From the first call on, after a first
        step, signals wait for the next one."""
        signals.hold()
        code = signals.code()
        late = time.monotonic() > self.deadline or owner.lost()  # the latter's sentence comes with the save
        if code is None:
            return 1 + signals.CODES[signal.SIGUSR1] if late else 0
        return 1 + code

    def exit_code(self) -> int | None:
        """With which every process must stop now, because of any of them; None to go on. Every process has to call."""
        return self.look(False)[0]

    def reason(self, code: int) -> str:
        """Why a run stops with this exit code of :meth:`exit_code`: "max-minutes" or "signal NAME"; the signal may have
        come to another process."""
        names = [signal.Signals(number).name for number, other in signals.CODES.items() if other == code]
        if names != ["SIGUSR1"]:
            return f"signal {names[0]}"
        late = time.monotonic() > self.deadline and signal.SIGUSR1 not in signals.noted()
        return "max-minutes" if late else "signal SIGUSR1"

    def look(self, gone: bool) -> tuple[int | None, bool]:
        """:meth:`exit_code`, and whether something is ``gone`` on any process."""
        asked, anywhere = distributed.largest(self.asked() * 2, int(gone))
        return answers(asked)[0], bool(anywhere)


def requests(stop: StopRequest, late: bool) -> int:
    """What this process asks all for after a step, as one number, of which the largest counts; ``late``: to save
    (:meth:`moco.train.saving.Saver.late`)."""
    return 2 * stop.asked() + late


def answers(requested: int) -> tuple[int | None, bool]:
    """The exit code with which to stop now, None to go on, and whether to save, of the largest of :func:`requests`; a
    run that stops is saved anyway."""
    asked, saves = divmod(requested, 2)
    return (asked - 1 if asked else None), bool(saves)


AWAY = 2  # in the first two places of an outcome: images or a loader's process were gone, and the step was of none


def outcome(losses: list[Tensor], norm: Tensor, requested: int, away: bool = False) -> Tensor:
    """(3,) int32, in one small reduction: on any process, is a loss not finite, is anything, and the largest
    of :func:`requests`. The host does not wait for it. The first two are AWAY where on any process the images were."""
    values = torch.stack([*losses, norm])
    odd = (values - values).ne(0)  # inf - inf is no number; isfinite would be four launches
    asked = odd.new_full((), requested, dtype=torch.int32)  # filled in, not copied from the host
    found = torch.stack([odd[:-1].any().int(), odd.any().int(), asked])
    if away:
        found[:2] = AWAY
    return distributed.max_over_ranks(found)
