"""negatives.html: queries with their hard negatives as images, and the curves over all queries of the sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moco.eval.mined import curves
from moco.eval.mined.curves import at_hard, colour_of_kind, counts_false, epochs, percent, title_of
from moco.eval.mined.images import Gallery
from moco.pictures import charts, grid
from moco.pictures.page import page, text
from moco.pictures.thumbnails import thumbnail
from moco.weights.card import short

STYLES = (*grid.STYLES, *charts.STYLES, "negatives.css")
SEEN, WHOLE = 96, 200  # pixels of a view and of the enlarged image, longest side
# Of each kind: its formula, in which paper it is what, what it is made from.
WORDS = {
    "interpolation": ("α q + (1 − α) n, α ~ U(0, 0.5)", "SynCo type 1, MoCHi type 2", "the query and one hard row"),
    "extrapolation": ("q + β (n − q), β ~ U(1, 1.5)", "SynCo type 2", "the query and one hard row"),
    "extrapolation-paper": ("n + β (n − q), β ~ U(1, 1.5)", "SynCo type 2, its text", "the query and one hard row"),
    "mixup": ("γ n₁ + (1 − γ) n₂, γ ~ U(0, 1)", "SynCo type 3, MoCHi type 1", "two hard rows"),
    "noise": ("n + σ ε, ε ~ N(0, I)", "SynCo type 4", "one hard row and Gaussian noise: no second image"),
    "perturbation": ("n + δ ∇ₙ(q·n) = n + δ q", "SynCo type 5", "one hard row and a step along the gradient of its "
                     "similarity, which is the query"),
    "adversarial": ("n + η sgn ∇ₙ(q·n) = n + η sgn q", "SynCo type 6", "one hard row and a step along the sign of the "
                    "gradient: no second image"),
}  # fmt: skip


def page_of(result: dict[str, Any], gallery: Gallery) -> str:
    """The page's text."""
    parts = [_facts(result, gallery), _numbers(result), "<h2>Queries and their hardest negatives</h2>", _legend(result)]
    parts += [_query(number, query, result, gallery) for number, query in enumerate(result["shown"], 1)]
    parts += [grid.ENLARGING, curves.html(result)]
    return page(title_of(result), body="\n".join(parts), styles=STYLES, scripts=grid.SCRIPTS)


# ------------------------------------------------------------------------------------------------ what it is


def _facts(result: dict[str, Any], gallery: Gallery) -> str:
    shown = "the view that the key encoder saw when the row was made; under the pointer the whole image and its name"
    if not gallery.seen:
        shown = "the whole image, as the view that the key encoder saw cannot be told"
    done = epochs(result["epoch"])
    lines = [
        f"Checkpoint {result['checkpoint']}, {done} done; T = {result['T']:g}, K = {result['K']:,} queue rows.",
        f"Views of queries and keys: {result['views']}, those of epoch {result['epoch']} (counted from 0), which comes "
        "next; BatchNorm as in training, by the statistics of the batch.",
        f"A queue row is shown as {shown}.",
        _rows_without(result),
        _recipe(result),
    ]
    warnings = "".join(f'<p class="warning">Warning: {text(warning)}.</p>' for warning in result["warnings"])
    return f'<div class="facts">{warnings}{"".join(f"<p>{text(line)}</p>" for line in lines if line)}</div>'


def _rows_without(result: dict[str, Any]) -> str:
    empty, own = result["no_image"], result["own_rows"]
    said = []
    if empty:
        said.append(
            f"{empty:,} of {result['K']:,} rows have no image (random first rows): they are counted and not shown."
        )
    if result["supervised"]:
        said.append("Rows of the query's class are its positives in this method, and left out here.")
    elif own:
        fate = "left out, as in training" if result["masked"] else "kept as negatives, as in training"
        said.append(f"Rows of the query's own image ({own:.2g} per query on average) are {fate}.")
    return " ".join(said)


def _recipe(result: dict[str, Any]) -> str:
    if not result["kinds"]:
        return (f"The run has no synthetic negatives; H = {result['hard']:,} hardest rows are counted. "
                "--recipe synco or mochi shows which there would be.")  # fmt: skip
    counts = ", ".join(f"{row['count']} {kind}" for kind, row in result["kinds"].items())
    whose = "The run's own" if result["own_recipe"] else "Not the run's own"
    idle = [kind for kind, row in result["kinds"].items() if not row["in_use"]]
    unused = f" Not in use in the epoch that comes next: {', '.join(idle)}." if idle and result["own_recipe"] else ""
    return f"{whose} synthetic negatives per query, from its H = {result['hard']:,} hardest rows: {counts}.{unused}"


