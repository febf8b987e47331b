"""What a run reads, in one line for its log, and a line for each guess that was made about it.

Sizes, colours and bits are those of a few images spread over the set, from their headers: nothing is decoded.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from moco.data.sources import bands
from moco.data.sources.base import Source, spread_indices
from moco.data.sources.cache import CachedSource
from moco.data.sources.decode import BadImageError, opened, reading
from moco.data.sources.folders import tally
from moco.data.sources.subset import Subset
from moco.data.sources.values import bits_of

WARNING = "warning: "  # the beginning of a note on what is likely to be wrong
LOOKED_AT = 9  # images, spread over the set


class Look(NamedTuple):
    """An image's header: (width, height) in pixels, and such as "grey 16-bit"."""

    size: tuple[int, int]
    kind: str


def look(source: Source) -> list[Look]:
    """Headers of ``LOOKED_AT`` images at most, without those that cannot be read."""
    found = []
    for index in spread_indices(len(source), LOOKED_AT):
        with contextlib.suppress(BadImageError):
            found.append(_look(source, index))
    return found


def _look(source: Source, index: int) -> Look:
    if isinstance(source, CachedSource):
        return _look(source.whole, index)
    if isinstance(source, Subset):
        return _look(source.whole, int(source.rows[index]))
    data = source.read(index)
    if source.channels not in (1, 3) or (data or b"").startswith(bands.ARRAY):  # PIL reads no header of such
        stored = source.stored(index)
        height, width, *more = stored.values.shape
        return Look((width, height), f"{more[0]} channels {stored.depth}" if more else f"grey {stored.depth}")
    image = source.load(index) if data is None else reading(source.name_of(index), lambda: opened(data))
    assert isinstance(image, Image.Image)
    return Look(image.size, _kind(image))


def _kind(image: Image.Image) -> str:
    mode = image.mode
    alpha = " with alpha" * (mode[-1] in "aA" and mode != "a")
    if mode[0] == "P":
        return f"palette{alpha}"
    colour = "grey" if mode[0] in "1LIF" and mode != "LAB" else "colour"
    depth = "float" if mode == "F" else f"{bits_of(image)}-bit"
    return f"{colour} {depth}{alpha}"


def describe(train: Source, val: Source | None = None, seen: Sequence[Look] | None = None) -> list[str]:
    """The line about the images of a run, and the notes on how they were found; ``seen``: :func:`look` of ``train``.

    ``12,811 training images in 100 classes (folders), 500 held out (val/), 3 files passed over (2 .gif, 1 .txt), grey
    8-bit 512x512``
    """
    both = [train] if val is None or val.found is train.found else [train, val]
    passed = sum((Counter(source.found.passed_over) for source in both), Counter())
    parts = (_counted(train), _held_out(val), _passed_over(passed), _appearance(look(train) if seen is None else seen))
    notes = dict.fromkeys(note for source in both for note in source.found.notes)
    return [", ".join(filter(None, parts)), *map(as_line, notes)]


def as_line(note: str) -> str:
    """A note of :class:`moco.data.sources.base.Found` as a line of a log."""
    return note if note.startswith(WARNING) else f"note: {note}"


def _counted(train: Source) -> str:
    layout = f" ({train.found.layout})" if train.found.layout else ""
    what = f"{len(train):,} training image" + "s" * (len(train) != 1)
    if not train.classes:
        return f"{what} without labels{layout}"
    return f"{what} in {len(train.classes):,} class" + "es" * (len(train.classes) != 1) + layout


def _held_out(val: Source | None) -> str:
    if val is None:
        return "none held out"
    name = os.path.basename(os.path.normpath(val.name)) + "/" * os.path.isdir(val.name)
    return f"{len(val):,} held out ({name})"


def _passed_over(counts: Counter[str]) -> str:
    number = counts.total()
    return f"{number:,} file{'s' * (number != 1)} passed over ({tally(counts)})" if number else ""


def _appearance(seen: Sequence[Look]) -> str:
    kinds = Counter(found.kind for found in seen).most_common()
    widths, heights = ([found.size[axis] for found in seen] for axis in (0, 1))
    if len(kinds) > 1:
        what = " and ".join(f"{count} {kind}" for kind, count in kinds) + f" of {len(seen)} looked at"
    else:
        what = kinds[0][0] if kinds else ""
    if len({*widths}) * len({*heights}) <= 1:
        return f"{what} {widths[0]}x{heights[0]}" if seen else ""
    return f"{what} {min(widths)}..{max(widths)} x {min(heights)}..{max(heights)}" + (
        f" ({len(seen)} looked at)" if len(kinds) == 1 and len(seen) else ""
    )
