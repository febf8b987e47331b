"""The picture of a sweep: what was selected on for every setting, and what the test says of the selected ones.

One numeric setting, such as a rate, is an axis with a line for each choice of the others; where that gives too many
lines, each setting is a row with its words.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moco import files
from moco.pictures.colours import colour_of
from moco.pictures.lettering import lettering
from moco.pictures.lettering import plain as drawn
from moco.pictures.scatter import SHAPES
from moco.sweep.commands import plain
from moco.sweep.results import Figure
from moco.sweep.spec import Spec
from moco.sweep.trial import figure

LINES = 8  # that can be told apart
WIDE = 8.0  # ratio of the largest to the smallest value from which an axis is logarithmic
Settings = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A setting in the picture: its place, what selection saw and, for a selected one, the test's figure."""

    setting: Settings
    place: float
    seen: Figure
    test: Figure | None


def draw_results(spec: Spec, chosen: list[Settings], path: str) -> None:
    """Write the picture: mean and standard deviation over seeds of the first metric of the first stage, each seed a
    dot; and the first reported metric of the selected settings as stars, with its own standard deviation."""
    with lettering():
        _draw(spec, chosen, path)


def _draw(spec: Spec, chosen: list[Settings], path: str) -> None:
    from matplotlib.figure import Figure as Picture  # not pyplot's: no screen is needed

    inner = inner_names(spec) or [name for name in spec.settings[0] if name not in spec.group_by]
    across = _axis_name(spec, inner)
    lines = _lines(spec, chosen, across, inner)
    picture = Picture(layout="constrained")
    apart = spec.select is not None and _is_loss(spec.select.metrics[0]) != _is_loss(spec.report.metrics[0])
    axes = _panels(picture, apart, across is None)
    places = [point.place for points in lines.values() for point in points]
    span = min(places), max(places)
    log = across is not None and _spread(axes, places, span)
    for i, (name, points) in enumerate(lines.items()):
        _draw_line(axes, points, _Pen(i, len(lines), name, across is None, log, span, spec))
    if across is None:
        _name_rows(axes, [point for points in lines.values() for point in points], [*spec.group_by, *inner])
    _name_axes(axes, spec, across)
    axes[1].margins(x=0.14, y=0.1)  # for the figures beside the stars
    title = _title(spec, chosen, inner)
    picture.suptitle("\n".join(title), x=0.01, ha="left", fontsize=10.5)
    around = len(title) + _explain(picture, axes, spec)
    picture.set_size_inches(8.5, 0.2 * around + max(3.8, 1 + 0.3 * len(places) * (across is None)))
    files.write_figure(picture, path, "--out")


# ----------------------------------------------------------------------------------------------------- what is drawn


def inner_names(spec: Spec) -> list[str]:
    """Settings that differ inside some group; what only goes with the group says nothing new."""

    def differs(name: str) -> bool:
        return len({(spec.group(s), plain(s[name])) for s in spec.settings}) > len(set(map(spec.group, spec.settings)))

    return [name for name in spec.settings[0] if name not in spec.group_by and differs(name)]


def _axis_name(spec: Spec, inner: list[str]) -> str | None:
    """The setting that is the axis: of the numeric ones that with most values; None for rows of words."""
    values = {name: {_number(setting[name]) for setting in spec.settings} for name in inner}
    fit = {name: found for name, found in values.items() if None not in found and len(found) > 1}
    if not fit:
        return None
    name = max(fit, key=lambda name: len(fit[name]))
    others = {(spec.group(s), *(plain(s[other]) for other in inner if other != name)) for s in spec.settings}
    return name if len(others) <= LINES else None


