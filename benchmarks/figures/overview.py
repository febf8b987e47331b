"""README's picture: a step of the method, and what `make demo` makes of the digits.

    python -m benchmarks.figures.overview [runs/demo]      docs/figures/overview.svg; with the folder of a demo that has
                                                           ended it first takes overview.json from there

The points are the demo's own embedding: t-SNE of the features of held-out digits, every other one of the 1,000.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.figures.svg import COLOURS, PALE, TEXT, Picture
from moco.cli import parse_pretrain
from moco.eval.demo import embeddings

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
SIDE = 250  # of a panel of points


def collect(folder: str) -> dict:
    """Of both networks k-NN accuracy and points in a square of 1,000, and the labels."""
    settings = parse_pretrain([])
    weights = Path(folder, f"checkpoint_{settings.epochs - 1:04d}.pth.tar")
    found: dict = {}
    source, maps = embeddings(settings, str(weights))
    assert source.labels is not None
    found["labels"] = source.labels[::2].tolist()
    for one in maps:
        low, high = one.points.min(0), one.points.max(0)
        places = (1000 * (one.points - low) / (high - low)).round().astype(int)
        knn = json.loads(Path(folder, one.title, "knn.json").read_text(encoding="utf-8"))["knn"]
        found[one.title] = {"knn": knn, "points": places[::2].tolist()}
    return found


def show(data: dict) -> str:
    """The SVG."""
    picture = Picture(1000, 340, "Momentum contrast with synthetic hard negatives, and the digits before and after it")
    _method(picture)
    for i, title in enumerate(("untrained", "pretrained")):
        x, y = 450 + i * (SIDE + 30), 56
        found = data[title]
        picture.text((x + SIDE / 2, 34), f"{title}: k-NN {found['knn']:.1f} %", 14, TEXT, "middle")
        for digit in range(10):
            points = [p for p, label in zip(found["points"], data["labels"], strict=True) if label == digit]
            places = [(x + SIDE * u / 1000, y + SIDE * (1 - v / 1000)) for u, v in points]
            picture.dots(places, COLOURS[digit], 4.5)
    picture.text(
        (450 + SIDE + 15, 328), "500 handwritten digits it was not trained on, a colour each", 12, PALE, "middle"
    )
    return str(picture)


def _method(picture: Picture) -> None:
    """Two views, two encoders, the queue, the synthetic negatives and the loss."""
    blue, green, red = COLOURS[0], COLOURS[2], COLOURS[1]
    picture.box((16, 138), (74, 44), ["image"])
    for y, name, colour, vector in ((56, "encoder", blue, "q"), (220, "momentum", green, "k")):
        words = [name] if vector == "q" else [name, "encoder"]
        picture.arrow((90, 160), (124, y + 22))
        picture.box((126, y), (92, 44), words, colour=colour)
        picture.arrow((218, y + 22), (254, y + 22))
        picture.text((262, y + 27), vector, 16, colour)
    picture.text((92, 116), "view", 11, PALE, "end")
    picture.text((92, 212), "view", 11, PALE, "end")
    picture.arrow((172, 100), (172, 218))
    picture.text((178, 163), "average", 11, PALE)
    picture.box((300, 220), (112, 44), ["queue of keys"], colour=green)
    picture.arrow((274, 242), (298, 242))
    picture.box((300, 138), (112, 44), ["synthetic", "hard negatives"], colour=red)
    picture.arrow((356, 220), (356, 184))
    picture.box((300, 56), (112, 44), ["InfoNCE"], colour=blue)
    picture.arrow((274, 78), (298, 78))
    picture.arrow((356, 138), (356, 102))
    picture.line([(412, 242), (426, 242), (426, 78)], PALE, 1.5)
    picture.arrow((426, 78), (414, 78))
    picture.text((16, 310), "A query is pulled to its key and pushed from the queue", 12, PALE)
    picture.text((16, 328), "and from negatives made of its hardest rows.", 12, PALE)


def main(words: list[str]) -> None:
    path = FOLDER / "overview.json"
    if words:
        path.write_text(json.dumps(collect(words[0]), separators=(",", ":")) + "\n", encoding="utf-8")
    (FOLDER / "overview.svg").write_text(show(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
