"""What the flags of a pretraining come to once its images are open: views and model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from moco import data, distributed
from moco.config import PretrainConfig, ViewConfig
from moco.kernels import Earlier
from moco.methods.registry import FAMILIES
from moco.models import build as models
from moco.models.base import Contrast
from moco.models.encoder import build_encoder, compile_encoders


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
    preset = config.aug or data.dataset_of(config.dataset).preset
    size = config.size or images.native_size or 224
    return Views(size, images.channels, mean, std, preset, data.get_preset(preset))


def build_model(
    config: PretrainConfig, view: Views, seed: int, images: int, batch: int, labels: np.ndarray | None = None,
    before: Earlier | None = None,
) -> tuple[Contrast, str]:  # fmt: skip
    """The model on its device, and a line for the log about its loss, BatchNorm and masking."""
    device, own, family = distributed.device(), config.encoder, FAMILIES[config.family]
    shape = {"mlp": own.mlp, "stem": own.stem, "size": view.size, "in_chans": view.channels}
    encoders = [build_encoder(own.arch, own.dim, **shape) for _ in range(family.encoders)]
    classes = None if labels is None else torch.from_numpy(labels).to(device)
    model_config = replace(config.model, mean=tuple(view.mean), std=tuple(view.std))
    model, summary = family.build(*encoders, model_config, models.Context(seed, images, batch, classes, before))
    model.to(device).to(memory_format=model.layout)
    if own.compile_mode:
        compile_encoders(encoders, own.compile_mode)
    return model, summary
