"""A pretrained ResNet-50 or ResNet-101 as a detectron2 weight file, without needing detectron2.

detectron2 builds ResNets with other parameter names (its modeling/backbone/resnet.py): the stem's convolution is
``stem.conv1``, stages are ``res2`` to ``res5``, a BatchNorm is ``NAME.norm`` of the convolution before it and the
projection of the skip connection is ``shortcut``. Nothing but names changes.
"""

from __future__ import annotations

import math
import pickle
import re

from torch import Tensor, nn

from moco.data import channel_statistics
from moco.errors import UserError
from moco.files import replacing
from moco.models.encoder import build_encoder
from moco.weights.changes import changes_of, describe_changes
from moco.weights.layouts import arch_of, open_file
from moco.weights.read import UnfitWeightsError, load_backbone
from moco.weights.settings import settings_of

ARCHS = ("resnet50", "resnet101")


def detectron2_name(name: str) -> str:
    """``layer1.0.bn2.weight`` gives ``res2.0.conv2.norm.weight``; ``conv1.weight`` gives ``stem.conv1.weight``."""
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m.group(1)) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name if name.startswith("res") else f"stem.{name}"


def convert(path: str) -> dict[str, Tensor]:
    """The backbone in a checkpoint (any of moco.weights.layouts), by detectron2's names.

    Raises:
        UserError: unreadable, or not the whole backbone of a ResNet-50 or ResNet-101 (the sentence names the keys), or
            one that detectron2's ResNet does not compute.
    """
    arch = arch_of(open_file(path)).partition(".")[0]  # timm names its weights behind a dot
    encoder = build_encoder(arch if arch in ARCHS else ARCHS[0], 128)
    try:
        tensors, _ = load_backbone(encoder, path)
    except UserError as error:
        if arch and arch not in ARCHS:
            raise UserError(f"{path} is a {arch}; detectron2 gets a {' or a '.join(ARCHS)} from here.") from error
        if isinstance(error, UnfitWeightsError):
            raise UserError(
                f"{error.what}; detectron2's ResNet is the plain {' or '.join(ARCHS)}, with the stem of --stem "
                "imagenet: give the checkpoint of one."
            ) from error
        raise
    if empty := [name for name, value in tensors.items() if value.ndim == 4 and not value.any()]:
        raise UserError(
            f"{path}: {empty[0]} is all zeros, and no image passes it; take another checkpoint of that run."
        )
    return renamed(tensors, encoder, path)


def pixel_options(mean: list[float], std: list[float]) -> list[str]:
    """detectron2's settings, ``KEY VALUE`` pairs, for images in 0 to 255 that are normalised by other statistics than
    the configurations', which are ImageNet's; else none."""
    summary = []
    for key, found, own in zip(("MEAN", "STD"), (mean, std), channel_statistics(None, 3), strict=True):
        if not all(math.isclose(x, y, rel_tol=1e-6) for x, y in zip(found, own, strict=True)):
            summary += [f"MODEL.PIXEL_{key}", str([round(255 * x, 6) for x in found])]
    return summary


def pixels_of(path: str) -> list[str]:
    """The same for a checkpoint that :func:`convert` has read; none for one that does not say its statistics."""
    known = settings_of(open_file(path))
    return pixel_options(known["mean"].value, known["std"].value) if {"mean", "std"} <= set(known) else []


def renamed(tensors: dict[str, Tensor], encoder: nn.Module, path: str) -> dict[str, Tensor]:
    """A ResNet's tensors by detectron2's names, which has no counters of BatchNorm's steps.

    Raises:
        UserError: the encoder differs in what no tensor tells: detectron2's ResNet is always the plain one.
    """
    if summary := describe_changes(changes_of(encoder)):
        raise UserError(
            f"{path} is of a network with {summary}, which detectron2's ResNet cannot do; use another file."
        )
    return {detectron2_name(name): value for name, value in tensors.items() if "num_batches" not in name}


def write_pickle(tensors: dict[str, Tensor], path: str) -> None:
    """Write detectron2's weight file: a pickle of arrays; an older file stays whole until the new one is.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {name: value.float().numpy() for name, value in tensors.items()}
    with replacing(path, "--out") as beside, open(beside, "wb") as file:
        pickle.dump({"model": arrays, "__author__": "moco", "matching_heuristics": True}, file)