def _lines(spec: Spec, chosen: list[Settings], across: str | None, inner: list[str]) -> dict[str, list[Point]]:
    """The points of each line in their order; without an axis the lines are the groups, and the places are rows."""
    first, test = spec.stages[0], spec.report.metrics[0]
    names = [*spec.group_by, *(name for name in inner if across is not None and name != across)]
    order = {name: _order(spec, name) for name in spec.settings[0]}
    ordered = sorted(spec.settings, key=lambda s: [order[n](s[n]) for n in ([across] if across else inner)])
    found: dict[str, list[Point]] = {}
    for setting in sorted(ordered, key=lambda s: [order[name](s[name]) for name in names]):
        place = float(sum(map(len, found.values())) if across is None else setting[across])
        told = figure(spec, spec.report, setting, test) if spec.select and setting in chosen else None
        point = Point(setting, place, figure(spec, first, setting, first.metrics[0]), told)
        found.setdefault(_words(setting, names), []).append(point)
    return found


def _words(setting: Settings, names: list[str]) -> str:
    return ", ".join(f"{name} {plain(setting[name])}" for name in names if setting[name] is not None)


def _number(value: Any) -> float | None:
    return float(value) if type(value) in (int, float) and math.isfinite(value) else None


def _order(spec: Spec, name: str) -> Callable[[Any], float]:
    """Where a value of a setting stands: numbers by size, words as the file has them."""
    values = [setting[name] for setting in spec.settings]
    if None not in map(_number, values):
        return float
    words = list(map(plain, values))
    return lambda value: words.index(plain(value))


def _is_loss(metric: str) -> bool:
    return "loss" in metric


# ----------------------------------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class _Pen:
    """How a line is drawn: its number of so many, its name, along rows or a (logarithmic) axis."""

    number: int
    lines: int
    name: str
    rows: bool
    log: bool
    span: tuple[float, float]
    spec: Spec

    def moved(self, points: list[Point], steps: float) -> list[float]:
        """Places moved by so many hundredths of the axis, so that lines and stars do not hide each other."""
        steps += 0 if self.rows else 1.2 * (self.number - (self.lines - 1) / 2)
        if self.rows:
            return [point.place + steps / 10 for point in points]
        low, high = self.span
        if self.log:
            return [point.place * (high / low) ** (steps / 100) for point in points]
        return [point.place + (high - low) * steps / 100 for point in points]


def _panels(picture: Any, apart: bool, rows: bool) -> list[Any]:
    """The axes of the selection's figures and of the test's: one and the same unless they have different units."""
    if not apart:
        return [picture.subplots()] * 2
    return list(picture.subplots(1, 2, sharey=True) if rows else picture.subplots(2, 1, sharex=True))


def _spread(axes: list[Any], places: list[float], span: tuple[float, float]) -> bool:
    """Ticks at the values of the setting; whether the axis is logarithmic."""
    values, log = sorted(set(places)), span[0] > 0 and span[1] / span[0] >= WIDE
    for axis in dict.fromkeys(axes):
        axis.set_xscale("log" if log else "linear")
        labels = [f"{value:g}" for value in values]
        crowded = len("".join(labels)) > 60
        axis.set_xticks(values, labels, rotation=90 if crowded else 0)
        axis.set_xticks([], minor=True)
    return log


def _draw_line(axes: list[Any], points: list[Point], pen: _Pen) -> None:
    colour, shape = colour_of(pen.number), SHAPES[pen.number % len(SHAPES)]
    first = pen.spec.stages[0].metrics[0]
    seen = [point for point in points if point.seen.values]
    places, means = pen.moved(seen, 0), [point.seen.mean for point in seen]
    _bars(axes[0], pen.rows, places, means, [point.seen.std for point in seen], marker=shape, color=colour,
          linestyle="none" if pen.rows else "-", label=drawn(pen.name or f"{first}{_unit(first)}"))  # fmt: skip
    for place, point in zip(places, seen, strict=True):
        for value in point.seen.values if len(point.seen.values) > 1 else ():
            axes[0].plot(*_xy(pen.rows, place, value), ".", color=colour, alpha=0.4, markersize=5)
    told = [point for point in points if point.test is not None and point.test.values]
    for place, point in zip(pen.moved(told, 2.2), told, strict=True):
        assert point.test is not None
        _bars(axes[1], pen.rows, [place], [point.test.mean], [point.test.std], marker="*", color=colour, markersize=13,
              markeredgecolor="black", linestyle="none", label="_")  # fmt: skip
        axes[1].annotate(point.test.summary(), _xy(pen.rows, place, point.test.mean), (9, 7), fontsize=9,
                         textcoords="offset points", color="0.1",
                         bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 0.6})  # fmt: skip


