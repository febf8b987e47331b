"""Which classes are taken for which: a matrix of counts, as a table for programs and as a picture with numbers.

Legend: C classes; a matrix has a row for each true class and a column for each predicted one.
"""

from __future__ import annotations

import os
import textwrap
from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from moco import files
from moco.errors import printable
from moco.pictures.colours import MARKS
from moco.pictures.lettering import lettering, plain

COUNTED = 12  # classes up to which a cell has room for its percentage and its count,
NUMBERED = 40  # for its percentage,
NAMED = 100  # and an axis for the names of the classes
CELLS = 250  # a side of the picture at most, so that one can be seen: of more classes, several in one
LETTERS = 18  # of a name
LISTED = 30  # pairs beside a picture without numbers
TOLD = 3  # pairs in a log's line


class Pair(NamedTuple):
    """``images`` images of the class ``true``, which are a ``share`` of its own, were taken for ``predicted``."""

    true: int
    predicted: int
    images: int
    share: float


def count_confusions(labels: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """The (C, C) int64 matrix of n labels and n predictions, both (n,) and below C."""
    return np.bincount(labels * classes + predicted, minlength=classes**2).reshape(classes, classes)


def worst_pairs(matrix: np.ndarray, most: int) -> list[Pair]:
    """The pairs of classes that were confused for most images, the worst first; of equals the larger share."""
    wrong, images = matrix - np.diag(matrix.diagonal()), matrix.sum(1)
    true, predicted = wrong.nonzero()
    found = zip(true.tolist(), predicted.tolist(), wrong[true, predicted].tolist(), strict=True)
    pairs = (Pair(t, p, n, n / int(images[t])) for t, p, n in found)
    return sorted(pairs, key=lambda pair: (-pair.images, -pair.share))[:most]


def write_confusion(matrix: np.ndarray, classes: list[str], path: str, title: str) -> str:
    """Write PATH.csv, the counts, and PATH.png; returns a sentence that names both and the worst pairs.

    Args:
        matrix: (C, C) counts. classes: C names, by label.
        title: what was measured on which images.
    """
    table = [
        ["true / predicted", *classes],
        *([name, *row] for name, row in zip(classes, matrix.tolist(), strict=True)),
    ]
    files.write_csv(f"{path}.csv", table)
    draw_confusion(matrix, classes, f"{path}.png", title)
    pairs = (f"{classes[p.true]} for {classes[p.predicted]} ({p.images})" for p in worst_pairs(matrix, TOLD))
    told = " ".join(", ".join(pairs).split())
    return f"{path}.csv and {os.path.basename(path)}.png beside it" + (
        f"; most images taken wrongly: {told}" if told else ""
    )


# ------------------------------------------------------------------------------------------------------- the picture


def draw_confusion(matrix: np.ndarray, classes: list[str], path: str, title: str) -> None:
    """The matrix as a PNG: each row in percent of its class, right ones blue, wrong ones orange. The cells have numbers
    up to NUMBERED classes; beyond, the worst pairs are listed beside it.

    Args:
        matrix: (C, C) counts. classes: C names, by label.
    """
    with lettering():
        _draw(matrix, classes, path, title)


def _draw(matrix: np.ndarray, classes: list[str], path: str, title: str) -> None:
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    side, listed, block = _inches(drawable(classes)), len(classes) > NUMBERED, -(-len(classes) // CELLS)
    figure = Figure(figsize=(side + 5 * listed, side), layout="constrained")
    axes = figure.subplots(1, 1 + listed, squeeze=False, width_ratios=[side, 5][: 1 + listed])[0]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    edges = (-0.5, len(classes) - 0.5)
    axes[0].imshow(_pixels(shares, block), interpolation="nearest", extent=(*edges, *edges), origin="lower")
    axes[0].invert_yaxis()
    _label_axes(axes[0], matrix, classes)
    if listed:
        _list_pairs(axes[1], matrix, drawable(classes))
    else:
        _write_numbers(axes[0], matrix, shares)
    told = (
        "blue: right, orange: wrong, the darker the larger the share of the class"
        if listed
        else ("in a cell: percent of the true class" + ", below it images" * (len(classes) <= COUNTED))
    )
    axes[0].set_xlabel(
        "\n".join(["number of the " * (len(classes) > NAMED) + "predicted class", *_wrapped(told, side)])
    )
    images, right = int(matrix.sum()), int(matrix.trace())
    rate = f"{right:,} of {images:,} images right ({100 * right / max(images, 1):.2f} %)"
    several = [f"a cell has {block} x {block} classes and shows the largest share"] * (block > 1)
    head = [line for text in (plain(title), rate, *several) for line in _wrapped(text, side)]
    axes[0].set_title("\n".join(head), loc="left", fontsize=11)
    files.write_figure(figure, path, "path")


def _wrapped(text: str, side: float) -> list[str]:
    return textwrap.wrap(text, int(10 * (side - 1)))


def _inches(names: list[str]) -> float:
    """The side of the matrix with the names: cells get smaller, but not the numbers in them."""
    cell = 0.62 if len(names) <= COUNTED else 0.36 if len(names) <= NUMBERED else 0.13
    beside = 1.2 + 0.08 * max(map(len, names)) if len(names) <= NAMED else 1.2
    return beside + min(12.5, max(3.0, cell * len(names)))


def _pixels(shares: np.ndarray, block: int) -> np.ndarray:
    """(C, C, 3) colours of the shares, the root of a share as its saturation, so that 1 % can be seen; of ``block``
    classes in one cell the largest share."""
    colours = (
        np.array([int(MARKS[name].colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for name in ("right", "wrong")
    )
    layers = []
    for part, colour in zip((np.diag(shares.diagonal()), shares - np.diag(shares.diagonal())), colours, strict=True):
        starts = np.arange(0, len(shares), block)
        most = np.maximum.reduceat(np.maximum.reduceat(part, starts, 0), starts, 1)
        layers.append(1 - np.sqrt(most)[..., None] * (1 - colour))
    return np.minimum(*layers)


def _label_axes(axis: Any, matrix: np.ndarray, classes: list[str]) -> None:
    axis.set_ylabel("true class (its images)")
    for label in (matrix.sum(1) == 0).nonzero()[0] if len(classes) <= NUMBERED else ():
        axis.axhspan(label - 0.5, label + 0.5, color="0.93")
        axis.text(len(classes) / 2 - 0.5, label, "no images", ha="center", va="center", fontsize=8, color="0.4")
    if len(classes) > NAMED:
        axis.set_ylabel("number of the true class")
        return
    size = 9 if len(classes) <= NUMBERED else 6
    names, numbers = drawable(classes), range(len(classes))
    rows = [f"{name} ({images:,})" for name, images in zip(names, matrix.sum(1), strict=True)]
    axis.set_xticks(numbers, names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
    axis.set_yticks(numbers, rows, fontsize=size)
    axis.set_xticks([n - 0.5 for n in numbers], minor=True)
    axis.set_yticks([n - 0.5 for n in numbers], minor=True)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    axis.tick_params(which="minor", length=0)


def _write_numbers(axis: Any, matrix: np.ndarray, shares: np.ndarray) -> None:
    """Percent of the row, with the count below where there is room; nothing in a cell without images."""
    counts = len(matrix) <= COUNTED
    for true, predicted in zip(*matrix.nonzero(), strict=True):
        share = shares[true, predicted]
        number = f"{100 * share:.1f}" if counts else f"{100 * share:.0f}" if share >= 0.005 else "<1"
        colour = "white" if share > 0.35 else "black"
        place = {"ha": "center", "color": colour, "in_layout": False}  # inside the matrix: room needs no second look
        if counts:
            axis.text(predicted, true - 0.03, number, va="bottom", fontsize=10, **place)
            axis.text(predicted, true + 0.07, f"{matrix[true, predicted]:,}", va="top", fontsize=7, **place)
        else:
            axis.text(predicted, true, number, va="center", fontsize=8 if number != "100" else 7, **place)


def _list_pairs(axis: Any, matrix: np.ndarray, names: list[str]) -> None:
    pairs = worst_pairs(matrix, LISTED)
    axis.axis("off")
    axis.set_title("Most images taken wrongly", loc="left", fontsize=11)
    cells = [[names[p.true], names[p.predicted], f"{p.images:,}", f"{100 * p.share:.1f} %"] for p in pairs]
    if not cells:
        return
    head = ["true class", "predicted", "images", "of the class"]
    table = axis.table(cells, colLabels=head, loc="upper left", colWidths=[0.36, 0.36, 0.12, 0.16], cellLoc="left",
                       colLoc="left", edges="open")  # fmt: skip
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    for column in range(len(head)):
        table[0, column].set_text_props(weight="bold")


def drawable(names: list[str], letters: int = LETTERS) -> list[str]:
    """Names as a picture has room for: cut in their middle, and with their numbers where two would be alike, as are
    names in letters that matplotlib's own font has not."""
    from matplotlib import font_manager

    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    shown = [" ".join(printable(name).split()) for name in names]
    shown = [n if len(n) <= letters else f"{n[: letters - letters // 2 - 1]}…{n[-(letters // 2) :]}" for n in shown]
    times = Counter(shown)
    odd = {n for n in shown if times[n] > 1 or not n or not all(font.get_char_index(ord(letter)) for letter in n)}
    return [plain(f"{i}: {n}" if n in odd else n) for i, n in enumerate(shown)]
