"""Line charts as SVG inside a page, in the page's colours, light and dark: charts.css has those of the series."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from moco.pictures.page import text

STYLES = ("charts.css",)  # of a page with :func:`chart`
SERIES = 9  # colours; after the last comes the first again
LEFT, RIGHT, TOP, BOTTOM = 52, 22, 24, 44  # pixels around the axes


class Axis(NamedTuple):
    """low, high: its ends. ticks: (place, words). log: in powers of two."""

    label: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where a value lies between the ends, 0 to 1."""
        low, high, value = (math.log2(x) if self.log else x for x in (self.low, self.high, value))
        return min(1.0, max(0.0, (value - low) / ((high - low) or 1)))


@dataclass(frozen=True)
class Series:
    """points: (x, y), y None where there is none. band: (x, low, high) around them. style: "" or "dashed" or "area"."""

    name: str
    colour: int
    points: Sequence[tuple[float, float | None]]
    band: Sequence[tuple[float, float, float]] = ()
    style: str = ""
    words: Sequence[str] = field(default=())  # of each point, under the pointer


def chart(
    series: Sequence[Series], x: Axis, y: Axis, *, title: str, size: tuple[int, int] = (520, 300),
    upright: Iterable[tuple[float, str]] = (), level: Iterable[tuple[float, str]] = (),
) -> str:  # fmt: skip
    """A chart as HTML: a title, a legend and an SVG.

    Args:
        title: plain text, like all words here.
        size: of the SVG in pixels; a narrower window makes it smaller.
        upright, level: dashed lines at a place of x or y, with words.
    """
    width, height = size

    def at(px: float, py: float) -> tuple[float, float]:
        across, up = width - LEFT - RIGHT, height - TOP - BOTTOM
        return LEFT + across * x.share(px), height - BOTTOM - up * y.share(py)

    parts, known = [*_axes(x, y, at, size)], [py for _, py in series[0].points if py is not None]
    ends = (known[0], known[-1]) if known else (0.0, 0.0)
    for place, words in level:
        _, line = at(x.low, place)
        parts.append(f'<line class="mark" x1="{LEFT}" x2="{width - RIGHT}" y1="{line:.1f}" y2="{line:.1f}"/>')
        first, last = ends
        right = abs(last - place) >= abs(first - place)  # where the first curve is farther away
        parts.append(_words(width - RIGHT - 2 if right else LEFT + 4, line - 4, words, "end" if right else "start"))
    for place, words in upright:
        line, _ = at(place, y.low)
        anchor = "end" if x.share(place) > 0.6 else "start"
        parts.append(f'<line class="mark" x1="{line:.1f}" x2="{line:.1f}" y1="{TOP}" y2="{height - BOTTOM}"/>')
        parts.append(_words(line + (-4 if anchor == "end" else 4), TOP + 10, words, anchor))
    for one in series:
        parts += _drawn(one, at, y.low)
    legend = "".join(
        f'<span><i class="s{one.colour % SERIES} {one.style}"></i>{text(one.name)}</span>' for one in series
    )
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{text(title)}">{"".join(parts)}</svg>'
    head = f'<h3>{text(title)}</h3><div class="keys">{legend}</div>'
    return f'<div class="chart" style="width:{width}px">{head}{svg}</div>'


def share_axis(label: str, high: float = 1.0) -> Axis:
    """0 to at least ``high``, in percent."""
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2, 0.25) if high / step <= 5.01 or step == 0.25)
    top = min(1.0, step * math.ceil(high / step - 1e-9))
    return Axis(label, 0.0, top, [(i * step, f"{100 * i * step:.3g} %") for i in range(round(top / step) + 1)])


def plain_axis(label: str, low: float, high: float, step: float) -> Axis:
    """From a multiple of ``step`` to another one."""
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Axis(label, first * step, last * step, [(i * step, f"{i * step:.3g}") for i in range(first, last + 1)])


def doubling_axis(label: str, high: float) -> Axis:
    """1 to ``high`` in powers of two, every other of many with words."""
    powers = [1 << i for i in range(int(math.log2(high)) + 1)]
    step = 1 if len(powers) < 9 else 2
    return Axis(label, 1, high, [(power, f"{power:,}") for power in powers[::step]], log=True)


def _axes(x: Axis, y: Axis, at, size: tuple[int, int]) -> Iterable[str]:
    width, height = size
    for place, words in y.ticks:
        _, line = at(x.low, place)
        yield f'<line class="rule" x1="{LEFT}" x2="{width - RIGHT}" y1="{line:.1f}" y2="{line:.1f}"/>'
        yield _words(LEFT - 6, line + 4, words, "end")
    for place, words in x.ticks:
        yield _words(at(place, y.low)[0], height - BOTTOM + 16, words, "middle")
    yield f'<line class="axis" x1="{LEFT}" x2="{width - RIGHT}" y1="{height - BOTTOM}" y2="{height - BOTTOM}"/>'
    yield _words((LEFT + width - RIGHT) / 2, height - 6, x.label, "middle")
    yield _words(2, TOP - 10, y.label, "start")


def _drawn(one: Series, at, low: float) -> Iterable[str]:
    name, known = f"s{one.colour % SERIES}", [(px, py) for px, py in one.points if py is not None]
    if one.band:
        around = [at(px, top) for px, _, top in one.band] + [at(px, bottom) for px, bottom, _ in one.band[::-1]]
        yield f'<path class="{name} band" d="M{_path(around)}Z"/>'
    if not known:
        return
    places = [at(px, py) for px, py in known]
    if one.style == "area":
        ground = [at(known[-1][0], low), at(known[0][0], low)]
        yield f'<path class="{name} band" d="M{_path([*places, *ground])}Z"/>'
    yield f'<path class="{name} line {one.style}" d="M{_path(places)}"/>'
    if one.words:
        said = [words for words, (_, py) in zip(one.words, one.points, strict=True) if py is not None]
        for (px, py), words in zip(places, said, strict=True):
            hint = f"<title>{text(words)}</title>"
            yield f'<circle class="{name} point" cx="{px:.1f}" cy="{py:.1f}" r="3">{hint}</circle>'


def _path(places: Iterable[tuple[float, float]]) -> str:
    return "L".join(f"{px:.1f} {py:.1f}" for px, py in places)


def _words(px: float, py: float, words: str, anchor: str) -> str:
    return f'<text x="{px:.1f}" y="{py:.1f}" text-anchor="{anchor}">{text(words)}</text>'
