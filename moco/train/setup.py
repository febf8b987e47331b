"""What the flags of a pretraining come to once its images are open: views, batches, model, optimizer, first lines."""

from __future__ import annotations

import contextlib
import math
import os
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import nn

from moco import data, distributed
from moco.config import PretrainConfig, ViewConfig
from moco.data.registry import GUESSED
from moco.data.sources.cache import fits
from moco.errors import UserError, tell
from moco.files import run_of
from moco.kernels import Earlier
from moco.methods import negatives
from moco.methods.registry import FAMILIES
from moco.models import build as models
from moco.models.base import Contrast
from moco.models.batchnorm import has_batchnorm, trains_on
from moco.models.ema import attach_ema
from moco.models.encoder import build_encoder, check_reads, compile_encoders, strided_point
from moco.models.in_batch import BatchContrast
from moco.models.moco import MoCo
from moco.models.supcon_queue import LabelledMoCo
from moco.train import fit
from moco.train.diagnoses import Setting, loader_advice
from moco.train.optimizers import build_optimizer
from moco.train.plan import Progress, TrainPlan, make_plan
from moco.train.pretraining import pick_amp
from moco.train.resume import DONE
from moco.train.start import begin_with, settle_start


@dataclass(frozen=True)
class Views:
    """The views of a run: what was asked for, and what the images decide. aug: name of ``preset``."""

    size: int
    channels: int
    mean: list[float]
    std: list[float]
    aug: str
    preset: data.Preset


def view_settings(config: ViewConfig, images: data.Source) -> Views:
    """Size, channels, statistics and augmentation of the views: the flags', else the data set's own."""
    mean, std = data.channel_statistics(config.dataset, images.channels, config.mean, config.std)
    if images.channels not in (1, 3) and None in (config.mean, config.std) and distributed.is_main():
        tell(
            f"mean {GUESSED[0]} and deviation {GUESSED[1]} are taken for each of {images.channels} channels, of which "
            "nothing is known: --stats auto measures them, --mean and --std set them"
        )
    preset = config.aug or data.dataset_of(config.dataset).preset
    size = config.size or images.native_size or 224
    if config.local.count and (config.local.size or 0) > size:
        raise UserError(
            f"--local-crop-size {config.local.size} is more than the views' {size} px (--size): give at most that, or "
            f"leave it out for {replace(config.local, size=None).beside(size).size}."
        )
    return Views(size, images.channels, mean, std, preset, data.get_preset(preset))


def with_statistics(config: PretrainConfig, args: Namespace, images: data.Source, state: dict) -> PretrainConfig:
    """With --stats auto the statistics of the training images, which ``args.notes`` then says; those of ``state``, the
    checkpoint of a run that goes on, where there is one. Every process has to call: the main one measures.

    Raises:
        UserError: none of the images can be read, or all are of one value.
    """
    if not args.stats:
        return config
    known = run_of(state).get("images") or {}
    if len(known.get("mean", ())) == images.channels == len(known.get("std", ())):
        mean, std, said = known["mean"], known["std"], "--stats auto: mean and std of the checkpoint"
    else:
        mean, std, said = distributed.made_by_main(lambda: _measured(args, images))
    args.notes.append(said)
    return replace(config, views=replace(config.views, mean=tuple(mean), std=tuple(std)))


def _measured(args: Namespace, images: data.Source) -> tuple[list[float], list[float], str]:
    mine = args.overwrite or not os.path.exists(os.path.join(args.save_dir, "log.jsonl"))  # else it is refused soon
    folder = args.cache or (args.save_dir if mine else "")
    found = data.measured_once(images, distributed.share_of_cores(args.workers), folder)
    return found.mean, found.std, str(found)


def open_images(
    args: Namespace, path: str | None, state: dict, options: Callable[[Namespace], dict[str, Any]]
) -> tuple[Namespace, data.Sources]:  # fmt: skip
    """The images of a run and its flags, with what the file of --pretrained and --auto decide of those left open, on
    every process the same; ``notes`` of the flags says what they decided, and what does not go with so few images.

    Args:
        path, state: the checkpoint that the run goes on from, if any.
        options: how images are opened by the flags, :func:`moco.cli.common.image_options`.

    Raises:
        UserError: no such images, an unreadable file of weights, or flags that --auto cannot go with.
    """
    args = settle_start(args, path, state)
    sources = data.open_on_nodes(args.dataset, args.data, **options(args))
    images = sources.pretrain
    looked = args.auto and "size" in args.left_open and images.native_size is None
    side = distributed.from_main(data.short_side(images) if looked and distributed.is_main() else 0)
    place = fit.Place(len(images), side, distributed.nodes(), distributed.local_size())
    if args.auto:
        kept = run_of(state).get("flags", {}) if path else {}
        args, said = fit.choose(args, place, {"moco_k": kept["--moco-k"]} if "--moco-k" in kept else {})
        args.notes.append(said)
    args.notes += fit.misfits(args, place)
    return args, sources


