"""moco data show: the pixels of the run's own views, where they were cut, and what is said of the crops."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import moco.train.show as showing
from moco import cli, files
from moco.cli.data import parse_data
from moco.data import PRESETS, Preset, TwoViews, ViewParams, apply, get_preset, open_sources
from moco.data.__main__ import main
from moco.pictures import views as pictures
from moco.train.setup import open_batches


@pytest.fixture
def picture(monkeypatch, tmp_path):
    """``picture(*words)``: pixels of the picture, and its places."""
    places = {}
    drawn = pictures.draw

    def draw(*arguments):
        places.update(drawn(*arguments))
        return places

    monkeypatch.setattr(pictures, "draw", draw)

    def show(*words):
        places.clear()
        out = tmp_path / "out.png"
        assert main(["show", *map(str, words), "--out", str(out)]) == 0
        return np.asarray(Image.open(out).convert("RGB")), dict(places)

    return show


def tile(pixels, place, size):
    """The view, s x s x 3, in the picture."""
    times = pictures.factor(size)
    x, y = place
    return pixels[y : y + times * size, x : x + times * size][times // 2 :: times, times // 2 :: times]


def batch_of_the_run(words, epoch):
    """Views by (image, view) as main_pretrain.py's loader makes them."""
    args = cli.parse_pretrain([*map(str, words)])
    config = cli.pretrain.pretrain_config(args)
    sources = open_sources(args.dataset, args.data, channels=args.channels)
    batches = open_batches(sources, config.views, args.seed, args.batch_size, 0, args.drop_last)
    batches.sampler.set_position(epoch)
    found = {}
    for batch in batches.batches:
        more = batch["more"].unbind(1) if "more" in batch else ()
        for row, index in enumerate(batch["index"].tolist()):
            found |= {(index, number): views[row] for number, views in enumerate((batch["q"], batch["k"], *more))}
    return found


