"""Numbers that are not 0 to 255: the range of a set, what is said of it, and --levels."""

from __future__ import annotations

import numpy as np
import pytest
from support.odd_pixels import deep_png, folder_of, netpbm, saved, tiff, twelve_bit_tiff

from moco.data import Source, TwoViews, get_preset, open_sources, pixel_range
from moco.data.levels import best_levels
from moco.data.sources.base import ArraySource
from moco.data.sources.values import Levels, levels_of, to_levels
from moco.pictures.thumbnails import small

SHARES = np.linspace(0, 1, 24 * 32).reshape(24, 32)  # of white
COLOURS = np.stack([SHARES, SHARES[::-1], 1 - SHARES], -1)


def numbers(low: float, high: float, kind: str, of: np.ndarray = SHARES) -> np.ndarray:
    values = low + of * (high - low)
    return (values if np.dtype(kind).kind == "f" else np.rint(values)).astype(kind)


def opened(path, data: bytes, levels=None, channels: int = 1, images: int = 3) -> Source:
    return open_sources(None, folder_of(path, *[data] * images), channels=channels, levels=levels).pretrain


def expected(values: np.ndarray, low: float, high: float) -> np.ndarray:
    clipped = np.clip(values.astype(np.float64), low, high)
    return np.rint((clipped - low) / (high - low) * 255).astype(np.uint8)


# Of each: the values of the file, the file, the levels that fit.
GREY = {
    "8 bits in 16": (v := numbers(0, 255, "u2"), saved(v, "PNG"), (0, 255)),
    "10 in 16": (v := numbers(0, 1023, "u2"), saved(v, "PNG"), (0, 1023)),
    "12 in 16": (v := numbers(0, 4095, "u2"), saved(v, "PNG"), (0, 4095)),
    "14 in 16": (v := numbers(0, 16383, "u2"), saved(v, "TIFF"), (0, 16383)),
    "12 in 16, big-endian": (v := numbers(0, 4095, ">u2"), tiff(v), (0, 4095)),
    "offset": (v := numbers(30000, 33000, "u2"), saved(v, "PNG"), (30000, 33000)),
    "8 in 32": (v := numbers(0, 255, "i4"), saved(v, "TIFF"), (0, 255)),
    "32 without a sign": (v := numbers(0, 2**32 - 1, "u4"), tiff(v), (0, 2**32 - 1)),
    "CT": (v := numbers(-1024, 3071, "<i2"), tiff(v, 2), (-1024, 3071)),
    "16 with a sign": (v := numbers(-32768, 32767, ">i2"), tiff(v, 2), (-32768, 32767)),
    "float to 65535": (v := numbers(0, 65535, "f4"), saved(v, "TIFF"), (0, 65535)),
    "float from -1": (v := numbers(-1, 1, "f4"), saved(v, "TIFF"), (-1, 1)),
    "float to 0.1": (v := numbers(0, 0.1, "f4"), saved(v, "TIFF"), (0, 0.1)),
    "float around 0": (v := numbers(-3, 4, "f4"), saved(v, "TIFF"), (-3, 4)),
    "8 bits to 15": (v := numbers(0, 15, "u1"), saved(v, "PNG"), (0, 15)),
    "a mask": (v := numbers(0, 1, "u1"), saved(v, "PNG"), (0, 1)),
    "nearly white": (v := numbers(235, 255, "u1"), saved(v, "BMP"), (235, 255)),
    "grey with alpha": ((v := numbers(0, 4095, "u2", COLOURS[..., :2]))[..., 0], deep_png(v), (0, 4095)),
}
COLOUR = {
    "8 bits to 15": (v := numbers(0, 15, "u1", COLOURS), saved(v, "PNG"), (0, 15)),
    "PNG": (v := numbers(0, 4095, "u2", COLOURS), deep_png(v), (0, 4095)),
    "PNG of 8 in 16": (v := numbers(0, 255, "u2", COLOURS), deep_png(v), (0, 255)),
    "with alpha": ((v := numbers(0, 4095, "u2", np.dstack([COLOURS, SHARES])))[..., :3], deep_png(v), (0, 4095)),
    "TIFF": (v := numbers(0, 4095, "<u2", COLOURS), tiff(v, photometric=2), (0, 4095)),
    "big-endian TIFF": (v := numbers(0, 4095, ">u2", COLOURS), tiff(v, photometric=2), (0, 4095)),
    "PPM": (v := numbers(0, 4095, "u2", COLOURS), netpbm(v, 65535), (0, 4095)),
}


