"""--stats auto: mean and deviation of all pixels of the training images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from support.odd_pixels import folder_of, saved

from moco.data import channel_statistics_of, measured_once, open_sources
from moco.data.sources.base import ArraySource
from moco.errors import UserError

SIZES = ((40, 30), (7, 90), (64, 64), (1, 1), (33, 20))


def colours(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 40 + 40 * number, (*SIZES[number], 3)).astype(np.uint8)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_numpy_on_all_pixels(tmp_path, channels, workers):
    source = open_sources(None, folder_of(tmp_path / "a", *[saved(colours(n), "PNG") for n in range(5)]),
                          channels=channels).pretrain  # fmt: skip
    every = np.concatenate([np.asarray(source.load(n)).reshape(-1, channels) for n in range(5)]) / 255
    mean, std, images = channel_statistics_of(source, workers)
    np.testing.assert_allclose(mean, every.mean(0), rtol=1e-12)
    np.testing.assert_allclose(std, every.std(0), rtol=1e-12)
    assert images == 5


def test_of_a_large_set_a_spread_sample_counts_and_it_is_said(monkeypatch):
    images = np.arange(100, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8) + np.eye(2, dtype=np.uint8)
    source = ArraySource("memory", images)
    monkeypatch.setattr("moco.data.pixel_statistics.MOST", 11)
    mean, _, read = channel_statistics_of(source, most=11)
    rows = np.linspace(0, 99, 11).astype(int)
    assert (mean[0], read) == (pytest.approx(images[rows].mean() / 255), 11)
    assert str(measured_once(source, 0)).endswith(" of 11 images, spread over all 100")


def test_unreadable_images_are_left_out_and_counted(tmp_path):
    source = open_sources(None, folder_of(tmp_path / "a", b"no", saved(colours(0), "PNG"), b"image")).pretrain
    found = measured_once(source, 0)
    assert found.mean == pytest.approx((colours(0) / 255).mean((0, 1)), abs=1e-6)
    assert str(found).endswith(" of 1 images, 2 could not be read")
    bad = open_sources(None, folder_of(tmp_path / "b", b"no", b"image")).pretrain
    with pytest.raises(UserError, match="none of 2 images tried in .*b can be read"):
        measured_once(bad, 0)


def test_images_of_one_value_are_refused(tmp_path):
    flat = colours(2)
    flat[..., 1] = 9
    path = folder_of(tmp_path / "a", saved(flat, "PNG"), saved(flat, "PNG"))
    with pytest.raises(UserError, match="have one value in all pixels of a channel"):
        measured_once(open_sources(None, path).pretrain, 0, str(tmp_path / "kept"))


def test_the_file_goes_by_images_levels_and_channels(tmp_path):
    kept = tmp_path / "kept"
    path = folder_of(tmp_path / "a", saved(colours(0), "PNG"), saved(colours(1), "PNG"))

    def measured(**settings):
        return measured_once(open_sources(None, path, **settings).pretrain, 0, str(kept))

    first = measured()
    (file,) = kept.iterdir()
    file.write_text(json.dumps({**json.loads(file.read_text()), "mean": [0.25, 0.5, 0.75]}))
    assert measured().mean == [0.25, 0.5, 0.75]  # not measured again
    assert len(measured(channels=1).mean) == 1
    assert measured(levels=(0, 80)).mean[0] > 2 * first.mean[0]
    assert len([*kept.iterdir()]) == 3
    Image.fromarray(colours(2)).save(f"{path}/000.png")
    assert measured().mean not in ([0.25, 0.5, 0.75], first.mean)
    for entries in ("", "{", '{"mean": [1, 2], "std": []}', '{"mean": ["a", 0, 0], "std": [1, 1, 1]}'):
        file.write_text(entries)
        path = folder_of(tmp_path / f"a{len(entries)}", saved(colours(0), "PNG"), saved(colours(1), "PNG"))
        assert measured().mean == first.mean
