"""pyproject.toml, and the Markdown pages taken apart: fenced blocks, the commands in them, what stands in `code`."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest's

ROOT = Path(__file__).resolve().parents[2]
OTHERS = ("README.md", "CONTRIBUTING.md", "detection/README.md", "benchmarks/README.md", "moco/kernels/README.md")
PAGES = (*OTHERS, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```[ ]*$", re.M | re.S)
BETWEEN = {";", "&&", "||", "|", "&"}  # two commands of one line


@dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language and the line at which it begins."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: str) -> str:
    """A page's Markdown."""
    return (ROOT / page).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    """pyproject.toml's table ``project``."""
    return tomllib.loads(read("pyproject.toml"))["project"]


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page, in their order."""
    text = read(page)
    return [Block(page, text[: m.start()].count("\n") + 1, m[1], m[2]) for m in FENCE.finditer(text)]


def prose(page: str) -> str:
    """A page without its blocks; lines keep their numbers."""
    return FENCE.sub(lambda match: "\n" * match[0].count("\n"), read(page))


def spans(text: str) -> list[str]:
    """What stands in `code`."""
    return re.findall(r"`([^`\n]+)`", text)


def commands(text: str) -> list[list[str]]:
    """The commands of a bash block, as words without comments, redirections and the marks between commands."""
    found: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in BETWEEN:
                found += [words] if words else []
                words = []
            else:
                words.append(word)
    return [plain for words in found if (plain := _without_files(words))]


def _without_files(words: list[str]) -> list[str]:
    """``> FILE`` and ``2> FILE`` are no words of a command."""
    kept: list[str] = []
    skip = False
    for word in words:
        if skip:
            skip = False
        elif set(word) <= set("<>&") and word:
            skip = True
        else:
            kept.append(word)
    return kept
