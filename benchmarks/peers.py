"""What others train with, made ready to be timed beside ours: SynCo's released code, and MoCo v2 of lightly's blocks.

All get their images from memory, as torchvision holds CIFAR-10. Neither is a dependency: the released code is imported
from a checkout and changed, at run time, only where it needs CUDA and a group of processes; lightly is imported when
it is asked for.

Legend: N images a batch, C feature width, F backbone feature width, K queue rows, s side of a view in pixels.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from benchmarks.accuracy.cifar10_methods import TAR, subset
from moco.data import ArraySource, Source, Sources, channel_statistics
from moco.errors import UserError
from moco.models.encoder import build_encoder, head_of

Views = Callable[[Image.Image], Any]
__all__ = ["TAR", "InMemory", "Lightly", "Setting", "endless", "loader", "open_cifar", "published", "released"]


@dataclass(frozen=True)
class Setting:
    """What the compared runs have in common. size: s. workers: loader processes."""

    arch: str
    stem: str
    size: int
    batch: int
    C: int
    K: int
    m: float
    T: float
    lr: float
    momentum: float
    weight_decay: float
    workers: int

    @classmethod
    def of(cls, run: Namespace, size: int, workers: int) -> Setting:
        """Of parsed flags of main_pretrain.py."""
        return cls(
            run.arch, run.stem, size, run.batch_size, run.moco_dim, run.moco_k, run.moco_m, run.moco_t, run.lr,
            run.momentum, run.weight_decay, workers,
        )  # fmt: skip


def open_cifar(data: Path, out: Path, images: int, queries: int) -> Sources:
    """Images in memory, the first so many of each class: of a folder or tar of train/CLASS/*.jpg and test/CLASS/*.jpg.

    Raises:
        UserError: there is neither.
    """
    if not data.exists():
        raise UserError(
            f"no CIFAR-10 at {data}: give --data, a folder or tar of train/CLASS/*.jpg and test/CLASS/*.jpg."
        )
    held = []
    for split, count in (("train", images), ("test", queries)):
        rows = subset(Namespace(out=out, data=data, download=False), split, count)
        classes = sorted({label for _, label in rows})
        pixels = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in rows])  # (n, h, w, 3)
        labels = np.array([classes.index(label) for _, label in rows])
        held.append(ArraySource(f"CIFAR-10 {split}", pixels, 3, classes, labels))
    return Sources(held[0], *held)


class InMemory(Dataset):
    """Images of ``source`` as torchvision's CIFAR10 gives them: (views, label)."""

    def __init__(self, source: Source, views: Views):
        self.source, self.views = source, views

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        assert self.source.labels is not None
        return self.views(self.source.load(index)), int(self.source.labels[index])


def published(size: int, blur: Views) -> Views:
    """MoCo v2's view as main_moco.py and main_synco.py compose it, at another size. blur: with a random sigma."""
    mean, std = channel_statistics(None, 3)
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    crop, grey = T.RandomResizedCrop(size, scale=(0.2, 1.0)), T.RandomGrayscale(p=0.2)
    ending = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)]
    return T.Compose([crop, jitter, grey, T.RandomApply([blur], p=0.5), *ending])


def loader(dataset: Dataset, setting: Setting) -> DataLoader:
    """torch's own, shuffled, whole batches; its processes live on."""
    return DataLoader(
        dataset, setting.batch, shuffle=True, drop_last=True, num_workers=setting.workers,
        persistent_workers=setting.workers > 0,
    )  # fmt: skip


def endless(batches: Iterable[Any]) -> Iterator[Any]:
    """Epoch after epoch."""
    while True:
        yield from batches


# ------------------------------------------------------------------------------------- the released code of SynCo


class OneProcess:
    """The module ``torch`` for code that asks for a group of processes: a group of one, which copies."""

    class distributed:
        """What the released builder calls."""

        @staticmethod
        def get_world_size() -> int:
            return 1

        @staticmethod
        def get_rank() -> int:
            return 0

        @staticmethod
        def broadcast(tensor: Tensor, src: int) -> None:
            return None

        @staticmethod
        def all_gather(tensors: list[Tensor], tensor: Tensor, async_op: bool = False) -> None:
            tensors[0].copy_(tensor)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def released(checkout: Path, setting: Setting, images: Source, counts: dict[str, Any]) -> Callable[[], None]:
    """A call that makes one step with SynCo's released model, loss loop and views, in fp32, on this CPU.

    Args:
        checkout: of github.com/giakoumoglou/synco.
        images: to train on.
        counts: n_hard and n1 .. n6.

    Raises:
        UserError: the folder is no such checkout.
    """
    sys.path.insert(0, str(checkout))
    try:
        builder, views, main = (importlib.import_module(n) for n in ("synco.builder", "synco.loader", "main_synco"))
    except ImportError as error:
        raise UserError(f"--synco {checkout}: {error}; give a checkout of github.com/giakoumoglou/synco.") from error
    finally:
        sys.path.remove(str(checkout))
    vars(builder).update(torch=OneProcess())
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]  # it could only fail

    def encoder(num_classes: int) -> nn.Module:
        return build_encoder(setting.arch, num_classes, stem=setting.stem, size=setting.size)

    model = builder.SynCo(encoder, setting.C, setting.K, setting.m, setting.T, True, **counts, warmup_epochs=0)
    optimizer = torch.optim.SGD(
        model.parameters(), setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay
    )
    dataset = InMemory(images, views.TwoCropsTransform(published(setting.size, views.GaussianBlur([0.1, 2.0]))))
    batches, criterion = endless(loader(dataset, setting)), nn.CrossEntropyLoss()

    def step() -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # its meter prints a line a call
            main.train([next(batches)], model, criterion, optimizer, 0, Namespace(gpu=None, print_freq=1))

    return step


# ------------------------------------------------------------------------------------------- lightly's building blocks


class Lightly:
    """MoCo v2 as lightly's documentation puts it together, under autocast and in channels_last where asked.

    Args:
        images: to train on.
        amp: the arithmetic, of the loss too, as Lightning's mixed precision has it; None for fp32.

    Raises:
        UserError: lightly cannot be imported.
    """

    def __init__(self, setting: Setting, images: Source, amp: torch.dtype | None, channels_last: bool):
        try:
            blocks = {n: importlib.import_module(f"lightly.{n}") for n in ("loss", "transforms")}
            blocks["heads"] = importlib.import_module("lightly.models.modules")
            self.utils = importlib.import_module("lightly.models.utils")
        except ImportError as error:
            raise UserError(f"lightly cannot be imported ({error}): pip install lightly, or leave it out.") from error
        self.m, self.amp = setting.m, amp
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.backbone = build_encoder(setting.arch, setting.C, stem=setting.stem, size=setting.size)
        last = self.backbone.get_submodule(head_of(self.backbone))
        assert isinstance(last, nn.Linear)
        self.backbone.set_submodule(head_of(self.backbone), nn.Identity())
        head = blocks["heads"].MoCoProjectionHead(last.in_features, last.in_features, setting.C)
        self.q = nn.Sequential(self.backbone, head).to(memory_format=self.layout)
        self.k = copy.deepcopy(self.q)
        self.utils.deactivate_requires_grad(self.k)
        self.criterion = blocks["loss"].NTXentLoss(temperature=setting.T, memory_bank_size=(setting.K, setting.C))
        self.optimizer = torch.optim.SGD(
            self.q.parameters(), setting.lr, momentum=setting.momentum, weight_decay=setting.weight_decay
        )
        views = blocks["transforms"].MoCoV2Transform(input_size=setting.size)
        self.batches = loader(InMemory(images, views), setting)

    def step(self, batch: tuple) -> Tensor:
        """One batch of the loader; returns the loss ()."""
        im_q, im_k = (views.to(memory_format=self.layout) for views in batch[0])  # (N, 3, s, s)
        self.utils.update_momentum(self.q, self.k, m=self.m)
        with torch.autocast("cpu", self.amp, enabled=self.amp is not None):
            q = self.q(im_q)  # (N, C)
            with torch.no_grad():
                k = self.k(im_k)  # (N, C)
            loss = self.criterion(q, k)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()