@pytest.mark.parametrize("name", GREY)
def test_grey_levels_are_those_of_the_formula_and_are_what_is_advised(tmp_path, name):
    values, data, levels = GREY[name]
    plain = opened(tmp_path / "plain", data)
    (note,) = plain.found.notes
    assert ", so they come out " in note
    asked = " ".join(f"{x:g}" if abs(x) < 1e6 else str(int(x)) for x in levels)
    assert note.endswith(f": give --levels {asked}")
    given = opened(tmp_path / "given", data, levels)
    assert given.found.notes == []
    found = np.asarray(given.load(1)).astype(int)
    # float32 images are scaled in float32, where a value next to a half may round to the other side
    assert np.abs(found - expected(values, *levels)).max() <= (1 if values.dtype.kind == "f" else 0)
    assert (found.min(), found.max()) == (0, 255)


@pytest.mark.parametrize("name", COLOUR)
def test_colours_keep_all_bits_with_levels(tmp_path, name):
    values, data, levels = COLOUR[name]
    (note,) = opened(tmp_path / "plain", data, channels=3).found.notes
    assert "nearly black" in note
    assert note.endswith(f": give --levels {levels[0]} {levels[1]}")
    given = opened(tmp_path / "given", data, levels, channels=3)
    assert np.array_equal(np.asarray(given.load(0)), expected(values, *levels))
    assert given.found.notes == []


