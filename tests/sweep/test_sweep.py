"""Sweeps: what runs and how often, what is selected and on what, what is left after a kill, each mistake's sentence."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, differences, load, records
from PIL import Image

import main_lincls
import main_semisup
from moco import cli
from moco.data import open_sources
from moco.errors import UserError
from moco.eval import linear as probe
from moco.sweep import figures, pool, report, spec, trial
from moco.sweep.__main__ import main

# An entry point without torch: it keeps the contract (--save-dir, --resume auto, --seed, result.json, SIGTERM), counts
# its starts and says what it saw. Its validation figure is best at lr 3, its test figure at lr 1.
FAKE = """
import argparse, json, math, os, signal, sys, time
p = argparse.ArgumentParser()
p.add_argument("data", nargs="?")
for name in ("percent", "epochs", "wait"):
    p.add_argument("--" + name, type=float, default=0)
p.add_argument("--lr", type=float, nargs="+", default=[1.0])
p.add_argument("--die", type=float, nargs="*", default=[])
for name in ("save-dir", "resume", "seed", "marker", "pretrained"):
    p.add_argument("--" + name, default="")
for name in ("val-only", "poison", "log-only", "nan"):
    p.add_argument("--" + name, action="store_true")
a = p.parse_args()
inside = lambda name: os.path.join(a.save_dir, name)
def stop(*_):
    open(inside("checkpoint"), "w").write("saved")
    print("saved", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
assert a.resume == "auto"
resumed = os.path.exists(inside("checkpoint"))
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
with open(inside("starts.jsonl"), "a") as file:
    seen = {"pid": os.getpid(), "resumed": resumed, "gpu": os.environ.get("CUDA_VISIBLE_DEVICES"), "cores": cores}
    file.write(json.dumps({**seen, "threads": os.environ.get("OMP_NUM_THREADS"), "at": time.time()}) + "\\n")
print("begins", flush=True)
if a.lr[0] in a.die and not os.path.exists(a.marker):
    print("the loss is nan\\n\\n", flush=True)
    sys.exit(3)
time.sleep(0 if resumed else a.wait)
open(inside("checkpoint"), "w").write("whole")
rows = []
for lr in a.lr:
    noise = 0.1 * int(a.seed) * (1 if lr == 3 else -1)
    rows.append({"lr": lr, "val": 50 + a.percent - 5 * abs(math.log(lr / 3)) + noise})
    if not a.val_only:
        rows[-1]["test"] = 1e9 * (lr != 3) if a.poison else 60 - 5 * abs(math.log(lr)) + noise
best = {**rows[0], "resumed": resumed, "ended": time.time()}
if a.nan:
    best["val"] = float("nan")
if len(rows) > 1:
    best["per_lr"] = rows
if a.log_only:
    records = [{"step": 1, "val": 1.0, "test": 2.0}, {"step": 2, "val": best["val"]}, {"step": 3, "loss": 0.5}]
    open(inside("log.jsonl"), "w").write("\\n".join(map(json.dumps, records)) + "\\n")
else:
    open(inside("result.json"), "w").write(json.dumps(best))
"""
SELECT = {"select": {"metric": "val"}, "report": {"metrics": ["test"]}}


@pytest.fixture(autouse=True)
def no_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def sweep(tmp_path):
    """Write a spec over the fake entry point: ``sweep(grid=..., ...)`` returns its path, ``sweep.out`` its folder."""
    (tmp_path / "fake.py").write_text(FAKE)

    def write(**entries) -> str:
        path = tmp_path / "spec.yml"
        whole = {"main": str(tmp_path / "fake.py"), "out": str(tmp_path / "out"), "run": {"slots": 2}, **entries}
        path.write_text(yaml.safe_dump({k: v for k, v in whole.items() if v is not None}, sort_keys=False))
        return str(path)

    write.out = tmp_path / "out"
    return write


def starts(out: Path) -> dict[str, list[dict]]:
    """What each folder's processes saw, in their order."""
    files = sorted((out / "trials").glob("*/starts.jsonl"))
    return {f.parent.name: records(f) for f in files}


def count(out: Path) -> int:
    return sum(map(len, starts(out).values()))


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "results.csv").read_text().splitlines()))


def val(lr: float, seed: int, percent: float = 0) -> float:
    """The fake's validation figure."""
    return 50 + percent - 5 * abs(math.log(lr / 3)) + 0.1 * seed * (1 if lr == 3 else -1)


# --------------------------------------------------------------------------------------------- what is selected


def test_each_groups_best_mean_is_selected_and_reported_once(sweep, capsys):
    path = sweep(
        grid={"lr": [10, 1, 3]}, paired={"percent": [1, 10], "epochs": [60, 30]}, seeds=[0, 4], group_by=["percent"],
        select={"metric": "val", "flags": {"val-only": True}}, report={"metrics": ["test"]},
    )  # fmt: skip
    assert main([path]) == 0
    assert count(sweep.out) == 2 * 3 * 2 + 2 * 2  # the grid, then each group's choice
    found = rows(sweep.out)
    grid = {(int(r["lr"]), int(r["percent"]), int(r["seed"])): r for r in found if r["stage"] == "select"}
    assert {key: float(r["val"]) for key, r in grid.items()} == pytest.approx(
        {(lr, p, s): val(lr, s, p) for lr, p, s in itertools.product([10, 1, 3], [1, 10], [0, 4])}
    )
    assert {(r["percent"], r["epochs"]) for r in found} == {("1", "60"), ("10", "30")}  # paired, not crossed
    assert {r["test"] for r in grid.values()} == {""}
    tested = [r for r in found if r["stage"] == "report"]
    assert [(r["lr"], r["percent"], r["seed"]) for r in tested] == [
        ("3", "1", "0"), ("3", "1", "4"), ("3", "10", "0"), ("3", "10", "4")
    ]  # fmt: skip
    text = (sweep.out / "results.md").read_text()
    test = [60 - 5 * math.log(3) + 0.1 * seed for seed in (0, 4)]
    cells = f"{statistics.mean(test):.2f} ± {statistics.stdev(test):.2f}"
    vals = [val(3, seed, 10) for seed in (0, 4)]
    assert f"| 10 | 30 | 3 | {statistics.mean(vals):.2f} ± {statistics.stdev(vals):.2f} | yes | {cells} |" in text
    assert text.count("yes") == text.count(cells) == 2
    assert text in capsys.readouterr().out
    with Image.open(sweep.out / "results.png") as image:
        assert image.format == "PNG"


def test_the_mean_decides_and_not_the_best_seed(tmp_path):
    """lr 1 has the highest single value and lr 2 the highest mean; with mode min lr 3 has the lowest."""
    figures = {1: [90, 10, 50], 2: [60, 60, 60], 3: [20, 20, 20]}
    for mode, winner in (("max", 2), ("min", 3)):
        made = _made(tmp_path, [1, 2, 3], 3, mode)
        for item in made.trials(made.select):
            _pretend(item, {"val": figures[item.settings["lr"]][item.seed]})
        assert report.selected(made) == [{"lr": winner}]


