"""python -m moco.negatives: a query's hard negatives as images. The work is in moco/eval/mined/command.py."""

from moco import signals
from moco.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    from moco.cli import looking

    args = looking.parse_negatives(argv)
    from moco.eval.mined import command

    return exit_code(lambda: command.run_negatives(args))


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