RIGHT = {
    "8 bits": (v := numbers(0, 255, "u1"), saved(v, "PNG")),
    "16 bits": ((v := numbers(0, 65535, "u2")).astype(int) // 257 + (v % 257 > 128), saved(v, "PNG")),
    "32 bits of 16": ((v := numbers(0, 65535, "i4")) // 257 + (v % 257 > 128), saved(v, "TIFF")),
    "12 bits by the header": (expected(v := numbers(0, 4095, "u2"), 0, 4095), twelve_bit_tiff(v)),
    "PGM of 1,023": (expected(v := numbers(0, 1023, "u2"), 0, 1023), netpbm(v, 1023)),
    "white is zero": (255 - expected(v := numbers(0, 65535, "<u2"), 0, 65535), tiff(v, photometric=0)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_full_ranges_are_right_and_nothing_is_said(tmp_path, name):
    right, data = RIGHT[name]
    source = opened(tmp_path / "images", data)
    assert np.abs(np.asarray(source.load(0)).astype(int) - right).max() <= ("PGM" in name)  # PIL rounds to 16 bits
    assert (source.levels, source.found.notes) == (None, [])


@pytest.mark.parametrize(("values", "white"), [(numbers(0, 1, "f4"), 1.0), (numbers(0, 255, "f4"), 255.0)])
def test_float_images_are_scaled_as_before_and_it_is_said(tmp_path, values, white):
    source = opened(tmp_path / "images", saved(values, "TIFF"))
    assert np.array_equal(np.asarray(source.load(0)), np.rint(values * np.float32(255 / white)).astype(np.uint8))
    (note,) = source.found.notes
    assert note.endswith(f"are taken as 0 to {white:g}; --levels LOW HIGH sets another range")
    assert source.levels == Levels(0.0, white, floats_only=True)


def test_float_images_of_one_set_are_scaled_alike(tmp_path):
    """One that goes beyond 1 makes the others not black, nor a dark one of 0..255 bright."""
    bright = [saved(numbers(0, high, "f4"), "TIFF") for high in (1, 1, 1.2, 0.9, 1)]
    source = open_sources(None, folder_of(tmp_path / "a", *bright), channels=1).pretrain
    assert [np.asarray(source.load(i)).max() for i in range(5)] == [255, 255, 255, 230, 255]
    assert np.asarray(source.load(2))[0, 5] == np.rint(1.2 * SHARES[0, 5] * 255)
    assert "clipped, " in source.found.notes[0]
    assert source.found.notes[0].endswith("give --levels 0 1.2")
    dark = [saved(numbers(0, high, "f4"), "TIFF") for high in (255, 0.8, 200, 250)]
    source = open_sources(None, folder_of(tmp_path / "b", *dark), channels=1).pretrain
    assert [np.asarray(source.load(i)).max() for i in range(4)] == [255, 1, 200, 250]


def test_what_is_no_number_is_black(tmp_path):
    values = numbers(-1, 1, "f4")
    values[0, :3] = np.nan, np.inf, -np.inf
    source = opened(tmp_path / "images", saved(values, "TIFF"), (-1, 1))
    assert np.asarray(source.load(0))[0, :3].tolist() == [0, 255, 0]
    kind = pixel_range(source).kinds[0]
    assert (kind.depth, kind.high) == ("float", 1.0)
    assert kind.low > -1.0


def test_held_out_images_are_read_as_the_training_images(tmp_path):
    folder_of(tmp_path / "train" / "a", *[saved(numbers(0, 255, "f4"), "TIFF")] * 3)
    folder_of(tmp_path / "val" / "a", *[saved(numbers(0, 0.9, "f4"), "TIFF")] * 3)
    sources = open_sources(None, str(tmp_path))
    assert sources.val is not None
    assert sources.val.levels == sources.pretrain.levels == Levels(0.0, 255.0, True)
    assert np.asarray(sources.val.load(0)).max() == 1
    assert any("nearly black" in note for note in sources.val.found.notes)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("kind", "white"), [("f4", 5.0), ("u2", 4095)])
def test_what_both_splits_are_is_said_once(tmp_path, kind, white, apart):
    for name in "ab":
        folder_of(tmp_path / "train" / name, saved(numbers(0, white, kind), "TIFF"))
    val = tmp_path / ("other" if apart else "val")
    for name in "ab":
        folder_of(val / name, saved(numbers(0, 0.97 * white, kind), "TIFF"))
    where, more = (tmp_path / "train", str(val)) if apart else (tmp_path, None)
    sources = open_sources(None, str(where), val_path=more)
    assert sources.val is not None
    assert len(sources.pretrain.found.notes) == 1 and "nearly black" in sources.pretrain.found.notes[0]
    assert sources.val.found.notes == []


def test_held_out_images_of_another_range_are_said_beside(tmp_path):
    for name in "ab":
        folder_of(tmp_path / "train" / name, saved(numbers(0, 4095, "u2"), "TIFF"))
    for name in "ab":
        folder_of(tmp_path / "val" / name, saved(numbers(0, 255, "u1"), "PNG"))
    sources = open_sources(None, str(tmp_path), levels=(0, 4095))
    assert sources.val is not None and sources.pretrain.found.notes == []
    assert sources.val.found.notes[0].endswith("nearly black: give --levels 0 255")


def test_drawings_and_dark_pictures_of_eight_bits_say_nothing(tmp_path):
    digit = np.zeros((28, 28), dtype=np.uint8)
    digit[10:14, 8:20] = 255  # 94 % of the pixels are black
    assert opened(tmp_path / "digit", saved(digit, "PNG")).found.notes == []
    night = np.full((64, 64), 3, dtype=np.uint8)
    night[5, 5] = 200
    assert opened(tmp_path / "night", saved(night, "PNG")).found.notes == []


def test_hot_pixels_do_not_hide_twelve_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (100, 100)).astype(np.uint16)
    values[50, 50] = 65535
    (note,) = opened(tmp_path / "images", saved(values, "PNG")).found.notes
    assert "nearly black" in note
    assert note.endswith("give --levels 0 4095")


def test_ranges_that_differ_are_not_given_one_level(tmp_path):
    low, full = saved(numbers(0, 4095, "u2"), "PNG"), saved(numbers(0, 65535, "u2"), "PNG")
    source = open_sources(None, folder_of(tmp_path / "a", low, low, low, full), channels=1).pretrain
    assert source.found.notes[0].endswith("no one --levels fits them: store them alike")
    mixed = open_sources(None, folder_of(tmp_path / "b", low, saved(numbers(0, 255, "u1"), "PNG")), channels=1)
    assert "--levels 0 4095 fits them, but holds for the other images too" in mixed.pretrain.found.notes[0]


def test_levels_that_clip_on_purpose_say_nothing_and_wrong_ones_do(tmp_path):
    values = numbers(-1024, 3071, "<i2")
    assert opened(tmp_path / "window", tiff(values, 2), (-160, 240)).found.notes == []
    (note,) = opened(tmp_path / "wrong", tiff(values, 2), (0, 65535)).found.notes
    assert "are taken as 0 to 65,535 (--levels), so they come out nearly black" in note
    (note,) = opened(tmp_path / "white", saved(numbers(0, 4095, "u2"), "PNG"), (0, 15)).found.notes
    assert "nearly white" in note


def test_an_image_of_one_value_gets_no_advice(tmp_path):
    source = opened(tmp_path / "images", saved(np.full((8, 8), 7, np.uint16), "PNG"))
    assert best_levels(pixel_range(source).kinds[0]) is None
    assert source.found.notes[0].endswith("no other value than 7 of 65,535, so they come out nearly black")


def test_unreadable_images_are_left_out_of_the_look(tmp_path):
    path = folder_of(tmp_path / "a", b"no image", saved(numbers(0, 4095, "u2"), "PNG"))
    ranges = pixel_range(open_sources(None, path).pretrain)
    assert ranges.sizes == [(32, 24)]
    assert [(kind.depth, kind.images, kind.low, kind.high) for kind in ranges.kinds] == [("16-bit", 1, 0, 4095)]


def test_the_cache_goes_by_the_levels(tmp_path):
    path, kept = folder_of(tmp_path / "a", saved(numbers(0, 4095, "u2"), "PNG")), str(tmp_path / "kept")
    made = {levels: open_sources(None, path, channels=1, cache=kept, levels=levels).pretrain
            for levels in (None, (0, 4095), (0, 1023))}  # fmt: skip
    for levels, source in made.items():
        plain = open_sources(None, path, channels=1, levels=levels).pretrain
        assert np.array_equal(np.asarray(source.load(0)), np.asarray(plain.load(0)))
        assert source.levels == levels_of(levels)


def test_fast_decoding_and_thumbnails_heed_levels(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 64, (256, 256, 3)).astype(np.uint8)
    source = opened(tmp_path / "a", saved(pixels, "JPEG"), (0, 63), channels=3)
    exact, fast = (TwoViews(source, get_preset("v1"), 96, 0, crop_only=True, fast=way)[0, 0] for way in (False, True))
    assert (exact["q"] == fast["q"]).all()
    plain = opened(tmp_path / "b", saved(pixels, "JPEG"), channels=3)
    assert np.asarray(small(source, 0, 32)).mean() > 3 * np.asarray(small(plain, 0, 32)).mean()


def test_images_in_memory_are_levelled_too():
    images = np.arange(16, dtype=np.uint8).repeat(16).reshape(1, 16, 16)
    source = ArraySource("memory", images)
    source.levels = Levels(0, 15)
    assert np.array_equal(np.asarray(source.load(0)), images[0] * 17)
    assert pixel_range(source).kinds[0].high == 15


@pytest.mark.parametrize("kind", ["?", "u1", "i1", "u2", "i2", "u4", "i8", "f2", "f4", "f8"])
def test_arrays_of_every_type(kind):
    values = np.array([[0, 1], [1, 0]]).astype(kind)
    assert to_levels(values).max() == {"?": 255, "u1": 1, "f": 255}.get(kind if kind in "?u1" else kind[0], 0)
    assert to_levels(values, Levels(0, 1)).tolist() == [[0, 255], [255, 0]]