def test_selection_never_reads_the_test_figure(sweep):
    """The test figures of the settings that lose are made irresistible, or not written at all."""
    path = sweep(grid={"lr": [1, 3, 10]}, flags={"poison": True}, seeds=2, **SELECT)
    assert main([path]) == 0
    assert [r["lr"] for r in rows(sweep.out) if r["stage"] == "report"] == ["3", "3"]
    assert count(sweep.out) == 6  # the same commands: the selected trials' own results are reported
    assert "1000000000" not in "".join(f.read_text() for f in sweep.out.glob("results.*") if f.suffix != ".png")


def test_a_setting_that_lacks_a_seed_is_no_candidate(tmp_path):
    made = _made(tmp_path, [1, 2], 2)
    for item in made.trials(made.select):
        if (item.settings["lr"], item.seed) != (1, 1):
            _pretend(item, {"val": 99 if item.settings["lr"] == 1 else 5})
    assert report.selected(made) == [{"lr": 2}]
    assert "99.00 (1 of 2 seeds)" in report.markdown(made, [{"lr": 2}])


def _made(tmp_path, lrs: list, seeds: int, mode: str = "max") -> spec.Spec:
    settings = [{"lr": lr} for lr in lrs]
    select, test = spec.Stage(["val"], {"val-only": True}, mode), spec.Stage(["test"], {})
    script, out = str(tmp_path / "main.py"), str(tmp_path / mode)
    return spec.Spec("x", script, {}, settings, None, list(range(seeds)), [], select, test, spec.Run(), out)


def _pretend(item: spec.Trial, result: dict) -> None:
    os.makedirs(item.folder)
    Path(item.folder, "result.json").write_text(json.dumps(result))


def test_without_select_everything_is_reported(sweep):
    assert main([sweep(grid={"lr": [1, 3]}, seeds=2, report={"metrics": ["test", "val"]})]) == 0
    assert count(sweep.out) == 4
    assert {r["stage"] for r in rows(sweep.out)} == {"report"}
    assert "nothing was selected" in (sweep.out / "results.md").read_text()


def test_many_values_in_one_run(sweep):
    path = sweep(
        grid={"lr": [1, 3, 10]}, one_run="lr", seeds=[0, 2],
        select={"metric": "val", "flags": {"val-only": True}}, report={"metrics": ["test"]},
    )  # fmt: skip
    assert main([path]) == 0
    assert count(sweep.out) == 2 + 2
    found = rows(sweep.out)
    assert [float(r["val"]) for r in found if r["stage"] == "select"] == pytest.approx(
        [val(lr, seed) for lr in (1, 3, 10) for seed in (0, 2)]
    )
    assert [(r["lr"], float(r["test"])) for r in found if r["stage"] == "report"] == [
        ("3", pytest.approx(60 - 5 * math.log(3) + 0.1 * seed)) for seed in (0, 2)
    ]


def test_one_of_many_values_has_no_figure_without_its_row(tmp_path):
    """The figures of the whole run are those of one of its values, which one is not known."""
    item = spec.Trial({"lr": 3}, 0, str(tmp_path / "trial"), [], row=("lr", 3))
    _pretend(item, {"val": 5})
    assert trial.number(item, "val") is None
    Path(item.folder, "result.json").write_text(json.dumps({"val": 5, "per_lr": [{"lr": 3, "val": 4}]}))
    assert trial.number(item, "val") == 4


def test_a_report_can_go_on_from_the_selected_checkpoints(sweep):
    path = sweep(
        grid={"lr": [1, 3]}, flags={"wait": 0.05}, select={"metric": "val", "flags": {"val-only": True}},
        report={"metrics": ["test"], "resume": True},
    )  # fmt: skip
    assert main([path]) == 0
    last = json.loads(next((sweep.out / "trials").glob("lr=3*/result.json")).read_text())
    reported = [r["folder"] for r in rows(sweep.out) if r["stage"] == "report"]
    assert json.loads(Path(reported[0], "result.json").read_text())["resumed"]
    assert last["lr"] == 3
    assert not starts(sweep.out)[next(name for name in starts(sweep.out) if name.startswith("lr=1"))][0]["resumed"]


def test_figures_of_an_entry_point_that_only_logs(sweep):
    assert main([sweep(grid={"lr": [3]}, flags={"log-only": True}, report={"metrics": ["val", "test"]})]) == 0
    assert [(float(r["val"]), float(r["test"])) for r in rows(sweep.out)] == [(50, 2)]  # the last value of each


def test_a_result_without_a_finite_figure_is_reported_as_such(sweep):
    assert main([sweep(grid={"lr": [1, 3]}, flags={"nan": True}, **SELECT)]) == 1
    assert (sweep.out / "results.md").read_text().count("done, but without a finite val") == 2


def test_a_figure_that_a_result_says_it_cannot_have_is_not_missing(tmp_path):
    """As top-5 of five classes; where it alone was asked for, as by a selection, it is."""
    found = {"acc1": 50.0, "acc5": None, "val_acc5": None, "not_measured": {"acc5": "100 % by definition: 5 classes"}}
    (tmp_path / "result.json").write_text(json.dumps(found))
    mine = types.SimpleNamespace(folder=str(tmp_path), row=None)
    asked = {("acc1", "acc5"): "", ("acc5",): "finite acc5", ("acc1", "val_acc5"): "finite val_acc5", ("acc1",): ""}
    for metrics, why in asked.items():
        said = report.why_unfinished(mine, types.SimpleNamespace(metrics=metrics))
        assert (why in said) and bool(why) == bool(said)


# ------------------------------------------------------------------------------------- failures, kills and reruns


def test_a_rerun_starts_nothing_that_is_finished(sweep, capsys):
    path = sweep(grid={"lr": [1, 3]}, seeds=2, **SELECT)
    assert main([path]) == 0
    first = (count(sweep.out), (sweep.out / "results.csv").read_text())
    assert main([path]) == 0
    assert (count(sweep.out), (sweep.out / "results.csv").read_text()) == first == (4, first[1])
    assert "was done before" in capsys.readouterr().out
    assert main([sweep(grid={"lr": [10, 3, 1]}, seeds=2, **SELECT)]) == 0  # a longer grid only adds its own
    assert count(sweep.out) == 6


def test_a_failed_trial_is_told_and_does_not_end_the_sweep(sweep, tmp_path, capsys):
    marker = tmp_path / "repaired"
    path = sweep(grid={"lr": [1, 3, 10]}, flags={"die": [3], "marker": str(marker)}, **SELECT)
    assert main([path]) == 1
    status = {r["lr"]: (r["status"], r["exit_code"]) for r in rows(sweep.out) if r["stage"] == "select"}
    assert status == {"1": ("done", "0"), "3": ("failed", "3"), "10": ("done", "0")}
    folder = next((sweep.out / "trials").glob("lr=3*"))
    for text in (capsys.readouterr().out, (sweep.out / "results.md").read_text()):
        assert re.search(r"failed \(exit code 3\): the loss is nan", text)
        assert str(folder) in text
    assert [r["lr"] for r in rows(sweep.out) if r["stage"] == "report"] == ["1"]
    marker.touch()
    assert main([path]) == 0
    assert [len(seen) for seen in starts(sweep.out).values()] == [1, 1, 2]  # in the order lr=1, lr=10, lr=3
    assert [r["lr"] for r in rows(sweep.out) if r["stage"] == "report"] == ["3"]


