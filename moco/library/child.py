"""A program of this package in a process of its own, for a function that another program has called.

The process is a new interpreter, which knows nothing of the caller's: it does not import the caller's main module, so a
script needs no ``if __name__ == "__main__"`` and a notebook or ``python -`` is as good as a file. What it leaves behind
(memory of a GPU, signal handlers, a process group) ends with it. Its output is written to the caller's ``sys.stdout``
and ``sys.stderr``, and the sentence with which it ends is raised here.

No torch here: the caller may have no need of it.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import pickle
import selectors
import signal
import subprocess
import sys
import threading
import time
import traceback
from argparse import Namespace
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from typing import Any

from moco import errors, signals
from moco.errors import MocoError, OutageError, TrainingError, UserError

_CODE = "import sys; sys.path[:] = {path!r}; from moco.library.child import serve; serve({reports}, {parent})"
_KINDS = {kind.exit_code: kind for kind in (UserError, TrainingError, OutageError)}
LOOK_SECONDS = 0.5  # between two looks whether the other process still lives
STOPPED = (0, errors.HANGUP_EXIT, errors.SIGTERM_EXIT)  # the exit codes of a run that is done, or saved and stopped


class Traceback(Exception):
    """What a process of a run printed as it failed: the cause of the MocoError that says so."""

    def __str__(self) -> str:
        return f"in the run's own process\n\n{self.args[0]}"


# ------------------------------------------------------------------------------------------------ in the caller


def run(worker: str, args: Namespace) -> int:
    """Start ``worker(args)`` by :func:`moco.distributed.launch` in another process, and wait for its end.

    Args:
        worker: ``module:function``.

    Returns:
        One of :data:`STOPPED`.

    Raises:
        UserError, TrainingError, OutageError: with the sentence that the program says.
        MocoError: it failed otherwise; the cause has the traceback.
        KeyboardInterrupt: once the program has saved what it had and has ended; at a second one it does not save.
    """
    reading, writing = os.pipe()
    code = _CODE.format(path=sys.path, reports=writing, parent=os.getpid())
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:backslashreplace"}
    with open(reading, "rb", buffering=0) as reports:
        try:
            child = subprocess.Popen([sys.executable, "-c", code], env=environment, pass_fds=[writing], **pipes)
        finally:
            os.close(writing)
        with child:
            said: list[str] = []
            _to_the_end(child, pickle.dumps((worker, args)), reports, said)
    return _answer(child.returncode, "".join(said))


def _to_the_end(child: subprocess.Popen, job: bytes, reports: Any, said: list[str]) -> None:
    """Hand out the work and relay what is written until the process has ended. Who interrupts or ends the function
    interrupts the run, which saves; what was raised goes on afterwards."""
    raised: BaseException | None = None
    todo = [partial(_hand_out, child, job), partial(_relay, child, reports, said), child.wait]
    while todo:
        try:
            todo[0]()
            todo.pop(0)
        except BaseException as error:
            raised = raised or error
            child.send_signal(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
    if raised is not None:
        raise raised


def _hand_out(child: subprocess.Popen, job: bytes) -> None:
    assert child.stdin
    with contextlib.suppress(BrokenPipeError):  # it has ended, and will have said why
        if not child.stdin.closed:
            child.stdin.write(job)
        child.stdin.close()


def _relay(child: subprocess.Popen, reports: Any, said: list[str]) -> None:
    """Until all pipes are closed, or the process has ended: one that it has left behind may hold them open."""
    sinks = {
        child.stdout: lambda text: errors.write_out(text, sys.stdout),
        child.stderr: lambda text: errors.write_out(text, sys.stderr),
        reports: said.append,
    }
    with selectors.DefaultSelector() as pipes:
        for pipe, sink in sinks.items():
            pipes.register(pipe, selectors.EVENT_READ, (codecs.getincrementaldecoder("utf-8")("replace"), sink))
        while pipes.get_map():
            ended = child.poll() is not None
            ready = pipes.select(LOOK_SECONDS)
            for key, _ in ready:
                decoder, sink = key.data
                data = os.read(key.fd, 1 << 16)
                if text := decoder.decode(data, final=not data):
                    sink(text)
                if not data:
                    pipes.unregister(key.fileobj)
            if ended and not ready:
                return


def _answer(code: int, reports: str) -> int:
    """The exit code of a run that was done or stopped; otherwise what it means is raised."""
    told = [json.loads(line) for line in reports.splitlines()]
    sentence = told[-1] if told else ""
    if code in STOPPED:
        return code
    if code == errors.INTERRUPTED_EXIT:
        raise KeyboardInterrupt
    if code in _KINDS:
        raise _KINDS[code](sentence or "the run ended for the reason that its output gives.")
    if code < 0 or code > 128:
        number = -code if code < 0 else code - 128
        why = f"the run's process was ended by signal {number}" + ", perhaps for want of memory" * (number == 9)
        raise OutageError(sentence or f"{why}; go on from the newest checkpoint with --resume auto.")
    last = sentence.strip().splitlines()[-1:] or ["its output says why"]
    raise MocoError(f"the run's process failed: {last[0]}") from (Traceback(sentence) if sentence else None)


# ---------------------------------------------------------------------------------------------- in the process


def serve(reports: int, parent: int) -> None:
    """Do the work that comes by standard input; what ends it is written to the file ``reports``, a JSON text a line."""
    signals.stop_with(0)
    signals.begin()
    os.set_inheritable(reports, False)
    worker, args = pickle.load(sys.stdin.buffer)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    errors.answer_to(partial(_report, reports))
    try:
        module, _, function = worker.partition(":")
        work = getattr(import_module(module), function)
        code = errors.exit_code(lambda: check_alone(args, os.environ))
        code = code or import_module("moco.distributed").launch(work, args)
    except Exception:
        _report(reports, traceback.format_exc()[-8000:])
        code = 1
    sys.exit(code)


def check_alone(args: Namespace, environment: Mapping[str, str]) -> None:
    """UserError where a scheduler has started the caller several times: its variables are of one program, in which
    processes meet once."""
    from moco.distributed.launcher import plan_launch

    try:
        plan = plan_launch(args, 0, environment)
    except ValueError:  # a variable that is none: the start of the run says so
        return
    if plan.world_size > 1 and plan.how not in ("spawn", "flags"):
        raise UserError(
            f"this is one of {plan.world_size} processes that {plan.how} has started, and the function starts those of "
            f"a run itself: call it in one process, with nproc for several, or start the command `moco` by {plan.how}."
        )


def _report(reports: int, text: str) -> None:
    with contextlib.suppress(OSError):  # the caller is gone
        os.write(reports, (json.dumps(text) + "\n").encode())


def _end_with(parent: int) -> None:
    """A caller that is gone can stop nobody: then the run saves what it has and ends, as at a SIGTERM."""
    while os.getppid() == parent:
        time.sleep(LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
