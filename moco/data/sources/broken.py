"""What a file is that cannot be decoded as an image, by its first bytes, in words that say what to do."""

from __future__ import annotations

import contextlib
import re
import string
import struct
from collections.abc import Iterator

from PIL import Image

from moco.errors import one_line

SHOWN = 24  # bytes or letters of a file's beginning that a sentence quotes
# First bytes of image formats that are read: of such a file the end is missing or something in it is damaged.
_READ = {b"\xff\xd8\xff": "a JPEG", b"\x89PNG": "a PNG", b"GIF8": "a GIF", b"BM": "a BMP", b"II*\0": "a TIFF",
         b"MM\0*": "a TIFF", b"RIFF": "a WebP"}  # fmt: skip
# Those of files that are not; what is behind the colon is done by the reader.
_OTHERS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the file itself: run git lfs pull",
    b"%PDF": "is a PDF, which is not read: export its images", b"%!PS": "is PostScript, which is not read: convert it",
    b"8BPS": "is a Photoshop file, which is not read: convert it", b"\x89HDF": "is an HDF5 file, not one image",
    b"\x93NUMPY": "is a NumPy array, which is not read here", b"PK\3\4": "is a ZIP archive: unpack it",
    b"\x1f\x8b": "is compressed by gzip: unpack it", b"BZh": "is compressed by bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd: unpack it", b"\xfd7zXZ": "is compressed by xz: unpack it",
    b"7z\xbc\xaf": "is a 7z archive: unpack it", b"Rar!": "is a RAR archive: unpack it",
    b"\x76\x2f\x31\x01": "is an OpenEXR image, which is not read: convert it to TIFF",
    b"\xff\x0a": "is a JPEG XL image, which is not read: convert it",
    b"\0\0\0\x0cJXL ": "is a JPEG XL image, which is not read: convert it",
    b"\0\0\0\x0cjP  ": "is a JPEG 2000 image, which is not read: convert it",
    b"\xff\x4f\xff\x51": "is a JPEG 2000 image, which is not read: convert it",
    b"SIMPLE  =": "is a FITS image, which is not read: convert it to TIFF",
    b"\0\0\1\0": "is an icon, which is not read: convert it",
    b"DDS ": "is a DDS texture, which is not read: convert it",
    b"qoif": "is a QOI image, which is not read: convert it", b"FUJIFILMCCD-RAW": "is a camera's raw file: convert it",
    b"\x1aE\xdf\xa3": "is a video: extract its frames", b"\0\0\1\xba": "is a video: extract its frames",
}  # fmt: skip
_BRANDS = {b"avif": "an AVIF", b"avis": "an AVIF", b"heic": "a HEIC", b"heix": "a HEIC", b"hevc": "a HEIC",
           b"heim": "a HEIC", b"mif1": "a HEIF", b"msf1": "a HEIF", b"crx ": "a camera's raw"}  # fmt: skip
_PLACE = re.compile(r"^\w+, \S+:\d+, ")  # in torchvision's sources
_CUT = re.compile(
    r"truncated|incomplete|premature|unexpected end|not enough|buffer is not large|EOF|end of file|decoder object", re.I
)


def beginning(data: bytes) -> str:
    """What a file is that no decoder takes, as the end of a sentence about it: "is empty", "begins like ..."."""
    if not data:
        return "is empty"
    if not any(data):
        return f"holds {len(data)} zero bytes and nothing else, as after a full disk or a broken copy"
    known = (what for start, what in _OTHERS.items() if data.startswith(start))
    return _inside(data) or next(known, "") or _unknown(data)


def _inside(data: bytes) -> str:
    """Of files that are not known by their first bytes alone; empty for others."""
    text = data[:1000].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = _BRANDS.get(data[8:12])
    found = {
        "begins like an HTML page, as a server sends in the place of an image: download it again": text.startswith(
            (b"<!doctype html", b"<html", b"<head", b"<body")
        ),
        "is an SVG drawing, which is not read: convert it": b"<svg" in text,
        "is a git-annex pointer, not the file itself: run git annex get": b"/annex/objects/" in data[:300],
        f"is {kind} image, which is not read: convert it" if kind else "is a video: extract its frames": (
            data[4:8] == b"ftyp"
        ),
        "is a DICOM file, which is not read: convert it to TIFF or PNG": data[128:132] == b"DICM",
        "is a tar archive: give it as a shard, or unpack it": data[257:262] == b"ustar",
    }
    return next((what for what, holds in found.items() if holds), "")


def _unknown(data: bytes) -> str:
    for start, kind in _READ.items():
        if data.startswith(start):
            return f"begins like {kind} file and has no picture in its {len(data)} bytes: it is damaged or cut short"
    shown = data[:SHOWN]
    if all(byte in string.printable.encode() for byte in shown):
        quoted = " ".join(shown.decode().split())
        return f'begins with the text "{quoted}" and is no image'
    return f"begins with the bytes {shown[:8].hex(' ')}, of no image format that is read"


@contextlib.contextmanager
def explained(data: bytes, image: Image.Image | None = None) -> Iterator[None]:
    """Decoders' errors on a file's bytes as a ValueError with :func:`beginning`, or for an opened ``image`` with what
    is left of it. Errors of the system and of memory stay as they are."""
    try:
        yield
    except (OSError, RuntimeError, SyntaxError, EOFError, struct.error) as error:
        if getattr(error, "errno", None):
            raise
        raise ValueError(beginning(data) if image is None else _of_opened(data, image, error)) from error


def _of_opened(data: bytes, image: Image.Image, error: Exception) -> str:
    what = f"{image.format} image of {image.width} x {image.height} pixels"
    if _CUT.search(str(error)):
        return f"ends in the middle: {len(data)} bytes are not the whole of a {what}"
    return f"is a damaged {what}: {_PLACE.sub('', one_line(error))}"
