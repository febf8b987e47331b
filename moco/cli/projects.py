"""The programs of five public projects as rows: projects.txt beside this file, read. No torch here.

``--compat`` reads a line by these rows (:mod:`moco.cli.compat`), what is said of a spelling without it comes from them,
and so do the tables in docs/migrating/. The file has sections, ``[PROJECT PROGRAM MAIN]``, or ``[NAME]`` of rows that
several ``use``; a later row takes the place of an earlier one of the same first cell. A row is

    theirs | its default | here | the default as it is typed here | remark

Theirs: the spellings of an option; a key of their YAML file; or, in words, what the program does without an option for
it. ``none``: open. ``off``, ``on``: of a switch. Here: our flag; empty where it is read without an effect, which is
told; with * where it is decided with others of its line (:mod:`moco.cli.translations`). The fourth cell is left empty
where it is the second.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from moco import doors

FILE = Path(__file__).with_suffix(".txt")
CHOICES = ("supcontrast", "supcon-framework", "schane", "mochi", "synco")
OWN_IMAGES = ("supcontrast", "mochi")  # projects whose programs have a data set by default


class Option(NamedTuple):
    """A row."""

    theirs: str
    default: str
    here: str  # our flag, or ""
    value: str  # the default as our flag takes it
    remark: str
    special: bool  # marked by *

    @property
    def spellings(self) -> tuple[str, ...]:
        """Of an option of a command line, with hyphens; of what is none, nothing."""
        return tuple(self.theirs.replace("_", "-").split()) if self.theirs.startswith("-") else ()

    @property
    def key(self) -> bool:
        """Whether it is one of a YAML file."""
        return re.fullmatch(r"dataset|[a-z]+(\.\w+)+", self.theirs) is not None

    @property
    def switch(self) -> bool:
        """Whether no value follows it."""
        return self.default in ("on", "off")

    @property
    def words(self) -> list[str]:
        """The default, as it is typed here; none where it is open, off or decided with others."""
        if not self.here or self.special or self.default == "off" or self.value == "none":
            return []
        return [self.here, *([] if self.value == "on" else shlex.split(self.value))]


class Program(NamedTuple):
    """A program of a project, and which of our mains it is."""

    project: str
    name: str
    main: str  # pretrain, lincls or semisup
    options: tuple[Option, ...]

    def find(self, word: str) -> Option | None:
        """The row of a spelling, or of a key."""
        word = word.replace("_", "-") if word.startswith("-") else word
        return next((row for row in self.options if word in (*row.spellings, row.theirs)), None)

    def default(self, theirs: str) -> str:
        """Of an option or a key."""
        row = self.find(theirs)
        assert row is not None, theirs
        return row.default


@cache
def programs() -> tuple[Program, ...]:
    """All, in the order of the file."""
    sections: dict[str, dict[str, Option]] = {}
    rows: dict[str, Option] = {}
    for line in filter(None, map(str.strip, FILE.read_text(encoding="utf-8").splitlines())):
        if line.startswith("["):
            rows = sections[line.strip("[]")] = {}
        elif line.startswith("use "):
            rows |= sections[line.removeprefix("use ")]
        elif not line.startswith("#"):
            row = _row(*(cell.strip() for cell in line.split("|")))
            rows[row.theirs.split()[0] if row.spellings else row.theirs] = row
    named = ((title.split(), tuple(found.values())) for title, found in sections.items())
    return tuple(Program(words[0], words[1], words[2], options) for words, options in named if len(words) == 3)


def _row(theirs: str, default: str, here: str, value: str = "", remark: str = "") -> Option:
    return Option(theirs, default, here.lstrip("*"), value or default, remark, here.startswith("*"))


def program_of(project: str, main: str) -> Program | None:
    """The project's program that this main is."""
    return next((row for row in programs() if (row.project, row.main) == (project, main)), None)


def hint(main: str, unknown: Sequence[str], words: Sequence[str]) -> str:
    """The end of a sentence on words that a main does not know and one of the programs does: what to type.

    Args:
        main: pretrain, lincls, semisup, or nothing. unknown: flags that it does not have. words: the command line.
    """
    if not main or any(word.partition("=")[0] == "--compat" for word in words):
        return ""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    unknown = [flag.partition("=")[0] for flag in unknown]
    found = [row for row in programs() if any(row.find(flag) for flag in unknown)]
    # The program that this main is, and of several the one that has most of the line.
    found.sort(key=lambda row: (row.main != main, -sum(row.find(flag) is not None for flag in flags)))
    if not found:
        return ""
    flag = next(flag for flag in unknown if found[0].find(flag))
    return f"; {flag} is an option of {found[0].name} ({found[0].project}): type `{line(found[0], words)}`"


def line(program: Program, words: Sequence[str]) -> str:
    """What is typed here for words of a program."""
    return f"{doors.typed(program.main)} --compat {program.project} {shlex.join(words)}".rstrip()


def whole(main: str, words: Sequence[str]) -> str:
    """A sentence with the line to type where the words are a whole line of a program that has images of its own: every
    flag is of that program, and one by another name than ours."""
    flags = [word.partition("=")[0] for word in words if word.startswith("-")]
    for row in programs():
        found = [row.find(flag) for flag in flags]
        others = [flag for flag, option in zip(flags, found, strict=True) if option and option.here != flag]
        if row.main == main and row.project in OWN_IMAGES and all(found) and others:
            return f" With the images of {row.name} ({row.project}): `{line(row, words)}`."
    return ""
