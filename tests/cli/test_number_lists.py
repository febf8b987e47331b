"""Numbers with commas behind any flag that takes several, and a DIR behind them."""

import pytest

from moco.cli import parse_lincls, parse_pretrain


@pytest.mark.parametrize(
    "words",
    ["--schedule 120,160 DIR", "--schedule 120 160 DIR", "--schedule 120, 160 DIR", "--schedule 120 ,160 DIR",
     "--schedule=120,160 DIR", "--schedule [120,160] DIR", "--schedule [120, 160] DIR", "--schedule ( 120 , 160 ) DIR",
     "DIR --schedule 120,160", "--schedule 120,160, DIR --epochs 200", "--schedule=120 160 DIR"],
)  # fmt: skip
def test_a_schedule(words):
    args = parse_pretrain(words.split())
    assert (args.schedule, args.data) == ([120, 160], "DIR")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--mean 0.5,0.5,0.5 --std 1,1,1", "mean", [0.5] * 3),
        ("--mean [0.5, 0.4, 0.3] --std .1,.2,.3", "mean", [0.5, 0.4, 0.3]),
        ("--mean=(-0.5,0.5,1e-3) --std 1 1 1", "mean", [-0.5, 0.5, 0.001]),
        ("--mean -0.5,-0.25,0 --std 1 1 1", "mean", [-0.5, -0.25, 0]),
        ("--knn-k 20,200", "knn_k", [20, 200]),
        ("--mochi 4,2,1 --method mochi", "mochi", [4, 2, 1]),
    ],
)
def test_other_lists_of_a_pretraining(words, name, value):
    args = parse_pretrain([*words.split(), "DIR"])
    assert (getattr(args, name), args.data) == (value, "DIR")


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [("--few-shot --few-shot-shots 1,5", "few_shot_shots", [1, 5]), ("--lr 30,10,3", "lrs", [30.0, 10.0, 3.0]),
     ("--schedule 60,80", "schedule", [60, 80])],
)  # fmt: skip
def test_lists_of_a_probe(words, name, value):
    args = parse_lincls(["--pretrained", "x", *words.split(), "DIR"])
    assert (getattr(args, name), args.data) == (value, "DIR")


def test_a_configuration_file_may_write_them_too(tmp_path):
    path = tmp_path / "c.yml"
    path.write_text("schedule: 120,160\nmean: '0.5, 0.5, 0.5'\nstd: [1, 1, 1]\n")
    args = parse_pretrain(["--config", str(path), "DIR"])
    assert (args.schedule, args.mean, args.std) == ([120, 160], [0.5] * 3, [1.0] * 3)


@pytest.mark.parametrize(("words", "flag"), [
    ("--schedule 120,x DIR", "--schedule 120,x: write numbers, such as --schedule 1 2"),
    ("--schedule 1.5,2 DIR", "--schedule"), ("--knn-k 0,5 DIR", "--knn-k must be at least 1"),
    ("--mean 0.5;0.5 DIR", "--mean"), ("--std=0,1,1 DIR", "--std must be a number above 0"),
])  # fmt: skip
def test_an_error_in_a_list_names_its_flag(words, flag, capsys):
    with pytest.raises(SystemExit):
        parse_pretrain(words.split())
    assert flag in capsys.readouterr().err


def test_a_folder_whose_name_begins_as_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2020,summer").mkdir()
    args = parse_pretrain(["--schedule", "120,160", "2020,summer"])
    assert (args.schedule, args.data) == ([120, 160], "2020,summer")
