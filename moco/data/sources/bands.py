"""Files of several channels, as numbers: arrays (.npy), and TIFF of several bands or pages, of which PIL reads few.

An array is (H, W), (H, W, C) or (C, H, W). A TIFF's channels are its bands, or its grey pages where all are of one
size. What two readings are possible of is refused.

Legend: H x W pixels, C channels.
"""

from __future__ import annotations

import io
import logging
import struct
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2, TiffImageFile

from moco.data.registry import MOST_CHANNELS as MOST

ARRAY, ARRAY_EXTENSION = b"\x93NUMPY", ".npy"
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: of more than 4 GB
EXTENSIONS = (ARRAY_EXTENSION, ".tif", ".tiff")  # of files that may have other channels than colours
NUMBERS = "biuf"  # kinds of an array: whether, whole, whole without a sign, with a fraction

# Tags of TIFF, and what some of them say.
WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
OFFSETS, SAMPLES, ROWS, COUNTS = 273, 277, 278, 279
PLANAR, PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS = 284, 317, 322, 323, 324
TILE_COUNTS, EXTRA, FORMAT = 325, 338, 339
GREY, RGB, CMYK, ALPHA, SEPARATE, DIFFERENCES = 1, 2, 5, (1, 2, 999), 2, 2
PLAIN, PACKED = (1, 32773), (5, 8, 32946, 50000)  # none, PackBits; LZW, deflate by two names, Zstandard
# Types by bits and sample format of the bands.
KINDS = {
    (8, 1): "u1", (16, 1): "u2", (32, 1): "u4", (8, 2): "i1", (16, 2): "i2", (32, 2): "i4",
    (16, 3): "f2", (32, 3): "f4", (64, 3): "f8",
}  # fmt: skip
LONG = 4  # a type of tags' values: 32 bits

# PIL writes how many bands it cannot read to the terminal, for every image, beside raising an error.
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL)


class TwoReadingsError(ValueError):
    """An array whose channels can be its first axis or its last."""


class Layers(NamedTuple):
    """How many channels a TIFF has, 0 where it is a grey or colour image, and whether they are its pages."""

    channels: int = 0
    pages: bool = False


def without_arrays(names: list[str]) -> list[str]:
    """The files of a folder or shard that are images: .npy beside pictures hold features or masks of these."""
    arrays = [name.lower().endswith(ARRAY_EXTENSION) for name in names]
    if not any(arrays) or all(name.lower().endswith(EXTENSIONS) for name in names):
        return names
    return [name for name, is_array in zip(names, arrays, strict=True) if not is_array]


# ---------------------------------------------------------------------------------------------------- arrays


def array_shape(data: bytes) -> tuple[int, ...]:
    """The shape of an array's file, from its header; ValueError for what holds no image."""
    return _header(data)[0]


def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, type, and where the numbers begin."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"an array of version {version[0]}.{version[1]}")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(file)
    if dtype.kind not in NUMBERS:
        raise ValueError(f"an array of {dtype}, not of numbers")
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"an array of shape {shape}, not (H, W), (H, W, channels) or (channels, H, W)")
    return shape, by_columns, dtype, file.tell()


def read_array(data: bytes, channels: int, limit: int) -> np.ndarray:
    """(H, W, C) numbers of any type, C as :func:`array_channels` has it.

    Args:
        channels: what is asked for, by which (H, W, C) is told from (C, H, W).
        limit: of H W C.

    Raises:
        ValueError: not such an array, of two readings, too large, or cut short.
    """
    shape, by_columns, dtype, start = _header(data)
    count = int(np.prod([int(side) for side in shape], dtype=object))
    if count > limit:
        raise ValueError(f"{' x '.join(map(str, shape))} numbers are above the limit of {limit:,}")
    if len(data) - start < count * dtype.itemsize:
        raise ValueError(f"cut short: {len(data) - start:,} of {count * dtype.itemsize:,} bytes")
    flat = np.frombuffer(data, dtype, count, start)
    values = flat.reshape(shape, order="F" if by_columns else "C")
    if len(shape) == 2:
        return values[..., None]
    return values if array_channels(shape, channels)[1] else np.moveaxis(values, 0, 2)


