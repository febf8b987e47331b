"""One program as a process of its own session, forked from this process, which has imported all and runs one thread.

A fork costs a hundredth of a second where a start costs four; signals, exit codes and process groups are real.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[3]
HANG_SECONDS = 120.0
LEFT_SECONDS = 30.0  # in which what a killed process had started must be gone
ROOM = 4 << 30  # bytes of address space above this process's, so that no case takes the machine's memory
STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


@dataclass
class Ended:
    """How a program ended. code: negative for a signal, None where it hung; peak: bytes of its largest process."""

    code: int | None
    text: str
    peak: int = 0
    left: list[str] = field(default_factory=list)  # processes that outlived it
    caught: bool = True  # whether the signal sent to it had a handler


Act = Callable[[int, float], None]  # process, seconds since its start; called every few milliseconds


def start(words: list[str], out: Path, prepare: Callable[[], None] | None = None, limit: int = ROOM) -> int:
    """Fork ``words``, a main or a module with its arguments; ``prepare`` is called in the new process."""
    out.write_text("")
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            _become(out, limit)
            (prepare or (lambda: None))()
            code = _run(words)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid


def start_truly(words: list[str], out: Path) -> int:
    """The same by a new interpreter, which imports torch."""
    name, *rest = words
    what = [str(ROOT / f"{name}.py")] if name.startswith("main_") else ["-m", name]
    with open(out, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *what, *rest], stdout=file, stderr=file, cwd=ROOT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    process.returncode = 0  # waited for here
    return process.pid


def _become(out: Path, limit: int) -> None:
    os.setsid()
    for number in STOPS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    handle = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(ROOT)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + limit, size + limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    torch.multiprocessing.get_context = lambda method: multiprocessing.get_context("fork")


def _run(words: list[str]) -> int:
    name, *rest = words
    sys.argv = [name, *rest]
    try:
        if name.startswith("main_") or name.endswith(".py"):
            runpy.run_path(str(ROOT / name.removesuffix(".py")) + ".py", run_name="__main__")
        else:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        code: object = 0
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException:
        traceback.print_exc()
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]
    multiprocessing.util._exit_function()  # ends helpers; what other libraries do at the end costs a tenth of a second
    return code if isinstance(code, int) else 0 if code is None else 1


def watch(pid: int, out: Path, act: Act | None = None, seconds: float = HANG_SECONDS) -> Ended:
    """Wait for the program, calling ``act``; what is left of its session is then killed."""
    began, code, peak = time.monotonic(), None, 0
    while time.monotonic() - began < seconds:
        done, status, used = os.wait4(pid, os.WNOHANG)
        if done:
            code, peak = os.waitstatus_to_exitcode(status), used.ru_maxrss * 1024
            break
        if act:
            act(pid, time.monotonic() - began)
        time.sleep(0.003)
    left = list(_outliving(pid)) if code is not None else []
    for member in members(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(member, signal.SIGKILL)
    if code is None:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
    return Ended(code, out.read_text(errors="replace"), peak, left)


def attempt(words: list[str], out: Path, prepare: Callable[[], None] | None = None, **more: float) -> Ended:
    """:func:`start` and :func:`watch`."""
    return watch(start(words, out, prepare), out, **more)  # type: ignore[arg-type]


def _outliving(session: int) -> Iterator[str]:
    deadline = time.monotonic() + LEFT_SECONDS
    while (found := members(session)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in found:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            yield f"process {pid} ({words[:80]}) outlived it by {LEFT_SECONDS:.0f} s"


def members(session: int) -> list[int]:
    """The processes of a session that run."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError, IndexError):
                fields = Path(entry.path, "stat").read_text(errors="replace").rsplit(")", 1)[1].split()
                if int(fields[3]) == session and fields[0] not in "ZX":
                    found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Processes that ``pid`` has started."""
    found = []
    with contextlib.suppress(OSError):
        for task in os.scandir(f"/proc/{pid}/task"):
            found += [int(word) for word in Path(task.path, "children").read_text().split()]
    return sorted(found)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler of a signal; Python's own for Ctrl-C tells nothing."""
    with contextlib.suppress(OSError, IndexError):
        mask = int(Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0], 16)
        return bool(mask >> (number - 1) & 1)
    return False
