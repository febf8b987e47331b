"""--compat: a line of another project's program, read as that program reads it. No torch here.

Its spellings become ours and its defaults the parser's, below a file of --config and below what is typed. Which they
are stands in projects.txt; what depends on several words of a line is in :mod:`moco.cli.translations`.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from moco import doors
from moco.cli import translations
from moco.cli.parser import Parser, with_numbers_split
from moco.cli.projects import CHOICES, Option, Program, program_of, programs
from moco.errors import UserError, tell


class _Project:
    """The type of --compat of a main."""

    def __init__(self, main: str) -> None:
        self.main = main

    def __call__(self, text: str) -> str:
        return text.lower().replace("_", "-")

    def beside_config(self, path: str, value: Any) -> NoReturn:
        """UserError: a file of defaults cannot say how words are read that were typed before it."""
        raise UserError(f"{path}: compat is typed and not written into a file; give --compat {value}.")


def add_compat(p: Parser, main: str) -> None:
    """The flag; ``main``: whose parser it is."""
    p.group("run")("--compat", type=_Project(main), choices=CHOICES, help="read the line as this project's program "
        "reads it, with its spellings and its defaults, which docs/migrating.md lists")  # fmt: skip


def translated(parser: Parser, argv: list[str]) -> list[str]:
    """The words of a line in this project's flags, with the defaults of --compat made the parser's; without it, the
    same words."""
    project = _asked(argv)
    if project is None:
        return argv
    program = _program(parser, project)
    kept, special = _read(program, parser, argv)
    defaults = [row.words for row in program.options if row.words]
    _take(parser, defaults)
    more = translations.of(program, special, parser.parse_intermixed_args(kept), parser.given(kept))
    _take(parser, more.defaults)
    words = [*more.typed, *kept]  # of two values of one flag the last is taken
    _tell(parser, program, [*defaults, *more.defaults], words)
    return words


def _asked(argv: list[str]) -> str | None:
    """The project; None without one, and where the parser is to refuse the word."""
    for place, word in enumerate(argv):
        flag, equals, value = word.partition("=")
        if flag == "--compat":
            name = _Project("")(value if equals else "".join(argv[place + 1 : place + 2]))
            return name if name in CHOICES else None
    return None


def _program(parser: Parser, project: str) -> Program:
    kind: Any = parser.flags()["--compat"].type
    main: str = kind.main
    found = program_of(project, main)
    if found is None:
        rows = [f"{row.name} is `{doors.typed(row.main)} --compat {project}`" for row in _of(project)]
        raise UserError(f"--compat {project}: no program of this project is moco {main}; its {', '.join(rows)}.")
    return found


def _of(project: str) -> list[Program]:
    return [row for row in programs() if row.project == project]


def _read(program: Program, parser: Parser, argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """The words with our spellings, and the values of options that are decided with others."""
    flags, kept, special = parser.flags(), list[str](), dict[str, str]()
    left = iter(argv)
    for word in left:
        name, equals, value = word.partition("=")
        row = program.find(name) if word.startswith("-") else None
        if row is None or _same(flags, name, row):
            kept.append(word)
        elif row.here and not row.special:
            kept.append(row.here + equals + value)
        else:
            if not equals and not row.switch:
                value = _value(name, left)
            if row.special:
                special[row.theirs.split()[0].replace("_", "-")] = value
            else:
                tell(f"{name} is passed over: {row.remark}", error=True)
    return kept, special


def _value(name: str, left: Iterable[str]) -> str:
    for word in left:
        return word
    raise UserError(f"{name} needs a value behind it.")


def _same(flags: Mapping[str, argparse.Action], name: str, row: Option) -> bool:
    """Whether a spelling is ours too, with the same meaning."""
    ours = flags.get(row.here)
    return not row.special and name in flags and ours is not None and flags[name].dest == ours.dest


def _take(parser: Parser, defaults: list[list[str]]) -> None:
    """Make the settings that words name the parser's defaults, as a file of --config does."""
    given = parser.given(with_numbers_split(parser, [word for words in defaults for word in words]))
    parser.set_defaults(**given)
    parser.filed |= given.keys()


def _tell(parser: Parser, program: Program, defaults: list[list[str]], words: list[str]) -> None:
    """The whole line in this project's flags: what a default has decided is not silent."""
    place = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--compat")
    ours = [*words[:place], *words[place + 1 + ("=" not in words[place]) :]]
    flags, typed = parser.flags(), parser.given(words)
    names = [flags[entry[0]].dest if entry[0] in flags else "data" for entry in defaults]
    left = dict(zip(names, defaults, strict=True))  # of two entries of one flag the last
    line = shlex.join([word for name, entry in left.items() if name not in typed for word in entry] + ours)
    tell(f"--compat {program.project} reads this as {program.name}: {doors.typed(program.main)} {line}", error=True)
