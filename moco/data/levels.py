"""Which range the values of a set's images have, what becomes of them, and what a run says of it.

A few images are looked at. Their types decide what is black and white (:func:`moco.data.sources.values.range_of`), but
for float images, whose range is found here, once for the whole set: values up to 1 are shares of white, others are of
0..255. Whatever else a set's range is, the user says it by ``--levels``; where its images come out nearly black, nearly
white or clipped, a sentence says so.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence

import numpy as np

from moco.data.sources.base import Source, spread_indices
from moco.data.sources.decode import BadImageError
from moco.data.sources.values import NARROW, Kind, Levels, Looked, Ranges, Stored, for_all

LOOKED_AT = "that were looked at have"  # what only sentences of this module hold
CHECKED = 9  # images, spread over the set
SAMPLED = 1 << 16  # pixels of an image, spread over it, of which shares and quantiles are taken
RARE = 0.001  # share of an image's values that may lie anywhere: hot pixels
UNIT = 2.0  # a float image whose values end below is of 0..1, and may leave that a little
CLIPPED = 0.01  # share of the values
LOST = 0.9  # the same on one side, which nobody means who chooses levels that clip
INTEGERS = ("8-bit", "16-bit", "32-bit")


def pixel_range(source: Source, most: int = CHECKED) -> Ranges:
    """The values of ``most`` images at most, spread over the set, as their files hold them and as ``source.levels``
    makes them 0..255; images that cannot be read are left out.

    Without levels float images are taken as :func:`float_levels` has them.
    """
    looked: dict[str, list[Looked]] = {}
    sizes = []
    for index in spread_indices(len(source), most):
        with contextlib.suppress(BadImageError):
            found = source.stored(index)
            looked.setdefault(found.depth, []).append(look(found))
            sizes.append((found.values.shape[1], found.values.shape[0]))
    by_count = sorted(looked.items(), key=lambda pair: -len(pair[1]))
    return Ranges(sizes, [_kind(depth, images, source.levels) for depth, images in by_count])


def look(stored: Stored) -> Looked:
    """The extremes of one image's values, but for infinite ones, and a sample."""
    step = math.ceil(math.sqrt(stored.values.shape[0] * stored.values.shape[1] / SAMPLED))
    sample = stored.values[::step, ::step].ravel().astype(np.float64)
    low, high = float(stored.values.min()), float(stored.values.max())
    if not math.isfinite(low + high):
        finite = stored.values[np.isfinite(stored.values)]
        low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 0.0)
    usual = (low, high)
    if stored.depth != "8-bit":  # which cameras and drawings fill, with a few pixels too
        finite = sample[np.isfinite(sample)] if len(sample) else sample
        usual = tuple(np.quantile(finite, (RARE, 1 - RARE)).tolist()) if len(finite) else (0.0, 0.0)
    return Looked(low, high, usual, sample, stored.full)


def _kind(depth: str, images: Sequence[Looked], levels: Levels | None) -> Kind:
    if levels is not None and (depth == "float" or for_all(levels)):
        black, white = levels.low, levels.high
    else:
        black, white = images[0].full or (0.0, 1.0 if np.median([one.usual[1] for one in images]) <= UNIT else 255.0)
    values = np.concatenate([one.sample for one in images])
    if depth == "8-bit":  # of a set, as a drawing may be dark
        usual = [(min(one.low for one in images), max(one.high for one in images))]
    else:
        usual = [one.usual for one in images]
    half = (white - black) / 510  # rounds to black or white
    return Kind(
        depth, len(images), min(one.low for one in images), max(one.high for one in images), (black, white), usual,
        float(np.mean(values <= black + half)), float(np.mean(values >= white - half)),
        float(np.mean(values < black)), float(np.mean(values > white)),
        for_all(levels),
    )  # fmt: skip


def float_levels(ranges: Ranges) -> Levels | None:
    """How the float images of a set are taken, the images of others alone; None where there are none."""
    kind = next((kind for kind in ranges.kinds if kind.depth == "float"), None)
    return None if kind is None or kind.chosen else Levels(*kind.range, floats_only=True)


def settle_levels(source: Source, levels: Levels | None = None) -> None:
    """Give ``source`` these levels, of float images else those that they seem to have, and note what a run must say.

    Images that lie in memory are of 8 bits and are not looked at, unless levels were chosen.
    """
    source.levels = levels
    if not source.files() and levels is None:
        return
    ranges = pixel_range(source)
    source.levels = levels or float_levels(ranges)
    source.found.notes += range_notes(ranges, source.name, levels)


