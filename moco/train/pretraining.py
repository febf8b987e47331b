"""What pretraining adds to the loop, with a queue and without: the key encoder, snapshots, reports, checkpoints."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moco import distributed, files
from moco.data import BadImages, EpochSampler, Source
from moco.errors import TrainingError, UserError
from moco.models.base import Contrast, StepOutput
from moco.train import checkpoint
from moco.train.diagnoses import Diagnoses, Setting
from moco.train.ending import SLOW_LOADER, Told
from moco.train.loop import Loop
from moco.train.metrics import alignment, uniformity
from moco.train.online_probe import OnlineProbe
from moco.train.plan import batch_shape
from moco.weights.origin import entry_of
from moco.weights.settings import images_of

IMAGES = ("q", "k", "more", "local", "index")  # of a batch, what goes to the device; more and local: where there are


@dataclass
class Trainer(Loop):
    """A pretraining: a key encoder that follows, a queue, and what is reported of a contrastive loss."""

    model: Contrast
    save_dir: str
    sampler: EpochSampler
    source: Source
    max_bad_images: int
    about: dict[str, Any] = field(default_factory=dict)  # of the run, for its checkpoints: see moco/train/resume.py
    arch: str = ""  # name of the encoder, for the same
    keep: int = 0  # checkpoints of epochs' ends that stay, 0: all
    setting: Setting = field(default_factory=Setting)  # of the run, for its diagnoses
    probe: OnlineProbe | None = None

    FALLING = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model.timer = self.timer
        self.stats = (*self.model.STATS, "grad_norm")  # what is averaged between log lines
        self.sums = torch.zeros(len(self.stats) + 1, device=self.device)  # the last entry counts the batches
        self.step_ok = torch.tensor(self.progress.ema_due, device=self.device)  # () did the last step move the weights?
        self.one = torch.ones((), device=self.device)
        self.told = Told()
        self.diagnoses = Diagnoses(self.setting)
        labels = None if self.source.labels is None or not self.model.K else torch.from_numpy(self.source.labels)
        self.labels = None if labels is None else labels.to(self.device)  # (n,) of all images, where a queue holds them
        self.bad_images = BadImages(self.max_bad_images)
        self.bad_images.load_state_dict(self.progress.bad_images)
        rows, rank = self.progress.losses, distributed.rank()
        row = rows[rank] if rank < len(rows) else [0.0, 0.0]
        self.losses = torch.tensor(row, dtype=torch.float64, device=self.device)  # (2,) sum and count in this epoch

    # ------------------------------------------------------------------------------------------------ an epoch

    def due(self, every: int) -> bool:
        """Whether something that happens every so many epochs is to happen now; always before the run ends.

        0 epochs: never.
        """
        inside = self.progress.batch > 0 or self.exit_code is not None
        return every > 0 and (inside or self.finished() or self.progress.epoch % every == 0)

    def run_epoch(self, loader: Iterable[dict], save_every: int = 0) -> None:
        """:meth:`train_epoch` with a loader's batches; an epoch that has ended is counted, and saved where one in so
        many epochs is due, or like a place inside an epoch where that is due."""
        at = self.progress
        self.check_queues()
        self.train_on(loader, partial(self._batches, loader))
        self._tell_times()
        if at.batch // self.plan.accum >= self.plan.steps_per_epoch:
            self._follow_plateau()
            self._judge_epoch()
            at.close_epoch()
        if self.due(save_every):
            self.save()
        elif self.saver.due():
            self.save(named=False)

    def _batches(self, loader: Iterable[dict]) -> Iterator[dict]:
        """The rest of the epoch's batches; of each the unreadable images are named."""
        self.sampler.set_position(self.progress.epoch, self.progress.batch)
        return self._noted(prefetch(iter(loader), self.device))

    def _noted(self, batches: Iterator[dict]) -> Iterator[dict]:
        for batch in batches:
            for name in self.bad_images.note(batch, self.source):
                self.log.line(f"unreadable image replaced by another: {name}")
            yield batch

    def _tell_times(self) -> None:
        """Where the time of the steps since the last such line went, now and then."""
        at, last = self.progress, self.exit_code is not None or self.finished()
        waiting = self.timer.share("waiting for images")
        if self.told.times(at.epoch + 1, waiting, last):
            odd = ""
            if waiting > SLOW_LOADER:
                odd = f"; above {SLOW_LOADER:.0%} the loader holds up the training: {self.setting.loader()}"
            self.log.line(f"epoch {at.epoch}, step time: {self.timer.summary()}{odd}")

    def _follow_plateau(self) -> None:
        """Where the plan has a plateau: judge the mean loss of the epoch that has ended."""
        at, plan = self.progress, self.plan
        if plan.patience is None:
            return
        if at.epoch in plan.changes or plan.changed_before(at.step):
            self.plateau.forget()
        strangers = self._queue_had_random_rows()
        total, count = distributed.mean_over_ranks(self.losses).tolist()
        self.losses.zero_()
        before = self.plateau.factor
        if count and not strangers:
            self.plateau.note(total / count)
        if self.plateau.factor < before:
            summary = f"the mean loss, now {total / count:.4f}, has not fallen for more than {plan.patience} epochs"
            self.log.line(f"epoch {at.epoch}: {summary}; the rate drops to {plan.lr * self.plateau.factor:.4g}")

    def _judge_epoch(self) -> None:
        """Say what is wrong with the epoch that has ended."""
        at, plan = self.progress, self.plan
        changed = at.epoch in plan.changes or plan.changed_before(at.step)
        self.warn(self.diagnoses.epoch_ended(at.epoch, at.step, changed))

    def _queue_had_random_rows(self) -> bool:
        """Whether the queue of this epoch began with rows that were drawn at random: negatives so easy that the loss
        rises while keys take their places, for many epochs where K is many times the images."""
        at, images = self.progress, self.sampler
        keys = min(images.batch, images.n / len(images)) * (2 if self.model.symmetric else 1)  # a batch, a last one too
        return (at.draw - at.batch) * keys < self.model.K

    def after_step(self, before: int) -> None:
        """Report, and compare the queues, where that is due."""
        at = self.progress
        if at.step % self.plan.print_freq == 0 or self.finished():
            self.report()
        if at.step % self.plan.check_every == 0:
            self.check_queues()

    # ------------------------------------------------------------------------------------------------- a step

    @property
    def position(self) -> int:
        """Steps since the start."""
        return self.progress.step

    def before_step(self) -> None:
        """The key encoder follows the step before this one."""
        self.restore: Callable[[Tensor], None] | None = None
        self.ids: list[Tensor] = []
        self.model.begin_step(self.progress.step, self.plan.total_steps)
        with self.timer("EMA"):
            self.model.update_key_encoder(self.step_ok)

    def to_device(self, batch: dict) -> dict[str, Tensor]:
        """Views and the numbers of their images."""
        return {n: batch[n].to(self.device, non_blocking=True) for n in IMAGES if n in batch}

    def forward(self, here: dict[str, Tensor]) -> StepOutput:
        """The model's output; what a step changes besides the weights is remembered before its first batch."""
        at, index = self.progress, here["index"]
        if self.restore is None:
            views = 2 if self.model.symmetric else 1
            self.restore = self.model.snapshot(views * self.plan.accum * len(index) * distributed.world_size())
        views = [here["q"], here["k"], *(here["more"].unbind(1) if "more" in here else ())]
        small = [here["local"]] if "local" in here else []
        with torch.autocast(self.device.type, self.plan.amp, enabled=self.plan.amp is not None):
            return self.wrapped(views, index, at.epoch, at.draw, at.step, *small)

    def after_batch(self, here: dict[str, Tensor]) -> None:
        """Put the keys into the queue: a batch sees those of the one before it."""
        self.ids.append(here["index"])
        self.last = self.last_outputs[-1]
        with self.timer("enqueue"):
            self.model.enqueue(self.last.keys, here["index"])
        if self.probe is not None:
            with self.timer("online probe"):
                self.probe.add(here["index"], local="local" in here)

    def after_move(self) -> None:
        """Put back what a bad step has changed; the online probe moves after a good one."""
        assert self.restore is not None
        self.restore(self.bad)
        if self.probe is not None:
            self.probe.step(self.bad)

    def count(self, norm: Tensor) -> None:
        """Add the statistics of a good step."""
        self.step_ok = ~self.bad
        for output in self.last_outputs:
            found = {"loss": output.loss, **output.statistics}
            values = [found[name].detach() for name in self.model.STATS]
            self.sums += torch.stack([*values, norm, self.one]).masked_fill_(self.bad, 0.0)
            if self.plan.patience is not None:
                self.losses += torch.stack([values[0], self.one]).masked_fill_(self.bad, 0.0)

    def note_bad_step(self, step: int, newest: bool, bad_loss: bool) -> None:
        """Say so; raise a TrainingError, with a dump, after too many in a row."""
        at = self.progress
        where, names = self._culprit() if newest else ("the loss" if bad_loss else "a gradient", [])
        self.log.warn(f"step {step}: {where} is not finite; nothing was changed ({at.bad_steps} in a row)")
        if at.bad_steps < self.plan.max_bad_steps:
            return
        path = os.path.join(self.save_dir, f"bad_step_{at.step - 1:08d}_rank{distributed.rank()}.pt")
        losses = [float(output.loss.detach()) for output in self.last_outputs]
        lr = self.optimizer.param_groups[0]["lr"]
        what = {"step": at.step - 1, "epoch": at.epoch, "losses": losses, "lr": lr, "nonfinite_gradients": names}
        files.write({**what, "image_ids": torch.cat(self.ids).cpu(), "q": self.last.q.cpu()}, path)
        raise TrainingError(
            f"{at.bad_steps} steps in a row were not finite, the last in {where}; they changed no weight and no key. "
            f"See {path}; usual causes: --lr too high, --amp fp16 (try bf16), --moco-t too low."
        )

    def _culprit(self) -> tuple[str, list[str]]:
        """What was not finite in the last step on this process, and the names of the gradients that were not."""
        own = not all(bool(o.loss.isfinite()) for o in self.last_outputs)
        names = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return "the loss" if own else f"the gradient of {names[0]}" if names else "another process", names

    # ---------------------------------------------------------------------------------------------- reporting

    def report(self) -> None:
        """One line and one record about the steps since the last one; moco/sweep/figures.py has their names."""
        at, plan = self.progress, self.plan
        self.sync_outcomes()
        if self.away:
            return
        *sums, counted = distributed.mean_over_ranks(self.sums).tolist()
        if not counted:
            return
        values: dict[str, float] = {name: value / counted for name, value in zip(self.stats, sums, strict=True)}
        values["top1"], values["top5"] = 100 * values["top1"], 100 * values["top5"]
        values["loss_ratio"] = values["loss"] / self.model.chance
        values["lr"] = self.optimizer.param_groups[0]["lr"]
        values["images_per_second"], values["wait_share"] = self.watch.rates()
        values["alignment"] = float(alignment(self.last.q, self.last.paired))
        values["uniformity"] = float(uniformity(self.last.q))
        values["feature_std"] = float(self.last.q.std(0).mean() * math.sqrt(self.last.q.shape[1]))
        values |= self.model.measure(self.last.q, self.ids[-1], self.labels)
        online = {} if self.probe is None else self.probe.train_accuracy()
        values |= online
        eta = plan.steps_left(at) * self.watch.seconds_per_step()
        values["eta_seconds"] = round(eta)
        done = at.batch // plan.accum
        text = (
            f"Epoch [{at.epoch}][{done:4d}/{plan.steps_per_epoch}] loss {values['loss']:.4f} "
            f"({values['loss_ratio']:.3f} of {self.model.chance_formula}) "
            f"top1 {values['top1']:.1f} top5 {values['top5']:.1f} {_online(online)}"
            f"lr {values['lr']:.4g} {values['images_per_second']:.0f} images/s wait {100 * values['wait_share']:.0f}% "
            f"ETA {int(eta) // 3600}:{int(eta) // 60 % 60:02d}:{int(eta) % 60:02d}"
        )
        parts = {name: round(1e3 * seconds, 3) for name, seconds in self.timer.take().items()}
        self.log.scalars(at.step, values, text=text, step_ms=parts)
        self.told.report()
        self.warn(self.diagnoses.report(at.epoch, values))
        self.sums.zero_()
        self.watch.restart()

    def warn(self, sentences: Iterable[str]) -> None:
        """Say what looks wrong."""
        for sentence in sentences:
            self.log.warn(sentence)

    def report_measured(self, values: dict[str, float], summary: str) -> None:
        """Log what was measured of the encoder; ``finished_epochs`` is a checkpoint's ``epoch``, as upstream's."""
        at = self.progress
        self.log.scalars(at.step, values, finished_epochs=at.epoch, text=f"epoch {at.trained}: {summary}")

    def check_queues(self) -> None:
        """Every process must hold the same queue; a difference means that they no longer train one model."""
        if not all(distributed.same_on_all_ranks(x) for x in self.model.shared()):
            raise TrainingError(
                f"step {self.progress.step}: the queues of the processes differ, so their negatives do; restart from "
                "the newest checkpoint with --resume auto."
            )

    def save(self, named: bool = True) -> None:
        """Write this state from the main process; the others wait until it is copied, or where it is not written beside
        the training until it is written, so that none runs ahead of a failed write.

        While steps are not finite the state is the last good one, and what such steps come from may be in it: it is
        saved only where the run ends, and no other checkpoint goes for it.
        """
        self.sync_outcomes()
        bad, last = self.progress.bad_steps, self.away or self.exit_code is not None or self.finished()
        self.saver.restart()
        if bad and not last:
            self.saver.asked = True  # as soon as a step is finite
            self.log.warn(f"not saved, as the newest {bad} steps were not finite; older checkpoints stay as they are")
            return
        self.progress.bad_images = self.bad_images.state_dict()
        self.progress.plateau = self.plateau.state_dict()
        if self.plan.patience is not None:
            self.progress.losses = distributed.all_gather(self.losses[None]).tolist()
        distributed.by_main(partial(self._write, None if bad else self.keep, named, last))
        self.saved = self.place

    def save_once(self) -> None:
        """At an epoch's end whose file is not due, under a name of places inside epochs."""
        if self.saved != self.place:
            self.save(named=False)

    def _write(self, keep: int | None, named: bool, last: bool) -> None:
        run = {**self.progress.entries(), "batches": batch_shape(self.sampler, self.plan.accum), **self.about}
        run |= images_of(self.model.encoder_q, self.model.mean, self.model.std, self.about)
        at, queue = self.progress, hasattr(self.model, "queue")
        run |= entry_of(self.about, self.model.encoder_q, at.epoch, at.step, at.seed, queue)
        state = checkpoint.pack(self.model, self.optimizer, self.scaler, self.arch, self.progress.epoch, run)
        if self.probe is not None:
            state["online_probe"] = self.probe.state_dict()
        self.saver.write(state, partial(self._write_file, keep, named), last)

    def _write_file(self, keep: int | None, named: bool, state: dict) -> None:
        path = checkpoint.save(state, self.save_dir, keep, self.saver.own, named)
        if self.told.saved(self.exit_code is not None or self.finished()):
            self.log.line(f"saved {path}")


