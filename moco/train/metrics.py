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