def test_a_killed_trial_is_told_and_resumed_by_the_next_sweep(sweep):
    path = sweep(grid={"lr": [1, 3]}, flags={"wait": 30}, **SELECT)
    victims: list[int] = []

    def kill_both() -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):  # one saves a checkpoint first, one just dies
            pid = _wait_for(lambda: [s[0]["pid"] for s in starts(sweep.out).values() if s[0]["pid"] not in victims])
            victims.append(pid[0])
            os.kill(pid[0], number)

    killer = threading.Thread(target=kill_both)
    killer.start()
    assert main([path]) == 1
    killer.join()
    assert sorted(r["exit_code"] for r in rows(sweep.out)) == ["137", "143"]
    assert "(exit code 137): begins" in (sweep.out / "results.md").read_text()
    for folder in (sweep.out / "trials").iterdir():
        (folder / "checkpoint").touch()  # that the second one had saved earlier
    assert main([path]) == 0
    assert [[s["resumed"] for s in seen] for seen in starts(sweep.out).values()] == [[False, True]] * 2


def _wait_for(ready) -> list:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            if found := ready():
                return found
        except (OSError, ValueError, IndexError):  # half written
            pass
        time.sleep(0.01)
    raise AssertionError("nothing happened")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_the_trials_and_leaves_what_is_known(sweep, number, code, capsys):
    path = sweep(grid={"lr": [1, 3, 10]}, flags={"wait": 30}, **SELECT)
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]

    def stop() -> None:
        _wait_for(lambda: len(list((sweep.out / "trials").glob("*/output.txt"))) == 2 and _both_begun(sweep.out))
        os.kill(os.getpid(), number)

    stopper = threading.Thread(target=stop)
    stopper.start()
    assert main([path]) == code
    stopper.join()
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert [(r["status"], r["exit_code"]) for r in rows(sweep.out)] == [
        ("stopped", "143"), ("stopped", "143"), ("not run", "")
    ]  # fmt: skip
    assert "run the same command again to continue" in capsys.readouterr().out
    quick = {name: Path(sweep.out, "trials", name, "checkpoint") for name in starts(sweep.out)}
    assert all(file.read_text() == "saved" for file in quick.values())


def _both_begun(out: Path) -> bool:
    return all("begins" in f.read_text() for f in (out / "trials").glob("*/output.txt"))


def test_a_trial_that_takes_too_long_is_told_to_save_and_goes_on_next_time(sweep):
    path = sweep(grid={"lr": [3]}, flags={"wait": 30}, run={"slots": 1, "minutes": 0.01}, **SELECT)
    assert main([path]) == 1
    assert [(r["status"], r["exit_code"]) for r in rows(sweep.out)] == [("out of time", "143")]
    assert main([path]) == 0
    assert [s["resumed"] for seen in starts(sweep.out).values() for s in seen] == [False, True]


@pytest.mark.parametrize(
    ("ends", "starts", "status"),
    [([75, 75, 0], 3, "done"), ([75, -75], 2, "failed"), ([-75], 1, "failed"), ([75, 3], 2, "failed")],
    ids=["gets on", "stands still", "saves nothing", "fails"],
)
def test_a_trial_that_ends_with_75_goes_on_as_long_as_it_saves(ends, starts, status, tmp_path):
    """Of ``ends``, the exit codes of its starts, those below 0 have saved nothing."""
    script, item = tmp_path / "stops.py", spec.Trial({}, 0, str(tmp_path / "trial"), [str(tmp_path / "stops.py")])
    script.write_text(
        f"import pathlib, sys\nhere, ends = pathlib.Path({item.folder!r}), {ends}\n"
        "count = here / 'count'\nnumber = len(count.read_text()) if count.exists() else 0\n"
        "count.write_text('x' * (number + 1))\nprint('start', number)\n"
        "if ends[number] == 0:\n    (here / 'result.json').write_text('{}')\n"
        "elif ends[number] > 0:\n    (here / 'checkpoint.pth.tar').write_text(str(number))\n"
        "sys.exit(abs(ends[number]))\n"
    )
    trial.run_trial(item, trial.Slot(), None, None)
    record = trial.read_record(item.folder)
    assert record is not None
    assert (record.status, record.exit_code) == (status, abs(ends[starts - 1]))
    assert len(Path(item.folder, "count").read_text()) == starts
    assert record.last_line == f"start {starts - 1}"


def test_a_trial_that_does_not_listen_is_killed_with_all_it_started(tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "GRACE_SECONDS", 0.2)
    script = tmp_path / "deaf.py"
    script.write_text(
        "import os, signal, subprocess, sys, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'], close_fds=False)\n"
        "print('child', child.pid, flush=True)\ntime.sleep(60)\n"
    )
    item = spec.Trial({}, 0, str(tmp_path / "trial"), [str(script)])
    stop = threading.Event()
    worker = threading.Thread(target=trial.run_trial, args=(item, trial.Slot(), None, 0.0, stop))
    worker.start()
    output = Path(item.folder, "output.txt")
    child = int(_wait_for(lambda: output.read_text().split("child ")[1].split())[0])
    assert trial.running(item.folder)
    stop.set()
    worker.join()
    record = trial.read_record(item.folder)
    assert record is not None and (record.status, record.exit_code) == ("stopped", 137)
    _wait_for(lambda: not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text())
    assert not trial.running(item.folder)


# ----------------------------------------------------------------------------------------- each trial exactly once


def test_two_sweeps_in_one_folder_share_the_trials(sweep):
    """Also the one that fails, and a trial both want at the same moment."""
    made = spec.read_spec(sweep(grid={"lr": [1, 2, 3, 4, 5, 6]}, flags={"wait": 0.1, "die": [2]}, **SELECT))
    said: list[list[str]] = [[], []]

    def one(mine: list[str]) -> None:
        stop = threading.Event()
        local = pool.Local(made.run, stop)
        pool.run_all(made.trials(made.report), local, {}, stop, lambda item, record: mine.append(record.status))

    threads = [threading.Thread(target=one, args=(mine,)) for mine in said]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(seen) for seen in starts(sweep.out).values()] == [1] * 6
    assert sorted(said[0]) == sorted(said[1]) == ["done"] * 5 + ["failed"]


def test_a_clock_that_runs_backwards_starts_no_trial_again(sweep, monkeypatch):
    path = sweep(grid={"lr": [1, 2]}, flags={"die": [2]}, **SELECT)
    clock = itertools.count(1_000_000_000, -12)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    for times in (1, 2):  # the failed one is tried once more by each sweep
        assert main([path]) == 1
        assert sorted(map(len, starts(sweep.out).values())) == [1, times]


