"""python tests/support/compat_pages.py: write the tables of docs/migrating/ whose source is moco/cli/projects.txt.

A table stands between ``<!-- PROJECT PROGRAM MAIN -->`` and ``<!-- end of PROJECT PROGRAM MAIN -->``. A test holds the
pages fresh.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from moco import cli
from moco.cli.parser import Parser
from moco.cli.projects import Option, Program, programs
from moco.config import typed

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "migrating"
PARSERS = {"pretrain": cli.pretrain_parser, "lincls": cli.lincls_parser, "semisup": cli.semisup_parser}
PAGES = {"supcontrast": "supcontrast", "supcon-framework": "supcon_framework", "mochi": "mochi", "synco": "moco",
         "schane": "beit3"}  # fmt: skip
HEAD = (
    "| theirs | here | its default | as it is typed here | default without `--compat` | remark |\n" + "| --- " * 6 + "|"
)


def title(program: Program) -> str:
    """What a table's marks are called by."""
    return f"{program.project} {program.name} {program.main}"


def table(program: Program) -> str:
    """The rows of a program."""
    parser = PARSERS[program.main]()
    return "\n".join([HEAD, *(_line(parser, row) for row in program.options)])


def _line(parser: Parser, row: Option) -> str:
    theirs = f"`{row.theirs}`" if row.spellings or row.key else row.theirs
    shown = "as `" + " ".join(row.words[1:] or row.words) + "`" if row.value != row.default and row.words else ""
    cells = [theirs, f"`{row.here}`" if row.here else "–", row.default, shown.removeprefix("as "), _own(parser, row)]
    return "| " + " | ".join([*cells, row.remark]).rstrip() + " |"


def _own(parser: Parser, row: Option) -> str:
    """The default of our flag."""
    if not row.here:
        return "–"
    action = parser.flags().get(row.here)
    return typed(None if action is None or action.default == argparse.SUPPRESS else action.default)


def commands() -> str:
    """The table of docs/migrating.md: every program."""
    lines = ["| theirs | here |", "| --- | --- |"]
    for program in programs():
        lines.append(
            f"| `{program.name}` of {program.project} | `python main_{program.main}.py --compat {program.project}` |"
        )
    return "\n".join(lines)


def blocks() -> list[tuple[Path, str, str]]:
    """The tables: the page, the marks' title and the lines between them."""
    found = [(FOLDER / f"{PAGES[row.project]}.md", title(row), table(row)) for row in programs()]
    return [*found, (FOLDER.parent / "migrating.md", "commands", commands())]


def marked(name: str, lines: str) -> str:
    """A table between its marks."""
    return f"<!-- {name} -->\n\n{lines}\n\n<!-- end of {name} -->"


if __name__ == "__main__":
    for path, name, lines in blocks():
        before, _, rest = path.read_text(encoding="utf-8").partition(f"<!-- {name} -->")
        after = rest.partition(f"<!-- end of {name} -->")[2]
        path.write_text(before + marked(name, lines) + after, encoding="utf-8")
