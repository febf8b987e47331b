"""Docstrings as this project writes them, for griffe: ``mean, std: of each channel`` is two entries, and a role such as
``:func:`name``` is the name in code."""

import itertools
import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:class|data|func|meth|mod):(`[^`]+`)")
ENTRY = re.compile(r"^( +)(\*{0,2}\w+(?:, \*{0,2}\w+)+): ")


class Docstrings(griffe.Extension):
    """Rewrites them before they are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(r"\1", "\n".join(_split(obj.docstring.value.splitlines())))


def _split(lines: list[str]) -> list[str]:
    """Each name of an entry with all words of it."""
    out: list[str] = []
    while lines:
        entry = ENTRY.match(lines[0])
        if not entry:
            out.append(lines.pop(0))
            continue
        deeper = " " * (len(entry[1]) + 1)
        rest = list(itertools.takewhile(lambda line: line.startswith(deeper), lines[1:]))  # noqa: B023
        for name in entry[2].split(", "):
            out += [f"{entry[1]}{name}: {lines[0][entry.end() :]}", *rest]
        lines = lines[1 + len(rest) :]
    return out
