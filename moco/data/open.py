"""From what a user wrote (a data set's name, a path) to the sources a run needs."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Sequence
from functools import partial
from typing import Any

from moco import distributed
from moco.data.channels import settle_channels
from moco.data.levels import drop_repeated, settle_levels
from moco.data.registry import DATASETS
from moco.data.sources.base import Source, Sources, paired
from moco.data.sources.cache import cached
from moco.data.sources.compressed import refuse_compressed
from moco.data.sources.files import open_path
from moco.data.sources.folders import NoImagesError, open_folder
from moco.data.sources.shards import INDEX, open_shards, shards_in
from moco.data.sources.splits import find_splits, splits_named
from moco.data.sources.values import Levels, for_all, levels_of
from moco.errors import UserError


def open_sources(
    dataset: str | None = None,
    path: str | None = None,
    *,
    download: bool = False,
    val_path: str | None = None,
    channels: int | None = None,
    cache: str | None = None,
    levels: Sequence[Any] | None = None,
) -> Sources:
    """The images of ``dataset`` ("folder" or None: of ``path``), and its labelled pair where it has one.

    A folder is read as upstream's (``path``/train for pretraining, with ``path``/val or ``path``/test as held-out
    images), else itself; ``path`` may be a list of image paths (.txt, .lst), a tar shard or a folder of shards.
    ``val_path``, of the same kinds, gives the held-out images of a folder, list or shards. ``channels`` 1 or 3
    converts, another number is that of files with as many; None keeps the data set's own (3 for grey and colour files,
    for others see :mod:`moco.data.channels`). ``cache`` is a folder that keeps decoded images, see
    :mod:`moco.data.sources.cache`. ``levels`` (low, high) are the values of the files that become black and white, as
    typed or as a checkpoint has them; None: see :mod:`moco.data.levels`, which looks at a few images. Every failure is
    a UserError that says what to do.
    """
    if dataset in (None, "folder"):
        return _open_files(path, val_path, channels, cache, levels_of(levels))
    if dataset not in DATASETS:
        raise UserError(f"unknown data set {dataset}: choose one of {', '.join(DATASETS)}")
    if val_path is not None:
        raise UserError(f"{dataset} has its own held-out images: leave out the path of held-out images")
    if channels not in (None, 1, 3):
        raise UserError(f"{dataset} has grey or colour images: --channels is 1 or 3, or left out")
    read = DATASETS[dataset].read(path, download, channels)
    for source in {id(source): source for source in read}.values() if for_all(levels_of(levels)) else ():
        settle_levels(source, levels_of(levels))
    kept = {id(source): cached(source, cache) if cache else source for source in read}  # two may be one object
    pretrain, train, val = (kept[id(source)] for source in read)
    return Sources(pretrain, train, val)


def open_on_nodes(
    dataset: str | None, path: str | None, *, download: bool, cache: str | None, **others: Any
) -> Sources:  # fmt: skip
    """:func:`open_sources` in every process, once the first of each node has downloaded or cached what is asked for."""
    opening = partial(open_sources, dataset, path, download=download, cache=cache, **others)
    return distributed.first_on_node(opening, wait=bool(download or cache))


def _open_files(
    path: str | None, val_path: str | None, channels: int | None, cache: str | None, levels: Levels | None
) -> Sources:  # fmt: skip
    if path is None:
        named = ", ".join(name for name, row in DATASETS.items() if row.reader)
        raise UserError(f"give an image folder, a list of image paths, or --dataset ({named})")
    found, notes = find_splits(path)
    train = _open(found.get("train", path), channels, cache, levels)
    train.found.notes[:0] = notes
    channels, levels = train.channels, train.levels
    if val_path is not None:
        val = _open(val_path, channels, cache, levels)
        drop_repeated(train, val)
        return paired(train, train, val)
    if "train" not in found or not (held_out := found.get("val", found.get("test"))):
        return Sources(train, no_pair=f"{path} has no held-out images (a folder val or test beside train)")
    try:
        val = _open(held_out, channels, cache, levels)
    except NoImagesError as error:
        return Sources(train, no_pair=str(error))
    drop_repeated(train, val)
    try:
        return paired(train, train, val)
    except UserError as error:  # pretraining needs no pair, and who needs one repeats this
        return Sources(train, no_pair=str(error))


def _open(path: str, channels: int | None, cache: str | None, levels: Levels | None) -> Source:
    source = _shards_or_images(path, channels or 3)
    settle_channels(source, channels)
    settle_levels(source, levels)
    return cached(source, cache) if cache else source


def _shards_or_images(path: str, channels: int) -> Source:
    """Tar shards where a folder holds nothing else, or they were packed here; else the images beside the tars."""
    shards = shards_in(path)
    if not shards:
        refuse_compressed(path)
        return open_path(path, channels)
    source = None
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, INDEX)):
        with contextlib.suppress(NoImagesError):
            source = open_folder(path, channels)
    if source is not None and len(source) >= len(shards):
        return source
    found = _open_shards(path, shards, channels)
    if source is not None:
        found.found.notes.append(f"of {path} the tar shards are read, not the {len(source):,} images beside them")
    return found


def _open_shards(path: str, shards: list[str], channels: int) -> Source:
    try:
        source = open_shards(path, channels)
    except UserError as error:
        if name := _tar_inside(shards[0]):
            where = os.path.dirname(shards[0])
            raise UserError(
                f"{shards[0]} holds tar files ({name} first), a class each: unpack it, and each of them into a folder "
                f"of its name: cd {where}; tar -xf {os.path.basename(shards[0])}; "
                "for f in n*.tar; do mkdir ${f%.tar}; tar -xf $f -C ${f%.tar}; rm $f; done"
            ) from error
        raise
    names = [os.path.basename(shard) for shard in shards]
    if len(splits := splits_named(names)) > 1:
        source.found.notes.append(
            f"warning: by their names the shards of {path} are of {' and '.join(splits)}, and all are read as one set: "
            f"move them into folders of these names to hold {splits[-1]} out"
        )
    if source.labels is None and all(re.fullmatch(r"n\d{8}\.tar", name) for name in names):
        source.found.notes.append(
            f"the tars of {path} are read as shards without labels; unpack each into a folder of its name for classes"
        )
    return source


def _tar_inside(shard: str) -> str:
    """The name of the first member of a tar file if that is a tar file too."""
    with contextlib.suppress(Exception), tarfile.open(shard, "r:") as tar:
        member = tar.next()
        return member.name if member and member.name.endswith(".tar") else ""
    return ""
