"""negatives.png: the same as the page in one picture, for a talk or a paper."""

from __future__ import annotations

from typing import Any

import numpy as np

from moco import files
from moco.errors import printable
from moco.eval.mined.curves import (
    FALSE,
    OTHER,
    POSITIVE,
    at_hard,
    colour_of_kind,
    counts_false,
    developments,
    histogram_points,
    lowest,
    mass_parts,
    percent,
    title_of,
)
from moco.eval.mined.images import Gallery
from moco.pictures.colours import MARKS
from moco.pictures.lettering import lettering

QUERIES, ROWS = 4, 10  # of the picture
COLOURS = (
    "#d55e00",
    "#0969da",
    "#1a7f37",
    "#8250df",
    "#9a6700",
    "#bf3989",
    "#0e7c86",
    "#8a4b32",
    "#6e7781",
)  # as charts.css
PALE = "#5b6270"
SIDE, LINE, GAP = 1.0, 0.17, 0.14  # inches of an image, of a line of text, and between


def draw(result: dict[str, Any], gallery: Gallery, path: str) -> None:
    """Write the picture."""
    with lettering():
        _draw(result, gallery, path)


def _draw(result: dict[str, Any], gallery: Gallery, path: str) -> None:
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    shown = result["shown"][:QUERIES]
    width = (2 + ROWS) * (SIDE + GAP) + 0.7
    strips = len(shown) * (SIDE + 2 * LINE + 2 * GAP)
    mixed, curves = 1.75 if result["kinds"] else 0.0, 3.3
    developed = len(result["checkpoints"]) > 1
    height = 0.75 + strips + mixed + curves * (1 + developed)
    figure = Figure(figsize=(width, height), facecolor="white")
    sheet = Sheet(figure, width, height)
    sheet.words(0.2, 0.3, title_of(result), 13)
    _key(sheet, result)
    top = 0.75
    for query in shown:
        _strip(sheet, query, gallery, top)
        top += SIDE + 2 * LINE + 2 * GAP
    if result["kinds"]:
        _mixed(sheet, shown[0], gallery, top + 0.1)
        top += mixed
    _curves(sheet, result, top + 0.35, curves - 0.95)
    if developed:
        _developed(sheet, result, top + curves + 0.35, curves - 0.95)
    files.write_figure(figure, path, "--out")


class Sheet:
    """A figure that is drawn on in inches from its upper left corner."""

    def __init__(self, figure: Any, width: float, height: float):
        self.figure, self.width, self.height = figure, width, height

    def words(
        self, x: float, y: float, words: str, size: float = 8.0, colour: str = "#1d2026", across: str = "left"
    ) -> None:
        """A line whose lower edge is at ``y``."""
        self.figure.text(x / self.width, 1 - y / self.height, printable(words), size=size, color=colour, ha=across,
                         va="bottom", parse_math=False)  # fmt: skip

    def axes(self, x: float, y: float, wide: float, high: float) -> Any:
        """Axes whose upper left corner is at (x, y)."""
        return self.figure.add_axes(
            (x / self.width, 1 - (y + high) / self.height, wide / self.width, high / self.height)
        )

    def image(self, image: Any, x: float, y: float, side: float, mark: str = "") -> None:
        """An image in a square with its frame."""
        axis = self.axes(x, y, side, side)
        pixels = np.asarray(image.convert("RGB"))
        axis.imshow(pixels, interpolation="nearest" if max(image.size) < 100 else "antialiased")
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=MARKS[mark].colour if mark else "#d5d9e0", linewidth=2.4 if mark else 0.8,
                      linestyle="-" if mark != "false" else (0, (2.5, 1.2)))  # fmt: skip
        if mark:
            box = {"facecolor": MARKS[mark].colour, "edgecolor": "none", "pad": 1.5}
            axis.text(0.97, 0.03, MARKS[mark].sign, transform=axis.transAxes, color="white", ha="right", va="bottom",
                      size=8, weight="bold", bbox=box)  # fmt: skip


def _key(sheet: Sheet, result: dict[str, Any]) -> None:
    x = 0.2
    marks = ["query", "positive", *(["false"] if counts_false(result) else [])]
    for mark in marks:
        words = f"{MARKS[mark].sign}  {MARKS[mark].meaning}"
        sheet.words(x, 0.56, words, 8.5, MARKS[mark].colour)
        x += 0.5 + 0.066 * len(words)
    sheet.words(
        x, 0.56, f"s: cosine similarity with the query;  w: share of the softmax at T = {result['T']:g}", 8.5, PALE
    )


