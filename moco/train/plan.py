"""How long and how fast to train, and where a run is: schedules as pure functions, one plan, one progress."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch

from moco.config import ScheduleConfig
from moco.data import EpochSampler
from moco.errors import UserError


def learning_rate(
    base: float,
    progress: float,
    total: float,
    *,
    cosine: bool,
    milestones: Sequence[int],
    decay: float = 0.1,
    floor: float = 0.0,
) -> float:
    """The rate at ``progress`` out of ``total`` (both in epochs, or both in steps).

    Cosine: floor + (base - floor) * (1 + cos(pi * progress / total)) / 2, without warm-up (SGDR, arXiv 1608.03983,
    eq. 5; MoCo v2 has floor 0 and one value an epoch). Otherwise ``decay`` times the rate at each milestone, in the
    same unit as ``progress``.
    """
    if cosine:
        return floor + (base - floor) * 0.5 * (1.0 + math.cos(math.pi * progress / total))
    return base * decay ** sum(progress >= m for m in milestones)


@dataclass(frozen=True)
class TrainPlan(ScheduleConfig):
    """How long and how to train: a schedule whose epochs have a length."""

    steps_per_epoch: int = 1
    total_steps: int = 0  # ends a run that counts steps, also inside an epoch
    batches: int = 0  # of an epoch, where rates go by epochs done with their fraction; 0: by steps, of accum batches
    amp: torch.dtype | None = None

    def lr_at(self, epoch: int, done: float) -> float:
        """The learning rate in an ``epoch`` once so many steps are ``done``, or epochs where they are counted. It moves
        every epoch, and every step where the plan has ``steps`` or a rise.

        :func:`learning_rate`, but SupContrast's warm-up while that lasts: a line from ``warm_from`` to where the cosine
        is then, and without a cosine to the full rate. A milestone that lies inside it lowers the rate once it is over
        (warmup_to of main_supcon.py, which knows no milestones).
        """
        per_epoch, last = (1, self.epochs) if self.batches else (self.steps_per_epoch, self.total_steps)
        progress, total = (done, last) if self.steps or self.rise else (epoch, self.epochs)
        if self.cosine:
            progress, total = max(0.0, progress - self.rise), total - self.rise
        rate = partial(learning_rate, self.lr, total=total, cosine=self.cosine, decay=self.decay, floor=self.min_lr)
        warm = self.warm_steps or self.warm_epochs * per_epoch
        if done >= warm:
            return rate(progress, milestones=self.milestones)
        top = rate(warm if self.steps else warm // per_epoch, milestones=())
        return self.warm_from + (top - self.warm_from) * done / warm

    def as_shares(self, highest: float) -> TrainPlan:
        """The same for rates that are shares of a group's own, of which ``highest`` is the highest."""
        return replace(self, lr=1.0, min_lr=self.min_lr / highest, warm_from=self.warm_from / highest)

    def done(self, at: Progress) -> float:
        """How far a run is: steps, or epochs with their fraction."""
        return at.epoch + at.batch / self.batches if self.batches else at.step

    def batches_at(self, batch: int) -> int:
        """Of the step that begins after so many batches of an epoch: accum, or fewer where the epoch ends."""
        return min(self.accum, self.batches - batch) if self.batches else self.accum

    def changed_before(self, end: int) -> bool:
        """Whether a step from which the loss is another lies in the epoch that ended with step ``end``, or inside the
        one before it, whose mean is then of both losses."""
        return any(end - 2 * self.steps_per_epoch < step < end for step in self.change_steps)

    def steps_left(self, at: Progress) -> int:
        """Steps until the run ends. Epochs are counted in epochs: a resumed run may have longer or shorter ones."""
        if self.steps:
            return self.total_steps - at.step
        return (self.epochs - at.epoch) * self.steps_per_epoch - at.batch // self.accum


