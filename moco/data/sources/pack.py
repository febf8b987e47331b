"""Image folders and lists as tar shards, see :mod:`moco.data.sources.shards`: written beside, and named when whole."""

from __future__ import annotations

import contextlib
import fcntl
import io
import itertools
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from moco.data.sources.base import FileSource
from moco.data.sources.decode import BadImageError
from moco.data.sources.files import IMAGE_EXTENSIONS
from moco.data.sources.shards import CLASS_NAMES, INDEX
from moco.errors import UserError, one_line
from moco.files import replacing

MEGABYTES = 200  # a shard: some 1,800 photographs of ImageNet
# What a packing writes; a kill leaves the last two under a name of :func:`moco.processes.temporary`.
_OURS = re.compile(r"((train|val|test)/)?(shard-\d+\.tar|(classes\.txt|index\.npz)((\.[\w-]+)?\.tmp)?)")


def pack(sources: dict[str, FileSource], out: str, seed: int = 0, megabytes: float = MEGABYTES) -> dict[str, int]:
    """Write the images of each source to ``out``/NAME/shard-000000.tar and on, in random order; shards of each name.

    The files' bytes are copied, not decoded. In random order, because later they are read in order. All is written to
    ``out``.part and gets its name at the end: a kill leaves nothing that is taken for a smaller data set, and the next
    packing removes it.

    Args:
        sources: by the name of the folder in ``out``, which may be empty for ``out`` itself.

    Raises:
        UserError: ``out`` is not empty (two packings must not mix), a file is unreadable, or nothing can be written.
    """
    for source in sources.values():
        if bad := [name for name in source.classes or () if "\n" in name]:
            raise UserError(f"{source.name} has a class folder with a line break in its name, {bad[0]!r}: rename it")
    with _named_when_whole(out) as beside:
        return {name: _write(source, os.path.join(beside, name), seed, megabytes) for name, source in sources.items()}


@contextlib.contextmanager
def _named_when_whole(out: str) -> Iterator[str]:
    """A folder beside ``out`` that takes its place at the end; after an error nothing is left."""
    final = os.path.realpath(out)
    beside = final + ".part"
    if os.path.ismount(final):
        raise UserError(f"{out} is a mount point, whose place nothing can take: give a new folder inside it")
    try:
        if os.path.lexists(final) and os.listdir(final):
            raise UserError(f"{out} is not empty: give an empty or a new folder for the shards")
        os.makedirs(beside, exist_ok=True)
        lock = os.open(beside, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({one_line(error)}): choose another OUT") from error
    try:
        _take_over(lock, beside)
        try:
            yield beside
            os.fsync(lock)
            os.rename(beside, final)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({one_line(error)}): make room or choose another OUT") from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)  # after the rename it is not there
    finally:
        os.close(lock)


def _take_over(lock: int, beside: str) -> None:
    """Empty ``beside`` of what a killed packing has left; UserError for one that goes on, and for files of others."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{beside} is being written by another packing: wait for it or choose another OUT") from error
    except OSError:  # a file system without locks
        pass
    left = [os.path.join(folder, name) for folder, _, names in os.walk(beside) for name in names]
    if other := [path for path in left if not _OURS.fullmatch(os.path.relpath(path, beside))]:
        raise UserError(f"{other[0]} is not of a packing that was killed: move {beside} away or choose another OUT")
    for path in left:
        os.remove(path)


class Member(NamedTuple):
    """An image of a shard."""

    key: str
    data: bytes
    label: int  # -1: none


def _write(source: FileSource, folder: str, seed: int, megabytes: float) -> int:
    """All files of one folder, each flushed to the disk, the index last; the number of shards."""
    os.makedirs(folder, exist_ok=True)
    order = np.random.default_rng(seed).permutation(len(source))
    sizes, rows, sums, keys = [], [], [], []
    for number, members in itertools.groupby(_dealt(source, order, megabytes * 1e6), lambda pair: pair[0]):
        path = os.path.join(folder, _shard_name(number))
        with open(path, "xb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for _, (key, data, label) in members:
                    rows.append((number, tar.offset + tarfile.BLOCKSIZE, len(data), label))  # behind one block's header
                    sums.append(zlib.crc32(data))
                    keys.append(key)
                    _add(tar, key, data)
                    if label >= 0:
                        _add(tar, f"{key.partition('.')[0]}.cls", str(label).encode())
            file.flush()
            os.fsync(file.fileno())
            sizes.append(file.tell())
    texts = {"keys": _joined(keys), "names": _joined([_shard_name(number) for number in range(len(sizes))])}
    if source.classes is not None:
        texts["classes"] = _joined(source.classes)
        with replacing(os.path.join(folder, CLASS_NAMES), "OUT") as beside, open(beside, "wb") as file:
            file.write(texts["classes"] + b"\n")
    arrays: dict[str, Any] = {name: np.frombuffer(text, dtype=np.uint8) for name, text in texts.items()}
    arrays.update(zip(("shard", "offset", "size", "label"), np.array(rows, dtype=np.int64).T, strict=True))
    arrays.update(bytes=np.array(sizes, dtype=np.int64), crc=np.array(sums, dtype=np.uint32))
    with replacing(os.path.join(folder, INDEX), "OUT") as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)
    return len(sizes)


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _joined(texts: list[str]) -> bytes:
    return "\n".join(texts).encode(errors="surrogateescape")  # classes are called as folders, with any bytes


def _dealt(source: FileSource, order: np.ndarray, limit: float) -> Iterator[tuple[int, Member]]:
    """The images in ``order`` and the number of the shard of each: at most ``limit`` bytes together, or one image."""
    number, total = 0, 0
    for place, index in enumerate(order.tolist()):
        try:
            data = source.read(index)
        except BadImageError as error:
            raise UserError(f"{error} cannot be packed: repair it or remove it from the folder or list") from error
        if total and total + len(data) > limit:
            number, total = number + 1, 0
        total += len(data)
        extension = os.path.splitext(source.name_of(index))[1].lower()
        if extension not in IMAGE_EXTENSIONS:  # in a list a file may be called anything
            extension = IMAGE_EXTENSIONS[0]
        label = -1 if source.labels is None else int(source.labels[index])
        yield number, Member(f"{place:09d}{extension}", data, label)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
