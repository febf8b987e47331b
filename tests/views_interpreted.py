"""Views finished by the Triton programs, run by triton's interpreter on the CPU: PIL's pixels, bit for bit.

Not collected by itself: the interpreter has to be chosen before triton is imported, so test_fused_views.py runs this
file in a process of its own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/views_interpreted.py
"""

import itertools

import numpy as np
import pytest
import torch

from moco.data import PRESETS, ArraySource, TwoViews, pixels
from moco.kernels import fused
from moco.kernels import views as triton_views

ORDER = ("jitter", "grey", "blur", "flip")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert fused.interpreted(), "set TRITON_INTERPRET=1"
    monkeypatch.setattr(triton_views, "BLOCK", 128)


@pytest.fixture
def small_segments(monkeypatch):
    """Several programs an image, the last ones ragged."""
    monkeypatch.setattr(triton_views, "ROWS", 4)
    monkeypatch.setattr(triton_views, "SEGMENT", 5)


def noise(*shape, seed=0):
    """(N, C, h, w) of every colour, one image grey."""
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-1, :] = images[-1, :1]
    return images


def assert_pils(images, rows, order=ORDER):
    table = torch.stack([pixels.pack(*row) for row in rows]).numpy()
    assert pixels.suits_triton(table, order)
    found = pixels.by_triton(images, table, order)
    assert found.dtype == torch.uint8
    assert torch.equal(found, pixels.one_by_one(images, table, order))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", pixels.OPERATIONS)
def test_each_jitter(name, channels):
    factors = np.linspace(-0.5, 0.5, 6) if name == "hue" else np.linspace(0, 1.9, 6)
    assert_pils(noise(6, channels, 13, 11), [([(name, factor)], False, None, False) for factor in factors.tolist()])


def test_every_order_of_jitter_with_grey_and_flip():
    factors = {"brightness": 1.31, "contrast": 0.63, "saturation": 1.27, "hue": -0.09}
    orders = [[(name, factors[name]) for name in names] for names in itertools.permutations(factors)]
    rows = [(jitter, number % 5 == 0, None, number % 2 == 0) for number, jitter in enumerate(orders)]
    assert_pils(noise(24, 3, 7, 19), rows)
    assert_pils(noise(5, 3, 7, 19), rows[:5], ("grey", "jitter", "flip"))  # MoCo v1's order


def test_hue_of_every_colour(monkeypatch):
    """Every fifth level of each channel, and the last."""
    monkeypatch.setattr(triton_views, "BLOCK", 1 << 18)
    levels = torch.tensor(sorted({*range(0, 256, 5), 1, 254}), dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 1, -1)
    assert_pils(colours, [([("hue", 0.0)], False, None, False)], ("jitter",))


@pytest.mark.parametrize("channels", [1, 3])
def test_blur_by_several_programs_an_image(channels, small_segments):
    sigmas = [0.1, 0.73, 1.42, 2.4]  # boxes of 1, 3 and 5 pixels
    jitters = (None, [("contrast", 0.6), ("hue", 0.1)], [("brightness", 1.4), ("contrast", 1.7)], None)
    rows = [(jitter, sigma == 0.73, sigma, sigma < 1) for jitter, sigma in zip(jitters, sigmas, strict=True)]
    assert_pils(noise(4, channels, 6, 7), rows)


@pytest.mark.parametrize("shape", [(1, 5), (5, 1), (1, 1), (2, 3)], ids=str)
def test_images_smaller_than_the_box(shape):
    rows = [([("contrast", 0.5)], False, 2.0, True), (None, True, None, True), ((), False, 1.0, False)]
    assert_pils(noise(3, 3, *shape), rows)


def test_views_of_a_preset_at_a_ragged_size():
    source = ArraySource("noise", np.random.default_rng(1).integers(0, 256, (3, 50, 60, 3), dtype=np.uint8))
    views = TwoViews(source, PRESETS["v2"], 33, 4, crop_only=True)
    items = [views[(0, index)] for index in range(3)]
    table = torch.stack([item[name] for item in items for name in ("q_params", "k_params")]).numpy()
    crops = torch.stack([item[name] for item in items for name in ("q", "k")])
    found = pixels.by_triton(crops, table, views.after)
    assert torch.equal(found, pixels.one_by_one(crops, table, views.after))
    assert 0 < np.count_nonzero(table[:, pixels._SIGMA]) < 6  # both ways were taken


def test_a_batch_that_needs_nothing_is_copied():
    images = noise(2, 3, 5, 4)
    strided = images.transpose(2, 3)
    for given in (images, strided):
        found = pixels.by_triton(given, torch.stack([pixels.pack(None, True, 1.0, True)] * 2).numpy(), ())
        assert torch.equal(found, given)
        assert found.data_ptr() != given.data_ptr()


def test_a_device_is_trusted_once_its_pixels_are_pils(monkeypatch):
    pixels.triton_agrees.cache_clear()
    cpu = torch.device("cpu")
    assert pixels.triton_agrees(cpu, (3, 5, 7))
    monkeypatch.setattr(triton_views, "finish", lambda images, *_: images)
    assert pixels.triton_agrees(cpu, (3, 5, 7))  # remembered
    with pytest.warns(RuntimeWarning, match="not by triton: its pixels are not PIL's"):
        assert not pixels.triton_agrees(cpu, (3, 7, 5))
