"""What a reader of the console need not see all the time, and the last line of a run: what was reached, what stopped
it, what to type next."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

_ACCURACY = re.compile(r"(?:val|test)_acc1(?:/.*)?")  # of a probe of several rates one each


SLOW_LOADER = 0.2  # share of a step that waits for images, above which times are told at once


class Told:
    """Which lines of a pretraining are told: each of a loss, and at most one of times and one of a file after it."""

    def __init__(self) -> None:
        self._times = self._saved = self._due = self._slow = False

    def report(self) -> None:
        """A loss was told."""
        self._times = self._saved = True

    def times(self, epochs: int, waiting: float, last: bool) -> bool:
        """Whether to tell of times after so many epochs: 1, 2, 4, 8, ..., every tenth and the last, and as soon as the
        share of ``waiting`` for images is above SLOW_LOADER."""
        slow = waiting > SLOW_LOADER
        self._due |= last or epochs & (epochs - 1) == 0 or epochs % 10 == 0 or (slow and not self._slow)
        told = self._due and self._times
        if told:
            self._times, self._due, self._slow = False, False, slow
        return told

    def saved(self, last: bool) -> bool:
        """Whether to tell of a file."""
        told, self._saved = last or self._saved, False
        return told


class _Figure(NamedTuple):
    value: float
    epoch: int


class Reached:
    """The newest and the best figures of a log's records, for people."""

    def __init__(self) -> None:
        self._last: dict[str, _Figure] = {}
        self._best: dict[str, _Figure] = {}
        self._step: Mapping[str, Any] = {}

    def note(self, record: Mapping[str, Any]) -> None:
        """Look at a record of the log; one that is damaged says nothing."""
        self._step = record if _number(record.get("images_per_second")) else self._step
        found = {"k-NN": record.get("knn"), "loss": record.get("loss_ratio")}
        found["Acc@1"] = max((v for n, v in record.items() if _ACCURACY.fullmatch(n) and _number(v)), default=None)
        for name, value in found.items():
            if value is not None and _number(value):
                figure = _Figure(value, int(record.get("epoch") or 0))
                self._last[name] = figure
                self._best[name] = max(self._best.get(name, figure), figure, key=lambda of: of.value)

    def now(self) -> str:
        """For the end of a bar: "loss 6.2812, k-NN 94.60 %, 480 images/s"."""
        said = [f"loss {self._step['loss']:.4f}"] if _number(self._step.get("loss")) else []
        said += [f"{name} {self._last[name].value:.2f} %" for name in ("k-NN", "Acc@1") if name in self._last]
        said += [f"{self._step['images_per_second']:.0f} images/s"] if self._step else []
        return ", ".join(said)

    def text(self) -> str:
        """Such as "k-NN 94.60 % (best 94.90 % in epoch 13), loss 0.553 of chance"; empty where nothing is known."""
        said = []
        for name in ("k-NN", "Acc@1"):
            if name in self._last:
                last, best = self._last[name], self._best[name]
                more = f" (best {best.value:.2f} % in epoch {best.epoch})" if best.value > last.value else ""
                said.append(f"{name} {last.value:.2f} %{more}")
        if "loss" in self._last:
            said.append(f"loss {self._last['loss'].value:.3f} of chance")
        return ", ".join(said)


def last_line(reached: str, reason: str, place: str, following: str) -> str:
    """The end of a run.

    Args:
        reached: :meth:`Reached.text`.
        reason: "finished", "max-minutes" or "signal NAME".
        place: where it was stopped, "after 3 of 31 steps of epoch 4"; empty where nothing was left to do.
        following: the command to type next; empty where none is known.
    """
    if reason == "finished":
        return f"finished{': ' * bool(reached)}{reached}" + f"; next: {following}" * bool(following)
    why = f"--{reason}" if reason == "max-minutes" else reason.removeprefix("signal ")
    where = place or "after the last step"
    return f"stopped {where} by {why}{': ' * bool(reached)}{reached}; continue with {following or '--resume auto'}"


def _number(value: Any) -> bool:
    return type(value) in (int, float)
