"""--control: where it goes, where it is refused or dropped, and what files say of a run that was a control."""

import pytest
import torch
from conftest import SYNCO, TINY, load, records

from moco import cli
from moco.cli.pretrain import pretrain_config
from moco.eval.mined.queue_run import open_queue
from moco.weights.layouts import open_file
from moco.weights.origin import described, pretraining_of

APART = "leave --type-starts out, or take --control hardest"
NO_NEGATIVES = "takes the place of synthetic negatives, and this run has none; give --method synco, or --mochi N S S2"


@pytest.mark.parametrize(
    ("words", "control"),
    [
        ("--method synco", None),
        ("--n1 4 --control none", None),
        ("--n1 4 --control random", "random"),
        ("--mochi 8 4 2 --control hardest", "hardest"),
        ("--method supcon --moco-k 64 --mochi 8 4 2 --control reweight", "reweight"),
        ("--mochi 8 4 2 --control hardest --type-starts mixup=12", "hardest"),
        ("--mochi 8 4 2 --control reweight --type-starts mixup=12 interpolation=12", "reweight"),
        ("--mochi 8 4 0 --control reweight --type-starts mixup=12", "reweight"),
    ],
)
def test_the_control_of_a_run(words, control):
    args = cli.parse_pretrain(["DIR", *words.split()])
    assert args.control == control
    assert pretrain_config(args).model.negatives.control == control  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--control random", f"--control random {NO_NEGATIVES}"),
        ("--control hardest --method simclr", f"--control hardest {NO_NEGATIVES}"),
        ("--control hardest --method moco", NO_NEGATIVES),
        ("--control reweight --mochi 8 0 0", NO_NEGATIVES),
        ("--control reweight --mochi 8 4 2 --type-starts mixup=12", APART),
        ("--control reweight --n1 4 --type-starts noise=12steps", APART),
        ("--control random --mochi 9 4 2 --moco-k 8", "--n-hard 9 is more than the queue's 8 rows; lower it."),
        ("--control weights --n1 4", "(choose from "),
    ],
)
def test_a_control_of_nothing_is_one_sentence(words, sentence, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.parse_pretrain(["DIR", *words.split()])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.count("\n") == 1


def test_a_files_control_goes_with_its_method(tmp_path, capsys):
    file = tmp_path / "control.yml"
    file.write_text("n1: 4\ncontrol: hardest\n")
    assert cli.parse_pretrain(["--config", str(file), "DIR"]).control == "hardest"
    assert cli.parse_pretrain(["--config", str(file), "--control", "none", "DIR"]).control is None
    assert cli.parse_pretrain(["--config", str(file), "--method", "mochi", "DIR"]).control == "hardest"
    args = cli.parse_pretrain(["--config", str(file), "--method", "moco", "DIR"])
    assert (args.control, args.notes) == (
        None, ["the file's --control hardest is dropped: there are no synthetic negatives"],
    )  # fmt: skip
    file.write_text("control: hardest\n")
    with pytest.raises(SystemExit):
        cli.parse_pretrain(["--config", str(file), "DIR"])
    assert NO_NEGATIVES in capsys.readouterr().err


@pytest.mark.parametrize("control", ["random", "hardest", "reweight"])
def test_a_run_says_its_control_wherever_it_is_described(control, image_folder, tmp_path, in_process, capsys):
    words = [image_folder, *TINY, *SYNCO, "--control", control, "--save-dir", tmp_path]
    assert in_process(*words, "--epochs", 2) == 0
    copied = {
        "random": "random queue rows",
        "hardest": "its 8 hardest queue rows, drawn",
        "reweight": "its 6 hardest queue",
    }[control]  # 18 negatives of 8 rows: three copies each of six
    assert f"noise 2, perturbation 2, adversarial 2) 18 copies per query of {copied}" in capsys.readouterr().out
    assert 0 < [entry["synthetic_mass"] for entry in records(tmp_path / "log.jsonl")][-1] < 1
    path = str(tmp_path / "checkpoint_0001.pth.tar")
    file = open_file(path)
    said = described(pretraining_of(file, {}).value)
    assert said.startswith("synco ")
    assert f" --n6 2 --sigma 0.01 --delta 0.01 --eta 0.01 --extrapolation code --control {control} " in said
    run = open_queue(path)
    assert run.negatives(None, None) == ("", (), 8)  # it has none of SynCo's
    assert [row.count for row in run.negatives("synco", None)[1]] == [4, 4, 4, 2, 2, 2]
    assert in_process(*words, "--epochs", 3, "--resume", "auto") == 0
    told = capsys.readouterr()
    assert "resumed with --epochs 3 (was 2)" in told.out
    assert load(tmp_path)["run"]["flags"]["--control"] == control


@pytest.mark.parametrize("older", [False, True], ids=["with the flag", "of before the flag"])
def test_a_run_cannot_become_a_control(older, image_folder, tmp_path, in_process, capsys):
    words = [image_folder, *TINY, *SYNCO, "--save-dir", tmp_path]
    assert in_process(*words, "--epochs", 1) == 0
    if older:
        state = load(tmp_path)
        del state["run"]["flags"]["--control"]
        torch.save(state, tmp_path / "checkpoint_0000.pth.tar")
    capsys.readouterr()
    assert in_process(*words, "--epochs", 2, "--resume", "auto", "--control", "random") == 2
    assert "is of a run with --control none and this one has random: give the same" in capsys.readouterr().err
    assert in_process(*words, "--epochs", 2, "--resume", "auto") == 0


def test_hardest_of_unmixed_negatives_trains_as_the_method(image_folder, tmp_path, in_process):
    """SynCo with steps of length 0 is its own control: the same rows, to the rounding of another formula."""
    own = ["--n-hard", 8, "--warmup-epochs", 0, "--n5", 6, *(f"--n{i}=0" for i in (1, 2, 3, 4, 6)), "--delta", 0]
    losses = []
    for name, more in {"method": [], "control": ["--control", "hardest"]}.items():
        words = [image_folder, *TINY, *own, *more, "--epochs", 1, "--save-dir", tmp_path / name]
        assert in_process(*words) == 0
        losses.append([entry["loss"] for entry in records(tmp_path / name / "log.jsonl")])
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
