"""Whether a file of torch.save is whole, asked before torch reads it: torch compares no checksum of its zip.

Every entry's CRC-32 is computed, and an unpickler that makes nothing counts what torch's would make. Files from before
torch 1.6 are no zip and have no checksums; of them the second is asked alone.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import zipfile
from typing import IO, Any

_CHUNK = 1 << 20
_MOST_AT_ONCE = 1 << 26  # bytes; a directory or a pickle above it is of no network
_MOST_OPERATIONS = 1 << 22  # of a pickle, each of which makes 200 bytes or less: under 1 GiB
_ITEM_SIZES = {
    "DoubleStorage": 8, "LongStorage": 8, "ComplexFloatStorage": 8, "ComplexDoubleStorage": 16, "FloatStorage": 4,
    "IntStorage": 4, "QInt32Storage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "ShortStorage": 2,
}  # fmt: skip
_TOO_MUCH = "is no checkpoint: torch would take more memory for it than a network needs."
_FOLDER = 0x10  # such an entry torch takes for empty, and its tensors hold what the memory held before
_MAGIC = 0x1950A86A20F9469CFC6C  # of torch's old files
CHECKED, UNWRITTEN = "", "its checksums were not written: damage in it cannot be seen"
OLD = "a file of before torch 1.6, without checksums: damage in it cannot be seen"
_checked: dict[tuple, str] = {}  # of files that were found whole by this process: settings and weights are read apart


class Damaged(Exception):
    """The file cannot be what torch.save has written: the end of a sentence that begins with its name."""


def check(file: io.BufferedReader) -> str:
    """Whether a file from which nothing was read yet is whole. Returns what is to be said of its checksums, empty where
    it has them.

    Raises:
        Damaged: it is not, or torch would take more memory for it than 1 GiB and what it holds.
        Exception: anything else that a damaged file makes a parser raise.
    """
    found = os.fstat(file.fileno())
    key = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if key not in _checked:
        own = _Sparing(file.fileno(), closefd=False)
        is_zip = own.read(4) == b"PK\3\4"
        own.seek(0)
        _checked[key] = (_check_zip if is_zip else _check_old)(own, found.st_size)
        os.lseek(file.fileno(), 0, os.SEEK_SET)
    return _checked[key]


class _Sparing(io.FileIO):
    """A file of which no more is read at once than a checkpoint's directory has, whatever length it names."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_AT_ONCE:
            raise Damaged(_TOO_MUCH)
        return super().read(size) or b""


def _check_zip(file: _Sparing, size: int) -> str:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        sizes = {entry.filename: entry.file_size for entry in entries}
        if len(sizes) < len(entries) or sum(sizes.values()) > size:  # torch compresses nothing
            raise Damaged("is damaged: its directory names more than the file holds.")
        if any(entry.external_attr & _FOLDER for entry in entries):
            raise Damaged("is damaged: its directory calls an entry a folder.")
        written = any(entry.CRC for entry in entries)  # torch.serialization.set_crc32_options(False) leaves zeros
        for entry in entries:
            if not written:
                del entry.CRC  # zipfile then compares nothing
            _check_entry(archive, entry)
        folder = entries[0].filename.partition("/")[0]
        prefix = f"{folder}/data/"
        held = {name.removeprefix(prefix): length for name, length in sizes.items() if name.startswith(prefix)}
        with archive.open(f"{folder}/data.pkl") as content:
            _Counting(_limited(content), size, held).load()
    return CHECKED if written else UNWRITTEN


def _check_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> None:
    with archive.open(entry) as content:  # compares the directory with what lies before the content
        try:
            while content.read(_CHUNK):
                pass
        except zipfile.BadZipFile as error:
            what = f"is damaged: the checksum of its entry {entry.filename} is not that of the content"
            raise Damaged(f"{what}; take another copy of the file, or an earlier checkpoint.") from error


def _limited(content: IO[bytes]) -> bytes:
    found = content.read(_MOST_AT_ONCE)
    if len(found) == _MOST_AT_ONCE:
        raise Damaged(
            "is no checkpoint that can be read: its pickle has 64 MiB or more, without its tensors; if its weights are "
            "numpy arrays or lists, save them as tensors."
        )
    return found


def _check_old(file: _Sparing, size: int) -> str:
    """Of a magic number, the version, the machine, the objects and the storages' keys: pickles one after another."""
    buffered = io.BufferedReader(file)
    for number in range(5):
        start = buffered.tell()
        for _ in pickletools.genops(buffered):
            pass
        end = buffered.tell()
        buffered.seek(start)
        found = _Counting(buffered.read(end - start), size).load()
        if number == 0 and found != _MAGIC:
            break  # torch refuses it, in its own words
    return OLD


class _Counting(pickle.Unpickler):
    """Goes through a pickle as torch's unpickler does, and makes nothing but what is in the pickle itself.

    Args:
        content: the pickle.
        most: bytes that its storages may have.
        held: bytes of each storage that the file has, by its key; None where they are not known.
    """

    def __init__(self, content: bytes, most: int, held: dict[str, int] | None = None) -> None:
        super().__init__(io.BytesIO(content), encoding="latin-1")
        self.held, self.most, self.left = held, most, 2 * len(content) + 1000
        self.sizes: dict[str, int] = {}
        self.stand_ins: dict[str, type] = {}
        for count, (code, argument, _) in enumerate(pickletools.genops(content)):
            index = argument if "PUT" in code.name and isinstance(argument, int) else 0
            if count > _MOST_OPERATIONS or code.name == "BYTEARRAY8" or index > len(content):
                raise Damaged(_TOO_MUCH)

    def find_class(self, module: str, name: str, /) -> type:
        """What torch's unpickler takes, or refuses, in its own words."""
        if name not in self.stand_ins:
            self.stand_ins[name] = type(name, (_StandIn,), {"counts": self.count if module != "torch._utils" else None})
        return self.stand_ins[name]

    def count(self, values: Any) -> None:
        """What is made of values is counted: a pickle may name the same ones again and again."""
        sized = (value if isinstance(value, int) else len(value) for value in values if isinstance(value, _MAKES))
        self.left -= sum(abs(size) for size in sized)
        if self.left < 0:
            raise Damaged(_TOO_MUCH)

    def persistent_load(self, pid: Any, /) -> None:
        """A storage: as large as its entry."""
        kind, key, count = pid[1].__name__, str(pid[2]), int(pid[4])
        size = self.sizes[key] = count * _ITEM_SIZES.get(kind, 1)
        wrong = self.held is not None and self.held.get(key, 0) != size
        if count < 0 or wrong or sum(self.sizes.values()) > self.most:
            raise Damaged(f"is damaged: its storage {key} has another size than its tensors say.")


_MAKES = (int, str, bytes, list, tuple, dict)


class _StandIn(dict):
    """Of a class or a function that a pickle names: takes anything and keeps nothing."""

    counts: Any = None

    def __new__(cls, *values: Any) -> _StandIn:
        if cls.counts is not None:
            cls.counts(values)
        return super().__new__(cls)

    def __init__(self, *values: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        if self.counts is not None:
            self.counts((state,))

    def __setitem__(self, name: Any, value: Any) -> None:
        pass

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def append(self, value: Any) -> None:
        """As a list's."""

    def extend(self, values: Any) -> None:
        """As a list's."""

    def add(self, value: Any) -> None:
        """As a set's."""
