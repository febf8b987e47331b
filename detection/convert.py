"""A pretrained ResNet-50 or ResNet-101 as a detectron2 weight file, without needing detectron2.

detectron2 builds ResNets with other parameter names (its modeling/backbone/resnet.py): the stem's convolution is
``stem.conv1``, stages are ``res2`` to ``res5``, a BatchNorm is ``NAME.norm`` of the convolution before it and the
projection of the skip connection is ``shortcut``. Nothing but names changes.
"""

from __future__ import annotations

import os
import pickle
import re

from torch import Tensor

from moco import checkpoint
from moco.encoder import build_encoder
from moco.errors import UserError
from moco.pretrained import read_backbone

LAYER3_BLOCKS = {"resnet50": 6, "resnet101": 23}  # what tells the two apart


def detectron2_name(name: str) -> str:
    """``layer1.0.bn2.weight`` gives ``res2.0.conv2.norm.weight``; ``conv1.weight`` gives ``stem.conv1.weight``."""
    name = re.sub(r"^layer(\d)", lambda m: f"res{int(m.group(1)) + 1}", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    name = re.sub(r"\bbn(\d)", r"conv\1.norm", name)
    return name if name.startswith("res") else f"stem.{name}"


def convert(path: str) -> dict[str, Tensor]:
    """The backbone in a checkpoint (ours, MoCo, SynCo, torchvision, timm), by detectron2's names.

    Raises:
        UserError: unreadable, or not the whole backbone of a ResNet-50 or ResNet-101; the sentence names the keys.
    """
    tensors, _ = read_backbone(build_encoder(_arch_of(path), 128), path)
    return {detectron2_name(name): value for name, value in tensors.items() if "num_batches" not in name}


def _arch_of(path: str) -> str:
    """resnet50 or resnet101 by the number of blocks; other networks are refused with a sentence by the reader."""
    text = " ".join(str(name) for name in _names(checkpoint.read(path)))
    blocks = {int(number) for number in re.findall(r"layer3\.(\d+)\.", text)}
    return "resnet101" if len(blocks) == LAYER3_BLOCKS["resnet101"] else "resnet50"


def _names(state: dict) -> list[str]:
    nested = [value for value in state.values() if isinstance(value, dict)]
    return [*state, *(name for value in nested for name in value)]


def write(tensors: dict[str, Tensor], path: str) -> None:
    """Write detectron2's weight file: a pickle of arrays; an older file stays whole until the new one is.

    Raises:
        UserError: the file cannot be written.
    """
    arrays = {name: value.float().numpy() for name, value in tensors.items()}
    beside = path + ".tmp"
    try:
        with open(beside, "wb") as file:
            pickle.dump({"model": arrays, "__author__": "moco", "matching_heuristics": True}, file)
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from error
