"""Views: pixels equal to torchvision's, parameters equal to the published ones, draws of the same distribution."""

import dataclasses
import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from scipy import stats
from torchvision.transforms import InterpolationMode

from moco.data import PRESETS, Preset, ViewParams, apply, draw, eval_view, get_preset, probe_preset
from moco.errors import UserError

DRAWS = 3000
ALPHA = 1e-4  # of a Kolmogorov-Smirnov test; the seeds are fixed, so a pass stays a pass


def photo(mode="RGB", size=(50, 37), seed=0):
    """Smooth colours with some noise, and pure black and white corners."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)).astype(int)
    pixels = np.clip(pixels + rng.integers(-20, 21, pixels.shape), 0, 255).astype(np.uint8)
    pixels[:3, :3], pixels[-3:, -3:] = 0, 255
    return Image.fromarray(pixels).convert(mode)


def params(order=("crop",), **changes):
    base = ViewParams(order, (0, 0, 37, 50), None, False, None, False, None)
    return base._replace(**changes)


def pixels_of(image):
    return F.pil_to_tensor(image)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("box", [(0, 0, 37, 50), (3, 5, 20, 11), (36, 49, 1, 1), (2, 1, 24, 24), (0, 0, 5, 50)])
def test_crop_equals_resized_crop(mode, box):
    image = photo(mode)
    expected = F.resized_crop(image, *box, [24, 24], InterpolationMode.BILINEAR)
    assert torch.equal(apply(image, params(box=box), 24), pixels_of(expected))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_jitter_equals_adjust(mode, name):
    factors = np.linspace(-0.5, 0.5, 41) if name == "hue" else np.linspace(0, 1.9, 39)
    for seed, factor in enumerate(factors.tolist()):
        image = photo(mode, (32, 32), seed)  # many images: contrast rounds their mean
        view = params(("crop", "jitter"), box=(0, 0, 32, 32), jitter=((name, factor),))
        expected = getattr(F, f"adjust_{name}")(image, factor)
        assert torch.equal(apply(image, view, 32), pixels_of(expected)), factor


def test_jitter_is_applied_in_the_drawn_order():
    image = photo(size=(32, 32))
    steps = (("contrast", 1.4), ("hue", -0.1), ("brightness", 0.7), ("saturation", 0.6))
    expected = image
    for name, factor in steps:
        expected = getattr(F, f"adjust_{name}")(expected, factor)
    shuffled = params(("crop", "jitter"), box=(0, 0, 32, 32), jitter=steps[::-1])
    view = shuffled._replace(jitter=steps)
    assert torch.equal(apply(image, view, 32), pixels_of(expected))
    assert not torch.equal(apply(image, shuffled, 32), pixels_of(expected))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_grey_blur_and_flip(mode):
    image = photo(mode, (32, 32))
    box = (0, 0, 32, 32)
    grey = F.to_grayscale(image, len(image.getbands()))
    assert torch.equal(apply(image, params(("crop", "grey"), box=box, grey=True), 32), pixels_of(grey))
    flipped = F.hflip(image)
    assert torch.equal(apply(image, params(("crop", "flip"), box=box, flip=True), 32), pixels_of(flipped))
    for sigma in (0.1, 0.73, 2.0):  # upstream's GaussianBlur
        blurred = image.filter(ImageFilter.GaussianBlur(radius=sigma))
        view = params(("crop", "blur"), box=box, blur=sigma)
        assert torch.equal(apply(image, view, 32), pixels_of(blurred))


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("angle", "shear"), [(0.0, 0.0), (15.0, 0.0), (0.0, -10.0), (-12.5, 7.5)])
def test_affine_equals_torchvision(mode, angle, shear):
    image = photo(mode, (28, 24))
    expected = F.affine(image, angle, [0, 0], 1.0, [shear, 0.0], InterpolationMode.BILINEAR)
    view = apply(image, params(("affine", "crop"), box=(0, 0, 24, 28), affine=(angle, shear)), 28)
    expected = F.resized_crop(expected, 0, 0, 24, 28, [28, 28])
    difference = (view.int() - pixels_of(expected).int()).abs()
    # The two matrices differ in the last bit of a double, which moves a pixel at most across one rounding.
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


def torchvision_pipeline(name):
    """Each preset as its authors wrote it; ToTensor and Normalize follow."""
    flip = T.RandomHorizontalFlip()
    if name == "v1":
        jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.4)
        return [T.RandomResizedCrop(224, scale=(0.2, 1.0)), T.RandomGrayscale(p=0.2), jitter, flip]
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    if name == "v2":
        blur = T.RandomApply([T.Lambda(lambda x: x)], p=0.5)  # its GaussianBlur has a class of its own
        crop = T.RandomResizedCrop(224, scale=(0.2, 1.0))
        return [crop, jitter, T.RandomGrayscale(p=0.2), blur, flip]
    return [T.RandomResizedCrop(32), flip, jitter, T.RandomGrayscale(p=0.2)]


def jitter_ranges(preset):
    return tuple(getattr(preset, name) for name in ("brightness", "contrast", "saturation", "hue"))


@pytest.mark.parametrize("name", ["v1", "v2", "cifar"])
def test_presets_equal_the_published_parameters(name):
    preset = PRESETS[name]
    operations = {T.RandomResizedCrop: "crop", T.RandomGrayscale: "grey", T.RandomHorizontalFlip: "flip"}
    order = []
    for step in torchvision_pipeline(name):
        if isinstance(step, T.RandomApply) and isinstance(step.transforms[0], T.Lambda):
            order.append("blur")
            assert preset.blur_p == step.p == 0.5
            assert preset.blur_sigma == (0.1, 2.0)
            continue
        probability = step.p if isinstance(step, T.RandomApply) else 1.0
        step = step.transforms[0] if isinstance(step, T.RandomApply) else step
        order.append("jitter" if isinstance(step, T.ColorJitter) else operations[type(step)])
        if isinstance(step, T.RandomResizedCrop):
            assert preset.crop_scale == tuple(step.scale)
            assert preset.crop_ratio == pytest.approx(tuple(step.ratio))
        elif isinstance(step, T.ColorJitter):
            assert preset.jitter_p == probability
            strengths = (step.brightness[1] - 1, step.contrast[1] - 1, step.saturation[1] - 1, step.hue[1])
            assert jitter_ranges(preset) == pytest.approx(strengths)
        else:
            assert (preset.grey_p if order[-1] == "grey" else preset.flip_p) == step.p
    assert preset.order == tuple(order)
    assert preset.degrees == preset.shear == 0.0
    assert "blur" in order or preset.blur_p == 0.0


def test_published_numbers_by_value():
    assert PRESETS["v1"] == Preset(
        ("crop", "grey", "jitter", "flip"),
        (0.2, 1.0), (3 / 4, 4 / 3), 1.0, 0.4, 0.4, 0.4, 0.4, 0.2, 0.0, (0.1, 2.0), 0.5,
    )  # fmt: skip
    assert PRESETS["v2"] == Preset(
        ("crop", "jitter", "grey", "blur", "flip"),
        (0.2, 1.0), (3 / 4, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, (0.1, 2.0), 0.5,
    )  # fmt: skip
    assert PRESETS["cifar"] == Preset(
        ("crop", "flip", "jitter", "grey"),
        (0.08, 1.0), (3 / 4, 4 / 3), 0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.0, (0.1, 2.0), 0.5,
    )  # fmt: skip
    assert PRESETS["digits"].flip_p == PRESETS["digits"].hue == PRESETS["digits"].blur_p == 0.0


def draws_of(preset, width=64, height=48, count=DRAWS, seed=0):
    rng = np.random.default_rng(seed)
    return [draw(preset, width, height, rng) for _ in range(count)]


def same_distribution(ours, theirs):
    return stats.ks_2samp(ours, theirs).pvalue > ALPHA


@pytest.mark.parametrize("name", ["v2", "cifar", "digits"])
@pytest.mark.parametrize(("width", "height"), [(64, 48), (28, 28), (500, 100)])
def test_crops_are_distributed_as_torchvisions(name, width, height):
    preset = PRESETS[name]
    image = Image.new("L", (width, height))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        scale, ratio = list(preset.crop_scale), list(preset.crop_ratio)
        theirs = np.array([T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(DRAWS)])
    ours = np.array([view.box for view in draws_of(preset, width, height)])
    for column in range(4):
        assert same_distribution(ours[:, column], theirs[:, column])
    assert same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert (ours[:, 0] + ours[:, 2]).max() <= height
    assert (ours[:, 1] + ours[:, 3]).max() <= width


@pytest.mark.parametrize("name", ["v1", "v2"])
def test_jitter_is_distributed_as_torchvisions(name):
    preset = PRESETS[name]
    published = T.ColorJitter(*jitter_ranges(preset))
    names = ("brightness", "contrast", "saturation", "hue")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        theirs = [
            T.ColorJitter.get_params(published.brightness, published.contrast, published.saturation, published.hue)
            for _ in range(DRAWS)
        ]
    ours = [dict(view.jitter) for view in draws_of(preset) if view.jitter]
    for index, factor in enumerate(names):
        assert same_distribution([view[factor] for view in ours], [their[index + 1] for their in theirs])
    first = [names.index(next(iter(view))) for view in ours]
    orders = {tuple(view) for view in ours}
    assert len(orders) == math.factorial(4)
    assert stats.chisquare(np.bincount(first, minlength=4)).pvalue > ALPHA


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_frequencies(name):
    preset = PRESETS[name]
    views = draws_of(preset)
    for share, probability in (
        (np.mean([view.jitter is not None for view in views]), preset.jitter_p),
        (np.mean([view.grey for view in views]), preset.grey_p),
        (np.mean([view.blur is not None for view in views]), preset.blur_p),
        (np.mean([view.flip for view in views]), preset.flip_p),
    ):
        assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / DRAWS)
    sigmas = [view.blur for view in views if view.blur is not None]
    if preset.blur_p:
        assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > ALPHA
    if preset.degrees:
        angles, shears = zip(*(view.affine for view in views), strict=True)
        assert stats.kstest(angles, stats.uniform(-preset.degrees, 2 * preset.degrees).cdf).pvalue > ALPHA
        assert stats.kstest(shears, stats.uniform(-preset.shear, 2 * preset.shear).cdf).pvalue > ALPHA


def test_draws_of_a_view_are_independent():
    preset = dataclasses.replace(PRESETS["v2"], jitter_p=1.0, blur_p=1.0, degrees=10.0, shear=10.0)
    preset = dataclasses.replace(preset, crop_scale=(0.2, 0.5))  # every attempt fits: no selection ties area to ratio
    rows = []
    for view in draws_of(preset, 400, 400):
        jitter = dict(view.jitter)
        i, j, h, w = view.box
        numbers = [jitter[name] for name in ("brightness", "contrast", "saturation", "hue")]
        rows.append([*numbers, view.blur, *view.affine, view.grey, view.flip, h * w, math.log(w / h)])
    correlation = np.corrcoef(np.array(rows, dtype=float).T) - np.eye(len(rows[0]))
    assert np.abs(correlation).max() < 5 / math.sqrt(DRAWS)


def test_a_view_takes_a_fixed_number_of_draws():
    for preset in PRESETS.values():
        one, other = np.random.default_rng(5), np.random.default_rng(5)
        draw(preset, 1, 900, one)
        draw(PRESETS["v2"], 64, 64, other)
        assert one.random() == other.random()


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(1, 1), (1, 400), (300, 2), (28, 28)])
def test_every_size_and_mode_gives_a_view(name, mode, size):
    image = photo(mode, size)
    for view in draws_of(PRESETS[name], *size, count=8):
        result = apply(image, view, 20)
        assert result.shape == (len(image.getbands()), 20, 20)
        assert result.dtype == torch.uint8
        assert result.is_contiguous()


def test_fallback_is_torchvisions_central_crop():
    preset = PRESETS["v2"]
    for size in [(1, 400), (400, 1), (2, 90)]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            expected = T.RandomResizedCrop.get_params(Image.new("L", size), [0.9, 1.0], [3 / 4, 4 / 3])
        wide = dataclasses.replace(preset, crop_scale=(0.9, 1.0))
        assert {view.box for view in draws_of(wide, *size, count=20)} == {expected}


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (64, 64), (256, 256), (257, 300), (90, 33)])
@pytest.mark.parametrize("size", [224, 96, 64])
def test_eval_view_equals_resize_and_centre_crop(mode, shape, size):
    image = photo(mode, shape)
    published = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])
    assert torch.equal(eval_view(image, size), pixels_of(published(image)))


def test_eval_view_takes_small_images_whole():
    image = photo("RGB", (32, 32))
    assert torch.equal(eval_view(image, 32), pixels_of(image))
    resized = image.resize((28, 28), Image.Resampling.BILINEAR)
    assert torch.equal(eval_view(image, 28), pixels_of(resized))
    assert eval_view(photo("L", (40, 31)), 28).shape == (1, 28, 28)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("turn", [0, 1, 2, 3])
@pytest.mark.parametrize("vflip", [False, True])
def test_turns_and_upside_down_are_those_of_pil(mode, turn, vflip):
    """The turn is anticlockwise; what is on the right comes to the top by one quarter."""
    image = photo(mode, (24, 24))
    found = apply(image, params(("crop", "vflip", "turn"), box=(0, 0, 24, 24), vflip=vflip, turn=turn), 24)
    by_hand = image.transpose(Image.Transpose.FLIP_TOP_BOTTOM) if vflip else image
    expected = by_hand.rotate(90 * turn) if turn else by_hand
    assert torch.equal(found, pixels_of(expected))
    if turn == 1 and not vflip:
        assert torch.equal(found[:, 0], pixels_of(image)[:, :, -1])


def test_frequencies_of_turns_and_flips_upside_down():
    preset = dataclasses.replace(PRESETS["v2"], order=(*PRESETS["v2"].order, "vflip", "turn"), vflip_p=0.3, turn_p=0.6)
    views = draws_of(preset)
    turns = np.bincount([view.turn for view in views], minlength=4)
    assert stats.chisquare(turns, [0.4 * DRAWS, *3 * [0.2 * DRAWS]]).pvalue > ALPHA
    assert stats.binomtest(sum(view.vflip for view in views), DRAWS, 0.3).pvalue > ALPHA
    both = np.corrcoef([[view.turn > 0, view.vflip, view.flip] for view in views], rowvar=False) - np.eye(3)
    assert np.abs(both).max() < 5 / math.sqrt(DRAWS)


# the first sixteen digits of a hash of 400 views' parameters, as they were before there were turns
BEFORE = {
    "v1": "f60f7b845a6d3935", "v2": "65dd945decbdfb8f", "v3": "c52ab844fe2a30c8", "v3-wide": "7687aa6405d6ad97",
    "cifar": "570b2f3110f7610e", "supcon": "b1c153e07bc9fd5e", "digits": "584d18d5bfcfcac8",
}  # fmt: skip


@pytest.mark.parametrize("name", BEFORE)
def test_draws_of_published_presets_do_not_move(name):
    digest = hashlib.sha256()
    for view, number in itertools.product((0, 1), range(200)):
        rng = np.random.default_rng(number)
        found = draw(PRESETS[name].of_view(view), 500 - number, 300 + number, rng)
        digest.update(repr(tuple(found)[:8]).encode())
        assert (found.vflip, found.turn) == (False, 0)
    assert digest.hexdigest()[:16] == BEFORE[name]


def test_a_preset_of_simclr_is_the_papers():
    """arXiv 2002.05709, appendix A: colours at strength 1, crops from 8 %, blur in half of the views."""
    preset = PRESETS["simclr"]
    assert (preset.brightness, preset.contrast, preset.saturation, preset.hue) == (0.8, 0.8, 0.8, 0.2)
    assert (preset.jitter_p, preset.grey_p, preset.blur_p, preset.flip_p) == (0.8, 0.2, 0.5, 0.5)
    assert (preset.crop_scale, preset.crop_ratio, preset.blur_sigma) == ((0.08, 1.0), (3 / 4, 4 / 3), (0.1, 2.0))


def test_probe_views():
    assert probe_preset(True).flip_p == 0.5
    assert probe_preset(False).flip_p == 0.0
    assert probe_preset(True).crop_scale == (0.08, 1.0)
    assert probe_preset(True).order == ("crop", "flip")


def test_wrong_presets():
    with pytest.raises(UserError, match="unknown augmentation preset v4: choose one of v1, v2, v3, v3-wide, cifar,"):
        get_preset("v4")
    with pytest.raises(ValueError, match="with one crop"):
        Preset(order=("flip",))
    with pytest.raises(ValueError, match="turn must come after crop"):
        Preset(order=("turn", "crop"))
    with pytest.raises(ValueError, match="operations are"):
        Preset(order=("crop", "solarise"))