def array_channels(shape: tuple[int, ...], asked: int | None = None) -> tuple[int, bool]:
    """(C, whether they are the last axis) of an array (A, B, C) or (A, B), by the number asked for; 1 and 3, which are
    converted into one another, are one question. Without it by which axis has 16 or fewer.

    Raises:
        TwoReadingsError: both axes can be the channels.
        ValueError: neither.
    """
    if len(shape) == 2:
        return 1, True
    wanted = {None: range(1, MOST + 1), 1: (1, 3), 3: (1, 3)}.get(asked, (asked,))
    first, last = shape[0] in wanted, shape[2] in wanted
    text = f"an array of shape {shape}"
    if first and last:
        known = "" if asked else f": say which by --channels {shape[0]} or {shape[2]}" * (shape[0] != shape[2])
        raise TwoReadingsError(f"{text}: its first axis and its last can both be the channels{known}")
    if not first and not last:
        if asked is None:
            raise ValueError(f"{text} has no axis of 1 to {MOST} channels, first or last")
        raise ValueError(f"{text} has not {asked} channels{_other(array_channels(shape)[0])}")
    return (shape[2], True) if last else (shape[0], False)


def _other(channels: int) -> str:
    return f", but {channels}: --channels {channels} reads them"


# ------------------------------------------------------------------------------------------------------ TIFF


def tiff_layers(image: Image.Image | None, data: bytes) -> Layers:
    """What a TIFF of ``data`` holds beside a grey or colour image; image: as PIL has opened it, None where it cannot.

    Colours with transparency are colours; a band that nothing is said of is a channel. Pages are channels where 2 to
    16 of them are grey, of one size and one kind.
    """
    tags = _tags(data) if image is None else _tags_of(image)
    samples, kind = _one(tags, SAMPLES, 1), _one(tags, PHOTOMETRIC, GREY)
    if samples == 1:
        pages = 0 if image is None else _grey_pages(image)
        return Layers(pages, True) if 1 < pages <= MOST else Layers()
    own = {0: 1, GREY: 1, RGB: 3}.get(kind, samples)
    clear = samples == own + 1 and (_one(tags, EXTRA, 0) in ALPHA or (kind == RGB and EXTRA not in tags))
    return Layers() if image is not None and (samples == own or clear) else Layers(samples)


def samples_of(image: Image.Image | None, data: bytes) -> int:
    """Bands of the first page."""
    return _one(_tags(data) if image is None else _tags_of(image), SAMPLES, 1)


def pages_of(image: Image.Image, most: int) -> int:
    """How many pages there are, ``most`` at most. PIL's own count would read them all."""
    found = 1
    try:
        while found < most:
            image.seek(found)
            found += 1
    except EOFError:
        pass
    image.seek(0)
    return found


def _grey_pages(image: Image.Image) -> int:
    """How many pages there are, where all are grey and alike, up to one more than channels can be; else 0."""
    found, first = 0, (image.size, image.mode)
    if image.mode != "L" and not image.mode.startswith(("I", "F")):
        return 0
    try:
        while found <= MOST:
            image.seek(found)
            if (image.size, image.mode) != first:
                found = 0
                break
            found += 1
    except EOFError:
        pass
    image.seek(0)
    return found


def read_pages(image: Image.Image, channels: int, limit: int) -> np.ndarray:
    """(H, W, C) numbers of the first C pages, which are alike; ValueError for more than ``limit``."""
    _check_count(image.width, image.height, channels, limit)
    pages = []
    for page in range(channels):
        image.seek(page)
        pages.append(np.array(image))
    return np.stack(pages, axis=2)


