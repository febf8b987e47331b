"""The levels and statistics of a run go with its file: to a probe, an encoder, an export and a resumed run."""

import contextlib
import io
import json
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import TINY, load
from support.odd_pixels import folder_of, saved

import main_lincls
import moco
from moco import cli
from moco.cli import commands
from moco.data import channel_statistics_of, eval_view, open_sources
from moco.data.sources.values import Levels, levels_of
from moco.errors import UserError
from moco.schema import LEVELS
from moco.weights.export import run_export
from moco.weights.settings import settle_from_file

pytestmark = pytest.mark.usefixtures("restored")


def images_at(path, kind: str):
    """Class folders of noise: 12 bits in 16, or floats in 0..1."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name in "ab":
            noise = rng.integers(0, 4096, (count, 20, 20))
            files = [saved(v.astype("u2") if kind == "12" else (v / 4095).astype("f4"), "TIFF") for v in noise]
            folder_of(path / split / name, *files)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Images and the folder of a run of one epoch, for both kinds."""
    import main_pretrain

    torch.set_num_threads(1)
    found = {}
    for kind, flags in (("12", ["--levels", "0", "4095"]), ("float", [])):
        images, out = images_at(tmp_path_factory.mktemp(kind) / "images", kind), tmp_path_factory.mktemp("run")
        words = [*TINY, "--epochs", "1", "--stats", "auto", "--save-dir", str(out), *flags, str(images)]
        with contextlib.redirect_stdout(io.StringIO()) as log:
            assert main_pretrain.worker(cli.parse_pretrain(words)) == 0
        (out / "said.txt").write_text(log.getvalue())
        found[kind] = images, out
    return found


@pytest.mark.parametrize(("kind", "levels"), [("12", [0, 4095]), ("float", [0, 1, "float"])])
def test_a_checkpoint_says_them(made, kind, levels):
    images, out = made[kind]
    run = load(out)["run"]
    assert run["images"]["levels"] == run["data"]["levels"] == levels
    source = open_sources(None, str(images), levels=levels).pretrain
    mean, std, _ = channel_statistics_of(source)
    assert run["images"]["mean"] == pytest.approx(mean, abs=1e-6)
    assert run["images"]["std"] == pytest.approx(std, abs=1e-6)
    assert run["flags"]["--mean"] == pytest.approx(mean, abs=1e-6)
    (line,) = [line for line in (out / "said.txt").read_text().splitlines() if "--stats auto" in line]
    assert line.startswith(f"--stats auto: mean {mean[0]:.4g} ")
    assert line.endswith(" of 12 images")
    assert len([*out.glob("statistics-*.json")]) == 1


@pytest.mark.parametrize(("kind", "levels"), [("12", [0, 4095]), ("float", [0, 1, "float"])])
def test_an_evaluation_and_an_encoder_take_them(made, kind, levels, tmp_path):
    images, out = made[kind]
    words = ["--pretrained", str(out), "--knn", "-j", "0", "-b", "8", "--save-dir", str(tmp_path), str(images)]
    args = cli.parse_lincls(words)
    assert main_lincls.worker(args) == 0
    assert args.levels == levels
    encoder = moco.load_encoder(out)
    assert encoder.levels == levels
    path = images / "val" / "a" / "000.png"
    source = open_sources(None, str(images), levels=levels).val
    assert source is not None
    assert torch.equal(encoder.transform(path), eval_view(source.load(0), encoder.size))
    assert encoder.transform(path).float().mean() > 100
    own = moco.load_encoder(out, levels=(0, 65535))
    assert own.transform(path).float().mean() < 10


def test_a_typed_range_wins_and_is_told(made):
    images, out = made["12"]
    words = ["--pretrained", str(out), "--levels", "0", "255", str(images)]
    args = cli.parse_lincls(words)
    settled = settle_from_file(args, args.pretrained)
    assert args.levels == [0, 255]
    assert any("--levels 0 255 differs from the 0 4095 that" in text for text in settled.warnings)


def test_an_export_says_them(made, tmp_path):
    out = tmp_path / "encoder.features.pt"
    run_export(commands.export_parser().parse_args([str(made["12"][1]), "--to", "features", "--out", str(out)]))
    card = json.loads((tmp_path / "encoder.features.json").read_text())
    assert card["levels"] == [0, 4095]
    assert "--levels 0.0 4095.0" in card["command"]
    again = Namespace(arch=None, stem="auto", size=None, channels=None, mean=None, std=None, dataset=None)
    settle_from_file(again, str(out))
    assert again.levels == [0, 4095]


def test_a_resumed_run_takes_the_checkpoints_statistics_and_says_other_levels(made, tmp_path, in_process, capsys):
    images, out = made["12"]
    path = next(iter(out.glob("checkpoint_*")))
    flags = [*TINY, "--epochs", "2", "--resume", path, "--save-dir", tmp_path, "--stats", "auto"]
    assert in_process(*flags, "--levels", 0, 2047, images) == 0
    log = capsys.readouterr().out
    assert "--stats auto: mean and std of the checkpoint" in log
    assert "--levels 0 2047 (was 0 4095)" in log
    assert load(tmp_path)["run"]["images"]["mean"] == load(out)["run"]["images"]["mean"]
    assert not [*tmp_path.glob("statistics-*.json")]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--levels 5 5", "LOW becomes black and HIGH white"),
        ("--levels 4095 0", "LOW becomes black and HIGH white"),
        ("--stats auto --mean 0.5 0.5 0.5", "--stats auto computes what --mean and --std say; give one of them"),
        ("--stats auto --std 0.5", "--stats auto computes what --mean and --std say; give one of them"),
        ("--levels 0 nan", "finite"),
    ],
)
def test_what_contradicts_itself_is_a_sentence(words, text, capsys):
    with pytest.raises((UserError, SystemExit)) as refused:
        cli.parse_pretrain(["DIR", *words.split()])
    assert text in f"{refused.value} {capsys.readouterr().err}"


def test_negative_levels_are_numbers():
    assert cli.parse_pretrain(["DIR", "--levels", "-1024", "3071"]).levels == [-1024, 3071]
    assert cli.parse_pretrain(["--levels", "-1", "1", "DIR"]).levels == [-1, 1]


@pytest.mark.parametrize("plain", [None, [1], [1, 1], [2, 1], ["0", 1], [0, float("nan")], [0, 1, "floats"], 3])
def test_damaged_levels_are_refused(plain):
    assert not LEVELS.fits(plain)


def test_plain_levels_come_back():
    found = [levels_of((0, 1)), levels_of([0.0, 1.0, "float"])]
    assert [levels.plain() for levels in found if levels] == [[0.0, 1.0], [0.0, 1.0, "float"]]
    assert levels_of(None) is None
    assert levels_of(Levels(0, 4095)) == Levels(0, 4095)


def test_an_export_of_a_run_without_levels_has_none(image_folder, tmp_path, in_process):
    assert in_process(*TINY, "--epochs", 1, "--save-dir", tmp_path / "run", image_folder) == 0
    assert "levels" not in load(tmp_path / "run")["run"]["images"]
    words = [str(tmp_path / "run"), "--to", "features", "--out", str(tmp_path / "e.pt")]
    run_export(commands.export_parser().parse_args(words))
    card = json.loads((tmp_path / "e.json").read_text())
    assert "levels" not in card
    assert "--levels" not in card["command"]
