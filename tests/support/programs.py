"""The programs of the project by name: what a typed command starts, and what its parser makes of its words."""

import argparse
import importlib
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from moco import cli
from moco.cli import commands, looking
from moco.cli.data import parse_data
from moco.sweep import __main__ as sweep

ROOT = Path(__file__).resolve().parents[2]
OURS = ("moco", "main_", "detection", "benchmarks")
MAINS = {"pretrain": cli.parse_pretrain, "lincls": cli.parse_lincls, "semisup": cli.parse_semisup}
PARSE: dict[str, Callable[[list[str]], Any]] = {
    **MAINS,
    "average": commands.parse_average,
    "bench": commands.parse_bench,
    "data": parse_data,
    "demo": commands.parse_demo,
    "describe": lambda words: commands.describe_parser().parse_args(words),
    "embed": commands.parse_embed,
    "export": lambda words: commands.export_parser().parse_args(words),
    "negatives": looking.parse_negatives,
    "neighbours": looking.parse_neighbours,
    "report": looking.parse_report,
    "retrieval": commands.parse_retrieval,
    "detection": lambda words: importlib.import_module("detection.run").parse(words),
}

OTHERS = {"sweep": sweep.main}  # parse inside
NAMES = (*PARSE, *OTHERS)
NO_FLAGS = ("benchmarks.speed.kernel_bytes",)


class Parsed(BaseException):
    """What ends a program once its words are parsed: with its parser, and with what that made of them."""

    def __init__(self, parser: argparse.ArgumentParser, arguments: argparse.Namespace | None):
        self.parser, self.arguments = parser, arguments


def stopped(main: Callable, words: list[str] | None) -> Any:
    """The arguments that a program makes of these words, or, without words, its parser; nothing else of it is run."""
    original = argparse.ArgumentParser.parse_known_args

    def known(parser, args=None, namespace=None):
        raise Parsed(parser, None if words is None else original(parser, args, namespace)[0])

    def all_of_them(parser, args=None, namespace=None):
        found, rest = (None, []) if words is None else original(parser, args, namespace)
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        raise Parsed(parser, found)

    patched = {"parse_known_args": known, "parse_args": all_of_them, "parse_intermixed_args": all_of_them}
    argv = patch("sys.argv", ["program", *(words or [])])
    with argv, patch.multiple(argparse.ArgumentParser, **patched):
        try:
            main(*[words or []] * bool(inspect.signature(main).parameters))
        except Parsed as found:
            return found.parser if words is None else found.arguments
    raise AssertionError(f"{main} parses nothing")


def main_of(name: str) -> Callable:
    """What a program begins with that has no function for its words alone."""
    return OTHERS.get(name) or importlib.import_module(name).main


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a program."""
    return stopped(PARSE.get(name) or main_of(name), None)


def long_flags(parser: argparse.ArgumentParser) -> set[str]:
    """Those of its subcommands too."""
    found = {word for word in parser._option_string_actions if word.startswith("--")}
    for action in parser._actions:
        for one in action.choices.values() if isinstance(action, argparse._SubParsersAction) else ():
            found |= long_flags(one)
    return found


def parse(name: str, words: list[str]) -> Any:
    """What a program's parser makes of words; SystemExit where it refuses them."""
    if name in NO_FLAGS and not words:
        return argparse.Namespace()
    return PARSE[name](words) if name in PARSE else stopped(main_of(name), words)


def started(words: list[str]) -> tuple[str, list[str]] | None:
    """The program that a command starts, by name, and the words behind; None where it starts none of the project.

    A name is that of `moco NAME`; of others the module: benchmarks.speed.knn.
    """
    first, *rest = words
    if first == "moco" and rest:
        return rest[0], rest[1:]
    if re.fullmatch("moco-[a-z]+", first):
        return first.removeprefix("moco-"), rest
    if not re.fullmatch(r"python[\d.]*", first) or not rest:
        return None
    if rest[0] == "-m" and len(rest) > 1:
        name, rest = rest[1], rest[2:]
    else:
        name, rest = rest[0].removesuffix(".py").replace("/", "."), rest[1:]
    if name == "moco" and rest:
        return rest[0], rest[1:]
    name = re.sub(r"^moco_detection\b", "detection", name)
    if not name.startswith(OURS):
        return None
    name = "detection" if name == "detection.run" else re.sub(r"^(moco\.mains\.)?main_|^moco\.", "", name)
    return name, rest
