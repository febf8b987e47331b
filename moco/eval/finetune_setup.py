"""What the flags of a fine-tuning come to once its data is open: images, network and the figures at the end."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moco import distributed
from moco.config import ClassifierConfig, FewShotConfig, OptimizerConfig, SubsetConfig
from moco.data import Source
from moco.data.sources import subset
from moco.eval import fewshot, finetune
from moco.eval.features import EvalData, FeatureExtractor, LabelledBatches
from moco.eval.finetune import CHOSEN_ON_TEST, Classifier, Tuner, check_batch, load, progress_of
from moco.eval.finetune_loss import Objective
from moco.eval.linear import Score, write_result
from moco.models.ema import moving_average
from moco.models.encoder import build_encoder, strided_point
from moco.train.optimizers import build_optimizer
from moco.train.plan import Progress, TrainPlan
from moco.train.pretraining import pick_amp
from moco.train.resume import describe_resume
from moco.train.runlog import RunLog
from moco.train.stop import StopRequest
from moco.weights.read import load_backbone


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

    def describe(self) -> str:
        """For the log."""
        if self.evaluate:
            return f"{len(self.test or ())} images to test on"
        share = f"{len(self.train)} of {len(self.whole)} images ({self.percent:.4g} %) to train on, {self.origin}"
        return f"{share}; {len(self.val or ())} to validate on, {len(self.test or ())} to test on"


def choose_labelled(whole: Source, test: Source | None, config: SubsetConfig, evaluate: bool) -> Images:
    """The images of a run that may ``test``; a published list is fetched by one process of each node first."""
    cache = os.path.join(torch.hub.get_dir(), "imagenet_subsets")
    wanted = (config.percent, config.files, config.val_share, config.seed, cache)
    train, val, origin = distributed.first_on_node(partial(subset.choose_subset, whole, *wanted), wait=True)
    return Images(whole, train, None if evaluate else val, test, origin, evaluate)


def build_classifier(
    config: ClassifierConfig, whole: Source, size: int, mean: Any, std: Any, seed: int, resumed: bool
) -> tuple[Classifier, str]:
    """The network on its device, and what is in its encoder, in words, empty where a checkpoint of the run fills it.

    Args:
        whole: images with the classes and channels.
        size: side of the views in pixels.
        mean, std: of the channels.
        seed: of the layer's first weights.

    Raises:
        UserError: what cannot be built, read or trained in this arithmetic.
    """
    shape = {"stem": config.stem, "size": size, "in_chans": whole.channels, "drop_path": config.drop_path}
    encoder = build_encoder(config.arch, len(whole.classes or ()), **shape)
    summary = "" if resumed else f"no --pretrained: random initialisation by seed {seed}, a baseline"
    if config.pretrained:
        _, summary = load_backbone(encoder, config.pretrained, config.arch)
    device = distributed.device()
    broken = "" if device.type != "cpu" or config.freeze else strided_point(encoder, whole.channels, size)
    amp = pick_amp(config.amp, device, broken)
    model = Classifier(encoder, mean, std, seed, config.freeze, amp, config.sync_bn)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return model.to(device).to(memory_format=layout), summary  # type: ignore[call-overload]


@dataclass
class Parts:
    """What the steps move and what moves it. lrs: of the optimizer's groups before a step. frozen: see
    :meth:`moco.eval.finetune.Tuner.check_frozen`."""

    model: Classifier
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: Any
    lrs: list[float]
    plan: TrainPlan
    progress: Progress
    frozen: dict[str, Tensor]

    @property
    def position(self) -> int:
        """Batches since the start."""
        return self.progress.batches(self.plan.batches)

    def resume(self, state: dict, path: str, arch: str, evaluate: bool, pretrained: bool) -> str:
        """Put a checkpoint back, see :func:`moco.eval.finetune.load`, and say where its run goes on.

        pretrained: another file says what a frozen encoder is, so that one which is not its is refused.
        """
        load(state, path, arch, self.model, self.ema, None if evaluate else self.optimizer, self.scaler)
        self.progress = progress_of(state, self.progress.seed)
        self.frozen = self.frozen if pretrained else self.model.backbone()
        return describe_resume(path, self.progress.epoch, self.progress.batch)

    def describe(self, batch: int, evaluate: bool) -> str:
        """For the log; batch: images a step over all processes."""
        length = f"{self.plan.epochs} epochs of {self.plan.batches} steps, " * (not evaluate)
        arithmetic = f"amp {self.model.amp or 'off'}, seed {self.progress.seed}"
        return f"{length}{distributed.processes()}, batch {batch}, {arithmetic}"

    def tuner(self, log: RunLog, stop: StopRequest, about: dict, objective: Objective, classes: Any) -> Tuner:
        """The training, see :class:`moco.eval.finetune.Tuner`."""
        return Tuner(
            self.model, self.optimizer, self.scaler, self.plan, self.progress, log, stop, about, objective, self.lrs,
            self.ema, classes,
        )  # fmt: skip


def build_parts(
    model: Classifier, config: OptimizerConfig, lr_backbone: float, layer_decay: float | None, plan: TrainPlan,
    seed: int, epoch: int,
) -> Parts:  # fmt: skip
    """Optimizer, scaler and moving average of a run that begins in ``epoch``; ``config`` has the layer's rate."""
    groups = model.groups(config.lr, lr_backbone, config.weight_decay, layer_decay)
    optimizer = build_optimizer(config, groups)
    scaler = torch.amp.GradScaler(distributed.device().type, enabled=model.amp is torch.float16)
    ema = moving_average(model, config.ema, config.ema_epoch, plan.steps_per_epoch)
    lrs = [group["lr"] for group in optimizer.param_groups]
    return Parts(model, optimizer, scaler, ema, lrs, plan, Progress(seed, epoch), model.backbone())


def open_sets(
    images: Images, views: EvalData, model: Classifier, log: RunLog
) -> tuple[LabelledBatches, LabelledBatches]:
    """Batches to train on and to evaluate each epoch on."""
    training = views.of(images.train, training=True)
    selecting = views.of(images.val or images.test or images.train)
    check_batch(model, training.sampler)
    if not images.val and not images.evaluate:
        log.line(CHOSEN_ON_TEST)
    return training, selecting


def last_scores(
    tuner: Tuner, score: Score | None, selecting: LabelledBatches, images: Images, views: EvalData
) -> tuple[Score | None, Score | None]:
    """Of the network that is handed on, on the validation and on the test images; ``score``: its last epoch's."""
    score = score or finetune.evaluate(tuner.evaluated, selecting)
    if not images.val:
        return None, score
    return score, finetune.evaluate(tuner.evaluated, views.of(images.test)) if images.test else None


def measure_novel(tuner: Tuner, novel: Source, images: EvalData, config: FewShotConfig) -> dict[str, Any]:
    """Few-shot accuracy of the encoder's features, told in the log: entries of result.json."""
    model = tuner.evaluated
    extractor = FeatureExtractor(images, distributed.device(), model.mean, model.std, model.amp)
    values, asked, summary = fewshot.measure_few_shot(model.encoder, novel, extractor, config)
    tuner.log.line(summary)
    return values | {"few_shot": asked}


def write_report(log: RunLog, scores: tuple[Score | None, Score | None], result: dict[str, Any], save_dir: str) -> None:
    """The result as a file, whose name goes by its ``mode``, then the last line."""
    write_result(result, save_dir, "evaluate.json" if result["mode"] == "evaluate" else finetune.RESULT)
    log.line(finetune.last_line(*scores))
