"""The picture of the synthetic negatives in docs/concepts.md: where each kind lies on the sphere.

    python -m benchmarks.figures.negatives          docs/figures/negatives.json and negatives.svg

In three dimensions, one query and its four hardest queue rows; every negative is drawn and computed by the project's
own code (moco.methods.negatives.draw, moco.kernels.reference.synthesize). The small steps sigma, delta and eta are
larger than the published 0.01, as nothing of them could be seen here.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.figures.svg import COLOURS, PALE, RULE, Picture
from moco.kernels.reference import synthesize
from moco.methods.negatives import draw, synthetic

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "figures"
COUNT = 24  # negatives of a kind
STEPS = {"noise": 0.12, "perturbation": 0.5, "adversarial": 0.25}  # sigma, delta, eta of the picture
KINDS = {  # kind: head of its panel
    "interpolation": ("SynCo type 1, MoCHi type 2", "α q + (1 − α) n"),
    "extrapolation": ("SynCo type 2", "q + β (n − q)"),
    "mixup": ("SynCo type 3, MoCHi type 1", "γ n_a + (1 − γ) n_b"),
    "noise": ("SynCo type 4", "n + σ ε"),
    "perturbation": ("SynCo type 5", "n + δ q"),
    "adversarial": ("SynCo type 6", "n + η sgn(q)"),
}
QUERY = (0.25, 0.42, 0.87)
HARD = ((0.75, 0.40, 0.53), (0.60, -0.25, 0.76), (-0.45, 0.55, 0.70), (-0.30, -0.30, 0.90))


def compute() -> dict:
    """The query, its hardest rows and the negatives of each kind, unit vectors of three numbers."""
    q, queue = F.normalize(torch.tensor([QUERY]), dim=1), F.normalize(torch.tensor(HARD), dim=1)
    rows, kinds = torch.arange(len(queue))[None], {}
    for kind in KINDS:
        draws = draw([synthetic(kind, COUNT, STEPS.get(kind))], 1, len(queue), 3, key=0)
        assert draws is not None
        kinds[kind] = synthesize(q, queue, rows, draws)[0].tolist()
    return {"query": q[0].tolist(), "hard": queue.tolist(), "kinds": kinds, "steps": STEPS}


def show(data: dict) -> str:
    """The SVG: six panels, the sphere seen from above."""
    picture = Picture(900, 640, "Where the six kinds of synthetic negatives lie on the unit sphere")
    for i, (kind, (who, formula)) in enumerate(KINDS.items()):
        _panel(picture, data, kind, (150 + 300 * (i % 3), 180 + 310 * (i // 3)), COLOURS[i])
        x, y = 150 + 300 * (i % 3), 24 + 310 * (i // 3)
        picture.text((x, y), f"{kind}: {formula}", 14, COLOURS[i], "middle")
        picture.text((x, y + 18), who, 12, PALE, "middle")
    picture.text(
        (20, 630), "black: the query q; grey: its four hardest queue rows n; coloured: the synthetic negatives", 12
    )
    return str(picture)


def _panel(picture: Picture, data: dict, kind: str, centre: tuple[float, float], colour: str) -> None:
    def at(vector: list[float]) -> tuple[float, float]:
        return centre[0] + 118 * vector[0], centre[1] - 118 * vector[1]

    around = [2 * math.pi * step / 48 for step in range(49)]
    for height in (0.0, 0.5, 0.8):  # circles of latitude, the outline first
        radius = math.sqrt(1 - height**2)
        picture.line([at([radius * math.cos(a), radius * math.sin(a), height]) for a in around], RULE)
    picture.dots(map(at, data["hard"]), "#8c959f", 11)
    picture.dots(map(at, data["kinds"][kind]), colour, 5, 0.75)
    picture.dots([at(data["query"])], "#000", 11)
    x, y = at(data["query"])
    picture.text((x + 8, y - 6), "q", 14, "#000")


def main() -> None:
    data = rounded(compute())
    (FOLDER / "negatives.json").write_text(json.dumps(data) + "\n", encoding="utf-8")
    (FOLDER / "negatives.svg").write_text(show(data), encoding="utf-8")


def rounded(value: Any) -> Any:
    """Every number in dictionaries and lists to four places."""
    if isinstance(value, dict):
        return {name: rounded(part) for name, part in value.items()}
    return [rounded(part) for part in value] if isinstance(value, list) else round(value, 4)


if __name__ == "__main__":
    main()
