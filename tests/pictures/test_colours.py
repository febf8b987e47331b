"""The colours of classes can be told apart, by colour-blind readers too, on a light page and on a dark one."""

import re
from itertools import combinations

import numpy as np
import pytest

from moco.pictures import colours
from moco.pictures.page import ASSETS

# Machado, Oliveira and Fernandes 2009, severity 1: linear RGB as it is seen.
SEEN = {
    "by most": "1 0 0 0 1 0 0 0 1",
    "without red cones": "0.152286 1.052583 -0.204868 0.114503 0.786281 0.099216 -0.003882 -0.048116 1.051998",
    "without green cones": "0.367322 0.860646 -0.227968 0.280085 0.672501 0.047413 -0.011820 0.042940 0.968881",
    "without blue cones": "1.255528 -0.076749 -0.178779 -0.078411 0.930809 0.147602 0.004733 0.691367 0.303900",
}
XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
)


def linear(colour: str) -> np.ndarray:
    """sRGB as light, each channel in 0..1."""
    c = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)


def lab(light: np.ndarray) -> np.ndarray:
    """CIELAB under D65."""
    x = XYZ @ light.clip(0, 1) / (0.95047, 1, 1.08883)
    f = np.where(x > (6 / 29) ** 3, np.cbrt(x), x / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def contrast(one: str, other: str) -> float:
    """Of WCAG 2."""
    low, high = sorted(float(XYZ[1] @ linear(colour)) + 0.05 for colour in (one, other))
    return high / low


def grounds() -> list[str]:
    with open(f"{ASSETS}/page.css") as file:
        found = re.findall("--ground: (#[0-9a-f]{6})", file.read())
    assert len(found) == 2  # light and dark
    return found


@pytest.mark.parametrize("eyes", SEEN)
def test_two_classes_differ(eyes):
    """A distance of 2.3 in CIELAB is just seen."""
    matrix = np.array(SEEN[eyes].split(), dtype=float).reshape(3, 3)
    together = ("query", "right", "wrong"), ("query", "positive", "false")  # the marks of one picture
    for found in (colours.CLASSES, *([colours.MARKS[name].colour for name in names] for names in together)):
        seen = [lab(matrix @ linear(colour)) for colour in found]
        assert min(np.linalg.norm(a - b) for a, b in combinations(seen, 2)) > 15


def test_all_stand_out_in_light_and_dark():
    for ground in grounds():
        assert min(contrast(colour, ground) for colour in colours.CLASSES) > 2.2
        assert min(contrast(mark.colour, ground) for mark in colours.MARKS.values()) > 3


def test_marks_differ_without_colour():
    assert len({mark.sign for mark in colours.MARKS.values()}) == len(colours.MARKS)
    for good, bad in (("right", "wrong"), ("positive", "false")):
        assert colours.MARKS[good].line != colours.MARKS[bad].line


def test_a_page_knows_them_all():
    assert colours.style().count(": #") == len(colours.CLASSES) + 2 * len(colours.MARKS)
    assert colours.colour_of(3) == colours.colour_of(13) != colours.colour_of(4)
