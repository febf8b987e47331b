"""A probe's epochs: each trained, validated, checked against the encoder it came from, saved and told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from moco.data import Source
from moco.eval import linear, linear_report
from moco.eval.linear import LinearClassifier, Probe, ProbeData
from moco.train.plan import Progress, TrainPlan
from moco.train.resume import describe_stop
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest

ProbeFeatures = Callable[..., ProbeData]


@dataclass(frozen=True)
class ProbeRun:
    """What is trained, how, and where the run stands.

    save: :func:`moco.eval.linear_checkpoint.save`, given all but ``new_best``. check: :meth:`Probe.check_frozen`, given
    the tensors that must not change.
    """

    model: Probe
    heads: list[LinearClassifier]
    plan: TrainPlan
    at: Progress
    log: RunLog
    save: Callable[..., None]
    check: Callable[[], None]


def fit(
    run: ProbeRun,
    features: ProbeFeatures,
    train: Source,
    val: Source,
    end: int,
    details: bool,
    max_minutes: float | None,
) -> int | None:
    """The epochs that are left until ``end``; where none is, one validation. Returns an exit code when the run was
    stopped before.

    Args:
        features: :func:`moco.eval.linear.probe_data`, given all but the source and ``training``.
        details: the last validation keeps its predictions.

    Raises:
        TrainingError: no loss is finite, or a tensor changed that must not.
    """
    heads, at = run.heads, run.at
    if at.epoch >= end:
        linear.validate(heads, features(val), details)
        return None
    stop, held_out, training = StopRequest(max_minutes), features(val), features(train, training=True)
    while at.epoch < end:
        code = linear.train_epoch(heads, training, run.plan, at, run.log, stop)
        if code is not None:
            run.save()
            run.log.line(describe_stop(at.epoch, at.batch, run.plan.steps_per_epoch))
            return code
        linear.validate(heads, held_out, details and at.epoch == end - 1)
        run.check()
        at.close_epoch()
        run.save(new_best=linear.note_best(heads))
        text = None if at.epoch == end else linear_report.summary(heads)  # the last line comes after the result
        values, done = linear_report.values(heads), at.batches(run.plan.steps_per_epoch)
        run.log.scalars(done, values, epoch=at.epoch - 1, text=text)
    return None
