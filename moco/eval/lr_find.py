"""The learning-rate range test: one pass in which the rate rises from step to step, and the loss it leads to.

Smith, arXiv 1506.01186, section 3.3, with the rate rising exponentially and the loss smoothed by a running mean. The
head that was swept is spent: nothing of it is kept.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from moco import distributed
from moco.errors import OutageError, TrainingError
from moco.eval.linear import LinearClassifier, ProbeData, write_result
from moco.eval.linear_report import write_csv
from moco.files import write_figure
from moco.train.runlog import RunLog
from moco.train.timers import Stopwatch

LOWEST_RATE, HIGHEST_RATE = 1e-3, 1e3  # 30 is right for ImageNet features, 0.3 for some small ones
MIN_STEPS = 100  # fewer tell too little about six powers of ten
MEAN_KEPT = 0.9  # of the running mean, in each step
HOPELESS = 4.0  # times the lowest smoothed loss: no higher rate will do


@dataclass
class Sweep:
    """A range test, of ``asked`` steps at most: each step's rate, and the loss before it, as it was and smoothed."""

    asked: int
    rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    smoothed: list[float] = field(default_factory=list)

    def add(self, rate: float, loss: float) -> None:
        """One more step."""
        before = self.smoothed[-1] * (1 - MEAN_KEPT ** len(self.losses)) if self.losses else 0.0
        self.rates.append(rate)
        self.losses.append(loss)
        mean = MEAN_KEPT * before + (1 - MEAN_KEPT) * loss
        self.smoothed.append(mean / (1 - MEAN_KEPT ** len(self.losses)))  # without the pull of the zero it began with

    @property
    def hopeless(self) -> bool:
        """Whether higher rates need no trial."""
        return not math.isfinite(self.losses[-1]) or self.smoothed[-1] > HOPELESS * min(self.smoothed)

    def suggestion(self) -> float:
        """The rate at which the smoothed loss was lowest, to two digits.

        Often a tenth of it is advised, for networks that train as a whole. A linear layer whose rate drops 10x twice
        wants the highest rate that still helps: in three trials on frozen features where the rate mattered, the lowest
        point was within a factor of 3 of the best of a grid, and a tenth of it was too low.
        """
        finite = [(loss, rate) for loss, rate in zip(self.smoothed, self.rates, strict=True) if math.isfinite(loss)]
        if not finite:
            raise TrainingError("--lr-find: the loss was not finite at the lowest rate; look at the features.")
        return float(f"{min(finite)[1]:.2g}")

    def edge(self) -> str | None:
        """Where the suggestion is no lowest point between others: at the "lowest" rate tried, or the "highest"."""
        best = min(zip(self.smoothed, self.rates, strict=True))[1]
        return "lowest" if best == self.rates[0] else "highest" if best == self.rates[-1] else None

    def warning(self) -> str:
        """What must be known of the suggestion; empty for nothing."""
        found = {
            "lowest": "the loss rose from the lowest rate on, so lower ones may be better: probe with several --lr",
            "highest": "the loss was still falling at the highest rate tried, so its lowest point is not known",
            None: "",
        }[self.edge()]
        few = f"{self.asked} steps are too few for six powers of ten: give --lr-find-steps {MIN_STEPS} or more"
        return "; ".join(filter(None, [found, few * (self.asked < MIN_STEPS)]))

    def result(self) -> dict[str, Any]:
        """What lr_find.json says."""
        return {"suggestion": self.suggestion(), "steps": len(self.rates), "edge": self.edge(),
                "warning": self.warning()}  # fmt: skip

    def summary(self) -> str:
        """The last line of a range test, after its warning."""
        warning = f"warning: {self.warning()}\n" if self.warning() else ""
        return f"{warning} * lr-find suggests --lr {self.suggestion():g} ({len(self.rates)} steps in lr_find.png)"


def find_rate(
    head: LinearClassifier, data: ProbeData, steps: int | None, result: dict[str, Any], save_dir: str, log: RunLog
) -> None:
    """:func:`sweep`, the log's last line, and lr_find.csv, lr_find.png and lr_find.json in ``save_dir``; ``result``:
    what the last says of the run besides."""
    found = sweep(head, data, steps)
    write_result({**result, **found.result()}, save_dir, "lr_find.json")
    if distributed.is_main():
        rows = zip(found.rates, found.losses, found.smoothed, strict=True)
        table: list[list] = [["step", "lr", "loss", "smoothed"], *([i, *row] for i, row in enumerate(rows))]
        write_csv(os.path.join(save_dir, "lr_find.csv"), table)
        draw_sweep(found, os.path.join(save_dir, "lr_find.png"))
    log.line(found.summary())


def sweep(head: LinearClassifier, data: ProbeData, steps: int | None) -> Sweep:
    """Train the head while its rate rises from LOW to HIGH in ``steps`` steps (None: an epoch, at least MIN_STEPS)."""
    steps = steps or max(len(data.sampler), MIN_STEPS)
    found = Sweep(steps)
    batches = (batch for epoch in count() for batch in data.batches(epoch, Stopwatch()))
    for step, (x, labels, _) in enumerate(islice(batches, steps)):
        head.rate = LOWEST_RATE * (HIGHEST_RATE / LOWEST_RATE) ** (step / (steps - 1))
        loss = head.step(x, labels)[0]
        found.add(head.rate, float(distributed.mean_over_ranks(loss)))
        if found.hopeless:
            break
    if why := distributed.any_text("" if data.loader is None else data.loader.why()):
        raise OutageError(f"{why}: nothing was measured, try again")
    return found


def draw_sweep(found: Sweep, path: str) -> None:
    """A picture of the losses over the rates."""
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    figure = Figure(figsize=(7, 5))
    axis = figure.subplots()
    axis.plot(found.rates, found.losses, linewidth=0.7, alpha=0.5, label="loss")
    axis.plot(found.rates, found.smoothed, label="smoothed")
    axis.axvline(found.suggestion(), linestyle="--", label=f"suggested: {found.suggestion():g}")
    low, start = min(found.smoothed), found.smoothed[0]
    axis.set(xscale="log", xlabel="learning rate", ylabel="training loss", ylim=(0.9 * low, 1.5 * start))
    axis.legend()
    write_figure(figure, path)
