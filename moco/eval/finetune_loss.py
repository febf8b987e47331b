"""What fine-tuning minimises: cross-entropy, or (1 - alpha) cross-entropy + alpha times a contrastive loss.

Mixup, CutMix and random erasing are timm's. They belong to cross-entropy: the contrastive loss always compares unmixed
views, because a mixed image belongs to two classes at once.

Legend: N images on this process, V views an image, C feature width, K classes, h x w pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moco import seeding
from moco.config import ObjectiveConfig
from moco.methods.losses import compare, schane, supcon
from moco.models.base import StepOutput
from moco.train.metrics import TOP5_FROM, accuracy


@dataclass(frozen=True)
class Objective:
    """A loss and what is done to images for it; classes: K."""

    config: ObjectiveConfig
    classes: int

    @property
    def contrasts(self) -> bool:
        """Whether there is a contrastive loss."""
        return self.config.loss != "ce"

    @property
    def views(self) -> int:
        """Random views an image that it needs."""
        return 2 if self.contrasts else 1

    def __call__(
        self, prepare: Callable[[Tensor], Tensor], wrapped: nn.Module, batch: dict[str, Tensor], *where: int
    ) -> StepOutput:
        """The loss of a batch: ``image`` (N, V, channels, h, w) or (N, channels, h, w) uint8, ``label``, ``index``.

        Args:
            prepare: uint8 images to the encoder's input.
            wrapped: the network with gradient averaging; called once, as DistributedDataParallel needs it.
            batch: on the network's device.
            where: (seed, step, rank), which key mixup and erasing.
        """
        images, labels, config = batch["image"], batch["label"], self.config
        if images.ndim == 4:
            images = images[:, None]
        N, V = images.shape[:2]
        pixels = prepare(images.transpose(0, 1).flatten(0, 1))  # (VN, channels, h, w), first all first views
        views = labels.repeat(V)  # (VN,)
        target, smoothing = views, config.smoothing
        with seeding.library_randomness("mix", *where):
            if config.erase:
                from timm.data.random_erasing import RandomErasing

                pixels = RandomErasing(config.erase, mode="pixel", device=pixels.device.type)(pixels)
            if config.mixup > 0 or config.cutmix > 0:
                mixed, target = self._mixed(pixels[:N], labels)
                smoothing = 0.0  # the targets are smoothed already
                pixels = torch.cat([pixels, mixed]) if self.contrasts else mixed
        logits, features = wrapped(pixels, True) if self.contrasts else (wrapped(pixels), None)  # (.., K), (.., C)
        loss, terms = F.cross_entropy(logits[-len(target) :], target, label_smoothing=smoothing), {}
        if features is not None:
            contrast, alone = self._contrast(features[: V * N].unflatten(0, (V, N)).transpose(0, 1), batch)
            terms = {"cross_entropy": loss.detach(), "contrast": contrast.detach(), "alone": alone.detach()}
            loss = (1 - config.alpha) * loss + config.alpha * contrast
        return _output(loss, logits[: V * N], views, terms)

    def _contrast(self, features: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The contrastive loss of this process's (N, V, C) features against those of all processes, and the share of
        anchors without a positive."""
        # an image that fills up the last batch may come twice: it is the same image, not a negative of itself
        groups = batch["index"] if self.config.loss == "simclr" else batch["label"]
        pairs = compare(features, groups)
        if self.config.loss == "schane" and self.config.estimator == "hard":
            losses = schane(pairs, self.config.T, self.config.beta)
        else:
            losses = supcon(pairs, self.config.T)
        return losses.mean(), pairs.alone.float().mean()

    def _mixed(self, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images mixed with the batch in reverse order, (N, channels, h, w), and (N, K) targets.

        timm mixes even batches only: the last image of an odd one stays as it is.
        """
        from timm.data.mixup import Mixup, mixup_target

        config, even = self.config, len(labels) - len(labels) % 2
        mix = Mixup(config.mixup, config.cutmix, label_smoothing=config.smoothing, num_classes=self.classes)
        mixed, target = pixels.clone(), mixup_target(labels, self.classes, smoothing=config.smoothing)
        if even:
            mixed[:even], target[:even] = mix(mixed[:even].clone(), labels[:even])
        return mixed, target


def _output(loss: Tensor, logits: Tensor, labels: Tensor, terms: dict[str, Tensor]) -> StepOutput:
    """Its statistics are accuracies in percent and ``terms``, the parts of the loss. logits: (M, K) of unmixed views,
    or of mixed ones where only those were computed."""
    acc1, acc5 = (100.0 * hits / len(labels) for hits in accuracy(logits, labels, (1, 5)))
    five = {"train_acc5": acc5} if logits.shape[1] >= TOP5_FROM else {}
    logits = logits.detach()
    return StepOutput(loss, {"train_acc1": acc1, **five, **terms}, logits, logits[:0], logits[:0])
