"""Contrastive losses over a batch: SupCon, SimCLR, DCL, HCL and SCHaNe as pure functions of cosines and masks.

Legend: N images of this process, G of all processes, V views an image, L small crops an image, C feature width, A
anchors (rows whose loss is asked for), M candidates (rows they are compared with), T temperature. B of the papers is G
here.

Every loss takes :class:`Pairs` and gives one number an anchor; its mean over all anchors is what a step optimises. With
the candidates of all processes, the mean over the processes of these means is the loss of one process with the whole
batch. An anchor without a positive gives 0, and ``Pairs.alone`` says which those are. Computed in float32 (float64 for
float64 features) whether or not autocast is on, and in logarithms throughout: finite at any temperature.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moco import distributed
from moco.config import InBatchConfig
from moco.kernels.spec import mean_hardest
from moco.methods.registry import METHODS

Loss = Callable[["Pairs", float], Tensor]  # pairs, temperature -> (A,)
CONTRAST_MODES = ("all", "one")
NOWHERE = -1  # among the candidates


class Pairs(NamedTuple):
    """Anchors against candidates. An anchor's own row is neither a positive nor a negative of it."""

    cosine: Tensor  # (A, M)
    positive: Tensor  # (A, M) bool
    negative: Tensor  # (A, M) bool

    @property
    def alone(self) -> Tensor:
        """(A,) bool: anchors without a positive."""
        return ~self.positive.any(1)

    def first(self, anchors: int) -> Pairs:
        """Of so many anchors."""
        return Pairs(*(rows[:anchors] for rows in self))


def compare(
    z: Tensor, groups: Tensor, *, contrast_mode: str = "all", mask: Tensor | None = None, local: Tensor | None = None
) -> Pairs:
    """Every view of this process against every view of all processes, with a gradient.

    Args:
        z: (N, V, C) features, of any length and dtype.
        groups: (N,) int64. Rows of one group are positives of each other: labels for supervised losses, the images'
            own numbers for SimCLR.
        contrast_mode: all: every view is an anchor, the published setting; one: the first view of each image is.
        mask: (N, G) bool in place of ``groups``: which of the images of all processes are of which image's group.
        local: (N, L, C) features of small crops, anchors behind the others and no candidates.

    Returns Pairs with A = N V (N with "one") anchors, image by image, then N L, and M = G V candidates.

    Raises:
        ValueError: shapes that do not fit.
    """
    if z.dim() != 3 or groups.shape != z.shape[:1] or contrast_mode not in CONTRAST_MODES:
        raise ValueError(f"z {tuple(z.shape)}, groups {tuple(groups.shape)}, {contrast_mode}: want (N,V,C) (N,) all")
    everyone, everyones_groups = distributed.all_gather_with_grad(z), distributed.all_gather(groups)
    V = z.shape[1]
    anchors_an_image = V if contrast_mode == "all" else 1
    view = torch.arange(V, device=z.device)
    image = distributed.rank() * len(z) + torch.arange(len(z), device=z.device)
    own = (image[:, None] * V + view[:anchors_an_image]).flatten()  # (A,) where an anchor is among the candidates
    of = torch.arange(len(z), device=z.device).repeat_interleave(anchors_an_image)  # (A,) which image an anchor is of
    asking = [z[:, :anchors_an_image]]
    if local is not None:
        asking.append(local)
        crops = torch.arange(len(z), device=z.device).repeat_interleave(local.shape[1])
        of, own = torch.cat([of, crops]), torch.cat([own, torch.full_like(crops, NOWHERE)])
    with torch.autocast(z.device.type, enabled=False):
        anchors = [unit(each).flatten(0, 1) for each in asking]
        cosine = torch.cat(anchors) @ unit(everyone).flatten(0, 1).T  # (A, M)
    other = own[:, None] != torch.arange(cosine.shape[1], device=z.device)  # (A, M)
    if mask is None:
        same = groups[of][:, None] == everyones_groups.repeat_interleave(V)  # (A, M)
        return Pairs(cosine, same & other, ~same)
    same = mask[of].repeat_interleave(V, 1)  # (A, M)
    return Pairs(cosine, same & other, ~same & other)


def unit(z: Tensor) -> Tensor:
    """Rows of length 1, of any width; float32, or float64 of float64."""
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


@torch.no_grad()
def rank_statistics(pairs: Pairs) -> dict[str, Tensor]:
    """Shares of anchors with a positive nearer than every negative and than all but four, the mean over anchors of the
    largest similarity to a negative, and the share of anchors without a positive, which give no loss."""
    nearest = pairs.cosine.masked_fill(~pairs.positive, -torch.inf).amax(1, keepdim=True)  # (A, 1)
    negatives = pairs.cosine.masked_fill(~pairs.negative, -torch.inf)  # (A, M)
    rank = (negatives > nearest).sum(1)  # (A,)
    alone = pairs.alone
    top1, top5 = (((rank < n) & ~alone).float().mean() for n in (1, 5))
    hardest = mean_hardest(negatives.amax(1))
    return {"top1": top1, "top5": top5, "hardest": hardest, "no_positive": alone.float().mean()}


def chance(config: InBatchConfig, images: int) -> float:
    """The loss, before any training, of an anchor whose candidates all look alike; ``images``: G."""
    left_out = getattr(METHODS[config.method].hooks, "left_out", None)
    terms = config.views * images - 1 - (left_out(config.views) if left_out else 0)  # of an anchor's denominator
    of_crop = terms if left_out else terms + 1  # where all candidates count there is none that is a crop itself
    scale = config.T / config.base_temperature if config.base_temperature else 1.0
    anchors = config.views if config.contrast_mode == "all" else 1
    total = anchors * math.log(max(terms, 2)) + config.local * math.log(max(of_crop, 2))
    return scale * total / (anchors + config.local) if config.local else scale * math.log(max(terms, 2))


