"""The learning-rate range test: one pass in which the rate rises from step to step, and the loss it leads to.

Smith, arXiv 1506.01186, section 3.3, with the rate rising exponentially and the loss smoothed by a running mean. The
head that was swept is spent: nothing of it is kept.
"""

from __future__ import annotations

import math
import os
import textwrap
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

from moco import distributed
from moco.errors import OutageError, TrainingError
from moco.eval.linear import LinearClassifier, ProbeData, write_result
from moco.files import write_csv, write_figure
from moco.pictures.colours import CLASSES, MARKS
from moco.train.runlog import RunLog
from moco.train.timers import Stopwatch

WRONG = MARKS["wrong"].colour
LOWEST_RATE, HIGHEST_RATE = 1e-3, 1e3  # 30 is right for ImageNet features, 0.3 for some small ones
EDGE = 2.0  # a suggestion this close to the end of the rates is told as one at the end
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
        return float(f"{self.lowest()[1]:.2g}")

    def lowest(self) -> tuple[float, float]:
        """The lowest smoothed loss, and its rate."""
        finite = [(loss, rate) for loss, rate in zip(self.smoothed, self.rates, strict=True) if math.isfinite(loss)]
        if not finite:
            raise TrainingError("--lr-find: the loss was not finite at the lowest rate; look at the features.")
        return min(finite)

    @property
    def diverged_at(self) -> float | None:
        """The rate at which higher ones became hopeless, which ended the test; None for a test of all rates."""
        return self.rates[-1] if self.hopeless else None

    def divergence(self) -> str:
        """What happened there."""
        what = f"above {HOPELESS:g} times its lowest" if math.isfinite(self.losses[-1]) else "not finite"
        return f"the loss is {what} at {self.rates[-1]:.2g}"

    def edge(self) -> str | None:
        """Where the suggestion is no lowest point between others: within a factor of EDGE of the "lowest" rate tried or
        of the "highest", or at the "last finite" one."""
        best, low, last = self.lowest()[1], self.rates[0], self.rates[-1]
        if not self.hopeless:
            return "lowest" if best <= EDGE * low else "highest" if best >= last / EDGE else None
        finite = [rate for rate, loss in zip(self.rates, self.losses, strict=True) if math.isfinite(loss)]
        return "lowest" if best <= EDGE * low else "last finite" if best == finite[-1] < last else None

    def warning(self) -> str:
        """What must be known of the suggestion; empty for nothing."""
        found = {
            "lowest": "the loss rose from the lowest rates on, so lower ones may be better: probe with several --lr",
            "highest": "the loss was still falling at the highest rates tried, so its lowest point is not known",
            "last finite": "the loss fell until it was not finite, so a lower rate may be safer: probe with several "
            "--lr",
            None: "",
        }[self.edge()]
        few = f"{self.asked} steps are too few for six powers of ten: give --lr-find-steps {MIN_STEPS} or more"
        return "; ".join(filter(None, [found, few * (self.asked < MIN_STEPS)]))

    def result(self) -> dict[str, Any]:
        """What lr_find.json says."""
        return {"suggestion": self.suggestion(), "steps": len(self.rates), "edge": self.edge(),
                "diverged_at": self.diverged_at, "warning": self.warning()}  # fmt: skip

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
    """A picture of the losses over the rates: the suggestion, the lowest smoothed loss, where the loss diverged and
    the rates above that were not tried, and the warning."""
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    axis.set_xscale("log")
    axis.plot(found.rates, found.losses, color="0.7", linewidth=0.8, label="loss of a step")
    axis.plot(found.rates, found.smoothed, color=CLASSES[0], linewidth=2, label="smoothed")
    low, rate = found.lowest()
    axis.plot(rate, low, "o", color=CLASSES[0], markersize=9, markeredgecolor="black",
              label=f"lowest smoothed loss, {low:.3g}: suggested --lr {found.suggestion():g}")  # fmt: skip
    axis.axvline(rate, color=CLASSES[0], linestyle="--", linewidth=1)
    if found.diverged_at is not None:
        axis.axvline(found.diverged_at, color=WRONG, linestyle=":", linewidth=2, label=found.divergence())
        axis.axvspan(found.diverged_at, HIGHEST_RATE, color="0.93", label="rates that were not tried")
    edge = found.edge()
    if edge:
        axis.axvline(rate, color=WRONG, linewidth=5, alpha=0.5, label=f"close to the {edge} rate that was tried")
    axis.set(xlabel="learning rate", ylabel="training loss", xlim=(LOWEST_RATE / 1.5, HIGHEST_RATE * 1.5))
    bottom = min(loss for loss in found.losses if math.isfinite(loss))
    highest = max(loss for loss in found.smoothed if math.isfinite(loss))
    top = min(highest, max(1.5 * found.smoothed[0], 1.1 * HOPELESS * low))  # what is far above tells nothing
    margin = 0.08 * (top - bottom) or 0.1 * abs(low) or 0.1
    axis.set_ylim(bottom - margin, top + margin)
    figure.suptitle(f"Learning-rate range test: {len(found.rates)} steps", x=0.01, ha="left", fontsize=11)
    if text := found.warning():
        axis.set_title("\n".join(textwrap.wrap(f"warning: {text}", 95)), loc="left", fontsize=9.5, color=WRONG)
    figure.legend(loc="outside lower left", fontsize=9, frameon=False, ncols=2)
    write_figure(figure, path)
