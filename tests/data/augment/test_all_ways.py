"""Views of any order of operations: the same pixels by PIL, by numpy and in batches by torch."""

import dataclasses

import numpy as np
import pytest
import torch

from moco.data import PRESETS, ArraySource, TwoViews, apply, draw
from moco.data.augment import by_numpy, by_triton
from moco.data.augment.by_pil import _OPERATIONS, split_order
from moco.data.augment.presets import OPERATIONS, Preset
from moco.seeding import numpy_generator

AFTER = tuple(name for name in OPERATIONS if name not in ("affine", "crop"))


def some_preset(number):
    """Every operation often, strong ones too, in an order of its own; some before the crop."""
    rng = np.random.default_rng(number)
    order = list(rng.permutation(AFTER))
    order.insert(0, "crop")
    before = [name for name in order[1:] if name != "turn" and rng.random() < 0.15]
    order = (*["affine"] * (number % 2), *before, *(name for name in order if name not in before))
    return Preset(
        order=tuple(map(str, order)), crop_scale=(0.05, 0.9), jitter_p=0.8, brightness=2.0, contrast=3.0,
        saturation=1.5, hue=0.5, grey_p=0.3, blur_p=0.6, blur_sigma=(0.1, 12.0), flip_p=0.5, vflip_p=0.5, turn_p=0.75,
        degrees=40.0, shear=20.0, solarize_p=0.4,
    )  # fmt: skip


def test_every_operation_has_a_name():
    assert set(OPERATIONS) == set(_OPERATIONS)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("number", range(8))
def test_the_pixels_are_pils_by_every_way(number, channels):
    preset = some_preset(number)
    shape = (12, 29, 33, 3)[: 3 + (channels == 3)]
    source = ArraySource("noise", np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))
    before, after = split_order(preset.order)
    cropped = TwoViews(source, preset, 17, 5, crop_only=True)
    for index in range(len(source)):
        image, item = source.load(index), cropped[(2, index)]
        for view, name in enumerate(("q", "k")):
            drawn = draw(preset, *image.size, numpy_generator("view", 5, 2, index, view))
            expected = apply(image, drawn, 17)
            assert torch.equal(by_numpy.finish(apply(image, drawn._replace(order=before), 17), drawn, after), expected)
            batch = by_triton.finish(item[name][None], item[f"{name}_params"][None], after)
            assert torch.equal(batch[0], expected)
            assert batch.is_contiguous()
    rows = torch.stack([cropped[(2, index)]["q_params"] for index in range(12)])
    crops = torch.stack([cropped[(2, index)]["q"] for index in range(12)])
    whole = TwoViews(source, preset, 17, 5)
    expected = torch.stack([whole[(2, index)]["q"] for index in range(12)])
    assert torch.equal(by_triton.finish(crops, rows, after), expected)


def test_turned_views_are_the_same_from_either_side_of_the_size_that_decides():
    preset = dataclasses.replace(PRESETS["v2"], order=(*PRESETS["v2"].order, "vflip", "turn"), vflip_p=0.5, turn_p=0.8)
    source = ArraySource("noise", np.random.default_rng(2).integers(0, 256, (6, 140, 150, 3), dtype=np.uint8))
    for size in (95, 96, 130):
        views = TwoViews(source, preset, size, 7)
        for index in range(6):
            drawn = draw(preset, 150, 140, numpy_generator("view", 7, 3, index, 1))
            assert torch.equal(views[(3, index)]["k"], apply(source.load(index), drawn, size))
