"""python -m moco.neighbours and moco.neighbours(...): images beside their nearest ones. The work is in
moco/eval/neighbours.py."""

from typing import TYPE_CHECKING

from moco import signals
from moco.library.door import callable_module

if TYPE_CHECKING:
    from moco.library.program import neighbours as neighbours
else:
    neighbours = callable_module(__name__)  # moco.neighbours(...)


def main(argv: list[str] | None = None) -> int:
    from moco.cli import looking

    args = looking.parse_neighbours(argv)
    from moco import distributed
    from moco.eval import neighbours

    return distributed.launch(neighbours.neighbours_worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
