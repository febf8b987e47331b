"""Small copies of images, as parts of a page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from moco.data.sources.base import Source
from moco.data.sources.decode import BadImageError, decode_bytes, opened, reading
from moco.data.stack import shown

LOSSLESS = 64  # pixels of the longest side up to which PNG is tried: drawings and digits are smaller in it


def small(source: Source, index: int, longest: int) -> Image.Image:
    """Image ``index`` with no side longer than ``longest`` pixels; a smaller one keeps its size.

    A large JPEG is decoded only as finely as that needs, so that a photograph takes neither its time nor its memory.

    Raises:
        BadImageError: it cannot be read.
    """
    image = _coarse(source, index, longest) or shown(source.load(index))
    image.thumbnail((longest, longest))
    return image


def _coarse(source: Source, index: int, longest: int) -> Image.Image | None:
    """None for an image that is to be decoded as it is."""
    data = source.read(index)
    if data is None:
        return None
    try:
        image = reading("", lambda: opened(data))
    except BadImageError:  # the source may know its format
        return None
    finer = [s for s in (8, 4, 2) if image.format == "JPEG" and max(image.size) >= 2 * longest * s]
    if not finer:
        return None
    levels = source.levels
    return shown(reading(source.name_of(index), lambda: decode_bytes(data, source.channels, finer[0], levels=levels)))


def thumbnail(image: Image.Image, longest: int = 64) -> str:
    """``image``, no side longer than ``longest`` pixels, as a data URI; a smaller image keeps its size.

    As JPEG, or as PNG where that is no larger.
    """
    copy = image.convert("L" if image.mode == "L" else "RGB")
    copy.thumbnail((longest, longest))
    written = _written(copy, "JPEG", quality=75, subsampling=2)
    if max(copy.size) <= LOSSLESS and len(exact := _written(copy, "PNG")) <= len(written):
        return "data:image/png;base64," + base64.b64encode(exact).decode()
    return "data:image/jpeg;base64," + base64.b64encode(written).decode()


def _written(image: Image.Image, kind: str, **settings: int) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()
