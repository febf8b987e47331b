"""Decoded images in one file that processes map: images of small sets are decoded once, not in every epoch.

A cache belongs to the files that it was made of, by their paths, sizes and times, and to the versions of the decoders.
One that belongs to others, or is cut short, is made anew in its place. Images keep their own sizes.

The file: ``HEADER`` bytes (``MAGIC``, 32 bytes of digest, int64 N, int64 bytes of the file), a table (N, 3) int64 of
each image's first byte, height and width (0: it could not be decoded), then pixels, row by row, uint8.

Legend: N images, H x W pixels, C channels (1 or 3).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import struct
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import torchvision
from PIL import Image
from tqdm import tqdm

from moco import signals
from moco.data.sources.base import Source, some_sizes
from moco.data.sources.decode import BadImageError
from moco.errors import UserError, tell
from moco.files import replace

LIMIT = 20e9  # bytes of decoded images: more than this and the memory of an ordinary machine does not keep them
SIZED = 64  # images, spread over the set, from which the size of a cache is guessed before it is made
MAGIC = b"moco images 1\n\0\0"
HEADER = 64


class CachedSource(Source):
    """The images of ``whole`` from the cache at ``path``; everything else is as ``whole`` has it."""

    def __init__(self, whole: Source, path: str, digest: bytes) -> None:
        super().__init__(whole.name, whole.channels, whole.classes, whole.labels, whole.native_size)
        self.starts = whole.starts
        self.whole, self.path, self.digest = whole, path, digest
        self._mapped = _map(path, digest)

    def __len__(self) -> int:
        return len(self.whole)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": None}

    def load(self, index: int) -> Image.Image:
        self._mapped = self._mapped or _map(self.path, self.digest)
        if self._mapped is None:
            raise UserError(f"{self.path} was replaced or removed while it was in use: start again with --resume auto")
        table, content = self._mapped
        first, height, width = table[index].tolist()
        if not height:
            return self.whole.load(index)  # raises what it raised when the cache was made
        pixels = content[first : first + height * width * self.channels]
        return Image.fromarray(pixels.reshape((height, width, 3)[: 2 + self.channels // 3]))

    def files(self) -> Sequence[str]:
        return self.whole.files()

    def name_of(self, index: int) -> str:
        return self.whole.name_of(index)

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
    place = hashlib.sha256(f"{os.path.abspath(where)} {source.channels}".encode(errors="surrogateescape"))
    name = os.path.basename(os.path.abspath(source.name))
    path = os.path.join(folder, f"{name}-{place.hexdigest()[:12]}.pixels")
    digest = _digest(source)
    if _map(path, digest) is None:
        _make(source, path, digest)
    return CachedSource(source, path, digest)


def _digest(source: Source) -> bytes:
    """(32,) of all that decides what the decoded images are."""
    digest = hashlib.sha256(f"{PIL.__version__} {torchvision.__version__} {source.channels} {len(source)}".encode())
    for path in source.files():
        size, changed = -1, -1
        with contextlib.suppress(OSError):  # a file that is not there is a bad image
            status = os.stat(path)
            size, changed = status.st_size, status.st_mtime_ns
        digest.update(os.fsencode(os.path.abspath(path)) + f"\n{size} {changed}\n".encode())
    return digest.digest()


def _map(path: str, digest: bytes) -> tuple[np.ndarray, np.ndarray] | None:
    """(table, all bytes) of the cache at ``path``; None when it is not there, not whole or of other images."""
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r"))
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    head = content[:HEADER].tobytes()
    if len(head) < HEADER or not head.startswith(MAGIC + digest):
        return None
    n, size = struct.unpack_from("<qq", head, len(MAGIC) + len(digest))
    if size != len(content):
        return None
    return content[HEADER : HEADER + 24 * n].view("<i8").reshape(n, 3), content


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
        if _map(path, digest) is None:  # the first run's file stays: over NFS what it has mapped would be gone
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
    table = np.zeros((len(source), 3), dtype="<i8")
    place = HEADER + table.nbytes
    file.seek(place)
    for index in tqdm(range(len(source)), "decoding into --cache", disable=None, leave=False, dynamic_ncols=True):
        try:
            pixels = np.asarray(source.load(index))  # (H, W) or (H, W, 3)
        except BadImageError:
            continue
        file.write(pixels.tobytes())
        table[index] = place, *pixels.shape[:2]
        place += pixels.nbytes
    file.seek(0)
    file.write((MAGIC + digest + struct.pack("<qq", len(table), place)).ljust(HEADER, b"\0"))
    file.write(table.tobytes())
    return int((table[:, 1] == 0).sum())
