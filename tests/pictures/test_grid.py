"""Grids of images: what is framed how, whole images of any shape, text of any kind."""

import os
import re

import numpy as np
import pytest
from PIL import Image

from moco.pictures.colours import MARKS
from moco.pictures.grid import Cell, grid_html, grid_png

LONG = "a very long name of a class, as some data sets have them"
ODD = ["<img src=x onerror=alert(1)>", os.fsdecode(b"d\xf6g"), r"$\frac$", LONG, ""]


def rows() -> list[list[Cell]]:
    sizes, marks = [(28, 28), (300, 40), (40, 300), (1, 1), (500, 500)], ["query", "right", "wrong", "right", ""]
    images = [Image.new("RGB", size, "green") for size in sizes]
    found = zip(images, ODD, marks, strict=True)
    cells = [Cell(image, (name, "0.98"), mark, f"{name}/1.png") for image, name, mark in found]
    return [cells, cells[:2]]


@pytest.fixture
def drawn(tmp_path):
    grid_png(rows(), str(tmp_path / "grid.png"), ODD[1])
    with Image.open(tmp_path / "grid.png") as image:
        return np.asarray(image.convert("RGB")).astype(int)


def test_a_png_has_the_frames_and_whole_images(drawn):
    for mark in MARKS.values():
        colour = [int(mark.colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (abs(drawn - colour).max(2) < 8).sum() > 200
    green = (drawn == (0, 128, 0)).all(2).sum()
    assert green == 2 * (96 * 96 + 96 * 13) + 13 * 96 + 2 * 96 * 96
    assert (drawn[:, -10:] == 255).all() and (drawn[-4:] == 255).all()  # nothing reaches the edge


def test_a_page_has_the_same_as_text():
    made = grid_html(rows())
    assert "<img src=x" not in made and made.count("<figure") == 7
    assert (
        made.count('<figure tabindex="0" class="right"') == 3 and made.count(f"{MARKS['right'].sign}</b>") == 4
    )  # with the legend's
    assert all(address.startswith("data:image/") for address in re.findall('src="([^"]*)', made))
    made.encode()
