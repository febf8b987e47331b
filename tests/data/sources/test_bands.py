"""Files of several channels: each value is the file's own by the rule of grey images, or one sentence says why not."""

import io

import numpy as np
import pytest
from PIL import Image
from support.many_channels import write_bands, write_pages

from moco.data import BadImageError, FileSource
from moco.data.sources.decode import decode_bytes, reading
from moco.data.stack import Stack

TYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8")


def values(dtype="u1", channels=5, size=(37, 29), seed=0):
    rng = np.random.default_rng(seed)
    if dtype[0] == "f":
        return rng.random((*size, channels)).astype(dtype)
    return rng.integers(0, min(65536, np.iinfo(dtype).max), (*size, channels)).astype(dtype)


def expected(array):
    """The rule of grey images, in other words than the decoder's."""
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind == "f":
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    return np.floor(np.clip(array.astype(np.float64), 0, 65535) / 257 + 0.5).astype(np.uint8)


def levels(data, channels):
    found = reading("it", lambda: decode_bytes(data, channels))
    assert isinstance(found, Stack)
    return found.levels()


def equal(found, array):
    """Floats of half precision may lie on a tie."""
    assert np.abs(found.astype(int) - expected(array).astype(int)).max() <= (array.dtype.kind == "f")


@pytest.mark.parametrize("channels", [2, 4, 5, 16])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("order", ["<", ">"])
def test_bands_of_a_tiff_in_every_arrangement(tmp_path, dtype, channels, order):
    array = values(dtype, channels)
    ways = [
        {}, {"rows": 7}, {"tile": 16}, {"deflate": True, "rows": 7}, {"deflate": True, "tile": 16},
        {"separate": True, "rows": 7}, {"separate": True, "deflate": True, "tile": 16},
    ]  # fmt: skip
    if dtype[0] != "f":
        ways += [{"deflate": True, "differences": True, **more} for more in ({"rows": 7}, {"tile": 16})]
        ways += [{"deflate": True, "differences": True, "separate": True}]
    for way in ways:
        write_bands(tmp_path / "a.tif", array, order=order, **way)
        equal(levels((tmp_path / "a.tif").read_bytes(), channels), array)


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_pages_of_a_tiff(tmp_path, compression):
    for dtype in ("u1", "u2", "f4"):
        for channels in (2, 5, 16):
            array = values(dtype, channels)
            write_pages(tmp_path / "a.tif", array)
            equal(levels((tmp_path / "a.tif").read_bytes(), channels), array)
    first, *rest = (Image.fromarray(np.ascontiguousarray(values()[..., c])) for c in range(5))
    file = io.BytesIO()
    first.save(file, "TIFF", save_all=True, append_images=rest, compression=compression)
    assert np.array_equal(levels(file.getvalue(), 5), values())


@pytest.mark.parametrize("dtype", [*TYPES, ">u2", ">f4", "?"])
def test_arrays_by_either_axis_and_order_of_memory(dtype):
    array = values("u1", 5) > 100 if dtype == "?" else values(dtype.strip(">"), 5).astype(dtype)
    wanted = array * np.uint8(255) if dtype == "?" else array.astype(array.dtype.newbyteorder("="))
    for stored in (array, np.moveaxis(array, 2, 0), np.asfortranarray(array)):
        equal(levels(npy(stored), 5), wanted)


def npy(array, **how):
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def test_arrays_of_grey_and_colour_are_images_as_ever():
    grey, colour = values("u1", 1)[..., 0], values("u1", 3)
    for stored in (grey, grey[None], grey[..., None]):
        assert np.array_equal(decode_bytes(npy(stored), 1), grey)
        assert np.array_equal(decode_bytes(npy(stored), 3), np.stack([grey] * 3, axis=2))
    for stored in (colour, np.moveaxis(colour, 2, 0)):
        assert np.array_equal(decode_bytes(npy(stored), 3), colour)
        assert np.array_equal(decode_bytes(npy(stored), 1), Image.fromarray(colour).convert("L"))


def test_transparency_and_inks_are_channels_where_four_are_asked_for(tmp_path):
    array = values("u1", 4)
    Image.fromarray(array, "RGBA").save(tmp_path / "a.png")
    assert np.array_equal(levels((tmp_path / "a.png").read_bytes(), 4), array)
    for kind in ({"photometric": 2, "extra": (2,)}, {"photometric": 2}, {"photometric": 5}, {}):
        write_bands(tmp_path / "a.tif", array, **kind)
        assert np.array_equal(levels((tmp_path / "a.tif").read_bytes(), 4), array)


def test_colours_with_transparency_stay_colours(tmp_path):
    array = values("u1", 4)
    write_bands(tmp_path / "a.tif", array, photometric=2, extra=(2,))
    assert np.array_equal(decode_bytes((tmp_path / "a.tif").read_bytes(), 3), array[..., :3])


