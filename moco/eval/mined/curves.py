"""The part of the page and picture of :mod:`moco.eval.mined.command` on all queries: curves, tables and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.eval.mined.measure import BINS
from moco.pictures import charts
from moco.pictures.charts import Axis, Series, chart
from moco.pictures.page import text
from moco.weights.card import short

FALSE, POSITIVE, OTHER = 0, 1, 8  # colours of the series
_OF_KINDS = {
    "interpolation": 2, "extrapolation": 3, "extrapolation-paper": 3, "mixup": 4, "noise": 5, "perturbation": 6,
    "adversarial": 7,
}  # fmt: skip


def colour_of_kind(kind: str) -> int:
    """Of the series."""
    return _OF_KINDS.get(kind, OTHER)


def title_of(result: dict[str, Any]) -> str:
    """Method, images and length of the run."""
    return f"Hard negatives: {result['method'] or 'a queue'} on {short(result['images'])}, {epochs(result['epoch'])}"


def epochs(count: int) -> str:
    """The number in words."""
    return f"{count} epoch{'s' * (count != 1)}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share of 1 as text; a dash for none."""
    return "–" if share is None else f"{100 * share:.{digits}f} %"


def counts_false(result: dict[str, Any]) -> bool:
    """Whether there are labels, and rows of the query's class are negatives."""
    return result["base_rate"] is not None and not result["supervised"]


def at_hard(result: dict[str, Any]) -> dict[str, Any]:
    """The row of ``by_hard`` for the run's own H."""
    return next(row for row in result["by_hard"] if row["hard"] == result["hard"])


# ------------------------------------------------------------------------------------------ all queries


def html(result: dict[str, Any]) -> str:
    """The page's part on all queries."""
    parts = [
        f"<h2>All {result['queries']:,} queries of the sample</h2>",
        f'<div class="charts">{_curves(result)}</div>',
    ]
    parts += [_hard_table(result), _kinds(result), _mass(result)]
    if len(result["checkpoints"]) > 1:
        parts += ["<h2>Over the checkpoints of the run</h2>", _over_checkpoints(result)]
    return "\n".join(parts)


def _curves(result: dict[str, Any]) -> str:
    rows, hard = result["by_rank"], result["hard"]
    ranks = charts.doubling_axis("rank of the queue row, 1 is the hardest", result["K"])
    x = [(row["first"] * row["last"]) ** 0.5 for row in rows]
    span = [f"rank {row['first']:,}" + f" to {row['last']:,}" * (row["last"] > row["first"]) for row in rows]
    H = [(hard, f"H = {hard:,}")]
    parts = []
    if counts_false(result):
        base, known = (
            result["base_rate"],
            [(at, row) for at, row in zip(x, rows, strict=True) if row["error"] is not None],
        )
        band = [(at, row["false"] - 1.96 * row["error"], row["false"] + 1.96 * row["error"]) for at, row in known]
        words = [f"{where}: {percent(row['false'])}" for where, row in zip(span, rows, strict=True)]
        points = [(at, row["false"]) for at, row in zip(x, rows, strict=True)]
        name = "of the query's class, with 95 % interval over the queries"
        y = charts.share_axis("share", min(1.0, 1.1 * max(row["false"] or 0 for row in rows)))
        level = [(base, f"chance: {percent(base)} of all rows")]
        curve = Series(name, FALSE, points, band, words=words)
        drawn = chart([curve], ranks, y, title="False negatives by rank", upright=H, level=level)
        parts.append(_with(drawn, false_words(result)))
    first = [row["first"] for row in rows]
    known = [(at, row["similarity"]) for at, row in zip(first, rows, strict=True) if row["similarity"]["quantiles"]]
    series = Series("queue row, mean and 5 to 95 % of the queries", OTHER, [(at, s["mean"]) for at, s in known],
                    [(at, s["quantiles"][0], s["quantiles"][-1]) for at, s in known],
                    words=[f"rank {at:,}: {s['mean']:.3f}" for at, s in known])  # fmt: skip
    y = charts.plain_axis("similarity", min(0.0, *(s["quantiles"][0] for _, s in known)), 1, 0.25)
    key = result["positive"]["mean"]
    drawn = chart([series], ranks, y, title="Similarity by rank", upright=H, level=[(key, f"positive: {key:.2f}")])
    parts.append(_with(drawn, similarity_words(result)))
    return "".join(parts)


def _with(drawn: str, words: str) -> str:
    return f'<div class="said">{drawn}<p>{text(words)}</p></div>'


def false_words(result: dict[str, Any]) -> str:
    """What the curve of false negatives says."""
    base, first = result["base_rate"], result["by_hard"][0]
    below = next((row for row in result["by_rank"] if row["false"] is not None and row["false"] <= base), None)
    if first["false"] is None:
        return f"Of none of the {first['hard']} hardest rows the class is known."
    times = f", {first['false'] / base:.1f} times as often as among all rows" if base else ""
    end = f" From rank {below['first']:,} on rows are of the class no more often than that." if below else ""
    return f"Of the {first['hard']} hardest rows {percent(first['false'])} are of the query's class{times}.{end}"