def read_bands(data: bytes, limit: int) -> np.ndarray:
    """(H, W, C) numbers of the bands of a TIFF's first page: 8 to 64 bits, in strips or tiles, beside one another or
    one after the other.

    The bytes of a line of C bands are those of a grey image so many bytes wide, and PIL reads that.

    Raises:
        ValueError: more than ``limit`` numbers, or of a kind that this does not read.
    """
    tags = _tags(data)
    width, height, samples = _one(tags, WIDTH, 0), _one(tags, HEIGHT, 0), _one(tags, SAMPLES, 1)
    _check_count(width, height, samples, limit)
    if TILE_OFFSETS in tags:
        _check_count(_one(tags, TILE_WIDTH, 0), _one(tags, TILE_HEIGHT, 0), samples, limit)
    dtype = np.dtype(_checked_kind(tags)).newbyteorder("<" if data[:2] == b"II" else ">")
    if _one(tags, PLANAR, 1) != SEPARATE:
        return _plane(data, tags, dtype, samples)
    return np.concatenate([_plane(data, tags, dtype, 1, c, samples) for c in range(samples)], axis=2)


def _check_count(width: int, height: int, channels: int, limit: int) -> None:
    if not 1 <= channels <= MOST:
        raise ValueError(f"{channels} bands: at most {MOST} are read")
    if min(width, height) < 1 or width * height * channels > limit:
        raise ValueError(f"{width} x {height} pixels of {channels} channels are above the limit of {limit:,} numbers")


def _checked_kind(tags: Any) -> str:
    """The type of the bands; ValueError unless they are whole bytes alike, compressed as bytes."""
    bits, formats, packed = set(_many(tags, BITS, 1)), set(_many(tags, FORMAT, 1)), _one(tags, COMPRESSION, 1)
    kind = KINDS.get((bits.pop(), formats.pop())) if len(bits) == len(formats) == 1 else None
    wrong = ""
    if kind is None:
        wrong = f"{_one(tags, BITS, 1)} bits of sample format {_one(tags, FORMAT, 1)}"
    elif packed not in PLAIN + PACKED:
        wrong = f"compression {packed}"
    elif packed in PACKED and _one(tags, PREDICTOR, 1) not in ((1,) if kind[0] == "f" else (1, DIFFERENCES)):
        wrong = f"predictor {_one(tags, PREDICTOR, 1)}"
    elif _one(tags, PHOTOMETRIC, GREY) not in (GREY, RGB, CMYK):
        wrong = f"photometric interpretation {_one(tags, PHOTOMETRIC, GREY)}"
    if wrong or kind is None:
        raise ValueError(f"a TIFF of {_one(tags, SAMPLES, 1)} bands with {wrong} is not read: save it as .npy")
    return kind


def _plane(data: bytes, tags: Any, dtype: np.dtype, bands: int, plane: int = 0, planes: int = 1) -> np.ndarray:
    """(H, W, C) of ``bands`` beside one another, the strips or tiles of one of ``planes``."""
    width, height = _one(tags, WIDTH, 0), _one(tags, HEIGHT, 0)
    made = _as_bytes(tags, bands * dtype.itemsize, plane, planes)
    if _end(made, height) > len(data):  # PIL would go on to read what is written behind the pixels
        raise ValueError(f"cut short: its pixels end at byte {_end(made, height):,} of {len(data):,}")
    with TiffImageFile(io.BytesIO(_with_tags(data, made))) as image:
        values = np.array(image).view(dtype).reshape(height, width, bands)
    if _one(tags, COMPRESSION, 1) in PLAIN or _one(tags, PREDICTOR, 1) != DIFFERENCES:
        return values
    values = values.astype(dtype.newbyteorder("="))
    wide = _one(tags, TILE_WIDTH, width)  # differences begin anew in each tile
    parts = [np.cumsum(values[:, x : x + wide], axis=1, dtype=values.dtype) for x in range(0, width, wide)]
    return np.concatenate(parts, axis=1)


