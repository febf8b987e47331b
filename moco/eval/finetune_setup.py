"""What the flags of a fine-tuning come to once its data is open: images, optimizer and the figures at the end."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, NamedTuple

import torch

from moco import data, distributed
from moco.config import FewShotConfig, OptimizerConfig, SubsetConfig
from moco.data import Source, Sources, open_sources
from moco.data.sources import subset
from moco.data.sources.base import without_labels
from moco.errors import UserError
from moco.eval import fewshot, finetune
from moco.eval.classifier import Classifier
from moco.eval.details import Details, counts_of
from moco.eval.features import EvalData, LabelledBatches, check_readable
from moco.eval.finetune import Tuner
from moco.eval.linear import labelled_pair, write_result
from moco.models.batchnorm import has_batchnorm
from moco.models.ema import moving_average
from moco.train.optimizers import build_optimizer
from moco.train.plan import TrainPlan
from moco.train.runlog import RunLog


def epochs_for(percent: float) -> int:
    """SynCo's published lengths: 60 epochs on 1 % of the labels, 30 on 10 %, 90 on all; a share between two takes the
    smaller one's. A list's share is never round: 12,811 of 1,281,167 names are its 1 %."""
    return 60 if percent < 9.95 else 30 if percent < 99.95 else 90


def labelled_images(sources: Sources, test: bool) -> tuple[Source, Source | None]:
    """The labelled training images, and with ``test`` the test images too; UserError when the data lacks them."""
    if test:
        return labelled_pair(sources)
    train = sources.train or sources.pretrain
    if train.labels is None:
        raise UserError(f"{without_labels(train)}: give class folders, or a list with a TAB and a label on each line.")
    return train, None


def novel_images(sources: Sources, path: str, classes: str) -> Source:
    """The images of few-shot episodes: those at ``path``, else the data's held-out ones, whose classes were trained on.

    ``classes`` is as in :func:`moco.eval.fewshot.pool`.
    """
    if path:
        own = sources.pretrain
        sources = open_sources(path=path, channels=own.channels, levels=own.levels)
    return fewshot.pool(sources, classes)


class Images(NamedTuple):
    """The images of a run; ``origin``: how those to train and to validate on were chosen of the whole; ``evaluate``:
    nothing is trained."""

    whole: Source
    train: subset.Subset
    val: subset.Subset | None
    test: Source | None
    origin: str
    evaluate: bool

    @property
    def percent(self) -> float:
        """Share of the labelled images that is trained on."""
        return 100.0 * len(self.train) / len(self.whole)


def choose_labelled(whole: Source, test: Source | None, config: SubsetConfig, evaluate: bool) -> Images:
    """The images of a run that may ``test``; a published list is fetched by one process of each node first."""
    cache = os.path.join(torch.hub.get_dir(), "imagenet_subsets")
    wanted = (config.percent, config.files, config.val_share, config.seed, cache)
    train, val, origin = distributed.first_on_node(partial(subset.choose_subset, whole, *wanted), wait=True)
    return Images(whole, train, None if evaluate else val, test, origin, evaluate)


def prepare_tuning(
    model: Classifier, config: OptimizerConfig, lr_backbone: float, layer_decay: float | None, plan: TrainPlan
) -> tuple[torch.optim.Optimizer, list[float], torch.amp.GradScaler, Any]:
    """What moves the weights, with the rates of its groups, and their moving average, if any; ``config`` has the
    layer's rate."""
    groups = model.groups(config.lr, lr_backbone, config.weight_decay, layer_decay)
    optimizer = build_optimizer(config, groups)
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=model.amp is torch.float16)
    lrs = [group["lr"] for group in optimizer.param_groups]
    return optimizer, lrs, scaler, moving_average(model, config.ema, config.ema_epoch, plan.steps_per_epoch)


def describe_tuning(images: Images, model: Classifier, plan: TrainPlan, batch: int, seed: int) -> str:
    """What a run reads and how it computes, for the log; batch: images a step over all processes."""
    read = "\n".join(data.describe(images.whole, images.test))
    where = f"{distributed.processes()}, batch {batch}, amp {model.amp or 'off'}, seed {seed}"
    if images.evaluate:
        return f"{read}\n{len(images.test or ())} images to test on\n{where}"
    share = f"{len(images.train)} of {len(images.whole)} images ({images.percent:.4g} %) to train on, {images.origin}"
    return (
        f"{read}\n{share}; {len(images.val or ())} to validate on, {len(images.test or ())} to test on\n"
        f"{plan.epochs} epochs of {plan.batches} steps, {where}"
    )


def open_sets(
    images: Images, views: EvalData, model: Classifier, log: RunLog
) -> tuple[LabelledBatches, LabelledBatches]:
    """Batches to train on and to evaluate each epoch on.

    Raises:
        UserError: too many of those to evaluate on cannot be read, or some step of an epoch gives each process a single
            image, with which BatchNorm cannot train: one image has no variance.
    """
    for source in filter(None, (images.val, images.test)):
        check_readable(source, views.most_bad)
    training = views.of(images.train, training=True)
    selecting = views.of(images.val or images.test or images.train)
    if not model.freeze and has_batchnorm(model.encoder) and training.sampler.fewest < 2:
        n, batch = training.sampler.n, training.sampler.batch
        raise UserError(
            f"{n} training images in batches of {batch} leave a step with one image per process, too few for "
            "BatchNorm: choose another --batch-size."
        )
    if not images.val and not images.evaluate:
        log.line(
            "each epoch is evaluated on the test images: the best one is chosen on them, the last one is not "
            "(--val-share holds training images out to choose on)"
        )
    return training, selecting


def measure_novel(tuner: Tuner, novel: Source, images: EvalData, config: FewShotConfig) -> dict[str, Any]:
    """Few-shot accuracy of the encoder's features, told in the log: entries of result.json."""
    model = tuner.evaluated
    values, asked, summary = fewshot.measure_few_shot(model.encoder, novel, model.extractor(images), config)
    tuner.log.line(summary)
    return values | {"few_shot": asked}


def write_report(
    tuner: Tuner, selecting: LabelledBatches, images: Images, views: EvalData, result: dict[str, Any], save_dir: str,
    details: Details,
) -> None:  # fmt: skip
    """Score the network that is handed on, on the validation and on the test images; write the result, in a file whose
    name goes by its ``mode``, and what each class got if that is asked for, of the test images where there are any;
    then the last line, whose beginning with test images is upstream's."""
    val, test = tuner.score or finetune.evaluate(tuner.evaluated, selecting, tuner.details), None
    if not images.val:
        val, test = None, val
    elif images.test:
        test = finetune.evaluate(tuner.evaluated, views.of(images.test), tuner.details)
    name = "evaluate.json" if result["mode"] == "evaluate" else finetune.RESULT
    write_result({**result, **tuner.result(val, test)}, save_dir, name)
    found = [(val, "validation ", "validation"), (test, "", "test")]
    score, _, kind = next(one for one in reversed(found) if one[0])
    if details and score:
        counts = counts_of(score, len(images.whole.classes or ()))
        details.write(counts, f"fine-tuning after {tuner.progress.epoch} epochs, {score.images:,} {kind} images")
    told = (f" * {of}{score} ({score.images} {kind} images{score.left_out})" for score, of, kind in found if score)
    tuner.log.line("".join(told))
