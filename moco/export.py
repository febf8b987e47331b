"""python -m moco.export and moco.export(...): a backbone for other tools. The work is in moco/weights/export.py."""

from typing import TYPE_CHECKING

from moco import signals
from moco.errors import exit_code
from moco.library.door import callable_module

if TYPE_CHECKING:
    from moco.library.program import export as export
else:
    export = callable_module(__name__)  # moco.export(...)


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.export_parser().parse_args(argv)
    from moco.weights import export

    return exit_code(lambda: export.run_export(args))


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