def test_what_another_sweep_failed_meanwhile_is_not_tried_again(sweep):
    made = spec.read_spec(sweep(grid={"lr": [1]}, **SELECT))
    (item,) = made.trials(made.report)

    def fail() -> str:
        trial.write_record(item, trial.Record(trial.FAILED, 3))
        return trial.read_record(item.folder).attempt

    assert trial.settled(item.folder, None) is None
    first = fail()
    assert trial.settled(item.folder, first) is None
    fail()
    assert trial.settled(item.folder, first).exit_code == 3
    trial.write_record(item, trial.Record(trial.STOPPED))
    assert trial.settled(item.folder, first) is None


DAMAGES = ["", "\0\0", "[]", "3", "[" * 100_000, '{"status": ', "9" * 5000]


@pytest.mark.parametrize(
    "content", [*DAMAGES, '{"status": "done", "seconds": 1' + "0" * 400 + "}", '{"status": ["done"]}']
)
def test_a_damaged_record_counts_as_none(sweep, capsys, content):
    path = sweep(grid={"lr": [3]}, **SELECT)
    assert main([path]) == 0
    (folder,) = (sweep.out / "trials").iterdir()
    (folder / "trial.json").write_text(content)
    capsys.readouterr()
    assert main([path]) == 0  # the result is there
    assert capsys.readouterr().out.count("trial.json is damaged and counts as absent") == 1
    (folder / "result.json").unlink()
    assert main([path]) == 0
    assert count(sweep.out) == 2


@pytest.mark.parametrize("content", DAMAGES)
def test_a_trial_with_a_damaged_result_runs_again(sweep, capsys, content):
    path = sweep(grid={"lr": [3]}, **SELECT)
    assert main([path]) == 0
    (folder,) = (sweep.out / "trials").iterdir()
    (folder / "result.json").write_text(content)
    capsys.readouterr()
    assert main([path]) == 0
    assert capsys.readouterr().out.count("result.json is damaged and counts as absent") == 1
    assert count(sweep.out) == 2


@pytest.mark.parametrize("name", ["trial.json", "result.json"])
def test_a_pipe_in_the_place_of_a_trials_file_is_damaged_and_not_waited_at(name, tmp_path):
    os.mkfifo(tmp_path / name)
    assert trial.damaged(str(tmp_path)) == [name]


def test_a_record_of_a_later_version_and_figures_of_other_types(sweep):
    made = spec.read_spec(sweep(grid={"lr": [1]}, **SELECT))
    (item,) = made.trials(made.report)
    trial.write_record(item, trial.Record(trial.DONE, 0))
    folder = Path(item.folder)
    entries = json.loads((folder / "trial.json").read_text())
    (folder / "trial.json").write_text(json.dumps({**entries, "later": 1}))
    for found in ({"test": "1"}, {"test": 10**400}, {"test": [1]}, {"test": True}, {"not_measured": [1]}):
        (folder / "result.json").write_text(json.dumps(found))
        assert trial.read_record(item.folder).status == "done"
        assert trial.number(item, "test") is None
        assert trial.not_measured(item, "test") == ""
    row = dataclasses.replace(item, row=("lr", 1))
    for rows in ("x", {"lr": 1}, [1, None, {"lr": 2}]):
        (folder / "result.json").write_text(json.dumps({"per_lr": rows}))
        assert trial.number(row, "test") is None


def test_a_folder_that_cannot_be_locked_is_one_sentence(sweep, monkeypatch, capsys):
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    path = sweep(grid={"lr": [3]}, **SELECT)
    assert main([path]) == 0
    (trial_json,) = (sweep.out / "trials").glob("*/trial.json")
    trial_json.unlink()
    (trial_json.parent / "result.json").unlink()
    monkeypatch.setattr(trial.fcntl, "flock", refuse)
    assert main([path]) == 2
    assert "cannot be locked (No locks available); choose another --out." in capsys.readouterr().err


@pytest.mark.dist
def test_a_trial_that_outlives_its_sweep_is_waited_for(sweep):
    import multiprocessing

    made = spec.read_spec(sweep(grid={"lr": [3]}, flags={"wait": 1.0}, **SELECT))
    (item,) = made.trials(made.report)
    sweep_process = multiprocessing.get_context("forkserver").Process(
        target=trial.run_trial, args=(item, trial.Slot(), None, None)
    )
    sweep_process.start()
    _wait_for(lambda: "begins" in Path(item.folder, "output.txt").read_text())
    sweep_process.kill()
    sweep_process.join()
    assert trial.running(item.folder)
    assert trial.read_record(item.folder) is None
    assert main([made.path]) == 0
    assert count(sweep.out) == 1
    assert [r["status"] for r in rows(sweep.out)] == ["done"] * 2


def test_folders_depend_on_what_a_trial_does_and_on_nothing_else(sweep):
    def folders(words=(), **entries) -> set[str]:
        made = spec.read_spec(sweep(**{**SELECT, **entries}), list(words))
        return {item.folder for item in made.trials(made.report)}

    one = folders(grid={"lr": [1, 3], "epochs": [2]}, flags={"wait": 1, "percent": 1})
    assert one == folders(grid={"lr": [3, 1], "epochs": [2]}, flags={"percent": 1, "wait": 1}, run={"slots": 1})
    assert one < folders(grid={"lr": [1, 3, 9], "epochs": [2]}, flags={"wait": 1, "percent": 1}, seeds=2)
    assert not one & folders(grid={"lr": [1, 3], "epochs": [2]}, flags={"wait": 2, "percent": 1})
    assert not one & folders(["DIR"], grid={"lr": [1, 3], "epochs": [2]}, flags={"wait": 1, "percent": 1})
    assert all(re.fullmatch(r"lr=\d,epochs=2,seed=0-[0-9a-f]{10}", os.path.basename(f)) for f in one)


# ----------------------------------------------------------------------------------------------- where trials run


def test_a_gpu_has_one_trial_at_a_time(sweep):
    path = sweep(grid={"lr": [1, 2, 3, 4, 5, 6]}, flags={"wait": 0.1}, run={"gpus": [3, 7]}, report={"metrics": "val"})
    assert main([path]) == 0
    spans: dict[str, list[tuple[float, float]]] = {}
    for name, seen in starts(sweep.out).items():
        ended = json.loads((sweep.out / "trials" / name / "result.json").read_text())["ended"]
        spans.setdefault(seen[0]["gpu"], []).append((seen[0]["at"], ended))
    assert set(spans) == {"3", "7"}
    for mine in map(sorted, spans.values()):
        assert all(earlier[1] <= later[0] for earlier, later in itertools.pairwise(mine))


