"""Tar shards: many images in few files, read in order. The layout is webdataset's.

A sample is the files of a shard that share a name up to the first dot of its last part: an image (KEY.jpg) and perhaps
a label (KEY.cls or KEY.json), see :mod:`moco.data.sources.members`. ``python -m moco.data pack DIR OUT`` writes shards,
and beside them an index and the names of the classes, so that opening them reads no headers; shards from elsewhere are
scanned once at the start. What is not whole is refused: a shard without its end mark, an index with other shards than
there are.

Legend: n images of all shards.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moco.data.sources.base import FILE_BYTES, EncodedSource, Found, Paths
from moco.data.sources.compressed import UNPACK, end_by_content, listed, pass_over_compressed
from moco.data.sources.files import CLASSES, IMAGE_EXTENSIONS
from moco.data.sources.members import Label, Members, read_members, without_masks
from moco.errors import UserError, one_line
from moco.files import open_regular, regular_handle

INDEX = "index.npz"
ARRAYS = ("shard", "offset", "size", "label", "crc", "keys", "names", "bytes", "classes")  # of it
CLASS_NAMES = "classes.txt"


@dataclass
class Index:
    """Where the images of some shards lie: arrays (n,), in the order of the shards and inside them.

    label: numbers of ``words`` where the labels are names, else as they are written. found: what a scan has to say.
    """

    shard: np.ndarray
    offset: np.ndarray  # bytes from the shard's start
    size: np.ndarray  # bytes
    label: np.ndarray  # -1: none
    keys: Paths
    crc: np.ndarray | None = None  # CRC-32 of each image's bytes
    classes: bytes | None = None  # what CLASS_NAMES held, without its last line break
    words: list[str] | None = None  # names of classes, sorted
    found: Found = field(default_factory=Found)


class ShardSource(EncodedSource):
    """Images inside uncompressed tar files. ``starts`` (shards,) are the numbers of each shard's first image."""

    def __init__(self, name: str, shards: list[str], index: Index, channels: int, classes: list[str] | None) -> None:
        labelled = len(index.label) > 0 and int(index.label.min()) >= 0
        labels = index.label.astype(np.int64) if labelled else None
        if labels is not None and classes is None:
            classes = [str(number) for number in range(int(labels.max()) + 1)]
        super().__init__(name, channels, classes if labelled else None, labels)
        self.shards, self.found = shards, index.found
        self.found.layout = "shards"
        self.starts = np.searchsorted(index.shard, np.arange(len(shards)))
        self.index = index
        self._open: dict[int, int] = {}  # shard, file descriptor
        self._tell_labels(np.flatnonzero(index.label < 0))

    def _tell_labels(self, without: np.ndarray) -> None:
        """Note what is odd about the labels; ``without``: numbers of images that have none."""
        notes, n = self.found.notes, len(self)
        if self.labels is not None and self.labels.min() > 0:
            notes.append(f"no image has the label 0, the lowest is {self.labels.min()}; label 0 stays a class")
        if 0 < len(without) < n:
            first = self.name_of(int(without[0]))
            self.found.unlabelled = f"{len(without):,} of {n:,} images lack one, the first {first}"
            notes.append(
                f"{len(without):,} of {n:,} images have no label, the first {first}: all are read as unlabelled, and "
                "what needs labels refuses them"
            )

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
    if path.lower().endswith(".tar") and not os.path.isdir(path):
        return [path] if os.path.isfile(path) else []
    return [os.path.join(path, name) for name in listed(path, (".tar",))]


def open_shards(path: str, channels: int = 3) -> ShardSource:
    """The shards of the folder ``path``, or the one shard ``path``; UserError for damaged ones and without images."""
    shards = shards_in(path)
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    index = (_stored_index(path, shards) if folder == path else None) or _scanned(shards)
    if not index.keys:
        raise UserError(_no_image(path, index.found))
    if folder == path:
        pass_over_compressed(folder, shards, index.found)
    classes = _class_names(os.path.join(folder, CLASS_NAMES), index.classes)
    if index.words is not None:
        classes = _numbered(index, classes, path)
    if classes is not None and int(index.label.max()) >= len(classes):
        raise UserError(
            f"{path} has labels up to {index.label.max()} but {len(classes)} names in {CLASS_NAMES}: write one a line"
        )
    return ShardSource(path, shards, index, channels, classes)


def _no_image(path: str, found: Found) -> str:
    if count := found.passed_over.get(".tar"):
        return (
            f"the shards of {path} hold {count:,} tar files and no image: unpack each into a folder of its own, with a "
            "shell `for t in *.tar; do mkdir ${t%.tar}; tar -xf $t -C ${t%.tar}; done`"
        )
    others = ", ".join(f"{number:,} {name}" for name, number in found.passed_over.items())
    return f"the shards of {path} hold no image ({' '.join(IMAGE_EXTENSIONS)}): " + (
        f"only {others}" if others else "check the path"
    )


def _numbered(index: Index, classes: list[str] | None, path: str) -> list[str]:
    """The classes of labels that are names; where ``classes`` are given their numbers are taken, in place."""
    assert index.words is not None
    if classes is None:
        return index.words
    number = {name: place for place, name in enumerate(classes)}
    numbers = np.array([number.get(word, -1) for word in index.words], dtype=np.int64)
    if (numbers < 0).any():
        word = index.words[int(np.argmin(numbers))]
        first = index.keys[int(np.argmax(index.label == int(np.argmin(numbers))))]
        raise UserError(f"{path}: the label of {first} is {word}, which is not in {CLASS_NAMES}: add it there")
    index.label = np.where(index.label < 0, -1, numbers[index.label])
    return classes


