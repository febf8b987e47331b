"""Tar shards: many images in few files, read in order. The layout is webdataset's.

A sample is the files of a shard that share a name up to the first dot of its last part: an image (KEY.jpg) and perhaps
a label (KEY.cls, an integer in ASCII). ``python -m moco.data pack DIR OUT`` writes shards, and beside them an index and
the names of the classes, so that opening them reads no headers; shards from elsewhere are scanned once at the start.
What is not whole is refused: a shard without its end mark, an index with other shards than there are.

Legend: n images of all shards.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np

from moco.data.sources.base import FILE_BYTES, EncodedSource, Paths
from moco.data.sources.files import CLASSES, IMAGE_EXTENSIONS
from moco.errors import UserError, one_line
from moco.files import open_regular, regular_handle

INDEX = "index.npz"
ARRAYS = ("shard", "offset", "size", "label", "crc", "keys", "names", "bytes", "classes")  # of it
CLASS_NAMES = "classes.txt"
END_MARK = 2 * tarfile.BLOCKSIZE  # zero bytes that end a tar file
LABEL_BYTES = 32  # of a label's file at most


@dataclass
class Index:
    """Where the images of some shards lie: arrays (n,), in the order of the shards and inside them."""

    shard: np.ndarray
    offset: np.ndarray  # bytes from the shard's start
    size: np.ndarray  # bytes
    label: np.ndarray  # -1: none
    keys: Paths
    crc: np.ndarray | None = None  # CRC-32 of each image's bytes
    classes: bytes | None = None  # what CLASS_NAMES held, without its last line break


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
        if size > FILE_BYTES:
            raise OSError(f"{size:,} bytes are above the limit of {FILE_BYTES:,}")
        if shard not in self._open:
            while len(self._open) >= 16:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = regular_handle(self.shards[shard])
        try:  # pread, so that processes which share a descriptor do not move each other's place
            data = os.pread(self._open[shard], size, int(self.index.offset[index]))
        except OSError:
            os.close(self._open.pop(shard))  # of a disk that was gone it stays stale
            raise
        if len(data) < size:
            raise OSError(f"the shard ends after {len(data)} of {size} bytes of this image")
        if self.index.crc is not None and zlib.crc32(data) != int(self.index.crc[index]):
            raise OSError("not the bytes that were packed: the shard is damaged")
        return data

    def files(self) -> list[str]:
        return self.shards

    def missing(self, index: int) -> str:
        shard = self.shards[int(self.index.shard[index])]
        try:
            with open(shard, "rb") as file:
                file.read(1)
        except OSError as error:
            return f"{shard} cannot be read ({error.strerror})"
        return ""

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
    try:
        return sorted(os.path.join(path, name) for name in os.listdir(path) if name.endswith(".tar"))
    except OSError:  # no folder, or one that may not be read: whoever opens images says so
        return []


def open_shards(path: str, channels: int = 3) -> ShardSource:
    """The shards of the folder ``path``, or the one shard ``path``; UserError for damaged ones and without images."""
    shards = shards_in(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = (_stored_index(path, shards) if folder == path else None) or _scanned(shards)
    if not index.keys:
        raise UserError(f"the shards of {path} hold no image ({' '.join(IMAGE_EXTENSIONS)}): check the path")
    classes = _class_names(os.path.join(folder, CLASS_NAMES), index.classes)
    if classes is not None and int(index.label.max()) >= len(classes):
        raise UserError(f"{path} has labels up to {index.label.max()} but {len(classes)} names in {CLASS_NAMES}")
    return ShardSource(path, shards, index, channels, classes)


def _class_names(path: str, packed: bytes | None) -> list[str] | None:
    """The lines of the file beside the shards, which are those that were ``packed`` with them; None without one."""
    content = None
    if os.path.lexists(path):
        try:
            with open_regular(path, FILE_BYTES) as file:
                content = file.read().replace(b"\r\n", b"\n")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): restore or remove it") from error
        if packed is not None and content != packed + b"\n":
            raise UserError(f"{path} is not what was packed: remove it, and {INDEX} gives the names")
    elif packed is not None:
        content = packed + b"\n"
    if content is None:
        return None
    *names, rest = content.decode(errors="surrogateescape").split("\n")
    if rest or "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} has an empty line, a name twice or no line break at its end: write one class a line")
    return names


def _stored_index(folder: str, shards: list[str]) -> Index | None:
    """The index beside the shards; None without one. UserError when it is damaged or of other shards."""
    file = os.path.join(folder, INDEX)
    if not os.path.lexists(file):
        return None
    try:
        found = _arrays(file)
        names, keys = (_text(found[name]).decode().split("\n") for name in ("names", "keys"))
        classes = _text(found["classes"]) if "classes" in found else None
        shard, offset, size, label = (found[name] for name in ARRAYS[:4])
        index = Index(shard, offset, size, label, Paths(keys), found.get("crc"), classes)
        expected = found["bytes"].tolist()
        wrong = _contradiction(index, found["bytes"], names)
    except Exception as error:  # a damaged array can raise anything
        wrong = one_line(error) or type(error).__name__
    if wrong:
        raise UserError(f"{file} cannot be read ({wrong}): delete it, and the shards are scanned instead")
    there = {os.path.basename(shard): os.path.getsize(shard) for shard in shards}
    for name, size in zip(names, expected, strict=True):
        if there.pop(name, None) != size:
            raise UserError(f"{os.path.join(folder, name)} is missing or has not its {size:,} bytes of {INDEX}: "
                            "fetch it, or pack again")  # fmt: skip
    if there:
        raise UserError(f"{INDEX} of {folder} does not know {min(there)}: keep other shards in a folder of their own")
    return index


def _arrays(path: str) -> dict[str, np.ndarray]:
    """The arrays of an index, which are stored and not compressed, each compared with its CRC-32."""
    contents = {}
    with open_regular(path) as file, zipfile.ZipFile(file) as entries:
        for name in set(ARRAYS).intersection(entry.removesuffix(".npy") for entry in entries.namelist()):
            if entries.getinfo(f"{name}.npy").compress_type != zipfile.ZIP_STORED:
                raise ValueError("compressed")
            contents[name] = entries.read(f"{name}.npy")
    return {name: np.lib.format.read_array(io.BytesIO(one), allow_pickle=False) for name, one in contents.items()}


def _text(array: np.ndarray) -> bytes:
    if array.dtype != np.uint8:
        raise ValueError("text of another kind")
    return array.tobytes()


def _contradiction(index: Index, sizes: np.ndarray, names: list[str]) -> str:
    """What cannot be true of an index of shards called ``names``, of ``sizes`` (shards,) bytes; empty where nothing."""
    shard, offset, size, label = table = index.shard, index.offset, index.size, index.label
    crc = size if index.crc is None else index.crc
    if any(array.dtype != np.int64 for array in (*table, sizes)) or crc.dtype.kind not in "iu":
        return "numbers of another kind"
    if any(array.shape != (len(index.keys),) for array in (*table, crc)) or sizes.shape != (len(names),):
        return "arrays of different lengths"
    if shard[0] < 0 or shard[-1] >= len(sizes) or (np.diff(shard) < 0).any():
        return "shards out of their order"
    end = sizes[shard]  # (n,)
    if min(offset.min(), size.min()) < 0 or (size > end).any() or (offset > end - size).any():
        return "images outside of their shards"
    return "" if label.min() >= -1 and label.max() < CLASSES else "labels that are no class"


def _scanned(shards: list[str]) -> Index:
    """The index of any shards, from their headers."""
    rows, keys = [], []
    for number, shard in enumerate(shards):
        try:
            with open_regular(shard) as file:
                images, labels = _members(file)
        except Exception as error:  # tarfile takes damaged headers for endless recursion, negative sizes and others
            reason = one_line(error) or type(error).__name__
            raise UserError(
                f"{shard} cannot be read as an uncompressed tar file ({reason}): fetch it or pack it again"
            ) from error
        rows += [(number, image.offset_data, image.size, labels.get(_key(image.name), -1)) for image in images]
        keys += [image.name for image in images]
    table = np.array(rows, dtype=np.int64).reshape(-1, 4)
    shard, offset, size, label = table.T.copy()
    return Index(shard, offset, size, label, Paths(keys))


def _members(file: BinaryIO) -> tuple[list[tarfile.TarInfo], dict[str, int]]:
    """The images of a tar file and the labels by key; ValueError or tarfile's errors unless all of it is whole."""
    images, labels = [], {}
    end = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > end or member.issparse():
                raise ValueError(f"{member.name} does not lie in it whole")
            if not member.isfile():
                continue
            if member.name.lower().endswith(IMAGE_EXTENSIONS):
                images.append(member)
            elif member.name.endswith(".cls"):
                labels[_key(member.name)] = _label(file, member)
        _check_end(file, tar.offset)
    return images, labels


def _label(file: BinaryIO, member: tarfile.TarInfo) -> int:
    file.seek(member.offset_data)
    text = file.read(min(member.size, LABEL_BYTES)).strip()
    if member.size > LABEL_BYTES or not re.fullmatch(rb"\d+", text) or int(text) >= CLASSES:
        raise ValueError(f"the label {member.name} is no number below {CLASSES:,}")
    return int(text)


def _check_end(file: BinaryIO, place: int) -> None:
    """ValueError unless nothing but zeros is behind the last member: tarfile ends without a word where a header is
    damaged, and where the file ends between two members."""
    file.seek(place)
    rest = file.read(1 << 20)
    if len(rest) < END_MARK:
        raise ValueError(f"cut short: a tar file ends with {END_MARK:,} zero bytes")
    while rest:
        if rest.count(0) < len(rest):
            raise ValueError(f"at byte {place:,} a damaged header, or more behind the end mark")
        rest = file.read(1 << 20)


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"