@dataclass(frozen=True)
class PretrainData:
    """The images of a pretraining, and this process's ``batches`` of their views by ``workers``, in the order of
    ``sampler``."""

    sources: data.Sources
    view: Views
    sampler: data.EpochSampler
    workers: int
    batches: data.Loader | data.Finishing


def open_batches(
    sources: data.Sources, config: ViewConfig, seed: int, batch: int, workers: int, drop_last: bool
) -> PretrainData:  # fmt: skip
    """The views of ``sources.pretrain``; ``batch``: images a step on each node."""
    images, world = sources.pretrain, distributed.world_size()
    view = view_settings(config, images)
    sampler = data.EpochSampler(
        len(images), batch * distributed.nodes(), seed, world, distributed.rank(), drop_last=drop_last
    )
    share = distributed.share_of_cores(workers)
    on_device, fast = config.device == "gpu", config.decode == "fast"
    views = data.TwoViews(images, view.preset, view.size, seed, on_device, fast, config.count, config.local)
    batches = data.two_views(views, sampler, share, distributed.device(), marks=True)
    return PretrainData(sources, view, sampler, share, batches)


def build_model(
    config: PretrainConfig, view: Views, seed: int, images: int, batch: int, labels: np.ndarray | None = None,
    before: Earlier | None = None,
) -> tuple[Contrast, str]:  # fmt: skip
    """The model on its device, and a line for the log about its loss, BatchNorm and masking."""
    device, own, family = distributed.device(), config.encoder, FAMILIES[config.family]
    local = config.views.local.beside(view.size)
    shape = {"mlp": own.mlp, "stem": own.stem, "size": view.size, "in_chans": view.channels}
    encoders = [build_encoder(own.arch, own.dim, **shape, any_size=local.count > 0) for _ in range(family.encoders)]
    if local.count and local.size:
        check_reads(encoders[0], own.arch, view.channels, local.size)
    classes = None if labels is None else torch.from_numpy(labels).to(device)
    model_config = replace(config.model, mean=tuple(view.mean), std=tuple(view.std))
    model, summary = family.build(*encoders, model_config, models.Context(seed, images, batch, classes, before))
    if local.count:
        low, high = (f"{100 * x:.3g} %" for x in local.scale)
        summary += f"\n{local.count} small crops an image of {local.size} px, {low} to {high} of it, as queries only"
    if own.begin_with:
        summary += "\n" + begin_with(model, own.begin_with, own.arch)
    model.to(device).to(memory_format=model.layout)
    if own.compile_mode:
        compile_encoders(encoders, own.compile_mode, several=local.count > 0)
    return model, summary


def prepare_training(
    model: Contrast, config: PretrainConfig, view: Views, sampler: data.EpochSampler
) -> tuple[torch.optim.Optimizer, torch.amp.GradScaler, TrainPlan, nn.Module]:
    """What moves the weights, in epochs of the ``sampler``, and the encoder to evaluate (:func:`attach_ema`).

    Raises:
        UserError: what cannot be trained in this arithmetic, or on so few images a step.
    """
    own, device = config.optimizer, distributed.device()
    _check_fewest(model, view, sampler)
    # over all parameters and in their order, as upstream's, so that its checkpoints resume here
    optimizer = build_optimizer(own, [{"params": list(model.parameters())}])
    broken = _strided_point(model, config, view) if device.type == "cpu" else ""
    plan = make_plan(len(sampler), pick_amp(config.amp, device, broken), config.schedule)
    scaler = torch.amp.GradScaler(device.type, enabled=plan.amp is torch.float16)
    return optimizer, scaler, plan, attach_ema(model, optimizer, own.ema, own.ema_epoch, plan.steps_per_epoch)


def _strided_point(model: Contrast, config: PretrainConfig, view: Views) -> str:
    """:func:`strided_point` at the sizes of the run."""
    local = config.views.local.beside(view.size)
    sizes = [view.size, *([local.size] if local.count else [])]
    return next(filter(None, (strided_point(model.encoder_q, view.channels, size) for size in sizes)), "")


def _check_fewest(model: Contrast, view: Views, sampler: data.EpochSampler) -> None:
    at_once = 2 if isinstance(model, BatchContrast) else 1  # views that BatchNorm sees together
    if sampler.fewest < 2 > at_once and not trains_on(model.encoder_q, 1, view.channels, view.size):
        raise UserError(
            f"{sampler.n} images in batches of {sampler.batch} leave a step with one image per process, too few for "
            "BatchNorm: choose another --batch-size" + ", or leave out --no-drop-last." * (not sampler.drop_last)
        )


