"""Where a run is or has stopped, why, and what to type next: from its events and the lock of its folder."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from moco import doors, owner
from moco.processes import ALIVE, GONE
from moco.report.runs import Run, number

RUNNING, FINISHED, STOPPED, FAILED, KILLED, UNKNOWN = "running", "finished", "stopped", "failed", "killed", "unknown"


@dataclass
class Ending:
    """What became of a run.

    Args:
        state: one of this file's words. text: a sentence or two. next: a command to type, or empty.
    """

    state: str
    text: str
    next: str = ""


def ending(run: Run) -> Ending:
    """What became of the run; its folder is left as it is."""
    marks = [event for event in run.events if event["kind"] in ("begin", "end")]
    last = marks[-1] if marks else None
    if last and last["kind"] == "end":
        return _ended(run, last)
    state, who, beat = owner.look_at(run.folder, _owner_kind(run))
    where = place(run)
    if state == ALIVE:
        return Ending(RUNNING, f"at work{where}: {who}")
    if state != GONE:
        age = time.time() - beat
        if age < owner.WATCH_SECONDS:
            return Ending(
                RUNNING, f"at work{where} on another machine: {who}, last sign of life {max(0, age):.0f} s ago"
            )
        return Ending(UNKNOWN, f"on another machine: {who}; no sign of life for {duration(age)}")
    if last:
        return Ending(KILLED, f"killed{where}: its process is gone and has recorded no end", resume(last))
    return Ending(UNKNOWN, f"its end is not recorded{where}: an older version wrote this log, or the run was killed")


def _owner_kind(run: Run) -> str:
    return {"log": "", "lincls": "result", "semisup": "result"}.get(run.log, run.log)


def _ended(run: Run, event: dict[str, Any]) -> Ending:
    reason, code = str(event.get("reason", "")), number(event.get("exit_code"))
    text, following = str(event.get("text") or ""), str(event.get("next") or "")
    after = f"{place(run, event)}, exit code {code:.0f}" if code is not None else place(run, event)
    if reason == "finished":
        return Ending(FINISHED, f"finished{after}")
    if reason == "error":
        return Ending(FAILED, f"failed{after}" + (f": {text}" if text else ""), following)
    by = {"max-minutes": "the time limit (--max-minutes)"}.get(reason, reason)
    return Ending(STOPPED, f"stopped by {by}{after}", following)  # the text is the last line: it says the same


def resume(begin: dict[str, Any]) -> str:
    """What continues a run that was killed; empty where its command is damaged."""
    command = begin.get("command")
    with contextlib.suppress(ValueError):
        return doors.resumed(command) if isinstance(command, str) and command else ""
    return ""


def place(run: Run, event: dict[str, Any] | None = None) -> str:
    """`` after step 1200 (epoch 3)``, of an event or of the last record; empty where nothing was recorded."""
    if run.log in ("knn", "few_shot", "lr_find"):  # measured in one go
        return ""
    step, epoch = (number((event or {}).get(name)) for name in ("step", "epoch"))
    if step is None and run.records:
        step = run.step
        epoch = run.figures["epoch"][1][-1] if "epoch" in run.figures else None
    if step is None:
        return ""
    return f" after step {step:.0f}" + (f" (epoch {epoch:.0f})" if epoch is not None and epoch == epoch else "")


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 3.5 h, 2 days."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.0f} days"
