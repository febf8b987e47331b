"""What SIGINT (Ctrl-C), SIGTERM, SIGHUP and SIGUSR1 do to a program, from its first line to its last.

They are blocked, and a thread waits for them. So no signal raises in the middle of a library's work (half an import,
the lock of a queue), and none waits for a main thread that computes for minutes or stands in a lost exchange. Helpers
(loader workers, multiprocessing's tracker, torch's compile workers) inherit the block: they outlive a signal to the
whole group, and end when the process that started them does.

Until the first step is done a signal ends the program at once, as there is nothing to save. From then on (:func:`hold`)
the first one is noted for the training loop, which finishes the step and saves, and a second Ctrl-C or SIGTERM ends the
program at once. A signal that was ignored when the program began (nohup, a background job) stays ignored.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from moco.errors import HANGUP_EXIT, INTERRUPTED_EXIT, SIGTERM_EXIT, STOP_EXIT

# of several the largest counts; SIGUSR1 is a scheduler's early warning, with the code of :func:`stop_with`
CODES: dict[int, int] = {
    signal.SIGUSR1: STOP_EXIT, signal.SIGHUP: HANGUP_EXIT, signal.SIGINT: INTERRUPTED_EXIT,
    signal.SIGTERM: SIGTERM_EXIT,
}  # fmt: skip
AT_ONCE = (signal.SIGINT, signal.SIGTERM)  # whose second ends the program
COPY_SECONDS = 1.0  # a terminal signals the whole group and a launcher passes it on: what comes so soon is no second
LED_EARLY = 96  # added to the exit code of a process that its launcher is to tell: stopped before its first step
TWICE = "ended at once; the newest checkpoint is whole"
BEFORE = "stopped before the first step, nothing to save"

# paths of what is to be removed if the program ends at once: files that are being written, the lock of a folder
unfinished: set[str] = set()
# given the exit code and the reason of a program that ends at once, in whatever thread: what has a record to write
parting: list[Callable[[int, str], None]] = []


class Listener:
    """What signals have come, and who answers them.

    Args:
        said: of a program that ends at once.
        led: a process of a launcher's, which says and decides what the user is told and when no more is waited for.
    """

    def __init__(self, said: str, led: bool) -> None:
        self.said, self.led, self.pid = said, led, os.getpid()
        self.noted: list[int] = []
        self.first = math.inf  # when the first that asks to end came
        self.held = self.twice = self.silent = self.scheduled = False
        self.lead: Callable[[int, bool], None] | None = None
        self.terminals = [output for output in (1, 2) if os.isatty(output)]
        self.numbers = {number for number in CODES if signal.getsignal(number) is not signal.SIG_IGN}
        self.before = {number: signal.getsignal(number) for number in self.numbers}
        for number in self.numbers:  # for threads that were there before, and so do not block it
            signal.signal(number, lambda number, frame: self.take(number))
        self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        self.thread = threading.Thread(target=self._listen, daemon=True, name="signals")
        self.thread.start()

    def close(self) -> None:
        """Everything is as it was before."""
        self.numbers, numbers = set(), self.numbers
        for number in list(numbers)[:1]:
            signal.pthread_kill(self.thread.ident or 0, number)
        self.thread.join()
        for number, handler in self.before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.mask)

    def _listen(self) -> None:
        while numbers := self.numbers:
            number, sender = _wait_for(numbers)
            if self.numbers:
                self.take(number, sender)

    def take(self, number: int, sender: int = 0) -> None:
        """A signal has come; ``sender``: the process it came from, where that is known."""
        now, first = time.monotonic(), not self.noted
        copy = now - self.first < COPY_SECONDS or (self.scheduled and sender == os.getppid())
        again = number in AT_ONCE and self.first < math.inf and not copy
        if number in AT_ONCE:
            self.first = min(self.first, now)
        self.noted.append(number)
        self.twice |= again
        if number == signal.SIGHUP:
            self._let_go_of_the_terminal()
        if self.lead:
            self.lead(number, again)
        elif not self.held:
            self._end(self.said)
        elif again and not self.led:
            self._end(TWICE)
        elif first and not self.silent:
            name = signal.Signals(number).name
            _say(f"{name}: the run ends once what is under way is saved; a second Ctrl-C or SIGTERM ends it at once")

    def _let_go_of_the_terminal(self) -> None:
        """Writing to a terminal that was hung up is an error; what is still said goes nowhere."""
        for output in self.terminals:
            if not os.isatty(output):
                os.dup2(os.open(os.devnull, os.O_WRONLY), output)

    def _end(self, said: str) -> None:
        counts = max(self.noted, key=CODES.__getitem__)
        code = CODES[counts]
        module = sys.modules.get("multiprocessing.process")
        children = module.active_children() if module else []
        for path in list(unfinished):
            with contextlib.suppress(OSError):
                os.remove(path)
        part(code, f"signal {signal.Signals(counts).name}")
        if not (self.led or self.silent):
            _say(said)
        sys.setswitchinterval(60)  # the main thread is not to notice, and tell of, what is ended here
        for child in children:
            child.kill()
        os._exit(code + LED_EARLY * self.led)


_here: Listener | None = None


def begin(said: str = BEFORE, led: bool = False) -> None:
    """Listen from now on, in the main thread of a program that begins, in place of who does; see :class:`Listener`."""
    global _here
    end()
    _here = Listener(said, led)


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Listen inside, where no door of the program has begun to and this is the main thread."""
    if _mine() or threading.current_thread() is not threading.main_thread():
        yield
        return
    begin()
    try:
        yield
    finally:
        end()


