"""Which data sets there are: a row here and a reader in :mod:`moco.data.sources.named` each. No torch here."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from moco.errors import UserError

Channels = tuple[float, ...]  # a number a channel
MOST_CHANNELS = 16  # of an image
GUESSED = (0.5, 0.25)  # mean and deviation of channels that nothing is known of


@dataclass(frozen=True)
class DataSet:
    """What a run on a data set takes where no flag says otherwise.

    Args:
        reader: MODULE:FUNCTION, (directory, download, channels) -> (pretraining images, labelled training images,
            labelled held-out images); directory and channels may be None. Empty for files of the user's.
        mean, std: of the pixels in [0, 1].
        size: side of the views in pixels.
        channels: of the images.
        preset: of the views of pretraining.
        mirrored: whether views are mirrored: a mirrored digit is another symbol.
    """

    reader: str = ""
    mean: Channels = (0.485, 0.456, 0.406)  # ImageNet's, as torchvision's models have them
    std: Channels = (0.229, 0.224, 0.225)
    size: int = 224
    channels: int = 3
    preset: str = "v1"
    mirrored: bool = True

    @property
    def read(self) -> Callable[..., Any]:
        """The reader, imported now."""
        return pkgutil.resolve_name(self.reader)


# Statistics of CIFAR-10: MoCo's CIFAR-10 notebook. CIFAR-100: SupCon's code. The others are the values in general use
# for their training sets.
_NAMED = "moco.data.sources.named:"
DATASETS = {
    "folder": DataSet(),
    "cifar10": DataSet(_NAMED + "cifar10", (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 32, 3, "cifar"),
    "cifar100": DataSet(_NAMED + "cifar100", (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 32, 3, "cifar"),
    "caltech256": DataSet(_NAMED + "caltech256"),
    "fashionmnist": DataSet(_NAMED + "fashionmnist", (0.2860,), (0.3530,), 28, 1, "cifar"),
    "stl10": DataSet(_NAMED + "stl10", (0.4467, 0.4398, 0.4066), (0.2603, 0.2566, 0.2713), 96),
    "mnist5k": DataSet(_NAMED + "mnist5k", (0.1307,), (0.3081,), 28, 1, "digits", mirrored=False),
}


def dataset_of(name: str | None) -> DataSet:
    """The row of a name; a folder's for None and for a name that an older file has and this table lacks."""
    return DATASETS.get(name or "folder", DATASETS["folder"])


def channel_statistics(
    name: str | None, channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Mean and deviation, a number a channel: those asked for, else the data set's; UserError for a wrong count.

    The data set's colour statistics for one channel are averaged; grey ones for three are repeated. Of other channels
    they say nothing, and ``GUESSED`` are taken.
    """
    row = dataset_of(name)
    own = (row.mean, row.std) if channels in (1, 3) else tuple((guess,) for guess in GUESSED)
    asked = zip((mean, std), own, strict=True)
    chosen = [list(_fitted(own, channels) if given is None else given) for given, own in asked]
    if any(len(numbers) != channels for numbers in chosen):
        raise UserError(f"--mean and --std take one value a channel, and these images have {channels}.")
    return chosen[0], chosen[1]


def _fitted(values: Channels, channels: int) -> Channels:
    if len(values) == channels:
        return values
    return (round(sum(values) / 3, 4),) if channels == 1 else values * channels
