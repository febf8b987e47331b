"""What a run says while it runs: meters, the console, log.jsonl, TensorBoard events, Weights & Biases.

Legend: N images, C classes.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

from moco import bars, distributed, doors, files, owner, resources, signals
from moco.errors import UserError, one_line, tell
from moco.train.ending import Reached, last_line

T = TypeVar("T")
WARNING = "warning: "
KEPT = 10_000  # records, some megabytes, that wait for a place that cannot be written


class _Place:
    """A place that records go to. What cannot be written is kept, ``KEPT`` records at most, and written before the
    next one that can: no training ends for a line of its log."""

    def __init__(
        self, name: str, write: Callable[..., object], close: Callable[[], object], say: Callable[[str], object]
    ) -> None:  # fmt: skip
        self.name, self.write, self.close, self.say = name, write, close, say
        self.waiting: deque[tuple] = deque(maxlen=KEPT)
        self.failed = False
        self._one_at_a_time = threading.RLock()  # a checkpoint's thread has warnings too

    def put(self, *record: Any) -> None:
        """Write the record behind those that wait, or keep it; tells when that begins and when it ends."""
        with self._one_at_a_time:
            self.waiting.append(record)
            self.catch_up()

    def catch_up(self) -> None:
        failed = self.failed
        try:
            while self.waiting:
                self.write(*self.waiting[0])
                self.waiting.popleft()
        except Exception as error:  # Weights & Biases has errors of its own
            self.failed = True  # before the warning, which is a record too
            if not failed:
                self.say(
                    f"warning: {self.name} cannot be written ({one_line(error)}); its records are kept until it can"
                )
        else:
            self.failed = False
            if failed:
                self.say(f"{self.name} is written again")

    def finish(self) -> None:
        """The last attempt."""
        self.catch_up()
        if self.waiting:
            self.say(f"warning: the last {len(self.waiting)} records of {self.name} are lost")
        self.close()


class _Appended:
    """A file that grows by whole pieces: one that the disk has no room for leaves no part behind."""

    def __init__(self, path: str) -> None:
        self.path, self._file = path, open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def append(self, data: bytes) -> None:
        if self._file.closed:
            owner.check(self.path)  # it may be another run's log by now
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        end, left = os.fstat(self._file.fileno()).st_size, memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            self.close()  # of a disk that was gone the handle stays stale
            raise

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()


class _Events:
    """TensorBoard's events, without the thread of its own writer, in which a full disk would be nobody's error.

    Events from before ``purge_step`` on are hidden by TensorBoard: a resumed run's curve does not double back.
    """

    def __init__(self, folder: str, purge_step: int) -> None:
        os.makedirs(folder, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.9f}.{socket.gethostname()}.{os.getpid()}"  # read in this order
        self._file = _Appended(os.path.join(folder, name))
        version = {"file_version": "brain.Event:2"}
        self._begin: list[dict[str, Any]] = [version, {"step": purge_step, "session_log": {"status": "START"}}]

    def write(self, step: int, numbers: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter

        values = [{"tag": name, "simple_value": value} for name, value in numbers.items()]
        events, piece = [*self._begin, {"step": step, "summary": {"value": values}}], io.BytesIO()
        for event in events:
            RecordWriter(piece).write(Event(wall_time=time.time(), **event).SerializeToString())
        self._file.append(piece.getvalue())
        self._begin = []

    def close(self) -> None:
        self._file.close()


class RunLog:
    """One run's log: readable lines on the console, numbers as ``NAME.jsonl``, TensorBoard events, and W&B if asked.

    Every process may call it; only the main one writes. To be used in ``with``, after which the run's folder is no
    longer held (:mod:`moco.owner`), or closed. Each record of the file is one line of JSON with ``step``, ``epoch``,
    ``time`` (seconds since 1970) and what :meth:`scalars` was given, written when the call returns, or where the disk
    is full as soon as it can be; numbers that are not finite become null.

    Beside it NAME_events.jsonl says in the same way what happened, one line each with ``time``, ``step``, ``epoch``,
    ``kind`` and ``text``: "begin" with ``resumed``, the checkpoint or null, and ``command``; "warning"; "end" with
    ``reason`` ("finished", "max-minutes", "signal SIGTERM", "error"), ``exit_code`` and ``next``, what to type. A
    process that is killed has no end. A resumed run appends to it.

    Args:
        save_dir: the run's folder, made if missing.
        config: the run's settings: written to NAME_settings.json, and for W&B.
        resumed: the checkpoint that the run goes on from. None begins a new log in place of an older one; else the log
            goes on, and what an interrupted run had written beyond the step ``where`` it is resumed, or of more epochs
            than are ``finished`` there, is dropped: it comes again.
        where: the run's step and its epoch, counted from 0 (:meth:`moco.train.plan.Progress.where`).
        finished: epochs; a run that was stopped behind the last step of one has its evaluation still to do.
        name: tells apart two kinds of run in one folder.
        tensorboard: also write events into ``save_dir``/tensorboard/NAME.
        wandb: project on Weights & Biases to send the numbers to; a resumed run goes on in its page.

    Raises:
        UserError: the folder cannot be written, or wandb is not installed.
    """

    def __init__(
        self,
        save_dir: str,
        config: dict[str, Any] | None = None,
        resumed: str | None = None,
        where: Callable[[], tuple[int, int]] = lambda: (0, 0),
        *,
        finished: float = math.inf,
        name: str = "log",
        tensorboard: bool = True,
        wandb: str | None = None,
    ) -> None:
        self._places: list[_Place] = []
        self._happened: _Place | None = None
        self._inside = contextlib.ExitStack()
        self._main = distributed.is_main()
        self.recorded: list[str] = []  # names of what an older log has of this step, in the main process
        self._path = path = os.path.join(save_dir, f"{name}.jsonl")
        self._where, self._end = where, (0, "finished", "")
        self._at_end: Callable[[], object] = lambda: None
        self._then: str | None = None
        self.reached, self._bar = Reached(), bars.bar(0, hidden=True)
        if not self._main:
            return
        step, happened = where()[0], os.path.join(save_dir, f"{name}_events.jsonl")
        try:
            os.makedirs(save_dir, exist_ok=True)
            run = _wandb_run(wandb, save_dir, name, config, resumed=resumed is not None) if wandb else None
            files.write_text("" if resumed is None else _records_until(path, step, finished), path)
            files.write_text("" if resumed is None else _records_until(happened), happened)
            for record in files.records(path) if resumed is not None else ():
                self.recorded += record if record.get("step") == step else ()
                self.reached.note(record)
            records, self._events = _Appended(path), _Appended(happened)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{path} cannot be written ({reason}); choose another --save-dir.") from error
        if config:
            settings = json.dumps(config, indent=1, default=str)
            files.write_text(settings + "\n", os.path.join(save_dir, f"{name}_settings.json"))
        self._places = [_Place(path, lambda line, *_: records.append(line), records.close, self.line)]
        self._happened = _Place(happened, self._events.append, self._events.close, self.line)
        if tensorboard:
            first = 0 if resumed is None else step + 1
            events = _Events(os.path.join(save_dir, "tensorboard", name), first)
            self._places.append(
                _Place("TensorBoard's file", lambda _, *now: events.write(*now), events.close, self.line)
            )
        if run is not None:
            send = lambda _, step, numbers: run.log(numbers, step=step)  # noqa: E731
            self._places.append(_Place("Weights & Biases", send, run.finish, self.line))
        signals.parting.append(self._part)
        self.event("begin", "", resumed=resumed, command=doors.command() or None)

    def line(self, text: str) -> None:
        """Lines on the console, above the bar if there is one; one that begins with "warning: " is an event too."""
        if not self._main:
            return
        tell(text)
        for line in text.splitlines():
            if line.startswith(WARNING):
                self.event("warning", line.removeprefix(WARNING))

    def warn(self, text: str) -> None:
        """A line that begins with "warning: ", and an event."""
        self.line(WARNING + text)

    def event(self, kind: str, text: str, **extra: Any) -> None:
        """Record what happened; ``extra``: any JSON values."""
        if self._happened is not None:
            self._happened.put(self._event(kind, text, **extra))

    def _event(self, kind: str, text: str, **extra: Any) -> bytes:
        step, epoch = self._where()
        record = {"time": round(time.time(), 3), "step": step, "epoch": epoch, "kind": kind, "text": text, **extra}
        return (json.dumps(record) + "\n").encode()

    def scalars(self, step: int, values: dict[str, float], *, text: str | None = None, **extra: Any) -> None:
        """Record numbers of ``step``: as curves, and with ``extra`` (any JSON values) as one record of the file.

        ``text`` is what a reader of the console gets to see of it.
        """
        if text is not None:
            self.line(text)
        if not self._main:
            return
        numbers = {name: float(value) for name, value in values.items()}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        record = {"step": step, "epoch": self._where()[1], **extra, **finite, "time": round(time.time(), 3)}
        line = (json.dumps(record) + "\n").encode()
        self.reached.note(record)
        self._bar.set_postfix_str(self.reached.now())
        for place in self._places:
            place.put(line, step, numbers)

    def bar(self, total: int, initial: int = 0, desc: str = "") -> tqdm:
        """A progress bar to use in ``with``, with the newest figures; it shows only on the main process's terminal."""
        self._bar = bars.bar(total, initial, desc, layout=bars.FIGURES)
        self._bar.set_postfix_str(self.reached.now())
        return self._bar

    def __enter__(self) -> RunLog:
        return self

    def enter(self, inside: contextlib.AbstractContextManager[T]) -> T:
        """Enter a context, to be left before the log is closed."""
        return self._inside.enter_context(inside)

    def ended(self, code: int, reason: str, place: str = "") -> None:
        """The run stops before its end, with this exit code, for this reason and at this :func:`last_line`'s place."""
        self._end = code, reason, place

    def at_end(self, work: Callable[..., object], *given: Any, then: str | None = None) -> None:
        """What the main process does once the log is complete and the folder still held: ``work(*given)``, however the
        run has ended. It may not raise; the path that it may return is told before the last line, or the error.

        then: the command to type once the run is finished; None: no line says at the end what was reached.
        """
        self._at_end, self._then = partial(work, *given), then

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        try:
            self._inside.__exit__(kind, error, trace)
            self._finish()
            if kind is None:
                with contextlib.suppress(OSError):
                    owner.check(self._path)  # the run must not end as if all that it did were there
        except BaseException as later:
            error = later
            raise
        finally:
            self._finish()
            said = self._say_end(error)
            self.close()
            page = self._at_end() if self._main else None
            if page and (said or error is not None):  # of a measurement its result is the last line
                self.line(f"written: {page}")
            if said:
                self.line(said)
            owner.release()

    def _say_end(self, error: BaseException | None) -> str:
        """Record how the run ends: its last line, empty where the error will be told."""
        code, reason, place = self._end
        if error is None:
            following = (self._then or "") if reason == "finished" else doors.again()
            text = last_line(self.reached.text(), reason, place, following)
        else:
            known = distributed.known_error(error)
            code, reason, following = known.exit_code if known else 1, getattr(error, "reason", "error"), doors.again()
            text = str(known) if known else f"{type(error).__name__}: {error}"
        self.event("end", " ".join(text.split()), reason=reason, exit_code=code, next=following or None)
        return text if error is None and self._then is not None else ""

    def _part(self, code: int, reason: str) -> None:
        """The process ends at once, whatever its main thread does: no lock is waited for."""
        self._events.append(self._event("end", "", reason=reason, exit_code=code, next=doors.again()))

    def close(self) -> None:
        """Finish all files; a second call does nothing."""
        self._finish()
        if self._happened is not None:
            self._happened.finish()
            signals.parting.remove(self._part)
        self._happened = None

    def _finish(self) -> None:
        for place in self._places:
            place.finish()
        self._places = []