def prefetch(batches: Iterator[dict], device: torch.device) -> Iterator[dict]:
    """The batches, on a GPU each made ready by a side stream while the step before it computes: copied, and augmented
    where that is the device's work."""
    if device.type != "cuda":
        yield from batches
        return
    side = torch.cuda.Stream(device)

    def copied() -> dict | None:
        with torch.cuda.stream(side):
            batch = next(batches, None)
            moved = {n: batch[n].to(device, non_blocking=True) for n in IMAGES if n in batch} if batch else {}
        return {**batch, **moved} if batch else None

    following = copied()
    while following is not None:
        batch = following
        here = torch.cuda.current_stream(device)
        here.wait_stream(side)
        for name in (n for n in IMAGES if n in batch):
            batch[name].record_stream(here)  # the allocator must not hand their memory to the side stream too early
        following = copied()
        yield batch


def _online(found: dict[str, float]) -> str:
    """The online probe's accuracy in a log line."""
    return "".join(f"online {value:.1f} " for value in found.values())


def pick_amp(choice: str, device: torch.device, broken: str = "") -> torch.dtype | None:
    """The encoder's arithmetic: ``auto`` is bf16 where the hardware computes it, else fp32 (None).

    Args:
        choice: auto, off, bf16 or fp16.
        broken: a layer whose gradients are wrong in 16 bits on a CPU (:func:`moco.models.encoder.strided_point`).

    Raises:
        UserError: 16 bits asked for where they would train on garbage.
    """
    broken = broken if device.type == "cpu" else ""
    if choice == "auto":
        return torch.bfloat16 if _has_bf16(device) and not broken else None
    if choice != "off" and broken:
        raise UserError(
            f"--amp {choice}: {broken} is a strided convolution on a single pixel; on CPUs its gradients are wrong "
            "in 16 bits. Use --amp off or a larger --size."
        )
    return {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[choice]


def _has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    with contextlib.suppress(AttributeError):  # private, and absent in some builds
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False
