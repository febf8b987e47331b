"""Files to 8-bit images, grey, RGB or of other channels, for every mode that files come in, up to what memory holds.

Follows torchvision's loader (``convert``, transparency dropped, EXIF orientation not applied) with two corrections:
16-bit grey is divided by 257 instead of clipped at 255, and palette images with transparency keep their colours. What
other numbers than 0..255 come to is in :mod:`moco.data.sources.values`.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile
from torch import Tensor

from moco.data.sources import bands
from moco.data.sources.broken import explained
from moco.data.sources.values import (
    Levels,
    Stored,
    deep_colour,
    eight_bits,
    for_all,
    is_deep_colour,
    range_of,
    stored_array,
    stored_grey,
    to_levels,
)
from moco.data.stack import Picture, Stack, from_levels
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


def to_eight_bits(image: Image.Image, channels: int, levels: Levels | None = None) -> Image.Image:
    """``image`` of any mode as mode "L" (``channels`` 1) or "RGB" (3); the same object if it already is.

    ``levels``: the values that become black and white, in place of the mode's own.
    """
    target = "L" if channels == 1 else "RGB"
    if image.mode == target and not for_all(levels):
        return image
    if (found := stored_grey(image)) is not None:
        image = Image.fromarray(eight_bits(found.values, *range_of(found, levels)))
    else:
        image = _of_eight_bits(image)
        image = Image.fromarray(to_levels(np.asarray(image), levels)) if for_all(levels) else image
    return image if image.mode == target else image.convert(target)


def _of_eight_bits(image: Image.Image) -> Image.Image:
    """Mode "L" or "RGB" of an image of any mode of 8 bits."""
    mode = image.mode
    if mode in ("L", "RGB"):
        return image
    if mode in ("P", "PA"):
        image = image.convert("RGBA")  # by way of RGBA: transparency may be stored beside the palette
    elif mode in ("La", "RGBa"):
        image = image.convert(mode.upper())
    grey = image.mode == "1" or image.mode.startswith("L")
    return image.convert("L" if grey and image.mode != "LAB" else "RGB")


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

    Raises ValueError for more than ``PIXELS``, and for what is none of ``formats``, with what it is instead.
    """
    with explained(data):
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


def decode_bytes(
    data: bytes, channels: int, shrink: int = 1, formats: tuple[str, ...] = FORMATS, levels: Levels | None = None
) -> Picture:  # fmt: skip
    """A file's bytes as an image in mode "L" (``channels`` 1) or "RGB" (3), else as a stack of so many, with the
    decoder's own exceptions: to be called by ``reading``.

    The first frame, but for a TIFF whose pages are the channels. A file cut short is broken. ``shrink`` 2, 4 or 8, for
    JPEG: each side divided by it (and rounded up), by an inverse cosine transform of fewer points. ``levels``: as of
    :func:`to_eight_bits`; of colours of 16 bits too, which without them are their upper eight.
    """
    if data.startswith(bands.ARRAY):
        return as_asked(to_levels(bands.read_array(data, channels, PIXELS), levels), channels)
    image = _not_layered(data, channels, formats)
    if not isinstance(image, Image.Image):
        return as_asked(to_levels(image, levels), channels)
    by_tensor = decode_jpeg and channels == 3 and shrink == 1 and image.width * image.height <= BY_TENSOR
    if by_tensor and _is_colour_jpeg(image):
        image = Image.fromarray(decode_colour_jpeg(data).permute(1, 2, 0).numpy())
    elif channels in (1, 3) and for_all(levels) and is_deep_colour(image):
        return as_asked(to_levels(deep_colour(image, opened(data, formats), data).values, levels), channels)
    elif shrink > 1:
        image.draft(None, (image.width // shrink, image.height // shrink))
    with explained(data, image):
        image.load()
    return in_channels(image, channels, levels)


def stored(data: bytes, channels: int, formats: tuple[str, ...] = FORMATS) -> Stored:
    """The numbers in a file's first frame, or in the channels that are asked for where it has as many, before they
    come to 0..255; to be called by :func:`reading`."""
    if data.startswith(bands.ARRAY):
        return stored_array(bands.read_array(data, channels, PIXELS))
    image = _not_layered(data, channels, formats)
    if not isinstance(image, Image.Image):
        return stored_array(image)
    if channels in (1, 3) and is_deep_colour(image):
        return deep_colour(image, opened(data, formats), data)
    image.load()
    if channels not in (1, 3):
        return stored_array(np.asarray(in_channels(image, channels)))
    return stored_grey(image) or stored_array(np.asarray(_of_eight_bits(image)))


def as_asked(levels: np.ndarray, channels: int) -> Picture:
    """The image of (H, W) or (H, W, C) uint8; grey and colour ones are converted into one another.

    Raises:
        ValueError: of another number of channels.
    """
    image = from_levels(levels)
    if isinstance(image, Image.Image) and channels in (1, 3):
        return to_eight_bits(image, channels)
    found = 1 if levels.ndim == 2 else levels.shape[2]
    if found != channels:
        raise ValueError(f"it has {found} channels, not {channels}: --channels {found} reads them")
    return image


def in_channels(image: Image.Image, channels: int, levels: Levels | None = None) -> Picture:
    """An image of any mode, grey or colour where 1 or 3 channels are asked for; else its own channels, as of RGBA and
    CMYK. ValueError for another number. ``levels``: as of :func:`to_eight_bits`."""
    if channels in (1, 3):
        return to_eight_bits(image, channels, levels)
    image = image.convert(image.mode.upper()) if image.mode in ("La", "RGBa") else image
    if len(image.getbands()) != channels or image.mode == "PA":
        raise ValueError(f"it has {len(image.getbands())} channels of mode {image.mode}, not {channels}")
    stack = Stack(image.split())
    return Stack.of(to_levels(stack.levels(), levels)) if for_all(levels) else stack


def _not_layered(data: bytes, channels: int, formats: tuple[str, ...]) -> Image.Image | np.ndarray:
    """As :func:`opened`; (H, W, C) numbers of a TIFF that has ``channels`` bands or grey pages.

    Where 1 or 3 channels are asked for that are not their number, the first page is an image as PIL has it.
    """
    if not data.startswith(bands.TIFF):
        return opened(data, formats)
    image = open_tiff(data, formats)
    found, pages = bands.tiff_layers(image, data)
    if found == channels and pages and image is not None:
        return bands.read_pages(image, found, PIXELS)
    if found == channels or (channels not in (1, 3) and bands.samples_of(image, data) == channels):  # RGBA among them
        return bands.read_bands(data, PIXELS)
    if found and (image is None or channels not in (1, 3)):
        raise ValueError(f"it has {found} channels, not {channels}: --channels {found} reads them")
    return image or opened(data, formats)


def open_tiff(data: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image | None:
    """As :func:`opened`; None for bands that PIL has no mode for."""
    try:
        return opened(data, formats)
    except ValueError as error:
        if isinstance(error.__cause__, UnidentifiedImageError):
            return None
        raise


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
        return torch.from_numpy(np.array(to_eight_bits(opened(data), 3))).permute(2, 0, 1)
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
    except RuntimeError:
        with explained(data, opened(data)):
            raise
    assert isinstance(pixels, Tensor)  # of one file; several give a list
    return pixels
