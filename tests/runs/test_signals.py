"""Signals at chosen instants: the exit code, one quiet line, a whole checkpoint where one is due, no process left."""

import functools
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment, load, wait_until

import main_pretrain
from moco import distributed, files, signals
from moco.cli import parse_pretrain
from moco.eval import between_epochs

LONG = [*TINY, "--epochs", 100_000, "--save-every", 100_000]
CODES = {signal.SIGUSR1: 75, signal.SIGHUP: 129, signal.SIGINT: 130, signal.SIGTERM: 143}


def left_in(group: int) -> list[str]:
    """The processes of a group that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, its = path.read_text().rsplit(")", 1)[1].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(its) == group and state != "Z":
            found.append(path.parent.name)
    return found


def ended(program, code: int) -> str:
    """What the program has said, when it has ended with this code, without a stack trace and with all its processes."""
    assert program.end() == code, program.text
    assert "Traceback" not in program.text and "leaked" not in program.text, program.text
    wait_until(lambda: not left_in(program.pid), "a process is left")
    return program.text


def end_of(folder) -> list[tuple]:
    """How the events of a run say that it ended: reason and exit code, once, or not at all."""
    events = [json.loads(line) for line in (folder / "log_events.jsonl").read_text().splitlines()]
    return [(event["reason"], event["exit_code"]) for event in events if event["kind"] == "end"]


# -------------------------------------------------------------------------------------------- before the first step


@pytest.mark.dist
def test_while_torch_is_imported(tmp_path):
    """Each main, and commands, with a torch whose import takes for ever."""
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    env = environment(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    mains = [[str(ROOT / f"{name}.py"), "DIR"] for name in ("main_pretrain", "main_lincls", "main_semisup")]
    doors = [["-m", "moco.describe", "x"], ["-m", "moco.embed", "x", "DIR"]]
    cases = [(words, number) for words in mains for number in CODES] + [(w, signal.SIGINT) for w in doors]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    started = [subprocess.Popen([sys.executable, *words], env=env, cwd=ROOT, **options) for words, _ in cases]
    for program, (words, number) in zip(started, cases, strict=True):
        assert program.stdout
        assert program.stdout.readline() == "importing\n"
        os.killpg(program.pid, number)
        said, _ = program.communicate(timeout=60)
        told = "stopped\n" if words[0] == "-m" else "stopped before the first step, nothing to save\n"
        assert (said, program.returncode) == (told, CODES[number]), words


def opening(rank: int, args) -> int:
    """A worker whose rank ``rank`` opens the data for ever, while a file is being written."""
    if distributed.rank() == rank:
        with files.replacing(os.path.join(args.save_dir, f"index{rank}")) as beside, open(beside, "w"):
            print("opening", flush=True)
            time.sleep(100)
    return distributed.largest(0)[0]  # the others wait


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "nproc", "to"),
    [(signal.SIGINT, 1, "group"), (signal.SIGUSR1, 2, "rank"), (signal.SIGHUP, 2, "pid"), (signal.SIGINT, 2, "group")],
)
def test_while_data_are_opened(number, nproc, to, image_folder, tmp_path, start):
    words = [*LONG, "--save-dir", tmp_path / "run", *(["--nproc", nproc] if nproc > 1 else []), image_folder]
    program = start(*words, main=functools.partial(opening, nproc - 1))
    program.wait_for("opening")
    if to == "group":
        os.killpg(program.pid, number)
    else:
        os.kill(program.pid if to == "pid" else program.pid_of_rank(1), number)
    said = ended(program, CODES[number])
    assert said.endswith("\nstopped before the first step, nothing to save\n"), said
    assert said.count("stopped") == 1
    assert list((tmp_path / "run").iterdir()) == []


# ---------------------------------------------------------------------------------------------------- in training


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "nproc", "to"), [(signal.SIGINT, 1, "group"), (signal.SIGHUP, 1, "pid"), (signal.SIGINT, 2, "group")]
)
def test_in_a_step_with_workers(number, nproc, to, image_folder, tmp_path, start):
    more = ["--nproc", nproc] if nproc > 1 else []
    program = start(*LONG, "-j", 2, *more, "--save-dir", tmp_path, image_folder)
    program.wait_for("top1", 4)
    (os.killpg if to == "group" else os.kill)(program.pid, number)
    said = ended(program, CODES[number])
    told = f"{number.name}: the run ends once what is under way is saved; a second Ctrl-C or SIGTERM ends it at once"
    assert [said.count(line) for line in (told, "saved ", f"by {number.name}")] == [1, 1, 1], said
    assert load(tmp_path)["run"]["step"] >= 4


def saving(again: bool, args) -> int | None:
    """main_pretrain.py's worker, whose first checkpoint is half written when the signal comes; with ``again`` it waits
    for a second."""
    save = files.torch_save

    def slowly(value, file) -> None:
        files.torch_save = save
        file.write(b"half")
        print("writing", flush=True)
        wait_until(signals.noted)
        if again:
            print("noted", flush=True)
            threading.Lock().acquire() and time.sleep(100)
        file.seek(0)
        save(value, file)

    def second(value, file) -> None:
        save(value, file)
        files.torch_save = slowly

    files.torch_save = second
    return main_pretrain.worker(args)


@pytest.mark.dist
@pytest.mark.parametrize("nproc", [1, 2])
def test_in_saving_and_the_second_time(nproc, image_folder, tmp_path, start):
    words = [*LONG, "-j", 1, "--save-every", 1, *(["--nproc", nproc] if nproc > 1 else []), image_folder]
    once, twice = (
        start(*words, "--save-dir", tmp_path / name, main=functools.partial(saving, again))
        for name, again in (("once", False), ("twice", True))
    )
    for program in (once, twice):
        program.wait_for("writing")
        os.killpg(program.pid, signal.SIGINT)
    said = ended(once, 130)
    assert said.count("saved ") == 3  # two epochs, and one more step
    assert "\nstopped after 1 of 3 steps of epoch 2 by SIGINT: loss " in said
    assert load(tmp_path / "once")["run"]["step"] == 7
    assert end_of(tmp_path / "once") == [("signal SIGINT", 130)]
    twice.wait_for("noted")
    time.sleep(1.1 * signals.COPY_SECONDS)
    os.killpg(twice.pid, signal.SIGINT)
    said = ended(twice, 130)
    assert said.endswith("noted\nended at once; the newest checkpoint is whole\n")
    assert end_of(tmp_path / "twice") == [("signal SIGINT", 130)] * (nproc == 1)  # the others are killed: no end
    assert load(tmp_path / "twice")["run"]["step"] == 3
    assert len([*(tmp_path / "twice").glob("*.tmp")]) == nproc - 1  # processes of a launcher end as by kill -9


def measuring(args) -> int | None:
    """main_pretrain.py's worker, whose last evaluation takes as long as no signal has come."""
    report = between_epochs.report

    def slowly(*arguments) -> None:
        print("measuring", flush=True)
        wait_until(signals.noted)
        report(*arguments)

    between_epochs.report = slowly
    return main_pretrain.worker(args)


