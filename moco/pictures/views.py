"""The views of a run as one picture: images with the crops of their views, and the views with what was drawn.

A tile is a view's own pixels, each as a square of whole pixels of the picture, or of large views every few of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moco.errors import UserError
from moco.files import replacing
from moco.pictures.colours import CLASSES
from moco.pictures.grid import Canvas
from moco.pictures.lettering import lettering

LEAST, MOST = (
    168,
    336,
)  # pixels of a tile: smaller views are enlarged up to the first, larger ones drawn below the second
LARGEST = 30_000  # pixels of a side of the picture
GAP, BETWEEN, LINE, MARGIN = 8, 26, 16, 22
TEXT = 8.5  # points
# Of views by number: colours that are far apart also to colour-blind readers, and dashes.
MARKS = (("#0a7bc4", "solid"), ("#d55e00", (0, (5, 2))), *((colour, (0, (2, 1.5))) for colour in CLASSES[2:]))
PALE, LOW = "#5b6270", "#b3261e"

Corners = NDArray[np.float64]  # (4, 2): x, y
Places = dict[tuple[int, int, int], tuple[int, int]]


@dataclass(frozen=True)
class ViewShown:
    """One view. pixels: (C, s, s) uint8, the first three channels are shown. corners: of its crop in the image, in
    pixels. crop: words on it; low: whether it is a small one. drawn: what was drawn besides. small: whether it is
    one of the small crops beside the views."""

    pixels: NDArray[np.uint8]
    corners: Corners
    crop: str
    low: bool
    drawn: tuple[str, ...]
    small: bool = False


@dataclass(frozen=True)
class ImageShown:
    """An image, (C, H, W) uint8, and its views by draw. lines: below it."""

    pixels: NDArray[np.uint8]
    lines: tuple[str, ...]
    draws: tuple[tuple[ViewShown, ...], ...]


def draw(
    images: Sequence[ImageShown], title: str, words: Sequence[str], path: str
) -> dict[tuple[int, int, int], tuple[int, int]]:
    """Write the picture, a row an image; ``words``: lines below the title.

    Returns x and y of each tile's corner, by (image, draw, view).

    Raises:
        UserError: it would be too large.
    """
    with lettering(), replacing(path, "--out") as beside:
        sheet = _Sheet(images, title, words)
        sheet.canvas.write(beside)
    return sheet.places


def factor(size: int) -> int:
    """How often a tile repeats each pixel of a view of ``size``; below -1: it has the mean of so many by so many."""
    return -size // MOST if size > MOST else max(1, LEAST // size)


class _Sheet:
    """The whole picture, drawn at once. side: of a tile, in pixels."""

    def __init__(self, images: Sequence[ImageShown], title: str, words: Sequence[str]) -> None:
        first = images[0].draws[0]
        self.times = factor(first[0].pixels.shape[-1])
        self.side = _tile(first[0].pixels, self.times).shape[0]
        self.views, self.draws = len(first), len(images[0].draws)
        self.large = sum(not view.small for view in first)
        block = (1 + self.views) * (self.side + GAP) - GAP
        width = max(640, 2 * MARGIN + self.draws * (block + BETWEEN) - BETWEEN)
        self.canvas = Canvas(100, 100)  # for the widths of letters
        texts = [[_lines_of(self.canvas, view, self.side) for draw in image.draws for view in draw] for image in images]
        tallest = [max(len(image.lines), *map(len, own)) for image, own in zip(images, texts, strict=True)]
        rows = [self.side + LINE * lines + BETWEEN for lines in tallest]
        top = MARGIN + 32 + LINE * len(words) + 2 * LINE + 20
        height = top + sum(rows)
        if max(width, height) > LARGEST:
            raise UserError(f"the picture would have {width} x {height} pixels; choose fewer --images or --draws.")
        self.canvas = Canvas(width, height)
        self.places: Places = {}
        self._head(title, words, top)
        for number, (image, own) in enumerate(zip(images, texts, strict=True)):
            above = top + sum(rows[:number])
            for time in range(self.draws):
                left = MARGIN + time * (block + BETWEEN)
                at = own[time * self.views : (time + 1) * self.views]
                self._block((number, time), image, at, left, above)

    def _head(self, title: str, words: Sequence[str], top: int) -> None:
        wide = self.canvas.width - 2 * MARGIN
        self.canvas.words(title, MARGIN, MARGIN - 4, wide, size=16)
        for number, line in enumerate(words):
            self.canvas.words(line, MARGIN, MARGIN + 30 + number * LINE, wide, size=9.5, colour=PALE)
        block = (1 + self.views) * (self.side + GAP) - GAP
        for time in range(self.draws):
            left = MARGIN + time * (block + BETWEEN)
            self.canvas.words(f"epoch {time}", left, top - 2 * LINE - 8, block, size=11)
            self.canvas.words("image, with its crops", left, top - LINE - 5, self.side, 9, PALE)
            for view in range(self.views):
                at = left + (view + 1) * (self.side + GAP)
                colour = MARKS[view % len(MARKS)][0]
                name = f"view {view + 1}" if view < self.large else f"small crop {view + 1 - self.large}"
                self.canvas.words(name, at, top - LINE - 5, self.side, 9, colour)

    def _block(
        self, key: tuple[int, int], image: ImageShown, texts: list[list[tuple[str, str]]], left: int, top: int
    ) -> None:
        """An image and its views of one draw."""
        views = image.draws[key[1]]
        self._image(image, views, left, top)
        for number, (view, lines) in enumerate(zip(views, texts, strict=True)):
            at = left + (number + 1) * (self.side + GAP)
            times = max(1, self.side // view.pixels.shape[-1]) if view.small else self.times
            self._pixels(_tile(view.pixels, times), at, top)
            self.places[(*key, number)] = (at, top)
            around = np.array([(-2, -2), (self.side + 2, -2), (self.side + 2, self.side + 2), (-2, self.side + 2)])
            self._outline(around + (at, top), number, 1.4)
            for place, (line, colour) in enumerate(lines):
                self.canvas.words(line, at, top + self.side + 6 + place * LINE, self.side + GAP, TEXT, colour)

    def _image(self, image: ImageShown, views: Sequence[ViewShown], left: int, top: int) -> None:
        _, height, width = image.pixels.shape
        scale = self.side / max(height, width)
        shape = max(1, round(width * scale)), max(1, round(height * scale))
        how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
        small = np.asarray(Image.fromarray(_colours(image.pixels)).resize(shape, how))
        x, y = left + (self.side - shape[0]) // 2, top
        self._pixels(small, x, y)
        for number, view in enumerate(views):
            corners = view.corners * (shape[0] / width, shape[1] / height) + (x, y)
            self._outline(corners, number, 2.0, within=(left - 3, top - 3, self.side + 6))
        for place, line in enumerate(image.lines):
            self.canvas.words(line, left, top + shape[1] + 6 + place * LINE, self.side, TEXT, PALE)

    def _pixels(self, pixels: NDArray[np.uint8], left: int, top: int) -> None:
        self.canvas.figure.figimage(pixels, left, self.canvas.height - top - pixels.shape[0])

    def _outline(
        self, corners: Corners, number: int, wide: float, within: tuple[int, int, int] | None = None
    ) -> None:  # fmt: skip
        """A line of a view's colour; ``within`` a square (x, y, side), on a pale line, as an image may have the colour,
        and cut off where it would leave the square: a crop of a rotated image does."""
        from matplotlib.patches import Polygon
        from matplotlib.transforms import Bbox

        colour, dashes = MARKS[number % len(MARKS)]
        points = [(x, self.canvas.height - y) for x, y in corners.tolist()]
        pale = [{"edgecolor": "white", "linewidth": wide + 1.4}] if within else []
        for style in (*pale, {"edgecolor": colour, "linewidth": wide, "linestyle": dashes}):
            line = self.canvas.figure.add_artist(Polygon(points, closed=True, fill=False, transform=None, **style))
            if within:
                x, y, side = within
                line.set_clip_box(Bbox.from_bounds(x, self.canvas.height - y - side, side, side))


def _colours(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(h, w, 3) of (C, h, w): the first three channels, or the first as grey."""
    chosen = pixels[:3] if len(pixels) >= 3 else pixels[:1].repeat(3, axis=0)
    return np.ascontiguousarray(chosen.transpose(1, 2, 0))


def _tile(pixels: NDArray[np.uint8], times: int) -> NDArray[np.uint8]:
    colours = _colours(pixels)
    if times < 0:
        return np.asarray(Image.fromarray(colours).reduce(-times))
    return colours.repeat(times, axis=0).repeat(times, axis=1)


def _lines_of(canvas: Canvas, view: ViewShown, width: int) -> list[tuple[str, str]]:
    """What is written below a view, in lines of its width, each with its colour."""
    lines = [""]
    for part in view.drawn:
        longer = f"{lines[-1]}, {part}" if lines[-1] else part
        if lines[-1] and canvas.text_width(longer, TEXT) > width:
            lines.append(part)
        else:
            lines[-1] = longer
    first = (f"! {view.crop}", LOW) if view.low else (view.crop, "#1d2026")
    return [first, *((line, PALE) for line in lines if line)]