def _bars(axis: Any, rows: bool, places: list[float], means: list[float], stds: list[float], **how: Any) -> None:
    bars = {"xerr" if rows else "yerr": stds if any(stds) else None}
    axis.errorbar(*_xy(rows, places, means), **bars, capsize=3, **how)


def _xy(rows: bool, place: Any, value: Any) -> tuple[Any, Any]:
    return (value, place) if rows else (place, value)


def _name_rows(axes: list[Any], points: list[Point], names: list[str]) -> None:
    labels = [textwrap.shorten(drawn(_words(point.setting, names)) or "the one setting", 70, placeholder="…")
              for point in points]  # fmt: skip
    axes[0].set_yticks([point.place for point in points], labels, fontsize=9)
    axes[0].set_ylim(len(points) - 0.5, -0.5)
    for axis in dict.fromkeys(axes):
        axis.grid(axis="y", color="0.92")


def _name_axes(axes: list[Any], spec: Spec, across: str | None) -> None:
    first, test = spec.stages[0].metrics[0], spec.report.metrics[0]
    both = f"{first}{' (selection)' * bool(spec.select)}"
    one = [f"{both} and {test} (test){_unit(first)}" if spec.select else both + _unit(first)]
    names = [both + _unit(first), f"{test} (test){_unit(test)}"] if axes[0] is not axes[1] else one
    for axis, name in zip(dict.fromkeys(axes), names, strict=True):
        (axis.set_ylabel if across else axis.set_xlabel)(drawn(name))
    if across:
        axes[-1].set_xlabel(drawn(across))


def _explain(picture: Any, axes: list[Any], spec: Spec) -> int:
    """A legend of the lines and of the signs; returns its rows."""
    from matplotlib.lines import Line2D

    handles, labels = axes[0].get_legend_handles_labels()
    if len(spec.seeds) > 1:
        handles.append(Line2D([], [], color="0.4", marker=".", linestyle="none"))
        labels.append("one seed")
    if spec.select:
        star = {"marker": "*", "markersize": 12, "markeredgecolor": "black"}
        handles.append(Line2D([], [], color="0.4", linestyle="none", **star))
        labels.append(f"test: {drawn(spec.report.metrics[0])} of a selected setting")
    columns = max(1, min(4, 100 // (8 + max(map(len, labels)))))
    picture.legend(handles, labels, loc="outside lower left", fontsize=9, ncols=columns, frameon=False)
    return -(-len(labels) // columns)


def _unit(metric: str) -> str:
    return ", %" if re.search(r"acc|knn|top\d|precision|map|ami|nmi", metric) else ""


def _title(spec: Spec, chosen: list[Settings], inner: list[str]) -> list[str]:
    """What was swept, over how many seeds, and what was selected."""
    seeds = f"mean ± standard deviation over {len(spec.seeds)} seeds" if len(spec.seeds) > 1 else "one seed"
    swept = ", ".join(inner) or "one setting"
    told = [f"{os.path.basename(spec.main)}: sweep of {swept}; {seeds}"]
    if spec.select is None:
        told.append("Nothing was selected.")
    elif chosen:
        best = {"max": "highest", "min": "lowest"}[spec.select.mode]
        by = f"Selected by the {best} {spec.select.metrics[0]}"
        each = [_words(setting, [*spec.group_by, *inner]) for setting in chosen]
        told += [f"{by}: {each[0]}"] if len(each) == 1 else [f"{by}, for each {', '.join(spec.group_by)}:", *each[:8]]
    else:
        told.append(f"Nothing is selected yet: no setting has {spec.select.metrics[0]} for every seed.")
    return [drawn(line) for text in told for line in textwrap.wrap(text, 105)[:4]]
