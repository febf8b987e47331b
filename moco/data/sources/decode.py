"""Files to 8-bit grey or RGB images, for every mode that image files come in, up to a size that memory holds.

Follows torchvision's loader (``convert``, transparency dropped, EXIF orientation not applied) with two corrections:
16-bit grey is divided by 257 instead of clipped at 255, and palette images with transparency keep their colours.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from torch import Tensor

from moco.errors import OutageError, UserError, one_line

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29, to be removed
    ImageReadMode = decode_jpeg = None

Read = TypeVar("Read")

# What is decoded, by content and whatever a file is called: the formats of the extensions that folders are searched
# for, and GIF, which collections from the web call .jpg. PIL knows forty more, and hands EPS to another program.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Pixels of an image at most, PIL's own limit, here for every decoder: 13,377 x 13,377, more than cameras but for some
# telephones' 200 megapixels. In RGB it takes 0.7 GB, its largest crop 0.5 more; other modes 2.3 in all, WebP 2.9.
PIXELS = 178_956_970
BY_TENSOR = 1 << 25  # pixels up to which torchvision's decoder is used: it holds three copies for a moment
PER_BYTE = 512  # pixels that a byte of a JPEG can be: Huffman codes take a bit or more for a block of 64


class BadImageError(UserError):
    """An image that cannot be read; the text is its name and the reason. Where no other can replace it, an end."""


def to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """``image`` of any mode as mode "L" (``channels`` 1) or "RGB" (3); the same object if it already is."""
    target = "L" if channels == 1 else "RGB"
    mode = image.mode
    if mode == target:
        return image
    if mode.startswith("I"):
        image = _by_rows(np.asarray(image), _from_integers)
    elif mode == "F":
        values = np.asarray(image)
        # Float grey: values in [0, 1] are shares of white, anything larger is already in 0..255.
        scale = 255.0 if max(np.nan_to_num(row).max() for row in values) <= 1.0 else 1.0
        image = _by_rows(values, lambda part: np.clip(np.rint(np.nan_to_num(part) * scale), 0, 255))
    elif mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of RGBA: transparency may be stored beside the palette
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode != "1" and not mode.startswith("L"):
        image = image.convert("RGB")
    return image.convert(target)


def _by_rows(values: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """Mode "L" of (H, W) numbers, changed some rows at a time: of a whole image the parts would be 24 bytes a pixel."""
    levels = np.empty(values.shape, dtype=np.uint8)
    for start in range(0, len(values), 64):
        levels[start : start + 64] = change(values[start : start + 64])
    return Image.fromarray(levels)


def _from_integers(values: np.ndarray) -> np.ndarray:
    """16-bit grey (mode I holds it too) to 8 bits: 65,535 = 255 x 257, rounded to the nearest."""
    return (np.clip(values.astype(np.int64), 0, 65535) + 128) // 257


def reading(name: str, work: Callable[[], Read]) -> Read:
    """``work()`` on the image ``name``; BadImageError for whatever goes wrong: decoders raise any exception.

    Memory that is not there counts too: below the limits of this file it is damaged files that ask for so much, and
    where memory is short in truth the next images are refused as well, until they are too many. Warnings of the decoder
    (odd EXIF, very large images) are not passed on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except (UserError, OutageError):
        raise
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise BadImageError(f"{name} ({reason})") from error


def every_format() -> tuple[str, ...]:
    """Whatever PIL opens by itself: EPS goes to another program."""
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def opened(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A file's header: its size and mode are known, no pixel is decoded. To be called by ``reading``.

    Raises ValueError for more than ``PIXELS``, and what PIL raises for what is none of ``formats``.
    """
    image = Image.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height > PIXELS:
        raise ValueError(f"{width} x {height} pixels are above the limit of {PIXELS:,}")
    if isinstance(image, JpegImageFile) and width * height > PER_BYTE * len(data):
        raise ValueError(f"{width} x {height} pixels are not in a file of {len(data)} bytes")
    if isinstance(image, TiffImageFile):  # it may be cut into tiles, which are decoded one by one
        wide, high = image.tag_v2.get(TILEWIDTH, 1), image.tag_v2.get(TILELENGTH, 1)
        if wide * high > PIXELS:
            raise ValueError(f"tiles of {wide} x {high} pixels are above the limit of {PIXELS:,}")
    return image


def decode_bytes(data: bytes, channels: int, shrink: int = 1, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """The first frame of a file's bytes in mode "L" (``channels`` 1) or "RGB" (3), with the decoder's own exceptions:
    to be called by ``reading``.

    A file cut short is broken. ``shrink`` 2, 4 or 8, for JPEG: each side divided by it (and rounded up), by an inverse
    cosine transform of fewer points.
    """
    image = opened(data, formats)
    by_tensor = decode_jpeg and channels == 3 and shrink == 1 and image.width * image.height <= BY_TENSOR
    if by_tensor and _is_colour_jpeg(image):
        return Image.fromarray(decode_colour_jpeg(data).permute(1, 2, 0).numpy())
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image.load()
    return to_eight_bits(image, channels)


def colour_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three 8-bit components, from its header; None for any other file."""
    try:
        image = reading("", lambda: opened(data))
    except BadImageError:  # who decodes the file says why
        return None
    return image.size if _is_colour_jpeg(image) else None


def _is_colour_jpeg(image: Image.Image) -> bool:
    return isinstance(image, JpegImageFile) and image.mode == "RGB"


def decode_colour_jpeg(data: bytes) -> Tensor:
    """(3, H, W) uint8: PIL's pixels, by torchvision's decoder of the same library, in two thirds of the time.

    By PIL where torchvision has no decoder. To be called by ``reading``.
    """
    if decode_jpeg is None or ImageReadMode is None:
        return torch.from_numpy(np.array(decode_bytes(data, 3))).permute(2, 0, 1)
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    assert isinstance(pixels, Tensor)  # of one file; several give a list
    return pixels
