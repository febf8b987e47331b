"""Rows of images with captions and frames, as a PNG and as part of a page.

A frame tells what an image is by colour, line and sign: MARKS in :mod:`moco.pictures.colours`.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from moco.errors import printable
from moco.files import replacing
from moco.pictures.colours import MARKS
from moco.pictures.lettering import lettering
from moco.pictures.page import text
from moco.pictures.thumbnails import thumbnail

STYLES, SCRIPTS = ("grid.css",), ("grid.js",)  # of a page with :func:`grid_html`
ENLARGED = 320  # pixels of the longest side in a page
ENLARGING = '<div id="enlarged" hidden><img alt=""><div></div></div>'  # what grid.js fills
# Pixels of the PNG: an image, between two, a line of text, around all, and the width that the legend needs.
BOX, GAP, LINE, MARGIN, LEAST = 96, 14, 15, 16, 480


@dataclass(frozen=True)
class Cell:
    """An image of a grid.

    image: of any size, shown as a whole. lines: below it, short ones. mark: a key of MARKS, or "" for no frame.
    detail: what the page says of it when it is enlarged, such as the file's name.
    """

    image: Image.Image
    lines: tuple[str, ...] = ()
    mark: str = ""
    detail: str = ""


Rows = Sequence[Sequence[Cell]]


def marks_of(rows: Rows) -> list[str]:
    """The marks in the grid, in the order of MARKS: a legend names those."""
    found = {cell.mark for row in rows for cell in row}
    return [mark for mark in MARKS if mark in found]


def grid_html(rows: Rows) -> str:
    """The grid as HTML; an image is enlarged under the pointer, by a click or by the Enter key."""
    return "\n".join([
        f'<div class="legends">{legend_html(marks_of(rows))}</div>',
        '<div class="rows">',
        *(f'<div class="row">{"".join(map(_cell_html, row))}</div>' for row in rows),
        "</div>",
        ENLARGING,
    ])  # fmt: skip


def legend_html(marks: Sequence[str]) -> str:
    """The meaning of each mark, as HTML."""
    return "".join(f'<span class="legend {mark}">{sign_html(mark)} {MARKS[mark].meaning}</span>' for mark in marks)


def sign_html(mark: str) -> str:
    """A mark's sign as HTML; empty for no mark."""
    return f'<b title="{MARKS[mark].meaning}">{MARKS[mark].sign}</b>' if mark else ""


def _cell_html(cell: Cell) -> str:
    lines = "".join(f"<span>{text(line)}</span>" for line in cell.lines)
    return (
        f'<figure tabindex="0" class="{cell.mark}" data-detail="{text(cell.detail)}">'
        f'<div><img src="{thumbnail(cell.image, ENLARGED)}" alt="{text(cell.detail)}"></div>'
        f"<figcaption>{sign_html(cell.mark)}{lines}</figcaption></figure>"
    )


def grid_png(rows: Rows, path: str, title: str, words: str = "", choose: str = "--out") -> None:
    """Write the grid as a PNG, with ``title``, a line of ``words`` and a legend above it; ``choose`` as in
    :func:`moco.files.replacing`."""
    with lettering(), replacing(path, choose) as beside:
        _drawn(rows, [title, *([words] if words else [])]).write(beside)


def _drawn(rows: Rows, head: list[str]) -> Canvas:
    across, lines = max(map(len, rows)), max(len(cell.lines) for row in rows for cell in row)
    step = BOX + GAP, BOX + GAP + 4 + lines * LINE
    top = MARGIN + (len(head) + 2) * LINE
    canvas = Canvas(max(LEAST, 2 * MARGIN + across * step[0] - GAP), top + len(rows) * step[1])
    for number, line in enumerate(head):
        canvas.words(line, MARGIN, MARGIN - 6 + number * (LINE + 3), canvas.width - 2 * MARGIN, size=10 - number)
    for number, mark in enumerate(marks_of(rows)):
        meaning, left = f"{MARKS[mark].sign} {MARKS[mark].meaning}", MARGIN + number * LEAST // 3
        canvas.words(meaning, left, top - LINE - 10, LEAST // 3, colour=MARKS[mark].colour)
    for down, row in enumerate(rows):
        for right, cell in enumerate(row):
            canvas.cell(cell, MARGIN + right * step[0], top + down * step[1])
    return canvas


def _cut(words: str, kept: int) -> str:
    """So many letters of the words, from both ends."""
    return printable(words[: -(-kept // 2)] + "\N{HORIZONTAL ELLIPSIS}" + words[len(words) - kept // 2 :])


class Canvas:
    """A white picture that is drawn on in pixels from its upper left corner; matplotlib has letters of any size."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure  # not pyplot's: no screen is needed

        self.width, self.height = width, height
        self.figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor="white")
        self.canvas = FigureCanvasAgg(self.figure)

    def write(self, path: str) -> None:
        with open(path, "wb") as file:
            self.canvas.print_png(file)

    def words(self, words: str, x: float, y: float, width: float, size: float = 8, colour: str = "#1d2026") -> None:
        """A line below ``y``, cut to the width in the middle: of a path both ends say something."""
        words = " ".join(words.split())  # a file's name may have more lines than one
        shown = printable(words)
        if len(words) > width or self.text_width(shown, size) > width:  # no letter is narrower than a pixel
            wider = range(1, min(len(words), int(width)))
            kept = bisect.bisect(wider, width, key=lambda kept: self.text_width(_cut(words, kept), size))
            shown = _cut(words, max(1, kept))
        self.figure.text(
            x / self.width, 1 - y / self.height, shown, size=size, color=colour, va="top", parse_math=False
        )  # fmt: skip

    def text_width(self, words: str, size: float) -> float:
        from matplotlib.font_manager import FontProperties

        return self.canvas.get_renderer().get_text_width_height_descent(words, FontProperties(size=size), False)[0]

    def cell(self, cell: Cell, x: int, y: int) -> None:
        """An image in a box with its frame, and its lines below."""
        from matplotlib.patches import Rectangle

        image = cell.image.convert("RGB")
        scale = BOX / max(image.size)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        image = image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS)
        left, above = x + (BOX - size[0]) // 2, y + (BOX - size[1]) // 2
        self.figure.figimage(np.asarray(image), left, self.height - above - size[1])
        if mark := MARKS.get(cell.mark):
            style = {"edgecolor": mark.colour, "linewidth": 2, "linestyle": mark.line}
            corner = x - 3, self.height - y - BOX - 3
            self.figure.add_artist(Rectangle(corner, BOX + 6, BOX + 6, fill=False, transform=None, **style))
            self.words(mark.sign, x + BOX - 12, y + BOX + 6, 14, size=9, colour=mark.colour)
        for number, line in enumerate(cell.lines):
            self.words(line, x, y + BOX + 7 + number * LINE, BOX - 14 * bool(mark and not number))
