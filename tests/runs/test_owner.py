"""Two runs in one folder: who may work there, what is left by who is gone, and names of files in the making."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, TINY, records

import main_pretrain
from moco import files, owner, processes
from moco.errors import UserError

NOBODY = 2**22 + 1  # above every number that Linux gives


@pytest.fixture(autouse=True)
def free(monkeypatch):
    """Nothing is held before and after; beats and watches are short."""
    monkeypatch.setattr(owner, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(owner, "WATCH_SECONDS", 0.4)
    yield
    owner.release()


@pytest.fixture
def other():
    """Another process that lives."""
    process = subprocess.Popen(["sleep", "100"])
    yield process
    process.kill()
    process.wait()


def held_by(folder: Path, pid: int, /, **changed) -> Path:
    """The file of a run of process ``pid`` of this machine, and what is changed."""
    machine, started = processes.this_process().machine, processes._started(pid) if processes._exists(pid) else 1
    entries = {"host": "here", "machine": machine, "pid": pid, "started": started, "since": "noon", "id": "0"}
    path = folder / "owner.json"
    path.write_text(json.dumps(entries | changed))
    return path


def test_a_folder_is_held_until_it_is_given_back(tmp_path):
    owner.hold(str(tmp_path))
    entries = json.loads((tmp_path / "owner.json").read_text())
    assert (entries["pid"], entries["host"]) == (os.getpid(), os.uname().nodename)
    owner.hold(str(tmp_path))  # the same
    owner.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_made_for_nothing_goes_again(tmp_path):
    owner.hold(str(tmp_path / "a" / "b"))
    owner.release()
    assert list(tmp_path.iterdir()) == []
    owner.hold(str(tmp_path / "a" / "b"))
    (tmp_path / "a" / "result").write_text("")
    owner.release()
    assert os.listdir(tmp_path / "a") == ["result"]


def test_a_living_process_of_this_machine_is_not_disturbed(tmp_path, other):
    path = held_by(tmp_path, other.pid)
    before = path.read_text()
    with pytest.raises(UserError, match=f"in use by process {other.pid} on here, begun noon; wait for its end, end it"):
        owner.hold(str(tmp_path))
    assert path.read_text() == before
    owner.hold(str(tmp_path), "result")  # a run of another kind
    assert path.read_text() == before


@pytest.mark.parametrize("how", ["killed", "another with its number", "no such number"])
def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(tmp_path, other, capsys, how):
    changed = {"killed": {}, "another with its number": {"started": 1}, "no such number": {"pid": NOBODY}}[how]
    held_by(tmp_path, other.pid, **changed)
    if how == "killed":  # its parent has not yet asked for the exit code
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    owner.hold(str(tmp_path))
    said = capsys.readouterr().err
    assert "is taken over from process" in said
    assert "watching" not in said
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()
    assert len(list(tmp_path.iterdir())) == 1


def test_another_machines_run_is_watched(tmp_path, capsys):
    """The time of its file, be it what it may: the clock there is no concern."""
    path = held_by(tmp_path, os.getpid(), machine="another", host="node7")
    ended = threading.Event()

    def beat() -> None:
        when = 10**18
        while not ended.wait(0.05):
            when -= 10**15  # backwards
            os.utime(path, ns=(when, when))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on node7"):
            owner.hold(str(tmp_path))
    finally:
        ended.set()
        thread.join()
    held_by(tmp_path, os.getpid(), machine="a11", host="node7", started=1)
    half = tmp_path / f"x.a11-{os.getpid()}-1-0123abcd.tmp"
    others = tmp_path / "x.a11-1-1-0123abcd.tmp"
    half.touch()
    others.touch()
    owner.hold(str(tmp_path))
    assert "node7, begun" in capsys.readouterr().err
    assert (half.exists(), others.exists()) == (False, True)


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff\x00", b"[" * 9_000, b"[]", b"{}", b'{"pid": 1}', b'{"host": 1, "machine": [], "pid": true, "id": ""}'],
)
def test_a_file_that_names_nobody_is_watched_too(tmp_path, capsys, content):
    (tmp_path / "owner.json").write_bytes(content)
    owner.hold(str(tmp_path))
    assert capsys.readouterr().err.count("owner.json does not name") == 2
    assert json.loads((tmp_path / "owner.json").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("pid", [-1, 0, True, 2**31, 10**30])
def test_a_number_that_no_process_has_names_nobody(tmp_path, pid):
    held_by(tmp_path, os.getpid(), pid=pid)
    assert owner._parse((tmp_path / "owner.json").read_bytes()) is None


def test_neither_a_pipe_nor_a_folder_hangs_or_crashes(tmp_path):
    os.mkfifo(tmp_path / "owner.json")
    owner.hold(str(tmp_path))
    owner.release()
    os.mkdir(tmp_path / "owner.json")
    with pytest.raises(UserError, match=r"owner\.json cannot be written"):
        owner.hold(str(tmp_path))


@pytest.mark.parametrize("how", ["taken over", "removed"])
def test_who_lost_the_folder_saves_nothing_more(tmp_path, capsys, how, other):
    owner.hold(str(tmp_path))
    files.write_text("first", str(tmp_path / "a"))
    path = tmp_path / "owner.json"
    content = path.read_text()
    path.unlink()
    if how == "taken over":
        path.write_text(content.replace(f'"pid": {os.getpid()}', f'"pid": {other.pid}'))
    reason = f"process {other.pid} on .* took it over" if how == "taken over" else "was removed"
    with pytest.raises(UserError, match=reason):
        files.write_text("second", str(tmp_path / "a"))
    assert (tmp_path / "a").read_text() == "first"
    assert owner.lost()
    files.write_text("elsewhere", str(tmp_path / "b" / "a"))
    owner.release()
    assert path.exists() == (how == "taken over")  # it is not this run's to remove


def test_a_beat_finds_out_too_and_says_so(tmp_path, capsys):
    owner.hold(str(tmp_path))
    path = tmp_path / "owner.json"
    before = path.stat().st_mtime_ns
    while path.stat().st_mtime_ns == before:
        time.sleep(0.01)
    path.write_text("{}")
    while not owner.lost():
        time.sleep(0.01)
    while "was removed or written over" not in capsys.readouterr().err:
        time.sleep(0.01)


def test_a_folder_that_is_gone_is_no_loss_of_it(tmp_path):
    """An unmounted one may come back: that is an OSError, as of any write."""
    owner.hold(str(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "away")
    with pytest.raises(UserError, match="cannot be written .*the folder is gone"):
        files.write_text("", str(tmp_path / "run" / "a"))
    assert not (tmp_path / "run").exists()
    (tmp_path / "away").rename(tmp_path / "run")
    files.write_text("", str(tmp_path / "run" / "a"))
    assert not owner.lost()


def test_a_newer_owner_is_not_taken_for_the_one_that_is_gone(tmp_path):
    path = held_by(tmp_path, NOBODY)
    gone = path.read_bytes()
    path.write_bytes(b"of a newer owner")
    assert not owner._replace(str(path), gone, b"mine")
    assert path.read_bytes() == b"of a newer owner"
    assert owner._replace(str(path), b"of a newer owner", b"mine")
    assert path.read_bytes() == b"mine"
    assert list(tmp_path.iterdir()) == [path]


def test_who_waited_for_its_turn_sees_that_another_took_the_folder(tmp_path, monkeypatch):
    """Both judged the same owner to be gone; at no instant is there no file, so none of them makes a new one."""
    path = held_by(tmp_path, NOBODY)
    gone = path.read_bytes()

    def flock(handle: int, operation: int) -> None:
        monkeypatch.undo()
        assert owner._replace(str(path), gone, b"the other's")

    monkeypatch.setattr(owner.fcntl, "flock", flock)
    assert not owner._replace(str(path), gone, b"mine")
    assert path.read_bytes() == b"the other's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_locks_and_another_users_file_are_no_hindrance(tmp_path, monkeypatch):
    def flock(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    path = held_by(tmp_path, NOBODY)
    path.chmod(0o444)
    monkeypatch.setattr(owner.fcntl, "flock", flock)
    owner.hold(str(tmp_path))
    assert json.loads(path.read_text())["pid"] == os.getpid()


TRY = """
import sys
from moco import owner
print("ready", flush=True)
for folder in sys.stdin:
    try:
        owner.hold(folder.strip())
        print("held", flush=True)
    except owner.UserError:
        print("refused", flush=True)