def _class_names(path: str, packed: bytes | None) -> list[str] | None:
    """The lines of the file beside the shards, which are those that were ``packed`` with them; None without one."""
    content = None
    if os.path.lexists(path):
        try:
            with open_regular(path, FILE_BYTES) as file:
                content = file.read().replace(b"\r\n", b"\n")
        except OSError as error:
            raise UserError(f"{path} cannot be read ({one_line(error)}): restore or remove it") from error
        if packed is not None and content not in (packed, packed + b"\n"):
            raise UserError(f"{path} is not what was packed: remove it, and {INDEX} gives the names")
    elif packed is not None:
        content = packed + b"\n"
    if content is None:
        return None
    names = content.removesuffix(b"\n").decode(errors="surrogateescape").split("\n")
    if "" in names or len(set(names)) < len(names):
        raise UserError(f"{path} has an empty line or a name twice: write one class a line")
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
    found = [_members(shard) for shard in shards]
    masks = without_masks(found)
    labels, words = _as_numbers(shards, found)
    rows = [(number, image.offset_data, image.size) for number, one in enumerate(found) for image in one.images]
    shard, offset, size = np.array(rows, dtype=np.int64).reshape(-1, 3).T.copy()
    keys = Paths([image.name for one in found for image in one.images])
    return Index(shard, offset, size, labels, keys, words=words, found=_told(found, masks, words, labels))


def _members(shard: str) -> Members:
    try:
        with open_regular(shard) as file:
            return read_members(file, shard)
    except UserError:
        raise
    except Exception as error:  # tarfile takes damaged headers for endless recursion, negative sizes and others
        if end := end_by_content(shard):
            raise UserError(
                f"{shard} is compressed, whatever its name says: type `mv {shard} {shard}{end[4:]} && {UNPACK[end]} "
                f"{shard}{end[4:]}`"
            ) from error
        reason = one_line(error) or type(error).__name__
        raise UserError(
            f"{shard} cannot be read as an uncompressed tar file ({reason}): fetch it or pack it again"
        ) from error


def _as_numbers(shards: list[str], found: list[Members]) -> tuple[np.ndarray, list[str] | None]:
    """((n,) int64 of all images, -1 for none; the names that they are numbers of, None where labels are numbers).

    UserError where some labels are numbers and others names."""
    labels: list[Label] = [label for one in found for label in one.labels]
    words = sorted({label for label in labels if isinstance(label, str)})
    if not words:
        return np.array([-1 if label is None else label for label in labels], dtype=np.int64), None
    if any(isinstance(label, int) for label in labels):
        name, number = (_first(shards, found, kind) for kind in (str, int))
        raise UserError(f"the label of {name}, a name, and that of {number}, a number: write all of one kind")
    place: dict[Label, int] = {word: number for number, word in enumerate(words)}
    return np.array([place.get(label, -1) for label in labels], dtype=np.int64), words


def _first(shards: list[str], found: list[Members], kind: type) -> str:
    """The first image with a label of a kind, and the label."""
    return next(
        f"{shard}:{image.name} is {label}"
        for shard, one in zip(shards, found, strict=True)
        for image, label in zip(one.images, one.labels, strict=True)
        if isinstance(label, kind)
    )


def _told(found: list[Members], masks: int, words: list[str] | None, labels: np.ndarray) -> Found:
    """What a scan has passed over and decided."""
    passed, second = (sum((getattr(one, name) for one in found), Counter()) for name in ("passed_over", "second"))
    stray = [name for one in found for name in one.stray]
    told = Found("shards", dict(passed.most_common()), sorted({note for one in found for note in one.told}))
    if words is not None:
        names = ", ".join(words[:5]) + " and more" * (len(words) > 5)
        told.notes.append(f"the labels are names, numbered in this order: {names} ({len(words):,} in all)")
    if second:
        kinds = ", ".join(f"{count:,} .{extension}" for extension, count in second.most_common(5))
        told.notes.append(
            f"{_count(second.total(), 'image')} beside the one of the key not read ({kinds}): the image of a key is "
            "the one with nothing between the key and its extension"
        )
        for extension, count in second.items():
            ending = "." + extension.rpartition(".")[2]
            told.passed_over[ending] = told.passed_over.get(ending, 0) + count
    if masks:
        told.notes.append(f"{_count(masks, 'key')} with no other image than such a one left out")
    if stray:
        told.notes.append(f"{_count(len(stray), 'label')} without an image in the same shard, the first {stray[0]}")
    if odd := [name for one in found for name in one.odd]:
        told.notes.append(f"{_count(len(odd), 'file')} KEY.json with a label that is no class, the first {odd[0]}")
    if len(labels) and labels.max() < 0:
        told.notes += _why_unlabelled(found, passed)
    return told


def _why_unlabelled(found: list[Members], passed: Counter[str]) -> list[str]:
    """What shards without a label hold that somebody may take for labels."""
    folders = sorted({_top(image.name) for one in found for image in one.images} - {""})
    notes = []
    if len(folders) > 1:
        names = ", ".join(folders[:5]) + " and more" * (len(folders) > 5)
        notes.append(
            f"{len(folders):,} folders inside the shards ({names}) are parts of names, no classes: unpack them for "
            "class folders (tar -xf SHARD -C DIR), or add KEY.cls"
        )
    if passed[".txt"]:
        count = _count(passed[".txt"], "file")
        notes.append(f"{count} KEY.txt taken for captions, not for labels: a label is KEY.cls or in KEY.json")
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + "s" * (number != 1)


def _top(name: str) -> str:
    """The first folder of a path."""
    folder, slash, _ = name.removeprefix("./").partition("/")
    return folder if slash else ""
