"""The line about the images of a run: counts, what was passed over, colours, bits and sizes; and the notes."""

import io

import numpy as np
import pytest
from PIL import Image

from moco.data import ArraySource, describe, look, open_sources, short_side, size_warning
from moco.data.sources.subset import Subset


def write(folder, names: str, size=(8, 6), mode="RGB", **more) -> None:
    for name in names.split():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new(mode, size).save(path, **more)


def line(folder, **more) -> str:
    sources = open_sources(path=str(folder), **more)
    return describe(sources.pretrain, sources.val)[0]


def names(classes: str, count: int, where: str = "") -> str:
    return " ".join(f"{where}{name}/{n}.png" for name in classes for n in range(count))


def test_folders_with_all_that_a_line_says(tmp_path):
    write(tmp_path, f"{names('abc', 2, 'train/')} {names('a', 1, 'val/')}", (512, 512), "L")
    for name in ("train/a/x.avif", "train/b/y.avif", "val/a/n.txt"):
        (tmp_path / name).write_text("no image")
    assert line(tmp_path) == (
        "6 training images in 3 classes (folders), 1 held out (val/), 3 files passed over (2 .avif, 1 .txt), "
        "grey 8-bit 512x512"
    )


def test_lists_shards_flat_folders_and_named_sets(tmp_path):
    write(tmp_path, names("ab", 3))
    (tmp_path / "train.txt").write_text("a/0.png\ta\nb/0.png\tb\n")
    (tmp_path / "val.txt").write_text("a/1.png\ta\n")
    said = line(tmp_path / "train.txt", val_path=str(tmp_path / "val.txt"))
    assert said == "2 training images in 2 classes (list), 1 held out (val.txt), colour 8-bit 8x6"
    assert line(tmp_path / "a") == "3 training images without labels (folder), none held out, colour 8-bit 8x6"
    digits = ArraySource("mine", np.zeros((1500, 5, 7), np.uint8), classes=["a", "b"], labels=np.zeros(1500))
    assert describe(digits, digits) == ["1,500 training images in 2 classes, 1,500 held out (mine), grey 8-bit 7x5"]


@pytest.mark.parametrize(
    ("mode", "name", "kind"),
    [
        ("L", "x.png", "grey 8-bit"),
        ("1", "x.png", "grey 1-bit"),
        ("I;16", "x.png", "grey 16-bit"),
        ("F", "x.tif", "grey float"),
        ("I;16", "x.tif", "grey 16-bit"),
        ("P", "x.png", "palette"),
        ("P", "x.gif", "palette"),
        ("RGBA", "x.png", "colour 8-bit with alpha"),
        ("LA", "x.png", "grey 8-bit with alpha"),
        ("RGB", "x.jpg", "colour 8-bit"),
        ("CMYK", "x.jpg", "colour 8-bit"),
        ("I", "x.tif", "grey 32-bit"),
        ("RGB", "x.webp", "colour 8-bit"),
        ("L", "x.jfif", "grey 8-bit"),
    ],
)
def test_colours_and_bits_of_a_header(tmp_path, mode, name, kind):
    write(tmp_path, name, (16, 9), mode, **({"format": "JPEG"} if name.endswith("jfif") else {}))
    assert line(tmp_path).endswith(f", {kind} 16x9")


def test_sixteen_bits_in_colour(tmp_path):
    """PIL opens it as RGB."""
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + bytes(18)) * 2)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    assert Image.open(io.BytesIO(data)).mode == "RGB"
    (tmp_path / "x.png").write_bytes(data)
    assert line(tmp_path).endswith(", colour 16-bit 3x2")


def test_images_that_differ(tmp_path):
    write(tmp_path, "a/0.png a/1.png", (320, 240))
    write(tmp_path, "b/0.png", (1024, 768))
    assert line(tmp_path).endswith(", colour 8-bit 320..1024 x 240..768 (3 looked at)")
    write(tmp_path, "b/1.png", (100, 900), "L")
    assert line(tmp_path).endswith(", 3 colour 8-bit and 1 grey 8-bit of 4 looked at 100..1024 x 240..900")


def test_nothing_is_decoded_and_nine_headers_are_read(tmp_path, monkeypatch):
    write(tmp_path, names("ab", 10))
    sources = open_sources(path=str(tmp_path))
    asked = []
    monkeypatch.setattr(type(sources.pretrain), "load", lambda *_: pytest.fail("decoded"))
    read = type(sources.pretrain).read
    monkeypatch.setattr(type(sources.pretrain), "read", lambda self, i: asked.append(i) or read(self, i))
    seen = look(sources.pretrain)
    assert (len(asked), asked[0], asked[-1]) == (9, 0, 19)
    describe(sources.pretrain, None, seen)
    assert size_warning(sources.pretrain, 1, short_side(sources.pretrain, seen)).startswith(
        "warning: the images' short side is 6 px and --size 1"
    )
    assert len(asked) == 9


def test_bad_images_are_left_out_of_the_look(tmp_path):
    write(tmp_path, "0.png")
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(b"nothing")
    assert line(tmp_path).endswith("colour 8-bit 8x6")
    (tmp_path / "0.png").write_bytes(b"nothing")
    assert line(tmp_path) == "3 training images without labels (folder), none held out"


def test_parts_and_caches_of_a_set_say_what_the_whole_says(tmp_path):
    write(tmp_path, f"{names('ab', 4, 'd/train/')} {names('ab', 1, 'd/val/')}", (8, 6), "I;16")
    (tmp_path / "d" / "train" / "a" / "x.txt").write_text("")
    (tmp_path / "d" / "train" / "old.zip").write_text("")
    sources = open_sources(path=str(tmp_path / "d"), cache=str(tmp_path / "kept"))
    said = describe(sources.train, sources.val)
    assert said[0] == (
        "8 training images in 2 classes (folders), 2 held out (val/), 2 files passed over (1 .txt, 1 .zip), "
        "grey 16-bit 8x6"
    )
    assert said[1].startswith("note: old.zip in")
    one, other = (Subset(sources.train, np.array(rows), name) for rows, name in (([0, 1, 4], "part"), ([2, 5], "rest")))
    again = describe(one, other)
    assert again[0].startswith("3 training images in 2 classes (folders), 2 held out (rest), 2 files passed over")
    assert again[1:] == said[1:]