def test_slots_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10, 18)), raising=False)
    slots = pool.local_slots(spec.Run(slots=3))
    assert sorted(core for slot in slots for core in slot.cores) == list(range(10, 18))
    assert [slot.variables["OMP_NUM_THREADS"] for slot in slots] == [str(len(slot.cores)) for slot in slots]
    assert {slot.variables["CUDA_VISIBLE_DEVICES"] for slot in slots} == {""}
    assert [len(slot.cores) for slot in pool.local_slots(spec.Run(slots=9))].count(0) == 1  # more slots than cores
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert pool.local_slots(spec.Run())[0].variables["OMP_NUM_THREADS"] == "5"


def test_gpus_are_found_and_keep_their_outer_names(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    ids = [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in pool.local_slots(spec.Run())]
    assert ids == ["0", "1", "2", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,2,GPU-a,1")
    slots = pool.local_slots(spec.Run(gpus_per_trial=2))
    assert [slot.variables["CUDA_VISIBLE_DEVICES"] for slot in slots] == ["6,2", "GPU-a,1"]
    assert len(pool.local_slots(spec.Run(slots=3))) == 3
    with pytest.raises(UserError, match="gpus_per_trial is 8, but there are 4 GPUs"):
        pool.local_slots(spec.Run(gpus_per_trial=8))


class FakeJob:
    """As submitit's: it runs when asked for, or fails, or never begins."""

    def __init__(self, work, how: str):
        self.work, self.how, self.cancelled = work, how, False

    def done(self) -> bool:
        return self.how != "queued"

    def result(self):
        if self.how == "lost":
            raise RuntimeError("Job 17 failed\nwith node failure")
        return self.work()

    def cancel(self) -> None:
        self.cancelled = True


class FakeExecutor:
    """As submitit's; ``how`` tells the fate of a job from its trial."""

    def __init__(self, how):
        self.how, self.jobs = how, []

    def submit(self, function, *arguments):
        self.jobs.append(FakeJob(lambda: function(*arguments), self.how(arguments[0])))
        return self.jobs[-1]


def test_trials_as_slurm_jobs(sweep):
    made = spec.read_spec(sweep(grid={"lr": [1, 3]}, run={"slurm": {"timeout_min": 9}}, **SELECT))
    executor = FakeExecutor(lambda item: "lost" if item.settings["lr"] == 1 else "runs")
    where = pool.Slurm(made.run, made.out, executor)
    where.poll = 0.01
    said = []
    pool.run_all(made.trials(made.report), where, {}, threading.Event(), lambda *told: said.append(told))
    assert len(executor.jobs) == 2  # both at once: the queue is SLURM's
    told = {item.settings["lr"]: record for item, record in said}
    assert told[3].status == "done"
    assert told[1].summary() == "failed: the job failed: Job 17 failed with node failure"


def test_stopping_cancels_jobs_in_the_queue(sweep):
    made = spec.read_spec(sweep(grid={"lr": [1, 3]}, run={"slots": 1, "slurm": {"timeout_min": 9}}, **SELECT))
    executor, stop = FakeExecutor(lambda item: "queued"), threading.Event()
    threading.Timer(0.2, stop.set).start()
    where = pool.Slurm(made.run, made.out, executor)
    pool.run_all(made.trials(made.report), where, {}, stop, lambda *told: None)
    assert [job.cancelled for job in executor.jobs] == [True]  # slots: at most one in the queue


def test_submitit_gets_the_specs_parameters(sweep, monkeypatch):
    given = {}

    class AutoExecutor(FakeExecutor):
        def __init__(self, folder, cluster):
            super().__init__(lambda item: "runs")
            given.update(folder=folder, cluster=cluster)

        def update_parameters(self, **parameters):
            given.update(parameters)

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=AutoExecutor))  # type: ignore
    run = {"minutes": 90, "slurm": {"slurm_partition": "gpu", "gpus_per_node": 1}}
    monkeypatch.setattr(pool.Slurm, "poll", 0.01)
    assert main([sweep(grid={"lr": [3]}, run=run, **SELECT)]) == 0
    wanted = {"cluster": "slurm", "slurm_partition": "gpu", "gpus_per_node": 1, "timeout_min": 95, "name": "sweep"}
    assert given == {"folder": os.path.join(sweep.out, "slurm"), **wanted}
    monkeypatch.setitem(sys.modules, "submitit", None)  # type: ignore
    with pytest.raises(UserError, match=r"pip install '\.\[slurm\]'"):
        pool.Slurm(spec.Run(slurm={}), "x")


# ------------------------------------------------------------------------------------- mistakes and the real mains

WRONG = [
    ({"main": "main_other.py"}, "main must be one of main_pretrain.py"),
    ({"main": None}, "main must be one of"),
    ({"gird": {}}, "the file has no entry gird; it has main, flags"),
    ({"flags": ["lr"]}, "flags must be lines of NAME: VALUE"),
    ({"grid": {"lr": 3}}, "grid lr must be a list of values, not 3"),
    ({"grid": {"lr": []}}, "grid lr must be a list of values"),
    ({"grid": {"lr": [1, 1]}}, "grid or paired holds a setting twice"),
    ({"grid": {"lr": [1]}, "flags": {"lr": 2}}, "lr stands in two of flags, grid and paired"),
    ({"paired": {"epochs": [1, 2], "wait": [1]}}, "must have one length, not epochs 2, wait 1"),
    ({"grid": {"seed": [1, 2]}}, "grid seed: the sweep gives this flag; write seeds"),
    ({"flags": {"save_dir": "x"}}, "flags save-dir: the sweep gives this flag; write out"),
    ({"flags": {"max-minutes": 3}}, "write run: {minutes: ..}"),
    ({"seeds": 0}, "seeds must be their number or a list"),
    ({"seeds": [1, 1]}, "seeds holds a value twice"),
    ({"seeds": [True]}, "seeds must be their number or a list"),
    ({"group_by": ["epochs"]}, "group_by epochs is neither in grid nor in paired"),
    ({"group_by": "lr"}, "group_by must be a list"),
    ({"paired": {"epochs": [1, 1]}}, "grid or paired holds a setting twice"),
    ({"one_run": "epochs"}, "one_run epochs is not in grid"),
    ({"one_run": "lr", "report": {"metrics": ["test"], "resume": True}}, "report resume does not go with one_run"),
    ({"report": None}, "report is missing: write report: {metrics: [acc1]}"),
    ({"report": {"metrics": []}}, "report needs metrics: the name of a number"),
    ({"select": {"mode": "max"}}, "select needs metric"),
    ({"select": {"metric": "val", "mode": "best"}}, "select mode must be max or min, not best"),
    ({"select": {"metric": "test"}}, "test is both selected on and reported"),
    ({"select": {"metric": "val", "flags": {"lr": 3}}}, "lr stands in select flags and in flags, grid or paired"),
    ({"run": {"slots": 0}}, "run slots must be a whole number of at least 1, not 0"),
    ({"run": {"slots": 1, "gpus": [0]}}, "give gpus (one trial each) or slots"),
    ({"run": {"gpus": 2}}, "run gpus must be a list"),
    ({"run": {"minutes": "long"}}, "run minutes must be a number above 0, not long"),
    ({"run": {"cores": 2}}, "run has no entry cores"),
    ({"run": {"slurm": {}}}, "slurm needs timeout_min, or run needs minutes"),
    ({"run": {"slurm": {"timeout_min": 1}, "gpus": [0]}}, "by its own gpus_per_node"),
    ({"main": "main_lincls.py", "grid": {"lrr": [1]}}, "main_lincls.py does not take DIR --lrr 1"),
    ({"main": "main_lincls.py", "grid": {"lr": ["high"]}}, "argument --lr/--learning-rate"),
]


