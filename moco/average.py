"""python -m moco.average: the mean of several checkpoints. The work is in moco/weights/average.py."""

import sys

from moco.cli import commands
from moco.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    """The command; its exit code."""
    args = commands.parse_average(argv)
    from moco.weights import average

    return exit_code(lambda: average.run_average(args))


if __name__ == "__main__":
    sys.exit(main())
