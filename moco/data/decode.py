"""Files to 8-bit grey or RGB images, for every mode that image files come in.

Follows torchvision's loader (``convert``, transparency dropped, EXIF orientation not applied) with two corrections:
16-bit grey is divided by 257 instead of clipped at 255, and palette images with transparency keep their colours.
"""

from __future__ import annotations

import warnings

import numpy as np
from PIL import Image


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


def decode(path: str, channels: int) -> Image.Image:
    """The first frame of the image file ``path`` in mode "L" (``channels`` 1) or "RGB" (3).

    Raises BadImageError for whatever goes wrong, because decoders of broken files raise nearly every exception.
    A file cut short is broken. Warnings of the decoder (odd EXIF, very large images) are not passed on.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with open(path, "rb") as file:
                image = Image.open(file)
                image.load()
            return to_eight_bits(image, channels)
    except MemoryError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadImageError(f"{path} ({reason})") from error
