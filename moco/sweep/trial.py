"""One trial: a process of the entry point in its own folder, and the record of how it ended.

A folder holds what the entry point writes (checkpoints, log, result.json), output.txt (what it printed), trial.json
(the record, written when it has ended) and lock. The process itself holds the lock, so it is held exactly as long as
the trial runs, even when the sweep that started it is gone.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from moco import files, signals
from moco.errors import STOP_EXIT, UserError
from moco.sweep.results import Figure
from moco.sweep.spec import Spec, Stage, Trial

DONE, FAILED, STOPPED, OUT_OF_TIME = "done", "failed", "stopped", "out of time"
RECORD, RESULT, LOG, OUTPUT, LOCK = "trial.json", "result.json", "log.jsonl", "output.txt", "lock"
DAMAGED: dict[str, Any] = {"": None}  # what is read of such a file
GRACE_SECONDS = 60  # between SIGTERM and SIGKILL: time to finish a step and save
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Record:
    """How a trial ended. exit_code: of the process, 128 + N after signal N, None when none is known. attempt: names
    this end of the trial; empty for a result without a record and in records of earlier versions."""

    status: str
    exit_code: int | None = None
    seconds: float = 0.0
    last_line: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    attempt: str = ""

    def summary(self) -> str:
        """For people."""
        if self.status == DONE:
            return f"done in {self.seconds:.0f} s"
        code = "" if self.exit_code is None else f" (exit code {self.exit_code})"
        return f"{self.status}{code}: {self.last_line or 'no output'}"


@dataclass(frozen=True)
class Slot:
    """A share of this machine: environment variables and the cores a trial may use (empty: all)."""

    variables: dict[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()


def read_record(folder: str) -> Record | None:
    """How the trial in ``folder`` ended last; None when it has not ended, which holds of a damaged record too.

    A result without a record is that of a trial that finished when its sweep was gone. A trial whose result is damaged
    counts as failed.
    """
    record = _record(_entries(folder, RECORD) or {})
    if record and record.status != DONE:
        return record
    result = _entries(folder, RESULT)
    if result is DAMAGED:
        return record and replace(record, status=FAILED, last_line=f"{RESULT} is damaged")
    return record or (Record(DONE) if result is not None else None)


def damaged(folder: str) -> list[str]:
    """Names of the files of a trial that are there and cannot be read."""
    found = {name: _entries(folder, name) for name in (RECORD, RESULT)}
    return [
        n for n, entries in found.items() if entries is DAMAGED or (n == RECORD and entries and not _record(entries))
    ]


def _entries(folder: str, name: str) -> dict[str, Any] | None:
    """A JSON file's dictionary; None where there is no file, DAMAGED for anything else."""
    try:
        with open(files.regular_handle(os.path.join(folder, name)), encoding="utf-8") as file:
            found = files.json_of(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return DAMAGED
    return found if isinstance(found, dict) else DAMAGED


def _record(entries: dict[str, Any]) -> Record | None:
    """None unless everything is of its type; what is not known, of a later version, is left out."""
    known = {entry.name: entries[entry.name] for entry in fields(Record) if entry.name in entries}
    record = Record(**{"status": "", **known})
    sound = record.status in (DONE, FAILED, STOPPED, OUT_OF_TIME) and _finite(record.seconds) is not None
    sound = sound and type(record.exit_code) in (int, type(None)) and type(record.settings) is dict
    return record if sound and type(record.last_line) is type(record.attempt) is str else None


def settled(folder: str, before: str | None) -> Record | None:
    """The record that leaves nothing to do: done at any time, or failed since the sweep began (so it is not tried twice
    by two sweeps at once, and is tried again by the next one).

    before: the ``attempt`` of the record that was there when the sweep began, None where there was none. No clock is
    asked: those of two machines differ, and one can be set back.
    """
    record = read_record(folder)
    if record is None or record.status == DONE:
        return record
    return record if record.status in (FAILED, OUT_OF_TIME) and record.attempt != before else None


def write_record(trial: Trial, record: Record) -> None:
    """Complete whenever it exists."""
    settings = {**trial.settings, "seed": trial.seed}
    ended = time.strftime("%Y-%m-%d %H:%M:%S %z")  # for people
    entries = {**asdict(record), "settings": settings, "attempt": secrets.token_hex(8), "ended": ended}
    files.write_json(entries, os.path.join(trial.folder, RECORD), "--out")


def number(trial: Trial, metric: str) -> float | None:
    """A figure of a trial: ``metric`` in result.json or, for an entry point that writes none, its last value in
    log.jsonl. None when the trial is not done or has no such finite number.

    A run of many values of a flag keeps each one's figures in a row of ``per_FLAG``.
    """
    record, path = read_record(trial.folder), os.path.join(trial.folder, RESULT)
    if record is None or record.status != DONE:
        return None
    if not os.path.isfile(path):
        return _finite(_last_logged(os.path.join(trial.folder, LOG), metric))
    found = files.read_json(path)
    if trial.row:
        flag, value = trial.row
        rows = found.get(f"per_{flag}")
        rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
        found = next((row for row in rows if row.get(flag) == value), {})
    return _finite(found.get(metric))


def figure(spec: Spec, stage: Stage, setting: dict[str, Any], metric: str) -> Figure:
    """A metric of a setting, from its finished trials."""
    found = [number(trial, metric) for trial in spec.trials(stage, [setting])]
    return Figure([x for x in found if x is not None], len(found))


def difference(spec: Spec, stage: Stage, setting: dict[str, Any], baseline: dict[str, Any], metric: str) -> Figure:
    """A metric of a setting minus the baseline's of the same seed, for the seeds that have both."""
    pairs = zip(spec.trials(stage, [setting]), spec.trials(stage, [baseline]), strict=True)
    found = [(number(mine, metric), number(other, metric)) for mine, other in pairs]
    return Figure([a - b for a, b in found if a is not None and b is not None], len(found))


def not_measured(trial: Trial, metric: str) -> str:
    """Why a finished trial says that it has no such figure (top-5 of five classes), or an empty string."""
    reasons = files.read_json(os.path.join(trial.folder, RESULT)).get("not_measured")
    return str(reasons.get(metric, "")) if isinstance(reasons, dict) else ""


def _finite(value: Any) -> float | None:
    with contextlib.suppress(OverflowError):  # an integer that no float holds
        return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def running(folder: str) -> bool:
    """Whether a process, of whatever sweep, works in ``folder`` now."""
    if not os.path.isdir(folder):
        return False
    with _locked(folder) as mine:
        return mine is None


def run_trial(
    trial: Trial, slot: Slot, minutes: float | None, before: str | None, stop: threading.Event | None = None
) -> None:
    """Run a trial to its end and write its record; nothing happens when it is settled or another process runs it. One
    that ends with STOP_EXIT (75), as it was asked to or as something outside was gone, goes on as long as it gets on.

    Args:
        minutes: after which it gets SIGTERM; None for no limit.
        before: see :func:`settled`.
        stop: when set, the trial gets SIGTERM.
    """
    os.makedirs(trial.folder, exist_ok=True)
    with _locked(trial.folder) as lock:
        if lock is None or settled(trial.folder, before):
            return
        for name in (RECORD, RESULT):  # of an earlier attempt: they would speak for this one
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(trial.folder, name))
        path, began = os.path.join(trial.folder, OUTPUT), time.monotonic()
        if trial.parent and not os.path.exists(path):
            _take_over(trial.parent, trial.folder)
        start, deadline = os.path.getsize(path) if os.path.exists(path) else 0, began + 60 * (minutes or math.inf)
        code, again = None, True
        try:
            while again:
                status, saved = STOPPED, _saved(trial.folder)  # what an exception, of a scheduler, leaves behind
                with open(path, "ab") as output:
                    process = _start(trial, slot, output, lock)
                try:
                    status = _wait(process, stop or threading.Event(), deadline)
                finally:
                    code = _end(process)
                again = code == STOP_EXIT and not status and _saved(trial.folder) != saved
        finally:
            status = DONE if code == 0 else status or FAILED
            last = _last_line(path, start)
            write_record(trial, Record(status, code, round(time.monotonic() - began, 1), last))


