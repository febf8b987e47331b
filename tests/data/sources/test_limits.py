"""Images that would fill the memory, wait for ever or are no files: bad images, by name, wherever they are read."""

import io
import os
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from moco.data import BadImageError, FileSource, Labelled, TwoViews, datasets, get_preset, open_sources, probe_preset
from moco.data.sources import base, decode
from moco.data.sources.decode import colour_jpeg_size
from moco.errors import UserError

SIDE = 24


def jpeg_bytes(side=SIDE, **how):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(
        file, "JPEG", **how
    )
    return file.getvalue()


def jpeg_of(width, height, **how):
    """A small JPEG whose header says another size."""
    data = bytearray(jpeg_bytes(**how))
    start = data.index(b"\xff\xc2" if how.get("progressive") else b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def png_of(width, height):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


def tiff_of_tiles(wide, high):
    """8 x 8 pixels in one tile of ``wide`` x ``high``."""
    entries = [(256, 8), (257, 8), (258, 8), (259, 8), (262, 1), (277, 1), (322, wide), (323, high), (324, 8), (325, 9)]
    table = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)


def views(source):
    """Every way in which an image becomes views."""
    source.labels, source.classes = np.zeros(len(source), dtype=np.int64), ["any"]
    return [
        TwoViews(source, get_preset("v2"), 8, 1),
        TwoViews(source, get_preset("v2"), 8, 1, fast=True),
        TwoViews(source, get_preset("v2"), 8, 1, crop_only=True, fast=True),
        Labelled(source, 8),
        Labelled(source, 8, preset=probe_preset(True)),
    ]


def folder_with(tmp_path, *contents):
    """One good image and files of ``contents``, as a source."""
    paths = []
    for number, content in enumerate((jpeg_bytes(), *contents)):
        paths.append(str(tmp_path / f"{number}.jpg"))
        if content is not None:
            (tmp_path / f"{number}.jpg").write_bytes(content)
    return FileSource("some", paths)


def refused(source, index, reason):
    """Image ``index`` is replaced by the first in every kind of view, and ``reason`` says why."""
    with pytest.raises(BadImageError, match=reason) as caught:
        source.load(index)
    assert source.name_of(index) in str(caught.value)
    for dataset in views(source):
        item = dataset[(0, index)]
        assert (item["bad"], item["index"]) == (index, 0)


