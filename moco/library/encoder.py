"""A pretrained encoder as a module that says how it wants its images.

Legend: N images, C channels, s side in pixels, F feature width.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from moco.data.augment.by_pil import eval_view
from moco.data.sources.base import FileSource
from moco.data.sources.decode import in_channels, reading
from moco.data.sources.values import levels_of
from moco.errors import UserError
from moco.library.results import Checkpoint, path_of
from moco.models.encoder import SMALL, build_encoder, features
from moco.models.inputs import normalise
from moco.weights.read import load_backbone
from moco.weights.settings import settle_from_file


class Encoder(nn.Module):
    """A backbone without its head: images to features.

    Attributes:
        size: side of the square images it was trained at, in pixels.
        mean, std: of the channels, C numbers in 0..1 each.
        width: of the features, F.
        arch: torchvision's or timm's name.
        channels: C.
        levels: the values of image files that become black and white, None: those of each file's type.
        source: what was read, and where each setting is from.
        pretraining: how it was pretrained: ``method``, ``recipe`` (flags and their values), ``projection`` (its head),
            ``data``, ``epochs``, ``steps``, ``seed``, as far as the file says it; empty for other projects' files.
    """

    def __init__(
        self, network: nn.Module, arch: str, size: int, mean: Sequence[float], std: Sequence[float], source: str
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.arch, self.size, self.source = network, arch, size, source
        self.mean, self.std, self.channels = list(mean), list(std), len(mean)
        self.levels: Sequence[Any] | None = None
        self.pretraining: dict[str, Any] = dict(getattr(network, "pretraining", {}))
        self.eval()
        with torch.no_grad():
            self.width = self(torch.zeros(1, self.channels, size, size)).shape[1]

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, s, s) images to (N, F) features.

        uint8 images, as :meth:`transform` makes them, are normalised first, (images / 255 - mean) / std in float32, as
        evaluations do it; images of another type are taken as normalised.

        Raises:
            UserError: no tensor, not four axes, or other channels.
        """
        if not isinstance(images, Tensor):
            raise UserError(
                f"the encoder takes a batch of images as a tensor, not {images!r}: encoder.transform makes one."
            )
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise UserError(
                f"the encoder takes images (N, {self.channels}, {self.size}, {self.size}), not {tuple(images.shape)}."
            )
        return features(self.network, normalise(images, self.mean, self.std) if images.dtype == torch.uint8 else images)

    def transform(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """(C, s, s) uint8 of a PIL image or a file, as evaluations see it: without randomness, resized, and from 64
        pixels on cropped at the centre.

        Raises:
            UserError: a file that is no image, or one of other channels; grey and colours are converted.
        """
        if isinstance(image, Image.Image):
            levels = levels_of(self.levels)
            return eval_view(reading("the PIL image", lambda: in_channels(image, self.channels, levels)), self.size)
        path = os.fspath(image)
        source = FileSource(path, [path], self.channels)
        source.levels = levels_of(self.levels)
        return eval_view(source.load(0), self.size)

    def extra_repr(self) -> str:
        return f"{self.arch}, {self.channels} x {self.size} x {self.size} -> {self.width}"


def load_encoder(
    checkpoint: Checkpoint, *, arch: str | None = None, size: int | None = None, channels: int | None = None,
    mean: Sequence[float] | None = None, std: Sequence[float] | None = None,
    levels: Sequence[float] | None = None,
) -> Encoder:  # fmt: skip
    """The encoder in a checkpoint, on the CPU and in eval mode, with what it was trained at.

    Its features are those of ``moco embed``, bit for bit where device, arithmetic and batches are the same.

    Args:
        checkpoint: what :func:`moco.pretrain` returned, the folder of a run, or a file: a checkpoint of ours or of
            another project, or what :func:`moco.export` wrote for torchvision, timm, the Hub, as safetensors or as
            features;
            ``torchvision:NAME`` for its published weights of ``arch``.
        arch, size, channels, mean, std, levels: in place of the file's. A file of another project names no size and no
            statistics: 224 pixels (32 with a small stem) and ImageNet's are taken, and ``source`` says so.

    Raises:
        UserError: unreadable, no encoder in it, or not of this architecture.

    Example:
        >>> encoder = moco.load_encoder("runs/mine")
        >>> images = torch.stack([encoder.transform(path) for path in paths])
        >>> with torch.no_grad():
        ...     found = encoder(images)
    """
    path = path_of(checkpoint)
    given = {"size": size, "channels": channels, "mean": mean, "std": std, "levels": levels}
    args = Namespace(arch=arch, stem="auto", dataset=None, **given)
    with torch.random.fork_rng(devices=[]):  # first weights are drawn, and overwritten
        settled = settle_from_file(args, path)
        side = args.size or (SMALL // 2 if args.stem == "cifar" else 224)
        statistics = settled.statistics(args.channels or 3, side)
        network = build_encoder(args.arch, 2, stem=args.stem, size=side, in_chans=len(statistics[0]))
        summary = load_backbone(network, path, args.arch)[1] + settled.summary
        made = Encoder(network, args.arch, side, *statistics, summary)
        made.levels = args.levels
        return made