@pytest.mark.dist
def test_a_run_whose_last_step_is_done_keeps_its_result(image_folder, tmp_path, start):
    words = [*TINY, "--epochs", 1, "--knn-every", 1, "--save-dir", tmp_path, image_folder]
    program = start(*words, main=measuring)
    program.wait_for("measuring")
    os.kill(program.pid, signal.SIGTERM)
    said = ended(program, 0)
    assert re.fullmatch(r"finished: k-NN .*; next: .*", said.splitlines()[-1])
    assert load(tmp_path)["epoch"] == 1
    assert end_of(tmp_path) == [("finished", 0)]


# ------------------------------------------------------------------------------------------------- the listener


def test_what_was_ignored_at_the_start_stays_ignored_and_all_is_put_back():
    before = {number: signal.getsignal(number) for number in CODES}
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.listening():
            signals.hold()
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            wait_until(signals.noted)
            assert signals.noted() == [signal.SIGUSR1]
            assert signals.code() == CODES[signal.SIGUSR1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[signal.SIGHUP])
    assert {number: signal.getsignal(number) for number in CODES} == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(CODES)
    assert (signals.noted(), signals.code(), signals.twice()) == ([], None, False)


def test_a_second_command_of_one_process_listens_in_place_of_the_first():
    before = {number: signal.getsignal(number) for number in CODES}
    for _ in range(2):
        assert signals.run(lambda: 3) == 3
    signals.end()
    assert {number: signal.getsignal(number) for number in CODES} == before
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, []) & set(CODES)


@pytest.mark.parametrize(
    ("seconds", "scheduled", "senders", "again"),
    [
        (0.0, False, "opo", [False, True, True]),
        (9e9, False, "opo", [False, False, False]),  # a terminal signals the group, and the launcher passes it on
        (0.0, True, "ppo", [False, False, True]),  # torchrun and srun pass on what reaches the ranks too
    ],
)
def test_copies_are_no_second_signal(seconds, scheduled, senders, again, monkeypatch):
    monkeypatch.setattr(signals, "COPY_SECONDS", seconds)
    seen: list[bool] = []
    with signals.listening(), signals.led_by(lambda number, again: seen.append(again)):
        signals.of_several(1, scheduled)
        listener = signals._mine()
        assert listener
        for sender in senders:
            listener.take(signal.SIGTERM, os.getppid() if sender == "p" else 0)
    assert seen == again


def test_a_program_that_ends_at_once_records_the_signal_of_its_exit_code(monkeypatch):
    codes, recorded = [], []
    monkeypatch.setattr(signals, "COPY_SECONDS", 0.0)
    monkeypatch.setattr(signals, "parting", [lambda *end: recorded.append(end)])
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "setswitchinterval", lambda seconds: None)
    with signals.listening():
        signals.hold()
        listener = signals._mine()
        assert listener
        for number in (signal.SIGTERM, signal.SIGINT):
            listener.take(number)
    assert (recorded, codes) == ([(143, "signal SIGTERM")], [143])


TELLING = """
import sys, time
from moco import signals
from moco.errors import tell
signals.begin()
signals.hold()
tell("ready")
while not signals.noted():
    time.sleep(0.01)
tell("x" * 99999)
sys.stdout.write("y")
tell("z", error=True)
"""


@pytest.mark.dist
@pytest.mark.parametrize("gone", ["reader", "terminal"])
def test_a_reader_or_terminal_that_is_gone_is_no_error(gone):
    """`| head`, and a window that was closed: what is still to be said goes nowhere."""
    reading, writing = os.pipe() if gone == "reader" else pty.openpty()
    both = {"stdout": writing, "stderr": subprocess.PIPE if gone == "reader" else writing}
    program = subprocess.Popen([sys.executable, "-c", TELLING], cwd=ROOT, **both)
    os.close(writing)
    assert os.read(reading, 99).strip() == b"ready"
    os.close(reading)
    program.send_signal(signal.SIGHUP)
    _, said = program.communicate(timeout=60)
    assert program.returncode == 0
    assert not said or said.count(b"\n") == 2 and said.endswith(b"\nz\n")


def test_help_to_a_reader_that_is_gone(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w", encoding="utf-8") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        with pytest.raises(SystemExit, match="0"):
            parse_pretrain(["--help"])
