"""Numbers of one flag as people write them: ``120,160``, ``0.5, 0.5, 0.5``, ``[1, 5]``."""

from __future__ import annotations

import os
import re
from collections.abc import Container

from moco.errors import UserError


def is_number(word: str) -> bool:
    """Whether Python reads the word as a number."""
    try:
        float(word)
    except ValueError:
        return False
    return True


def split_numbers(argv: list[str], lists: Container[str]) -> list[str]:
    """The words with every number behind a flag of ``lists`` as a word of its own; others as they are.

    Raises UserError for what begins as such numbers and goes on as something else.
    """
    out: list[str] = []
    flag = ""  # that the next numbers are of
    for word in argv:
        name, equals, value = word.partition("=")
        if name in lists:
            flag = name
            out += [name, *_numbers(flag, value)] if equals and value else [word]
        elif word.startswith("-") and not is_number(word.split(",", 1)[0]):
            flag = ""
            out.append(word)
        else:
            out += _numbers(flag, word) if flag else [word]
    return out


def _numbers(flag: str, word: str) -> list[str]:
    parts = word.strip("()[] ").replace(",", " ").split()
    if word and all(map(is_number, parts)):
        return parts
    if "," in word and re.match(r"[(\[]?[-+.]?\d", word) and not os.path.exists(word):
        raise UserError(f"{flag} {word}: write numbers, such as {flag} 1 2 or {flag} 1,2.")
    return [word]