@pytest.mark.parametrize(("entries", "words"), WRONG, ids=[w[:40] for _, w in WRONG])
def test_a_spec_that_cannot_be_used_costs_one_sentence(sweep, entries, words, capsys):
    path = sweep(**{"grid": {"lr": [1, 3]}, **SELECT, **entries})
    assert main([path, "--", "DIR"]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith(f"error: {path}: ")
    assert error.count("\n") == 1
    assert not sweep.out.exists()


NO_SPEC = [
    ("a: [", "not a YAML file"),
    ("- 3", "must be lines"),
    ("", "must be lines"),
    (None, "neither a file nor a recipe"),
]


@pytest.mark.parametrize(("text", "words"), NO_SPEC)
def test_a_file_that_is_no_spec(tmp_path, text, words, capsys):
    path = tmp_path / "spec.yml"
    if text is not None:
        path.write_text(text)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_words_of_the_command_line(sweep, capsys):
    path = sweep(grid={"lr": [[1, 3], 5]}, flags={"wait": 0, "val-only": False, "poison": True}, **SELECT)
    made = spec.read_spec(path, ["DIR", "--pretrained", "X", "--wait", "1"])
    first, second = (item.command[1:] for item in made.trials(made.report))
    assert first[:9] == ["DIR", "--lr", "1", "3", "--poison", "--seed", "0", "--wait", "0"]
    assert first[9:13] == ["--pretrained", "X", "--wait", "1"]  # the last word of a flag wins
    assert second[:3] == ["DIR", "--lr", "5"]
    for word in ("--lr", "--seed", "--save-dir=x", "--resume"):
        assert main([path, "--", "DIR", word, "3"]) == 2
        assert "would make trials alike" in capsys.readouterr().err


def test_every_spelling_of_a_varied_flag_is_refused(sweep, capsys):
    for word in ("--learning-rate=3", "--lr"):
        assert main([sweep(main="main_lincls.py", grid={"lr": [1]}, **SELECT), "--", "DIR", word, "3"]) == 2
        assert f"{word.split('=')[0]} after -- would make trials alike" in capsys.readouterr().err


# Two stages of each main that are of different images.
STAGES: dict[str, dict] = {
    "main_lincls.py": {"select": {"metric": "acc1", "flags": {"val-share": 0.2}}, "report": {"metrics": ["acc1"]}},
    "main_semisup.py": {"flags": {"val-share": 0.2}, "report": {"metrics": ["acc1", "acc5"], "resume": True},
                        "select": {"metric": "val_acc1", "flags": {"val-only": True}}},
    "main_pretrain.py": {"select": {"metric": "loss", "mode": "min"}, "report": {"metrics": ["knn"]}},
}  # fmt: skip
GRIDS = {"main_lincls.py": {"lr": [1, 3]}, "main_semisup.py": {"lr-backbone": [1, 3]}, "main_pretrain.py": {"lr": [1]}}


@pytest.mark.parametrize(
    ("main_", "words", "word"),
    [
        ("main_lincls.py", ["--val-share", "0.2"], "--val-share"),
        ("main_lincls.py", ["--val_share=0.2"], "--val_share"),
        ("main_semisup.py", ["--val-only"], "--val-only"),
        ("main_semisup.py", ["--val_only"], "--val_only"),
        ("fake", ["--val_only"], "--val_only"),
        ("fake", ["--no-val-only"], "--no-val-only"),
        ("fake", ["--val-only=1"], "--val-only"),
    ],
)
def test_words_leave_a_stages_own_flags_alone(sweep, main_, words, word, capsys):
    stages = STAGES.get(
        main_, {"select": {"metric": "val", "flags": {"val-only": True}}, "report": {"metrics": "test"}}
    )
    path = sweep(**({} if main_ == "fake" else {"main": main_}), grid=GRIDS.get(main_, {"lr": [1]}), **stages)
    assert main([path, "--dry-run", "--", "DIR"]) == 0
    capsys.readouterr()
    assert main([path, "--dry-run", "--", "DIR", *words]) == 2
    assert f"{word} after -- would take the place of a stage's own flag; change it in" in capsys.readouterr().err


def test_short_and_joined_spellings_are_seen_too(sweep, capsys):
    stages = {"select": {"metric": "acc1", "flags": {"val-share": 0.2, "batch-size": 8}}, "report": {"metrics": "acc1"}}
    path = sweep(main="main_lincls.py", grid={"lr": [1]}, **stages)
    assert main([path, "--dry-run", "--", "DIR", "-b64"]) == 2
    assert "--batch-size after -- would take the place" in capsys.readouterr().err
    assert main([path, "--dry-run", "--", "DIR", "--trial", "3"]) == 2  # no flag of the probe
    path = sweep(main="main_semisup.py", grid={"lr-backbone": [1]}, **STAGES["main_semisup.py"])
    for words in (["--trial", "3"], ["--output_dir", "x"]):
        assert main([path, "--dry-run", "--", "DIR", *words]) == 2
        assert f"{words[0]} after -- would make trials alike" in capsys.readouterr().err.replace("-dir", "_dir")


@pytest.mark.parametrize(
    ("entries", "words", "said"),
    [
        (
            {"report": {"metrics": ["acc1", "acc"]}},
            [],
            "writes no acc with these flags; it writes size, seed",
        ),
        ({"report": {"metrics": ["val_loss"]}}, [], "main_lincls.py writes no val_loss with these flags"),
        ({"select": {"metric": "val_acc1", "flags": {"val-share": 0.2}}}, [], "main_lincls.py writes no val_acc1"),
        ({"flags": {"knn": True}}, [], "writes no result.json with --knn, --few-shot, --lr-find or --evaluate."),
        ({}, ["--few-shot"], "writes no result.json with --knn"),
        (
            {"select": {"metric": "acc1"}, "report": {"metrics": ["acc5"]}},
            [],
            "acc1, which selects, and acc5, which",
        ),
        (
            {"select": {"metric": "acc1"}, "report": {"metrics": ["acc1"], "flags": {"epochs": 3}}},
            [],
            "are both of the",
        ),
        ({"report": {"metrics": ["acc1"], "flags": {"val-share": 0.1}}}, [], "are both of the held-out part of the"),
        ({}, ["--config", "CONFIG"], "are both of the held-out part of the training images: such a figure is too good"),
        ({"flags": {"learning-rate": 3}}, [], "learning-rate and lr are two spellings of one flag"),
        ({"one_run": "learning-rate", "grid": {"learning-rate": [1, 3]}}, [], "one_run is for lr of main_lincls.py"),
        ({"one_run": "knn-k", "grid": {"knn-k": [1, 3]}}, [], "one_run is for lr of main_lincls.py"),
    ],
)
def test_figures_that_would_not_be_there_or_not_be_independent(sweep, tmp_path, entries, words, said, capsys):
    """Before the first trial, in a dry run too."""
    (tmp_path / "config.yml").write_text("val-share: 0.2\n")
    words = [str(tmp_path / "config.yml") if word == "CONFIG" else word for word in words]
    path = sweep(**{"main": "main_lincls.py", "grid": {"lr": [1, 3]}, **STAGES["main_lincls.py"], **entries})
    for more in ([], ["--dry-run"]):
        assert main([path, *more, "--", "DIR", *words]) == 2
        assert said in capsys.readouterr().err
    assert not sweep.out.exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--evaluate"], "--evaluate takes --resume with a fine-tuned checkpoint, and no --val-only"),
        (["--val-share", "0"], "--val-only needs --val-share"),
        (["--train-percent", "1"], None),
        (["--val-data", "X"], None),
    ],
)
def test_words_that_move_the_images_of_fine_tuning(sweep, words, said, capsys):
    path = sweep(main="main_semisup.py", grid=GRIDS["main_semisup.py"], **STAGES["main_semisup.py"])
    assert main([path, "--dry-run", "--", "DIR", *words]) == (2 if said else 0)
    assert (said or "") in capsys.readouterr().err
    path = sweep(main="main_semisup.py", grid=GRIDS["main_semisup.py"], select={"metric": "best_acc1"},
                 report={"metrics": ["acc1"]})  # fmt: skip
    assert main([path, "--dry-run", "--", "DIR"]) == 2
    assert "best_acc1, which selects, and acc1, which is reported, are both of the held-out" in capsys.readouterr().err