def _end(made: dict[int, list[int]], height: int) -> int:
    """Where the last of the strips or tiles ends; of those that are not compressed by their sides."""
    tiled = TILE_OFFSETS in made
    offsets, sizes = (made[name] for name in ((TILE_OFFSETS, TILE_COUNTS) if tiled else (OFFSETS, COUNTS)))
    if made[COMPRESSION] == [1] and tiled:
        sizes = [made[TILE_WIDTH][0] * made[TILE_HEIGHT][0]] * len(offsets)
    elif made[COMPRESSION] == [1]:
        rows = made[ROWS][0]
        sizes = [max(0, min(rows, height - rows * strip)) * made[WIDTH][0] for strip in range(len(offsets))]
    return max(map(sum, zip(offsets, sizes, strict=True)), default=0)


def _as_bytes(tags: Any, times: int, plane: int, planes: int) -> dict[int, list[int]]:
    """The tags of a grey image of bytes, ``times`` as wide, of the strips or tiles of one of ``planes``."""
    height = _one(tags, HEIGHT, 0)
    made = {HEIGHT: [height], COMPRESSION: [_one(tags, COMPRESSION, 1)], WIDTH: [_one(tags, WIDTH, 0) * times]}
    made |= {PHOTOMETRIC: [GREY], SAMPLES: [1], PLANAR: [1], BITS: [8]}
    where = (OFFSETS, COUNTS)
    if TILE_OFFSETS in tags:
        where = (TILE_OFFSETS, TILE_COUNTS)
        made |= {TILE_WIDTH: [_one(tags, TILE_WIDTH, 0) * times], TILE_HEIGHT: [_one(tags, TILE_HEIGHT, 0)]}
    else:
        made[ROWS] = [min(_one(tags, ROWS, height), height)]
    wide, high = made.get(TILE_WIDTH, made[WIDTH])[0], made.get(TILE_HEIGHT, made.get(ROWS, [0]))[0]
    each = -(-made[WIDTH][0] // wide) * -(-height // high)
    for name in where:
        values = _many(tags, name, 0)
        if len(values) != each * planes:
            raise ValueError(f"{len(values)} strips or tiles, not {each * planes}")
        made[name] = list(values[plane * each : (plane + 1) * each])
    return made


def _with_tags(data: bytes, made: dict[int, list[int]]) -> bytes:
    """A TIFF of the same bytes whose only page has these tags, of 32 bits each."""
    order = "<" if data[:2] == b"II" else ">"
    start = len(data) + len(data) % 2
    place = start + 2 + 12 * len(made) + 4
    entries, lists = [], []
    for name, values in sorted(made.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        value = packed if len(values) == 1 else struct.pack(f"{order}I", place)
        if len(values) > 1:
            lists.append(packed)
            place += len(packed)
        entries.append(struct.pack(f"{order}HHI", name, LONG, len(values)) + value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    page = struct.pack(f"{order}H", len(made)) + b"".join(entries) + bytes(4)
    return b"".join([head, data[8:], bytes(len(data) % 2), page, *lists])


def _tags_of(image: Image.Image) -> Any:
    return image.tag_v2 if isinstance(image, TiffImageFile) else {}


def _tags(data: bytes) -> Any:
    """The tags of the first page."""
    file = io.BytesIO(data)
    tags = ImageFileDirectory_v2(file.read(16 if data[2:4] in (b"+\0", b"\0+") else 8))
    file.seek(tags.next)
    tags.load(file)
    return tags


def _many(tags: Any, name: int, default: int) -> tuple[int, ...]:
    """The numbers of a tag."""
    value = tags.get(name, default)
    return value if isinstance(value, tuple) else (value,)


def _one(tags: Any, name: int, default: int) -> int:
    """The number of a tag, the first where there are several."""
    return int((_many(tags, name, default) or (default,))[0])
