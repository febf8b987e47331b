"""The linear probe: one linear layer on frozen features, by the protocol of MoCo's main_lincls.py.

The encoder stays in eval mode and exactly two tensors are trained, the layer's weight (normal, deviation .01) and its
bias (0), by SGD with a rate that drops 10x at given epochs, where no other optimizer or schedule is asked for. That
nothing else moved is checked against the file the encoder came from, after every epoch. He et al., arXiv 1911.05722,
section 4.1.

Several rates are several heads: each is the layer, optimizer and order of operations of a run with that rate alone, and
only the features, which no head changes, are computed once. So each head equals its own run bit for bit.

Legend: N images on this process, F feature width, C classes, n images of the set, B images of a step in all.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import distributed, files
from moco.config import OptimizerConfig
from moco.data import EpochSampler, Loader, Source, Sources
from moco.data.sources.base import without_labels
from moco.data.sources.subset import Subset, split
from moco.errors import UserError
from moco.eval.classifier import Batch, Classifier, Score, counted_once, predictions_of, score_sums
from moco.eval.features import EvalData, Features, LabelledBatches, check_readable
from moco.models.encoder import head_of
from moco.train.metrics import accuracy
from moco.train.optimizers import build_optimizer
from moco.train.plan import Progress, TrainPlan
from moco.train.timers import Stopwatch

# ------------------------------------------------------------------------------------------------ before a run


def labelled_pair(sources: Sources, val_share: float = 0.0) -> tuple[Source, Source]:
    """The labelled training and held-out images; UserError when the data has none.

    With ``val_share`` that share of every class's training images is held out in the place of the others, which stay
    unseen: what a choice among settings may look at.
    """
    if sources.train is None or sources.val is None:
        why = sources.no_pair or without_labels(sources.pretrain)
        raise UserError(f"{why}: a probe needs labelled training images and labelled held-out ones (--val-data).")
    if not val_share:
        return sources.train, sources.val
    assert sources.train.labels is not None
    train, val = split(sources.train.labels, 100.0, val_share, seed=0)
    return Subset(sources.train, train, "training part"), Subset(sources.train, val, "held-out part")


def check_sets(train: Source, val: Source, classes: int | None, most_bad: int | None) -> None:
    """UserError when the labelled images have another number of ``classes`` than --num-classes says, or so many of
    those that are held out cannot be read that nothing would be measured. Every process has to call."""
    found = len(train.classes or ())
    if classes not in (None, found):
        raise UserError(f"{train.name} has {found} classes, not {classes}: correct --num-classes or leave it out.")
    check_readable(val, most_bad)


# ---------------------------------------------------------------------------------------------------------- heads


class LinearClassifier:
    """One linear layer, the optimizer that trains it at one base rate, and what it has reached.

    Args:
        layer: the classifier; its weight and bias are trained in place.
        config: its rate is the base rate ``lr``; ``rate`` is the present one.
        smoothing: of the training labels, 0..1.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, config: OptimizerConfig, smoothing: float = 0.0) -> None:
        self.lr, self.layer, self.smoothing = config.lr, layer, smoothing
        self.name = f"{self.lr:.12g}"  # the base rate as it is typed
        self.classes = layer.weight.shape[0]  # C
        assert layer.bias is not None
        self.optimizer = build_optimizer(config, [layer.weight, layer.bias])
        self.score: Score | None = None  # of the newest weights
        self.best = 0.0  # highest top-1 of any epoch
        self.diverged = False  # its loss was not finite; it is trained no more
        self._wrapped = distributed.wrap(layer)
        self._pixels = (1, 1) if isinstance(layer, nn.Conv2d) else ()  # some timm classifiers are 1x1 convolutions

    @property
    def rate(self) -> float:
        """The optimizer's present rate."""
        return self.optimizer.param_groups[0]["lr"]

    @rate.setter
    def rate(self, value: float) -> None:
        self.optimizer.param_groups[0]["lr"] = value

    def logits(self, x: Tensor) -> Tensor:
        """(N, C) from features (N, F)."""
        return self._wrapped(x.view(*x.shape, *self._pixels)).flatten(1)

    def step(self, x: Tensor, labels: Tensor) -> Tensor:
        """One step on features (N, F) and labels (N,); (3,) loss, top-1 and top-5 in percent, from before it."""
        logits = self.logits(x)
        loss = F.cross_entropy(logits, labels, label_smoothing=self.smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return torch.stack([loss.detach(), *(100.0 * c / len(labels) for c in accuracy(logits, labels, (1, 5)))])


def make_classifiers(
    probe: Classifier, lrs: list[float], config: OptimizerConfig, smoothing: float = 0.0
) -> list[LinearClassifier]:
    """One for each rate, all from the same first weights; the first is the encoder's own layer."""
    own: Any = probe.encoder.get_submodule(head_of(probe.encoder))
    layers = [own, *(copy.deepcopy(own) for _ in lrs[1:])]
    return [LinearClassifier(layer, replace(config, lr=lr), smoothing) for layer, lr in zip(layers, lrs, strict=True)]


def set_rates(heads: list[LinearClassifier], plan: TrainPlan, at: Progress) -> None:
    """Each head's rate at this step of the plan, whose own rate is of no importance."""
    for head in heads:
        head.rate = replace(plan, lr=head.lr).lr_at(at.epoch, plan.done(at))


def leader(heads: list[LinearClassifier]) -> LinearClassifier:
    """The head with the highest top-1 at the last validation; of equals, the first typed."""
    return max(heads, key=lambda head: head.score.acc1 if head.score else -1.0)


def note_best(heads: list[LinearClassifier]) -> LinearClassifier | None:
    """Keep each head's best top-1; the head that has just beaten all heads' best of all epochs, if one has."""
    before = max(head.best for head in heads)
    for head in heads:
        head.best = max(head.best, head.score.acc1 if head.score else 0.0)
    first = leader(heads)
    return first if first.best > before else None


# ------------------------------------------------------------------------------------------- batches of features


class FreshFeatures:
    """Features computed from images as they come: under new random crops in every epoch, or for a held-out set."""

    def __init__(self, probe: Classifier, images: LabelledBatches) -> None:
        self.probe, self.images, self.sampler, self.device = probe, images, images.sampler, probe.device
        self.whole, self.judge, self.count_bad = images.whole, images.judge, images.count_bad

    @property
    def loader(self) -> Loader:
        """Of the images."""
        return self.images.loader

    def batches(self, epoch: int, watch: Stopwatch, first: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch from ``first`` on; time spent waiting for images goes to ``watch``."""
        for batch in self.images.batches(epoch, first, watch):
            yield self.probe.features(batch["image"]), batch["label"].to(self.device), batch["bad"] < 0


@dataclass(frozen=True)
class CachedFeatures:
    """Features of all n images on the CPU, computed once and without augmentation; those of an image that cannot be
    read are of the one that replaced it."""

    found: Features
    sampler: EpochSampler
    device: torch.device
    loader: None = None  # of images; :class:`FreshFeatures` has one

    def judge(self, _: Sequence[int]) -> int:
        """As :meth:`LabelledBatches.judge`, which has been done."""
        return self.found.unread

    def count_bad(self) -> int:
        """As :meth:`LabelledBatches.count_bad`."""
        return self.found.unread

    def whole(self, work: Callable[[], None]) -> None:
        """As :meth:`LabelledBatches.whole`: no image is read any more."""
        work()

    def batches(self, epoch: int, watch: Stopwatch, first: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch from ``first`` on, the images that :class:`FreshFeatures` would take."""
        self.sampler.set_position(epoch, first)
        for keys in self.sampler:
            rows = [index for _, index in keys]
            x, labels = self.found.x[rows].to(self.device), self.found.labels[rows].to(self.device)
            yield x, labels, self.found.readable[rows]


ProbeData = FreshFeatures | CachedFeatures


def probe_data(
    probe: Classifier, images: EvalData, source: Source, *, training: bool = False, cached: bool = False
) -> ProbeData:
    """What a probe is trained or evaluated on; no image is dropped.

    Args:
        training: shuffled, and random crops unless ``cached``; else whole images in order.
        cached: features are computed once from whole images.
    """
    if not cached:
        return FreshFeatures(probe, images.of(source, training))
    sampler = images.sampler(source, training)  # first: it refuses a batch that cannot be divided
    found = probe.extractor(images).whole(probe.encoder, source, unread=True)
    return CachedFeatures(found, sampler, probe.device)


# ------------------------------------------------------------------------------------------------------- validate


def validate(heads: list[LinearClassifier], data: ProbeData, predictions: bool = False) -> None:
    """Give each head its score on the held-out images that can be read, each counted once.

    Args:
        predictions: also keep what was predicted for each image.

    Raises:
        TooManyUnreadError: above :func:`moco.eval.features.most_unreadable`.
    """
    data.whole(lambda: _validate(heads, data, predictions))


@torch.no_grad()
def _validate(heads: list[LinearClassifier], data: ProbeData, predictions: bool) -> None:
    n, heads = data.sampler.n, [head for head in heads if not head.diverged]
    sums = torch.zeros(len(heads), 4, dtype=torch.float64, device=data.device)
    parts: list[list[Tensor]] = [[] for _ in heads]
    missing: list[int] = []
    for x, labels, rows in counted_once(data.batches(0, Stopwatch()), n, missing):
        kept = rows.to(data.device)
        for head, total, part in zip(heads, sums, parts, strict=True):
            logits = head.logits(x)
            if predictions:
                part.append(distributed.all_gather(predictions_of(logits, labels, kept)).cpu())
            total += score_sums(logits[kept], labels[kept])
    data.judge(missing)
    for head, total, part in zip(heads, sums, parts, strict=True):
        found = torch.cat(part) if part else None
        head.score = Score.of(total, n, head.classes, None if found is None else found[found[:, 0] >= 0])


def write_result(result: dict[str, Any], save_dir: str, name: str) -> None:
    """A small JSON file for programs, complete whenever it exists."""
    if distributed.is_main():
        files.write_json(result, os.path.join(save_dir, name))