def test_a_dry_run_prints_the_command_of_several_rates_once(sweep, capsys):
    path = sweep(main="main_lincls.py", grid={"lr": [30, 10]}, one_run="lr", seeds=2,
                 select={"metric": "best_acc1", "flags": {"val-share": 0.2}}, report={"metrics": ["acc1"]})  # fmt: skip
    assert main([path, "--dry-run", "--", "DIR"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"--lr 30 10 --seed (\d)", line).group(1) for line in lines[:-1]] == ["0", "1"]
    assert lines[-1] == "# then each selected setting again, without --val-share 0.2, under 2 seeds"


def test_a_pretraining_sweep_on_one_set_of_images_says_so(sweep, capsys):
    stages = {"select": {"metric": "knn"}, "report": {"metrics": ["head/map"]}, "flags": {"retrieval-every": 1}}
    path = sweep(main="main_pretrain.py", grid={"lr": [1]}, **stages)
    assert main([path, "--dry-run", "--", "DIR"]) == 0
    words = "knn, which selects, and head/map, which is reported, are both of the held-out images of DIR: the reported"
    assert f"# {words} figure is as good as the selection made it" in capsys.readouterr().out
    made = spec.read_spec(path, ["DIR"])
    assert f"Note: {words} figure is" in report.markdown(made, made.settings)
    path = sweep(main="main_pretrain.py", grid={"lr": [1]}, **STAGES["main_pretrain.py"])
    assert spec.read_spec(path, ["DIR"]).notes == ()


def numbers(path: Path) -> set[str]:
    """What a sweep would find: the last values of a log, the numbers of a result, what it says it cannot have."""
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    found = {name: value for line in lines for name, value in json.loads(line).items()}
    without = found.get("not_measured", {})
    return {name for name, value in found.items() if type(value) in (int, float) or (value is None and name in without)}


PRETRAIN = ["--moco-k", "4", "--moco-dim", "16", "--amp", "off", "--seed", "3", "--steps", "1"]


@pytest.mark.parametrize(
    "words",
    [["--knn-every", "1"], ["--knn-every", "0"], ["--knn-every", "1", "--knn-k", "3", "2", "--retrieval-every", "1"],
     ["--method", "simclr", "--knn-every", "0", "--retrieval-every", "1"]],
    ids=" ".join,
)  # fmt: skip
def test_the_figures_of_pretraining_are_those_in_its_log(words, image_folder, tmp_path, in_process):
    flags = [*TINY, *(PRETRAIN[2:] if "simclr" in words else PRETRAIN), *words, str(image_folder)]
    assert in_process(*flags, "--save-dir", tmp_path) == 0
    args = cli.parse_pretrain([*flags, "--save-dir", str(tmp_path)])
    assert set(figures.of("pretrain", args)) == numbers(tmp_path / "log.jsonl")


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("words", ["", "--lr 3 1", "--val-share 0.25", "--knn", "--lr 3 1 --val-share 0.25"])
def test_the_figures_of_the_probe_are_those_of_its_result(words, image_folder, tmp_path):
    flags = [*TINY, "--epochs", "1", *words.split(), "--save-dir", str(tmp_path), "--seed", "1"]
    args = cli.parse_lincls([str(image_folder), *flags])
    assert main_lincls.worker(args) == 0
    path = tmp_path / "result.json"
    assert set(figures.of("lincls", args)) == (numbers(path) if path.exists() else set())
    whole = json.loads(path.read_text()) if path.exists() else {}
    for entry in whole.get("per_lr", []):
        assert set(figures.of("lincls", args, row=True)) == {n for n, v in entry.items() if type(v) is not bool}
    held = {"train_images": 18, "val_images": 6} if "val-share" in words else {"train_images": 24, "val_images": 8}
    assert whole == {} or {name: whole[name] for name in held} == held
    assert (figures.PART in figures.of("lincls", args).values()) == ("val-share" in words)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "words",
    ["", "--val-share 0.25", "--val-share 0.25 --val-only",
     "--few-shot --few-shot-way 2 --few-shot-shots 1 2 --few-shot-queries 1 --few-shot-episodes 2"],
)  # fmt: skip
def test_the_figures_of_fine_tuning_are_those_of_its_result(words, image_folder, tmp_path):
    flags = [*TINY, "--epochs", "1", *words.split(), "--save-dir", str(tmp_path), "--seed", "1"]
    args = cli.parse_semisup([str(image_folder), *flags])
    assert main_semisup.worker(args) == 0
    assert set(figures.of("semisup", args)) == numbers(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["val_images"] > 0) == (figures.PART in figures.of("semisup", args).values())
    assert (result["test_images"] > 0) == (figures.of("semisup", args).get("acc1", "") != "")


def test_groups_may_be_lists(sweep):
    made = spec.read_spec(sweep(paired={"lr": [[1, 3], [5]], "epochs": [1, 2]}, group_by=["lr"], **SELECT))
    assert [made.group(setting) for setting in made.settings] == [("1 3",), ("5",)]


def test_an_error_of_the_sweep_itself_stops_what_runs(sweep):
    made, stop = spec.read_spec(sweep(paired={"lr": [1, 3], "wait": [30, 0]}, **SELECT)), threading.Event()

    def fail(item: spec.Trial, record: trial.Record) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        pool.run_all(made.trials(made.report), pool.Local(made.run, stop), {}, stop, fail)
    assert [trial.read_record(item.folder).status for item in made.trials(made.report)] == ["stopped", "done"]


