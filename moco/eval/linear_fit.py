"""A probe's epochs: each trained, validated, checked against the encoder it came from, saved and told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moco import distributed
from moco.data import Source
from moco.errors import TrainingError
from moco.eval import linear, linear_report
from moco.eval.linear import LinearClassifier, ProbeData
from moco.train.metrics import TOP5_FROM, Mean
from moco.train.plan import Progress, TrainPlan
from moco.train.resume import describe_stop
from moco.train.runlog import RunLog
from moco.train.saving import Saver
from moco.train.stop import StopRequest, answers, requests, steps_between_looks
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

    def fit(
        self, features: ProbeFeatures, train: Source, val: Source, end: int, details: bool, max_minutes: float | None
    ) -> int | None:
        """The epochs that are left until ``end``; where none is, one validation. Returns an exit code when the run was
        stopped before.

        Args:
            features: :func:`moco.eval.linear.probe_data`, given all but the source and ``training``.
            details: the last validation keeps its predictions.

        Raises:
            TrainingError: no loss is finite, or a tensor changed that must not.
        """
        heads, at, steps = self.heads, self.at, self.plan.steps_per_epoch
        if at.epoch >= end:
            linear.validate(heads, features(val), details)
            return None
        stop, held_out, training = StopRequest(max_minutes), features(val), features(train, training=True)
        while at.epoch < end:
            code = self.train_epoch(training, stop)
            if code is not None:
                self.save()
                self.saver.wait()
                self.log.line(describe_stop(at.epoch, at.batch, steps))
                return code
            linear.validate(heads, held_out, details and at.epoch == end - 1)
            self.check()
            at.close_epoch()
            best = linear.note_best(heads)
            text = None if at.epoch == end else linear_report.summary(heads)  # the last line comes after the result
            self.log.scalars(at.batches(steps), linear_report.values(heads), epoch=at.epoch - 1, text=text)
            self.save(new_best=best)  # last: a kill between the two repeats both
        self.saver.wait()
        return None

    def train_epoch(self, data: ProbeData, stop: StopRequest) -> int | None:
        """The rest of the current epoch; a line and a record each ``print_freq`` steps and at the end. Returns an exit
        code when the run must stop before it goes on.

        A head whose loss is not finite is trained no more; the others cannot notice.

        Raises:
            TrainingError: no head has a finite loss.
        """
        at, steps, looks = self.at, len(data.sampler), steps_between_looks(data.device)
        watch, meters, code = Stopwatch(), self._meters(), None
        with distributed.pulse.training(), self.log.bar(steps, at.batch, f"epoch {at.epoch}") as bar:
            distributed.pulse.begin_step(at.batches(steps))
            for x, labels, _ in data.batches(at.epoch, watch, at.batch):
                linear.set_rates(self.heads, self.plan, at)
                for head, means in meters.items():
                    for mean, value in zip(means, head.step(x, labels), strict=True):
                        mean.add(value)
                at.batch += 1
                self.saver.steps += 1
                distributed.pulse.begin_step(at.batches(steps))
                watch.count(len(labels) * distributed.world_size())
                bar.update()
                if at.batch % looks == 0 or at.batch == steps:
                    code, saves = answers(distributed.largest(requests(stop, self.saver))[0])
                    self.saver.asked |= saves
                # also what no later line would judge
                if at.batch % self.plan.print_freq == 0 or at.batch == steps or code is not None:
                    self._report(watch, meters, steps)
                    watch.restart()
                    meters = self._meters()
                if code is not None:
                    break
                if self.saver.due() and at.batch < steps:
                    distributed.pulse.pause("saving")
                    self.save()
        return code

    def _meters(self) -> dict[LinearClassifier, list[Mean]]:
        """Of loss, top-1 and top-5 of each head that is trained."""
        return {head: [Mean(), Mean(), Mean()] for head in self.heads if not head.diverged}

    def _report(self, watch: Stopwatch, meters: dict[LinearClassifier, list[Mean]], steps: int) -> None:
        at, several = self.at, len(self.heads) > 1
        where, values = f"Epoch: [{at.epoch}][{at.batch:4d}/{steps}]", {}
        summary = [where]
        for head, means in meters.items():
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
        self.log.scalars(at.batches(steps), values, epoch=at.epoch, text=text)

    def _diverge(self, head: LinearClassifier, loss: float, where: str) -> None:
        head.diverged, head.score = True, None
        if all(other.diverged for other in self.heads):
            raise TrainingError(f"{where} the loss is {loss}; lower --lr (30 is for ImageNet features at batch 256).")
        self.log.line(f"{where} the loss of lr {head.name} is {loss}: it is trained no more, the other rates go on")