"""


@pytest.mark.dist
def test_of_several_that_take_over_at_once_one_does(tmp_path):
    pipe: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(subprocess.Popen([sys.executable, "-c", TRY], cwd=ROOT, **pipe)) for _ in range(5)]
        assert [run.stdout.readline() for run in runs] == ["ready\n"] * 5
        for number in range(200):
            folder = tmp_path / str(number)
            folder.mkdir()
            held_by(folder, NOBODY)
            for run in runs:
                run.stdin.write(f"{folder}\n")
            assert sorted(run.stdout.readline() for run in runs) == ["held\n", *["refused\n"] * 4]


# ------------------------------------------------------------------------------------------------ temporary names


def test_two_writers_of_one_name_do_not_meet(tmp_path):
    path = str(tmp_path / "a")
    with files.replacing(path) as one, files.replacing(path) as two:
        Path(one).write_text("one")
        Path(two).write_text("two")
    assert Path(path).read_text() == "one"  # put there last
    assert os.listdir(tmp_path) == ["a"]


def test_what_a_killed_writer_left_goes_and_what_a_living_one_writes_stays(tmp_path, other):
    me = processes.this_process()

    def beside(name: str, pid: int, started: int) -> Path:
        path = tmp_path / f"{name}.{me.machine}-{pid}-{started}-0123abcd.tmp"
        path.touch()
        return path

    dead, of_another_name = beside("a", NOBODY, 1), beside("b", NOBODY, 1)
    alive = beside("a", other.pid, processes._started(other.pid))
    foreign = tmp_path / "a.0123-1-1-0123abcd.tmp"
    foreign.touch()
    files.write_text("", str(tmp_path / "a"))
    assert [path.exists() for path in (dead, of_another_name, alive, foreign)] == [False, True, True, True]
    owner.hold(str(tmp_path))
    assert [path.exists() for path in (of_another_name, alive, foreign)] == [False, True, True]


# -------------------------------------------------------------------------------------------------------- programs

ENDLESS = [*TINY, "--epochs", 100_000, "--save-every", 100_000]


def quick_beat(args) -> int:
    owner.BEAT_SECONDS = 0.05
    return main_pretrain.worker(args) or 0


@pytest.mark.dist
def test_a_second_run_is_refused_and_the_first_loses_no_record(image_folder, tmp_path, start):
    words = [*ENDLESS, "--save-dir", tmp_path, image_folder]
    first = start(*words)
    first.wait_for("top1", 3)
    second = start(*words, "--overwrite")
    assert second.end() == 2
    assert second.text.count("error: ") == 1
    assert f"{tmp_path} is in use by process {first.pid} on " in second.text
    first.wait_for("top1", 20)
    os.kill(first.pid, signal.SIGTERM)
    assert first.end() == 143, first.text
    assert [record["step"] for record in records(tmp_path)] == [*range(1, 1 + first.text.count("top1"))]
    assert not (tmp_path / "owner.json").exists()
    third = start(*words, "--resume", "auto")
    third.wait_for("top1")
    os.kill(third.pid, signal.SIGKILL)
    third.process.join()
    fourth = start(*words, "--resume", "auto", "--max-minutes", 0)
    assert fourth.end() == 75, fourth.text
    assert f"is taken over from process {third.pid} on " in fourth.text
    assert "watching" not in fourth.text


@pytest.mark.dist
def test_a_run_that_lost_its_folder_stops_and_saves_nothing(image_folder, tmp_path, start):
    program = start(*ENDLESS, "--nproc", 2, "--save-dir", tmp_path, image_folder, main=quick_beat)
    program.wait_for("top1", 3)
    (tmp_path / "owner.json").write_text("{}")
    assert program.end() == 2, program.text
    assert f"error: {tmp_path} is no longer this run's: " in program.text
    assert "Traceback" not in program.text
    assert list(tmp_path.glob("*.pth.tar")) == []
