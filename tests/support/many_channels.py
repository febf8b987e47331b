"""Files of several channels, written by the letter of the TIFF specification, as PIL writes none of them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

KINDS = {"u": 1, "i": 2, "f": 3}


def write_pages(path: Path, values: np.ndarray) -> None:
    """A TIFF of C grey pages from (H, W, C)."""
    first, *rest = (Image.fromarray(np.ascontiguousarray(values[..., c])) for c in range(values.shape[2]))
    first.save(path, "TIFF", save_all=True, append_images=rest)


def write_bands(
    path: Path,
    values: np.ndarray,
    *,
    separate: bool = False,
    deflate: bool = False,
    differences: bool = False,
    tile: int = 0,
    rows: int = 0,
    order: str = "<",
    photometric: int = 1,
    extra: tuple[int, ...] | None = None,
    tags_first: bool = False,
) -> None:
    """A TIFF of C bands from (H, W, C): in strips of ``rows`` lines or in square tiles."""
    height, width, bands = values.shape
    kind, bits = KINDS[values.dtype.kind], values.dtype.itemsize * 8
    ordered = values.astype(values.dtype.newbyteorder(order))
    parts = []
    for plane in [ordered[..., c : c + 1] for c in range(bands)] if separate else [ordered]:
        parts += [_packed(part, differences, deflate, order) for part in _cut(plane, tile, rows or height)]
    tags: dict[int, list[int]] = {
        256: [width], 257: [height], 258: [bits] * bands, 259: [8 if deflate else 1], 262: [photometric],
        277: [bands], 284: [2 if separate else 1], 339: [kind] * bands,
    }  # fmt: skip
    if differences:
        tags[317] = [2]
    own = {1: 1, 2: 3, 5: 4}[photometric]
    extra = (0,) * (bands - own) if extra is None else extra
    if extra:
        tags[338] = list(extra)
    sizes = [len(part) for part in parts]
    ahead = 4096 if tags_first else 0  # bytes in which the tags have their place
    places = (np.cumsum([0, *sizes])[:-1] + 8 + ahead).tolist()
    if tile:
        tags |= {322: [tile], 323: [tile], 324: places, 325: sizes}
    else:
        tags |= {273: places, 278: [rows or height], 279: sizes}
    path.write_bytes(_file(tags, b"".join(parts), order, ahead))


def _cut(plane: np.ndarray, tile: int, rows: int):
    height, width, bands = plane.shape
    if not tile:
        yield from (plane[y : y + rows] for y in range(0, height, rows))
        return
    for y in range(0, height, tile):
        for x in range(0, width, tile):
            part = np.zeros((tile, tile, bands), plane.dtype)
            inside = plane[y : y + tile, x : x + tile]
            part[: inside.shape[0], : inside.shape[1]] = inside
            yield part


def _packed(part: np.ndarray, differences: bool, deflate: bool, order: str) -> bytes:
    if differences:
        native = part.astype(part.dtype.newbyteorder("="))
        native[:, 1:] = native[:, 1:] - native[:, :-1]
        part = native.astype(part.dtype.newbyteorder(order))
    return zlib.compress(part.tobytes()) if deflate else part.tobytes()


def _file(tags: dict[int, list[int]], pixels: bytes, order: str, ahead: int) -> bytes:
    pixels += bytes(len(pixels) % 2 * (not ahead))
    start = 8 if ahead else 8 + len(pixels)
    place = start + 2 + 12 * len(tags) + 4
    entries, lists = b"", b""
    for name, values in sorted(tags.items()):
        short = name not in (273, 279, 324, 325)
        packed = struct.pack(f"{order}{len(values)}{'H' if short else 'I'}", *values)
        if len(packed) > 4:
            value, lists = struct.pack(f"{order}I", place + len(lists)), lists + packed + bytes(len(packed) % 2)
        else:
            value = packed.ljust(4, b"\0")
        entries += struct.pack(f"{order}HHI", name, 3 if short else 4, len(values)) + value
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    page = struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + lists
    return head + (page.ljust(ahead, b"\0") + pixels if ahead else pixels + page)
