"""python -m moco.average: the mean of several checkpoints. The work is in moco/weights/average.py."""

from moco import signals
from moco.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.parse_average(argv)
    from moco.weights import average

    return exit_code(lambda: average.run_average(args))


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
