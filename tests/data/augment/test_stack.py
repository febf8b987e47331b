"""Views of other channels than one and three: each channel as PIL has a grey image, by every back end alike."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from moco.data import PRESETS, ArraySource, TwoViews, ViewParams, apply, draw, eval_view
from moco.data.augment import by_numpy, by_torch, by_triton
from moco.data.augment.by_pil import split_order, to_tensor
from moco.data.stack import Stack, black, from_bytes, shown
from moco.seeding import numpy_generator

CHANNELS = (2, 4, 5, 16)
NOTHING = ViewParams(order=(), box=(0, 0, 1, 1), jitter=None, grey=False, blur=None, flip=False, affine=None)


def levels(channels, seed=0, size=(40, 33)):
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_back_end_makes_the_same_view(name, channels):
    preset, image = PRESETS[name], Stack.of(levels(channels))
    before, after = split_order(preset.order)
    for number in range(12):
        view = draw(preset, *image.size, numpy_generator("view", 1, number))
        wanted = apply(image, view, 17)
        crop = apply(image, view._replace(order=before), 17)
        row = by_torch.pack_params(view.jitter, view.grey, view.blur, view.flip, view.solarize)[None]
        assert torch.equal(by_numpy.finish(crop.clone(), view, after), wanted)
        assert torch.equal(by_torch.finish(crop[None].clone(), row, preset.order)[0], wanted)
        assert torch.equal(by_triton.finish(crop[None].clone(), row, preset.order)[0], wanted)


@pytest.mark.parametrize("channels", CHANNELS)
def test_all_but_contrast_are_those_of_grey_images(channels):
    image = Stack.of(levels(channels))
    for name in sorted(PRESETS):
        for number in range(8):
            view = draw(PRESETS[name], *image.size, numpy_generator("view", 2, number))
            view = view._replace(jitter=tuple(step for step in view.jitter or () if step[0] != "contrast"))
            wanted = torch.cat([apply(band, view, 15) for band in image.bands])
            assert torch.equal(apply(image, view, 15), wanted)


@pytest.mark.parametrize("channels", CHANNELS)
def test_operations_by_plain_pil_and_numpy(channels):
    array = levels(channels)

    def made(change):
        return torch.from_numpy(np.stack([change(array[..., c]) for c in range(channels)]))

    def viewed(name, **what):
        return apply(Stack.of(array), NOTHING._replace(order=(name,), **what), 40)

    mean = np.float32(np.floor(array.mean() + 0.5))
    for factor in (0.6, 1.3):
        toward = (mean + np.float32(factor) * (array.astype(np.float32) - mean)).clip(0, 255)
        found = viewed("jitter", jitter=(("contrast", factor),)).permute(1, 2, 0).numpy()
        assert np.array_equal(found, np.floor(toward))
    for step in ("hue", "saturation"):
        assert torch.equal(viewed("jitter", jitter=((step, 0.3),)), made(lambda band: band))
    assert torch.equal(viewed("grey", grey=True), made(lambda band: band))
    assert torch.equal(viewed("flip", flip=True), made(lambda band: band[:, ::-1].copy()))
    assert torch.equal(
        viewed("solarize", solarize=True), made(lambda band: np.asarray(ImageOps.solarize(Image.fromarray(band))))
    )
    blurred = made(lambda band: np.asarray(Image.fromarray(band).filter(ImageFilter.GaussianBlur(1.2))))
    assert torch.equal(viewed("blur", blur=1.2), blurred)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [16, 96])
def test_eval_views_are_those_of_grey_images(channels, size):
    image = Stack.of(levels(channels))
    assert torch.equal(eval_view(image, size), torch.cat([eval_view(band, size) for band in image.bands]))


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [24, 100])
def test_items_of_images_in_memory(channels, size):
    """Small views are PIL's, large ones are finished on tensors."""
    images = np.stack([levels(channels, seed) for seed in range(3)])
    source = ArraySource("some", images)
    assert source.channels == channels
    item = TwoViews(source, PRESETS["v2"], size, 3)[(0, 1)]
    for number, name in enumerate("qk"):
        params = draw(PRESETS["v2"], 33, 40, numpy_generator("view", 3, 0, 1, number))
        assert torch.equal(item[name], apply(Stack.of(images[1]), params, size))


@pytest.mark.parametrize("channels", CHANNELS)
def test_bytes_tensor_and_black(channels):
    image = Stack.of(levels(channels))
    again = from_bytes(image.tobytes(), image.size, channels)
    assert torch.equal(to_tensor(again), torch.from_numpy(levels(channels)).permute(2, 0, 1))
    assert to_tensor(black((7, 5), channels)).shape == (channels, 5, 7)
    assert not to_tensor(black((7, 5), channels)).any()
    assert np.array_equal(np.asarray(black((7, 5), 3)), np.zeros((5, 7, 3)))


def test_pictures_show_the_first_three_channels(capsys):
    for channels in (3, 4, 5, 16):
        array = levels(channels)
        assert np.array_equal(np.asarray(shown(Stack.of(array))), array[..., :3])
    assert np.array_equal(np.asarray(shown(Stack.of(levels(2)))), levels(2)[..., 0])
