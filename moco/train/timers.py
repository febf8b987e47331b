"""Where the time of training goes: images/s, share of waiting, parts of a step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch

from moco.distributed import pulse

X = TypeVar("X")


class Stopwatch:
    """Images per second since the last restart, and the share of that time that was spent waiting for data."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._start, self._waited, self._images = time.perf_counter(), 0.0, 0
        self.steps = 0  # counted by the caller

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = time.perf_counter()
        pulse.note("waiting for images")
        yield
        pulse.note("a step")
        self._waited += time.perf_counter() - start

    def waiting_for(self, items: Iterable[X]) -> Iterator[X]:
        """The items; the time until each of them is there is waiting for data."""
        left = iter(items)
        while True:
            with self.waiting():
                item = next(left, None)
            if item is None:
                return
            yield item

    def count(self, images: int) -> None:
        """So many images are done."""
        self._images += images

    def rates(self) -> tuple[float, float]:
        """(images per second, share of the time spent waiting in 0..1)."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return self._images / seconds, self._waited / seconds

    def seconds_per_step(self) -> float:
        """The mean over ``steps`` since the last restart."""
        return (time.perf_counter() - self._start) / max(self.steps, 1)


class StepTimer:
    """Where the time of a step goes, by part, on the device that computes them.

    On a GPU the parts are events in its stream, so that nothing waits for them until :meth:`read`; only steps that
    :meth:`of_a_step` is told to measure are measured. Parts lie beside each other, not in each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._on = False
        self._marks: list[tuple[str, Any, Any]] = []
        self._taken, self._told = _Parts(), _Parts()

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time in here belongs to ``name``."""
        begin = self._mark() if self._on else None
        pulse.note(name or "a step")
        yield
        pulse.note("a step")
        if begin is not None:
            self._marks.append((name, begin, self._mark()))

    @contextlib.contextmanager
    def of_a_step(self, measured: bool) -> Iterator[None]:
        """Around one step; with ``measured`` it and its parts count."""
        self._on = measured
        with self(""):
            yield
        self._on = False

    def read(self) -> None:
        """Add what was measured; the device must have finished it."""
        for name, begin, end in self._marks:
            seconds = begin.elapsed_time(end) / 1e3 if self._gpu else end - begin
            self._taken.add(name, seconds)
            self._told.add(name, seconds)
        self._marks.clear()

    def take(self) -> dict[str, float]:
        """Seconds a step by part since the last call, the longest first, "other" what no part had. Empty without a
        step."""
        taken, self._taken = self._taken, _Parts()
        return taken.means()

    def share(self, name: str) -> float:
        """Of a part in the steps since the last :meth:`summary`, 0 to 1."""
        means = self._told.means()
        return means.get(name, 0.0) / max(sum(means.values()), 1e-9)

    def summary(self) -> str:
        """The means since the last call as one line."""
        told, self._told = self._told, _Parts()
        means = told.means()
        total = sum(means.values())
        if not total:
            return "nothing was measured"
        return f"{1e3 * total:.4g} ms, " + ", ".join(f"{n} {100 * s / total:.1f} %" for n, s in means.items())


class _Parts:
    """Seconds of parts of steps, summed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.total, self.steps = 0.0, 0

    def add(self, name: str, seconds: float) -> None:
        """Of a part, or without a name of a whole step."""
        if name:
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        else:
            self.total += seconds
            self.steps += 1

    def means(self) -> dict[str, float]:
        """See :meth:`StepTimer.take`."""
        if not self.steps:
            return {}
        found = dict(sorted(self.seconds.items(), key=lambda item: -item[1]))
        found["other"] = max(0.0, self.total - sum(found.values()))
        return {name: seconds / self.steps for name, seconds in found.items()}