def test_an_unwritable_folder_and_a_dry_run(sweep, tmp_path, capsys):
    path = sweep(grid={"lr": [1, 3]}, seeds=2, select={"metric": "val", "flags": {"val-only": True}},
                 report={"metrics": ["test"]})  # fmt: skip
    (tmp_path / "file").touch()
    assert main([path, "--out", str(tmp_path / "file" / "x")]) == 2
    assert "choose another --out" in capsys.readouterr().err
    assert main([path, "--dry-run", "--slots", "3", "--", "DIR"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [re.search(r"fake.py DIR --lr (\d) --seed (\d) --val-only", line).groups() for line in lines[:4]] == [
        ("1", "0"), ("1", "1"), ("3", "0"), ("3", "1")
    ]  # fmt: skip
    assert len(lines) == 6 and lines[4] == "# then each selected setting again, without --val-only, under 2 seeds"
    assert lines[5] == "# metrics are taken as they are spelled: nothing is known of what fake.py writes"
    assert not sweep.out.exists()


# ------------------------------------------------------------------------------------------- the real entry points

TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0", "-p", "100"]


def test_the_published_grids(sweep):
    """SynCo's: five rates at 60 epochs on 1 % and at 30 on 10 %; test images are opened for selected settings alone."""
    made = spec.read_spec(str(ROOT / "configs" / "sweeps" / "semisup_synco.yml"), ["DIR", "--pretrained", "X"])
    trials = [cli.parse_semisup(item.command[1:]) for item in made.trials(made.select or made.report)]
    assert {(t.train_percent, t.epochs, t.lr_backbone) for t in trials} == {
        (percent, epochs, lr) for percent, epochs in ((1, 60), (10, 30)) for lr in (0.01, 0.02, 0.05, 0.1, 0.005)
    }
    assert {(t.lr_classifier, t.batch_size, t.weights, t.val_only) for t in trials} == {(0.5, 1024, "finetune", True)}
    assert len(trials) == len({t.save_dir for t in trials}) == 2 * 5 * 3
    made = spec.read_spec(str(ROOT / "configs" / "sweeps" / "linear.yml"), ["DIR", "--pretrained", "X"])
    assert made.select
    linear = [cli.parse_lincls(item.command[1:]) for item in made.trials(made.select)]
    assert len({t.save_dir for t in linear}) == 3  # one run a seed for all rates
    assert {(*t.lrs, t.epochs, *t.schedule, t.val_share > 0) for t in linear} == {(30, 10, 3, 1, 100, 60, 80, True)}
    assert {cli.parse_lincls(item.command[1:]).val_share for item in made.trials(made.report)} == {0}


def test_the_probe_can_be_judged_on_training_images(image_folder, capsys):
    """--val-share divides the training images in two and leaves the validation images alone."""
    sources = open_sources(None, str(image_folder))
    whole = {sources.train.name_of(i) for i in range(24)}
    train, val = probe.labelled_pair(sources, val_share=0.25)
    parts = [{part.name_of(i) for i in range(len(part))} for part in (train, val)]
    assert [len(names) for names in parts] == [18, 6]
    assert parts[0] | parts[1] == whole
    assert [list(np.bincount(part.labels)) for part in (train, val)] == [[9, 9], [3, 3]]
    assert probe.labelled_pair(sources) == (sources.train, sources.val)
    with pytest.raises(SystemExit, match="2"):
        cli.parse_lincls(["DIR", "--val-share", "1"])
    assert "--val-share is a share from 0 to below 1, not 1" in capsys.readouterr().err


@pytest.mark.dist
def test_the_linear_grid_over_the_real_probe(image_folder, tmp_path, restored):
    """The figures that decide are of held-out training images; the reported ones are of one rate's own run. A trial
    that was stopped inside an epoch goes on there."""
    text = (ROOT / "configs" / "sweeps" / "linear.yml").read_text()
    path = tmp_path / "linear.yml"
    path.write_text(text.replace("seeds: 3", "seeds: [5]").replace("val-share: 0.02", "val-share: 0.25"))
    own = [str(image_folder), *TINY, "--epochs", "2"]
    made = spec.read_spec(str(path), own, str(tmp_path / "out"))
    assert made.select
    stopped = cli.parse_lincls([*made.trials(made.select)[0].command[1:], "--max-minutes", "0"])
    assert main_lincls.worker(stopped) == 75
    assert main([str(path), "--out", str(tmp_path / "out"), "--slots", "1", "--", *own]) == 0
    assert "after 0 epochs and 1 step of the next" in Path(stopped.save_dir, "output.txt").read_text()
    found = rows(tmp_path / "out")
    assert [r["stage"] for r in found] == ["select"] * 4 + ["report"]
    many, one = (json.loads(Path(r["folder"], "result.json").read_text()) for r in found[3:])
    assert (many["train_images"], many["val_images"]) == (18, 6)
    assert (one["train_images"], one["val_images"]) == (24, 8)
    assert [(float(r["lr"]), float(r["acc1"])) for r in found[:4]] == [(r["lr"], r["acc1"]) for r in many["per_lr"]]
    assert (one["lr"], one["acc1"], one["seed"]) == (float(found[4]["lr"]), float(found[4]["acc1"]), 5)
    assert one["lr"] == max(many["per_lr"], key=lambda row: row["acc1"])["lr"]


@pytest.mark.dist
def test_a_fine_tuning_sweep_over_the_real_entry_point(image_folder, tmp_path):
    """The selected network itself is tested: the second run trains nothing and opens the test images for the first."""
    entries = {
        "main": "main_semisup.py", "out": str(tmp_path / "out"), "run": {"slots": 1},
        "flags": {"train-percent": 50, "val-share": 0.25, "epochs": 1}, "grid": {"lr-backbone": [0.1]},
        "select": {"metric": "val_acc1", "flags": {"val-only": True}},
        "report": {"metrics": ["acc1", "acc5"], "resume": True},
    }  # fmt: skip
    path = tmp_path / "semisup.yml"
    path.write_text(yaml.safe_dump(entries))
    assert main([str(path), "--", str(image_folder), *TINY]) == 0
    chosen, tested = (Path(r["folder"]) for r in rows(tmp_path / "out"))
    results = [json.loads((folder / "result.json").read_text()) for folder in (chosen, tested)]
    assert [r["test_images"] for r in results] == [0, 8]
    assert rows(tmp_path / "out")[1]["acc5"] == ""  # of two classes
    assert "acc1" not in results[0]
    assert results[0]["val_acc1"] == results[1]["val_acc1"]
    networks = [load(folder / "checkpoint_semisup.pth.tar")["state_dict"] for folder in (chosen, tested)]
    assert differences(*networks) == []
    assert "Epoch: [0]" in (chosen / "output.txt").read_text()
    assert "Epoch: [0]" not in (tested / "output.txt").read_text()
