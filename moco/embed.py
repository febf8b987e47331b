"""python -m moco.embed and moco.embed(...): features, a picture and a page. The work is in moco/eval/embed.py."""

from typing import TYPE_CHECKING

from moco import signals
from moco.library.door import callable_module

if TYPE_CHECKING:
    from moco.library.program import embed as embed
else:
    embed = callable_module(__name__)  # moco.embed(...)


def main(argv: list[str] | None = None) -> int:
    from moco.cli import commands

    args = commands.parse_embed(argv)
    from moco import distributed
    from moco.eval import embed

    return distributed.launch(embed.embed_worker, args)


if __name__ == "__main__":
    raise SystemExit(signals.run(main))
