"""Views finished in batches: PIL's pixels for fixed parameters and for whole presets; the same batches by both ways."""

import itertools

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from conftest import TINY
from PIL import Image, ImageFilter
from support.cuda_division import DividesAsCuda

from moco import files
from moco.data import PRESETS, ArraySource, EpochSampler, TwoViews, apply, draw, two_views
from moco.data.augment import by_torch
from moco.data.augment.by_pil import JITTER, crop_shrunk, crop_tensor, shrink_for, to_tensor
from moco.data.sources.decode import colour_jpeg_size, decode_bytes, decode_colour_jpeg, reading
from moco.data.sources.files import open_folder
from moco.seeding import numpy_generator


def noise(n=3, size=(31, 24), seed=0):
    """RGB images of every colour, grey and saturated ones among them."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (n, *size, 3), dtype=np.uint8)
    images[0, : size[0] // 2] = images[0, : size[0] // 2, :, :1]
    images[-1, :4, :, rng.integers(0, 3)] = 0
    return [Image.fromarray(image) for image in images]


def stacked(images):
    return torch.stack([to_tensor(image) for image in images])


def table(rows):
    return torch.stack([by_torch.pack_params(*row) for row in rows])


@pytest.mark.parametrize("name", JITTER)
def test_each_jitter_equals_torchvisions(name):
    factors = np.linspace(-0.5, 0.5, 21) if name == "hue" else np.linspace(0, 1.9, 20)
    images = noise(len(factors), seed=len(name))
    rows = table([([(name, factor)], False, None, False) for factor in factors.tolist()])
    expected = [getattr(F, f"adjust_{name}")(image, f) for image, f in zip(images, factors.tolist(), strict=True)]
    assert torch.equal(by_torch.finish(stacked(images), rows, ("jitter",)), stacked(expected))


def test_hue_of_every_colour_equals_pils():
    """A turn of nothing is still PIL's way to 8-bit HSV and back; every fifth level of each channel, and the last."""
    levels = np.unique([*range(0, 256, 5), 1, 254, 255]).astype(np.uint8)
    colours = np.array(list(itertools.product(levels, repeat=3)), dtype=np.uint8)[None]  # (1, n, 3)
    image = Image.fromarray(colours)
    found = by_torch.hue(to_tensor(image)[None].float(), torch.zeros(1, 1, 1, 1))
    assert torch.equal(by_torch.to_bytes(found)[0], to_tensor(image.convert("HSV").convert("RGB")))


def test_blur_grey_and_flip_equal_pils():
    sigmas = [0.1, 0.4, 0.73, 1.4, 1.42, 1.9, 2.0, 5.5]  # boxes of 1, 3 and more pixels; wider than the image at last
    images = noise(len(sigmas), size=(13, 9))
    rows = table([(None, False, sigma, False) for sigma in sigmas])
    expected = [image.filter(ImageFilter.GaussianBlur(sigma)) for image, sigma in zip(images, sigmas, strict=True)]
    assert torch.equal(by_torch.finish(stacked(images), rows, ("blur",)), stacked(expected))  # on a CPU: PIL itself
    found = by_torch.blur(stacked(images).float(), sigmas)
    assert torch.equal(by_torch.to_bytes(found), stacked(expected))
    rows = table([(None, number % 2 == 0, None, number < 4) for number in range(len(images))])
    expected = [image.convert("L").convert("RGB") if number % 2 == 0 else image for number, image in enumerate(images)]
    expected = [F.hflip(image) if number < 4 else image for number, image in enumerate(expected)]
    assert torch.equal(by_torch.finish(stacked(images), rows, ("grey", "flip")), stacked(expected))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_batch_of_views_equals_views_made_one_by_one(name, channels):
    rng = np.random.default_rng(1)
    shape = (40, 29, 33, 3)[: 3 + (channels == 3)]
    source = ArraySource("noise", rng.integers(0, 256, shape, dtype=np.uint8))
    whole, cropped = (TwoViews(source, PRESETS[name], 24, 5, crop_only=crop_only) for crop_only in (False, True))
    order = PRESETS[name].order[PRESETS[name].order.index("crop") + 1 :]
    pairs = [(whole[(2, index)], cropped[(2, index)]) for index in range(len(source))]
    for view in ("q", "k"):
        rows = torch.stack([item[f"{view}_params"] for _, item in pairs])
        found = by_torch.finish(torch.stack([item[view] for _, item in pairs]), rows, order)
        assert torch.equal(found, torch.stack([item[view] for item, _ in pairs]))