def drop_repeated(train: Source, val: Source) -> None:
    """Leave out the sentences on the values of ``val`` that are said of ``train`` already, whatever numbers were found:
    one advice is to be followed."""
    said = {_without_numbers(note, train.name) for note in train.found.notes if LOOKED_AT in note}
    val.found.notes = [note for note in val.found.notes if _without_numbers(note, val.name) not in said]


def _without_numbers(note: str, name: str) -> str:
    return re.sub(r"values from \S+ to \S+|\S+ %|--levels \S+ \S+", "", note.replace(name, ""))


def range_notes(ranges: Ranges, name: str, levels: Levels | None = None) -> list[str]:
    """A sentence for each kind of image whose values are guessed at or come to little.

    name: of the set. levels: that were chosen or are those of a run, None: of the images themselves.
    """
    several = len(ranges.kinds) > 1
    return [text for kind in ranges.kinds if (text := _note(kind, name, levels is None, several))]


def _note(kind: Kind, name: str, guessed: bool, several: bool) -> str:
    start = f"the {kind.depth} images of {name} {LOOKED_AT} {_values(kind)}"
    if outcome := _outcome(kind):
        return f"warning: {start}, so they come out {outcome}{_advice(kind, several)}"
    return f"{start}; --levels LOW HIGH sets another range" if kind.depth == "float" and guessed else ""


def _values(kind: Kind) -> str:
    low, high = kind.range
    found = f"values from {_number(kind.low)} to {_number(kind.high)}"
    if kind.low == kind.high:
        found = f"no other value than {_number(kind.low)}"
    if kind.depth in INTEGERS and not kind.chosen and low <= kind.low and kind.high <= high:
        return f"{found} of {_number(high)}"
    return f"{found} and are taken as {_number(low)} to {_number(high)}" + " (--levels)" * kind.chosen


def _outcome(kind: Kind) -> str:
    """What the images come to, for "they come out ..."; empty where nothing is amiss."""
    if kind.is_narrow(*kind.range):
        low, high = np.median(kind.eight_bits(*kind.range), axis=0)
        return "nearly black" if high <= NARROW else "nearly white" if low >= 255 - NARROW else "nearly one grey"
    most = max(kind.below, kind.above)
    if most >= LOST:
        return f"nearly {'white' if most == kind.above else 'black'} ({_percent(most)} of the values clipped)"
    if kind.chosen or kind.below + kind.above < CLIPPED:
        return ""
    sides = ((kind.below, "black"), (kind.above, "white"))
    return "clipped, " + " and ".join(f"{_percent(share)} of the values at {at}" for share, at in sides if share)


def _advice(kind: Kind, several: bool) -> str:
    best = best_levels(kind)
    if best is not None and best == kind.range and kind.depth == "float":
        best = (min(best[0], _outward(kind.low, -1)), max(best[1], _outward(kind.high, 1)))
    if best is None:
        return ""
    if best == kind.range or (kind.depth != "8-bit" and kind.is_narrow(*best)):
        return "; their ranges differ and no one --levels fits them: store them alike"
    give = f"--levels {flag_words(*best)}"
    return f": {give} fits them, but holds for the other images too: store them alike" if several else f": give {give}"


def best_levels(kind: Kind) -> tuple[float, float] | None:
    """Levels that fit what was looked at: of integers up to a number of bits; None where all values are one."""
    low, high = _without_hot_pixels(kind)
    if low >= high:
        return None
    full = 2.0 ** math.ceil(math.log2(high + 1)) - 1 if high > 0 else 0.0
    if kind.depth in INTEGERS:
        return (float(math.floor(low)), float(math.ceil(high))) if low < 0 or high - low < full / 4 else (0.0, full)
    if low >= 0 and (0.5 <= high <= UNIT or (255 <= full < 2 * high)):
        return 0.0, full if high > UNIT else 1.0
    return (0.0 if 0 <= low < high / 2 else _outward(low, -1)), _outward(high, 1)


def _without_hot_pixels(kind: Kind) -> tuple[float, float]:
    """The extreme values; those but for one in a thousand where the others are far off."""
    low, high = min(pair[0] for pair in kind.usual), max(pair[1] for pair in kind.usual)
    span = high - low
    return (kind.low if kind.low >= low - span else low), (kind.high if kind.high <= high + span else high)


def _outward(value: float, way: int) -> float:
    """To two digits, not towards the middle."""
    unit = 10.0 ** (math.floor(math.log10(abs(value))) - 1) if value else 1.0
    return float(f"{math.ceil(way * value / unit - 1e-6) * way * unit:.6g}")


def flag_words(low: float, high: float) -> str:
    """As one types them."""
    return " ".join(str(int(x)) if x == int(x) else f"{x:.6g}" for x in (low, high))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.4g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
