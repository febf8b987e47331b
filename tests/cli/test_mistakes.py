"""A mistaken word is named, alone, with what is close to it; a flag that the method does not look at is said."""

import pytest

from moco import cli
from moco.cli import commands


def refused(parse, words, capsys) -> str:
    with pytest.raises(SystemExit) as caught:
        parse(words.split())
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--flag-misspelled 3 DIR", "unrecognized arguments: --flag-misspelled 3 (--help"),
        ("DIR --flag-misspelled 3", "unrecognized arguments: --flag-misspelled 3 (--help"),
        ("--moco-kk 3 DIR", "unrecognized arguments: --moco-kk 3; did you mean --moco-k? "),
        ("--moco_dimm=3 DIR", "unrecognized arguments: --moco-dimm=3; did you mean --moco-dim? "),
        ("--epoch 3 DIR", "unrecognized arguments: --epoch 3; did you mean --epochs? "),
        ("DIR OTHER", "unrecognized arguments: OTHER; one DIR is read (--help"),
        ("--dataset cifar-10 DIR", "; did you mean cifar10? "),
        ("--dataset CIFAR100 DIR", "; did you mean cifar100? "),
        ("--dataset imagenet DIR", "; images of your own are given as DIR, without --dataset "),
        ("--method synko DIR", "; did you mean synco? "),
        ("--amp bf-16 DIR", "; did you mean bf16? "),
    ],
)
def test_a_mistaken_word_is_named_with_what_is_close(words, told, capsys):
    assert told in refused(cli.parse_pretrain, words, capsys)


def test_a_flag_is_not_named_after_the_images(tmp_path, monkeypatch, capsys):
    """argparse takes what stands behind an unknown switch for DIR, and then complains about DIR."""
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    told = refused(cli.parse_lincls, "--konfusion images", capsys)
    assert "unrecognized arguments: --konfusion; did you mean --confusion? " in told


def test_what_is_missing_is_said(capsys):
    assert "give a checkpoint, and an image folder or --dataset NAME. " in refused(commands.parse_embed, "", capsys)
    told = refused(commands.parse_retrieval, "x.pth", capsys)
    assert "an image folder or --dataset NAME behind the checkpoint x.pth. " in told


@pytest.mark.parametrize(
    ("words", "notes"),
    [
        ("--method simclr --no-shuffle-bn", ["--no-shuffle-bn"]),
        ("--method simclr --head-precision fp32 --moco-m 0.9", ["--moco-m", "--head-precision"]),
        ("--method moco_v3 --check-every 5 --moco-m 0.9", ["--check-every"]),
        ("--method moco --beta 0.3", ["--beta"]),
        ("--method moco --no-shuffle-bn --head-precision fp32 --moco-m 0.9", []),
        ("--method synco --n-hard 5 --sigma 0.1", []),
        ("--method hcl --beta 0.3 --tau-plus 0.2 --estimator easy", []),
        ("--method supcon --moco-k 128 --moco-m 0.9 --beta 2", ["--beta"]),
    ],
)
def test_a_flag_without_effect_is_said_in_a_line(words, notes):
    method = words.split()[1]
    told = cli.parse_pretrain([*words.split(), "DIR"]).notes
    assert told == [f"warning: {flag} has no effect with --method {method}" for flag in notes]


def test_flags_of_synthetic_negatives_that_nothing_uses_are_named_together():
    told = cli.parse_pretrain(["--method", "moco", "--n-hard", "5", "--sigma", "0.1", "DIR"]).notes
    assert told == [
        "warning: --n-hard, --sigma do nothing: --method moco makes no synthetic negatives; to make some, give "
        "--method synco, or --mochi N S S2"
    ]
    told = cli.parse_pretrain(["--method", "mochi", "--n-hard", "5", "DIR"]).notes
    assert told == ["warning: --n-hard does nothing: MoCHi has three numbers, --mochi N S S2"]
