"""What is said of recorded runs, healthy and ill, and by which flag each illness is to be mended."""

import json
import math
import re

import pytest
import torch
from conftest import ROOT, SYNCO, TINY, load, records

from moco.train import diagnoses
from moco.train.diagnoses import (
    ABOVE,
    CAUSES,
    COLLAPSE,
    DIAGNOSES,
    FALSE,
    LEAK,
    STALE,
    STARVED,
    STILL,
    Diagnoses,
    Setting,
    loader_advice,
)

NAMES = ("loss_ratio", "top1", "feature_std", "old_mass", "synthetic_mass", "false_negatives", "wait_share",
         "eta_seconds")  # fmt: skip
FLAGS = {"lr": 0.06, "wd": 1e-4, "moco_m": 0.99, "moco_t": 0.1, "moco_k": 1024, "n_hard": 64, "negatives": "synco",
         "shuffle_bn": True, "bn_splits": None, "batch_size": 64, "knn_k": [200], "aug": "v1"}  # fmt: skip
# docs/experiments.md has the commands. In its file: reports as step, epoch and NAMES; validations as step and k-NN.
RUNS = json.loads((ROOT / "tests" / "train" / "recorded_runs.json").read_text(encoding="utf-8"))
OLDER = json.loads((ROOT / "docs" / "figures" / "normal_loss.json").read_text(encoding="utf-8"))
ILL = {
    "collapse": {COLLAPSE: 3}, "simclr_collapse": {COLLAPSE: 1}, "leak_parts_of_two": {LEAK: 1},
    "leak_batches_of_two": {LEAK: 1}, "stale": {STALE: 8}, "stuck": {STILL: 3}, "moco_v3_lr_30": {STILL: 3},
    "shuffled_parts_of_two": {STILL: 3}, "starved": {STARVED: 1}, "n_hard_32": {FALSE: 5}, "two_classes": {FALSE: 13},
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


def test_the_sentences_name_what_was_seen_what_is_expected_and_a_flag_with_its_value():
    expected = {
        "collapse": ("feature_std is 0.0", "1 is even", "Lower --lr (here 0.3) or --wd (here 0.1)"),
        "leak_parts_of_two": ("top1 is 44 % already in epoch 1", "below 35", "leave out --no-shuffle-bn"),
        "leak_batches_of_two": ("top1 is 36 % already in epoch 1", "leave out --bn-splits (here 1)"),
        "shuffled_parts_of_two": ("BatchNorm sees 2 images at a time: try --bn-splits 1 (here none)", "(here 8)"),
        "stale": ("50 % is even", "Raise --moco-m (here 0.99) or lower --lr"),
        "stuck": ("54.5 to 53.8 %", "network has 55.1 %, guessing 10.0 %", "Nor has the loss", "--lr (here 1e-06)"),
        "moco_v3_lr_30": ("35.0 to 37.3 %", "Training has made the features worse: lower --lr (here 30)"),
        "n_hard_32": ("61 % of a query's 32 hardest", "by chance 10 %", "Raise --n-hard (here 32) to 410 or more"),
        "two_classes": ("69 % of a query's 64", "by chance 50 %", "no --n-hard (here 64) avoids it"),
        "starved": ("% of epoch 1", "a few percent are normal", "the bottleneck: try -j 2 (now 0)."),
    }
    for name, parts in expected.items():
        ((_, words),) = said_of(RUNS[name]).values()
        assert [part for part in parts if part not in words] == [], words


@pytest.mark.parametrize(("cause", "sign"), [(cause, sign) for sign, causes in CAUSES.items() for cause in causes])
def test_a_consequence_is_not_told(cause, sign):
    words = {name: name for name in (cause, sign)}
    assert Diagnoses(Setting()).fresh(words) == [min(words, key=DIAGNOSES.index)]
    watch = Diagnoses(Setting())
    assert [watch.fresh({name: name}) for name in (cause, sign, cause)] == [[cause], [], []]


def test_a_loss_above_chance_is_told_once_and_not_in_the_first_epoch():
    watch = Diagnoses(Setting(FLAGS, chance="ln(1+K)"))
    values = {"feature_std": 0.9, "loss_ratio": 1.7}
    assert watch.report(0, values) == [] == watch.report(1, {**values, "loss_ratio": 1.5})
    (words,) = watch.report(1, values)
    assert "1.70 of ln(1+K) in epoch 1" in words
    assert "--lr (here 0.06) or raise --moco-t (here 0.1)" in words
    assert list(watch.told) == [ABOVE]
    assert watch.report(2, values) == []


@pytest.mark.parametrize(
    ("flags", "cure"),
    [
        ({"shuffle_bn": False}, "leave out --no-shuffle-bn (here --shuffle-bn is off)"),
        ({"bn_splits": 1}, "leave out --bn-splits (here 1)"),
        ({"batch_size": 13}, "give a --batch-size that is a multiple of 8 (here 13)"),
    ],
)
def test_a_leak_is_mended_by_the_flag_that_made_it(flags, cure):
    for may_leak, top1, spread, said in ((True, 95.0, 0.9, True), (True, 50.0, 0.9, False), (False, 99.0, 0.1, False)):
        watch = Diagnoses(Setting({**FLAGS, **flags}, total_steps=100, may_leak=may_leak))
        watch.report(1, {"feature_std": spread, "loss_ratio": 0.5, "top1": top1})
        assert [cure in words for words in watch.epoch_ended(1, 10)] == [True] * said


def test_which_flag_feeds_a_starved_run():
    facts = {"gpu": True, "workers": 2, "cores": 2, "cache": True, "fast_decode": True}
    said = [loader_advice({**facts, "cores": 8})]
    for change in ({}, {"on_device": True}, {"cache": False}, {"fast_decode": False}):
        facts |= change
        said.append(loader_advice(facts))
    starts = ["try -j 8 (now 2)", "try --aug-device gpu (now cpu)", "try --cache DIR (now none)",
              "try --decode fast (now exact)", "all 2 cores load already"]  # fmt: skip
    assert [words.startswith(start) for words, start in zip(said, starts, strict=True)] == [True] * 5


def test_a_starved_run_that_soon_ends_is_left_alone():
    run = RUNS["starved"]
    soon = {**run, "reports": [[*values[:-1], 59.0] for values in run["reports"]]}
    assert (epochs_of(said_of(run)), said_of(soon)) == ({STARVED: 1}, {})


def test_the_untrained_network_is_measured_once_and_only_where_nothing_moves():
    asked = []

    def untrained() -> float:
        asked.append(watch.knn[-1])
        return 15.0

    for accuracies in ([20, 22, 24, 26, 28], [20, 21, 20, 22, 21, 20]):
        watch = Diagnoses(Setting(total_steps=100, guess=10))
        for i, knn in enumerate(accuracies):
            assert watch.validated(10 * i, knn, untrained) == []  # more than two points above the untrained network's
    assert asked == [22]  # of the second run, in its fourth validation


def test_votes_of_more_images_than_a_class_has():
    watch = Diagnoses(Setting(FLAGS, total_steps=100, guess=10, class_size=30))
    words = [watch.validated(25 * i, 10.0, lambda: 40.0) for i in range(4)]
    assert words[:3] == [[]] * 3
    assert "A class has 30 images to vote: lower --knn-k (here 200)" in words[3][0]


FALLING = [(0.9 - 0.02 * epoch, 5.0 + epoch, 0.3 + 0.01 * epoch) for epoch in range(10)]
STALE_QUEUE = [
    (0.95, 3, 0.4),
    (0.8, 12, 0.3),
    (0.81, 9, 0.35),
    (0.84, 7, 0.41),
    (0.84, 5, 0.39),
    (0.84, 5, 0.42),
    (0.9, 2, 0.5),
]


def told_by(curve: list[tuple[float, float, float]], early: int = 1, changes: tuple[int, ...] = ()) -> dict[int, str]:
    """What is said after which epoch of a run with these (loss_ratio, top1, old_mass), three log lines each."""
    watch, said = Diagnoses(Setting(FLAGS, total_steps=10 * (early + 1), chance="ln(1+K)")), {}
    for epoch, (loss, top1, mass) in enumerate(curve):
        for change in (-0.02, 0.0, 0.02):  # their mean counts
            values = {"loss_ratio": loss + change, "top1": top1, "old_mass": mass, "feature_std": 0.9}
            assert watch.report(epoch, values) == []
        for words in watch.epoch_ended(epoch, epoch + 1, epoch in changes):
            said[epoch] = words
    return said


def test_a_stale_queue_is_told_once_where_loss_top1_and_age_have_all_changed():
    assert list(told_by(STALE_QUEUE)) == [
        5
    ]  # before it top1 had not halved, or the old half was not heavier by a tenth
    words = told_by(STALE_QUEUE)[5]
    assert (
        "since epoch 1 the loss has risen from 0.800 to 0.840 of ln(1+K) and top1 has fallen from 12.0 to 5.0" in words
    )
    assert "its older half had 30 % of the softmax mass, now 42 %" in words
    assert "Raise --moco-m (here 0.99) or lower --lr." in words
    for name, even in ((0, 0.8), (1, 12), (2, 0.3)):  # each of the three alone says nothing
        assert told_by([(*p[:name], even, *p[name + 1 :]) for p in STALE_QUEUE]) == {}
    assert told_by(FALLING) == told_by(FALLING[::-1]) == {}
    assert list(told_by(STALE_QUEUE, early=2)) == [
        6
    ]  # epoch 2 is the easiest, compared with which 5 is not worse enough
    assert (
        told_by(STALE_QUEUE, changes=(3,)) == {}
    )  # what was before is forgotten, and since then the age has not changed
    assert told_by([(a, b, math.nan) for a, b, _ in STALE_QUEUE]) == {}  # no queue


def test_the_page_has_the_sentence_of_its_stale_run():
    page = (ROOT / "docs" / "normal_loss.md").read_text(encoding="utf-8")
    assert f"\nwarning: {said_of(older('stale'))[STALE][1]}\n" in page  # as that run's own log has it


# ------------------------------------------------------------------------------------------------ asked by a run


def warnings_of(folder) -> list[str]:
    """Those of the training; what is said of the flags stands before its first step."""
    found = (event for event in records(folder / "log_events.jsonl") if event["kind"] == "warning")
    return [event["text"] for event in found if event["step"]]


@pytest.fixture
def bound(monkeypatch):
    """Set bounds, all others to values that nothing exceeds: so little training has many illnesses."""

    def set_bounds(**bounds: float) -> None:
        silent = {"SPREAD": -9.0, "WORST": 9e9, "LEAKED": 9e9, "ALL": 9e9, "FALSE_SHARE": 9e9, "RISEN": -9e9,
                  "WAITED": 9e9, "RISE": 9e9}  # fmt: skip
        for name, value in (silent | bounds).items():
            monkeypatch.setattr(diagnoses, name, value)

    return set_bounds


@pytest.mark.parametrize(
    ("words", "bounds", "said"),
    [
        ([*SYNCO, "--hard-start-epoch", 2], {"RISE": -9.0, "FALL": 9e9, "AGE": -9.0}, "since epoch 1 the loss"),
        (["--method", "dcl"], {"RISE": -9.0, "FALL": 9e9, "AGE": -9.0}, None),
        (SYNCO, {"FALSE_SHARE": -9.0, "FALSE_MORE": -9.0}, r"of its own class in epoch \d \(by chance 50 %\)"),
        (["--method", "supcon"], {"FALSE_SHARE": -9.0, "FALSE_MORE": -9.0}, None),
        (["--bn-splits", "1"], {"LEAKED": -9.0, "NARROW": 9.0}, r"epoch 1 .*leave out --bn-splits \(here 1\)\.$"),
        ([], {"LEAKED": -9.0, "NARROW": 9.0}, None),
        ([], {"SPREAD": 9.0}, r"in epoch 1 .*Lower --lr \(here 0\.03\) or --wd \(here 0\.0001\)"),
        ([], {"WAITED": -9.0, "WORTH": -9.0}, r"for \d+ % of epoch 1 .*: (try -j \d+ \(now 0\)|all \d+ cores)"),
    ],
    ids=["stale", "no queue", "false negatives", "labels", "leak", "shuffled", "collapse", "starved"],
)
def test_a_run_asks_and_says_it_once(words, bounds, said, image_folder, tmp_path, in_process, bound):
    """With bounds that everything exceeds, so that it is said as soon as it may be."""
    bound(**bounds)
    first = TINY.index("--moco-k")
    flags = [*TINY[:first], *TINY[first + 2 :]] if "dcl" in words else TINY
    assert in_process(image_folder, *flags, *words, "--epochs", 4, "--save-dir", tmp_path) == 0
    found = warnings_of(tmp_path)
    assert len(found) == (said is not None)
    assert said is None or re.search(said, found[0]), found


def test_measuring_an_untrained_network_leaves_the_run_as_it_is(image_folder, tmp_path, in_process, bound, monkeypatch):
    given = []
    monkeypatch.setattr("moco.train.pretraining.Diagnoses", lambda setting: Diagnoses(given.append(setting) or setting))
    for risen in (-9e9, 9e9):  # never asked; in the fourth validation
        bound(RISEN=risen, POINTS=9e9)
        words = [*TINY, *SYNCO, "--knn-every", 1, "--epochs", 5, "--save-dir", tmp_path / f"{risen:g}"]
        assert in_process(image_folder, *words) == 0
    never, asked = (tmp_path / f"{risen:g}" for risen in (-9e9, 9e9))
    assert warnings_of(never) == []
    (said,) = warnings_of(asked)
    assert re.match(r"k-NN accuracy has hardly moved in 4 validations, .* network has [\d.]+ %, guessing 50\.0 %", said)
    one, other = (load(folder / "checkpoint_0004.pth.tar")["state_dict"] for folder in (never, asked))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    setting = given[0]
    assert (setting.alike, setting.guess, setting.class_size, setting.together) == (0.5, 50.0, 12.0, 2)
    assert (setting.may_leak, setting.total_steps, setting.chance) == (False, 15, "ln(1+K)")
