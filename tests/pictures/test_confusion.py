"""Confusion matrices: what is counted, written, read back and drawn, with few classes and with many."""

import warnings

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.confusions import read_confusion

from moco import files
from moco.pictures import confusion

FEW = np.array([[8, 2, 0], [1, 0, 0], [0, 0, 0]])


def test_counts_are_a_loops():
    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, (2, 50))
    expected = np.zeros((5, 5), int)
    for label, other in zip(labels, predicted, strict=True):
        expected[label, other] += 1
    assert confusion.count_confusions(labels, predicted, 5).tolist() == expected.tolist()


def test_the_worst_pairs_are_those_of_most_images():
    matrix = np.array([[90, 10, 0], [4, 1, 5], [0, 10, 10]])
    found = confusion.worst_pairs(matrix, 3)
    assert [pair[:3] for pair in found] == [(2, 1, 10), (0, 1, 10), (1, 2, 5)]  # of equals the larger share first
    assert [pair.share for pair in found] == [0.5, 0.1, 0.5]
    assert confusion.worst_pairs(np.diag([3, 4]), 5) == []


def test_the_table_has_names_and_counts(tmp_path):
    names = ["<img onerror=x>", 'a,"b"', "c\nd"]
    told = confusion.write_confusion(FEW, names, str(tmp_path / "made"), "it")
    assert told.startswith(f"{tmp_path / 'made.csv'} and made.png beside it; most images taken wrongly: ")
    text = (tmp_path / "made.csv").read_text()
    matrix, classes = read_confusion(text)
    assert (matrix.tolist(), classes) == (FEW.tolist(), names)


def drawn(monkeypatch, matrix: np.ndarray, names: list[str], path: str) -> tuple[Figure, list[str]]:
    """The figure, and all its text that is not empty."""
    kept = []
    original = files.write_figure
    monkeypatch.setattr(files, "write_figure", lambda figure, *more: (kept.append(figure), original(figure, *more)))
    confusion.draw_confusion(matrix, names, path, "the probe at lr 3")
    (figure,) = kept
    texts = [artist.get_text() for artist in figure.findobj(lambda artist: hasattr(artist, "get_text"))]
    return figure, list(filter(None, (text if isinstance(text, str) else text.get_text() for text in texts)))


def test_few_classes_have_percent_and_count_in_each_cell(monkeypatch, tmp_path):
    _, texts = drawn(monkeypatch, FEW, ["cat", "dog", "eel"], str(tmp_path / "few.png"))
    for wanted in ("80.0", "8", "20.0", "2", "100.0", "1", "cat (10)", "eel (0)", "no images"):
        assert wanted in texts
    assert "0.0" not in texts  # a cell without images stays empty
    assert any("the probe at lr 3\n8 of 11 images right (72.73 %)" in text for text in texts)
    with Image.open(tmp_path / "few.png") as picture:
        assert min(picture.size) > 300


@pytest.mark.parametrize(("classes", "numbers"), [(40, True), (41, False), (101, False)])
def test_numbers_stand_in_cells_while_they_can_be_read_and_then_a_list_does(classes, numbers, monkeypatch, tmp_path):
    matrix = np.eye(classes, dtype=int) * 60
    matrix[7, 9] = 31
    figure, texts = drawn(monkeypatch, matrix, [f"kind{i}" for i in range(classes)], str(tmp_path / "many.png"))
    assert ("34" in texts) == numbers
    assert ({"kind7", "kind9", "31", "34.1 %"} <= set(texts)) == (not numbers)
    pixels = figure.axes[0].images[0].get_array()
    assert len(pixels) == classes
    right, wrong, none = pixels[0, 0], pixels[7, 9], pixels[9, 7]
    assert right[2] > right[0] + 0.3 and wrong[0] > wrong[2] + 0.3 and none.tolist() == [1, 1, 1]


def test_of_very_many_classes_a_cell_shows_the_largest_share_of_several():
    shares = np.eye(600)
    shares[500, 11] = 0.5
    pixels = confusion._pixels(shares, 3)
    assert pixels.shape == (200, 200, 3)
    assert pixels[166, 3].tolist() == pytest.approx(confusion._pixels(shares, 1)[500, 11].tolist())


def test_names_that_the_font_lacks_or_that_are_long_or_alike_stay_apart():
    names = ["cat", "a very long name of a class, one", "a very long name of a class, and one", "猫", "犬 dog", "$x$"]
    shown = confusion.drawable(names)
    assert shown[0] == "cat"
    assert max(map(len, shown)) <= confusion.LETTERS + 3
    assert len(set(shown)) == len(names)
    assert shown[3:] == ["3: 猫", "4: 犬 dog", r"\$x\$"]
    assert shown[1] == "a very l…lass, one"
    alike = confusion.drawable(["the same beginning 1 the same end", "the same beginning 2 the same end"])
    assert alike[0][:3] == "0: " and alike[1][:3] == "1: "


def test_odd_names_are_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        names = ["猫", "$\\frac{$", "\x1b[31m", "\udcff"]
        confusion.draw_confusion(np.eye(4, dtype=int), names, str(tmp_path / "odd.png"), "猫 $x")
