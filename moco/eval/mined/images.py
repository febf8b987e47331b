"""The images behind the numbers: which are asked, and what each queue row is the key of."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from moco import seeding
from moco.data import BadImageError, Source, TwoViews
from moco.data.stack import from_levels, shown
from moco.errors import OutageError, UserError
from moco.eval.mined.queue_run import QUERY_VIEW, QueueRun


def number_of(source: Source, name: str) -> int:
    """The number of the image of this name, path, or end of a path.

    Raises:
        UserError: there is none, or there are several.
    """
    end = os.sep + name
    names = ((number, source.name_of(number)) for number in range(len(source)))
    found = [number for number, own in names if own == name or own.endswith(end)]
    if len(found) != 1:
        several = f"means {len(found)} images, give more of its path" if found else "is no image of the run"
        raise UserError(f"--image {name} {several}; {source.name} has names such as {source.name_of(0)}.")
    return found[0]


def chosen(images: int, sample: int, seed: int, named: Sequence[int]) -> list[int]:
    """Numbers of the images to ask: those that were named first, the rest drawn by ``seed``."""
    drawn = seeding.numpy_generator("sample", seed).permutation(images)[:sample].tolist()
    return [*named, *(number for number in drawn if number not in named)][: max(sample, len(named))]


class Sample:
    """The views of the chosen images, as the run makes them in an epoch, without images that cannot be read.

    Raises:
        UserError: an image that was ``named`` cannot be read, or none can.
        OutageError: the images are gone.
    """

    def __init__(self, views: TwoViews, epoch: int, ids: Sequence[int], named: Sequence[int] = ()):
        items = [views[epoch, index] for index in ids]
        if any(item["bad"] < -1 for item in items):
            raise OutageError(f"the images of {views.source.name} cannot be reached.")
        self.unread = [index for index, item in zip(ids, items, strict=True) if item["bad"] >= 0]
        if bad := [index for index in named if index in self.unread]:
            raise UserError(f"{views.source.name_of(bad[0])} cannot be read; name another image.")
        items = [item for item in items if item["bad"] < 0]
        if not items:
            raise UserError(f"none of {len(ids)} images of {views.source.name} can be read: check the files.")
        self.ids = torch.tensor([item["index"] for item in items])  # (N,)
        self.queries, self.keys = (torch.stack([item[name] for item in items]) for name in "qk")  # (N, channels, s, s)

    def notes(self, source: Source) -> list[str]:
        """Of images that were left out."""
        if not self.unread:
            return []
        return [f"{len(self.unread)} images cannot be read and are left out, first {source.name_of(self.unread[0])}"]


class Gallery:
    """The images behind the numbers."""

    def __init__(self, run: QueueRun, source: Source, views: TwoViews, sample: Sample):
        self.run, self.source, self._views = run, source, views
        self.seen = run.views_of_rows(source)
        self.place = {index: at for at, index in enumerate(sample.ids.tolist())}
        self.sample = sample

    def query(self, index: int) -> Image.Image:
        """The view that the query encoder saw."""
        return _image(self.sample.queries[self.place[index]])

    def key(self, index: int) -> Image.Image:
        """The view that the key encoder saw, of a query's own image."""
        return _image(self.sample.keys[self.place[index]])

    def row(self, row: int) -> Image.Image:
        """The view that a queue row is the key of; the whole image where it is not known."""
        if row not in self.seen:
            return self.whole(int(self.run.ids[row]))
        epoch, view = self.seen[row]
        return _image(self._views[epoch, int(self.run.ids[row])]["q" if view == QUERY_VIEW else "k"])

    def whole(self, index: int) -> Image.Image:
        """An image as it is; a grey one where it cannot be read or is none of these."""
        try:
            return shown(self.source.load(index))
        except (BadImageError, IndexError):
            return Image.new("L", (self._views.size, self._views.size), 128)

    def class_of(self, index: int) -> str:
        """The name of an image's class; empty without labels."""
        labels, classes = self.source.labels, self.source.classes
        if labels is None or not 0 <= index < len(labels):
            return ""
        return classes[labels[index]] if classes else str(labels[index])

    def name_all(self, result: dict[str, Any]) -> None:
        """Put the names and classes of images into the entries of ``shown``, and whether the view of a row is known."""
        for entry in _entries(result["shown"]):
            inside = entry["id"] < len(self.source)
            entry["name"] = self.source.name_of(entry["id"]) if inside else f"image {entry['id']}"
            entry["class"] = self.class_of(entry["id"])
            if "row" in entry:
                entry["view_known"] = entry["row"] in self.seen


def _entries(value: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in it that are of an image."""
    if isinstance(value, dict) and "id" in value:
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _entries(item)


def _image(view: Tensor) -> Image.Image:
    return shown(from_levels(view.permute(1, 2, 0).numpy()))  # (s, s, channels)
