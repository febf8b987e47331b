"""The colours of every picture and page, and the signs that go with them: nothing is told by colour alone."""

from __future__ import annotations

from typing import NamedTuple

# Found by a random search for the largest distance between the two most similar ones, also as seen with each kind of
# colour blindness, among colours that stand out from white and from a dark page; each is far from those before it.
CLASSES = (
    "#3936da", "#956601", "#aea8ca", "#f8476c", "#16bb99", "#b6b105", "#9a0f65", "#235b3a", "#22839c", "#f133fe",
)  # fmt: skip


class Mark(NamedTuple):
    """How an image is framed: a colour, the dashes of the line (CSS), a sign that DejaVu Sans has, and its meaning."""

    colour: str
    line: str
    sign: str
    meaning: str


MARKS = {
    "query": Mark("#767b85", "solid", "?", "query"),
    "right": Mark("#0a7bc4", "solid", "\N{CHECK MARK}", "the query's class"),
    "wrong": Mark("#d55e00", "dashed", "\N{BALLOT X}", "another class"),
    "positive": Mark("#0a7bc4", "solid", "+", "the positive: the key of the same image"),
    "false": Mark("#d55e00", "dashed", "!", "false negative: another image of the query's class"),
}


def colour_of(label: int) -> str:
    """Of a class by its number; after the last colour comes the first one again."""
    return CLASSES[label % len(CLASSES)]


def style() -> str:
    """CSS: the variables ``--class-0`` and so on and ``--right`` for each of MARKS, and of a figure or an entry of a
    legend whose class is a mark ``--mark`` and ``--line``."""
    found = {f"class-{number}": colour for number, colour in enumerate(CLASSES)}
    found |= {name: mark.colour for name, mark in MARKS.items()}
    marked = [
        f"figure.{name}, .legend.{name} {{ --mark: {mark.colour}; --line: {mark.line}; }}"
        for name, mark in MARKS.items()
    ]
    return "\n".join([":root {" + "".join(f" --{name}: {colour};" for name, colour in found.items()) + " }", *marked])