def similarity_words(result: dict[str, Any]) -> str:
    """What the curve of similarities says."""
    hardest, key = result["by_rank"][0]["similarity"]["mean"], result["positive"]["mean"]
    order = "nearer to the query than" if hardest > key else "farther from the query than"
    at = at_hard(result)
    said = f"The hardest row is on average {order} the query's own key ({hardest:.2f} and {key:.2f})"
    mass = f"{percent(at['mass'])} of the queue's softmax mass"
    return f"{said}; the {at['hard']:,} hardest have a mean of {at['similarity']:.2f} and {mass}."


def _hard_table(result: dict[str, Any]) -> str:
    labelled = counts_false(result)
    heads = ["H", *(["false negatives", "of them, relative to chance"] if labelled else []), "mean similarity",
             "share of the queue's softmax mass"]  # fmt: skip
    rows = []
    for row in result["by_hard"]:
        base = result["base_rate"]
        false = [percent(row["false"]), f"{row['false'] / base:.1f} ×" if base and row["false"] is not None else "–"]
        cells = [f"{row['hard']:,}", *(false if labelled else []), f"{row['similarity']:.3f}", percent(row["mass"])]
        own = ' class="own"' if row["hard"] == result["hard"] else ""
        rows.append(f"<tr{own}>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f'<th class="number">{name}</th>' for name in heads)
    return (
        "<h2>To choose --n-hard</h2><p>The H hardest rows of a query, means over the queries; "
        f"H = {result['hard']:,} is marked. {text(hard_words(result))}</p><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def hard_words(result: dict[str, Any]) -> str:
    """What a larger H would change, by the table."""
    at, rows = at_hard(result), result["by_hard"]
    more = next((row for row in rows if row["hard"] >= 2 * at["hard"]), None)
    if more is None:
        return ""
    false = ""
    if counts_false(result):
        false = f"{percent(at['false'])} to {percent(more['false'])} false negatives, and "
    return (f"From H = {at['hard']:,} to {more['hard']:,}: {false}a mean similarity of {at['similarity']:.2f} to "
            f"{more['similarity']:.2f}.")  # fmt: skip


def _kinds(result: dict[str, Any]) -> str:
    if not result["kinds"]:
        return ""
    charts_of = "".join(_kind_chart(kind, row, result) for kind, row in result["kinds"].items())
    labelled = counts_false(result)
    heads = ["kind", "per query", "similarity", "of its rows", "harder than its rows", "harder than the hardest row",
             *(["made from the query's class"] if labelled else []), "softmax share", "share per negative"]  # fmt: skip
    rows = []
    for kind, row in result["kinds"].items():
        cells = [f"{row['count']}", f"{row['similarity']['mean']:.3f}", f"{row['parents']['mean']:.3f}",
                 percent(row["above_parents"], 0), percent(row["above_hardest"], 1),
                 *([percent(row["false"], 0)] if labelled else []), percent(row["mass"]),
                 f"{100 * row['mass'] / row['count']:.2g} %"]  # fmt: skip
        rows.append(f'<tr><td><i class="swatch s{colour_of_kind(kind)}"></i>{kind}</td>'
                    + "".join(f'<td class="number">{cell}</td>' for cell in cells) + "</tr>")  # fmt: skip
    head = "".join(f'<th class="{"number" * bool(i)}">{name}</th>' for i, name in enumerate(heads))
    return (
        f'<h2>Synthetic negatives</h2><div class="charts small">{charts_of}</div><p>{text(kinds_words(result))}</p>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def kinds_words(result: dict[str, Any]) -> str:
    """Which kind is hardest and which has most of the softmax."""
    rows = result["kinds"]
    hardest = max(rows, key=lambda kind: rows[kind]["similarity"]["mean"])
    heaviest = max(rows, key=lambda kind: rows[kind]["mass"])
    row = rows[hardest]
    said = f"The hardest kind is {hardest}: a mean similarity of {row['similarity']['mean']:.2f}, of the rows that it "
    said += f"is made from {row['parents']['mean']:.2f}. {heaviest.capitalize()} has most of the softmax mass, "
    said += f"{percent(rows[heaviest]['mass'])}."
    if counts_false(result) and "mixup" in rows:
        said += " A negative of mixup counts as made from the query's class where both its rows are."
    return said


def histogram_points(counts: Sequence[int]) -> list[tuple[float, float]]:
    """Centres of the bins, and the share of all that lies in each, relative to the largest."""
    total = max(1, sum(counts))
    return [(-1 + (2 * i + 1) / BINS, count / total) for i, count in enumerate(counts)]


def lowest(result: dict[str, Any]) -> float:
    """A similarity that few synthetic negatives and rows lie below."""
    return min(row[of]["quantiles"][0] for row in result["kinds"].values() for of in ("similarity", "parents"))


def _kind_chart(kind: str, row: dict[str, Any], result: dict[str, Any]) -> str:
    made, parents = (histogram_points(row[name]) for name in ("histogram", "parents_histogram"))
    high = max(y for _, y in made + parents)
    x = charts.plain_axis("similarity with the query", max(-1.0, lowest(result) - 0.1), 1, 0.25)
    made, parents = ([(at, share) for at, share in some if at >= x.low] for some in (made, parents))
    series = [
        Series("its rows", OTHER, parents, style="dashed"),
        Series(kind, colour_of_kind(kind), made, style="area"),
    ]
    return chart(series, x, Axis("", 0, high * 1.08, []), title=kind, size=(330, 190),
                 upright=[(result["positive"]["mean"], "positive")])  # fmt: skip


def mass_parts(result: dict[str, Any]) -> list[tuple[str, int, float]]:
    """Name, colour and share of each part of the softmax."""
    mass, labelled = result["mass"], result["base_rate"] is not None
    same = "other positives" if result["supervised"] else "false negatives in the queue"
    parts = [("positive", POSITIVE, mass["positive"])]
    parts += [(same, FALSE, mass["same"])] if labelled else []
    parts += [("other queue rows" if labelled else "queue rows", OTHER, mass["other"])]
    return parts + [(kind, colour_of_kind(kind), row["mass"]) for kind, row in result["kinds"].items()]


def _mass(result: dict[str, Any]) -> str:
    parts = mass_parts(result)
    bars = "".join(
        f'<div class="s{colour}" style="flex-grow:{share:.4f}" title="{text(name)}: {percent(share)}"></div>'
        for name, colour, share in parts
    )
    keys = "".join(
        f'<span><i class="s{colour} area"></i>{text(name)} {percent(share)}</span>' for name, colour, share in parts
    )
    unused = any(not row["in_use"] for row in result["kinds"].values())
    note = " The synthetic negatives are counted as if they were in use." if unused else ""
    return (
        "<h2>Shares of the softmax</h2><p>Mean shares of the loss's softmax at T = "
        f"{result['T']:g}. The gradient of the loss with respect to a query weights each negative by its share."
        f"{note}</p>"
        f'<div class="keys">{keys}</div><div class="mass">{bars}</div>'
    )


# ----------------------------------------------------------------------------------------- over checkpoints


def developments(result: dict[str, Any]) -> list[tuple[str, str, list[Series]]]:
    """(title, "share" or "similarity", curves over the finished epochs)."""
    rows = result["checkpoints"]

    def curve(name: str, colour: int, of: Any, style: str = "") -> Series:
        points = [(row["epoch"], of(row)) for row in rows]
        words = [f"{epochs(x)}: {name} {y:.3f}" if y is not None else "" for x, y in points]
        return Series(name, colour, points, style=style, words=words)

    found = []
    if counts_false(result):
        first = result["by_hard"][0]["hard"]
        found.append(("False negatives", "share", [
            curve(f"of the {first} hardest rows", FALSE, lambda row: row["by_hard"][0]["false"]),
            curve(f"of the H = {result['hard']:,} hardest", 4, lambda row: at_hard(row)["false"]),
            curve("of all rows (chance)", OTHER, lambda row: row["base_rate"], "dashed"),
        ]))  # fmt: skip
    found.append(("Similarity with the query", "similarity", [
        curve("positive", POSITIVE, lambda row: row["positive"]["mean"]),
        curve("hardest row", FALSE, lambda row: row["by_rank"][0]["similarity"]["mean"]),
        curve(f"mean of the H = {result['hard']:,} hardest", 4, lambda row: at_hard(row)["similarity"]),
    ]))  # fmt: skip
    mass = [curve("positive", POSITIVE, lambda row: row["mass"]["positive"])]
    if result["base_rate"] is not None:
        mass.append(
            curve(
                "other positives" if result["supervised"] else "false negatives", FALSE, lambda row: row["mass"]["same"]
            )
        )
    mass.append(curve("other queue rows", OTHER, lambda row: row["mass"]["other"]))
    if result["kinds"]:
        mass.append(curve("synthetic negatives", 3, lambda row: sum(kind["mass"] for kind in row["kinds"].values())))
    found.append(("Share of the softmax", "share", mass))
    found.append(("Contrast accuracy", "share", [curve("own key nearest", 2, lambda row: row["top1"])]))
    return found


def _over_checkpoints(result: dict[str, Any]) -> str:
    ends = [row["epoch"] for row in result["checkpoints"]]
    x = charts.plain_axis("finished epochs", min(ends), max(ends), max(1, round((max(ends) - min(ends)) / 6)))
    start = result["start_epoch"]
    upright = [(start, "synthetic negatives begin")] if start and x.low < start < x.high else []
    parts = []
    for title, kind, curves in developments(result):
        values = [y for one in curves for _, y in one.points if y is not None]
        y = (
            charts.share_axis("share", min(1.0, max(values)))
            if kind == "share"
            else charts.plain_axis("similarity", min(values), 1, 0.25)
        )
        parts.append(chart(curves, x, y, title=title, size=(440, 270), upright=upright))
    words = "The same images and views at each checkpoint, by its own encoders against its own queue."
    if upright:
        words += " Before they begin, synthetic negatives are counted as if they were in use."
    return f'<p>{words}</p><div class="charts">{"".join(parts)}</div>'
