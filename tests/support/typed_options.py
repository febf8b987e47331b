"""python tests/support/typed_options.py: write moco/library/options.py, the functions' options with their types.

Editors and type checkers read that file; the functions themselves ask the parsers. A test holds it fresh.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import moco
from moco import files
from moco.library.program import EMBED, EXPORT, LINCLS, NEIGHBOURS, PRETRAIN, RETRIEVAL, SEMISUP, Program
from moco.library.words import Option, options_of

PATH = Path(moco.__file__).parent / "library" / "options.py"
CLASSES = {
    "PretrainOptions": ("Of :func:`moco.pretrain`: the flags of ``moco pretrain``.", (PRETRAIN,)),
    "EvaluateOptions": (
        "Of :func:`moco.evaluate`: the flags of ``moco lincls``, ``moco semisup`` and ``moco retrieval``.",
        (LINCLS, SEMISUP, RETRIEVAL),
    ),
    "EmbedOptions": ("Of :func:`moco.embed`: the flags of ``moco embed``.", (EMBED,)),
    "NeighboursOptions": ("Of :func:`moco.neighbours`: the flags of ``moco neighbours``.", (NEIGHBOURS,)),
    "ExportOptions": ("Of :func:`moco.export`: the flags of ``moco export``.", (EXPORT,)),
}
HEAD = '''\
"""The options of the functions by their names in Python, written by ``python tests/support/typed_options.py``."""

# fmt: off

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, TypedDict, Union

StrPath = Union[str, "os.PathLike[str]"]
'''


def source() -> str:
    """The text of options.py."""
    (to,) = (option for option in options_of(EXPORT.parser(), {}) if option.name == "to")
    kinds = to.type.removesuffix(" | None")
    return f"{HEAD}ExportKind = {kinds}\n" + "".join(_class(name, *row) for name, row in CLASSES.items())


def _class(name: str, text: str, programs: tuple[Program, ...]) -> str:
    found: dict[str, list[Option]] = {}
    for program in programs:
        for option in options_of(program.parser(), program.left_out):
            found.setdefault(option.name, []).append(option)
    lines = [f"\n\nclass {name}(TypedDict, total=False):", f'    """{text}"""', ""]
    for key, options in found.items():
        kinds = dict.fromkeys(kind for option in options for kind in option.type.split(" | "))
        helps = dict.fromkeys(option.help for option in options if option.help)
        lines.append(f"    {key}: {' | '.join(kinds)}")
        lines += textwrap.wrap(f'"""{"; or ".join(helps)}"""', 116, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    files.write_text(source(), str(PATH))