OWN = "preset: v3\nturn_p: 0.7\nvflip_p: 0.5\nsolarize_p: 0.3\n"
RUNS = {
    "a preset": ("--aug", "v2"),
    "a file": ("--aug", "mine.yml"),
    "on the device": ("--aug", "mine.yml", "--aug-device", "gpu"),
    "grey": ("--channels", 1, "--aug-plus"),
    "four views": ("--method", "simclr", "--views", 4),
    "large views": ("--size", 100, "--aug", "mine.yml"),
    "fast": ("--decode", "fast", "--crop-min", 0.5),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_pixels_are_those_of_the_runs_loader(name, picture, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yml").write_text(OWN)
    words = [image_folder, "-a", "test_resnet", "--seed", 5, "-b", 8, "--size", 24, *RUNS[name]]
    pixels, places = picture(*words, "--images", 4, "--draws", 2)
    size = 100 if name == "large views" else 24
    views = 4 if name == "four views" else 2
    assert set(places) == {(i, d, v) for i in range(4) for d in range(2) for v in range(views)}
    chosen = np.linspace(0, 23, 4).astype(int).tolist()
    for epoch in range(2):
        made = batch_of_the_run(words, epoch)
        for number, index in enumerate(chosen):
            for view in range(views):
                expected = made[index, view].expand(3, -1, -1).permute(1, 2, 0).numpy()
                assert np.array_equal(tile(pixels, places[number, epoch, view], size), expected)
    assert f"out.png: 4 images x 2 draws\n{8 * views} views of " in capsys.readouterr().out


def test_of_a_data_set_with_a_name_and_without_any(picture, capsys):
    for words in (("--dataset", "mnist5k", "--seed", 0), ()):
        pixels, places = picture(*words, "--images", 2, "--draws", 1)
        source = open_sources("mnist5k").pretrain
        own = TwoViews(source, PRESETS["digits"], 28, 0)
        for number, index in enumerate((0, 3999)):
            for view, name in enumerate(("q", "k")):
                expected = own[(0, index)][name].expand(3, -1, -1).permute(1, 2, 0).numpy()
                assert np.array_equal(tile(pixels, places[number, 0, view], 28), expected)
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("4 views of digits at 28 px, seed 0")
    assert said[-1].endswith(" pretrain")


@pytest.fixture
def twelve_bits(tmp_path):
    """A folder of images (20, 24, 5) of 12 bits in 16, and their values."""
    values = np.random.default_rng(0).integers(0, 4096, (8, 20, 24, 5), dtype=np.uint16)
    (tmp_path / "cells").mkdir()
    for number, one in enumerate(values):
        np.save(tmp_path / "cells" / f"{number}.npy", one)
    return tmp_path / "cells", values


def test_statistics_levels_and_what_auto_takes_are_the_runs(picture, twelve_bits, tmp_path, monkeypatch, capsys):
    folder, values = twelve_bits
    monkeypatch.chdir(tmp_path)
    drawn, words = pictures.draw, []
    monkeypatch.setattr(pictures, "draw", lambda *given: words.append(given[1:3]) or drawn(*given))
    picture(folder, "--levels", 0, 4095, "--stats", "auto", "--auto", "--images", 1, "--draws", 1)
    eight = np.rint(values / 4095 * 255) / 255
    mean, std = ("  ".join(f"{x:.4g}" for x in way(eight, axis=(0, 1, 2))) for way in (np.mean, np.std))
    title, (first, *_) = words[0]
    assert title == "Views by cifar at 32 px" and first.endswith(f"normalised by mean {mean}, std {std}")
    said = capsys.readouterr().out
    assert f"--stats auto: mean {mean.replace('  ', ' ')}, " in said and "--size 32 (default 224), --aug cifar" in said
    assert "nearly black" not in said and "nothing is known" not in said
    assert not list(tmp_path.glob("**/statistics-*"))


def test_a_picture_of_nearly_black_images_says_so_once(picture, twelve_bits, capsys):
    picture(twelve_bits[0], "--size", 24, "--images", 1)
    said = capsys.readouterr().out
    assert said.count("come out nearly black: give --levels 0 4095") == 1


def test_weights_that_a_run_begins_from_say_size_and_statistics(picture, image_folder, tmp_path, monkeypatch, capsys):
    own = {"stem": "imagenet", "size": 28, "channels": 3, "mean": [0.4] * 3, "std": [0.2] * 3}
    path, tensors = tmp_path / "own.pth.tar", {"module.encoder_q.conv1.weight": torch.zeros(64, 3, 7, 7)}
    files.write({"epoch": 1, "arch": "resnet18", "state_dict": tensors, "run": {"images": own}}, str(path))
    drawn, words = pictures.draw, []
    monkeypatch.setattr(pictures, "draw", lambda *given: words.append(given[1:3]) or drawn(*given))
    picture(image_folder, "--pretrained", path, "--images", 1)
    assert words[0][0] == "Views by v1 at 28 px" and "mean 0.4  0.4  0.4, std 0.2  0.2  0.2" in words[0][1][0]


def test_a_run_that_goes_on_has_the_seed_of_its_checkpoint(picture, image_folder, tmp_path, capsys):
    files.write({"epoch": 1, "arch": "resnet50", "state_dict": {}, "run": {"seed": 77}}, str(tmp_path / "own.pth.tar"))
    picture(image_folder, "--size", 24, "--images", 1, "--resume", tmp_path / "own.pth.tar", "--seed", 3)
    assert "seed 77\n" in capsys.readouterr().out
    picture(image_folder, "--size", 24, "--images", 1)
    assert "seed 0, as no --seed is given: a run without one draws its own" in capsys.readouterr().out


def test_an_unreadable_image_is_replaced_as_in_the_run(picture, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "data")
    source = open_sources(None, str(tmp_path / "data")).pretrain
    with open(source.name_of(0), "wb") as file:
        file.write(b"no picture")
    pixels, places = picture(tmp_path / "data", "--size", 24, "--images", 1, "--draws", 1, "--seed", 4)
    item = TwoViews(source, PRESETS["v1"], 24, 4)[(0, 0)]
    assert item["bad"] == 0
    assert np.array_equal(tile(pixels, places[0, 0, 0], 24), item["q"].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "order", [("crop",), ("flip", "crop"), ("affine", "crop"), ("vflip", "affine", "flip", "crop")]
)
def test_corners_are_where_the_crop_was_cut(order):
    """A view of a ramp of x and of y tells where its pixels come from."""
    y, x = np.mgrid[0:60, 0:80]
    ramps = np.stack([x * 3, y * 4, np.full_like(x, 255)], axis=2).astype(np.uint8)
    affine = (20.0, 10.0) if "affine" in order else None
    params = ViewParams(order, (20, 30, 20, 20), None, False, None, "flip" in order, affine, vflip="vflip" in order)
    view = apply(Image.fromarray(ramps), params, 20).numpy().astype(float)
    corners = showing.corners(params, (80, 60))
    for (row, column), corner in zip(((0, 0), (0, -1), (-1, -1), (-1, 0)), corners, strict=True):
        red, green, blue = view[:, row, column]
        assert blue > 200  # inside the image
        inward = corner + (corners.mean(axis=0) - corner) / 20  # of the middle of the pixel
        assert np.abs(np.array([red / 3, green / 4]) + 0.5 - inward).max() < 0.7


def test_what_was_drawn_in_words():
    params = ViewParams(
        ("affine", "crop", "jitter", "grey", "blur", "solarize", "flip", "vflip", "turn"), (0, 0, 9, 9),
        (("hue", -0.1), ("contrast", 1.25)), True, 0.5, True, (12.4, -3.0), True, True, 3,
    )  # fmt: skip
    assert ", ".join(showing.described(params)) == (
        "rotated +12\N{DEGREE SIGN}, sheared -3\N{DEGREE SIGN}, hue -36\N{DEGREE SIGN}, contrast 1.25, grey, "
        "blur 0.50 px, solarized, flipped, upside down, turned 270\N{DEGREE SIGN}"
    )
    nothing = ViewParams(("crop", "flip"), (0, 0, 9, 9), None, True, 0.5, False, None, True, True, 3)
    assert showing.described(nothing) == ()  # what the order leaves out is not made


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--aug v2", ""),
        ("--aug cifar", "of the crops keep less than 15 % of their image; --crop-min 0.15 (now 0.08)"),
        ("--aug cifar --crop-min 0.15", ""),
        ("--aug v2 --size 224", "a view of 224 px is made from "),
        ("--aug v2 --size 8", ""),
    ],
)
def test_crops_that_keep_little_are_said(words, sentence, picture, image_folder, capsys):
    more = () if "--size" in words else ("--size", 24)
    picture(image_folder, "--images", 2, "--draws", 1, *words.split(), *more)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(said) == bool(sentence)
    assert not sentence or sentence in said[0]


