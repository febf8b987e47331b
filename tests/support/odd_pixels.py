"""Image files of numbers that are not 0 to 255, and of layouts that PIL reads and does not write."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def saved(values: np.ndarray, kind: str) -> bytes:
    """As PIL writes them."""
    file = io.BytesIO()
    Image.fromarray(values).save(file, kind)
    return file.getvalue()


def tiff(values: np.ndarray, sample_format: int = 1, photometric: int = 1) -> bytes:
    """An uncompressed TIFF of (H, W) or (H, W, C) numbers in their byte order; sample_format: 1 without a sign, 2 with,
    3 floats. photometric: 0 white is zero, 1 black is zero, 2 RGB."""
    order = ">" if values.dtype.byteorder == ">" else "<"
    height, width, *rest = values.shape
    samples, bits, data = (rest or [1])[0], 8 * values.dtype.itemsize, values.tobytes()
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [1], 262: [photometric], 277: [samples],
            278: [height], 284: [1], 339: [sample_format] * samples}  # fmt: skip
    entries = {tag: ("H", numbers) for tag, numbers in tags.items()} | {273: ("I", [8]), 279: ("I", [len(data)])}
    start = 8 + len(data)
    place, page, more = start + 2 + 12 * len(entries) + 4, b"", b""
    for tag, (kind, numbers) in sorted(entries.items()):
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            packed, more = struct.pack(f"{order}I", place + len(more)), more + packed
        page += struct.pack(f"{order}HHI", tag, 3 if kind == "H" else 4, len(numbers)) + packed.ljust(4, b"\0")
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return head + data + struct.pack(f"{order}H", len(entries)) + page + bytes(4) + more


def twelve_bit_tiff(values: np.ndarray) -> bytes:
    """(H, W) numbers below 4,096, W even, two in three bytes."""
    first, second = values[:, ::2].astype(int), values[:, 1::2].astype(int)
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1).astype(np.uint8)
    file = bytearray(tiff(packed.reshape(len(values), -1)))
    for tag, was, number in ((256, packed.shape[1] * 3, values.shape[1]), (258, 8, 12)):
        entry = struct.pack("<HHIH", tag, 3, 1, was)
        at = file.index(entry)
        file[at + 8 : at + 10] = struct.pack("<H", number)
    return bytes(file)


def deep_png(values: np.ndarray) -> bytes:
    """A PNG of 16 bits a channel: (H, W, C) with C 2 grey and alpha, 3 RGB, 4 RGB and alpha."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    parts = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def netpbm(values: np.ndarray, largest: int) -> bytes:
    """PGM of (H, W) or PPM of (H, W, 3), 16 bits."""
    height, width = values.shape[:2]
    kind = "P5" if values.ndim == 2 else "P6"
    return f"{kind}\n{width} {height}\n{largest}\n".encode() + values.astype(">u2").tobytes()


def folder_of(path: Path, *files: bytes) -> str:
    """A folder of these images; their formats are told by content."""
    path.mkdir(parents=True)
    for number, data in enumerate(files):
        (path / f"{number:03d}.png").write_bytes(data)
    return str(path)
