"""python -m moco.describe: what a checkpoint is, and whether it is ok. The work is in moco/weights/describe.py."""

from moco import signals
from moco.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.describe_parser().parse_args(argv)
    from moco.weights import describe

    return exit_code(lambda: describe.run_describe(args))


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
