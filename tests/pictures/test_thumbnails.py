"""Small copies: whole, of the wanted size, and of a photograph without its memory."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from moco.data import ArraySource, BadImageError, FileSource
from moco.data.sources import base, decode
from moco.pictures.thumbnails import small, thumbnail


def read(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_drawing_is_kept_exactly_and_a_photograph_as_jpeg():
    drawing = Image.fromarray(np.eye(28, dtype=np.uint8) * 255)
    assert thumbnail(drawing).startswith("data:image/png;") and np.array_equal(read(thumbnail(drawing)), drawing)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 600, 3), dtype=np.uint8))
    assert thumbnail(noise).startswith("data:image/jpeg;") and read(thumbnail(noise)).size == (64, 32)
    assert noise.size == (600, 300)  # the image itself stays
    assert read(thumbnail(Image.new("RGBA", (90, 30)), 32)).mode == "RGB"


@pytest.mark.parametrize(
    ("kind", "mode", "channels"), [("JPEG", "RGB", 3), ("JPEG", "L", 1), ("JPEG", "CMYK", 3), ("PNG", "RGB", 3)]
)
def test_a_photograph_is_decoded_coarsely_where_that_is_possible(kind, mode, channels, tmp_path, monkeypatch):
    ramp = Image.linear_gradient("L").resize((4000, 1000)).convert(mode)
    ramp.save(tmp_path / "photo.jpg", kind)
    decoded, load = [], decode.to_eight_bits
    monkeypatch.setattr(decode, "to_eight_bits", lambda image, *more: decoded.append(image.size) or load(image, *more))
    source = FileSource("one", [str(tmp_path / "photo.jpg")], channels)
    found = small(source, 0, 200)
    assert found.size == (200, 50) and found.mode == ("L" if channels == 1 else "RGB")
    assert decoded == ([(500, 125)] if kind == "JPEG" else [(4000, 1000)])
    expected = source.load(0).resize((200, 50), Image.Resampling.BOX)
    assert abs(np.asarray(found, float) - np.asarray(expected, float)).max() < 12


def test_a_small_image_keeps_its_size_and_a_broken_one_says_so(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(1, 8, 8)
    assert np.array_equal(small(ArraySource("a", pixels), 0, 64), pixels[0])
    (tmp_path / "x.jpg").write_bytes(b"no image")
    with pytest.raises(BadImageError, match="x.jpg"):
        small(FileSource("files", [str(tmp_path / "x.jpg")]), 0, 64)
    Image.new("L", (30, 10)).save(tmp_path / "x.tga")
    assert small(base.PictureSource("own", [str(tmp_path / "x.tga")], 1), 0, 64).size == (30, 10)