def _records_until(path: str, step: float = math.inf, finished: float = math.inf) -> str:
    """The file's records up to ``step`` and of at most so many ``finished`` epochs; a line that a kill cut short is
    dropped."""
    if not os.path.isfile(path):  # a pipe would be waited at for ever
        return ""
    kept = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                record = files.json_of(line)
                if record["step"] <= step and record.get("finished_epochs", 0) <= finished:
                    kept.append(line if line.endswith("\n") else line + "\n")
    return "".join(kept)


def _wandb_run(project: str, save_dir: str, name: str, config: dict[str, Any] | None, resumed: bool) -> Any:
    wandb = resources.package("wandb", "wandb", "--wandb needs the package wandb")
    path = os.path.join(save_dir, f"{name}.wandb")
    known = ""
    if resumed and os.path.isfile(path):
        with open(path, encoding="utf-8", errors="replace") as file:
            known = file.read(1000).strip()
    if known and not re.fullmatch(r"[\w-]{1,128}", known):
        tell(f"warning: {path} is damaged and names no run of Weights & Biases; a new page is begun")
        known = ""
    try:
        run = wandb.init(project=project, dir=save_dir, config=config, id=known or None, resume="allow")
    except Exception as error:  # of the network, the account or the project
        raise UserError(f"--wandb {project}: {one_line(error)}") from error
    files.write_text(str(run.id), path)
    return run
