"""A source of images: how many there are, what they are called, and image i decoded.

Legend: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from moco.data.sources.away import doubtful, is_empty
from moco.data.sources.decode import BadImageError, as_asked, decode_bytes, every_format, reading, stored
from moco.data.sources.values import Levels, Stored, stored_array, to_levels
from moco.data.stack import Picture
from moco.errors import UserError
from moco.files import open_regular

FILE_BYTES = 1 << 30  # of an image's file at most: one at the limit of pixels, 8 bits and not compressed, has 0.7
FINGERPRINTED = 1000  # files, spread over the set, whose size is a part of a fingerprint: a million would take minutes
HASHED = 10_000  # images in memory, likewise, whose pixels are


@dataclass
class Found:
    """How the images of a source were found, for what a run says at its start.

    Args:
        layout: "folders" of classes, "folder", "list" or "shards"; empty for a data set with a name.
        passed_over: how many files were not taken, by what they are: an extension (".gif") or "hidden".
        notes: a sentence for each guess: what was taken for what, and what would change it.
        unlabelled: why there are no labels, where one might expect some.
    """

    layout: str = ""
    passed_over: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    unlabelled: str = ""


class Source(abc.ABC):
    """N labelled or unlabelled images.

    name: what messages call it. classes: names of the classes, or None. labels: (N,) int64 index into ``classes``, or
    None when unlabelled. channels: of every loaded image, 1 to 16. native_size: the side in pixels when all
    images are squares of one size, else None. starts: (shards,) numbers of the first image of each file that is to be
    read from its beginning to its end, or None when images may be read in any order. found: how they were found.
    levels: the values of the files that become black and white, None: those of each file's type.
    """

    levels: Levels | None = None

    def __init__(
        self,
        name: str,
        channels: int,
        classes: list[str] | None = None,
        labels: np.ndarray | None = None,
        native_size: int | None = None,
    ) -> None:
        self.name = name
        self.channels = channels
        self.classes = classes
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.native_size = native_size
        self.starts: np.ndarray | None = None
        self.found = Found()

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def load(self, index: int) -> Picture:
        """Image ``index``: in mode "L" or "RGB" of 1 and 3 ``channels``, else a stack of them; BadImageError when it
        cannot be read."""

    def read(self, index: int) -> bytes | None:
        """The file of image ``index`` as it is, BadImageError when it cannot be read; None for images in memory."""
        return None

    def stored(self, index: int) -> Stored:
        """The numbers of image ``index`` as its file holds them; BadImageError as of :meth:`load`."""
        data = self.read(index)
        if data is None:
            return stored_array(np.asarray(self.load(index)))
        return reading(self.name_of(index), lambda: stored(data, self.channels))

    def files(self) -> Sequence[str]:
        """Paths of the files that hold the images, one an image or fewer; empty for images that need no decoding."""
        return ()

    @abc.abstractmethod
    def name_of(self, index: int) -> str:
        """Where image ``index`` comes from: its path, or for images in memory such as ``mnist5k[12]``."""

    def missing(self, index: int) -> str:
        """What of the data around image ``index`` is gone, as when a disk is not mounted; empty where all is there."""
        return ""

    def identity(self) -> Iterator[bytes]:
        """What tells these images from others, in their order and wherever they lie, besides number and labels."""
        yield from (self.name_of(index).encode(errors="surrogateescape") + b"\n" for index in range(len(self)))

    def fingerprint(self) -> str:
        """Sixteen characters that are those of the same images with the same labels, moved or not, cached or not.

        A second for a million files: their names below the folder that they share count, and a thousand's sizes.
        """
        digest = hashlib.sha256(f"{len(self)} images\n".encode())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        for part in self.identity():
            digest.update(part)
        return digest.hexdigest()[:16]


def without_labels(source: Source) -> str:
    """The beginning of a sentence on images whose labels are needed."""
    return f"{source.name} has no labels" + (f" ({source.found.unlabelled})" if source.found.unlabelled else "")


def spread_indices(count: int, most: int) -> list[int]:
    """Numbers of ``most`` of ``count`` things at most, the first and the last among them."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def some_sizes(source: Source, most: int) -> list[tuple[int, int]]:
    """(width, height) of ``most`` images at most, spread over the set, without those that cannot be read."""
    sizes = []
    for index in spread_indices(len(source), most):
        with contextlib.suppress(BadImageError):
            sizes.append(source.load(index).size)
    return sizes


def why_bad(source: Source, index: int, surely: bool = False) -> str:
    """The name of an image that cannot be read, and why; empty where it can be.

    Args:
        surely: leave out what may be the fault of the disk or of the way to it.
    """
    try:
        source.load(index)
    except BadImageError as error:
        return "" if surely and (doubtful(error) or source.missing(index)) else str(error)
    return ""