def _numbers(result: dict[str, Any]) -> str:
    hard, mass, labelled = at_hard(result), result["mass"], counts_false(result)
    tiles = []
    if labelled:
        chance = percent(result["base_rate"])
        tiles += [
            (
                percent(hard["false"]),
                f"of the H = {hard['hard']:,} hardest rows are false negatives; by chance {chance}",
            ),
            (percent(mass["same"]), "of the softmax is on queue rows that are false negatives"),
        ]
    synthetic = sum(row["mass"] or 0 for row in result["kinds"].values())
    tiles += [
        (percent(mass["other"]), f"of the softmax is on {'the other' if labelled else 'the'} queue rows"),
        *([(percent(synthetic), "of the softmax is on synthetic negatives")] if result["kinds"] else []),
        (percent(result["top1"]), "of the queries are nearest to their own key (contrast accuracy)"),
    ]  # fmt: skip
    return '<div class="tiles">' + "".join(f"<div><b>{a}</b><span>{text(b)}</span></div>" for a, b in tiles) + "</div>"


# ------------------------------------------------------------------------------------------------- one query


def _legend(result: dict[str, Any]) -> str:
    marks = ["query", "positive", *(["false"] if counts_false(result) else [])]
    named = "#: rank of a row, and its class; " if counts_false(result) else ""
    words = f"{named}s: cosine similarity with the query; w: share of the softmax at T"
    return f'<div class="legends">{grid.legend_html(marks)}<span class="legend pale">{words}</span></div>'


def _query(number: int, query: dict[str, Any], result: dict[str, Any], gallery: Gallery) -> str:
    index, name, positive, of_class = query["id"], query["name"], query["positive"], ""
    if query["class"]:
        of_class = f"class {query['class']}"
    whole = gallery.whole(index)
    tiles = [
        _tile(gallery.query(index), whole, ["query", of_class], "query", name),
        _tile(gallery.key(index), whole, ["positive", _cosine(positive), _weight(positive)], "positive", name),
        '<div class="bar"></div>',
    ]
    for row in query["hardest"]:
        tiles.append(_row_tile(row, gallery, [f"#{row['rank']} {row['class']}", _cosine(row), _weight(row)]))
    head = ", ".join(filter(None, (short(name), of_class)))
    strip = f'<p>{_said(query, result)}</p><div class="row">{"".join(tiles)}</div>'
    return f"<section><h3>{number}. {text(head)}</h3>{strip}{_made(query, gallery, number == 1)}</section>"


def _made(query: dict[str, Any], gallery: Gallery, opened: bool) -> str:
    kinds: dict[str, list[dict[str, Any]]] = {}
    for example in query["synthetic"]:
        kinds.setdefault(example["kind"], []).append(example)
    if not kinds:
        return ""
    blocks = "".join(_kind_block(kind, some, query, gallery) for kind, some in kinds.items())
    summary = "<summary>Its synthetic negatives: the hardest, the median and the easiest of each kind</summary>"
    return f'<details{" open" * opened}>{summary}<div class="kinds">{blocks}</div></details>'


def _said(query: dict[str, Any], result: dict[str, Any]) -> str:
    rank, hard = query["positive"]["rank"], result["hard"]
    nearer = (
        f"{rank:,} queue rows are nearer to it than its own key"
        if rank
        else "No queue row is nearer to it than its own key"
    )
    said = [f"{nearer}."]
    if counts_false(result):
        known = query["known_hard"]
        said.append(f"Of its {known:,} hardest rows with a class, {query['false_hard']:,} "
                    f"({percent(query['false_hard'] / known if known else None, 0)}) are of its own.")  # fmt: skip
    if query["no_image_hard"]:
        said.append(f"{query['no_image_hard']:,} of its {hard:,} hardest rows have no image.")
    if query["left_out"]:
        whose = "its class" if result["supervised"] else "its own image"
        one = query["left_out"] == 1
        said.append(f"{query['left_out']:,} queue row{'s' * (not one)} of {whose} {'is' if one else 'are'} left out.")
    return text(" ".join(said))


def _cosine(entry: dict[str, Any]) -> str:
    return f"s {entry['similarity']:.3f}"