def test_large_views_keep_the_mean_of_contrast_exact():
    """The sum over 300 x 300 pixels passes 2^24, where float32 counts in twos: one less than a half rounds down."""
    grey = np.full(300 * 300, 200, dtype=np.uint8)
    grey[: len(grey) // 2 - 1] = 201
    image = Image.fromarray(grey.reshape(300, 300)).convert("RGB")
    params = draw(PRESETS["v2"], 300, 300, numpy_generator("view", 0, 0))
    params = params._replace(order=("crop", "jitter"), box=(0, 0, 300, 300), jitter=(("contrast", 0.5),))
    found = by_torch.finish(to_tensor(image)[None], table([(params.jitter, False, None, False)]), ("jitter",))
    assert torch.equal(found[0], apply(image, params, 300))


@pytest.mark.parametrize("side", [28, 32, 224])
def test_a_gpus_way_to_divide_moves_no_pixel(side):
    """Of each image half of the pixels have one level and half the next: the mean rounds up. Beside them noise."""
    levels = range(255) if side < 100 else (0, 100, 200, 254)
    greys = [np.repeat([level, level + 1], side * side // 2).reshape(side, side).astype(np.uint8) for level in levels]
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    images = [*(Image.fromarray(grey).convert("RGB") for grey in greys), Image.fromarray(noise)]
    steps = (("contrast", 0.5), ("hue", 0.1), ("saturation", 1.3), ("brightness", 0.7))
    params = draw(PRESETS["v2"], side, side, numpy_generator("view", 0, 0))
    params = params._replace(order=("crop", "jitter"), box=(0, 0, side, side), jitter=steps)
    with DividesAsCuda() as mode:
        found = by_torch.finish(stacked(images), table([(steps, False, None, False)] * len(images)), ("jitter",))
    assert mode.seen > 0  # of the hue, whose quotients are no ties
    assert torch.equal(found, torch.stack([apply(image, params, side) for image in images]))


def test_batches_are_the_same_by_both_ways():
    source = ArraySource("noise", np.random.default_rng(2).integers(0, 256, (12, 20, 20, 3), dtype=np.uint8))
    loaders = [
        two_views(TwoViews(source, PRESETS["v2"], 16, 7, crop_only), EpochSampler(12, 4, 7), 0, torch.device("cpu"))
        for crop_only in (False, True)
    ]
    for whole, finished in zip(*loaders, strict=True):
        assert whole.keys() == finished.keys() == {"q", "k", "index", "bad"}
        for name in whole:
            assert torch.equal(whole[name], finished[name])


def photograph(path, size=(220, 170), quality=85, seed=0):
    """A smooth picture as a JPEG file, with chroma at half the resolution as cameras write it."""
    small = np.random.default_rng(seed).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path, quality=quality)


def fast_and_exact(folder, size, count=6, crop_only=True):
    source = open_folder(str(folder))
    views = [TwoViews(source, PRESETS["v2"], size, 3, crop_only=crop_only, fast=fast) for fast in (False, True)]
    return [(views[0][(1, index)], views[1][(1, index)]) for index in range(count)]


def test_fast_decoding_is_at_most_two_levels_off(tmp_path):
    for number in range(6):
        photograph(tmp_path / f"{number}.jpg", seed=number)
    for exact, fast in fast_and_exact(tmp_path, 112):
        for name in ("q", "k"):
            assert torch.equal(exact[f"{name}_params"], fast[f"{name}_params"])
            difference = (exact[name].int() - fast[name].int()).abs().float()
            assert difference.max() <= 2
            assert difference.mean() < 0.1


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_shrunk_decoding_cuts_at_the_same_place(tmp_path, shrink):
    """Closer to the exact crop than a crop that is one full pixel away, for boxes that begin and end inside pixels."""
    photograph(tmp_path / "a.jpg", size=(643, 517), quality=95)
    data = (tmp_path / "a.jpg").read_bytes()
    shrunk = decode_bytes(data, 3, shrink)
    assert shrunk.size == (-(-643 // shrink), -(-517 // shrink))
    whole = reading("a.jpg", lambda: decode_colour_jpeg(data))
    for i, j, h, w in ((17, 35, 301, 277), (216, 342, 301, 301), (0, 0, 517, 643), (3, 1, 260, 263)):
        found = to_tensor(crop_shrunk(shrunk, (i, j, h, w), shrink, 24)).float()
        here, *away = (
            (crop_tensor(whole, (max(0, i - y), max(0, j - x), h - abs(y), w - abs(x)), 24) - found).abs().mean()
            for y, x in ((0, 0), (2 * shrink, 0), (0, 2 * shrink))
        )
        assert here < min(away)
        assert here < 1.5


def test_fast_views_shrink_where_they_can(tmp_path):
    for number in range(6):
        photograph(tmp_path / f"{number}.jpg", size=(643, 517), seed=number)
    for exact, fast in fast_and_exact(tmp_path, 24):
        for name in ("q", "k"):
            difference = (exact[name].int() - fast[name].int()).abs().float()
            assert 0 < difference.mean() < 1.5


def test_small_views_shrink_too_and_are_else_those_of_pil(tmp_path):
    for number in range(6):
        photograph(tmp_path / f"{number}.jpg", size=(100, 80) if number < 3 else (643, 517), seed=number)
    for number, (exact, fast) in enumerate(fast_and_exact(tmp_path, 64, crop_only=False)):
        for name in ("q", "k"):
            difference = (exact[name].int() - fast[name].int()).abs().float()
            assert difference.mean() < 3
            assert (difference.mean() > 0) == (number >= 3)


@pytest.mark.parametrize(("least", "shrink"), [(447, 1), (448, 2), (895, 2), (896, 4), (1792, 8), (9999, 8), (3, 1)])
def test_an_image_is_never_shrunk_below_the_view(least, shrink):
    assert shrink_for([(0, 0, 5000, least), (7, 7, least + 3, 5000)], 224) == shrink


def test_fast_decoding_reads_what_is_no_colour_jpeg_and_replaces_what_is_broken(tmp_path):
    photograph(tmp_path / "a.jpg")
    Image.new("L", (80, 60), 90).save(tmp_path / "b.jpg")
    Image.new("CMYK", (80, 60), (9, 200, 30, 4)).save(tmp_path / "c.jpg")
    Image.new("RGB", (80, 60), (9, 200, 30)).save(tmp_path / "d.png")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "e.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "f.jpg").write_bytes(b"\xff\xd8\xff\xc0")
    pairs = fast_and_exact(tmp_path, 120)
    assert [fast["bad"] for _, fast in pairs] == [exact["bad"] for exact, _ in pairs] == [-1, -1, -1, -1, 4, 5]
    for exact, fast in pairs:
        assert fast["index"] == exact["index"]
        assert (exact["q"].int() - fast["q"].int()).abs().max() <= 2


def test_sizes_are_read_from_headers(tmp_path):
    photograph(tmp_path / "a.jpg", size=(643, 517))
    data = (tmp_path / "a.jpg").read_bytes()
    assert colour_jpeg_size(data) == (643, 517)
    for broken in (b"", b"\xff\xd8", data[:30], b"\x89PNG" + data, data[:2] + b"\xff\xc4\x00\x00" * 9):
        assert colour_jpeg_size(broken) is None


def test_large_views_are_finished_on_tensors_with_the_same_pixels(tmp_path):
    photograph(tmp_path / "a.jpg")
    source = open_folder(str(tmp_path))
    item = TwoViews(source, PRESETS["v1"], 100, 3)[(1, 0)]
    for number, name in enumerate(("q", "k")):
        params = draw(PRESETS["v1"], 220, 170, numpy_generator("view", 3, 1, 0, number))
        assert torch.equal(item[name], apply(source.load(0), params, 100))


def test_torchvisions_decoder_gives_pils_pixels_and_may_be_missing(tmp_path, monkeypatch):
    photograph(tmp_path / "a.jpg")
    data = (tmp_path / "a.jpg").read_bytes()
    found = reading("a.jpg", lambda: decode_colour_jpeg(data))
    monkeypatch.setattr("moco.data.sources.decode.decode_jpeg", None)
    assert torch.equal(found, decode_colour_jpeg(data))
    assert torch.equal(found, to_tensor(Image.open(tmp_path / "a.jpg")))


def test_a_run_is_the_same_by_both_ways(in_process, image_folder, tmp_path):
    states = []
    for where in ("cpu", "gpu"):
        words = ("--steps", 2, "--aug-plus", "--decode", "exact", "--aug-device", where, "--save-dir", tmp_path / where)
        assert in_process(*TINY, *words, image_folder) == 0
        states.append(files.read(str(next((tmp_path / where).glob("checkpoint_*.pth.tar"))))["state_dict"])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
