"""How words become settings: a parser, SupContrast's spelling, YAML files; what knows no flag of any main.

No torch here: a wrong flag is answered before a second of imports. ``--config FILE.yml`` is turned into the same
words as the command line and put in front of it, so that a file is checked like a command and flags override it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import Any, NoReturn

from moco.errors import USAGE_EXIT, UserError
from moco.resources import recipe


class Parser(argparse.ArgumentParser):
    """One sentence and exit code 2 instead of the whole usage text. ``filed``: what ``--config`` has set, by name."""

    filed: frozenset[str] = frozenset()

    def error(self, message: str) -> NoReturn:
        print(f"error: {message} (--help lists the flags)", file=sys.stderr)
        sys.exit(USAGE_EXIT)


def parse(parser: Parser, argv: list[str] | None, finish: Any) -> argparse.Namespace:
    """``finish(parser, argv)`` of the arguments as the parser spells them; a mistake ends the program, exit code 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return finish(parser, spelled(argv))
    except UserError as error:
        parser.error(str(error))


def with_config(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The settings, with the entries of the file that ``--config`` names as defaults."""
    argv = end_lists(parser, argv)
    args = parser.parse_intermixed_args(argv)
    if args.config:
        take_defaults(parser, args.config)
        args = parser.parse_intermixed_args(argv)
    return args


def given(parser: Parser, argv: list[str]) -> dict[str, Any]:
    """The settings that words of the command line name, whatever their spelling; no defaults, nothing of a file."""
    bare = copy.deepcopy(parser)
    bare._defaults.clear()
    for action in bare._actions:
        action.default = argparse.SUPPRESS
    return vars(bare.parse_intermixed_args(end_lists(bare, argv)))


def spelled(argv: list[str]) -> list[str]:
    """``--batch_size 8 --mean "(.1, .2, .3)"`` as ``--batch-size 8 --mean .1 .2 .3``: SupContrast's spelling."""
    out: list[str] = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
            word = name + equals + value
        before = name if equals else out[-1] if out else ""
        tuple_ = value if equals else word
        if before in ("--mean", "--std") and tuple_[:1] in ("(", "["):
            out += [before] * bool(equals) + _numbers(before, tuple_)
        else:
            out.append(word)
    return out


def _numbers(flag: str, text: str) -> list[str]:
    numbers = text.strip("()[] ").replace(",", " ").split()
    if not numbers or not all(map(_is_number, numbers)):
        raise UserError(f"{flag} {text}: write numbers, such as {flag} 0.5 0.5 0.5.")
    return numbers


def end_lists(parser: Parser, argv: list[str]) -> list[str]:
    """``--knn-k 10 20 DIR`` as ``DIR --knn-k 10 20``: argparse would take DIR for one of the numbers."""
    lists = {
        word
        for action in parser._actions
        if action.nargs in ("+", "*") and action.type in (int, float)
        for word in action.option_strings
    }
    kept: list[str] = []
    begin = None  # where the lists begin that the next word might join
    for word in argv:
        if word in lists:
            begin = len(kept) if begin is None else begin
        elif begin is not None and not _is_number(word):
            if not word.startswith("-"):
                kept.insert(begin, word)
                begin += 1
                continue
            begin = None
        kept.append(word)
    return kept


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def take_defaults(parser: Parser, path: str) -> None:
    """Make a YAML file's entries (or a recipe's) the parser's defaults, checked as if they had been typed."""
    flags = {word.lstrip("-"): action for action in parser._actions for word in action.option_strings}
    filed, path = set(), recipe(path)
    for name, value in _read_yaml(path).items():
        name = str(name).replace("_", "-")
        if name == "data":
            parser.set_defaults(data=str(value))
        elif name not in flags or name in ("config", "help"):
            raise UserError(f"{path}: {name} is no flag of {parser.prog}.")
        elif isinstance(value, list) and flags[name].nargs in (None, 0, "?"):
            raise UserError(f"{path}: {name} takes one value, not the list {value}.")
        elif value is not None:
            dest = flags[name].dest
            parser.set_defaults(**{dest: getattr(parser.parse_args(spelled(_argv(name, value, flags[name]))), dest)})
            filed.add(dest)
    parser.filed |= filed


def _argv(name: str, value: Any, action: argparse.Action) -> list[str]:
    if isinstance(value, bool):
        negative = f"--no-{name}"
        return [f"--{name}"] if value else [negative] if negative in action.option_strings else []
    flag = next(word for word in action.option_strings if word.lstrip("-") == name)
    return [flag, *map(str, value)] if isinstance(value, list) else [flag, str(value)]


def _read_yaml(path: str) -> dict:
    import yaml

    try:
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file) or {}
    except OSError as error:
        raise UserError(f"--config {path} cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not a YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise UserError(f"--config {path} must be a list of FLAG: VALUE lines.")
    return entries


def at_least(args: argparse.Namespace, low: float, *names: str) -> None:
    """UserError where a setting is below ``low`` or infinite."""
    for name in names:
        value = getattr(args, name)
        if not low <= value < float("inf"):  # "not <=" also catches NaN
            finite = " and finite" * (value == float("inf"))
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}{finite}, not {value}.")


def positive(args: argparse.Namespace, *names: str) -> None:
    """UserError where a setting is not a number above 0."""
    for name in names:
        if not 0 < getattr(args, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} must be a number above 0, not {getattr(args, name)}.")
