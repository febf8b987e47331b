"""One view's operations on a CPU, plane by plane: PIL's pixels for every colour, factor, sigma and preset."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter

from moco.data import PRESETS, ArraySource, TwoViews, ViewParams, apply, draw
from moco.data.augment import by_numpy
from moco.data.augment.by_pil import split_order, to_tensor
from moco.seeding import numpy_generator

NOTHING = ViewParams(order=(), box=(0, 0, 1, 1), jitter=None, grey=False, blur=None, flip=False, affine=None)


def noise(mode="RGB", size=(31, 24), seed=0):
    """(w, h) pixels, grey and saturated ones among them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    pixels[: size[1] // 3] = pixels[: size[1] // 3, :, :1]
    pixels[-2:, :, seed % 3] = 0
    return Image.fromarray(pixels).convert(mode)


def finished(image, order, **what):
    return by_numpy.finish(to_tensor(image), NOTHING._replace(**what), order)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_equals_torchvisions(mode, name):
    factors = np.linspace(-0.5, 0.5, 41) if name == "hue" else [*np.linspace(0, 1.9, 39), 1.0]
    for seed, factor in enumerate(map(float, factors)):
        image = noise(mode, seed=seed)  # many images: contrast rounds their mean
        expected = to_tensor(getattr(F, f"adjust_{name}")(image, factor))
        assert torch.equal(finished(image, ("jitter",), jitter=((name, factor),)), expected), factor


def test_hue_of_every_colour_equals_pils():
    """All 2^24 colours, the 65,536 of each red turned by another number of 255ths."""
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for red in range(256):
        turn = red * 37 % 256
        image = Image.fromarray(np.stack([np.full_like(green, red), green, blue], axis=2))
        hue, *others = image.convert("HSV").split()
        turned = hue.point([(level + turn) % 256 for level in range(256)])
        expected = to_tensor(Image.merge("HSV", [turned, *others]).convert("RGB"))
        assert torch.equal(finished(image, ("jitter",), jitter=(("hue", (turn + 0.5) / 255),)), expected), red


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(31, 24), (9, 13), (3, 2), (1, 1)])
def test_blur_equals_pils(mode, size):
    image = noise(mode, size)
    # Boxes of 1 to 3 pixels, of 3 to 5 from the root of 2 on, and wider than the image.
    for sigma in (0.1, 0.11, 0.4, 0.73, 1.0, 1.4, 1.41422, 1.42, 1.9, 2.0, 5.5, *np.linspace(0.2, 1.9, 18).tolist()):
        expected = to_tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
        assert torch.equal(finished(image, ("blur",), blur=sigma), expected), sigma


def test_blur_of_black_and_white_keeps_within_the_levels():
    pixels = np.zeros((40, 40, 3), dtype=np.uint8)
    pixels[:20], pixels[20:, ::2], pixels[25, 25] = 255, 255, 0
    image = Image.fromarray(pixels)
    for sigma in (0.1, 0.6, 1.2, 1.41421, 1.6, 2.0):
        expected = to_tensor(image.filter(ImageFilter.GaussianBlur(sigma)))
        assert torch.equal(finished(image, ("blur",), blur=sigma), expected)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_whole_presets_equal_views_made_by_pil(name, mode):
    preset, image = PRESETS[name], noise(mode, (120, 90))
    before, after = split_order(preset.order)
    for number in range(25):
        view = draw(preset, *image.size, numpy_generator("view", 1, number))
        crop = apply(image, view._replace(order=before), 33)
        kept = crop.clone()
        found = by_numpy.finish(crop, view, after)
        assert torch.equal(found, apply(image, view, 33))
        assert found.is_contiguous()
        assert torch.equal(crop, kept)


def test_a_crop_may_lie_in_memory_in_any_order():
    """torchvision's crops have their channels last."""
    image = noise(size=(40, 40))
    view = draw(PRESETS["v2"], 40, 40, numpy_generator("view", 2, 3))
    crop = to_tensor(image)
    for order in (("jitter", "grey", "blur", "flip"), ("flip",), ()):
        found = by_numpy.finish(crop[None].contiguous(memory_format=torch.channels_last)[0], view, order)
        assert torch.equal(found, by_numpy.finish(crop, view, order))
        assert found.is_contiguous()


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_large_views_keep_the_mean_of_contrast_exact(mode):
    """The sum over 300 x 300 pixels passes 2^24, where float32 counts in twos: one less than a half rounds down."""
    pixels = np.full(300 * 300, 200, dtype=np.uint8)
    pixels[: len(pixels) // 2 - 1] = 201
    image = Image.fromarray(pixels.reshape(300, 300)).convert(mode)
    expected = to_tensor(F.adjust_contrast(image, 0.5))
    assert torch.equal(finished(image, ("jitter",), jitter=(("contrast", 0.5),)), expected)


@pytest.mark.parametrize("size", [95, 96, 130])
def test_two_views_are_the_same_from_either_side_of_the_size_that_decides(size):
    source = ArraySource("noise", np.random.default_rng(2).integers(0, 256, (6, 140, 150, 3), dtype=np.uint8))
    views = TwoViews(source, PRESETS["v2"], size, 7)
    for index in range(6):
        item = views[(3, index)]
        for number, name in enumerate(("q", "k")):
            drawn = draw(PRESETS["v2"], 150, 140, numpy_generator("view", 7, 3, index, number))
            assert torch.equal(item[name], apply(source.load(index), drawn, size))
