"""README's picture of hard negatives: what `moco negatives` shows of the demo, drawn small.

    python -m benchmarks.figures.hard_negatives [runs/demo]    docs/figures/hard_negatives.png; with the folder of a
                                                               demo that has ended it first takes hard_negatives.json
                                                               from there

Two of the six queries that the command shows by default, a synthetic negative of three kinds, and the share of false
negatives by rank over its 512 queries.
"""

from __future__ import annotations

import base64
import io
import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image

from moco import data, run_folder
from moco.cli.looking import parse_negatives
from moco.eval.mined import command
from moco.eval.mined.images import Gallery, Sample, chosen
from moco.eval.mined.measure import look, measure
from moco.eval.mined.picture import COLOURS, PALE, Sheet
from moco.eval.mined.queue_run import open_queue
from moco.pictures.colours import MARKS
from moco.pictures.thumbnails import thumbnail

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
QUERIES, ROWS = (1, 4), 8  # which of those that the command shows, and how many of their hardest rows
MADE = ("interpolation", "extrapolation", "mixup")  # from images alone
DPI = 150
SIDE, STEP, STRIP = 0.82, 0.92, 1.3  # inches of an image, from image to image, from query to query


def collect(folder: str) -> dict[str, Any]:
    """What is drawn, with the images as data URIs."""
    args = parse_negatives([folder, "--dataset", "mnist5k"])
    run = open_queue(run_folder.encoder_file(folder))
    source = data.open_sources(args.dataset, None, channels=run.settings.get("channels")).pretrain
    views, _ = run.views(source)
    sample = Sample(views, run.epoch, chosen(len(source), args.sample, args.seed, []))
    gallery = Gallery(run, source, views, sample)
    there = command.compared(run, sample, source, args)
    result = {**measure(there), "shown": look(there, max(QUERIES) + 1, ROWS)}
    gallery.name_all(result)
    shown = [_pictured(result["shown"][number], gallery) for number in QUERIES]
    ranks = [[(row["first"] * row["last"]) ** 0.5, row["false"], row["error"]] for row in result["by_rank"]]
    own = next(row["false"] for row in result["by_hard"] if row["hard"] == result["hard"])
    return {"epochs": run.epoch, "K": len(run.queue), "T": run.T, "hard": result["hard"], "false": own,
            "base_rate": result["base_rate"], "by_rank": ranks, "queries": shown}  # fmt: skip


def _pictured(query: dict[str, Any], gallery: Gallery) -> dict[str, Any]:
    """A query with the images of what is shown of it."""
    made = [one for one in query["synthetic"] if one["which"] == "median" and one["kind"] in MADE]
    for part in (part for one in made for part in one["parts"]):
        part["image"] = thumbnail(gallery.row(part["row"]) if part["of"] == "row" else gallery.query(query["id"]))
    return {
        "class": query["class"], "image": thumbnail(gallery.query(query["id"])),
        "positive": {**query["positive"], "image": thumbnail(gallery.key(query["id"]))},
        "hardest": [{**row, "image": thumbnail(gallery.row(row["row"]))} for row in query["hardest"]], "made": made,
    }  # fmt: skip


