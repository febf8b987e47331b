"""What a run can end with besides success, the exit code of each, and text for people."""

import contextlib
import errno
import os
import re
import sys
from collections.abc import Callable
from typing import Any

USAGE_EXIT = 2  # the user's input cannot be used; nothing was lost
DIVERGED_EXIT = 3  # training itself went wrong (non-finite values, queues that differ)
OUTAGE_EXIT = 75  # EX_TEMPFAIL of sysexits.h: something outside the program is gone; the same command goes on
STOP_EXIT = 75  # the same of a run that --max-minutes or SIGUSR1 has stopped: it is saved and wants to be continued
HANGUP_EXIT = 129  # 128 + SIGHUP, as the next two: saved and stopped because somebody asked for it
INTERRUPTED_EXIT = 130  # Ctrl-C
SIGTERM_EXIT = 143
FINAL_EXITS = (USAGE_EXIT, DIVERGED_EXIT, HANGUP_EXIT, INTERRUPTED_EXIT, SIGTERM_EXIT)  # not to be tried again
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)  # what writers of files meet
# What a terminal obeys instead of showing it: all control characters but tab and newline, and changes of the direction
# of writing; and what no encoding has, the bytes of file names that are not UTF-8.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


_OBJECT = re.compile(r"<[^<>]* object at 0x[0-9a-f]+>")  # what was read, as Python shows it


class MocoError(Exception):
    """What a function of this package raises besides Python's own errors, or one of the three below: a sentence."""

    exit_code = 1


class UserError(MocoError):
    """Input that cannot be used: one sentence that says what to do."""

    exit_code = USAGE_EXIT


class TrainingError(MocoError):
    """Training cannot go on (for example non-finite losses): one sentence."""

    exit_code = DIVERGED_EXIT


class OutageError(MocoError):
    """Something outside the program is gone (images, room on the disk, another process): one sentence. What could be
    saved is saved; the same command goes on once it is back."""

    exit_code = OUTAGE_EXIT


def exit_code(work: Callable[[], int | None]) -> int:
    """A command's exit code: what ``work()`` returns, None for 0; that of an error of this file, then told."""
    try:
        return work() or 0
    except (UserError, OutageError) as error:
        refuse(error)
        return error.exit_code
    except OSError as error:
        if not (said := of_the_disk(error)):
            raise
        refuse(said)
        return OUTAGE_EXIT


_caller: Callable[[str], None] | None = None


def answer_to(caller: Callable[[str], None]) -> None:
    """From now on ``caller`` is given what :func:`refuse` says: this process works for a function in another one."""
    global _caller
    _caller = caller


def refuse(sentence: object, who: str = "error: ") -> None:
    """Say why the program ends, on standard error after ``who``."""
    if _caller:
        _caller(str(sentence))
    else:
        tell(f"{who}{sentence}", error=True)


def of_the_disk(error: BaseException) -> str:
    """A sentence on a disk that has no room or is gone, where nobody nearer knew what to do; empty for other errors."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return ""
    return f"{error.filename or 'a file'} cannot be written ({error.strerror}); make room or choose another folder."


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, as part of a sentence."""
    return " ".join(_OBJECT.sub("the file", str(error)).split())[:most]


def printable(text: str) -> str:
    """The text with escapes such as ``\\x1b`` for what a terminal would obey, from file names and checkpoints."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


# around a line that is told: moco.bars takes its bars off the terminal and puts them back below
aside: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def tell(*lines: str, error: bool = False) -> None:
    """Print lines for people, :func:`printable`, at once: on standard output, or standard error with ``error``."""
    with aside():
        write_out(printable("\n".join(lines)) + "\n", sys.stderr if error else sys.stdout)


def write_out(text: str, stream: Any) -> None:
    """Write at once, with escapes for what the stream's encoding has not. Where the reader (head, a terminal) is gone,
    this and all that follows goes nowhere, as where the stream is closed or None (a service without a terminal)."""
    if stream is None or getattr(stream, "closed", False):
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        stream.write(text)
        stream.flush()
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
