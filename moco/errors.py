"""What a run can end with besides success, and the exit code of each."""

import sys
from collections.abc import Callable

USAGE_EXIT = 2  # the user's input cannot be used; nothing was lost
DIVERGED_EXIT = 3  # training itself went wrong (non-finite values, queues that differ)
INTERRUPTED_EXIT = 130  # Ctrl-C
SIGTERM_EXIT = 143  # 128 + SIGTERM: saved and stopped because the system asked for it
FINAL_EXITS = (USAGE_EXIT, DIVERGED_EXIT, INTERRUPTED_EXIT, SIGTERM_EXIT)  # another try would end likewise


class UserError(Exception):
    """Input that cannot be used: one sentence that says what to do."""

    exit_code = USAGE_EXIT


class TrainingError(Exception):
    """Training cannot go on (for example non-finite losses): one sentence."""

    exit_code = DIVERGED_EXIT


def exit_code(work: Callable[[], int | None]) -> int:
    """A command's exit code: what ``work()`` returns, None for 0; 2 when it raised a :class:`UserError`, then told."""
    try:
        return work() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return USAGE_EXIT


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error of a library says, as part of a sentence."""
    return " ".join(str(error).split())[:most]
