"""What a run can end with besides success, and the exit code of each."""

import sys
from collections.abc import Callable

USAGE_EXIT = 2  # the user's input cannot be used; nothing was lost
DIVERGED_EXIT = 3  # training itself went wrong (non-finite values, queues that differ)
OUTAGE_EXIT = 75  # EX_TEMPFAIL of sysexits.h: something outside the program is gone; the same command goes on
HANGUP_EXIT = 129  # 128 + SIGHUP, as the next two: saved and stopped because somebody asked for it
INTERRUPTED_EXIT = 130  # Ctrl-C
SIGTERM_EXIT = 143
FINAL_EXITS = (USAGE_EXIT, DIVERGED_EXIT, HANGUP_EXIT, INTERRUPTED_EXIT, SIGTERM_EXIT)  # not to be tried again


class UserError(Exception):
    """Input that cannot be used: one sentence that says what to do."""

    exit_code = USAGE_EXIT


class TrainingError(Exception):
    """Training cannot go on (for example non-finite losses): one sentence."""

    exit_code = DIVERGED_EXIT


class OutageError(Exception):
    """Something outside the program is gone (images, room on the disk, another process): one sentence. What could be
    saved is saved; the same command goes on once it is back."""

    exit_code = OUTAGE_EXIT


def exit_code(work: Callable[[], int | None]) -> int:
    """A command's exit code: what ``work()`` returns, None for 0; that of an error of this file, then told."""
    try:
        return work() or 0
    except (UserError, OutageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, as part of a sentence."""
    return " ".join(str(error).split())[:most]
