"""The pictures of docs/figures are those of the numbers beside them, and the numbers are those of this code."""

import io
import json
from itertools import chain

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from benchmarks.figures import hard_negatives, negatives, normal_loss, overview

FOLDER = ROOT / "docs" / "figures"
DRAWN = {"negatives": negatives.show, "normal_loss": normal_loss.show, "overview": overview.show}


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_is_drawn_from_its_numbers(name):
    numbers = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert DRAWN[name](numbers) == (FOLDER / f"{name}.svg").read_text(encoding="utf-8")


def test_the_picture_of_hard_negatives_is_drawn_from_its_numbers():
    """In pixels and not in bytes: another version of matplotlib or zlib may write another file."""
    numbers, drawn = json.loads((FOLDER / "hard_negatives.json").read_text(encoding="utf-8")), io.BytesIO()
    hard_negatives.show(numbers).savefig(drawn, dpi=hard_negatives.DPI)
    kept, made = (Image.open(file).convert("L") for file in (FOLDER / "hard_negatives.png", drawn))
    assert kept.size == made.size
    parts = [np.asarray(image.resize((150, 84)), dtype=float) for image in (kept, made)]
    assert np.abs(parts[0] - parts[1]).max() < 40 and np.abs(parts[0] - parts[1]).mean() < 1


def test_every_picture_is_small_has_numbers_and_is_on_a_page():
    pages = "".join(page.read_text(encoding="utf-8") for page in (*ROOT.glob("docs/*.md"), ROOT / "README.md"))
    pictures = [path for path in FOLDER.iterdir() if path.suffix != ".json"]
    assert {path.stem for path in pictures} == {*DRAWN, "hard_negatives"}
    assert [path.name for path in FOLDER.iterdir() if path.stat().st_size >= 150_000] == []
    assert [path.name for path in pictures if f"figures/{path.name})" not in pages] == []


def test_the_negatives_of_the_picture_are_the_projects():
    kept, made = json.loads((FOLDER / "negatives.json").read_text(encoding="utf-8")), negatives.compute()
    assert kept.keys() == made.keys() and kept["kinds"].keys() == made["kinds"].keys()
    for kind, points in made["kinds"].items():
        assert list(chain(*kept["kinds"][kind])) == pytest.approx(list(chain(*points)), abs=1e-4), kind
