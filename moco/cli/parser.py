"""How words become settings: a parser, SupContrast's spelling, YAML files; what knows no flag of any main.

No torch here: a wrong flag is answered before a second of imports. ``--config FILE.yml`` is turned into the same
words as the command line and put in front of it, so that a file is checked like a command and flags override it.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from collections.abc import Callable, Container
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from moco.cli import mistakes
from moco.cli.mistakes import close_to
from moco.cli.number_lists import is_number, split_numbers
from moco.errors import USAGE_EXIT, UserError, tell, write_out
from moco.files import read_yaml
from moco.resources import find_recipe

MOST = 2**31 - 1  # of a whole number; above it sizes of tensors overflow


@dataclass(frozen=True)
class NumberRange:
    """The type of a flag that takes a number, with the numbers that it takes."""

    kind: Callable[[str], float]  # int or float
    holds: Callable[[float], bool]  # false of NaN
    sentence: str  # what follows the flag where it does not hold

    @property
    def __name__(self) -> str:
        return getattr(self.kind, "__name__", "number")  # argparse: invalid int value

    def __call__(self, text: str) -> float:
        value = self.kind(text)
        if self.kind is int and value > MOST:
            raise UserError(f"must be at most {MOST}, not {text}.")
        if not self.holds(value):
            finite = " and finite" * (value == math.inf and "at least" in self.sentence)
            raise UserError(f"{self.sentence}{finite}, not {text}.")
        return value


def at_least(low: float) -> NumberRange:
    """Finite numbers from ``low`` on, whole ones where it is an int."""
    return NumberRange(type(low), lambda x: low <= x < math.inf, f"must be at least {low:g}")


def whole(low: int, high: int) -> NumberRange:
    """Whole numbers from ``low`` to ``high``."""
    return NumberRange(int, lambda x: low <= x <= high, f"must be a whole number from {low} to {high}")


def share(high: float = 1.0, ends: str = "[)") -> NumberRange:
    """Numbers from 0 to ``high``; ``ends``: whether the two belong to it, as intervals are written."""
    excluded = [end for end, bracket in zip((0.0, high), ends, strict=True) if bracket in "()"]
    sentence = f"is above 0 and {'below' if high in excluded else 'at most'} {high:g}"
    if 0 not in excluded:
        sentence = f"is a share from 0 to {'below ' * (high in excluded)}{high:g}"
    return NumberRange(float, lambda x: 0 <= x <= high and x not in excluded, sentence)


positive = NumberRange(float, lambda x: 0 < x < math.inf, "must be a number above 0")
finite = NumberRange(float, math.isfinite, "must be a finite number")


# Set, what a parser refuses is raised as a UserError and no program ends: for functions that take flags.
raising: ContextVar[bool] = ContextVar("raising", default=False)


class Parser(argparse.ArgumentParser):
    """One sentence and exit code 2 instead of the whole usage text. ``filed``: what ``--config`` has set, by name."""

    filed: frozenset[str] = frozenset()
    words: tuple[str, ...] = ()  # what is parsed, for messages

    def __init__(self, prog: str = "", description: str = "", allow_abbrev: bool = False, **more: Any):
        super().__init__(prog, description=description, allow_abbrev=allow_abbrev, **more)

    def error(self, message: str) -> NoReturn:
        message = mistakes.explained(message, self._actions, self.words)
        if raising.get():
            raise UserError(message)
        tell(f"error: {message} (--help lists the flags)", error=True)
        sys.exit(USAGE_EXIT)

    def print_help(self, file: Any = None) -> None:
        write_out(self.format_help(), file or sys.stdout)

    def group(self, title: str) -> Callable[..., argparse.Action]:
        """``add_argument`` of the group of this title in --help."""
        for group in self._action_groups:
            if group.title == title:
                return group.add_argument
        return self.add_argument_group(title).add_argument

    def actions(self) -> list[argparse.Action]:
        """All arguments."""
        return list(self._actions)

    def flags(self) -> dict[str, argparse.Action]:
        """The argument of every spelling."""
        return {word: action for action in self._actions for word in action.option_strings}

    def given(self, argv: list[str]) -> dict[str, Any]:
        """The settings that words of the command line name, whatever their spelling; no defaults, nothing of a file."""
        bare = copy.deepcopy(self)
        bare._defaults.clear()
        for action in bare._actions:
            action.default = argparse.SUPPRESS
        return vars(bare.parse_intermixed_args(argv))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except UserError as error:
            raise argparse.ArgumentError(None, f"{spelling(action)} {error}") from error


def spelling(action: argparse.Action) -> str:
    """A flag as messages call it: after its setting where that is one of its spellings; CKPT and such as they are."""
    if not action.option_strings:
        return str(action.metavar or action.dest)
    longs = [word for word in action.option_strings if word.startswith("--")]
    own = f"--{action.dest.replace('_', '-')}"
    return own if own in longs else longs[0]


def parse(
    parser: Parser, argv: list[str] | None, finish: Callable[[Parser, list[str]], argparse.Namespace]
) -> argparse.Namespace:
    """``finish(parser, argv)`` of the arguments as the parser reads them; a mistake ends the program, exit code 2."""
    try:
        words = spelled(sys.argv[1:] if argv is None else argv)
        parser.words = tuple(words)
        return finish(parser, end_lists(parser, words))
    except UserError as error:
        parser.error(str(error))


def with_config(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """The settings, with the entries of the file that ``--config`` names as defaults."""
    args = parser.parse_intermixed_args(argv)
    if args.config:
        take_defaults(parser, args.config)
        args = parser.parse_intermixed_args(argv)
    return args


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
    if not numbers or not all(map(is_number, numbers)):
        raise UserError(f"{flag} {text}: write numbers, such as {flag} 0.5 0.5 0.5.")
    return numbers


def _number_flags(parser: Parser, nargs: Container[Any]) -> set[str]:
    """The spellings of the flags that take several numbers."""
    return {
        word
        for action in parser.actions()
        if action.nargs in nargs and (action.type in (int, float) or isinstance(action.type, NumberRange))
        for word in action.option_strings
    }


def with_numbers_split(parser: Parser, argv: list[str]) -> list[str]:
    """``--schedule 120,160`` as ``--schedule 120 160``."""
    return split_numbers(argv, _number_flags(parser, ("+", "*", 2, 3)))


def end_lists(parser: Parser, argv: list[str]) -> list[str]:
    """``--knn-k 10 20 DIR`` as ``DIR --knn-k 10 20``: argparse would take DIR for one of the numbers."""
    argv, lists = with_numbers_split(parser, argv), _number_flags(parser, ("+", "*"))
    kept: list[str] = []
    begin = None  # where the lists begin that the next word might join
    for word in argv:
        if word in lists:
            begin = len(kept) if begin is None else begin
        elif begin is not None and not is_number(word):
            if not word.startswith("-"):
                kept.insert(begin, word)
                begin += 1
                continue
            begin = None
        kept.append(word)
    return kept


def take_defaults(parser: Parser, path: str) -> None:
    """Make a YAML file's entries (or a recipe's) the parser's defaults, checked as if they had been typed."""
    flags = {word.lstrip("-"): action for word, action in parser.flags().items()}
    filed: set[str] = set()
    path = find_recipe(path)
    for name, value in _read_yaml(path).items():
        name = str(name).replace("_", "-")
        if name == "data":
            parser.set_defaults(data=str(value))
        elif name not in flags or name in ("config", "help"):
            raise UserError(f"{path}: {name} is no flag of {parser.prog}{close_to(name, flags) or '.'}")
        elif isinstance(value, list) and flags[name].nargs in (None, 0, "?"):
            raise UserError(f"{path}: {name} takes one value, not the list {value}.")
        elif value is not None:
            locate: Callable[[str, Any], Any] = getattr(flags[name].type, "beside_config", lambda _, entry: entry)
            dest, spellings = flags[name].dest, flags[name].option_strings
            flag = next(word for word in spellings if word.lstrip("-") == name)
            words = spelled(argv_of(flag, locate(path, value), spellings))
            args = parser.parse_args(with_numbers_split(parser, words))
            parser.set_defaults(**{dest: getattr(args, dest)})
            filed.add(dest)
    parser.filed |= filed


def argv_of(flag: str, value: Any, known: Container[str]) -> list[str]:
    """A flag and its value in a YAML file as they are typed; false is the flag's --no-, where that is ``known``."""
    if value is None or value is False:
        negative = "--no-" + flag.lstrip("-")
        return [negative] if value is False and negative in known else []
    values = [] if value is True else cast("list[Any]", value) if isinstance(value, list) else [value]
    return [flag, *map(str, values)]


def _read_yaml(path: str) -> dict[Any, Any]:
    entries: Any = read_yaml(path, f"--config {path}") or {}
    if not isinstance(entries, dict):
        raise UserError(f"--config {path} must be a list of FLAG: VALUE lines.")
    return cast("dict[Any, Any]", entries)
