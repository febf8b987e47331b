"""SVG pictures from numbers, in plain text: the same bytes on every machine, a few kilobytes, no library.

A picture has a white card of its own under it, so that it can be read on a light and on a dark page.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

Point = tuple[float, float]
TEXT, PALE, RULE = "#24292f", "#57606a", "#d0d7de"
COLOURS = ("#0969da", "#cf222e", "#1a7f37", "#9a6700", "#8250df", "#bf3989", "#1b7c83", "#bc4c00", "#57606a", "#7d4e00")


class Picture:
    """Shapes in pixels, x to the right and y down, from the upper left corner."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            f'font-family="system-ui,sans-serif" role="img">',
            f"<title>{html.escape(title)}</title>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>',
        ]

    def text(self, at: Point, words: str, size: int = 12, colour: str = TEXT, anchor: str = "start") -> None:
        """One line; ``anchor`` is start, middle or end."""
        x, y = map(number, at)
        look = f'font-size="{size}" fill="{colour}" text-anchor="{anchor}"'
        self.parts.append(f'<text x="{x}" y="{y}" {look}>{html.escape(words)}</text>')

    def line(self, points: Iterable[Point], colour: str = RULE, width: float = 1, more: str = "") -> None:
        """A line through all points, not filled; ``more``: further attributes."""
        places = " ".join(",".join(map(number, point)) for point in points)
        self.parts.append(f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"{more}/>')

    def arrow(self, start: Point, end: Point, colour: str = PALE) -> None:
        """A line with a head."""
        (x, y), (u, v) = start, end
        length = max(((u - x) ** 2 + (v - y) ** 2) ** 0.5, 1e-9)
        a, b = 6 * (u - x) / length, 6 * (v - y) / length
        self.line([start, end], colour, 1.5)
        self.line([(u - a - b / 2, v - b + a / 2), end, (u - a + b / 2, v - b - a / 2)], colour, 1.5)

    def dots(self, points: Iterable[Point], colour: str, size: float = 4, opacity: float = 1) -> None:
        """A round dot a point, ``size`` wide."""
        places = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
        self.parts.append(
            f'<path d="{places}" stroke="{colour}" stroke-width="{size}" stroke-linecap="round" opacity="{opacity}"/>'
        )

    def box(self, at: Point, size: Point, words: Sequence[str], fill: str = "#f6f8fa", colour: str = TEXT) -> None:
        """A rectangle with centred lines of text."""
        (x, y), (w, h) = at, size
        self.parts.append(
            f'<rect x="{number(x)}" y="{number(y)}" width="{number(w)}" height="{number(h)}" rx="6" fill="{fill}" '
            f'stroke="{colour}"/>'
        )
        for i, line in enumerate(words):
            self.text((x + w / 2, y + h / 2 + 4 + 16 * (i - (len(words) - 1) / 2)), line, 12, colour, "middle")

    def __str__(self) -> str:
        return "\n".join([*self.parts, "</svg>"]) + "\n"


def number(value: float) -> str:
    """To a tenth of a pixel."""
    return f"{round(value, 1) + 0:g}"
