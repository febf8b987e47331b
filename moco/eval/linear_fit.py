"""A probe's epochs: each trained, validated, checked against the encoder it came from, saved and told."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moco import distributed
from moco.data import Source
from moco.errors import TrainingError
from moco.eval import linear, linear_report
from moco.eval.features import TooManyUnreadError
from moco.eval.linear import LinearClassifier, ProbeData
from moco.train.metrics import TOP5_FROM, Mean
from moco.train.plan import Progress, TrainPlan
from moco.train.resume import describe_stop
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.train.stop import answers, requests, steps_between_looks
from moco.train.timers import Stopwatch

ProbeFeatures = Callable[..., ProbeData]


@dataclass
class ProbeRun:
    """A probe's training: what is trained, how, and where the run stands.

    save: :func:`moco.eval.linear_checkpoint.save_probe`, given all but ``new_best``. check: that the encoder is still
    the one that was read.
    """

    heads: list[LinearClassifier]
    plan: TrainPlan
    at: Progress
    log: RunLog
    saver: Saver
    save: Callable[..., None]
    check: Callable[[], None]
    left: dict[str, int] = field(default_factory=dict)  # what result.json says of training images that were replaced

    def fit(self, features: ProbeFeatures, train: Source, val: Source, end: int, details: bool) -> int | None:
        """The epochs that are left until ``end``; where none is, one validation. Returns an exit code when the run was
        stopped before.

        Args:
            features: :func:`moco.eval.linear.probe_data`, given all but the source and ``training``.
            details: the last validation keeps its predictions.

        Raises:
            TrainingError: no loss is finite, or a tensor changed that must not.
            TooManyUnreadError: of the held-out images, or here of those to train on. What was trained is saved.
        """
        heads, at, steps = self.heads, self.at, self.plan.steps_per_epoch
        if at.epoch >= end:
            linear.validate(heads, features(val), details)
            return None
        held_out, training = features(val), features(train, training=True)
        self.meters = self._meters()
        while at.epoch < end:
            code = self.train_epoch(training)
            if code is not None:
                self.save()
                self.saver.wait()
                reason = self.saver.patience.stop.reason(code)
                self.log.ended(code, reason, describe_stop(at.epoch, at.batch, steps))
                return code
            if at.batch < steps:  # images were gone
                self.saver.patience.save = self.save if at.epoch or at.batch else lambda: None
                assert training.loader is not None
                self.saver.patience.wait(training.loader.why(), training.loader.look)
                continue
            try:
                linear.validate(heads, held_out, details and at.epoch == end - 1)
            except TooManyUnreadError:
                self.save()  # the epoch, which a resumed run evaluates
                raise
            self.check()
            at.close_epoch()
            best = linear.note_best(heads)
            text = None if at.epoch == end else linear_report.summary(heads)  # the last line comes after the result
            self.log.scalars(at.batches(steps), linear_report.values(heads), finished_epochs=at.epoch, text=text)
            self.save(new_best=best)  # last: a kill between the two repeats both
        self.saver.wait()
        self.left = {"train_unreadable": training.count_bad()}
        return None

    def train_epoch(self, data: ProbeData) -> int | None:
        """The rest of the current epoch, or until images are gone on some process: then as if no step had been tried
        since. A line and a record each ``print_freq`` steps and at the end. Returns an exit code when the run must stop
        before it goes on.

        A head whose loss is not finite is trained no more; the others cannot notice.

        Raises:
            TrainingError: no head has a finite loss.
        """
        at, steps, looks, stop = self.at, len(data.sampler), steps_between_looks(data.device), self.saver.patience.stop
        watch, put_back = Stopwatch(), self._remember(data)
        with distributed.pulse.training(), self.log.bar(steps, at.batch, f"epoch {at.epoch}") as bar:
            distributed.pulse.begin_step(at.batches(steps))
            for x, labels, _ in data.batches(at.epoch, watch, at.batch):
                self._step(x, labels)
                distributed.pulse.begin_step(at.batches(steps))
                watch.count(len(labels) * distributed.world_size())
                bar.update()
                reports = at.batch % self.plan.print_freq == 0 or at.batch == steps
                if not reports and at.batch % looks:
                    continue
                away = data.loader is not None and data.loader.gone
                asked, gone = distributed.largest(requests(stop, self.saver.late()), int(away))
                code, saves = answers(asked)
                self.saver.asked |= saves
                if gone:
                    put_back()
                elif reports or code is not None:  # also what no later line would judge
                    self._report(watch, steps)
                    watch.restart()
                    self.meters = self._meters()
                if gone or code is not None:
                    return code
                if self.saver.due() and at.batch < steps:
                    distributed.pulse.pause("saving")
                    self.save()
                put_back = self._remember(data)
        return None

    def _step(self, x: Tensor, labels: Tensor) -> None:
        linear.set_rates(self.heads, self.plan, self.at)
        for head, means in self.meters.items():
            for mean, value in zip(means, head.step(x, labels), strict=True):
                mean.add(value)
        self.at.batch += 1
        self.saver.steps += 1

    def _remember(self, data: ProbeData) -> Callable[[], None]:
        """Where the probe is; returns what puts all of it back. Of features in memory none is ever gone."""
        if data.loader is None:
            return lambda: None
        at, batch = self.at, self.at.batch
        meters = {head: [copy.copy(mean) for mean in means] for head, means in self.meters.items()}
        kept = [copy.deepcopy((head.layer.state_dict(), head.optimizer.state_dict())) for head in self.heads]

        def put_back() -> None:
            at.batch, self.meters = batch, meters
            for head, (layer, optimizer) in zip(self.heads, kept, strict=True):
                head.layer.load_state_dict(layer)
                head.optimizer.load_state_dict(optimizer)

        return put_back

    def _meters(self) -> dict[LinearClassifier, list[Mean]]:
        """Of loss, top-1 and top-5 of each head that is trained."""
        return {head: [Mean(), Mean(), Mean()] for head in self.heads if not head.diverged}

    def _report(self, watch: Stopwatch, steps: int) -> None:
        at, several = self.at, len(self.heads) > 1
        where, values = f"Epoch: [{at.epoch}][{at.batch:4d}/{steps}]", {}
        summary = [where]
        for head, means in self.meters.items():
            # One reduction a head: the order of a sum over many processes may depend on what else is in it.
            here = torch.tensor([mean.value for mean in means], device=distributed.device())
            loss, acc1, acc5 = distributed.mean_over_ranks(here).tolist()
            if not math.isfinite(loss):
                self._diverge(head, loss, where)
                continue
            five = {"acc5": acc5} if head.classes >= TOP5_FROM else {}
            values |= linear_report.named({"loss": loss, "acc1": acc1, **five, "lr": head.rate}, head, self.heads)
            top5 = f" Acc@5 {acc5:.2f}" if five else ""
            summary.append(f"loss {loss:.4f} Acc@1 {acc1:.2f}{top5} lr {head.rate:g}" + " |" * several)
        speed, wait = watch.rates()
        values |= {"images_per_second": speed, "wait_share": wait}
        text = f"{' '.join(summary)} {speed:.0f} images/s wait {wait:.0%}"
        self.log.scalars(at.batches(steps), values, text=text)

    def _diverge(self, head: LinearClassifier, loss: float, where: str) -> None:
        head.diverged, head.score = True, None
        if all(other.diverged for other in self.heads):
            raise TrainingError(f"{where} the loss is {loss}; lower --lr (30 is for ImageNet features at batch 256).")
        self.log.warn(f"{where} the loss of lr {head.name} is {loss}: it is trained no more, the other rates go on")