def setting_of(args: Namespace, given: PretrainData, model: Contrast, plan: TrainPlan) -> Setting:
    """What the diagnoses of a run depend on besides its reports."""
    images, bank, queries = given.sources.pretrain, given.sources.train, given.sources.val
    normed = has_batchnorm(model.encoder_q)
    negatives = isinstance(model, MoCo) and not isinstance(model, LabelledMoCo)
    leaks = isinstance(model, MoCo) and normed and not model.config.shuffle
    of_negatives = _class_shares(images) if negatives else ()
    banked = _class_shares(bank)
    return Setting(
        {**vars(args), "aug": given.view.aug, "wd": args.weight_decay}, plan.total_steps, model.chance_formula, leaks,
        alike=sum(share * share for share in of_negatives) or None,
        guess=100 * max(_class_shares(queries), default=0.0),
        class_size=len(bank) / len(banked) if bank is not None and banked else math.inf,
        together=given.sampler.batch // given.sampler.world // _parts(model) if normed else math.inf,
        loader=cache(lambda: loader_advice(loader_facts(args, images, given.view))),
    )  # fmt: skip


def _parts(model: Contrast) -> int:
    """In how many parts BatchNorm sees a process's batch."""
    return max(getattr(part, "splits", 1) for part in model.encoder_q.modules())


def _class_shares(source: data.Source | None) -> list[float]:
    """Of each class the share of the images that it has; empty without labels."""
    if source is None or source.labels is None or not len(source):
        return []
    return (np.unique(source.labels, return_counts=True)[1] / len(source)).tolist()


def loader_facts(args: Namespace, images: data.Source, view: Views) -> dict[str, Any]:
    """What a faster loader depends on."""
    on_device, cores = args.aug_device == "gpu", distributed.cores()
    fast = data.TwoViews(images, view.preset, view.size, 0, crop_only=on_device, fast=True).fast
    return {
        "gpu": distributed.device().type == "cuda", "on_device": on_device, "cores": cores,
        "workers": distributed.share_of_cores(args.workers) * distributed.local_size(),
        "cache": not args.cache and fits(images), "fast_decode": args.decode == "exact" and fast and _is_jpeg(images),
    }  # fmt: skip


def _is_jpeg(images: data.Source) -> bool:
    with contextlib.suppress(data.BadImageError):
        return (images.read(0) or b"").startswith(b"\xff\xd8")
    return False


def _earlier(model: Contrast, plan: TrainPlan, sampler: data.EpochSampler) -> int:
    """A first epoch with synthetic negatives that would fit the run."""
    rows = min(model.K, fit.fitting_queue(sampler.n, sampler.batch, plan.total_steps * plan.accum))
    epochs, fill = -(-plan.total_steps // plan.steps_per_epoch), rows / sampler.batch / plan.accum
    return fit.fitting_start(epochs, plan.steps_per_epoch, fill, getattr(model.extra, "stop", None))


def first_lines(
    config: PretrainConfig, given: PretrainData, model: Contrast, plan: TrainPlan, at: Progress, path: str | None,
    summary: str, notes: Sequence[str],
) -> str:  # fmt: skip
    """What the log says before the first step.

    path: of the checkpoint that goes on, if any. summary: :func:`build_model`'s. notes: of the flags and the resume.
    """
    images, size, sampler, amp = given.sources.pretrain, given.view.size, given.sampler, plan.amp or "off"
    seen = data.look(images)
    what, side = f"{config.method}, {config.encoder.arch} at {size} px", data.short_side(images, seen)
    batches = plan.total_steps * plan.accum
    no_knn = given.sources.val is None or not config.validation.knn_every
    lines = (
        f"{what}, {len(images)} images of {images.name}, seed {sampler.seed}",
        *data.describe(images, given.sources.val, seen),
        f"{distributed.processes()}, batch {sampler.batch}, {given.workers} loader workers each, amp {amp}",
        summary,
        f"augmentation {given.view.aug}" * (" " in given.view.aug),  # one of the user's own
        *negatives.sentences(model.extra, plan.total_steps, plan.steps_per_epoch, _earlier(model, plan, sampler)),
        data.size_warning(images, size, side) or fit.enlarged(side, size),
        fit.queue_warning(model.K, len(images), sampler.batch, batches),
        fit.parts_warning(_parts(model), sampler.batch // sampler.world),
        *notes,
        f"from epoch {at.epoch}, step {at.step} of {plan.total_steps}" + f" ({path})" * bool(path),
        model.slow_reason(distributed.device()),
        f"no k-NN accuracy: {given.sources.no_pair or 'switched off by --knn-every 0'}" * no_knn,
        DONE * (plan.steps_left(at) <= 0),
    )
    return "\n".join(filter(None, lines))