def test_sentences_on_crops():
    assert showing.few_of_image(0.0, PRESETS["v2"]) == ""
    assert "50 % of the crops" in showing.few_of_image(0.5, get_preset("v2 crop_scale=0.1,1"))
    narrow = showing.few_of_image(0.5, PRESETS["v2"])
    assert "these images are long and narrow: a wider crop_ratio" in narrow
    assert (
        showing.crop_words(np.array([0.081, 0.5, 1.0])) == "crops keep 8.1 % to 100 % of an image's area, median 50 %"
    )
    assert showing.pixel_warning(np.array([224.0**2]), 224) == ""
    assert "keeps 11 % of the pixels of its crop (median), and what is smaller than 3.0 pixels" in (
        showing.pixel_warning(np.array([96.0**2]), 32)
    )
    assert "from 16 x 16 pixels (median), enlarged 4.0 times" in showing.pixel_warning(np.array([16.0**2]), 64)


def test_the_numbers_are_of_the_runs_own_crops(image_folder):
    source = open_sources(None, str(image_folder)).pretrain
    views = TwoViews(source, Preset(order=("crop",), crop_scale=(0.3, 0.6)), 16, 9)
    kept, pixels, few = showing.crops(views, {2: (20, 20), 5: (20, 20)})
    assert len(kept) == len(pixels) == 2 * 2 * showing.EPOCHS
    assert 0.25 < kept.min() < 0.35 < 0.55 < kept.max() < 0.65
    assert np.allclose(kept * 400, pixels)
    assert few == 0
    assert showing.crops(TwoViews(source, get_preset("crop crop_scale=0.05,0.1"), 16, 9), {2: (20, 20)})[2] == 1
    _, _, h, w = views.drawn((20, 20), 0, 2)[1].box
    assert pixels[1] == h * w


def test_flags_are_those_of_a_pretraining(tmp_path, capsys):
    args = parse_data(["show", "DIR", "--aug", "v2", "--images", "2", "--seed", "3"])
    assert (args.command, args.data, args.rows, args.draws, args.out) == ("show", "DIR", 2, 3, "views.png")
    assert args.words == ["DIR", "--aug", "v2", "--seed", "3"]
    for words, sentence in ((["DIR", "--aug", "v9"], "--aug v9 is no preset"), (["DIR", "--images", "0"], "--images"),
                            (["DIR", "--imges", "2"], "unrecognized")):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            main(["show", *words])
        assert ended.value.code == 2
        assert sentence in capsys.readouterr().err
    assert main(["show", str(tmp_path / "gone")]) == 2
    assert main(["show", "--out", str(tmp_path / "a.png"), "--images", "400"]) == 2
    assert "choose fewer --images or --draws" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("size", [8, 28, 100, 168, 169, 224, 336, 337, 672, 673])
def test_every_pixel_of_a_view_has_as_many_of_the_picture(size):
    times = pictures.factor(size)
    assert (size * times if times > 0 else -(-size // -times)) <= pictures.MOST
    assert times >= 1 or size > pictures.MOST
    assert times <= 1 or size * (times + 1) > pictures.LEAST


def test_a_run_records_the_values_of_the_file(in_process, image_folder, tmp_path, capsys):
    words = "v2 crop_scale=0.5,1 turn_p=0.75"
    (tmp_path / "mine.yml").write_text("preset: v2\ncrop_scale: [0.5, 1.0]\nturn_p: 0.75\n")
    run = (image_folder, "-a", "test_resnet", "--size", 16, "-b", 8, "--moco-k", 16, "--workers", 0, "--knn-every", 0,
           "--aug", tmp_path / "mine.yml", "--save-dir", tmp_path / "run")  # fmt: skip
    assert in_process(*run, "--epochs", 1) == 0
    assert json.loads((tmp_path / "run" / "log_settings.json").read_text())["aug"] == words
    state = files.read(str(tmp_path / "run" / "checkpoint_0000.pth.tar"))
    assert state["run"]["flags"]["--aug"] == state["run"]["pretraining"]["recipe"]["--aug"] == words
    (tmp_path / "mine.yml").write_text("preset: v2\ncrop_scale: [0.5, 1.0]\nturn_p: 0.25\n")
    assert in_process(*run, "--epochs", 2, "--resume", "auto") == 0
    log = capsys.readouterr().out
    assert f"augmentation {words}" in log
    assert f"resumed with --aug {words.replace('0.75', '0.25')} (was {words})" in log
