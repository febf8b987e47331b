"""Meters and the run's log, also across an interruption."""

import json
import math
import sys
import types

import pytest
import torch
from conftest import records

from moco.errors import UserError
from moco.train.metrics import Mean, accuracy
from moco.train.runlog import RunLog
from moco.train.timers import Stopwatch


def test_accuracy_counts_labels_among_the_largest_logits():
    logits = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 9.0, 5.0]])
    labels = torch.tensor([0, 1, 2, 2])
    assert [int(c) for c in accuracy(logits, labels, (1, 2, 5))] == [1, 3, 4]


def test_broken_logits_are_not_counted_as_right():
    hits = accuracy(torch.full((50, 20), float("nan")), torch.arange(50) % 20, (1,))
    assert int(hits[0]) < 10


def test_mean_takes_numbers_and_tensors():
    mean = Mean()
    assert math.isnan(mean.value)
    for number in (1.0, 0.5, 1.5, torch.tensor(5.0, requires_grad=True)):
        mean.add(number)
    assert mean.value == 2.0


def test_stopwatch_splits_waiting_from_working(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("moco.train.timers.time.perf_counter", lambda: now[0])
    watch = Stopwatch()
    with watch.waiting():
        now[0] += 1.0
    now[0] += 3.0
    watch.count(20)
    assert watch.rates() == (5.0, 0.25)
    watch.steps += 2
    assert watch.seconds_per_step() == 2.0
    watch.restart()
    now[0] += 1.0
    assert watch.rates() == (0.0, 0.0)


def test_log_writes_lines_records_and_events(tmp_path, capsys):
    log = RunLog(str(tmp_path / "run"))
    log.line("hello")
    log.scalars(1, {"loss": 2.5, "bad": float("nan")}, text="step 1", epoch=0)
    with log.bar(3, desc="epoch") as bar:  # hidden, since this is no terminal
        bar.update()
        log.line("inside")
    assert records(tmp_path / "run") == [{"step": 1, "epoch": 0, "loss": 2.5, "bad": None}]
    log.close()
    log.close()
    captured = capsys.readouterr()
    assert captured.out.splitlines() == ["hello", "step 1", "inside"]
    assert captured.err == ""
    assert len(list((tmp_path / "run" / "tensorboard" / "log").iterdir())) == 1


def test_resumed_log_drops_what_the_interrupted_run_wrote_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(str(tmp_path), tensorboard=False)
    for step in (1, 2, 3, 4):
        log.scalars(step, {"x": step})
    log.close()
    path.write_text(path.read_text() + '{"step": 5, "x"')  # a kill in the middle of a line
    log = RunLog(str(tmp_path), tensorboard=False, resume_step=2)
    log.scalars(3, {"x": 30})
    log.close()
    assert [(r["step"], r["x"]) for r in records(path)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    RunLog(str(tmp_path), tensorboard=False).close()
    assert records(path) == []  # a new run begins a new log


def curve(folder, name="x"):
    """The (step, value) that TensorBoard shows of a run's events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard" / "log"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(name)]


def test_resumed_events_hide_the_steps_that_are_run_again(tmp_path):
    log = RunLog(str(tmp_path))
    for step in (1, 2, 3, 4):
        log.scalars(step, {"x": step})
    log.close()
    log = RunLog(str(tmp_path), resume_step=2)
    log.scalars(3, {"x": 30})
    log.close()
    assert curve(tmp_path) == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_records_that_a_full_disk_refuses_are_written_once_it_has_room(tmp_path, capsys, full_disk):
    log = RunLog(str(tmp_path))
    log.scalars(1, {"x": 1})
    with full_disk((tmp_path / "log.jsonl").stat().st_size + 5):
        log.scalars(2, {"x": 2})
        log.scalars(3, {"x": 3}, text="step 3")
        assert len(records(tmp_path)) == 1  # and no part of another
    log.scalars(4, {"x": 4})
    log.close()
    expected = [(step, float(step)) for step in (1, 2, 3, 4)]
    assert [(r["step"], r["x"]) for r in records(tmp_path)] == curve(tmp_path) == expected
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(" cannot")[2][:36] for line in said if "warning" in line] == [
        " be written ([Errno 27] File too larg"[:36]
    ] * 2
    assert said[2:] == ["step 3", f"{tmp_path}/log.jsonl is written again", "TensorBoard's file is written again"]


def test_a_full_disk_at_a_resume_leaves_the_old_log(tmp_path, full_disk):
    log = RunLog(str(tmp_path), tensorboard=False)
    for step in range(20):
        log.scalars(step, {"x": step})
    log.close()
    before = (tmp_path / "log.jsonl").read_bytes()
    with full_disk(100), pytest.raises(UserError, match=r"log.jsonl cannot be written \(.*File too large\)"):
        RunLog(str(tmp_path), tensorboard=False, resume_step=10)
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_two_kinds_of_run_share_a_folder(tmp_path):
    for name in ("log", "lincls"):
        log = RunLog(str(tmp_path), tensorboard=False, name=name)
        log.scalars(1, {name: 1})
        log.close()
    assert records(tmp_path / "log.jsonl") == [{"step": 1, "log": 1.0}]
    assert records(tmp_path / "lincls.jsonl") == [{"step": 1, "lincls": 1.0}]


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another --save-dir"):
        RunLog(str(tmp_path / "file" / "run"))


def test_wandb_is_optional_and_a_resumed_run_keeps_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install '\.\[wandb\]'"):
        RunLog(str(tmp_path), tensorboard=False, wandb="project")

    calls: list = []

    class Run:
        id = "abc"

        def log(self, numbers, step):
            calls.append((step, numbers))

        def finish(self):
            calls.append("finished")

    def init(**options):
        calls.append((options["project"], options["id"], options["config"]))
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for resume_step in (None, 1):
        log = RunLog(str(tmp_path), tensorboard=False, wandb="p", config={"lr": 1}, resume_step=resume_step)
        log.scalars(1, {"x": 2})
        log.close()
    once = [(1, {"x": 2.0}), "finished"]
    assert calls == [("p", None, {"lr": 1}), *once, ("p", "abc", {"lr": 1}), *once]
    (tmp_path / "log.wandb").write_bytes(b"\0\xff\x1b[2J")
    RunLog(str(tmp_path), tensorboard=False, wandb="p", resume_step=1).close()
    assert calls[-2][1] is None
    assert "a new page is begun" in capsys.readouterr().out

    def fail(**_):
        raise ValueError("no\nnetwork")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match="^--wandb p: no network$"):
        RunLog(str(tmp_path), tensorboard=False, wandb="p", resume_step=1)


def test_settings_are_kept_beside_the_log(tmp_path):
    with RunLog(str(tmp_path), tensorboard=False, config={"lr": 0.5, "path": tmp_path}):
        pass
    assert json.loads((tmp_path / "log_settings.json").read_text()) == {"lr": 0.5, "path": str(tmp_path)}
