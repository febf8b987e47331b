"""From the choices of a run to its model: with a queue (MoCo, MoCHi, SynCo, SupCon), or by its batch alone.

Legend: C feature width, K queue rows, T temperature, n images of the data set, V views an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moco import distributed, kernels
from moco.config import InBatchConfig, MoCoConfig
from moco.methods import losses
from moco.methods.negatives import HardNegatives, Recipe, group_counts
from moco.methods.registry import METHODS
from moco.models.batchnorm import choose_splits, describe_batchnorm, has_batchnorm, split_batchnorm, sync_batchnorm
from moco.models.in_batch import BatchContrast
from moco.models.moco import MoCo
from moco.models.supcon_queue import LabelledMoCo


class Context(NamedTuple):
    """What a model needs of its run besides its config.

    images: n. batch: images a step on this process. labels: (n,) int64 on the device, where images of one class are the
    same. before: what the run that goes on computes its loss by.
    """

    seed: int
    images: int
    batch: int
    labels: Tensor | None = None
    before: kernels.Earlier | None = None


def with_queue(encoder_q: nn.Module, encoder_k: nn.Module, config: MoCoConfig, context: Context) -> tuple[MoCo, str]:
    """MoCo with the synthetic negatives of its config, its queue with labels where there are any, and a line for the
    log. What the config leaves open is chosen here: the splits, the mask, the loss's implementation. The shuffle is
    left out where it can keep nothing from leaking."""
    device, world = distributed.device(), distributed.world_size()
    splits = choose_splits(config.bn_splits, context.batch, world) if has_batchnorm(encoder_q) else 1
    shuffled = config.shuffle and has_batchnorm(encoder_q) and (world > 1 or splits > 1)
    masked = context.images / 10 < config.K if config.mask_same_image is None else config.mask_same_image
    config = replace(config, shuffle=shuffled, mask_same_image=masked)
    recipe, extra = synthetic_negatives(config, context.seed)
    config = replace(config, n_hard=extra.hard) if extra else config
    encoders = split_batchnorm(encoder_q, splits), split_batchnorm(encoder_k, splits)
    summary = describe_batchnorm(encoders[0], world, splits, shuffled)
    if context.labels is not None:
        model = LabelledMoCo(*encoders, config, labels=context.labels, seed=context.seed, extra=extra)
        return model, f"loss by labels in fp32; {summary}"
    n_hard = config.n_hard if recipe else 0
    counts = group_counts(recipe, config.negatives.control)
    size = kernels.Size(context.batch, config.K, config.C, n_hard, counts, masked, config.T)
    head = kernels.choose(config.loss_impl, config.loss_precision, device, size, context.before, _worst)
    asked = [config.loss_impl, config.loss_precision]
    config = replace(config, loss_impl=head.impl, loss_precision=head.precision)
    model = MoCo(*encoders, config, seed=context.seed, extra=extra)
    model.head = kernels.Earlier(head.impl, head.precision, kernels.kind(device), asked)
    summary = f"loss by {head}; {summary}"
    return model, summary + ("; queue rows of the same image are left out" if masked else "")


def synthetic_negatives(config: MoCoConfig, seed: int) -> tuple[Recipe, HardNegatives | None]:
    """The rows of the config's recipe and the hook that draws them on this process; None without rows."""
    made = HardNegatives.of(config, seed, distributed.rank(), distributed.device())
    return made.recipe, made if made.recipe else None


def _worst(numbers: list[float]) -> list[float]:
    """The largest of each over the processes."""
    return distributed.max_over_ranks(torch.tensor(numbers, device=distributed.device())).tolist()


def in_batch(encoder: nn.Module, config: InBatchConfig, context: Context) -> tuple[BatchContrast, str]:
    """The model of a method without a queue, and a line for the log."""
    views, hooks, base = config.views, METHODS[config.method].hooks, config.base_temperature
    images = context.batch * distributed.world_size()
    norm = "no BatchNorm in the encoder"
    if has_batchnorm(encoder):
        which = "both views" if views == 2 else f"all {views} views"
        norm = f"BatchNorm over {which} of {'all processes' if config.sync_bn else 'this process'}"
    if config.sync_bn:
        encoder = sync_batchnorm(encoder)
    chance = losses.chance(config, images)
    model = BatchContrast(encoder, hooks.loss(config), config, chance=chance, labels=context.labels)
    scaled = f", multiplied by T / {base:g}" if base else ""
    return model, f"each view against {views * images - 1} others, loss in fp32{scaled}; {norm}"
