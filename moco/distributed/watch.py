"""A process that stands still is found, named and ended, so that the run can start again.

A process that is stopped, waits for a dead disk or for a lock that nobody gives back holds up all others, in exchanges
that say nothing for half an hour. Here the main thread notes what it does (:class:`Pulse`, three attributes and no
exchange), and a thread beside it looks on. While the run trains, a process without a new note for the limit asks at the
store of the run who is behind. The first to know tells all; each writes the stacks of its threads to a file and leaves
with OUTAGE_EXIT. Who does not answer is left to who started it.

Only steps are watched so: what else a run does, such as a scan of the images, an evaluation or a checkpoint, may last.
The first step of a process may last FIRST_STEP times as long, as it compiles and starts the loader. But a process whose
watcher is silent for the limit, which only one that is stopped or gone with its machine is, is found at any time.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch.distributed as dist

from moco import signals
from moco.distributed import collectives
from moco.errors import OUTAGE_EXIT

FIRST_STEP = 3.0
LOOKS = 20  # in the time that a process may stand still
MOST_SECONDS = 30.0  # between two looks
WRITE_SECONDS = 5.0  # for the stacks' file; its disk may be the one that is dead
STALL_SECONDS = 2.0  # by which a busy machine may delay a thread
READERS = 2  # of the first ranks, which look for silent watchers all the time
MANY = 4  # processes that a sentence names


class Pulse:
    """What this process is doing. The main thread writes it, the watcher reads it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """As in a new process."""
        self.step, self.signs, self.doing = 0, 0, ""
        self.patience = 0.0  # how many times the limit it may stand still; 0: as long as it takes
        self._begun = False

    def begin_step(self, step: int) -> None:
        """Step number ``step`` begins, counted from 0; from here on this process is watched."""
        self.patience = 1.0 if self._begun else FIRST_STEP
        self._begun = True
        self.step, self.signs, self.doing = step, 0, "a step"

    def note(self, doing: str) -> None:
        """A part of a step begins."""
        self.doing = doing
        self.signs += 1

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around steps: behind them is what may last."""
        try:
            yield
        finally:
            self.pause("between epochs")

    def pause(self, doing: str) -> None:
        """Until the next step begins, what this process does may last."""
        self.patience, self.doing = 0.0, doing


pulse = Pulse()


class Note(NamedTuple):
    """What a process has last said of itself; ``looks`` grows as long as its watcher lives."""

    looks: int
    step: int
    signs: int
    doing: str
    where: str

    @property
    def place(self) -> str:
        """In the training."""
        return f"step {self.step}: {self.doing}"


def who_is_behind(before: list[Note | None], now: list[Note | None]) -> str:
    """Which processes hold up the others: whose watcher is silent, as it is stopped or gone with its machine; if none
    is, who has got least far. Where all have got equally far, no note tells them apart, and all are named.

    Args:
        before, now: the newest note of each process, None without one, and the same a few looks later.
    """
    notes = dict(enumerate(now))
    behind = [r for r, note in notes.items() if note is None or note == before[r]]
    how = "no sign of life from" if behind else "no progress of"
    if not behind:
        least = min((note.step, note.signs) for note in now if note)
        behind = [r for r, note in notes.items() if note and (note.step, note.signs) == least]
    named = [f"rank {r} ({note.where}), last in {note.place}" if (note := notes[r]) else f"rank {r}" for r in behind]
    more = f" and {len(named) - MANY} more" * (len(named) > MANY)
    others = sorted({note.doing for r, note in notes.items() if note and r not in behind})
    waiting = f"; the others: {', '.join(others[:MANY])}" * bool(others)
    return f"{how} {'; '.join(named[:MANY])}{more}{waiting}"


@contextlib.contextmanager
def watching(minutes: float, folder: str, report: Callable[[str], None]) -> Iterator[None]:
    """Around the work of a process that takes part in a run; every process of it has to enter.

    Args:
        minutes: that a process may stand still in its steps; 0: nobody watches.
        folder: gets hang_STEP_rankN.txt.
        report: told why the process ends, which it does with OUTAGE_EXIT, wherever its main thread is.
    """
    if not minutes:
        yield
        return
    watcher = Watcher(60 * minutes, folder, report)
    watcher.start()
    try:
        yield
    finally:
        watcher.stop()


class Watcher:
    """Two threads: one looks at this process, the other talks to the store, which may itself be gone."""

    def __init__(self, limit: float, folder: str, report: Callable[[str], None]) -> None:
        self.limit, self.folder, self.report = limit, folder, report
        self.every = min(limit / LOOKS, MOST_SECONDS)  # seconds
        self.rank, self.world = collectives.rank(), collectives.world_size()
        self.key = collectives.from_main(f"watch/{uuid.uuid4().hex}/")  # torchrun's store outlives a restart
        self.where = f"{socket.gethostname()}, process {os.getpid()}"
        self.ended, self.found = threading.Event(), threading.Event()  # the work has; somebody stands still
        self.written, self.agreed = threading.Event(), threading.Event()  # this one's stacks are; everybody's are
        self.asking, self.verdict = False, ""
        self.answered = time.monotonic()  # when the store last did
        self.threads = [threading.Thread(target=self._look, daemon=True)]
        if self.world > 1:
            self.threads.append(threading.Thread(target=self._talk, daemon=True))

    def start(self) -> None:
        """Begin to watch; what is said of the steps before does not count."""
        pulse.reset()
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """The work has ended."""
        self.ended.set()
        for thread in self.threads:
            thread.join(WRITE_SECONDS)

    # ----------------------------------------------------------------------------------------- this process

    def _look(self) -> None:
        seen, since, looked = None, 0.0, time.monotonic()
        while not self.ended.wait(self.every / 2):
            now, got, patience = time.monotonic(), (pulse.step, pulse.signs), pulse.patience
            stopped = now - looked > 5 * self.every + STALL_SECONDS  # this process itself, perhaps with all others
            looked = now
            if got != seen or not patience or stopped:
                seen, since = got, now
            if stopped or self.world == 1:
                self.answered = now
            over = now - since - self.limit * patience if patience else -1.0
            if over >= 0 and self.world == 1:
                self._end(f"no progress of this process ({self.where}), last in {self._note(0).place}")
            self.asking = over >= 0
            if self.found.is_set():
                self._end(self.verdict)
            if now - self.answered > self.limit + 3 * self.every + STALL_SECONDS:  # the talk had its turn to say who
                self._end("no answer from the store at which the processes met, which rank 0's machine may hold")

    def _note(self, looks: int) -> Note:
        return Note(looks, pulse.step, pulse.signs, pulse.doing, self.where)

    def _end(self, sentence: str) -> None:
        """Leave, with the stacks of this process written and, if they answer, those of the others."""
        path = os.path.join(self.folder, f"hang_{pulse.step:08d}_rank{self.rank}.txt")
        writing = threading.Thread(target=self._write, args=(path, sentence), daemon=True)
        writing.start()
        writing.join(WRITE_SECONDS)
        if writing.is_alive():
            faulthandler.dump_traceback(2)  # standard error, whatever Python has in its place
        self.written.set()
        if self.world > 1:
            self.agreed.wait(max(3 * self.every, WRITE_SECONDS))
        stacks = "on standard error" if writing.is_alive() else f"in {path.replace(f'rank{self.rank}.', 'rank*.')}"
        minutes = f"{self.limit / 60:g} minutes"
        self.report(f"for {minutes} {sentence}. The stacks of who answers are {stacks}; go on with --resume auto.")
        signals.part(OUTAGE_EXIT, "error")
        for child in multiprocessing.active_children():  # the loader's, which would wait for ever
            child.kill()
        os._exit(OUTAGE_EXIT)

    def _write(self, path: str, sentence: str) -> None:
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{sentence}\nrank {self.rank} ({self.where}), in {self._note(0).place}\n\n")
            file.flush()
            faulthandler.dump_traceback(file)

    # ----------------------------------------------------------------------------------------- among the others

    def _talk(self) -> None:
        store: Any = dist.distributed_c10d._get_default_store()
        before, since, looked = None, 0.0, time.monotonic()
        with contextlib.suppress(RuntimeError):  # a store that is gone: the main thread finds out
            for looks in itertools.count():
                store.set(f"{self.key}{self.rank}", json.dumps(self._note(looks)))
                if store.check([f"{self.key}verdict"]):
                    self._leave_together(store)
                    return
                now = time.monotonic()
                if not (self.asking or self.rank < READERS) or now - looked > 5 * self.every + STALL_SECONDS:
                    before = None  # not wanted, or from before this process was itself stopped
                else:
                    notes = self._notes(store)
                    moved = before and all(new not in (None, old) for new, old in zip(notes, before, strict=True))
                    if before is None or (moved and not self.asking):
                        before, since = notes, now
                    elif now - since > (max(3 * self.every, STALL_SECONDS) if self.asking else self.limit):
                        self._judge(store, before, notes)
                looked, self.answered = now, time.monotonic()
                if self.ended.wait(self.every):
                    return

    def _judge(self, store: Any, before: list[Note | None], now: list[Note | None]) -> None:
        if store.add(f"{self.key}judges", 1) == 1:  # the first one speaks for all
            alive = sum(note not in (None, earlier) for note, earlier in zip(now, before, strict=True))
            store.set(f"{self.key}verdict", json.dumps([who_is_behind(before, now), alive]))

    def _notes(self, store: Any) -> list[Note | None]:
        keys = [f"{self.key}{rank}" for rank in range(self.world)]
        return [Note(*json.loads(store.get(key))) if store.check([key]) else None for key in keys]

    def _leave_together(self, store: Any) -> None:
        self.verdict, alive = json.loads(store.get(f"{self.key}verdict"))
        self.found.set()
        self.written.wait()
        written = store.add(f"{self.key}written", 1)
        while written < alive:  # who leaves earlier takes others' connections away before they have written
            time.sleep(self.every / 4)
            written = store.add(f"{self.key}written", 0)
        self.agreed.set()