class Paths(Sequence[str]):
    """Many strings in one buffer.

    A list of a million strings is copied into every worker page by page, because reading a string touches its
    reference count; one buffer stays shared.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self._buffer = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)  # (N,)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> str:
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._buffer[start:end])

    def relative(self) -> bytes:
        """All of them, a line each, without the folder that they share."""
        ends = self._ends.tolist()
        whole = [self._buffer[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        start = (os.path.commonprefix(whole) or b"").rfind(b"/") + 1
        return b"\n".join(path[start:] for path in whole)


class EncodedSource(Source):
    """Images in files, decoded at every load."""

    @abc.abstractmethod
    def contents(self, index: int) -> bytes:
        """The file of image ``index`` as it is, with the system's own exceptions."""

    def read(self, index: int) -> bytes:
        return reading(self.name_of(index), lambda: self.contents(index))

    def load(self, index: int) -> Picture:
        return reading(
            self.name_of(index), lambda: decode_bytes(self.contents(index), self.channels, levels=self.levels)
        )


class FileSource(EncodedSource):
    """Image files. ``never``: folders that were not there when the source was opened, so that none counts as gone."""

    def __init__(
        self,
        name: str,
        paths: Sequence[str],
        channels: int = 3,
        classes: list[str] | None = None,
        labels: np.ndarray | None = None,
        never: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(name, channels, classes, labels)
        self.paths, self.never = Paths(paths), never

    def __len__(self) -> int:
        return len(self.paths)

    def contents(self, index: int) -> bytes:
        with open_regular(self.paths[index], FILE_BYTES) as file:
            return file.read()

    def files(self) -> Sequence[str]:
        return self.paths

    def missing(self, index: int) -> str:
        folder = os.path.dirname(self.paths[index])
        return f"{folder} is missing or empty" if folder not in self.never and is_empty(folder) else ""

    def name_of(self, index: int) -> str:
        return self.paths[index]

    def identity(self) -> Iterator[bytes]:
        yield self.paths.relative()
        for index in spread_indices(len(self), FINGERPRINTED):
            size = -1
            with contextlib.suppress(OSError):  # a file that is not there is a bad image
                size = os.stat(self.paths[index]).st_size
            yield f"\n{size}".encode()


class PictureSource(FileSource):
    """A few files that somebody named one by one: of any format that PIL opens by itself."""

    def load(self, index: int) -> Picture:
        decode = partial(decode_bytes, channels=self.channels, formats=every_format(), levels=self.levels)
        return reading(self.name_of(index), lambda: decode(self.contents(index)))


class ArraySource(Source):
    """Images in memory: ``images`` is (N, H, W) grey or (N, H, W, C), uint8, of which 3 channels are RGB.

    ``rows`` (N,) are the numbers that names carry when the images are a selection from a larger file. ``images`` may
    be anything with ``shape`` and ``images[i]``. ``channels`` None keeps what the images have.
    """

    def __init__(
        self,
        name: str,
        images: Any,
        channels: int | None = None,
        classes: list[str] | None = None,
        labels: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> None:
        shape = images.shape
        own = 1 if len(shape) == 3 else shape[3]
        square = shape[1] if shape[1] == shape[2] else None
        super().__init__(name, channels or own, classes, labels, square)
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return self.images.shape[0]

    def load(self, index: int) -> Picture:
        return as_asked(to_levels(self.images[index], self.levels), self.channels)

    def stored(self, index: int) -> Stored:
        return stored_array(self.images[index])

    def name_of(self, index: int) -> str:
        return f"{self.name}[{index if self.rows is None else int(self.rows[index])}]"

    def identity(self) -> Iterator[bytes]:
        yield str(tuple(self.images.shape)).encode()
        for index in spread_indices(len(self), HASHED):
            yield np.ascontiguousarray(self.images[index]).tobytes()


@dataclass
class Sources:
    """What a data set offers: images to pretrain on, and a labelled pair for probes and k-NN (both or neither).

    ``no_pair`` says in one sentence why there is no pair.
    """

    pretrain: Source
    train: Source | None = None
    val: Source | None = None
    no_pair: str = ""


def paired(pretrain: Source, train: Source, val: Source) -> Sources:
    """``train`` and ``val`` with labels that mean the same class: those of ``val`` are renumbered by name.

    Raises UserError for a class of ``val`` that ``train`` does not have.
    """
    for source in (train, val):
        if source.labels is None or source.classes is None:
            return Sources(pretrain, no_pair=without_labels(source))
    assert train.classes is not None
    unknown = renumber(val, train.classes)
    if unknown:
        names = ", ".join(unknown[:5]) + (" and more" if len(unknown) > 5 else "")
        raise UserError(f"{val.name} has classes that {train.name} lacks ({names}): give both the same classes")
    return Sources(pretrain, train, val)


def renumber(source: Source, classes: list[str]) -> list[str]:
    """Give the labels of ``source``, in place, the numbers that its classes have in ``classes``; returns the names
    that are not among them, and then nothing is changed."""
    assert source.classes is not None
    assert source.labels is not None
    number = {name: index for index, name in enumerate(classes)}
    unknown = [name for name in source.classes if name not in number]
    if not unknown:
        numbers = np.array([number[name] for name in source.classes], dtype=np.int64)
        source.labels, source.classes = numbers[source.labels], classes
    return unknown
