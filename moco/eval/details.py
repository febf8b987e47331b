"""Accuracy per class and the confusion matrix, on request.

Legend: n images, C classes.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moco import distributed, files
from moco.data import Source
from moco.eval.classifier import Score
from moco.pictures.confusion import count_confusions, write_confusion


class Counts(NamedTuple):
    """matrix: (C, C) int, rows are true classes. among5: (C,) images of each class whose label was among the first
    five; None where that was not measured."""

    matrix: np.ndarray
    among5: np.ndarray | None = None


def counts_of(score: Score, classes: int) -> Counts:
    """Of a score with predictions."""
    assert score.predictions is not None, "validated with predictions"
    labels, predicted, hit5 = score.predictions.numpy().T
    among5 = None if score.acc5 is None else np.bincount(labels, weights=hit5, minlength=classes)
    return Counts(count_confusions(labels, predicted, classes), among5)


@dataclass(frozen=True)
class Details:
    """What is asked for; false for nothing.

    Args:
        classes: C names, by label.
        per_class: path of the table of classes.
        confusion: folder of confusion.csv and confusion.png.
        say: takes a line that says where it was written.
    """

    classes: list[str]
    per_class: str | None
    confusion: str | None
    say: Callable[[str], None]

    @classmethod
    def of(cls, args: Namespace, images: Source, say: Callable[[str], None]) -> Details:
        """By the flags, for classes of these images."""
        return cls(images.classes or [], args.per_class, args.confusion and args.save_dir, say)

    def __bool__(self) -> bool:
        return bool(self.per_class or self.confusion)

    def write(self, counts: Counts, what: str, name: str = "confusion") -> None:
        """Write it in the main process.

        Args:
            what: the classifier, and the images.

        Raises:
            UserError: a path cannot be written.
        """
        if not distributed.is_main():
            return
        self._say_empty(counts)
        if self.per_class:
            files.write_csv(self.per_class, class_rows(*counts, self.classes))
            self.say(f"each class, {what}: {self.per_class}")
        if self.confusion:
            path = os.path.join(self.confusion, name)
            self.say(f"confusion, {what}: {write_confusion(counts.matrix, self.classes, path, what)}")

    def _say_empty(self, counts: Counts) -> None:
        """Classes of which nothing is known; no accuracy of theirs is in any mean."""
        empty = [name for name, images in zip(self.classes, counts.matrix.sum(1), strict=True) if not images]
        if empty:
            more = f" and {len(empty) - 1} more" if len(empty) > 1 else ""
            self.say(f"warning: no image of the class {empty[0]}{more} was counted: they have no accuracy, and no part "
                     "in that of all images")  # fmt: skip


def class_rows(matrix: np.ndarray, among5: np.ndarray | None, classes: list[str]) -> list[list]:
    """A table with a header and a row for each class, the percentages empty where there is no image of it.

    Args:
        matrix: (C, C) int counts, rows are true classes.
        among5: (C,) images of each class whose label was among the first five; None leaves the percentage empty.
    """
    table: list[list] = [["class", "images", "top-1", "top-5", "most confused with"]]
    for label, name in enumerate(classes):
        row = matrix[label]
        images, wrong = int(row.sum()), np.where(np.arange(len(row)) == label, 0, row)
        mistaken = classes[int(wrong.argmax())] if wrong.any() else ""
        hit = (row[label], None if among5 is None else among5[label])
        shares = [f"{100 * hits / images:.3f}" if images and hits is not None else "" for hits in hit]
        table.append([name, images, *shares, mistaken])
    return table
