"""Meters and the run's log, also across an interruption."""

import errno
import json
import math
import sys
import time
import types

import pytest
import torch
from conftest import records

from moco import files, owner
from moco.errors import TrainingError, UserError
from moco.train.metrics import Mean, accuracy
from moco.train.outage import StoppedError
from moco.train.runlog import RunLog
from moco.train.timers import Stopwatch


def resumed_at(step: int) -> dict:
    """What a log is given of a run that goes on after so many steps."""
    return {"resumed": "x.pth.tar", "where": lambda: (step, 0)}


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
    (line,) = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert abs(json.loads(line)["time"] - time.time()) < 60
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
    log = RunLog(str(tmp_path), tensorboard=False, **resumed_at(2))
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
    log = RunLog(str(tmp_path), **resumed_at(2))
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
    ] * 3  # that of the events too
    names = (f"{tmp_path}/log.jsonl", "TensorBoard's file", f"{tmp_path}/log_events.jsonl")
    assert said[3:] == ["step 3", *(f"{name} is written again" for name in names)]


def test_a_full_disk_at_a_resume_leaves_the_old_log(tmp_path, full_disk):
    log = RunLog(str(tmp_path), tensorboard=False)
    for step in range(20):
        log.scalars(step, {"x": step})
    log.close()
    before = (tmp_path / "log.jsonl").read_bytes()
    with full_disk(100), pytest.raises(UserError, match=r"log.jsonl cannot be written \(.*File too large\)"):
        RunLog(str(tmp_path), tensorboard=False, **resumed_at(10))
    assert (tmp_path / "log.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "log_events.jsonl"]


def test_events_say_how_a_run_began_what_it_warned_of_and_how_it_ended(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    monkeypatch.setattr(sys, "argv", ["moco", "pretrain", "my images", "--lr=1", "--resume", "old"])
    at = [0, 0]
    path = tmp_path / "log_events.jsonl"
    with RunLog(str(tmp_path), tensorboard=False, where=lambda: (at[0], at[1])) as log:
        log.line("first line\nwarning: the queue is long\nlast line")
        at[:] = 7, 1
        log.warn("odd")
        log.line("no warning: here")
    begin = {"kind": "begin", "text": "", "resumed": None}
    command, again = ("moco pretrain 'my images' --lr=1" + more for more in (" --resume old", " --resume auto"))
    first = [
        {"step": 0, "epoch": 0, **begin, "command": command},
        {"step": 0, "epoch": 0, "kind": "warning", "text": "the queue is long"},
        {"step": 7, "epoch": 1, "kind": "warning", "text": "odd"},
        {"step": 7, "epoch": 1, "kind": "end", "text": "finished", "reason": "finished", "exit_code": 0, "next": None},
    ]
    assert records(path) == first
    assert "\nwarning: odd\nno warning: here\n" in capsys.readouterr().out
    path.write_text(path.read_text() + '{"step": 9, "ki')  # a kill in the middle of a line
    for code, reason in ((143, "signal SIGTERM"), (75, "max-minutes")):
        with RunLog(str(tmp_path), tensorboard=False, **resumed_at(5)) as log:
            log.ended(code, reason, "after 1 of 3 steps of epoch 0")
    *older, begun, ended, _, last = records(path)
    assert older == first  # all of it stays, also what lies beyond the checkpoint
    assert begun == {"step": 5, "epoch": 0, **begin, "resumed": "x.pth.tar", "command": command}
    end = {"step": 5, "epoch": 0, "kind": "end", "next": again}
    for found, name, more in ((ended, "SIGTERM", {"reason": "signal SIGTERM", "exit_code": 143}),
                              (last, "--max-minutes", {"reason": "max-minutes", "exit_code": 75})):  # fmt: skip
        text = f"stopped after 1 of 3 steps of epoch 0 by {name}; continue with {again}"
        assert found == {**end, "text": text, **more}
    monkeypatch.setattr(sys, "argv", ["pytest"])
    with RunLog(str(tmp_path), tensorboard=False):
        pass
    assert [(e["kind"], e.get("command", e.get("next"))) for e in records(path)] == [("begin", None), ("end", None)]


def run_of_a_log(folder, work) -> None:
    """``work(log)`` as a run."""
    with RunLog(str(folder), tensorboard=False) as log:
        work(log)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [(UserError("no such file"), 2, "no such file"), (TrainingError("nan"), 3, "nan"), (KeyError("x"), 1, "KeyError:"),
     (OSError(errno.ENOSPC, "full", "a"), 75, "a cannot be written"), (MemoryError(), 75, "out of memory"),
     (RuntimeError("gloo/ x: closed"), 75, "the connection to another process is lost"),
     (StoppedError("while waiting", 143, "signal SIGTERM"), 143, "while waiting")],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_a_run_that_an_error_ends_says_so_in_its_events(error, code, text, tmp_path):
    def work(log):
        log.ended(75, "max-minutes")  # what comes later counts
        raise error

    with pytest.raises(type(error)):
        run_of_a_log(tmp_path, work)
    end = records(tmp_path / "log_events.jsonl")[-1]
    assert (end["kind"], end["exit_code"]) == ("end", code)
    assert end["reason"] == getattr(error, "reason", "error")
    assert end["text"].startswith(text)


def test_a_folder_that_another_run_has_taken_gets_no_more_records(tmp_path):
    def work(log):
        (tmp_path / "owner.json").write_text("{}")
        files.write_text("of the other\n", str(tmp_path.parent / "other"))
        (tmp_path.parent / "other").rename(tmp_path / "log_events.jsonl")  # as the other's log puts it there

    owner.hold(str(tmp_path))
    with pytest.raises(UserError, match="no longer this run's"):
        run_of_a_log(tmp_path, work)
    assert (tmp_path / "log_events.jsonl").read_text() == "of the other\n"


def test_events_that_a_full_disk_refuses_are_written_once_it_has_room(tmp_path, capsys, full_disk):
    log = RunLog(str(tmp_path), tensorboard=False)
    with full_disk((tmp_path / "log_events.jsonl").stat().st_size + 5):
        log.warn("one")
        log.scalars(1, {"x": 1}, text="step 1")
    assert len(records(tmp_path / "log_events.jsonl")) == 1
    log.warn("two")
    log.close()
    found = [event["text"].partition(" (")[0] for event in records(tmp_path / "log_events.jsonl")]
    cannot = f"{tmp_path}/log_events.jsonl cannot be written"
    assert found == ["", "one", cannot, "two"]
    said = [line.partition(" (")[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["warning: one", f"warning: {cannot}", "step 1", "warning: two",
                    f"{tmp_path}/log_events.jsonl is written again"]  # fmt: skip


def test_two_kinds_of_run_share_a_folder(tmp_path):
    for name in ("log", "lincls"):
        log = RunLog(str(tmp_path), tensorboard=False, name=name)
        log.scalars(1, {name: 1})
        log.close()
    assert records(tmp_path / "log.jsonl") == [{"step": 1, "epoch": 0, "log": 1.0}]
    assert records(tmp_path / "lincls.jsonl") == [{"step": 1, "epoch": 0, "lincls": 1.0}]


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
    for resumed in ({}, resumed_at(1)):
        log = RunLog(str(tmp_path), tensorboard=False, wandb="p", config={"lr": 1}, **resumed)
        log.scalars(1, {"x": 2})
        log.close()
    once = [(1, {"x": 2.0}), "finished"]
    assert calls == [("p", None, {"lr": 1}), *once, ("p", "abc", {"lr": 1}), *once]
    (tmp_path / "log.wandb").write_bytes(b"\0\xff\x1b[2J")
    RunLog(str(tmp_path), tensorboard=False, wandb="p", **resumed_at(1)).close()
    assert calls[-2][1] is None
    assert "a new page is begun" in capsys.readouterr().out

    def fail(**_):
        raise ValueError("no\nnetwork")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(UserError, match="^--wandb p: no network$"):
        RunLog(str(tmp_path), tensorboard=False, wandb="p", **resumed_at(1))


def test_settings_are_kept_beside_the_log(tmp_path):
    with RunLog(str(tmp_path), tensorboard=False, config={"lr": 0.5, "path": tmp_path}):
        pass
    assert json.loads((tmp_path / "log_settings.json").read_text()) == {"lr": 0.5, "path": str(tmp_path)}
