"""Views finished by the Triton programs, by triton's interpreter on the CPU or compiled on a card: PIL's pixels, bit
for bit.

The interpreter has to be chosen before triton is imported, so test_views_by_triton.py runs this file in a process of
its own, as anyone can:  TRITON_INTERPRET=1 python -m pytest tests/data/augment/views_interpreted.py
`pytest -m gpu` runs it compiled.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import DEVICE, assert_runs_there, mend_interpreter

from moco.data import PRESETS, ArraySource, TwoViews
from moco.data.augment import by_torch
from moco.data.augment import by_triton as triton_views
from moco.data.augment.by_pil import JITTER

ORDER = ("jitter", "grey", "blur", "flip")


mend_interpreter()


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    assert_runs_there()
    monkeypatch.setattr(triton_views, "PIXELS", 128)


def noise(*shape, seed=0):
    """(N, C, h, w) of every colour, one image grey."""
    images = torch.randint(256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    images[-1, :] = images[-1, :1]
    return images


def assert_pils(images, rows, order=ORDER):
    table = torch.stack([by_torch.pack_params(*row) for row in rows])
    assert triton_views.suits(table, order)
    found = triton_views.by_launches(images.to(DEVICE), table, order)
    assert found.dtype == torch.uint8
    assert torch.equal(found.cpu(), by_torch.finish(images, table, order))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", JITTER)
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
    if DEVICE == "cpu":
        monkeypatch.setattr(triton_views, "PIXELS", 1 << 18)  # one program, interpreted
    levels = torch.tensor(sorted({*range(0, 256, 5), 1, 254}), dtype=torch.uint8)
    colours = torch.cartesian_prod(levels, levels, levels).T.reshape(1, 3, 1, -1)
    assert_pils(colours, [([("hue", 0.0)], False, None, False)], ("jitter",))


# The interpreter takes 15 ms a column of a program of ``blur``, 50 ms with all colours: images stay small.


def test_blur_by_several_programs_an_image(monkeypatch):
    monkeypatch.setattr(triton_views, "BLUR_ROWS", 4)
    monkeypatch.setattr(triton_views, "SEGMENT", 5)  # both ragged
    assert_pils(noise(2, 3, 5, 6), [([("contrast", 0.6)], False, 1.9, True), (None, False, None, True)])


def test_blurs_of_one_three_and_five_pixels():
    rows = [([("contrast", 1.7)], False, sigma, sigma > 1) for sigma in (0.1, 0.73, 1.42, 2.4)]
    assert_pils(noise(4, 1, 4, 5), rows)


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (1, 1)], ids=str)
def test_images_smaller_than_the_box(shape):
    assert_pils(noise(1, 1, *shape), [(None, False, 2.0, True)])


def test_views_of_a_preset_at_an_odd_size():
    source = ArraySource("noise", np.random.default_rng(1).integers(0, 256, (9, 50, 60, 3), dtype=np.uint8))
    views = TwoViews(source, PRESETS["v2"], 13, 4, crop_only=True)
    items = (views[(0, index)] for index in range(9))
    item = next(item for item in items if (item["q_params"][9] > 0) != (item["k_params"][9] > 0))  # one blur
    table = torch.stack([item["q_params"], item["k_params"]])
    crops = torch.stack([item["q"], item["k"]])
    found = triton_views.by_launches(crops.to(DEVICE), table, views.after)
    assert torch.equal(found.cpu(), by_torch.finish(crops, table, views.after))


def test_a_batch_that_needs_nothing_is_copied():
    images = noise(2, 3, 5, 4).to(DEVICE)
    strided = images.transpose(2, 3)
    for given in (images, strided):
        found = triton_views.by_launches(given, torch.stack([by_torch.pack_params(None, True, 1.0, True)] * 2), ())
        assert torch.equal(found, given)
        assert found.data_ptr() != given.data_ptr()


def test_a_device_is_trusted_once_its_pixels_are_pils(monkeypatch):
    triton_views.agrees.cache_clear()
    device = torch.device(DEVICE)
    assert triton_views.agrees(device, (1, 2, 3))
    monkeypatch.setattr(triton_views, "by_launches", lambda images, *_: images)
    assert triton_views.agrees(device, (1, 2, 3))  # remembered
    with pytest.warns(RuntimeWarning, match="not by triton: its pixels are not PIL's"):
        assert not triton_views.agrees(device, (1, 3, 2))
