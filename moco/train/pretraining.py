"""The training loop of both families, with a queue and without: steps, what is logged, and when a run stops.

A step is all or nothing. Whether the loss and the gradients are finite on every process is found on the device, and the
device itself leaves the weights alone and puts back the little that a bad step had already touched. The host reads what
became of the steps later, at the log lines; on a CPU, where reading costs nothing, after every step.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from moco import distributed, files, seeding
from moco.data import BadImages, EpochSampler, Source
from moco.errors import SIGTERM_EXIT, TrainingError, UserError
from moco.models.base import Contrast, StepOutput
from moco.train import checkpoint
from moco.train.metrics import alignment, uniformity
from moco.train.optimizers import Plateau, step_unless, use_fused_optimizer_step, waits
from moco.train.plan import Progress, TrainPlan, batch_shape, warm_up
from moco.train.resume import describe_stop
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest, outcome, steps_between_looks
from moco.train.timers import StepTimer, Stopwatch
from moco.weights.settings import images_of

IMAGES = ("q", "k", "more", "index")  # of a batch, what goes to the device; more: only where views are more than two


@dataclass
class Trainer:
    """One training run: the objects that a step needs, and the steps."""

    model: Contrast
    wrapped: torch.nn.Module  # the model with gradient averaging
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    plan: TrainPlan
    progress: Progress
    log: RunLog
    stop: StopRequest
    save_dir: str
    sampler: EpochSampler
    source: Source
    max_bad_images: int
    about: dict[str, Any] = field(default_factory=dict)  # of the run, for its checkpoints: see moco/train/resume.py

    def __post_init__(self) -> None:
        self.device = distributed.device()
        self.stats = (*self.model.STATS, "grad_norm")  # what is averaged between log lines
        self.sums = torch.zeros(len(self.stats) + 1, device=self.device)  # the last entry counts the batches
        self.step_ok = torch.tensor(self.progress.ema_due, device=self.device)  # () did the last step move the weights?
        self.bad = ~self.step_ok  # () was it not finite?
        self.one = torch.ones((), device=self.device)
        self.pending_flags: list[Tensor] = []  # (4,) int32 a step since the last look, see _flags
        self.look_every = steps_between_looks(self.device, self.plan.print_freq)
        self.timer = self.model.timer = StepTimer(self.device)
        self.watch, self.timed = Stopwatch(), 0  # steps since the watch was restarted
        self.exit_code: int | None = None  # set when the run must stop early
        self.bad_images = BadImages(self.max_bad_images)
        self.bad_images.load_state_dict(self.progress.bad_images)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.plateau = Plateau(self.plan.patience, self.plan.min_lr / self.plan.lr, falling=True)
        self.plateau.load_state_dict(self.progress.plateau)
        rows, rank = self.progress.losses, distributed.rank()
        row = rows[rank] if rank < len(rows) else [0.0, 0.0]
        self.losses = torch.tensor(row, dtype=torch.float64, device=self.device)  # (2,) sum and count in this epoch
        use_fused_optimizer_step(self.optimizer)
        for summary in filter(None, [self.model.slow_reason(self.device)]):
            self.log.line(summary)

    # ------------------------------------------------------------------------------------------------ an epoch

    def finished(self) -> bool:
        """Whether all epochs or steps are done."""
        return self.plan.steps_left(self.progress) <= 0

    def due(self, every: int) -> bool:
        """Whether something that happens every so many epochs is to happen now; always before the run ends.

        0 epochs: never.
        """
        inside = self.progress.batch > 0 or self.exit_code is not None
        return every > 0 and (inside or self.finished() or self.progress.epoch % every == 0)

    def run_epoch(self, loader: Iterable[dict]) -> None:
        """Train to the end of the current epoch, or to a step after which the run must stop (see ``exit_code``)."""
        at, accum = self.progress, self.plan.accum
        self.model.train()
        self.check_queues()
        self.sampler.set_position(at.epoch, at.batch)
        self._restart_watch()  # what happened between epochs is not training time
        batches = prefetch(iter(loader), self.device)
        with self.log.bar(self.plan.steps_per_epoch, at.batch // accum, f"epoch {at.epoch}") as bar:
            for _ in range(at.batch // accum, self.plan.steps_per_epoch):
                self.step(batches)
                bar.update()
                self._after_step()
                if self.exit_code is not None or self.finished():
                    break
        self.sync_outcomes()
        self.log.line(f"epoch {at.epoch}, step time: {self.timer.summary()}")
        if at.batch // accum >= self.plan.steps_per_epoch:
            self._follow_plateau()
            at.close_epoch()

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

    def _queue_had_random_rows(self) -> bool:
        """Whether the queue of this epoch began with rows that were drawn at random: negatives so easy that the loss
        rises while keys take their places, for many epochs where K is many times the images."""
        at, images = self.progress, self.sampler
        keys = min(images.batch, images.n / len(images)) * (2 if self.model.symmetric else 1)  # a batch, a last one too
        return (at.draw - at.batch) * keys < self.model.K

    def _after_step(self) -> None:
        at = self.progress
        if at.step % self.plan.print_freq == 0 or self.finished():
            self.report()
        if at.step % self.plan.check_every == 0:
            self.check_queues()

    # ------------------------------------------------------------------------------------------------- a step

    def step(self, batches: Iterator[dict]) -> None:
        """One optimizer step over ``accum`` batches, or nothing at all if anything is not finite anywhere."""
        at, accum = self.progress, self.plan.accum
        looks = (at.step + 1) % self.look_every == 0
        with self.timer.of_a_step(looks):
            self._step(batches)
        at.step += 1
        at.batch += accum
        self.timed += 1
        if looks:
            self.sync_outcomes()
        self.optimizer.zero_grad(set_to_none=True)

    def _step(self, batches: Iterator[dict]) -> None:
        at, accum, timer = self.progress, self.plan.accum, self.timer
        lr = self.plan.lr_at(at.epoch, at.step) * warm_up(at.step, self.plan.rise) * self.plateau.factor
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.begin_step(at.step, self.plan.total_steps)
        with timer("EMA"):
            self.model.update_key_encoder(self.step_ok)
        restore, outputs, ids = None, [], []
        for number, batch in enumerate(islice(self._timed(batches), accum)):
            with timer("transfer"):
                images = {n: batch[n].to(self.device, non_blocking=True) for n in IMAGES if n in batch}
            index = images["index"]
            if restore is None:
                views = 2 if self.model.symmetric else 1
                restore = self.model.snapshot(views * accum * len(index) * distributed.world_size())
            outputs.append(self._forward_backward(images, hold=number < accum - 1))
            ids.append(index)
            with timer("enqueue"):
                self.model.enqueue(outputs[-1].keys, index)  # a batch sees the keys of the one before it
        assert restore is not None
        with timer("optimizer"):
            self.scaler.unscale_(self.optimizer)
            norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            flags = self._flags([o.loss.detach() for o in outputs], norm)
            self.bad = flags[1] > 0
            self._move(self.bad)
            self.scaler.update()
            restore(self.bad)
        self.step_ok = ~self.bad
        self.pending_flags.append(flags)
        self.last_outputs = outputs, ids
        self._count(outputs, norm)

    def _timed(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Batches, with the time spent waiting for them measured and unreadable images noted."""
        while True:
            with self.watch.waiting(), self.timer("waiting for images"):
                batch = next(batches)
            for name in self.bad_images.note(batch, self.source):
                self.log.line(f"unreadable image replaced by another: {name}")
            yield batch

    def _forward_backward(self, images: dict[str, Tensor], hold: bool) -> StepOutput:
        at = self.progress
        ids = images["index"]
        views = [images["q"], images["k"], *(images["more"].unbind(1) if "more" in images else ())]
        seeding.seed_step(at.seed, at.draw, distributed.rank())
        amp = torch.autocast(self.device.type, self.plan.amp, enabled=self.plan.amp is not None)
        with distributed.hold_gradients(self.wrapped, hold):
            with amp:
                output = self.wrapped(views, ids, at.epoch, at.draw, at.step)
            with self.timer("q backward"):
                loss = output.loss if self.plan.accum == 1 else output.loss / self.plan.accum
                self.scaler.scale(loss).backward()
        at.draw += 1
        self.last = output
        self.watch.count(len(ids) * distributed.world_size())
        return output

    def _flags(self, losses: list[Tensor], norm: Tensor) -> Tensor:
        return outcome(losses, norm, self.stop)

    def _move(self, bad: Tensor) -> None:
        """The optimizer's step where ``bad``, () bool, is false."""
        known = waits(self.optimizer)
        step_unless(bad, self.optimizer)
        if waits(self.optimizer) and not known:
            self.log.line(
                "this optimizer counts its steps on the host, which therefore waits for the GPU in every step"
            )

    def _count(self, outputs: list[StepOutput], norm: Tensor) -> None:
        for output in outputs:
            found = {"loss": output.loss, **output.statistics}
            values = [found[name].detach() for name in self.model.STATS]
            self.sums += torch.stack([*values, norm, self.one]).masked_fill_(self.bad, 0.0)
            if self.plan.patience is not None:
                self.losses += torch.stack([values[0], self.one]).masked_fill_(self.bad, 0.0)

    def sync_outcomes(self) -> None:
        """Read what became of the steps since the last look: the only place where the host waits for the device."""
        at = self.progress
        if not self.pending_flags:
            return
        steps = torch.stack(self.pending_flags).tolist()
        self.pending_flags.clear()
        self.timer.read()
        for ago, (bad_loss, bad, terminated, stop) in zip(range(len(steps) - 1, -1, -1), steps, strict=True):
            if stop:
                self.exit_code = SIGTERM_EXIT if terminated else 0
            at.ema_due = not bad
            if not bad:
                at.bad_steps = 0
            elif self.scaler.is_enabled() and not bad_loss:
                # With fp16 an infinite gradient of a finite loss only means that the scale was too high.
                scale = self.scaler.get_scale()
                self.log.line(f"step {at.step - 1 - ago}: fp16 overflow, step skipped, scale now {scale:g}")
            else:
                self._note_bad_step(ago, bool(bad_loss))

    def _note_bad_step(self, ago: int, bad_loss: bool) -> None:
        at = self.progress
        step = at.step - 1 - ago
        at.bad_steps += 1
        where, names = self._culprit(bad_loss) if ago == 0 else ("the loss" if bad_loss else "a gradient", [])
        self.log.line(f"step {step}: {where} is not finite; nothing was changed ({at.bad_steps} in a row)")
        if at.bad_steps < self.plan.max_bad_steps:
            return
        outputs, ids = self.last_outputs
        path = os.path.join(self.save_dir, f"bad_step_{at.step - 1:08d}_rank{distributed.rank()}.pt")
        losses = [float(o.loss.detach()) for o in outputs]
        lr = self.optimizer.param_groups[0]["lr"]
        what = {"step": at.step - 1, "epoch": at.epoch, "losses": losses, "lr": lr, "nonfinite_gradients": names}
        files.write({**what, "image_ids": torch.cat(ids).cpu(), "q": self.last.q.cpu()}, path)
        raise TrainingError(
            f"{at.bad_steps} steps in a row were not finite, the last in {where}; they changed no weight and no key. "
            f"See {path}; usual causes: --lr too high, --amp fp16 (try bf16), --moco-t too low."
        )

    def _culprit(self, bad_loss: bool) -> tuple[str, list[str]]:
        """What was not finite in the last step on this process, and the names of the gradients that were not."""
        own = not all(bool(o.loss.isfinite()) for o in self.last_outputs[0])
        names = [n for n, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        return "the loss" if own else f"the gradient of {names[0]}" if names else "another process", names

    # ---------------------------------------------------------------------------------------------- reporting

    def report(self) -> None:
        """One line and one record about the steps since the last one; moco/sweep/figures.py has their names."""
        at, plan = self.progress, self.plan
        self.sync_outcomes()
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
        eta = plan.steps_left(at) * self.watch.seconds_per_step(self.timed)
        values["eta_seconds"] = round(eta)
        done = at.batch // plan.accum
        text = (
            f"Epoch [{at.epoch}][{done:4d}/{plan.steps_per_epoch}] loss {values['loss']:.4f} "
            f"({values['loss_ratio']:.3f} of {self.model.chance_formula}) "
            f"top1 {values['top1']:.1f} top5 {values['top5']:.1f} "
            f"lr {values['lr']:.4g} {values['images_per_second']:.0f} images/s wait {100 * values['wait_share']:.0f}% "
            f"ETA {int(eta) // 3600}:{int(eta) // 60 % 60:02d}:{int(eta) % 60:02d}"
        )
        self.log.scalars(at.step, values, epoch=at.epoch, text=text)
        odd = diagnose(values)
        if odd and at.epoch > 0:  # a first epoch may look like anything
            self.log.line(f"warning: {odd}")
        self.sums.zero_()
        self._restart_watch()

    def _restart_watch(self) -> None:
        self.watch.restart()
        self.timed = 0

    def report_measured(self, values: dict[str, float], summary: str) -> None:
        """Log what was measured of the encoder; ``finished_epochs`` is a checkpoint's ``epoch``, as upstream's."""
        at = self.progress
        epochs = {"epoch": at.trained, "finished_epochs": at.epoch}
        self.log.scalars(at.step, values, **epochs, text=f"epoch {at.trained}: {summary}")

    def check_queues(self) -> None:
        """Every process must hold the same queue; a difference means that they no longer train one model."""
        if not all(distributed.same_on_all_ranks(x) for x in self.model.shared()):
            raise TrainingError(
                f"step {self.progress.step}: the queues of the processes differ, so their negatives do; restart from "
                "the newest checkpoint with --resume auto."
            )

    def save(self, arch: str, keep: int) -> None:
        """Write this state from the main process; the others wait, so that none runs ahead of a failed write."""
        self.sync_outcomes()
        self.progress.bad_images = self.bad_images.state_dict()
        self.progress.plateau = self.plateau.state_dict()
        if self.plan.patience is not None:
            self.progress.losses = distributed.all_gather(self.losses[None]).tolist()
        distributed.by_main(partial(self._write, arch, keep))

    def _write(self, arch: str, keep: int) -> None:
        run = {**self.progress.entries(), "batches": batch_shape(self.sampler, self.plan.accum), **self.about}
        run |= images_of(self.model.encoder_q, self.model.mean, self.model.std)
        state = checkpoint.pack(self.model, self.optimizer, self.scaler, arch, self.progress.epoch, run)
        path = checkpoint.save(state, self.save_dir, keep)
        self.log.line(f"saved {path}")
        if self.exit_code is not None and not self.finished():
            at, plan = self.progress, self.plan
            self.log.line(describe_stop(at.epoch, at.batch // plan.accum, plan.steps_per_epoch))


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


def diagnose(values: dict[str, float]) -> str:
    """What looks wrong in a report, or an empty string: collapsed features and a loss above chance."""
    if values["feature_std"] < 0.05:
        return "all queries look the same (feature_std near 0), the encoder has collapsed; lower --lr."
    if values["loss_ratio"] > 1.6:
        return "the loss is far above chance, worse than guessing; lower --lr or raise --moco-t."
    return ""


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
