"""What is said of recorded runs, healthy and ill, and by which flag each illness is to be mended."""

import json

import pytest
from conftest import ROOT

from moco.train.diagnoses import (
    COLLAPSE,
    FALSE,
    LEAK,
    STALE,
    STARVED,
    STILL,
    Diagnoses,
    Setting,
)

NAMES = ("loss_ratio", "top1", "feature_std", "old_mass", "synthetic_mass", "false_negatives", "wait_share",
         "eta_seconds")  # fmt: skip
FLAGS = {"lr": 0.06, "wd": 1e-4, "moco_m": 0.99, "moco_t": 0.1, "moco_k": 1024, "n_hard": 64, "negatives": "synco",
         "shuffle_bn": True, "bn_splits": None, "batch_size": 64, "knn_k": [200], "aug": "v1"}  # fmt: skip
# docs/experiments.md has the commands. In its file: reports as step, epoch and NAMES; validations as step and k-NN.
RUNS = json.loads((ROOT / "tests" / "train" / "recorded_runs.json").read_text(encoding="utf-8"))
OLDER = json.loads((ROOT / "docs" / "figures" / "normal_loss.json").read_text(encoding="utf-8"))
ILL = {
    "collapse": {COLLAPSE: 3}, "leak_b8": {LEAK: 1}, "leak_parts_of_two": {LEAK: 1}, "stale": {STALE: 8},
    "stuck": {STILL: 3}, "starved": {STARVED: 1}, "n_hard_32": {FALSE: 5}, "two_classes": {FALSE: 13},
}  # fmt: skip
OLDER_ILL = {"collapsed": {COLLAPSE: 3}, "leaking": {LEAK: 1}, "stale": {STALE: 14}}


def said_of(run: dict) -> dict[str, tuple[int, str]]:
    """What is said of a run: by diagnosis the epoch and the sentence."""
    flags = {**FLAGS, **run["setting"]["flags"]}
    watch = Diagnoses(Setting(**{**run["setting"], "flags": flags}, loader=lambda: "try -j 2 (now 0)."))
    reports = [(step, epoch, dict(zip(NAMES, values, strict=True))) for step, epoch, *values in run["reports"]]
    knn, found = dict(run["knn"]), {}
    for i, (step, epoch, values) in enumerate(reports):
        watch.report(epoch, {name: value for name, value in values.items() if value is not None})
        if i + 1 == len(reports) or reports[i + 1][1] != epoch:
            synthetic = flags["negatives"] != "moco" and epoch == flags.get("hard_start_epoch")
            watch.epoch_ended(epoch, step, synthetic)
        if step in knn:
            watch.validated(step, knn[step], lambda: run["untrained"])
        found |= {name: (epoch, words) for name, words in watch.told.items() if name not in found}
    return found


def older(name: str) -> dict:
    """A run of docs/normal_loss.md: without what was not recorded then."""
    run, start = OLDER[name], {"SynCo": 5, "MoCHi": 3}.get(name)
    columns = [dict(run.get(figure, [])) for figure in NAMES]
    reports = [[step, epoch, *(column.get(step) for column in columns)] for step, epoch in run["epoch"]]
    flags = {"hard_start_epoch": start, "negatives": "synco" if start else "moco"}
    unshuffled = name in ("leaking", "unshuffled, 8 parts")
    setting = {"total_steps": reports[-1][0], "chance": "ln(1+K)", "flags": flags, "may_leak": unshuffled, "guess": 10}
    return {"setting": setting, "reports": reports, "knn": run["knn"], "untrained": 55.1}


def epochs_of(said: dict[str, tuple[int, str]]) -> dict[str, int]:
    return {name: epoch for name, (epoch, _) in said.items()}


def test_each_recorded_illness_is_told_and_nothing_else():
    assert {name: epochs_of(said_of(RUNS[name])) for name in ILL} == ILL
    assert {name: epochs_of(said_of(older(name))) for name in OLDER_ILL} == OLDER_ILL


@pytest.mark.parametrize("name", sorted(RUNS.keys() - ILL.keys()))
def test_nothing_is_said_of_a_healthy_run(name):
    assert said_of(RUNS[name]) == {}


@pytest.mark.parametrize("name", sorted(OLDER.keys() - OLDER_ILL.keys()))
def test_nothing_is_said_of_a_healthy_run_of_the_documentation(name):
    assert said_of(older(name)) == {}