def _strip(sheet: Sheet, query: dict[str, Any], gallery: Gallery, top: float) -> None:
    """A query, its key and its hardest rows."""
    step, positive = SIDE + GAP, query["positive"]
    tiles: list[tuple[Any, str, str, str]] = [
        (gallery.query(query["id"]), "query", "query " + query["class"], ""),
        (
            gallery.key(query["id"]),
            "positive",
            f"s {positive['similarity']:.2f}",
            f"w {100 * positive['weight']:.2g} %",
        ),
    ]
    tiles += [
        (gallery.row(row["row"]), "false" * row["same_class"], f"#{row['rank']} {row['class']}",
         f"s {row['similarity']:.2f}  w {100 * row['weight']:.2g} %")
        for row in query["hardest"][:ROWS]
    ]  # fmt: skip
    for i, (image, mark, first, second) in enumerate(tiles):
        x = 0.2 + i * step + 0.2 * (i > 1)
        sheet.image(image, x, top, SIDE, mark)
        for line, words in enumerate((first, second), 1):
            short = words if len(words) < 19 else words[:17] + "\N{HORIZONTAL ELLIPSIS}"
            sheet.words(x, top + SIDE + 0.04 + line * LINE, short, 7.5, "#1d2026" if line == 1 else PALE)


def _mixed(sheet: Sheet, query: dict[str, Any], gallery: Gallery, top: float) -> None:
    """The median negative of each kind of the first query: what it is made from."""
    examples = [example for example in query["synthetic"] if example["which"] == "median"]
    said = "Synthetic negatives of the first query, the median one of each kind: weights, "
    sheet.words(0.2, top + 0.12, said + "similarity with the query (that of its rows)", 8.5, PALE)
    wide = (sheet.width - 0.4) / max(1, len(examples))
    for i, example in enumerate(examples):
        x, small = 0.2 + i * wide, 0.62
        sheet.words(x, top + 0.42, example["kind"], 9, COLOURS[colour_of_kind(example["kind"])])
        at = x
        for number, part in enumerate(example["parts"]):
            sign = "\N{MINUS SIGN}" if part["weight"] < 0 else "+" if number else ""
            sheet.words(at, top + 0.86, f"{sign}{abs(part['weight']):.2f}\N{MULTIPLICATION SIGN}", 8)
            at += 0.14 + 0.066 * len(f"{sign}{abs(part['weight']):.2f}")
            if part["of"] in ("row", "query"):
                image = gallery.row(part["row"]) if part["of"] == "row" else gallery.query(query["id"])
                sheet.image(
                    image, at, top + 0.48, small, "query" if part["of"] == "query" else "false" * part["same_class"]
                )
                at += small + 0.07
            else:
                sheet.words(
                    at + 0.03, top + 0.86, "\N{GREEK SMALL LETTER EPSILON}" if part["of"] == "noise" else "sgn q", 9
                )
        parents = ", ".join(f"{part['similarity']:.2f}" for part in example["parts"] if part["of"] == "row")
        sheet.words(x, top + 1.3, f"s {example['similarity']:.2f} ({parents})", 8)


# ------------------------------------------------------------------------------------------------- the curves


def _curves(sheet: Sheet, result: dict[str, Any], top: float, high: float) -> None:
    panels = [*([_false] if counts_false(result) else []), _similarity, *([_kinds] if result["kinds"] else []), _mass]
    names = [1.15 if panel in (_kinds, _mass) else 0.45 for panel in panels]  # inches left of the axes
    wide = (sheet.width - 0.4 - sum(names)) / len(panels)
    x = 0.2
    for panel, name in zip(panels, names, strict=True):
        axis = sheet.axes(x + name, top, wide - 0.2, high)
        x += name + wide
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        title = panel(axis, result)
        axis.text(0, 1.05, title, transform=axis.transAxes, size=9.5)
        axis.xaxis.label.set_size(8.5)


def _ranks(axis: Any, result: dict[str, Any]) -> None:
    axis.set_xscale("log", base=2)
    axis.set(xlim=(0.93, result["K"]), xlabel="rank of the queue row, 1 is the hardest")
    powers = [1 << i for i in range(0, result["K"].bit_length(), 2)]
    axis.set_xticks(powers, [f"{power:,}" for power in powers])
    axis.axvline(result["hard"], color=PALE, linestyle=":", linewidth=1.2)
    axis.text(
        result["hard"],
        0.99,
        f" H = {result['hard']:,}",
        transform=axis.get_xaxis_transform(),
        size=8,
        color=PALE,
        va="top",
    )


