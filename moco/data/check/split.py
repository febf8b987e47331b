"""The images of one split added up.

Legend: n images, m of them readable, C channels.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np

from moco.data import pixel_statistics
from moco.data.check.look import Looked
from moco.data.sources.base import Source

FREQUENT = 10  # sizes that are listed


def split_report(source: Source, looked: list[Looked]) -> dict[str, Any]:
    """What a split holds, as plain values; the keys are those of docs/own_data.md."""
    whole = [(index, one) for index, one in enumerate(looked) if not one.bad]
    mean, std = mean_and_std(one for _, one in whole)
    return {
        "name": source.name,
        "layout": source.found.layout,
        "notes": list(source.found.notes),
        "passed_over": dict(source.found.passed_over),
        "images": len(source),
        "labelled": source.labels is not None,
        "classes": _classes(source),
        "sizes": _sizes([(one.width, one.height) for _, one in whole]),
        "formats": dict(Counter(one.kind or "memory" for _, one in whole).most_common()),
        "modes": _modes(one for _, one in whole),
        "unreadable": [
            {"image": source.name_of(index), "reason": one.bad} for index, one in enumerate(looked) if one.bad
        ],
        "duplicates": _duplicates(source, whole),
        "mean": mean,
        "std": std,
    }


def _classes(source: Source) -> dict[str, Any] | None:
    """Counts of the images of each class; None without labels."""
    if source.labels is None or source.classes is None:
        return None
    counts = np.bincount(source.labels, minlength=len(source.classes)).tolist()
    named = dict(zip(source.classes, counts, strict=False))
    return {
        "count": len(counts),
        "empty": counts.count(0),
        "min": min(counts),
        "median": statistics.median(counts),
        "max": max(counts),
        "images": named,
    }


def _sizes(sizes: list[tuple[int, int]]) -> dict[str, Any] | None:
    """[least, median, largest] sides in pixels, and the most frequent sizes; None without a readable image."""
    if not sizes:
        return None
    sides = {"width": [w for w, _ in sizes], "height": [h for _, h in sizes], "short_side": [min(s) for s in sizes]}
    found: dict[str, Any] = {name: [min(of), statistics.median(of), max(of)] for name, of in sides.items()}
    common = Counter(sizes).most_common(FREQUENT)
    found["distinct"] = len(set(sizes))
    found["frequent"] = [{"width": w, "height": h, "images": count} for (w, h), count in common]
    return found


def _modes(looked: Iterable[Looked]) -> list[dict[str, Any]]:
    """For each mode and depth of the files how many images have it and the range of their values."""
    kinds: dict[tuple[str, int], list[Looked]] = defaultdict(list)
    for one in looked:
        kinds[one.mode, one.bits].append(one)
    rows = []
    for (mode, bits), some in sorted(kinds.items(), key=lambda pair: -len(pair[1])):
        low, high = min(one.low for one in some), max(one.high for one in some)
        used = int(high).bit_length() if bits > 8 and isinstance(high, int) and low >= 0 else None
        rows.append({"mode": mode, "bits": bits, "bits_used": used, "images": len(some), "low": low, "high": high})
    return rows


def _duplicates(source: Source, whole: list[tuple[int, Looked]]) -> list[dict[str, Any]]:
    """Groups of images of equal content, and whether their labels differ."""
    groups: dict[bytes, list[int]] = defaultdict(list)
    for index, one in whole:
        groups[one.digest].append(index)
    labels = source.labels
    return [
        {
            "images": [source.name_of(index) for index in group],
            "labels_differ": labels is not None and len({int(labels[index]) for index in group}) > 1,
        }
        for group in groups.values()
        if len(group) > 1
    ]


def mean_and_std(looked: Iterable[Looked]) -> tuple[list[float] | None, list[float] | None]:
    """Mean and standard deviation of each channel over all pixels of all images, in 0..1 as --mean and --std take them;
    (None, None) without an image. The sums are whole numbers, so the order of the images changes nothing."""
    rows = [(one.sums, one.squares, one.width * one.height) for one in looked]
    if not rows:
        return None, None
    sums, squares, pixels = zip(*rows, strict=True)
    return pixel_statistics.mean_and_std(_added(sums), _added(squares), sum(pixels))


def _added(rows: Iterable[tuple[int, ...]]) -> list[int]:
    """A sum a channel, in whole numbers of any length."""
    return [sum(column) for column in zip(*rows, strict=True)]


def shared_images(train: Source, train_looked: list[Looked], val: Source, val_looked: list[Looked]) -> list[dict]:
    """Images of the held-out split whose content is in the training split too: {"val": name, "train": name}."""
    first: dict[bytes, int] = {}
    for index, one in enumerate(train_looked):
        if not one.bad:
            first.setdefault(one.digest, index)
    return [
        {"val": val.name_of(index), "train": train.name_of(first[one.digest])}
        for index, one in enumerate(val_looked)
        if not one.bad and one.digest in first
    ]
