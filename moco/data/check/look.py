"""One image as a run reads it: its file's header and digest, the range of its values, sums of its pixels.

Each file is read once, in any of several processes.

Legend: H x W pixels, C channels of the decoded image.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from moco import bars, signals
from moco.data.pixel_statistics import sums_of
from moco.data.sources import bands
from moco.data.sources.base import Source
from moco.data.sources.decode import BadImageError, opened, reading
from moco.data.sources.values import bits_of
from moco.errors import OutageError

CHUNK = 16  # images that a process looks at in one go


@dataclass
class Looked:
    """What one image is.

    digest: of the file's bytes, or of the pixels in memory. kind: the format by content, empty for images in memory.
    mode: PIL's name for the stored pixels. bits: of a stored value. low, high: of the values, stored ones where these
    have more than 8 bits. sums, squares: (C,) of the decoded pixels' values and of their squares, exact. bad: why it
    cannot be read; all else is then meaningless.
    """

    digest: bytes = b""
    kind: str = ""
    mode: str = ""
    bits: int = 8
    width: int = 0
    height: int = 0
    low: float = 0
    high: float = 0
    sums: tuple[int, ...] = ()
    squares: tuple[int, ...] = ()
    bad: str = ""


def look(source: Source, index: int) -> Looked:
    """Image ``index`` of a source."""
    name = source.name_of(index)
    try:
        data = source.read(index)
        once = source if data is None else _of_bytes(source, data)
        decoded = np.asarray(once.load(index))
        found = reading(name, lambda: _stored(data, decoded, lambda: once.stored(index).values))
    except BadImageError as error:
        return Looked(bad=str(error).removeprefix(f"{name} (").removesuffix(")"))
    sums, squares = sums_of(decoded.reshape(-1, 1 if decoded.ndim == 2 else decoded.shape[-1]))
    found.sums, found.squares = tuple(sums.tolist()), tuple(squares.tolist())
    return found


def _of_bytes(source: Source, data: bytes) -> Source:
    """The same source, which takes every image to be these bytes: a file is read once, and decoded as it will be."""
    once: Any = copy.copy(source)
    once.contents = lambda _: data
    return once


def _stored(data: bytes | None, decoded: np.ndarray, numbers: Callable[[], np.ndarray]) -> Looked:
    """What the file of an image says of itself. numbers: those in it, for what PIL does not open."""
    height, width = decoded.shape[:2]
    found = Looked(width=width, height=height, low=int(decoded.min()), high=int(decoded.max()))
    found.mode = "L" if decoded.ndim == 2 else "RGB" if decoded.shape[-1] == 3 else f"{decoded.shape[-1]} channels"
    if data is None:
        found.digest = _digest(np.ascontiguousarray(decoded).tobytes())
        return found
    found.digest = _digest(data)
    try:
        image = opened(data)
    except Exception:  # what the source reads by itself, without PIL
        values = numbers()
        found.kind, found.bits = "NPY" if data.startswith(bands.ARRAY) else "TIFF", 8 * values.dtype.itemsize
        found.low, found.high = _extremes(values)
        return found
    found.kind, found.mode, found.bits = image.format or "", image.mode, bits_of(image)
    if image.mode.startswith(("I", "F")):
        found.low, found.high = _extremes(np.asarray(image))
    return found


def _extremes(values: np.ndarray) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    return (values.min().item(), values.max().item()) if values.size else (0, 0)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def look_at_all(source: Source, workers: int, title: str) -> Iterator[Looked]:
    """All images in their order, by so many processes, none for this one; under a bar."""
    for some in bars.counted(_chunks(source, workers), -(-len(source) // CHUNK), title):
        yield from some


def _chunks(source: Source, workers: int) -> Iterator[list[Looked]]:
    starts = range(0, len(source), CHUNK)
    if workers < 1 or len(starts) < 2:
        yield from (_look_from(source, start) for start in starts)
        return
    pool = ProcessPoolExecutor(min(workers, len(starts)), initializer=_begin, initargs=(source,))
    try:
        with signals.blocked():  # the processes, all of which begin here, answer no signal: they end with this one
            results = pool.map(_look_on, starts)
        yield from results
    except BrokenProcessPool as error:
        gone = "a process that reads images is gone, perhaps for want of memory: give --workers 0"
        raise OutageError(gone) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _look_from(source: Source, start: int) -> list[Looked]:
    return [look(source, index) for index in range(start, min(start + CHUNK, len(source)))]


_source: list[Source] = []  # of a process of the pool


def _begin(source: Source) -> None:
    import torch

    torch.set_num_threads(1)
    _source[:] = [source]


def _look_on(start: int) -> list[Looked]:
    return _look_from(_source[0], start)


def default_workers(cores: Callable[[], int | None] = os.cpu_count) -> int:
    """As many processes as cores, but for small machines and large ones."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores() or 1
    return min(8, count) if count > 1 else 0
