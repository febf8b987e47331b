"""Tar shards: many images in few files, read in order. The layout is webdataset's.

A sample is the files of a shard that share a name up to the first dot of its last part: an image (KEY.jpg) and perhaps
a label (KEY.cls, an integer in ASCII). ``python -m moco.data pack DIR OUT`` writes shards, and beside them an index and
the names of the classes, so that opening them reads no headers; shards from elsewhere are scanned once at the start.

Legend: n images of all shards.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from moco.data.sources.base import EncodedSource, FileSource, Paths
from moco.data.sources.decode import BadImageError
from moco.data.sources.files import IMAGE_EXTENSIONS
from moco.errors import UserError
from moco.files import replacing

INDEX = "index.npz"
CLASSES = "classes.txt"
MEGABYTES = 200  # a shard: some 1,800 photographs of ImageNet


@dataclass
class Index:
    """Where the images of some shards lie: arrays (n,), in the order of the shards and inside them."""

    shard: np.ndarray
    offset: np.ndarray  # bytes from the shard's start
    size: np.ndarray  # bytes
    label: np.ndarray  # -1: none
    keys: Paths


class ShardSource(EncodedSource):
    """Images inside uncompressed tar files. ``starts`` (shards,) are the numbers of each shard's first image."""

    def __init__(self, name: str, shards: list[str], index: Index, channels: int, classes: list[str] | None) -> None:
        labelled = len(index.label) > 0 and int(index.label.min()) >= 0
        labels = index.label.astype(np.int64) if labelled else None
        if labels is not None and classes is None:
            classes = [str(number) for number in range(int(labels.max()) + 1)]
        super().__init__(name, channels, classes if labelled else None, labels)
        self.shards = shards
        self.starts = np.searchsorted(index.shard, np.arange(len(shards)))
        self.index = index
        self._open: dict[int, int] = {}  # shard, file descriptor

    def __len__(self) -> int:
        return len(self.index.shard)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": {}}

    def contents(self, index: int) -> bytes:
        shard, size = int(self.index.shard[index]), int(self.index.size[index])
        if shard not in self._open:
            while len(self._open) >= 16:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY)
        # pread, so that processes which share a descriptor do not move each other's place.
        data = os.pread(self._open[shard], size, int(self.index.offset[index]))
        if len(data) < size:
            raise OSError(f"the shard ends after {len(data)} of {size} bytes of this image")
        return data

    def files(self) -> list[str]:
        return self.shards

    def name_of(self, index: int) -> str:
        return f"{self.shards[int(self.index.shard[index])]}:{self.index.keys[index]}"

    def identity(self) -> Iterator[bytes]:
        yield "\n".join(map(os.path.basename, self.shards)).encode(errors="surrogateescape")
        for array in (self.index.shard, self.index.offset, self.index.size):
            yield array.astype("<i8").tobytes()


def shards_in(path: str) -> list[str]:
    """Paths of the tar files directly in the folder ``path``, sorted; ``path`` itself if it is one."""
    if path.endswith(".tar"):
        return [path] if os.path.isfile(path) else []
    if not os.path.isdir(path):
        return []
    return sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".tar"))


