"""A data set's check as lines for people; everything of it is in the JSON too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from moco.data.summary import WARNING, as_line

SHOWN = 5  # of a long list: classes, files


def lines(report: dict[str, Any]) -> list[str]:
    """The lines of a report of :func:`moco.data.check.whole.check`."""
    found = [line for name, split in report["splits"].items() for line in _split(name, split)]
    if report["splits"]:
        found += ["what each mode would take:", *_modes(report["modes"])]
    if report["shared"]:
        found += [f"held-out images that are training images too: {len(report['shared']):,}"]
        found += _some([f"{one['val']} = {one['train']}" for one in report["shared"]])
    found += [f"a first run: --auto --stats auto, which take {flags}" for flags in _flags(report["suggested"])]
    found += [f"warning: {warning}" for warning in report["warnings"]]
    return found


def _split(name: str, split: dict[str, Any]) -> Iterator[str]:
    layout = f" ({split['layout']})" if split["layout"] else ""
    classes = split["classes"]
    labelled = f" in {classes['count']:,} classes" if classes else " without labels"
    yield f"{name}: {split['images']:,} images{labelled}{layout}, {split['name']}"
    yield from (f"  {as_line(note)}" for note in split["notes"] if not note.startswith(WARNING))  # see the end
    if split["passed_over"]:
        passed = ", ".join(f"{count:,} {kind}" for kind, count in split["passed_over"].items())
        yield f"  files passed over: {passed}"
    if classes:
        yield from _classes(classes)
    if split["sizes"]:
        yield from _sizes(split["sizes"])
        yield "  formats: " + ", ".join(f"{count:,} {kind}" for kind, count in split["formats"].items())
        yield from (_mode(row) for row in split["modes"])
        yield f"  mean {_numbers(split['mean'])}, std {_numbers(split['std'])} (in 0..1, a number a channel)"
    if split["unreadable"]:
        yield f"  unreadable: {len(split['unreadable']):,}"
        yield from _some([f"{one['image']} ({one['reason']})" for one in split["unreadable"]])
    if split["duplicates"]:
        yield f"  groups of equal files: {len(split['duplicates']):,}"
        yield from _some([_group(group["images"]) for group in split["duplicates"]])


def _classes(classes: dict[str, Any]) -> Iterator[str]:
    yield (
        f"  images of a class: {classes['min']:,} to {classes['max']:,}, median {classes['median']:,g}"
        + f", {classes['empty']:,} without any" * bool(classes["empty"])
    )
    ranked = sorted(classes["images"].items(), key=lambda pair: -pair[1])
    if len(ranked) <= 2 * SHOWN:
        yield f"  classes: {_counts(ranked)}"
    else:
        yield f"  largest classes: {_counts(ranked[:SHOWN])}"
        yield f"  smallest classes: {_counts(ranked[-SHOWN:])}"


def _counts(pairs: list[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in pairs)


def _sizes(sizes: dict[str, Any]) -> Iterator[str]:
    sides = [f"{side} {low:g} to {high:g}, median {median:g}" for side, (low, median, high) in _sides(sizes)]
    yield f"  {', '.join(sides)} pixels"
    frequent = [f"{one['width']}x{one['height']} ({one['images']:,})" for one in sizes["frequent"][:SHOWN]]
    yield f"  most frequent of {sizes['distinct']:,} sizes: {', '.join(frequent)}"


def _sides(sizes: dict[str, Any]) -> list[tuple[str, list[float]]]:
    return [(side, sizes[side]) for side in ("width", "height")]


def _mode(row: dict[str, Any]) -> str:
    used = f" ({row['bits_used']} bits)" * bool(row["bits_used"])
    values = f"values {row['low']:,g} to {row['high']:,g}{used}"
    return f"  {row['images']:,} of mode {row['mode']}, {row['bits']} bits: {values}"


def _modes(modes: dict[str, dict[str, Any]]) -> Iterator[str]:
    for name, mode in modes.items():
        if "no" in mode:
            yield f"  {name}: nothing, as {mode['no']}"
        else:
            yield f"  {name}: {_taken(name, mode)}"


def _taken(name: str, mode: dict[str, Any]) -> str:
    if name == "probe":
        pair = f"{mode['train']:,} training and {mode['val']:,} held-out images in {mode['classes']:,} classes"
        return f"{pair} (k-NN, linear probe, fine-tuning)"
    if name == "supcon":
        return f"{mode['images']:,} images in {mode['classes']:,} classes"
    return f"{mode['images']:,} images" + (" with labels" if mode["labelled"] else " without labels")


def _flags(suggested: dict[str, Any] | None) -> list[str]:
    if suggested is None:
        return []
    words = []
    for name, value in suggested.items():
        values = value if isinstance(value, list) else [value]
        shown = " ".join(one if isinstance(one, str) else f"{one:g}" for one in values)
        words.append(f"--{name.replace('_', '-')} {shown}")
    return [" ".join(words)] * bool(words)


def _group(names: list[str]) -> str:
    return " = ".join(names[:SHOWN]) + f" and {len(names) - SHOWN:,} more" * (len(names) > SHOWN)


def _numbers(values: list[float] | None) -> str:
    return " ".join(f"{value:.4f}" for value in values or [])


def _some(items: list[str]) -> list[str]:
    more = [f"    and {len(items) - SHOWN:,} more (--json lists all)"] * (len(items) > SHOWN)
    return [*(f"    {item}" for item in items[:SHOWN]), *more]