# ------------------------------------------------------------------------------------------------------ losses


def supcon(pairs: Pairs, temperature: float, base_temperature: float | None = None) -> Tensor:
    """(A,) -1/|P| sum_{p in P} log( e^{s_p/T} / sum_{a != i} e^{s_a/T} ): the sum over positives outside the log.

    Source: arXiv 2004.11362, eq. 2. With instances as groups and V = 2 it is SimCLR's (arXiv 2002.05709, eq. 1).
    ``base_temperature`` multiplies by T / base_temperature, as the public code does with 0.07; None leaves it out.
    """
    logits, positive, negative = _logits(pairs, temperature)
    loss = _log_sum(logits, positive | negative) - _mean(logits, positive)
    scale = 1.0 if base_temperature is None else temperature / base_temperature
    return torch.where(pairs.alone, 0.0, scale * loss)


def dcl(pairs: Pairs, temperature: float) -> Tensor:
    """(A,) mean over positives of -log( e^{s_p/T} / sum_{n in N} e^{s_n/T} ): the positive leaves the denominator.

    Source: Decoupled Contrastive Learning, arXiv 2110.06848. An anchor without a negative gives 0 as well.
    """
    logits, positive, negative = _logits(pairs, temperature)
    loss = _log_sum(logits, negative) - _mean(logits, positive)
    return torch.where(~pairs.alone & negative.any(1), loss, 0.0)


def hcl(pairs: Pairs, temperature: float, beta: float = 1.0, tau_plus: float = 0.1, estimator: str = "hard") -> Tensor:
    """(A,) mean over positives of -log( e^{s_p/T} / (e^{s_p/T} + Ng) ), the negatives weighed by their hardness.

    With n_j = e^{s_j/T} of the N negatives, R = N sum_j n_j^{1+beta} / sum_j n_j^beta and
    Ng = max( (R - tau_plus N e^{s_p/T}) / (1 - tau_plus), N e^{-1/T} ); ``easy``: Ng = sum_j n_j, which is SimCLR.
    Source: Contrastive Learning with Hard Negative Samples, arXiv 2010.04592, as its public code has it, for V = 2.
    """
    logits, positive, negative = _logits(pairs, temperature)
    if estimator == "easy":
        log_ng = _log_sum(logits, negative)[:, None]  # (A, 1)
    else:
        log_ng = _log_debiased(logits, negative, temperature, beta, tau_plus)  # (A, M)
    return _mean(-F.logsigmoid(logits - log_ng), positive)


def schane(pairs: Pairs, temperature: float, beta: float = 1.0) -> Tensor:
    """(A,) -1/|P| sum_p log( e^{s_p/T} / (sum_{p' in P} e^{s_p'/T} + sum_n w_n e^{s_n/T}) ), w_n by hardness.

    w_n = e^{beta s_n/T} / mean_m e^{beta s_m/T} over the negatives m; beta 0: all 1, which is SupCon.
    A RECONSTRUCTION from the published description of SCHaNe, arXiv 2308.14893; its own formula was not available.
    """
    logits, positive, negative = _logits(pairs, temperature)
    log_negatives = _log_weighed(logits, negative, beta)
    log_positives = torch.where(pairs.alone, 0.0, _log_sum(logits, positive))
    loss = torch.logaddexp(log_positives, log_negatives) - _mean(logits, positive)
    return torch.where(pairs.alone, 0.0, loss)


# ------------------------------------------------------------------------------------------------------- parts


def _logits(pairs: Pairs, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    return pairs.cosine / temperature, pairs.positive, pairs.negative


def _log_sum(x: Tensor, among: Tensor) -> Tensor:
    """(A,) log of the sum of e^x over the columns in ``among``; -inf, with gradient 0, where there are none.

    Masked before the maximum: an anchor's own row is the largest of all, and at T = .01 nothing else would be left.
    """
    some = among.any(1)
    kept = x.masked_fill(~among, -torch.inf).masked_fill(~some[:, None], 0.0)
    return torch.where(some, kept.logsumexp(1), -torch.inf)


def _mean(x: Tensor, among: Tensor) -> Tensor:
    """(A,) the mean of x over the columns in ``among``; 0 where there are none."""
    return torch.where(among, x, 0.0).sum(1) / among.sum(1).clamp(min=1)


def _log_weighed(s: Tensor, negative: Tensor, beta: float) -> Tensor:
    """(A,) log of sum_n w_n e^{s_n} with weights w_n = e^{beta s_n} of mean 1; -inf without negatives."""
    some = negative.any(1)
    mean = torch.where(some, _log_sum(beta * s, negative), 0.0) - negative.sum(1).clamp(min=1).to(s.dtype).log()
    return _log_sum((1 + beta) * s, negative) - mean


def _log_debiased(s: Tensor, negative: Tensor, temperature: float, beta: float, tau_plus: float) -> Tensor:
    """(A, M) log Ng with each candidate as the positive; -inf without negatives."""
    log_r = _log_weighed(s, negative, beta)[:, None]  # (A, 1)
    log_n = negative.sum(1, keepdim=True).to(s.dtype).log()  # (A, 1)
    floor = (log_n - 1 / temperature).expand_as(s)
    if tau_plus == 0:
        return torch.maximum(log_r, floor)
    # R - tau N e^s = R (1 - e^x); where x >= 0 nothing of it is left
    x = log_n + math.log(tau_plus) + s - log_r
    left = x < 0
    log_ng = log_r + torch.log(-torch.expm1(torch.where(left, x, -1.0))) - math.log1p(-tau_plus)
    return torch.where(left, torch.maximum(log_ng, floor), floor)
