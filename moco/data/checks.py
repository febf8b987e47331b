"""What a run asks of its images before it begins: labels where the method needs them, and views of a sensible size."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from moco.data.sources.base import Source, renumber, without_labels
from moco.data.summary import Look, look
from moco.errors import UserError
from moco.files import run_of

FAR_BELOW = 4  # images this many times larger than the views lose what their classes differ in
CHECKED = 9  # images, spread over the set
NAMED = 5  # classes in a message


def class_labels(source: Source, method: str) -> np.ndarray:
    """(n,) int64 class of every image.

    Raises:
        UserError: there are none.
    """
    if source.labels is None:
        raise UserError(
            f"--method {method} needs labels and {without_labels(source)}: give class folders (DIR/CLASS/image) or a "
            "list with a label on each line, or choose --method simclr."
        )
    return source.labels


def check_classes(source: Source, asked: int | None) -> None:
    """UserError when the user names another number of classes than the labelled ``source`` has."""
    if asked is not None and source.classes is not None and len(source.classes) != asked:
        raise UserError(f"--num-classes {asked}: {source.name} has {len(source.classes)} classes; leave the flag out.")


def number_as_in(state: dict, path: str, training: bool, *sources: Source | None) -> str:
    """Give the labels of ``sources``, in place, the numbers that they have for a checkpoint's classifier, by name.

    Args:
        state: the checkpoint; one whose ``run`` names no classes is taken to be of these, in this order.
        path: of the file, for messages.
        training: it is trained further, for which no class of it may be missing.
        sources: labelled or not, None for none; those with labels have the same classes.

    Returns what a log must say; empty where names and order are the same, and without a ``state``.

    Raises:
        UserError: another class, or with ``training`` a missing one.
    """
    known = run_of(state).get("classes")
    named = [source for source in sources if source is not None and source.classes]
    if not state or not named:
        return ""
    if not known:
        return "the names of its classes are not in the file, they are taken to be these in this order"
    given = named[0].classes or []
    if given == known:
        return ""
    for source in named:
        _take_numbers(source, known, path)
    if training and (missing := [name for name in known if name not in given]):
        raise UserError(
            f"{named[0].name} lacks the class {missing[0]} of {path}: training goes on with the same classes only."
        )
    return f"classes numbered as in that file, by name ({len(given)} of its {len(known)})"


def _take_numbers(source: Source, known: list[str], path: str) -> None:
    unknown = renumber(source, known)
    if unknown:
        names = ", ".join(known[:NAMED]) + " and more" * (len(known) > NAMED)
        raise UserError(
            f"{source.name} has the class {unknown[0]}, which the classifier in {path} was not trained on (it knows "
            f"{names}): give images of its classes, or of some of them."
        )


def short_side(source: Source, seen: Sequence[Look] | None = None) -> float:
    """The median of the images' short sides in pixels, by a few of them; 0 where none of these can be read.

    seen: what :func:`moco.data.summary.look` has found, where it has been asked already.
    """
    return statistics.median([min(found.size) for found in (look(source) if seen is None else seen)] or [0])


def size_warning(source: Source, size: int, side: float | None = None) -> str:
    """A sentence when views of ``size`` pixels are far below the images' size, else nothing; looks at a few images.
    ``side``: what :func:`short_side` found of them."""
    side = short_side(source) if side is None else side
    if side < FAR_BELOW * size:
        return ""
    return (
        f"warning: the images' short side is {side:g} px and --size {size} keeps {100 * size / side:.0f} % of it; "
        "small views of large images cost accuracy, give a larger --size unless that is meant."
    )