def run(main: Callable[[], int | None], said: str = "stopped") -> int | None:
    """``main()`` of a command, listening before it imports anything."""
    begin(said)
    return main()


def end() -> None:
    """Listen no more."""
    global _here
    if here := _mine():
        here.close()
        _here = None


def part(code: int, reason: str) -> None:
    """Tell all of :data:`parting`."""
    for call in list(parting):
        with contextlib.suppress(Exception):
            call(code, reason)


def stop_with(code: int) -> None:
    """The exit code of SIGUSR1 and of a time limit from now on in this process."""
    CODES[signal.SIGUSR1] = code


def hold() -> None:
    """From now on a signal waits for whoever asks for :func:`code`."""
    if here := _mine():
        here.held = True


def noted() -> list[int]:
    """The signals that have come, in their order."""
    here = _mine()
    return here.noted if here else []


def code() -> int | None:
    """The exit code that the signals ask for, None where none has come."""
    return max((CODES[number] for number in noted()), default=None)


def twice() -> bool:
    """Whether a second Ctrl-C or SIGTERM has come, after which nothing is waited for."""
    here = _mine()
    return here is not None and here.twice


def said() -> str:
    """What is told of a program that ends before its first step."""
    here = _mine()
    return here.said if here else BEFORE


def of_several(rank: int, scheduled: bool) -> None:
    """This process is one of several: the first of them speaks. ``scheduled``: what its parent sends is passed on from
    elsewhere, and so no second."""
    if here := _mine():
        here.silent, here.scheduled = rank > 0, scheduled


@contextlib.contextmanager
def led_by(lead: Callable[[int, bool], None]) -> Iterator[None]:
    """Inside, ``lead(number, again)`` answers a signal in a thread; ``again``: it is the second that asks to end."""
    here = _mine()
    if here is None:
        yield
        return
    here.lead = lead
    try:
        yield
    finally:
        here.lead = None


def block() -> None:
    """Block the signals in this thread again, where a library has unblocked them."""
    if here := _mine():
        signal.pthread_sigmask(signal.SIG_BLOCK, here.numbers)


def blocked() -> contextlib.AbstractContextManager[None]:
    """Threads and processes that are started inside are born with the signals blocked."""
    return _born_with(signal.SIG_BLOCK)


def open_to_children() -> contextlib.AbstractContextManager[None]:
    """Processes that are started inside by this thread get the signals as any program does."""
    return _born_with(signal.SIG_UNBLOCK)


@contextlib.contextmanager
def _born_with(how: int) -> Iterator[None]:
    before = signal.pthread_sigmask(how, CODES)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def call(command: Sequence[str], **options: Any) -> int:
    """Run a command, which answers the signals that this process gets; its exit code, 128 + N after signal N."""
    import subprocess

    children: list[subprocess.Popen] = []

    def pass_on(number: int, again: bool) -> None:
        for child in children:
            child.send_signal(number)

    with led_by(pass_on):
        with open_to_children():
            children.append(subprocess.Popen(command, **options))
        for number in list(noted()):  # those that came before it was there
            pass_on(number, False)
        code = children[0].wait()
    return code if code >= 0 else 128 - code


def _mine() -> Listener | None:
    """The listener of this process; one of the process that this one was forked from does not listen here."""
    return _here if _here and _here.pid == os.getpid() else None


def _wait_for(numbers: set[Any]) -> tuple[int, int]:
    if not hasattr(signal, "sigwaitinfo"):  # macOS, where the sender is not told
        return signal.sigwait(numbers), 0
    found = signal.sigwaitinfo(numbers)
    return found.si_signo, found.si_pid


def _say(text: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, ("\r\x1b[K" * os.isatty(2) + f"{text}\n").encode())  # in the place of a bar
