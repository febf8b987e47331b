"""Decoded images in one file that processes share: images of small sets are decoded once, not in every epoch.

A cache belongs to the files that it was made of, by their paths, sizes and times, and to the versions of the decoders.
One that belongs to others, or is cut short, is made anew in its place; an image in it that is damaged is decoded from
its own file. Images keep their own sizes.

The file: ``HEADER`` bytes (``MAGIC``, 32 bytes of digest, int64 N, int64 bytes of the file), a table (N, 4) int64 of
each image's first byte, height and width (0: it could not be decoded) and the CRC-32 of these and of its pixels, then
pixels, row by row, uint8.

Legend: N images, H x W pixels, C channels.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import torchvision

from moco import bars, signals
from moco.data.sources.away import ImagesAwayError
from moco.data.sources.base import Source, some_sizes
from moco.data.sources.decode import BadImageError
from moco.data.sources.values import Stored
from moco.data.stack import Picture, from_bytes
from moco.errors import UserError, tell
from moco.files import regular_handle, replace

LIMIT = 20e9  # bytes of decoded images: more than this and the memory of an ordinary machine does not keep them
SIZED = 64  # images, spread over the set, from which the size of a cache is guessed before it is made
MAGIC = b"moco images 3\n\0\0"  # 2: before TIFF files of several pages, bands and other ranges
HEADER = 64
ROW = 32  # bytes of the table for an image


class CachedSource(Source):
    """The images of ``whole`` from the cache at ``path``; everything else is as ``whole`` has it."""

    def __init__(self, whole: Source, path: str, digest: bytes) -> None:
        super().__init__(whole.name, whole.channels, whole.classes, whole.labels, whole.native_size)
        self.starts, self.found, self.levels = whole.starts, whole.found, whole.levels
        self.whole, self.path, self.digest = whole, path, digest
        self._opened = _open(path, digest, len(whole))

    def __len__(self) -> int:
        return len(self.whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}

    def load(self, index: int) -> Picture:
        self._opened = self._opened or _open(self.path, self.digest, len(self))
        if self._opened is None and not os.path.exists(self.path):
            raise ImagesAwayError(f"{self.path} is missing")
        if self._opened is None:
            raise UserError(f"{self.path} was replaced while it was in use: start again with --resume auto")
        table, handle, end, checked = self._opened
        first, height, width, crc = table[index].tolist()
        size, pixels = height * width * self.channels, b""
        if min(first, height, width) > 0 and first + size <= end:
            try:
                pixels = os.pread(handle, size, first)  # a mapped file that shrinks would end the process
            except OSError:
                os.close(handle)  # of a disk that was gone it stays stale
                self._opened = None
                raise
        if len(pixels) < max(size, 1) or not (checked[index] or crc == _checksum(table[index], pixels)):
            return self.whole.load(index)  # raises what it raised when the cache was made, or the cache is damaged
        checked[index] = True
        return from_bytes(pixels, (width, height), self.channels)

    def stored(self, index: int) -> Stored:
        return self.whole.stored(index)

    def files(self) -> Sequence[str]:
        return self.whole.files()

    def name_of(self, index: int) -> str:
        return self.whole.name_of(index)

    def missing(self, index: int) -> str:
        return self.whole.missing(index)

    def identity(self) -> Iterator[bytes]:
        return self.whole.identity()


def cached(source: Source, folder: str) -> Source:
    """``source`` with its decoded images in a file of ``folder``, which is made if need be; as it is if in memory.

    Raises UserError when the images are too many for a cache or the file cannot be written.
    """
    if not source.files():
        return source
    where = source.name  # a known data set's is no path: its images lie where its first one does
    if not os.path.exists(where):
        where = os.path.join(os.path.dirname(source.files()[0]), source.name)
    kind = f"{source.channels}{_levels(source)}"
    place = hashlib.sha256(f"{os.path.abspath(where)} {kind}".encode(errors="surrogateescape"))
    name = os.path.basename(os.path.abspath(source.name))
    path = os.path.join(folder, f"{name}-{place.hexdigest()[:12]}.pixels")
    digest = _digest(source)
    if not _is_whole(path, digest, len(source)):
        _make(source, path, digest)
    return CachedSource(source, path, digest)


def _checksum(row: np.ndarray, pixels: bytes) -> int:
    return zlib.crc32(pixels, zlib.crc32(row[:3].tobytes()))


def _levels(source: Source) -> str:
    """Empty without, so that caches of earlier versions hold."""
    return "" if source.levels is None else f" levels {source.levels.plain()}"


def _digest(source: Source) -> bytes:
    """(32,) of all that decides what the decoded images are."""
    versions = f"{PIL.__version__} {torchvision.__version__}"
    digest = hashlib.sha256(f"{versions} {source.channels} {len(source)}{_levels(source)}".encode())
    for path in source.files():
        size, changed = -1, -1
        with contextlib.suppress(OSError):  # a file that is not there is a bad image
            status = os.stat(path)
            size, changed = status.st_size, status.st_mtime_ns
        digest.update(os.fsencode(os.path.abspath(path)) + f"\n{size} {changed}\n".encode())
    return digest.digest()


def _open(path: str, digest: bytes, count: int) -> tuple[np.ndarray, int, int, np.ndarray] | None:
    """The cache at ``path``: table, descriptor, bytes, and (N,) bool, whether an image was compared with its checksum
    in this process, which takes as long as a crop. None when it is not there, not whole or of other images."""
    try:
        handle = regular_handle(path)
    except OSError:
        return None
    end, start = os.fstat(handle).st_size, HEADER + ROW * count
    with os.fdopen(os.dup(handle), "rb") as file:
        head = file.read(start)
    if len(head) < start or not head.startswith(MAGIC + digest + struct.pack("<qq", count, end)):
        os.close(handle)
        return None
    return np.frombuffer(head, "<i8", offset=HEADER).reshape(count, 4), handle, end, np.zeros(count, dtype=bool)


def _is_whole(path: str, digest: bytes, count: int) -> bool:
    found = _open(path, digest, count)
    if found:
        os.close(found[1])
    return found is not None


def _make(source: Source, path: str, digest: bytes) -> None:
    """Write the cache beside ``path``, flush it to the disk, then replace: a kill leaves the old file or none."""
    expected = _decoded_bytes(source)
    if expected > LIMIT:
        raise UserError(
            f"--cache is for small images, and those of {source.name} are about {expected / 1e9:.0f} GB decoded, above "
            f"{LIMIT / 1e9:.0f} GB: leave it out, or store the images smaller"
        )
    beside = f"{path}.{secrets.token_hex(4)}.part"  # two runs may make it at once; both make the same
    signals.unfinished.add(beside)
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(beside, "xb") as file:
            bad = _write(source, file, digest)
            file.flush()
            os.fsync(file.fileno())
        if not _is_whole(path, digest, len(source)):  # the first run's file stays: over NFS what it reads would be gone
            replace(beside, path)
    except OSError as error:
        raise UserError(f"--cache: {path} cannot be written ({error.strerror}): choose another folder") from error
    finally:
        signals.unfinished.discard(beside)
        with contextlib.suppress(OSError):
            os.remove(beside)
    without = f", {bad} could not be decoded" * bool(bad)
    size = os.path.getsize(path) / 1e6
    tell(f"decoded {len(source)} images of {source.name} into {path}: {size:.0f} MB{without}", error=True)


def fits(source: Source) -> bool:
    """Whether a cache would save decoding and may be made: the images are in files and not too many."""
    return bool(source.files()) and _decoded_bytes(source) <= LIMIT


def _decoded_bytes(source: Source) -> float:
    """About how many bytes the decoded images are together, from a few of them."""
    sizes = [width * height * source.channels for width, height in some_sizes(source, SIZED)]
    return float(np.mean(sizes or [0])) * len(source)


def _write(source: Source, file: Any, digest: bytes) -> int:
    """The header, the table and every image; returns how many could not be decoded."""
    table = np.zeros((len(source), 4), dtype="<i8")
    place = HEADER + table.nbytes
    file.seek(place)
    for index in bars.counted(range(len(source)), len(source), "decoding into --cache"):
        try:
            image = source.load(index)
        except BadImageError:
            continue
        pixels = image.tobytes()  # row by row
        file.write(pixels)
        table[index, :3] = place, image.height, image.width
        table[index, 3] = _checksum(table[index], pixels)
        place += len(pixels)
    file.seek(0)
    file.write((MAGIC + digest + struct.pack("<qq", len(table), place)).ljust(HEADER, b"\0"))
    file.write(table.tobytes())
    return int((table[:, 1] == 0).sum())
