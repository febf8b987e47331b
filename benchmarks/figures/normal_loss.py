"""The curves of docs/normal_loss.md: a healthy run, one that collapsed, one that leaks and one with a stale queue.

    python -m benchmarks.figures.normal_loss                      docs/figures/normal_loss.svg from normal_loss.json
    python -m benchmarks.figures.normal_loss NAME=FOLDER ...      first takes a run's curves from FOLDER/log.jsonl

The commands of the runs are in docs/normal_loss.md.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures.svg import COLOURS, PALE, RULE, TEXT, Picture

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
RUNS = {  # column: its head, its colour, and the run in grey behind it
    "healthy": ("healthy", COLOURS[2], None),
    "collapsed": ("collapsed", COLOURS[1], "healthy"),
    "leaking": ("leaking", COLOURS[4], "healthy"),
    "stale": ("stale queue", COLOURS[7], "stale, m 0.999"),
}
ROWS = {  # figure: its name and the ends of its axis
    "loss_ratio": ("loss / ln(1+K)", 0.6, 1.0),
    "top1": ("contrast top-1, %", 0.0, 100.0),
    "feature_std": ("feature_std", 0.0, 1.0),
    "old_mass": ("old_mass", 0.0, 0.6),
    "knn": ("k-NN, %", 0.0, 100.0),
}
OWN = {("stale", "loss_ratio"): (0.84, 0.98), ("stale", "top1"): (0.0, 12.0)}  # ends of a panel that differ
WIDTH, HEIGHT, LEFT, TOP = 166, 100, 150, 40  # of a panel; of the first panel's corner
GAP_X, GAP_Y = 34, 20


def collect(folder: str) -> dict[str, list[list[float]]]:
    """Each figure of ROWS as (step, value) of the records that have it, to four places."""
    lines = Path(folder, "log.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    curves = {name: [[r["step"], round(r[name], 4)] for r in records if r.get(name) is not None] for name in ROWS}
    return curves | {"epoch": [[r["step"], r["epoch"]] for r in records if "loss_ratio" in r]}


def show(runs: dict[str, dict[str, list[list[float]]]]) -> str:
    """The SVG: a column a run, a row a figure."""
    size = LEFT + len(RUNS) * (WIDTH + GAP_X), TOP + len(ROWS) * (HEIGHT + GAP_Y) + 20
    picture = Picture(*size, "Curves of a healthy, a collapsed and a leaking run and of one with a stale queue")
    for column, (run, (head, colour, behind)) in enumerate(RUNS.items()):
        x = LEFT + column * (WIDTH + GAP_X)
        picture.text((x + WIDTH / 2, 24), head, 15, colour, "middle")
        last = runs[run]["epoch"][-1][0]
        for row, (figure, (_, *ends)) in enumerate(ROWS.items()):
            y, (low, high) = TOP + row * (HEIGHT + GAP_Y), OWN.get((run, figure), ends)
            named = column == 0 or (run, figure) in OWN
            _axes(picture, x, y, last if row == len(ROWS) - 1 else None, (low, high) if named else None)
            for name, shade in ((behind, "#afb8c1"), (run, colour)):
                points = [(x + WIDTH * step / last, y + HEIGHT * (high - min(max(v, low), high)) / (high - low))
                          for step, v in runs[name][figure]] if name else []  # fmt: skip
                picture.line(points, shade, 1.8)
    for row, (words, _, _) in enumerate(ROWS.values()):
        picture.text((LEFT - 36, TOP + row * (HEIGHT + GAP_Y) + HEIGHT / 2 + 4), words, 12, TEXT, "end")
    return str(picture)


def _axes(picture: Picture, x: float, y: float, last: float | None, ends: tuple[float, float] | None) -> None:
    for part in (0, 0.5, 1):
        picture.line([(x, y + part * HEIGHT), (x + WIDTH, y + part * HEIGHT)], RULE)
    if last is not None:
        picture.text((x, y + HEIGHT + 14), "0", 10, PALE)
        picture.text((x + WIDTH, y + HEIGHT + 14), f"step {last:g}", 10, PALE, "end")
    if ends is not None:
        for value, height in ((ends[1], 4), (ends[0], HEIGHT + 3)):
            picture.text((x - 6, y + height), f"{value:g}", 10, PALE, "end")


def main(words: list[str]) -> None:
    path = FOLDER / "normal_loss.json"
    runs = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for word in words:
        name, _, folder = word.partition("=")
        runs[name] = collect(folder)
    path.write_text(json.dumps(runs) + "\n", encoding="utf-8")
    (FOLDER / "normal_loss.svg").write_text(show(runs), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