def open_shards(path: str, channels: int = 3) -> ShardSource:
    """The shards of the folder ``path``, or the one shard ``path``; UserError when they hold no image."""
    shards = shards_in(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = (_stored_index(path, shards) if folder == path else None) or _scanned(shards)
    if not index.keys:
        raise UserError(f"the shards of {path} hold no image ({' '.join(IMAGE_EXTENSIONS)}): check the path")
    classes = None
    if os.path.isfile(os.path.join(folder, CLASSES)):
        with open(os.path.join(folder, CLASSES), encoding="utf-8") as file:
            classes = file.read().split("\n")[:-1]
        if int(index.label.max()) >= len(classes):
            raise UserError(f"{path} has labels up to {index.label.max()} but {len(classes)} names in {CLASSES}")
    return ShardSource(path, shards, index, channels, classes)


def _stored_index(folder: str, shards: list[str]) -> Index | None:
    """The index beside the shards; None without one. UserError when the shards are not those it was written for."""
    file = os.path.join(folder, INDEX)
    if not os.path.isfile(file):
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        keys = bytes(found["keys"]).decode().split("\n")
        index = Index(found["shard"], found["offset"], found["size"], found["label"], Paths(keys))
        names = bytes(found["names"]).decode().split("\n")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{file} cannot be read ({error}): delete it, and the shards are scanned instead") from error
    sizes = [os.path.getsize(shard) for shard in shards]
    if names != [os.path.basename(shard) for shard in shards] or sizes != found["bytes"].tolist():
        raise UserError(f"{file} was written for other shards than {folder} holds: delete it, or pack again")
    return index


def _scanned(shards: list[str]) -> Index:
    """The index of any shards, from their headers."""
    rows, keys = [], []
    for number, shard in enumerate(shards):
        labels: dict[str, int] = {}
        images: list[tarfile.TarInfo] = []
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in filter(tarfile.TarInfo.isfile, tar):
                    if member.name.lower().endswith(IMAGE_EXTENSIONS):
                        images.append(member)
                    elif member.name.endswith(".cls") and (content := tar.extractfile(member)):
                        labels[_key(member.name)] = int(content.read())
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{shard} cannot be read as an uncompressed tar file ({error})") from error
        rows += [(number, image.offset_data, image.size, labels.get(_key(image.name), -1)) for image in images]
        keys += [image.name for image in images]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    shard, offset, size, label = table.T.copy()
    return Index(shard, offset, size, label, Paths(keys))


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def pack_shards(source: FileSource, out: str, seed: int = 0, megabytes: float = MEGABYTES) -> list[str]:
    """Write the images of ``source`` to ``out``/shard-000000.tar and on, in random order; returns their paths.

    The files' bytes are copied, not decoded. In random order, because later they are read in order. UserError when
    ``out`` is not empty: two packings must not mix.
    """
    os.makedirs(out, exist_ok=True)
    if os.listdir(out):
        raise UserError(f"{out} is not empty: give an empty or a new folder for the shards")
    order = np.random.default_rng(seed).permutation(len(source))
    shards, rows, keys = [], [], []
    for number, members in enumerate(_filled(source, order, megabytes * 1e6)):
        shards.append(os.path.join(out, f"shard-{number:06d}.tar"))
        with tarfile.open(shards[-1], "w", format=tarfile.USTAR_FORMAT) as tar:
            for key, data, label in members:
                rows.append((number, tar.offset + tarfile.BLOCKSIZE, len(data), label))  # behind a header of one block
                keys.append(key)
                _add(tar, key, data)
                if label >= 0:
                    _add(tar, f"{key.partition('.')[0]}.cls", str(label).encode())
    if source.classes is not None:
        with open(os.path.join(out, CLASSES), "w", encoding="utf-8") as file:
            file.writelines(f"{name}\n" for name in source.classes)
    table = dict(zip(("shard", "offset", "size", "label"), np.array(rows, dtype=np.int64).T, strict=True))
    names = [os.path.basename(shard) for shard in shards]
    # Last and in one piece: shards with an index are whole.
    with replacing(os.path.join(out, INDEX), "OUT") as beside, open(beside, "wb") as file:
        np.savez(file, **table, keys=_packed(keys), names=_packed(names), bytes=[os.path.getsize(x) for x in shards])
    return shards


def _packed(texts: list[str]) -> np.ndarray:
    return np.frombuffer("\n".join(texts).encode(), dtype=np.uint8)


Member = tuple[str, bytes, int]  # name, content, label


def _filled(source: FileSource, order: np.ndarray, limit: float) -> Iterator[list[Member]]:
    """Runs of images of at most ``limit`` bytes together, or of one image."""
    members: list[Member] = []
    total = 0
    for place, index in enumerate(order.tolist()):
        try:
            data = source.read(index)
        except BadImageError as error:
            raise UserError(f"{error} cannot be packed: repair it or remove it from the folder or list") from error
        if members and total + len(data) > limit:
            yield members
            members, total = [], 0
        extension = os.path.splitext(source.name_of(index))[1].lower()
        label = -1 if source.labels is None else int(source.labels[index])
        members.append((f"{place:09d}{extension}", data, label))
        total += len(data)
    yield members


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
