"""What a run asks of its images before it begins: labels where the method needs them, and views of a sensible size."""

from __future__ import annotations

import statistics

import numpy as np

from moco.data.decode import BadImageError
from moco.data.sources import Source
from moco.errors import UserError

FAR_BELOW = 4  # images this many times larger than the views lose what their classes differ in
LOOKED_AT = 9  # images, spread over the set


def class_labels(source: Source, method: str) -> np.ndarray:
    """(n,) int64 class of every image.

    Raises:
        UserError: there are none.
    """
    if source.labels is None:
        raise UserError(
            f"--method {method} needs labels and {source.name} has none: give class folders (DIR/CLASS/image) or a "
            "list with a label a line, or choose --method simclr."
        )
    return source.labels


def check_classes(source: Source, asked: int | None) -> None:
    """UserError when the user names another number of classes than the labelled ``source`` has."""
    if asked is not None and source.classes is not None and len(source.classes) != asked:
        raise UserError(f"--num-classes {asked}: {source.name} has {len(source.classes)} classes; leave the flag out.")


def size_warning(source: Source, size: int) -> str:
    """A sentence when views of ``size`` pixels are far below the images' size, else nothing; looks at a few images."""
    sides = []
    for index in np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int).tolist():
        try:
            sides.append(min(source.load(index).size))
        except BadImageError:
            continue
    side = statistics.median(sides) if sides else 0
    if side < FAR_BELOW * size:
        return ""
    return (
        f"warning: the images' short side is {side:g} px and --size {size} keeps {100 * size / side:.0f} % of it; "
        "small views of large images cost accuracy, give a larger --size unless that is meant."
    )