def _weight(entry: dict[str, Any]) -> str:
    return f"w {100 * entry['weight']:.2g} %"


def _row_tile(row: dict[str, Any], gallery: Gallery, lines: Sequence[str]) -> str:
    return _tile(gallery.row(row["row"]), gallery.whole(row["id"]), lines, "false" * row["same_class"], row["name"])


def _tile(seen: Any, whole: Any, lines: Sequence[str], mark: str, name: str) -> str:
    words = "".join(f"<span>{text(line)}</span>" for line in lines if line)
    images = f'<img class="whole" src="{thumbnail(whole, WHOLE)}" alt="">'
    images += f'<img src="{thumbnail(seen, SEEN)}" alt="{text(name)}">'
    return (
        f'<figure tabindex="0" class="{mark}" data-detail="{text(name)}"><div>{images}{grid.sign_html(mark)}</div>'
        f"<figcaption>{words}</figcaption></figure>"
    )


# ------------------------------------------------------------------------------------- synthetic negatives


def _kind_block(kind: str, examples: Sequence[dict[str, Any]], query: dict[str, Any], gallery: Gallery) -> str:
    formula, source, made = WORDS.get(kind, ("", "a kind of your own", "hard rows"))
    rows = "".join(_example(example, query, gallery) for example in examples)
    colour = colour_of_kind(kind)
    return (
        f'<div class="kind"><h4 class="s{colour}">{kind}</h4><div class="formula">{text(formula)}</div>'
        f'<div class="pale">{text(source)}: {text(made)}</div>{rows}</div>'
    )


def _example(example: dict[str, Any], query: dict[str, Any], gallery: Gallery) -> str:
    terms = []
    for i, part in enumerate(example["parts"]):
        sign = "−" if part["weight"] < 0 else "+ " * bool(i)
        terms.append(f'<span class="times">{sign}{abs(part["weight"]):.2f} ×</span>{_part(part, query, gallery)}')
    parents = [part["similarity"] for part in example["parts"] if part["of"] == "row"]
    beside = " and ".join(f"{parent:.3f}" for parent in parents)
    words = f"{example['which']}: s {example['similarity']:.3f}, w {100 * example['softmax']:.2g} %"
    rows = f"its row{'s' * (len(parents) > 1)}: s {beside}"
    scale = _scale(example, query)
    said = f'<div class="small">{text(words)}<br>{rows}</div>'
    return f'<div class="example"><div class="mix">{"".join(terms)}</div><div>{scale}{said}</div></div>'


def _part(part: dict[str, Any], query: dict[str, Any], gallery: Gallery) -> str:
    if part["of"] == "row":
        return _row_tile(part, gallery, [])
    if part["of"] == "query":
        return _tile(gallery.query(query["id"]), gallery.whole(query["id"]), [], "query", query["name"])
    return f'<span class="term">{"ε" if part["of"] == "noise" else "sgn q"}</span>'


def _scale(example: dict[str, Any], query: dict[str, Any]) -> str:
    """Similarities from 0 to 1 on a line: the positive (dashes), the rows (circles), the mixture (diamond)."""

    def at(similarity: float) -> float:
        return 6 + 238 * min(1.0, max(0.0, similarity))

    made, key = at(example["similarity"]), at(query["positive"]["similarity"])
    parts = ['<line class="axis" x1="6" x2="244" y1="12" y2="12"/>']
    parts.append(f'<line class="positive" x1="{key:.1f}" x2="{key:.1f}" y1="3" y2="21">{_hint("the positive")}</line>')
    for part in (part for part in example["parts"] if part["of"] == "row"):
        x, hint = at(part["similarity"]), _hint(f"a row that it is made from: {part['similarity']:.3f}")
        parts.append(f'<line class="move" x1="{x:.1f}" x2="{made:.1f}" y1="12" y2="12"/>')
        parts.append(f'<circle class="{"false" * part["same_class"]}" cx="{x:.1f}" cy="12" r="4">{hint}</circle>')
    hint = _hint(f"the synthetic negative: {example['similarity']:.3f}")
    parts.append(f'<path d="M{made:.1f} 5.5l6 6.5l-6 6.5l-6 -6.5Z">{hint}</path>')
    head = f'<svg class="scale s{colour_of_kind(example["kind"])}" viewBox="0 0 250 24" role="img"'
    return f'{head} aria-label="similarities">{"".join(parts)}</svg>'


def _hint(words: str) -> str:
    return f"<title>{text(words)}</title>"
