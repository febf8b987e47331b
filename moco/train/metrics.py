"""What training measures of logits and features. Legend: N images, C classes or feature width."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accuracy(logits: Tensor, labels: Tensor, topk: tuple[int, ...] = (1,)) -> list[Tensor]:
    """For each k, how many labels are among the k largest logits: counts, () int64, so that parts can be added.

    Args:
        logits: (N, C).
        labels: (N,) int64.
        topk: a k above C counts as C.
    """
    highest = logits.topk(min(max(topk), logits.shape[1]), dim=1).indices  # (N, max k), best first
    hits = highest == labels[:, None]
    return [hits[:, :k].sum() for k in topk]


TOP5_FROM = 6  # classes: of fewer every label is among the five largest


def without_top5(classes: int) -> dict[str, dict[str, str]]:
    """What a result says about top-5 accuracies that are null; nothing where they are measured."""
    why = f"100 % by definition: {classes} classes"
    return {"not_measured": {"acc5": why, "val_acc5": why}} if classes < TOP5_FROM else {}


class Mean:
    """The mean of numbers that arrive in parts. Tensors are added where they are: a step need not wait for them."""

    def __init__(self) -> None:
        self.total: float | Tensor = 0.0
        self.count = 0

    def add(self, value: float | Tensor) -> None:
        """One number more."""
        self.total = (value.detach() if isinstance(value, Tensor) else value) + self.total
        self.count += 1

    @property
    def value(self) -> float:
        """NaN before the first number."""
        return float(self.total) / self.count if self.count else math.nan


def alignment(q: Tensor, k: Tensor) -> Tensor:
    """Mean squared distance of unit rows to their positives, (): E |q - k|^2 (Wang and Isola, arXiv 2005.10242)."""
    return (q - k).square().sum(1).mean()


def uniformity(q: Tensor, t: float = 2.0) -> Tensor:
    """log of the mean of exp(-t |q_i - q_j|^2) over pairs i < j of unit rows, () (arXiv 2005.10242); low is even."""
    squared = torch.pdist(q).square()
    return torch.logsumexp(-t * squared, 0) - torch.tensor(float(len(squared)), device=q.device).log()


class QueueWatch:
    """Finds a loss that was low only because old keys could be told from new ones by their age, and rises as they no
    longer can: a stale queue. Told of every report, asked at the end of every epoch.

    RISE, FALL and AGE are by how much the means of an epoch differ from those of the epoch with the lowest loss. In
    docs/experiments.md is where they come from.
    """

    RISE = 0.03  # of loss_ratio
    FALL = 0.5  # top1 at most this share of what it was
    AGE = 0.1  # of old_mass
    NAMES = ("loss_ratio", "top1", "old_mass")

    def __init__(self) -> None:
        self.means = {name: Mean() for name in self.NAMES}
        self.forget()

    def forget(self) -> None:
        """The loss is another from here on."""
        self.easiest: dict[str, float] = {}
        self.told = False

    def note(self, values: dict[str, float]) -> None:
        """Add a report."""
        for name in self.NAMES:
            self.means[name].add(values.get(name, math.nan))

    def judge(self, epoch: int, early: bool, chance: str, m: float) -> str:
        """What is wrong after ``epoch``, or an empty string; it is said once.

        Args:
            early: the epoch is of the run's beginning, whose loss says nothing yet.
            chance, m: the formula of chance and the key encoder's momentum, for the sentence.
        """
        now = {name: mean.value for name, mean in self.means.items()} | {"epoch": epoch}
        self.means = {name: Mean() for name in self.NAMES}
        if early or math.isnan(sum(now.values())):
            return ""
        was = self.easiest = self.easiest or now
        if now["loss_ratio"] < was["loss_ratio"]:
            self.easiest = now
        older = now["old_mass"] - was["old_mass"] >= self.AGE and now["top1"] <= self.FALL * was["top1"]
        if self.told or not older or now["loss_ratio"] - was["loss_ratio"] < self.RISE:
            return ""
        self.told = True
        return (
            f"since epoch {was['epoch']} the loss has risen from {was['loss_ratio']:.3f} to {now['loss_ratio']:.3f} of "
            f"{chance} and top1 has fallen from {was['top1']:.1f} to {now['top1']:.1f}: the queue was stale, its old "
            "keys were told from new ones by their age (its older half had "
            f"{100 * was['old_mass']:.0f} % of the softmax mass, now {100 * now['old_mass']:.0f} %; 50 % is even). "
            f"Raise --moco-m (here {m:g}) or lower --lr."
        )
