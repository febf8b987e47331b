"""Small copies of images, as parts of a page."""

from __future__ import annotations

import base64
import io

from PIL import Image


def thumbnail(image: Image.Image, longest: int = 64) -> str:
    """A JPEG of ``image``, no side longer than ``longest`` pixels, as a data URI; a smaller image keeps its size."""
    small = image.convert("RGB")
    small.thumbnail((longest, longest))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
