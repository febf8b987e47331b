"""Command lines of a sweep: how flags become words, which settings words name, what the entry points' parsers say."""

from __future__ import annotations

import contextlib
import functools
import io
import shlex
from argparse import Namespace
from typing import Any

from moco import cli
from moco.cli.parser import Parser, end_lists, spelled
from moco.errors import UserError

ENTRY_POINTS = {f"main_{name}.py": name for name in ("pretrain", "lincls", "semisup")}


def hyphens(name: Any) -> str:
    """As flags are written here."""
    return str(name).replace("_", "-")


@functools.cache
def _parser(main: str) -> Parser | None:
    """Of one of our mains; nothing is known of a script that is not ours."""
    return getattr(cli, f"{ENTRY_POINTS[main]}_parser")() if main in ENTRY_POINTS else None


@functools.cache
def dests_of(main: str) -> dict[str, str]:
    """The setting behind every spelling of a flag, by the flag."""
    parser = _parser(main)
    return {word: action.dest for word, action in parser.flags().items()} if parser else {}


def setting(main: str, name: str) -> str:
    """One name for all spellings of a flag: ``lr`` of learning-rate."""
    return dests_of(main).get(f"--{name}", name)


def plain(value: Any) -> str:
    """A value as one word, for people."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def flags_named(main: str, argv: list[str]) -> dict[str, str]:
    """The settings that words of the command line name, each with the word that does it; of a script that is not ours
    by the word alone."""
    found: dict[str, str] = {}
    if parser := _parser(main):
        # what it does not take, the trials' own commands will tell
        with contextlib.suppress(UserError, SystemExit), contextlib.redirect_stderr(io.StringIO()):
            found = {name: f"--{hyphens(name)}" for name in parser.given(end_lists(parser, spelled(argv)))}
    for word in (word.split("=")[0] for word in argv if word.startswith("--")):
        name = hyphens(word.removeprefix("--"))
        found[setting(main, name)] = word
        if not parser:
            found[name.removeprefix("no-")] = word
    return found


@functools.cache
def parsed(main: str, argv: tuple[str, ...]) -> Namespace:
    """What one of our mains understands by its arguments.

    Raises:
        UserError: it does not take them; with its own sentence.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return getattr(cli, f"parse_{ENTRY_POINTS[main]}")(list(argv))
    except SystemExit as error:
        sentence = told.getvalue().strip().removeprefix("error: ")
        raise UserError(f"{main} does not take {shlex.join(argv)}: {sentence}") from error