def _image(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def show(found: dict[str, Any]) -> Any:
    """The figure of matplotlib."""
    from matplotlib.figure import Figure

    width, height = 0.2 + 10 * STEP + 0.2, 0.42 + 2 * STRIP + 2.45
    sheet = Sheet(Figure(figsize=(width, height), facecolor="white"), width, height)
    _key(sheet, found)
    for number, query in enumerate(found["queries"]):
        _strip(sheet, query, 0.42 + number * STRIP)
    _made(sheet, found["queries"][0], 0.42 + 2 * STRIP + 0.12)
    _curve(sheet, found, 0.42 + 2 * STRIP + 0.4)
    return sheet.figure


def _key(sheet: Sheet, found: dict[str, Any]) -> None:
    x = 0.1
    for mark, words in (
        ("query", "query"),
        ("positive", "positive"),
        ("false", "false negative: of the query's class"),
    ):
        sheet.words(x, 0.26, f"{MARKS[mark].sign}  {words}", 9, MARKS[mark].colour)
        x += 0.42 + 0.066 * len(words)
    sheet.words(x, 0.26, f"s: cosine similarity,  w: share of the softmax at T = {found['T']:g}", 9, PALE)


def _strip(sheet: Sheet, query: dict[str, Any], top: float) -> None:
    """A query, its positive and its hardest rows."""
    tiles = [(query, "query", f"query: {query['class']}"), (query["positive"], "positive", "its key")]
    tiles += [(row, "false" * row["same_class"], f"#{row['rank']}: {row['class']}") for row in query["hardest"]]
    for number, (tile, mark, words) in enumerate(tiles):
        x = 0.1 + number * STEP + 0.2 * (number > 1)
        sheet.image(_image(tile["image"]), x, top, SIDE, mark)
        numbers = f"s {tile['similarity']:.2f} w {100 * tile['weight']:.2g} %" if "similarity" in tile else ""
        sheet.words(x, top + SIDE + 0.18, words, 9)
        sheet.words(x, top + SIDE + 0.34, numbers, 7, PALE)


def _made(sheet: Sheet, query: dict[str, Any], top: float) -> None:
    """What the first query's synthetic negatives are made from."""
    sheet.words(0.1, top + 0.14, "Synthetic negatives of the first query", 10)
    for number, one in enumerate(query["made"]):
        y, x = top + 0.3 + 0.68 * number, 1.2
        sheet.words(0.1, y + 0.36, one["kind"], 9)
        for place, part in enumerate(one["parts"]):
            sign = "\N{MINUS SIGN}" if part["weight"] < 0 else "+" if place else ""
            sheet.words(x, y + 0.36, f"{sign} {abs(part['weight']):.2f} \N{MULTIPLICATION SIGN}".strip(), 9)
            x += 0.66
            mark = "query" if part["of"] == "query" else "false" * part["same_class"]
            sheet.image(_image(part["image"]), x, y, 0.58, mark)
            x += 0.7
        rows = [f"{part['similarity']:.2f}" for part in one["parts"] if part["of"] == "row"]
        sheet.words(x + 0.02, y + 0.28, f"s {one['similarity']:.2f}", 9)
        sheet.words(x + 0.02, y + 0.46, f"of its row{'s' * (len(rows) > 1)}: {' and '.join(rows)}", 8, PALE)


def _curve(sheet: Sheet, found: dict[str, Any], top: float) -> None:
    """The share of false negatives by rank."""
    axis = sheet.axes(5.75, top, sheet.width - 6.05, 1.5)
    x, share, error = zip(*(row for row in found["by_rank"] if row[1] is not None and row[2] is not None), strict=True)
    low, high = ([y + sign * 1.96 * e for y, e in zip(share, error, strict=True)] for sign in (-1, 1))
    axis.fill_between(x, low, high, color=COLOURS[0], alpha=0.2, linewidth=0)
    axis.plot(x, share, color=COLOURS[0], linewidth=2)
    axis.axhline(found["base_rate"], color=PALE, linestyle="--", linewidth=1)
    axis.text(1, found["base_rate"], f"chance: {100 * found['base_rate']:.0f} %", size=8.5, color=PALE, va="bottom")
    axis.axvline(found["hard"], color=PALE, linestyle=":", linewidth=1.2)
    words = f"  H = {found['hard']}:\n  {100 * found['false']:.0f} % of the H\n  hardest are false"
    axis.text(found["hard"], 0.98, words, transform=axis.get_xaxis_transform(), size=8.5, color=PALE, va="top")
    axis.set_xscale("log", base=2)
    axis.set(xlim=(0.93, found["K"]), ylim=(0, None))
    axis.set_xticks(powers := [4**i for i in range(6)], map(str, powers))
    axis.set_xlabel("rank of the queue row, 1 is the hardest", size=9)
    axis.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axis.tick_params(labelsize=8.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("False negatives by rank", loc="left", size=10)


def main(words: list[str]) -> None:
    path = FOLDER / "hard_negatives.json"
    if words:
        path.write_text(json.dumps(collect(words[0]), separators=(",", ":")) + "\n", encoding="utf-8")
    drawn = io.BytesIO()
    show(json.loads(path.read_text(encoding="utf-8"))).savefig(drawn, dpi=DPI)
    picture = Image.open(drawn).convert("RGB").quantize(128, dither=Image.Dither.NONE)  # a third of the bytes
    picture.save(FOLDER / "hard_negatives.png", optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
