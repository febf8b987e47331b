"""Differences to a baseline, seed by seed: which settings are compared, and the numbers in the table."""

from __future__ import annotations

import json
import os
import statistics

import pytest
import yaml
from conftest import ROOT

from moco import cli
from moco.cli.methods import drawn
from moco.errors import UserError
from moco.sweep import report, spec, trial

OPEN = {"method": ["moco", "moco", "synco"], "lr": [1, 2, 3]}
FIGURES = {"moco": [90.0, 93.0, 91.0], "synco": [90.5, 93.3, 91.1], "mochi": [89.0, 93.5, 91.0]}


@pytest.fixture
def made(tmp_path):
    """A spec over a script, checked; nothing runs."""
    script = tmp_path / "train.py"
    script.write_text("")

    def make(**entries) -> spec.Spec:
        whole = {"main": str(script), "out": str(tmp_path / "out"), "report": {"metrics": ["test"]}, "seeds": 3}
        (tmp_path / "spec.yml").write_text(yaml.safe_dump({**whole, **entries}, sort_keys=False))
        return spec.read_spec(str(tmp_path / "spec.yml"))

    return make


def pretend(item: spec.Trial, **result: float) -> None:
    os.makedirs(item.folder, exist_ok=True)
    with open(os.path.join(item.folder, trial.RESULT), "w") as file:
        json.dump(result, file)


def table(text: str) -> list[dict[str, str]]:
    """The rows of the one table, by its head."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


def test_the_table_has_mean_and_deviation_of_the_differences_by_seed(made):
    sweep = made(grid={"method": list(FIGURES)}, baseline={"method": "moco"}, report={"metrics": ["test", "mass"]})
    for item in sweep.trials(sweep.report):
        pretend(item, test=FIGURES[item.settings["method"]][item.seed], mass=0.1)
    moco, synco, mochi = table(report.markdown(sweep, sweep.settings))
    assert moco == {
        "method": "moco", "test": "91.33 ± 1.53", "test minus method moco": "", "mass": "0.10 ± 0.00",
        "mass minus method moco": "",
    }  # fmt: skip
    gains = [0.5, 0.3, 0.1]
    assert statistics.stdev(gains) == pytest.approx(0.2)
    assert synco["test minus method moco"] == "+0.30 ± 0.20"
    assert mochi["test minus method moco"] == f"-0.17 ± {statistics.stdev([-1, 0.5, 0]):.2f}"
    assert mochi["mass minus method moco"] == "+0.00 ± 0.00"
    said = "over 3 seeds, also of the differences to method moco, each between two runs of one seed; nothing was sel"
    assert said in report.markdown(sweep, sweep.settings)


def test_a_seed_that_one_of_the_two_lacks_is_in_no_difference(made):
    sweep = made(grid={"method": ["moco", "synco"]}, baseline={"method": "moco"})
    for item in sweep.trials(sweep.report):
        if (item.settings["method"], item.seed) not in (("moco", 0), ("synco", 2)):
            pretend(item, test=FIGURES[item.settings["method"]][item.seed])
    _, synco = table(report.markdown(sweep, sweep.settings))
    assert synco["test minus method moco"] == "+0.30 (1 of 3 seeds)"


def test_of_several_baselines_a_setting_is_compared_with_the_one_that_is_otherwise_alike(made):
    sweep = made(grid={"method": ["moco", "synco"], "lr": [0.1, 0.2]}, baseline={"method": "moco"}, seeds=1)
    for item in sweep.trials(sweep.report):
        pretend(item, test={"moco": 50, "synco": 51}[item.settings["method"]] + 10 * item.settings["lr"] ** 2)
    found = {(row["method"], row["lr"]): row for row in table(report.markdown(sweep, sweep.settings))}
    assert {row["test minus method moco"] for key, row in found.items() if key[0] == "synco"} == {"+1.00"}
    assert {row["test minus method moco"] for key, row in found.items() if key[0] == "moco"} == {""}


def test_with_a_selection_each_groups_own_setting_is_compared(made):
    """The baseline's best rate is another one than the method's."""
    sweep = made(
        grid={"method": ["moco", "synco"], "lr": [1, 2]}, baseline={"method": "moco"}, group_by=["method"], seeds=2,
        select={"metric": "val"},
    )  # fmt: skip
    assert sweep.select
    for item in sweep.trials(sweep.select):
        best = {"moco": 1, "synco": 2}[item.settings["method"]]
        tests = 70 + 10 * item.settings["lr"] + 0.5 * item.seed * (item.settings["method"] == "synco")
        pretend(item, val=float(item.settings["lr"] == best), test=tests)
    rows = table(report.markdown(sweep, report.selected(sweep)))
    gains = {(row["method"], row["lr"]): row["test minus method moco"] for row in rows}
    assert gains == {("moco", "1"): "", ("moco", "2"): "", ("synco", "1"): "", ("synco", "2"): "+10.25 ± 0.35"}


def test_without_a_baseline_the_table_is_as_it_was(made):
    sweep = made(grid={"method": ["moco", "synco"]})
    text = report.markdown(sweep, sweep.settings)
    assert list(table(text)[0]) == ["method", "test"]
    assert "differences" not in text


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"baseline": "moco"}, "baseline must be lines of NAME: VALUE, not moco"),
        ({"baseline": {"model": "moco"}}, "baseline model is neither in grid nor in paired: name one of their"),
        ({"baseline": {"method": "byol"}}, "baseline method byol is no setting of grid and paired"),
        ({"baseline": {"lr": 1}, "select": {"metric": "val"}, "group_by": ["method"]}, "add lr to group_by"),
        (
            {"baseline": {"method": "moco"}, "grid": {}, "paired": OPEN},
            "baseline method moco fits 2 settings, and it is open which of them method synco, lr 3 is compared with",
        ),
    ],
)
def test_a_baseline_that_cannot_be_used_costs_one_sentence(made, entries, words):
    with pytest.raises(UserError, match=words):
        made(**{"grid": {"method": ["moco", "synco"], "lr": [1, 2]}, **entries})


def test_the_controls_have_as_many_negatives_as_the_methods():
    """The published sweep: MoCo without, all others with one number of extra negatives from one number of rows."""
    made = spec.read_spec(str(ROOT / "configs" / "sweeps" / "controls.yml"))
    trials = [cli.parse_pretrain(item.command[1:]) for item in made.trials(made.report)]
    assert len({args.save_dir for args in trials}) == 6 * 3
    kinds = [(args.method, args.control) for args in trials]
    assert set(kinds) == {
        ("moco", None), ("synco", "random"), ("synco", "hardest"), ("synco", "reweight"), ("mochi", None),
        ("synco", None),
    }  # fmt: skip
    assert {sum(drawn(args).values()) for args in trials if args.method == "moco"} == {0}
    assert {(sum(drawn(args).values()), args.n_hard) for args in trials if args.method != "moco"} == {(240, 256)}
    assert all(made.baseline_of(s, made.settings) == made.settings[0] for s in made.settings[1:])