def _false(axis: Any, result: dict[str, Any]) -> str:
    rows = [row for row in result["by_rank"] if row["false"] is not None]
    x = [(row["first"] * row["last"]) ** 0.5 for row in rows]
    share, error = (np.array([row[name] or 0.0 for row in rows]) for name in ("false", "error"))
    axis.fill_between(x, share - 1.96 * error, share + 1.96 * error, color=COLOURS[FALSE], alpha=0.2, linewidth=0)
    axis.plot(x, share, color=COLOURS[FALSE], linewidth=2)
    axis.axhline(result["base_rate"], color=COLOURS[OTHER], linestyle="--", linewidth=1.2)
    axis.text(1, result["base_rate"], f"chance {percent(result['base_rate'])}", size=8, color=PALE, va="bottom")
    at = at_hard(result)
    axis.set_ylim(0, None)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _ranks(axis, result)
    return f"False negatives: {percent(at['false'])} of H = {at['hard']:,}"


def _similarity(axis: Any, result: dict[str, Any]) -> str:
    rows = [row for row in result["by_rank"] if row["similarity"]["quantiles"]]
    x, mean = [row["first"] for row in rows], [row["similarity"]["mean"] for row in rows]
    low, high = ([row["similarity"]["quantiles"][at] for row in rows] for at in (0, -1))
    axis.fill_between(x, low, high, color=COLOURS[OTHER], alpha=0.2, linewidth=0)
    axis.plot(x, mean, color=COLOURS[OTHER], linewidth=2)
    key = result["positive"]["mean"]
    axis.axhline(key, color=COLOURS[POSITIVE], linestyle="--", linewidth=1.2)
    axis.text(result["K"], key, f"positive {key:.2f}", size=8, color=COLOURS[POSITIVE], va="bottom", ha="right")
    _ranks(axis, result)
    return "Similarity with the query, 5 to 95 %"


def _kinds(axis: Any, result: dict[str, Any]) -> str:
    """Synthetic negatives over one another, and dashed the rows that they are made from."""
    kinds = list(result["kinds"])[::-1]
    for level, kind in enumerate(kinds):
        row = result["kinds"][kind]
        made, parents = (histogram_points(row[name]) for name in ("histogram", "parents_histogram"))
        top = max(y for _, y in made + parents) / 0.85
        colour = COLOURS[colour_of_kind(kind)]
        x, y = np.array(made).T
        axis.fill_between(x, level, level + y / top, color=colour, alpha=0.4, linewidth=0)
        axis.plot(x, level + y / top, color=colour, linewidth=1)
        x, y = np.array(parents).T
        axis.plot(x, level + y / top, color=COLOURS[OTHER], linewidth=1, linestyle=(0, (3, 2)))
    axis.set_yticks(range(len(kinds)), kinds)
    axis.set(xlabel="similarity with the query", xlim=(lowest(result) - 0.1, 1), ylim=(0, len(kinds)))
    return "Synthetic negatives, dashed: their rows"


def _mass(axis: Any, result: dict[str, Any]) -> str:
    parts = mass_parts(result)[::-1]
    for level, (_, colour, share) in enumerate(parts):
        axis.barh(level, share, color=COLOURS[colour], height=0.7)
        axis.text(share, level, f" {percent(share)}", size=8, va="center")
    names = [name.removesuffix(" in the queue") for name, _, _ in parts]
    axis.set_yticks(range(len(parts)), names)
    axis.set_xlim(0, 1.25 * max(share for *_, share in parts))
    axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return f"Share of the softmax at T = {result['T']:g}"


def _developed(sheet: Sheet, result: dict[str, Any], top: float, high: float) -> None:
    """A row of panels over the checkpoints."""
    panels = developments(result)
    wide = (sheet.width - 0.4) / len(panels)
    for i, (title, kind, curves) in enumerate(panels):
        axis = sheet.axes(0.65 + i * wide, top, wide - 0.65, high)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        for one in curves:
            x, y = zip(*((at, value) for at, value in one.points if value is not None), strict=True)
            axis.plot(
                x,
                y,
                COLOURS[one.colour],
                label=one.name,
                linestyle="--" if one.style else "-",
                marker="o",
                markersize=3,
            )
        low, high = (0.0 if kind == "share" else axis.get_ylim()[0]), axis.get_ylim()[1]
        ticks = [tick for tick in axis.get_yticks() if low <= tick <= min(high, 1.0)]
        axis.set_yticks(ticks, [f"{100 * tick:.0f} %" if kind == "share" else f"{tick:.1f}" for tick in ticks])
        axis.set_ylim(low, high + 0.1 * (len(curves) + 0.5) * (high - low))  # room for the legend
        if result["start_epoch"]:
            axis.axvline(result["start_epoch"], color=PALE, linestyle=":", linewidth=1.2)
        axis.set_xlabel("finished epochs" + "; dotted: synthetic negatives begin" * bool(result["start_epoch"]), size=8)
        axis.text(0, 1.05, title, transform=axis.transAxes, size=9.5)
        axis.legend(fontsize=7, frameon=False, loc="upper left", borderaxespad=0)
