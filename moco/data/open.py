"""From what a user wrote (a data set's name, a path) to the sources a run needs."""

from __future__ import annotations

from functools import partial
from typing import Any

from moco import distributed
from moco.data.registry import DATASETS
from moco.data.sources.base import Source, Sources, paired
from moco.data.sources.cache import cached
from moco.data.sources.files import open_path, splits
from moco.data.sources.shards import open_shards, shards_in
from moco.errors import UserError


def open_sources(
    dataset: str | None = None,
    path: str | None = None,
    *,
    download: bool = False,
    val_path: str | None = None,
    channels: int | None = None,
    cache: str | None = None,
) -> Sources:
    """The images of ``dataset`` ("folder" or None: of ``path``), and its labelled pair where it has one.

    A folder is read as upstream's (``path``/train for pretraining, with ``path``/val or ``path``/test as held-out
    images), else itself; ``path`` may be a list of image paths (.txt, .lst), a tar shard or a folder of shards.
    ``val_path``, of the same kinds, gives the held-out images of a folder, list or shards. ``channels`` 1 or 3
    converts; None keeps the data set's own (3 for files). ``cache`` is a folder that keeps decoded images, see
    :mod:`moco.data.sources.cache`. Every failure is a UserError that says what to do.
    """
    if dataset in (None, "folder"):
        return _open_files(path, val_path, channels or 3, cache)
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset}: choose one of {', '.join(DATASETS)}")
    if val_path is not None:
        raise UserError(f"{dataset} has its own held-out images: leave out the path of held-out images")
    read = DATASETS[dataset].read(path, download, channels)
    kept = {id(source): cached(source, cache) if cache else source for source in read}  # two may be one object
    pretrain, train, val = (kept[id(source)] for source in read)
    return Sources(pretrain, train, val)


def open_on_nodes(
    dataset: str | None, path: str | None, *, download: bool, cache: str | None, **others: Any
) -> Sources:  # fmt: skip
    """:func:`open_sources` in every process, once the first of each node has downloaded or cached what is asked for."""
    opening = partial(open_sources, dataset, path, download=download, cache=cache, **others)
    return distributed.first_on_node(opening, wait=bool(download or cache))


def _open_files(path: str | None, val_path: str | None, channels: int, cache: str | None) -> Sources:
    if path is None:
        named = ", ".join(name for name, row in DATASETS.items() if row.reader)
        raise UserError(f"give an image folder, a list of image paths, or --dataset ({named})")
    found = splits(path)
    train = _open(found.get("train", path), channels, cache)
    if val_path is None and "train" in found:
        val_path = found.get("val", found.get("test"))
    if val_path is None:
        return Sources(train, no_pair=f"{path} has no held-out images (a folder val or test beside train)")
    return paired(train, train, _open(val_path, channels, cache))


def _open(path: str, channels: int, cache: str | None) -> Source:
    source = open_shards(path, channels) if shards_in(path) else open_path(path, channels)
    return cached(source, cache) if cache else source
