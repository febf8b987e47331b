"""Image files of every mode, and broken ones."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moco.data import BadImageError, FileSource
from moco.data.sources.decode import colour_jpeg_size

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (9, 7), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (9, 7, 3), dtype=np.uint8)


def saved(tmp_path, image, name="image.png", **options):
    path = str(tmp_path / name)
    image.save(path, **options)
    return path


def decode(path, channels):
    return FileSource("files", [path], channels).load(0)


def stored_mode(path):
    with Image.open(path) as image:
        return image.mode


def test_grey_and_colour(tmp_path):
    grey = saved(tmp_path, Image.fromarray(GREY), "grey.png")
    colour = saved(tmp_path, Image.fromarray(COLOUR), "colour.png")
    assert decode(grey, 1).mode == "L"
    assert np.array_equal(np.array(decode(grey, 1)), GREY)
    assert np.array_equal(np.array(decode(grey, 3)), np.repeat(GREY[..., None], 3, axis=2))
    assert np.array_equal(np.array(decode(colour, 3)), COLOUR)
    assert np.array_equal(np.array(decode(colour, 1)), np.array(Image.fromarray(COLOUR).convert("L")))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, name):
    deep = GREY.astype(np.uint16) * 257
    deep[0, :4] = (128, 129, 65000, 65535)  # 257 levels to one, rounded to the nearest
    if name == "deep.pgm":  # by hand, as Pillow before 11 writes none
        path = str(tmp_path / name)
        Path(path).write_bytes(b"P5 %d %d 65535\n" % deep.shape[::-1] + deep.astype(">u2").tobytes())
    else:
        path = saved(tmp_path, Image.fromarray(deep), name)
    expected = GREY.copy()
    expected[0, :4] = (0, 1, 253, 255)
    assert np.array_equal(np.array(decode(path, 1)), expected)
    assert np.array_equal(np.array(decode(path, 3))[..., 1], expected)


def test_big_endian_and_32_bit_integers(tmp_path):
    big = Image.frombytes("I;16B", (7, 9), (GREY.astype(">u2") * 257).tobytes())
    assert np.array_equal(np.array(decode(saved(tmp_path, big, "big.tif"), 1)), GREY)
    wide = Image.fromarray(GREY.astype(np.int32) * 257)
    assert np.array_equal(np.array(decode(saved(tmp_path, wide, "wide.tif"), 1)), GREY)


def test_float_grey(tmp_path):
    share = saved(tmp_path, Image.fromarray(GREY.astype(np.float32) / 255), "share.tif")
    level = saved(tmp_path, Image.fromarray(GREY.astype(np.float32)), "level.tif")
    assert np.array_equal(np.array(decode(share, 1)), GREY)
    assert np.array_equal(np.array(decode(level, 1)), GREY)


@pytest.mark.parametrize("transparency", [None, 3, bytes(range(0, 240, 2))])
def test_palette_keeps_its_colours(tmp_path, transparency):
    palette = Image.fromarray(COLOUR).quantize(120)
    options = {} if transparency is None else {"transparency": transparency}
    path = saved(tmp_path, palette, **options)
    assert stored_mode(path) == "P"
    assert np.array_equal(np.array(decode(path, 3)), np.array(palette.convert("RGB")))
    assert decode(path, 1).mode == "L"


def test_transparency_is_dropped(tmp_path):
    alpha = RNG.integers(0, 256, (9, 7, 1), dtype=np.uint8)
    rgba = saved(tmp_path, Image.fromarray(np.concatenate([COLOUR, alpha], 2)), "rgba.png")
    la = saved(tmp_path, Image.fromarray(np.stack([GREY, alpha[..., 0]], 2)), "la.png")
    assert stored_mode(la) == "LA"
    assert np.array_equal(np.array(decode(rgba, 3)), COLOUR)
    assert np.array_equal(np.array(decode(la, 1)), GREY)
    assert np.array_equal(np.array(decode(la, 3))[..., 2], GREY)


@pytest.mark.parametrize("channels", [1, 3])
def test_cmyk_and_bilevel(tmp_path, channels):
    ink = Image.fromarray(COLOUR).convert("CMYK")
    path = saved(tmp_path, ink, "ink.tif")
    expected = np.array(Image.fromarray(COLOUR).convert("L" if channels == 1 else "RGB"))
    assert stored_mode(path) == "CMYK"
    assert np.array_equal(np.array(decode(path, channels)), expected)
    jpeg = saved(tmp_path, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "ink.jpg")
    assert np.array(decode(jpeg, 3)).mean((0, 1)) == pytest.approx([255, 0, 0], abs=4)
    bilevel = saved(tmp_path, Image.fromarray(GREY > 100), "bilevel.png")
    decoded = np.array(decode(bilevel, channels)).reshape(9, 7, -1)
    assert np.array_equal(decoded[..., 0], (GREY > 100) * np.uint8(255))


def test_orientation_is_not_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path, Image.fromarray(COLOUR), "turned.jpg", exif=exif)
    assert decode(path, 3).size == (7, 9)


def jpeg_bytes():
    buffer = io.BytesIO()
    noise = RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.jpg", b""),
        ("text.jpg", b"not an image at all"),
        ("truncated.jpg", jpeg_bytes()[: len(jpeg_bytes()) // 2]),
        ("header.png", b"\x89PNG\r\n\x1a\n" + bytes(20)),
        ("garbled.png", b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(200))),
    ],
)
def test_broken_files_are_bad_images(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    source = FileSource("files", [str(path)])
    with pytest.raises(BadImageError, match=name):
        source.load(0)


def test_missing_file_and_folder_are_bad_images(tmp_path):
    with pytest.raises(BadImageError, match=r"nowhere\.jpg \(.*No such file"):
        decode(str(tmp_path / "nowhere.jpg"), 3)
    with pytest.raises(BadImageError, match="directory"):
        decode(str(tmp_path), 3)


@pytest.mark.parametrize(("mode", "name"), [("L", "large.png"), ("L", "large.jpg"), ("RGB", "large.jpg")])
def test_very_large_images_warn_nobody(tmp_path, monkeypatch, mode, name):
    path = saved(tmp_path, Image.new(mode, (30, 30)), name)
    data, channels = Path(path).read_bytes(), len(mode)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 600)  # 900 pixels: PIL warns
    assert decode(path, channels).size == (30, 30)
    assert (colour_jpeg_size(data) is None) == (mode == "L")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # more than twice: PIL refuses
    assert colour_jpeg_size(data) is None
    with pytest.raises(BadImageError, match=name):
        decode(path, channels)
