"""The training loop of pretraining and fine-tuning: epochs, steps, what became of them, and when a run stops.

A step is all or nothing. Whether the loss and the gradients are finite on every process is found on the device, and the
device itself leaves the weights alone and puts back the little that a bad step had already touched. The host reads what
became of the steps later, at the log lines; on a CPU, where reading costs nothing, after every step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from moco import distributed, seeding
from moco.data.loader import AWAY_MARK
from moco.models.base import StepOutput
from moco.train.optimizers import Plateau, step_unless, use_fused_optimizer_step, waits
from moco.train.plan import Progress, TrainPlan
from moco.train.resume import describe_stop
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.train.stop import AWAY, StopRequest, answers, outcome, requests, steps_between_looks
from moco.train.timers import StepTimer, Stopwatch


@dataclass
class Loop(ABC):
    """The objects that a step needs, and the steps.

    A subclass says what it is fed with, what the loss of a batch is and what is reported: the methods of the last
    section. The steps are the same for all.
    """

    model: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: TrainPlan
    progress: Progress
    log: RunLog
    stop: StopRequest
    saver: Saver = field(default_factory=Saver, kw_only=True)

    FALLING = False  # the score that a plateau follows is a loss

    def __post_init__(self) -> None:
        self.device = distributed.device()
        self.wrapped: nn.Module = distributed.wrap(self.model)  # with gradient averaging
        # of the steps since the last look: their position and what puts back where the run was before, and the outcome
        self.pending_flags: list[tuple[tuple[int, Callable[[], None]], Tensor]] = []
        self.look_every = steps_between_looks(self.device, self.plan.print_freq)
        self.timer = StepTimer(self.device)
        self.watch = Stopwatch()
        self.exit_code: int | None = None  # set when the run must stop early
        self.patience = self.saver.patience
        self.patience.save = self.save_once
        self.saved = self.place  # where the run was when it was saved, or began
        self.away = False  # whether the last step was called off as the images of some process were gone
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.scales = [1.0] * len(self.optimizer.param_groups)  # of the plan's rate, by group
        self.plateau = Plateau(self.plan.patience, self.plan.min_lr / self.plan.lr, falling=self.FALLING)
        self.plateau.load_state_dict(self.progress.plateau)
        self.settle_optimizer()

    # ------------------------------------------------------------------------------------------------ an epoch

    def train_on(self, loader: Any, begin: Callable[[], Iterator[dict]]) -> None:
        """:meth:`train_epoch` with the batches that ``begin()`` gives from where the run is, again whenever what the
        ``loader`` (:class:`moco.data.Loader`) needs was gone and is back."""
        self.train_epoch(begin())
        while self.away and self.exit_code is None:
            self.patience.wait(loader.why(), loader.look)
            self.train_epoch(begin())

    @property
    def place(self) -> tuple[int, int]:
        """Where the run is: finished epochs, and batches of the one that is running."""
        return self.progress.epoch, self.progress.batch

    def save_once(self) -> None:
        """:meth:`save`, unless the run is where it was then, or where it began."""
        if self.saved != self.place:
            self.save()

    def finished(self) -> bool:
        """Whether all epochs or steps are done."""
        return self.plan.steps_left(self.progress) <= 0

    def train_epoch(self, batches: Iterator[dict]) -> None:
        """Train to the end of the current epoch, to a step after which the run must stop (see ``exit_code``), or to one
        before which images were ``away`` on some process: as if no step had been tried since."""
        at, plan = self.progress, self.plan
        self.away = False
        self.model.train()
        self.watch.restart()  # what happened between epochs is not training time
        done = -(-at.batch // plan.accum)
        with distributed.pulse.training(), self.log.bar(plan.steps_per_epoch, done, f"epoch {at.epoch}") as bar:
            for number in range(done, plan.steps_per_epoch):
                before = at.batch
                self.step(batches)
                bar.update()
                if self.away:
                    break
                self.after_step(before)
                if number < plan.steps_per_epoch - 1:
                    self._save_inside()
                if self.away or self.exit_code is not None or self.finished():
                    break
            self.sync_outcomes()

    def _save_inside(self) -> None:
        """Save in the middle of an epoch where that is due; it leaves the run as it is."""
        if not self.saver.due() or self.away or self.exit_code is not None or self.finished():
            return
        self.sync_outcomes()
        if self.exit_code is None and not self.away:  # else the end of the run saves
            distributed.pulse.pause("saving")
            self.save()

    # ------------------------------------------------------------------------------------------------- a step

    def step(self, batches: Iterator[dict]) -> None:
        """One optimizer step over ``accum`` batches, fewer where an epoch ends, or nothing at all if anything is not
        finite anywhere."""
        at = self.progress
        looks = (at.step + 1) % self.look_every == 0
        distributed.pulse.begin_step(self.position)
        with self.timer.of_a_step(looks):
            self._step(batches)
        at.step += 1
        at.batch += self.plan.batches_at(at.batch)
        self.watch.steps += 1
        self.saver.steps += 1
        if looks:
            self.sync_outcomes()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, batches: Iterator[dict]) -> None:
        count, position, put_back = self.plan.batches_at(self.progress.batch), self.position, self.remember()
        self._set_rates()
        self.before_step()
        self.last_outputs: list[StepOutput] = []
        away = False
        for number in range(count):
            with self.watch.waiting(), self.timer("waiting for images"):
                batch = next(batches)
            away |= AWAY_MARK in batch
            with self.timer("transfer"):
                here = self.to_device(batch)
            self.last_outputs.append(self._forward_backward(here, number, count))
            self.after_batch(here)
        with self.timer("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            losses = [output.loss.detach() for output in self.last_outputs]
            flags = outcome(losses, norm, requests(self.stop, self.saver.late()), away)
            self.bad = flags[1] > 0  # () was the step not finite?
            self._move(self.bad)
            self.scaler.update()
            self.after_move()
        self.pending_flags.append(((position, put_back), flags))
        self.count(norm)

    def _set_rates(self) -> None:
        plan, done = self.plan, self.plan.done(self.progress)
        lr = plan.lr_at(self.progress.epoch, done)
        # linearly from 0, as in BEiT's fine-tuning (arXiv 2106.08254), whose cosine then spans the rest
        factor = (min(1.0, done / plan.rise) if plan.rise else 1.0) * self.plateau.factor
        for group, scale in zip(self.optimizer.param_groups, self.scales, strict=True):
            group["lr"] = scale * lr * factor

    def _forward_backward(self, here: dict[str, Tensor], number: int, count: int) -> StepOutput:
        """The output of the ``number``-th of ``count`` batches of a step, its gradients added to the others'."""
        at = self.progress
        seeding.seed_step(at.seed, at.draw, distributed.rank())  # dropout, stochastic depth
        with distributed.hold_gradients(self.wrapped, number < count - 1):
            output = self.forward(here)
            with self.timer("q backward"):
                loss = output.loss if count == 1 else output.loss / count
                self.scaler.scale(loss).backward()
        at.draw += 1
        self.watch.count(len(here["index"]) * distributed.world_size())
        return output

    def _move(self, bad: Tensor) -> None:
        """The optimizer's step where ``bad``, () bool, is false."""
        known = waits(self.optimizer)
        step_unless(bad, self.optimizer)
        if waits(self.optimizer) and not known:
            self.log.line(
                "this optimizer counts its steps on the host, which therefore waits for the GPU in every step"
            )

    def sync_outcomes(self) -> None:
        """Read what became of the steps since the last look: the only place where the host waits for the device."""
        if not self.pending_flags:
            return
        distributed.pulse.note("waiting for the device")
        steps, flags = zip(*self.pending_flags, strict=True)
        self.pending_flags.clear()
        found = torch.stack(flags).tolist()
        self.timer.read()
        for (step, put_back), (bad_loss, bad, asked) in zip(steps, found, strict=True):
            code, saves = answers(asked)
            if code is not None:
                self.exit_code = code
                self.log.ended(code, self.stop.reason(code), self._stopped_where())
            self.saver.asked |= saves
            if bad == AWAY:  # and so are all steps after it
                put_back()
                self.away, self.progress.ema_due = True, False  # the key encoder has followed the step before
                return
            self._note_outcome(step, step == steps[-1][0], bool(bad_loss), bool(bad))

    def _stopped_where(self) -> str:
        at, plan = self.progress, self.plan
        done, of = (at.batch, plan.batches) if plan.batches else (at.batch // plan.accum, plan.steps_per_epoch)
        return "" if self.finished() else describe_stop(at.epoch, done, of)

    def remember(self) -> Callable[[], None]:
        """Where the run is before a step; returns what puts back all that the host counts, and the scale of fp16, as if
        this step and those after it, which the device has called off, had not been tried."""
        at = self.progress
        before = at.step, at.batch, at.draw
        fp16: Any = self.scaler
        names = ("_scale", "_growth_tracker") if fp16.is_enabled() else ()
        scale = {name: getattr(fp16, name) for name in names}  # made in the first step
        scale = {name: value if value is None else value.clone() for name, value in scale.items()}

        def put_back() -> None:
            at.step, at.batch, at.draw = before
            vars(fp16).update(scale)

        return put_back

    def _note_outcome(self, step: int, newest: bool, bad_loss: bool, bad: bool) -> None:
        at = self.progress
        at.ema_due = not bad
        if not bad:
            at.bad_steps = 0
        elif self.scaler.is_enabled() and not bad_loss:
            # With fp16 an infinite gradient of a finite loss only means that the scale was too high.
            self.log.line(f"step {step}: fp16 overflow, step skipped, scale now {self.scaler.get_scale():g}")
        else:
            at.bad_steps += 1
            self.note_bad_step(step, newest, bad_loss)

    # ---------------------------------------------------------------------------------- what a subclass decides

    @property
    @abstractmethod
    def position(self) -> int:
        """The number of the next step in the log."""

    @abstractmethod
    def save(self) -> None:
        """Write this state; every process has to call."""

    def settle_optimizer(self) -> None:
        """Choose the optimizer's form on this device."""
        use_fused_optimizer_step(self.optimizer)

    def before_step(self) -> None:  # noqa: B027 (a hook)
        """Called first in a step."""

    @abstractmethod
    def to_device(self, batch: dict) -> dict[str, Tensor]:
        """What of a batch the device needs, ``index`` among it."""

    @abstractmethod
    def forward(self, here: dict[str, Tensor]) -> StepOutput:
        """The loss of a batch."""

    def after_batch(self, here: dict[str, Tensor]) -> None:  # noqa: B027 (a hook)
        """Called after each of a step's batches."""

    def after_move(self) -> None:  # noqa: B027 (a hook)
        """Called after the optimizer's step, which was called off where ``bad``."""

    @abstractmethod
    def count(self, norm: Tensor) -> None:
        """Add ``last_outputs`` and the gradient's norm to what the next report says."""

    @abstractmethod
    def after_step(self, before: int) -> None:
        """Report, if it is due; ``before``: batches of the epoch that were done before the step."""

    @abstractmethod
    def note_bad_step(self, step: int, newest: bool, bad_loss: bool) -> None:
        """The ``step`` was not finite and has changed nothing; ``newest``: ``last_outputs`` are its.

        Raises:
            TrainingError: the run cannot go on.
        """
