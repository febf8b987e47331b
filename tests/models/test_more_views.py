"""More than two views an image: the first two stay what they are, every loss takes the others, runs repeat exactly."""

import math

import numpy as np
import pytest
import torch
from conftest import TINY, differences, load
from PIL import Image
from support.networks import IN_BATCH, LABELS, MEAN, OWN, STD, Tiny, batch, batch_contrast

from moco.config import InBatchConfig
from moco.data import PRESETS, ArraySource, EpochSampler, TwoViews, apply, draw, open_sources, two_views
from moco.models import build
from moco.models.inputs import normalise
from moco.seeding import numpy_generator


def noise(count: int = 6) -> ArraySource:
    return ArraySource("noise", np.random.default_rng(2).integers(0, 256, (count, 30, 26, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("size", [24, 100])  # views that are made by PIL, and views that are finished as tensors
def test_the_others_are_drawn_like_the_first_two_and_change_nothing_about_them(size):
    source = noise()
    for index in range(3):
        two, five = (TwoViews(source, PRESETS["v2"], size, 7, views=views)[(4, index)] for views in (2, 5))
        assert "more" not in two
        assert five["more"].shape == (3, 3, size, size)
        for name, value in two.items():
            assert torch.equal(torch.as_tensor(five[name]), torch.as_tensor(value)), name
        for number, view in enumerate(five["more"], 2):
            image = source.load(index)
            params = draw(PRESETS["v2"], *image.size, numpy_generator("view", 7, 4, index, number))
            assert torch.equal(view, apply(image, params, size))


def test_views_finished_on_the_device_are_the_workers():
    source, cpu = noise(12), torch.device("cpu")
    loaders = [
        two_views(TwoViews(source, PRESETS["v2"], 16, 7, crop_only, views=4), EpochSampler(12, 4, 7), 0, cpu)
        for crop_only in (False, True)
    ]
    for whole, finished in zip(*loaders, strict=True):
        assert whole.keys() == finished.keys() == {"q", "k", "more", "index", "bad"}
        assert whole["more"].shape == (4, 2, 3, 16, 16)
        assert differences(whole, finished) == []


def test_fast_decoding_of_the_first_two_is_theirs_alone(tmp_path):
    """A small crop among the others makes them be decoded more finely, and the first two not."""
    small = np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    Image.fromarray(small).resize((400, 300), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg")
    source = open_sources(path=str(tmp_path)).pretrain
    finer = 0
    for epoch in range(20):
        two, five, exact = (
            TwoViews(source, PRESETS["v2"], 60, 3, crop_only=True, fast=fast, views=views)[(epoch, 0)]
            for fast, views in ((True, 2), (True, 5), (False, 5))
        )
        assert torch.equal(two["q"], five["q"])
        assert torch.equal(two["k"], five["k"])
        off = (five["more"].int() - exact["more"].int()).abs().amax((1, 2, 3))
        finer += bool((off <= 2).all()) and int((two["q"].int() - exact["q"].int()).abs().max()) > 2
    assert finer > 0


# --------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize("method", IN_BATCH)
def test_the_step_is_the_papers_loop_over_all_views(method):
    """Three views, every sum written out, from the features of one forward pass."""
    (im_q, im_k, ids), (third, *_) = batch(), batch(seed=9)
    out = batch_contrast(method)([im_q, im_k, third], ids)
    z = batch_contrast(method).encoder_q(normalise(torch.cat([im_q, im_k, third]), MEAN, STD))
    z = torch.nn.functional.normalize(z, dim=1).detach().double()
    groups = (LABELS if method == "supcon" else ids).repeat(3).tolist()
    total = 0.0
    for i in range(18):
        e = [math.exp(float(z[i] @ z[j]) / 0.2) for j in range(18)]
        positives = [j for j in range(18) if j != i and groups[j] == groups[i]]
        negatives = [e[j] for j in range(18) if groups[j] != groups[i]]
        n = len(negatives)
        total += sum(one(method, e[p], negatives, [e[j] for j in positives], n) for p in positives) / len(positives)
    assert float(out.loss.detach()) == pytest.approx(total / 18, rel=1e-4)


def one(method: str, positive: float, negatives: list[float], positives: list[float], n: int) -> float:
    """The loss of one anchor with one of its positives."""
    if method == "dcl":
        return -math.log(positive / sum(negatives))
    if method == "hcl":  # beta 1, tau_plus .1
        reweighted = n * sum(x * x for x in negatives) / sum(negatives)
        ng = max((reweighted - 0.1 * n * positive) / 0.9, n * math.exp(-1 / 0.2))
        return -math.log(positive / (positive + ng))
    return -0.2 / 0.07 * math.log(positive / (sum(positives) + sum(negatives)))


@pytest.mark.parametrize("views", [2, 3, 6])
@pytest.mark.parametrize("method", [name for name in IN_BATCH if name != "supcon"])
def test_chance_is_the_loss_of_features_that_all_look_alike(method, views):
    encoder = Tiny()
    torch.nn.init.zeros_(encoder.fc.weight)
    config = InBatchConfig(T=0.5, mean=MEAN, std=STD, method=method, views=views)
    net, words = build.in_batch(encoder, config, build.Context(seed=0, images=6, batch=6))
    im_q, im_k, ids = batch()
    assert float(net([im_q, im_k, *[im_q] * (views - 2)], ids).loss.detach()) == pytest.approx(net.chance, rel=1e-5)
    assert f"against {6 * views - 1} others" in words
    assert ("both views" if views == 2 else f"all {views} views") in words


# ----------------------------------------------------------------------------------------------------------- runs


def test_a_run_with_four_views_resumes_exactly_and_finishes_them_anywhere(image_folder, tmp_path, in_process, capsys):
    words = [*OWN, "--method", "simclr", "--views", 4, "--epochs", 2, image_folder]
    assert in_process(*words, "--save-dir", tmp_path / "whole") == 0
    assert "each view against 31 others, loss in fp32, multiplied by T / 0.07; BatchNorm over all 4 views" in (
        capsys.readouterr().out
    )
    assert in_process(*words, "--save-dir", tmp_path / "parts", "--max-minutes", 1e-9) == 75
    assert load(tmp_path / "parts")["run"]["batch"] == 1  # inside the first epoch
    assert in_process(*words, "--save-dir", tmp_path / "parts", "--resume", "auto", "--aug-device", "gpu") == 0
    assert differences(load(tmp_path / "whole"), load(tmp_path / "parts")) == [".run.flags.--aug-device"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--views", "3"], "--views is for the methods without a queue"),
        (["--views", "3", "--symmetric"], "--views is for the methods without a queue"),
        (["--method", "supcon", "--moco-k", "64", "--views", "4"], "--views is for the methods without a queue"),
        (["--method", "simclr", "--views", "1"], "--views must be at least 2"),
    ],
)
def test_mistakes_are_one_sentence(words, sentence, image_folder, tmp_path, in_process, capsys):
    flags = OWN if "--method" in words else TINY
    with pytest.raises(SystemExit) as stopped:
        in_process(*flags, *words, "--save-dir", tmp_path, image_folder)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1
