"""Keyword arguments of Python as the words of a command line, and the flags of a parser as keyword arguments.

No torch here: an option that cannot be used is refused before a second of imports.
"""

from __future__ import annotations

import argparse
import contextvars
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from moco.cli.parser import NumberRange, Parser, argv_of, raising, spelling
from moco.errors import UserError

# metavars of flags that name a file
_OF_FILES = ("DIR", "FILE", "PATH", "FOLDER", "CKPT", "FILE.yml", "FILE.csv", "PRESET")


class Option(NamedTuple):
    """A flag as a keyword argument."""

    name: str
    type: str  # source text
    help: str
    group: str  # title in --help
    default: Any


def options_of(parser: Parser, left_out: Mapping[str, str]) -> Iterator[Option]:
    """The flags of a parser as keyword arguments, one for each flag; ``left_out`` has those that the function has
    itself."""
    for group in parser._action_groups:
        for action in group._group_actions:
            if not action.option_strings or isinstance(action, argparse._HelpAction):
                continue
            name = _name(spelling(action))
            if name not in left_out:
                text = (action.help or "").removesuffix(" (default: %(default)s)")  # Python 3.10's own
                default = None if action.default == argparse.SUPPRESS else action.default
                yield Option(name, _type_of(action, name), text.replace("%%", "%"), group.title or "", default)


def _name(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _type_of(action: argparse.Action, name: str) -> str:
    """The type of an option's values as source text."""
    if action.nargs == 0:
        text = "bool"
    elif action.choices is not None:
        text = f"Literal[{', '.join(repr(choice) for choice in action.choices)}]".replace("'", '"')
    else:
        kind = action.type.kind if isinstance(action.type, NumberRange) else action.type
        text = {int: "int", float: "float"}.get(kind, "str")  # type: ignore[arg-type]
        if text == "str" and action.metavar in _OF_FILES:
            text = "StrPath"
        if isinstance(action.nargs, int):
            text = f"Sequence[{text}]"
        elif action.nargs in ("+", "*"):
            text = f"{text} | Sequence[{text}]"
    text += ' | Literal["all"]' * (name == "nproc")
    return text + " | None" * (action.default is None)


def arguments(
    function: str, parser: Parser, parse: Callable[[list[str]], argparse.Namespace], options: Mapping[str, Any],
    own: list[str], left_out: Mapping[str, str],
) -> argparse.Namespace:  # fmt: skip
    """What a program's parser makes of a function's options.

    Args:
        function: what the caller knows it as, for sentences.
        own: words in front of those of the options.
        left_out: options that the function has itself, and what they are called there.

    Raises:
        UserError: what the program refuses, in its words; a name that is no option, or two of one flag.
    """
    words = [*own, *_words(function, parser, options, left_out)]
    args = contextvars.copy_context().run(_raised, parse, words)
    for name, value in options.items():
        action = _flags(parser)[name]
        if value is False and isinstance(action, argparse._StoreTrueAction) and getattr(args, action.dest):
            raise UserError(f"{name}=False: config sets {spelling(action)}, which has no opposite; remove it there.")
    return args


def _raised(parse: Callable[[list[str]], argparse.Namespace], words: list[str]) -> argparse.Namespace:
    raising.set(True)
    return parse(words)


def _words(function: str, parser: Parser, options: Mapping[str, Any], left_out: Mapping[str, str]) -> list[str]:
    flags, words, given = _flags(parser), [], {}
    for name, value in options.items():
        if name in left_out:
            raise UserError(f"{name} is no option of {function}: {left_out[name]}.")
        if name not in flags:
            close = difflib.get_close_matches(name, flags, 1)
            near = [_name(spelling(flags[other])) for other in close]  # not another spelling that happens to be closer
            raise UserError(f"{name} is no option of {function}" + (f"; did you mean {near[0]}?" if near else "."))
        action = flags[name]
        if (other := given.setdefault(spelling(action), name)) != name:
            raise UserError(f"{other} and {name} are the same option; give one of them.")
        words += _of_value(name, value, action)
    return words


def _flags(parser: Parser) -> dict[str, argparse.Action]:
    """The flag of every name that an option may have: all spellings but a switch's ``--no-``."""
    found = {}
    for action in parser.actions():
        negative = isinstance(action, argparse.BooleanOptionalAction)
        for word in action.option_strings:
            if not (negative and word.startswith("--no-")) and not isinstance(action, argparse._HelpAction):
                found[_name(word)] = action
    return found


def _of_value(name: str, value: Any, action: argparse.Action) -> list[str]:
    flag = spelling(action)
    if getattr(value, "ndim", None) == 0:  # of numpy or torch
        value = value.item()
    if name == "nproc" and value == "all":
        return ["--multiprocessing-distributed"]
    if value is None or isinstance(value, bool):
        return argv_of(flag, value, action.option_strings)
    if action.nargs == 0:  # a word behind it would be taken for DIR
        raise UserError(f"{name} is True or False, not {value!r}.")
    if isinstance(value, str | os.PathLike) or not hasattr(value, "__iter__"):
        word = _word(name, value)
        return [flag, word] if action.nargs is not None else [f"{flag}={word}"]
    if action.nargs is None:
        raise UserError(f"{name} takes one value, not {value!r}.")
    return [flag, *(_word(name, one) for one in value)]


def _word(name: str, value: Any) -> str:
    value = os.fspath(value) if isinstance(value, os.PathLike) else value
    value = value.item() if hasattr(value, "item") else value  # numpy's numbers and tensors of one
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{name} takes words, numbers and paths, not {value!r}.")
    return str(value)
