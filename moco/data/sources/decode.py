"""Files to 8-bit grey or RGB images, for every mode that image files come in.

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
from torch import Tensor

from moco.errors import one_line

try:
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:  # deprecated since torchvision 0.29, to be removed
    ImageReadMode = decode_jpeg = None

Read = TypeVar("Read")


class BadImageError(Exception):
    """An image that cannot be read; the text is its name and the reason."""


def to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """``image`` of any mode as mode "L" (``channels`` 1) or "RGB" (3); the same object if it already is."""
    target = "L" if channels == 1 else "RGB"
    mode = image.mode
    if mode == target:
        return image
    if mode.startswith("I"):
        image = _from_integers(np.asarray(image))
    elif mode == "F":
        image = _from_floats(np.asarray(image))
    elif mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of RGBA: transparency may be stored beside the palette
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    elif mode != "1" and not mode.startswith("L"):
        image = image.convert("RGB")
    return image.convert(target)


def _from_integers(values: np.ndarray) -> Image.Image:
    """16-bit grey (mode I holds it too) to 8 bits: 65,535 = 255 x 257, rounded to the nearest."""
    scaled = (np.clip(values.astype(np.int64), 0, 65535) + 128) // 257
    return Image.fromarray(scaled.astype(np.uint8))


def _from_floats(values: np.ndarray) -> Image.Image:
    """Float grey to 8 bits: values in [0, 1] are shares of white, anything larger is already in 0..255."""
    values = np.nan_to_num(values)
    if values.max() <= 1.0:
        values = values * 255.0
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def reading(name: str, work: Callable[[], Read]) -> Read:
    """``work()``; BadImageError with ``name`` for whatever goes wrong: decoders of broken files raise any exception.

    Warnings of the decoder (odd EXIF, very large images) are not passed on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return work()
    except MemoryError:
        raise
    except Exception as error:
        reason = one_line(error) or type(error).__name__
        raise BadImageError(f"{name} ({reason})") from error


def decode_bytes(data: bytes, channels: int, shrink: int = 1) -> Image.Image:
    """The first frame of a file's bytes in mode "L" (``channels`` 1) or "RGB" (3), with the decoder's own exceptions:
    to be called by ``reading``.

    A file cut short is broken. ``shrink`` 2, 4 or 8, for JPEG: each side divided by it (and rounded up), by an inverse
    cosine transform of fewer points.
    """
    if decode_jpeg and channels == 3 and shrink == 1 and colour_jpeg_size(data):
        return Image.fromarray(decode_colour_jpeg(data).permute(1, 2, 0).numpy())
    image = Image.open(io.BytesIO(data))
    if shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    image.load()
    return to_eight_bits(image, channels)


def colour_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(width, height) of a JPEG of three 8-bit components, from its header; None for any other file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # as in ``reading``
            image = Image.open(io.BytesIO(data))  # reads the header alone, and refuses what ``decode_bytes`` would
    except Exception:  # a damaged header can raise anything; who decodes the file says so
        return None
    return image.size if isinstance(image, JpegImageFile) and image.mode == "RGB" else None


def decode_colour_jpeg(data: bytes) -> Tensor:
    """(3, H, W) uint8: PIL's pixels, by torchvision's decoder of the same library, in two thirds of the time.

    By PIL where torchvision has no decoder. To be called by ``reading``.
    """
    if decode_jpeg is None or ImageReadMode is None:
        return torch.from_numpy(np.array(decode_bytes(data, 3))).permute(2, 0, 1)
    pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    assert isinstance(pixels, Tensor)  # of one file; several give a list
    return pixels
