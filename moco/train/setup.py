"""What the flags of a pretraining come to once its images are open: views, model, plan."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

import numpy as np
import torch

from moco import data, distributed
from moco.cli import options
from moco.kernels import Earlier
from moco.methods.registry import FAMILIES
from moco.models import build as models
from moco.models.base import Contrast
from moco.models.encoder import build_encoder, compile_encoders
from moco.train import plan


def view_settings(args: Namespace, images: data.Source) -> Namespace:
    """Size, channels, statistics and augmentation of the views: the flags', else the data set's own."""
    mean, std = data.channel_statistics(args.dataset, images.channels, args.mean, args.std)
    preset = args.aug or ("v2" if args.aug_plus else data.dataset_of(args.dataset).preset)
    size = args.size or images.native_size or 224
    return Namespace(
        size=size, channels=images.channels, mean=mean, std=std, aug=preset, preset=data.get_preset(preset)
    )


def build_model(
    args: Namespace, view: Namespace, seed: int, images: int, batch: int, labels: np.ndarray | None = None,
    before: Earlier | None = None,
) -> tuple[Contrast, str]:  # fmt: skip
    """The model on its device, and a line for the log about its loss, BatchNorm and masking."""
    device = distributed.device()
    shape = {"mlp": args.mlp, "stem": args.stem, "size": view.size, "in_chans": view.channels}
    family = FAMILIES[args.family]
    encoders = [build_encoder(args.arch, args.moco_dim, **shape) for _ in range(family.encoders)]
    classes = None if labels is None else torch.from_numpy(labels).to(device)
    config = replace(options.model_settings(args), mean=tuple(view.mean), std=tuple(view.std))
    model, summary = family.build(*encoders, config, models.Context(seed, images, batch, classes, before))
    model.to(device).to(memory_format=model.layout)
    if args.compile:
        compile_encoders(encoders, args.compile_mode)
    return model, summary


def make_plan(args: Namespace, batches: int, amp: torch.dtype | None) -> plan.TrainPlan:
    """How long to train and how fast to learn; ``batches`` is the loader's length."""
    return plan.make_plan(batches, amp, **options.plan_settings(args))
