"""python -m moco.export: a checkpoint's backbone for other tools. The work is in moco/weights/export.py."""

from moco import signals
from moco.errors import exit_code


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.export_parser().parse_args(argv)
    from moco.weights import export

    return exit_code(lambda: export.run_export(args))


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
