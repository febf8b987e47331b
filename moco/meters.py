"""What a run says while it runs: meters, the console, log.jsonl, TensorBoard events, Weights & Biases.

Legend: N images, C classes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from moco import checkpoint, distributed
from moco.errors import UserError

X = TypeVar("X")


def accuracy(logits: Tensor, labels: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """For each k, how many labels are among the k largest logits: counts, () int64, so that parts can be added.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        topk: a k above C counts as C.
    """
    highest = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices  # (N, max k), best first
    hits = highest == labels[:, None]
    return [hits[:, :k].sum() for k in topk]


TOP5_FROM = 6  # classes: of fewer every label is among the five largest


def without_top5(classes: int) -> dict[str, dict[str, str]]:
    """What a result says about top-5 accuracies that are null; nothing where they are measured."""
    why = f"100 % by definition: {classes} classes"
    return {"not_measured": {"acc5": why, "val_acc5": why}} if classes < TOP5_FROM else {}


def top5_words(acc5: float | None) -> str:
    """A top-5 accuracy behind a top-1; nothing where it says nothing."""
    return "" if acc5 is None else f" Acc@5 {acc5:.3f}"


class Mean:
    """The mean of numbers that arrive in parts. Tensors are added where they are: a step need not wait for them."""

    def __init__(self) -> None:
        self.total: float | Tensor = 0.0
        self.count = 0

    def add(self, value: float | Tensor, n: int = 1) -> None:
        """``value`` is the mean over ``n`` items."""
        self.total = (value.detach() if isinstance(value, Tensor) else value) * n + self.total
        self.count += n

    @property
    def value(self) -> float:
        """NaN before the first number."""
        return float(self.total) / self.count if self.count else math.nan


class Stopwatch:
    """Images per second since the last restart, and the share of that time that was spent waiting for data.

    ``clock`` returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.restart()

    def restart(self) -> None:
        """Begin to count anew."""
        self._start, self._waited, self._images = self._clock(), 0.0, 0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time in here is waiting for data."""
        start = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - start

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

    def seconds(self) -> float:
        """Since the last restart."""
        return self._clock() - self._start

    def rates(self) -> tuple[float, float]:
        """(images per second, share of the time spent waiting in 0..1)."""
        seconds = max(self.seconds(), 1e-9)
        return self._images / seconds, self._waited / seconds

    def seconds_per_step(self, steps: float) -> float:
        """The mean over ``steps`` steps since the last restart."""
        return self.seconds() / max(steps, 1)


class Parts:
    """Where the time of a step goes, by part, on the device that computes them.

    On a GPU the parts are events in its stream, so that nothing waits for them until :meth:`read`; only steps that
    :meth:`of_a_step` is told to measure are measured. Parts lie beside each other, not in each other.
    """

    def __init__(self, device: torch.device) -> None:
        self._gpu = device.type == "cuda"
        self._on = False
        self._marks: list[tuple[str, Any, Any]] = []
        self._seconds: dict[str, float] = {}
        self._total, self.steps = 0.0, 0

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
        yield
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
            if name:
                self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            else:
                self._total += seconds
                self.steps += 1
        self._marks.clear()

    def take(self) -> dict[str, float]:
        """Seconds a step by part, the longest first, "other" what no part had; begins anew. Empty without a step."""
        found = dict(sorted(self._seconds.items(), key=lambda item: -item[1]))
        if self.steps:
            found["other"] = max(0.0, self._total - sum(found.values()))
        means = {name: seconds / self.steps for name, seconds in found.items()} if self.steps else {}
        self._seconds, self._total, self.steps = {}, 0.0, 0
        return means

    def words(self) -> str:
        """The same as one line, and begins anew."""
        means = self.take()
        total = sum(means.values())
        if not total:
            return "nothing was measured"
        return f"{1e3 * total:.4g} ms, " + ", ".join(f"{n} {100 * s / total:.1f} %" for n, s in means.items())


class RunLog:
    """One run's log: readable lines on the console, numbers as ``NAME.jsonl``, TensorBoard events, and W&B if asked.

    Every process may call it; only the main one writes. To be used in ``with``, or closed. Each record of the file is
    one line of JSON with ``step`` and what :meth:`scalars` was given, written when the call returns; numbers that are
    not finite become null.

    Args:
        save_dir: the run's folder, made if missing.
        tensorboard: also write events into ``save_dir``/tensorboard/NAME.
        wandb: project on Weights & Biases to send the numbers to; a resumed run goes on in its page.
        config: the run's settings: written to NAME_settings.json, and for W&B.
        resume_step: None begins a new log in place of an older one; else the log goes on after this step, and what
            an interrupted run had written beyond it is dropped.
        name: tells apart two kinds of run in one folder.

    Raises:
        UserError: the folder cannot be written, or wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str,
        tensorboard: bool = True,
        wandb: str | None = None,
        *,
        config: dict[str, Any] | None = None,
        resume_step: int | None = None,
        name: str = "log",
    ) -> None:
        self._file: Any = None
        self._events: Any = None
        self._wandb: Any = None
        self._main = distributed.is_main()
        if not self._main:
            return
        path = os.path.join(save_dir, f"{name}.jsonl")
        try:
            os.makedirs(save_dir, exist_ok=True)
            if wandb:
                self._wandb = _wandb_run(wandb, save_dir, name, config, resumed=resume_step is not None)
            checkpoint.write_text("" if resume_step is None else _records_until(path, resume_step), path)
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}); choose another --save-dir.") from error
        if config:
            settings = json.dumps(config, indent=1, default=str)
            checkpoint.write_text(settings + "\n", os.path.join(save_dir, f"{name}_settings.json"))
        if tensorboard:
            first = 0 if resume_step is None else resume_step + 1
            self._events = _event_writer(os.path.join(save_dir, "tensorboard", name), first)

    def line(self, text: str) -> None:
        """One line on the console, above the bar if there is one."""
        if self._main:
            with tqdm.external_write_mode():
                print(text, flush=True)

    def scalars(self, step: int, values: dict[str, float], *, text: str | None = None, **extra: Any) -> None:
        """Record numbers of ``step``: as curves, and with ``extra`` (any JSON values) as one record of the file.

        ``text`` is what a reader of the console gets to see of it.
        """
        if text is not None:
            self.line(text)
        if not self._main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **extra, **finite}) + "\n")
        self._file.flush()
        if self._events is not None:
            for name, value in numbers.items():
                self._events.add_scalar(name, value, step)
            self._events.flush()
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def bar(self, total: int, initial: int = 0, desc: str = "") -> tqdm:
        """A progress bar to use in ``with``; it shows only on the main process's terminal."""
        hidden = not (self._main and sys.stderr.isatty())
        return tqdm(total=total, initial=initial, desc=desc, disable=hidden, leave=False, dynamic_ncols=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish all files; a second call does nothing."""
        for output in (self._file, self._events):
            if output is not None:
                output.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._file = self._events = self._wandb = None


def _records_until(path: str, step: int) -> str:
    """The file's records up to ``step``; a line that a kill cut short is dropped."""
    if not os.path.exists(path):
        return ""
    kept = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                if json.loads(line)["step"] <= step:
                    kept.append(line if line.endswith("\n") else line + "\n")
    return "".join(kept)


def _event_writer(folder: str, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # half a second of imports that other processes do not need

    # TensorBoard hides older events from first_step on: a resumed run's curve does not double back.
    return SummaryWriter(folder, purge_step=first_step)


def _wandb_run(project: str, save_dir: str, name: str, config: dict[str, Any] | None, resumed: bool) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError("--wandb needs the package wandb: run `pip install .[wandb]`.") from error
    path = os.path.join(save_dir, f"{name}.wandb")
    known = None
    if resumed and os.path.isfile(path):
        with open(path, encoding="utf-8") as file:
            known = file.read().strip()
    run = wandb.init(project=project, dir=save_dir, config=config, id=known or None, resume="allow")
    checkpoint.write_text(str(run.id), path)
    return run