def with_header(shape, dtype="|u1"):
    """An array's file of ten bytes whose header says more."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": dtype, "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(10)


@pytest.mark.parametrize(
    ("data", "channels", "reason"),
    [
        (npy(values("u1", 5)), 3, "has not 3 channels, but 5: --channels 5 reads them"),
        (npy(values("u1", 5)), 4, "has not 4 channels, but 5"),
        (npy(np.zeros((5, 40, 5), "u1")), 5, "first axis and its last can both be the channels"),
        (npy(np.zeros((40, 40), "u1")), 5, "it has 1 channels, not 5"),
        (npy(np.zeros((40, 40, 40), "u1")), 5, "has no axis of 1 to 16 channels"),
        (npy(np.zeros(40)), 1, "an array of shape"),
        (npy(np.zeros((4, 0, 5))), 5, "an array of shape"),
        (npy(np.zeros((2, 3, 4, 5))), 5, "an array of shape"),
        (npy(np.zeros((40, 40, 5), "c8")), 5, "not of numbers"),
        (npy(np.array([[[{}] * 5] * 3] * 3, dtype=object), allow_pickle=True), 5, "not of numbers"),
        (npy(np.zeros((40, 40), "U3")), 1, "not of numbers"),
        (npy(values())[:-1], 5, "cut short"),
        (with_header((40_000, 40_000, 5)), 5, "above the limit"),
        (with_header((4_000, 4_000, 5)), 5, "cut short"),
        (with_header((1 << 62, 1 << 62, 5)), 5, "above the limit"),
        (b"\x93NUMPY\x01\0\xff\xff{", 5, "."),
    ],
)
def test_arrays_that_are_no_images(tmp_path, data, channels, reason):
    (tmp_path / "a.npy").write_bytes(data)
    with pytest.raises(BadImageError, match=reason) as caught:
        FileSource("some", [str(tmp_path / "a.npy")], channels).load(0)
    assert str(tmp_path / "a.npy") in str(caught.value)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6])
def test_bands_are_never_dropped(tmp_path, channels):
    for way in ({}, {"separate": True}, {"deflate": True}):
        write_bands(tmp_path / "a.tif", values("u2", 5), **way)
        with pytest.raises(BadImageError, match="it has 5 channels, not .: --channels 5 reads them"):
            FileSource("some", [str(tmp_path / "a.tif")], channels).load(0)


def test_tiffs_that_would_fill_the_memory_or_are_cut_short(tmp_path):
    write_bands(tmp_path / "a.tif", values(), tile=16)
    data = (tmp_path / "a.tif").read_bytes()
    for tag, number in ((256, 1 << 15), (322, 1 << 15)):  # SHORT: a width, a tile's
        entry = np.array([tag, 3], "<u2").tobytes() + b"\1\0\0\0"
        assert data.count(entry) == 1
        start = data.index(entry) + 8
        large = data[:start] + np.array([number], "<u2").tobytes() + data[start + 2 :]
        if tag == 256:
            start = large.index(np.array([257, 3], "<u2").tobytes() + b"\1\0\0\0") + 8
        else:
            start = large.index(np.array([323, 3], "<u2").tobytes() + b"\1\0\0\0") + 8
        large = large[:start] + np.array([number], "<u2").tobytes() + large[start + 2 :]
        with pytest.raises(BadImageError, match="above the limit"):
            reading("it", lambda large=large: decode_bytes(large, 5))
    for way in ({}, {"rows": 7}, {"tile": 16}, {"separate": True}, {"deflate": True}, {"deflate": True, "tile": 16}):
        write_bands(tmp_path / "a.tif", values(), tags_first=True, **way)
        data = (tmp_path / "a.tif").read_bytes()
        assert np.array_equal(levels(data, 5), values())
        for end in (9, 100, len(data) // 2, len(data) - 9, len(data) - 1):
            with pytest.raises(BadImageError):
                reading("it", lambda cut=data[:end]: decode_bytes(cut, 5))


def test_what_is_not_read_says_how_to_convert_it(tmp_path):
    for way in ({"photometric": 2, "extra": (0, 0)},):
        write_bands(tmp_path / "a.tif", values("f4"), **way, deflate=True)
        data = (tmp_path / "a.tif").read_bytes()
        entry = np.array([259, 3], "<u2").tobytes() + b"\1\0\0\0"
        start = data.index(entry) + 8
        jpeg = data[:start] + b"\7\0" + data[start + 2 :]
        with pytest.raises(BadImageError, match=r"compression 7 is not read: save it as \.npy"):
            reading("it", lambda jpeg=jpeg: decode_bytes(jpeg, 5))
