"""From the choices of a run to its model: with a queue (MoCo, MoCHi, SynCo, SupCon), or by its batch alone.

Legend: C feature width, K queue rows, T temperature, n images of the data set, V views an image.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moco import distributed, kernels
from moco.methods import BATCH_METHODS, METHODS
from moco.methods.negatives import HardNegatives, group_counts, starting_at
from moco.models.batchnorm import choose_splits, describe_batchnorm, has_batchnorm, split_batchnorm, sync_batchnorm
from moco.models.in_batch import BatchContrast
from moco.models.moco import MoCo
from moco.models.supcon_queue import LabelledMoCo

Model = MoCo | BatchContrast


def with_queue(
    encoder_q: nn.Module,
    encoder_k: nn.Module,
    *,
    C: int,
    K: int,
    seed: int,
    images: int,
    batch: int,
    labels: Tensor | None,
    base_temperature: float | None,
    negatives: str,
    settings: dict[str, Any],
    n_hard: int,
    hard_start_epoch: int,
    hard_stop_epoch: int | None,
    type_starts: dict[str, int],
    type_start_steps: dict[str, int],
    bn_splits: int | None,
    shuffle_bn: bool,
    mask_same_image: bool | None,
    head_impl: str,
    head_precision: str,
    before: kernels.Earlier | None = None,
    **others: Any,
) -> tuple[MoCo, str]:
    """MoCo, with labels in its queue where ``labels`` (n,) are given, and a line for the log.

    Args:
        images: n. batch: images a step on this process.
        negatives: the method whose recipe of synthetic negatives is used; ``settings``: what the recipe takes.
        hard_start_epoch, hard_stop_epoch, type_starts, type_start_steps: when they are active.
        bn_splits, shuffle_bn: what keeps BatchNorm from leaking; None and True choose.
        mask_same_image: None: where the queue holds more than a tenth of the images.
        before: what the run that goes on computes its loss by.
        others: as :class:`moco.models.moco.MoCo`'s, and so are those without a line here.
    """
    device, world = distributed.device(), distributed.world_size()
    splits = choose_splits(bn_splits, batch, world) if has_batchnorm(encoder_q) else 1
    shuffled = shuffle_bn and has_batchnorm(encoder_q) and (world > 1 or splits > 1)
    masked = images / 10 < K if mask_same_image is None else mask_same_image
    recipe = starting_at(METHODS[negatives].recipe(**settings), type_starts, type_start_steps)
    extra = HardNegatives(recipe, n_hard, C, seed, distributed.rank(), device, hard_start_epoch, hard_stop_epoch)
    encoders = [split_batchnorm(encoder, splits) for encoder in (encoder_q, encoder_k)]
    same = {"C": C, "K": K, "seed": seed, "extra": extra if recipe else None, "n_hard": n_hard, "shuffle": shuffled}
    summary = describe_batchnorm(encoders[0], world, splits, shuffled)
    if labels is not None:
        model = LabelledMoCo(*encoders, labels=labels, base_temperature=base_temperature, **same, **others)
        return model, f"loss by labels in fp32; {summary}"
    size = kernels.Size(batch, K, C, n_hard if recipe else 0, group_counts(recipe), masked, others["T"])
    head = kernels.choose(head_impl, head_precision, device, size, before, _worst)
    model = MoCo(
        *encoders, mask_same_image=masked, head_impl=head.impl, head_precision=head.precision, **same, **others
    )
    model.head = kernels.Earlier(head.impl, head.precision, kernels.kind(device), [head_impl, head_precision])
    summary = f"loss by {head}; {summary}"
    return model, summary + ("; queue rows of the same image are left out" if masked else "")


def _worst(numbers: list[float]) -> list[float]:
    """The largest of each over the processes."""
    return distributed.max_over_ranks(torch.tensor(numbers, device=distributed.device())).tolist()


def in_batch(
    encoder: nn.Module,
    *,
    method: str,
    settings: dict[str, Any],
    T: float,
    batch: int,
    labels: Tensor | None,
    base_temperature: float | None,
    sync_bn: bool,
    images: int,
    seed: int,
    views: int = 2,
    before: kernels.Earlier | None = None,
    **others: Any,
) -> tuple[BatchContrast, str]:
    """The model of a method without a queue, and a line for the log.

    Args:
        method: its name; ``settings``: what its loss takes.
        batch: images a step on this process.
        base_temperature: by which the loss is multiplied, T / base_temperature; already among ``settings``.
        sync_bn: BatchNorm over the batch of all processes.
        images, seed, before: not used, nothing here is drawn or chosen.
        views: V.
        others: as :class:`moco.models.in_batch.BatchContrast`'s.
    """
    candidates = views * batch * distributed.world_size() - 1
    # what stands in an anchor's denominator: all others; the negatives; the negatives and one positive
    terms = candidates - {"dcl": views - 1, "hcl": views - 2}.get(method, 0)
    scale = T / base_temperature if base_temperature else 1.0
    chance = scale * math.log(max(terms, 2))
    norm = "no BatchNorm in the encoder"
    if has_batchnorm(encoder):
        which = "both views" if views == 2 else f"all {views} views"
        norm = f"BatchNorm over {which} of {'all processes' if sync_bn else 'this process'}"
    if sync_bn:
        encoder = sync_batchnorm(encoder)
    model = BatchContrast(encoder, BATCH_METHODS[method].loss(**settings), T=T, chance=chance, labels=labels, **others)
    scaled = f", multiplied by T / {base_temperature:g}" if base_temperature else ""
    return model, f"each view against {candidates} others, loss in fp32{scaled}; {norm}"