def make_plan(batches: int, amp: torch.dtype | None, config: ScheduleConfig) -> TrainPlan:
    """The plan of a run whose epochs have so many ``batches``, for so many epochs or, where given, steps;
    the config's rise is in epochs, the plan's in steps.

    Raises:
        UserError: an epoch holds no step, or the warm-up never ends.
    """
    per_epoch, steps = batches // config.accum, config.steps
    if not per_epoch:
        raise UserError(f"--accum {config.accum} is more than the {batches} batches of an epoch: lower it.")
    last, total = -(-steps // per_epoch) if steps else config.epochs, steps or config.epochs * per_epoch
    rise = config.rise * per_epoch
    if rise >= total:
        raise UserError(f"--rise-epochs must end before the run's {total} steps do, {total / per_epoch:g} epochs.")
    if config.warm_steps >= total:
        raise UserError(f"--warm-steps {config.warm_steps} must end before the run's {total} steps do.")
    own = vars(replace(config, epochs=last, rise=rise))
    return TrainPlan(**own, steps_per_epoch=per_epoch, total_steps=total, amp=amp)


def count_epochs(batches: int, config: ScheduleConfig) -> TrainPlan:
    """The plan of a run that counts epochs of so many ``batches``, the last step of each over what is left of them."""
    steps = -(-batches // config.accum)
    return TrainPlan(**vars(config), steps_per_epoch=steps, total_steps=config.epochs * steps, batches=batches)


@dataclass
class Progress:
    """Where a run is. Everything here is in the checkpoint, so that a resumed run continues exactly here."""

    seed: int
    epoch: int = 0  # finished epochs, with their evaluation
    batch: int = 0  # loader batches done in the epoch that is running
    step: int = 0  # optimizer steps tried since the start, bad ones included
    draw: int = 0  # batches since the start; keys the random draws
    ema_due: bool = True  # the key encoder has not yet followed the last optimizer step
    bad_steps: int = 0  # non-finite steps in a row
    bad_images: dict = field(default_factory=lambda: {"seen": []})
    plateau: dict = field(default_factory=dict)  # of the Plateau, where there is one
    losses: list = field(default_factory=list)  # a process each: [sum, count] of the epoch that is running, for it
    best_acc1: float = 0.0  # percent, on the images that each epoch is evaluated on
    best_epoch: int = 0  # finished epochs when it was reached

    @classmethod
    def resumed(cls, entries: dict, seed: int, batches: dict[str, int], plan: TrainPlan) -> Progress:
        """From ``run`` of our checkpoints; from the epoch alone for a run that begins, and for upstream's files, which
        have no ``run``.

        Args:
            entries: what :func:`moco.train.checkpoint.unpack` returned, or the finished epochs as ``epoch``.
            seed: of this run, where the entries have none.
            batches: what decides which images a batch holds (:func:`batch_shape`).
            plan: this run's.

        Raises:
            UserError: the file was written inside an epoch with other batches, so "the rest of it" has no meaning.
        """
        epoch, batch = entries["epoch"], entries.get("batch", 0)
        if "step" not in entries:
            steps = epoch * plan.steps_per_epoch
            return cls(seed, epoch, 0, steps, steps * plan.accum)
        if batch:
            check_batches("the checkpoint", epoch, entries["batches"], batches)
        return cls(**{name: value for name, value in entries.items() if name in cls.__dataclass_fields__})

    @property
    def trained(self) -> int:
        """The epoch, counted from 0, that is running or has just ended: the one that a checkpoint is named after."""
        return self.epoch if self.batch else self.epoch - 1

    def where(self, per_epoch: int = 0) -> tuple[int, int]:
        """What the log says of it: the last step, and the epoch, counted from 0, that it belongs to. In steps, or where
        ``per_epoch`` is given in batches, of which an epoch has so many."""
        return (self.batches(per_epoch) if per_epoch else self.step), max(0, self.trained)

    def batches(self, per_epoch: int) -> int:
        """Batches since the start, of which an epoch has so many."""
        return self.epoch * per_epoch + self.batch

    def close_epoch(self) -> None:
        """Count the running epoch as finished."""
        self.epoch, self.batch = self.epoch + 1, 0

    def entries(self) -> dict:
        """The plain numbers that go into the ``run`` of a pretraining's checkpoint."""
        return {k: v for k, v in asdict(self).items() if k not in ("epoch", "best_acc1", "best_epoch")}


def batch_shape(sampler: EpochSampler, accum: int) -> dict[str, int]:
    """What decides which images a step sees; all of it must stay the same inside an epoch."""
    shape = {"images": sampler.n, "images a batch": sampler.batch, "batches a step": accum, "processes": sampler.world}
    return {**shape, "steps an epoch": len(sampler) // accum}


def check_batches(path: str, epoch: int, before: dict[str, int], now: dict[str, int]) -> None:
    """UserError where a file from inside an epoch is of other batches (:func:`batch_shape`) than this run's."""
    if before != now:
        had, has = (", ".join(f"{value} {name}" for name, value in shape.items()) for shape in (before, now))
        raise UserError(
            f"{path} was written inside epoch {epoch} with {had}; this run has {has}. Resume it with the same, or "
            "resume one from an epoch's end."
        )
