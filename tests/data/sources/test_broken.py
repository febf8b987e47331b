"""What is said of a file that is no image: what it is, and never what Python calls it."""

import io
import re

import numpy as np
import pytest
from PIL import Image

from moco.data import BadImageError, FileSource


def saved(kind: str, **options) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind, **options)
    return file.getvalue()


def damaged(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 255]) + data[place + 1 :]


CASES = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(100), "holds 100 zero bytes and nothing else"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "begins like an HTML page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer.*git lfs pull"),
    "annex": (b"../.git/annex/objects/xx/yy", "is a git-annex pointer.*git annex get"),
    "text": (b"404 Not Found\n", 'begins with the text "404 Not Found" and is no image'),
    "svg": (b'<?xml version="1.0"?>\n<svg>', "is an SVG drawing"),
    "avif": (b"\0\0\0\x1cftypavif\0\0\0\0", "is an AVIF image, which is not read: convert it"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "is a HEIC image, which is not read: convert it"),
    "video": (b"\0\0\0\x18ftypisom\0\0\0\0", "is a video"),
    "jp2": (b"\0\0\0\x0cjP  \r\n\x87\n", "is a JPEG 2000 image"),
    "pdf": (b"%PDF-1.7", "is a PDF"),
    "gzip": (b"\x1f\x8b\x08\0", "is compressed by gzip: unpack it"),
    "dicom": (bytes(127) + b"\x01DICM", "is a DICOM file"),
    "bytes": (bytes(range(1, 60)), "begins with the bytes 01 02 03 04 05 06 07 08, of no image format"),
    "head": (saved("JPEG")[:20], "begins like a JPEG file and has no picture in its 20 bytes"),
    "cut.jpg": (saved("JPEG", quality=95)[:1000], "ends in the middle: 1000 bytes .* JPEG image of 40 x 40 pixels"),
    "cut.png": (saved("PNG")[:600], "ends in the middle: 600 bytes .* PNG image of 40 x 40 pixels"),
    "cut.tiff": (saved("TIFF")[:600], "ends in the middle: 600 bytes .* TIFF image of 40 x 40 pixels"),
    "cut.bmp": (saved("BMP")[:300], "ends in the middle: 300 bytes .* BMP image of 40 x 40 pixels"),
    "bad.png": (damaged(saved("PNG"), 60), "is a damaged PNG image of 40 x 40 pixels: "),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_no_image_is_named_with_what_it_is(case, channels, tmp_path):
    content, told = CASES[case]
    path = tmp_path / f"{case}.jpg"
    path.write_bytes(content)
    with pytest.raises(BadImageError) as caught:
        FileSource("files", [str(path)], channels).load(0)
    assert re.fullmatch(rf"{re.escape(str(path))} \({told}.*\)", str(caught.value)), str(caught.value)
    assert not re.search(r"object at 0x|BytesIO|\.cpp", str(caught.value))


def test_whole_images_of_every_format_are_read(tmp_path):
    for kind in ("JPEG", "PNG", "TIFF", "BMP", "PPM", "WEBP", "GIF"):
        (tmp_path / kind).write_bytes(saved(kind))
        assert FileSource("files", [str(tmp_path / kind)]).load(0).size == (40, 40)