BOMBS = {
    "a small file": (jpeg_of(65500, 65500), "4290250000 pixels"),
    "a small file, progressive": (jpeg_of(12000, 12000, progressive=True), "12000 x 12000 pixels are not in a file of"),
    "a small file of fewer pixels": (jpeg_of(4000, 3000), "4000 x 3000 pixels are not in a file of"),
    "png": (png_of(40000, 40000), "1600000000 pixels"),
    "a tile": (tiff_of_tiles(1 << 20, 1 << 20), "tiles of 1048576 x 1048576 pixels are above the limit"),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_header_that_promises_too_much_is_not_believed(tmp_path, kind):
    content, reason = BOMBS[kind]
    refused(folder_with(tmp_path, content), 1, reason)


def test_one_limit_of_pixels_for_every_decoder(tmp_path, monkeypatch):
    """Also where somebody has switched PIL's own off."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    monkeypatch.setattr(decode, "PIXELS", SIDE**2)
    grey = io.BytesIO()
    Image.new("L", (SIDE, SIDE + 1)).save(grey, "PNG")
    source = folder_with(tmp_path, jpeg_bytes(SIDE + 1), grey.getvalue())
    assert colour_jpeg_size(jpeg_bytes(SIDE)) == (SIDE, SIDE)
    refused(source, 1, f"{SIDE + 1} x {SIDE + 1} pixels are above the limit of {SIDE**2}")
    refused(source, 2, f"{SIDE} x {SIDE + 1} pixels are above the limit")
    for fast in (False, True):
        assert TwoViews(source, get_preset("v2"), 8, 1, fast=fast)[(0, 0)]["bad"] == -1


def test_large_images_have_the_same_pixels(tmp_path, monkeypatch):
    """Above some size PIL decodes alone, which takes a third of the memory."""
    source = folder_with(tmp_path)
    before = source.load(0).tobytes()
    monkeypatch.setattr(decode, "BY_TENSOR", SIDE**2 - 1)
    monkeypatch.setattr(decode, "decode_colour_jpeg", None)
    assert source.load(0).tobytes() == before


def test_a_file_of_many_bytes_is_not_read(tmp_path, monkeypatch):
    source = folder_with(tmp_path, jpeg_bytes())
    with open(source.name_of(1), "ab") as file:
        file.truncate(60 << 30)  # of which the disk holds the first
    refused(source, 1, "64,424,509,440 bytes are above the limit")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link to a device", "socket", "dangling", "loop", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, monkeypatch, kind):
    source = folder_with(tmp_path, None)
    path = source.name_of(1)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        os.symlink(tmp_path / "pipe", path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            monkeypatch.chdir(tmp_path)  # its path must be short
            end.bind("1.jpg")
    elif kind == "folder":
        os.mkdir(path)
    else:
        os.symlink({"link to a device": "/dev/zero", "dangling": "nowhere", "loop": "1.jpg"}[kind], path)
    reason = {"dangling": "No such file", "loop": "symbolic links", "folder": "directory"}.get(
        kind, "a pipe, socket or"
    )
    refused(source, 1, reason)
    if kind != "folder":  # a folder is searched for it without being held up
        found = open_sources(path=str(tmp_path)).pretrain
        assert [found.name_of(i) for i in range(len(found))] == [source.name_of(0), path]


@pytest.mark.parametrize("error", [MemoryError, RuntimeError, Image.DecompressionBombError])
def test_an_error_behind_the_decoder_is_a_bad_image_too(tmp_path, monkeypatch, error):
    """In crop or resize of the second image, which is known by its contrast."""
    file = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), "red").save(file, "JPEG")
    source = folder_with(tmp_path, file.getvalue())

    def failing(work):
        def call(image, *args, **more):
            if np.asarray(image).std() > 100:  # noise has 74
                raise error
            return work(image, *args, **more)

        return call

    monkeypatch.setattr("moco.data.datasets.crop_tensor", failing(datasets.crop_tensor))
    monkeypatch.setattr("moco.data.datasets.eval_view", failing(datasets.eval_view))
    monkeypatch.setattr("moco.data.datasets.apply", failing(datasets.apply))
    for dataset in views(source):
        assert [dataset[(0, index)]["bad"] for index in (0, 1)] == [-1, 1]
    with pytest.raises(UserError, match=f"none of 1 images .*1.jpg .{error.__name__}"):
        Labelled(FileSource("one", [source.name_of(1)], labels=[0]), 8)[(0, 0)]


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1), (2, 60000)])
def test_narrow_images(tmp_path, size):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 8, 7)).save(file, "PNG")
    source = folder_with(tmp_path, file.getvalue())
    for dataset in views(source):
        assert dataset[(0, 1)]["bad"] == -1
    whole = Labelled(source, 64)[(0, 1)]  # would be 2.2 million pixels long
    assert (whole["bad"] == 1) == (max(size) == 60000)


def test_formats_are_those_of_the_extensions(tmp_path):
    """By content, whatever a file is called; EPS would be given to another program."""
    image, file = Image.new("RGB", (SIDE, SIDE)), io.BytesIO()
    for name in ("PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG"):
        file = io.BytesIO()
        image.save(file, name)
        assert folder_with(tmp_path, file.getvalue()).load(1).size == (SIDE, SIDE)
    for name, what in (("EPS", "is PostScript"), ("ICO", "is an icon"), ("PCX", "the bytes 0a 05 .*no image format")):
        file = io.BytesIO()
        image.save(file, name)
        refused(folder_with(tmp_path, file.getvalue()), 1, what)


def test_limits_are_what_the_documents_say():
    assert decode.PIXELS == 2 * (1024**3 // 4 // 3)  # PIL's
    assert base.FILE_BYTES == 1 << 30
