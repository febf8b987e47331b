"""What a run can end with besides success, and the exit code of each."""

USAGE_EXIT = 2  # the user's input cannot be used; nothing was lost
DIVERGED_EXIT = 3  # training itself went wrong (non-finite values, queues that differ)
SIGTERM_EXIT = 143  # 128 + SIGTERM: saved and stopped because the system asked for it


class UserError(Exception):
    """Input that cannot be used: one sentence that says what to do, exit code 2."""


class TrainingError(Exception):
    """Training cannot go on (for example non-finite losses): one sentence, exit code 3."""