def _saved(folder: str) -> dict[str, int]:
    """A trial's checkpoints and when each was written: one that ends with STOP_EXIT and has got on is continued."""
    found = (entry for entry in os.scandir(folder) if entry.name.endswith((".tar", ".pth", ".pt", ".ckpt")))
    return {entry.name: entry.stat().st_mtime_ns for entry in found}


def _take_over(parent: str, folder: str) -> None:
    """Copy what a finished trial would resume from."""
    for entry in os.scandir(parent):
        own = entry.name in (RECORD, RESULT, OUTPUT, LOCK) or entry.name.startswith("owner")
        if entry.is_file() and not own and not entry.name.endswith(".tmp"):
            shutil.copyfile(entry.path, os.path.join(folder, entry.name))


def _start(trial: Trial, slot: Slot, output: Any, lock: int) -> subprocess.Popen:
    with signals.open_to_children():
        process = subprocess.Popen(
            [sys.executable, *trial.command], stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **slot.variables},
            start_new_session=True,  # Ctrl-C reaches the sweep alone, which lets the trial save
            pass_fds=(lock,),
        )  # fmt: skip
    if slot.cores and hasattr(os, "sched_setaffinity"):  # threads and loader workers then count these cores only
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(process.pid, slot.cores)
    return process


def _wait(process: subprocess.Popen, stop: threading.Event, deadline: float) -> str:
    """Why to end the process; empty when it has ended by itself."""
    while process.poll() is None:
        if time.monotonic() > deadline:
            return OUT_OF_TIME
        if stop.wait(POLL_SECONDS):
            return STOPPED
    return ""


def _end(process: subprocess.Popen) -> int:
    """End the process if it runs, then whatever it started; returns the exit code, 128 + N after signal N. At the
    second signal to the sweep it is given no more time."""
    process.terminate()
    patience = time.monotonic() + GRACE_SECONDS
    while process.poll() is None and time.monotonic() < patience and not signals.twice():
        time.sleep(POLL_SECONDS)
    process.kill()
    process.wait()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)  # loader workers of a process that was killed hold the lock too
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[int | None]:
    """The folder's lock as an open file, None when another process has it; it falls when all copies are closed.

    Raises:
        UserError: the file system has no locks. Where each machine has its own (NFS mounted with nolock or
            local_lock), two machines may start a trial at once; then the trials' own lock refuses one.
    """
    handle = os.open(os.path.join(folder, LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        except OSError as error:
            raise UserError(f"{folder} cannot be locked ({error.strerror}); choose another --out.") from error
        else:
            yield handle
    finally:
        os.close(handle)


def _last_logged(path: str, name: str) -> Any:
    value = None
    for record in files.records(path):
        value = record.get(name, value)
    return value


def _last_line(path: str, start: int) -> str:
    with open(path, "rb") as file:
        file.seek(max(start, os.path.getsize(path) - 10_000))
        lines = file.read().decode(errors="replace").strip().splitlines()
    return lines[-1].strip()[:500] if lines else ""
