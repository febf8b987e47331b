"""Images beside their nearest: which those are, which queries are shown, names of any kind, each mistake's sentence."""

import json
import os
import re
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from conftest import environment
from PIL import Image

from moco import neighbours as door
from moco.cli.looking import parse_neighbours
from moco.data import ArraySource, Labelled, open_sources
from moco.data.sources import decode
from moco.eval import nearest, neighbours
from moco.eval.features import Features
from moco.models.encoder import features
from moco.pictures import grid

pytestmark = pytest.mark.usefixtures("alone")
FLAGS = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0"]


@pytest.fixture
def ask(saved, tmp_path):
    """``ask(DIR, flags)``: what neighbours.json holds."""

    def asked(*words: object) -> dict:
        assert door.main([saved, *map(str, words), *FLAGS, "--out", str(tmp_path / "out")]) == 0
        return json.loads((tmp_path / "out" / "neighbours.json").read_text())

    return asked


def unit_features(encoder, source) -> np.ndarray:
    """(n, F) of length one."""
    images = torch.stack([Labelled(source, 16)[0, i]["image"] for i in range(len(source))]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        x = features(encoder, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1)).double().numpy()
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def names(found: dict) -> list[str]:
    return [query["name"] for query in found["queries"]]


# ------------------------------------------------------------------------------------------------ which they are


def test_neighbours_of_held_out_images_are_the_nearest_training_images(ask, encoder, hard_folder, tmp_path):
    sources, k = open_sources(path=str(hard_folder)), 5
    train, val = sources.train, sources.val
    s = unit_features(encoder, val) @ unit_features(encoder, train).T
    order = np.argsort(-s, axis=1)[:, :k]
    found = ask(hard_folder, "--queries", 15, "--k", k)
    assert names(found) == [val.name_of(i) for i in range(15)]
    for i, query in enumerate(found["queries"]):
        assert [one["name"] for one in query["neighbours"]] == [train.name_of(int(j)) for j in order[i]]
        assert [one["similarity"] for one in query["neighbours"]] == pytest.approx(s[i, order[i]], abs=1e-5)
        assert query["class"] in query["name"]
        assert all(f"/{one['class']}/" in one["name"] for one in query["neighbours"])
    right = train.labels[order] == val.labels[:, None]
    frames = re.findall(r'<figure tabindex="0" class="(\w+)"', (tmp_path / "out" / "neighbours.html").read_text())
    assert frames == [mark for row in right for mark in ["query", *np.where(row, "right", "wrong")]]
    assert found["same_class"] == pytest.approx(100 * right.mean())
    assert (found["searched_queries"], found["searched_images"], found["k"]) == (15, 24, k)


def test_of_one_set_an_image_and_its_copies_are_not_its_neighbours(ask, hard_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted((hard_folder / "train").rglob("*.png"))[:6]):
        shutil.copy(path, flat / f"{i}.png")
    shutil.copy(flat / "2.png", flat / "copy.png")
    found = ask(flat, "--queries", 7)
    assert sorted(map(os.path.basename, names(found))) == [*(f"{i}.png" for i in range(6)), "copy.png"]
    for query in found["queries"]:
        near = [os.path.basename(one["name"]) for one in query["neighbours"]]
        own = os.path.basename(query["name"])
        copies = {"2.png", "copy.png"} if own in ("2.png", "copy.png") else {own}
        assert set(near) == {*(f"{i}.png" for i in range(6)), "copy.png"} - copies  # k is above what there is
        similarities = [one["similarity"] for one in query["neighbours"]]
        assert similarities == sorted(similarities, reverse=True) and query["class"] is None
    assert found["same_class"] is None
    assert "2 copies of queries are left out" in capsys.readouterr().out


def test_one_image_has_no_neighbour_and_unreadable_ones_are_no_queries(ask, saved, hard_folder, tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / "data" / name).mkdir(parents=True)
    shutil.copy(hard_folder / "train" / "class0" / "0.png", tmp_path / "data" / "one")
    found = ask(tmp_path / "data" / "one")
    assert [query["neighbours"] for query in found["queries"]] == [[]]
    (tmp_path / "data" / "two" / "broken.png").write_text("no image")
    assert [query["class"] for query in ask(tmp_path / "data")["queries"]] == ["one"]
    capsys.readouterr()
    words = [saved, str(tmp_path / "data"), "--class", "two", *FLAGS, "--out", str(tmp_path / "none")]
    assert door.main(words) == 2
    assert capsys.readouterr().err == f"error: none of the queries in {tmp_path / 'data'} can be read; choose others.\n"


def test_unlabelled_images_have_no_frames(ask, hard_folder, tmp_path):
    ask(hard_folder / "train" / "class0", "--queries", 2, "--k", 3)
    text = (tmp_path / "out" / "neighbours.html").read_text()
    body = text.partition("<body>")[2]
    assert body.count('<figure tabindex="0" class=""') == 6 and body.count('<figure tabindex="0" class="query"') == 2
    assert "<table" not in body and "by chance" not in body


def test_a_collapsed_encoder_takes_its_queries_for_no_copies():
    """All similarities are one; files tell copies from others. Of equals the first images come first."""
    source = open_array(6)
    queries = Features(torch.ones(6, 3), torch.zeros(6).long(), torch.arange(6), torch.ones(6).bool())
    found = nearest.Nearest(source, source, 6, *nearest.search(queries, queries, 6))
    assert found.leave_out(3) == 0
    assert found.near.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


def open_array(n: int, classes: int = 2):
    images = np.random.default_rng(0).integers(0, 255, (n, 8, 8), dtype=np.uint8)
    return ArraySource("array", images, classes=[str(i) for i in range(classes)], labels=np.arange(n) % classes)


def test_of_two_equal_shares_of_wrong_neighbours_the_more_similar_is_worse():
    source = open_array(6)  # classes 0 1 0 1 0 1
    s = np.array([[0.9, 0.8], [0.7, 0.6], [0.9, 0.85], [0.95, -np.inf]])
    near = np.array([[2, 4], [0, 2], [1, 3], [4, 0]])
    found = nearest.Nearest(source, source, 6, np.array([0, 1, 2, 3]), s, near)
    assert found.right.tolist() == [[True, True], [False, False], [False, False], [False, False]]
    assert found.worst(3).tolist() == [2, 1, 3]
    assert found.share() == pytest.approx(100 * 2 / 7)
    assert found.by_chance() == pytest.approx(100 * 2 / 5)


# ------------------------------------------------------------------------------------------------- which queries


def test_the_seed_draws_queries_and_a_class_limits_them(ask, hard_folder):
    one, again, other = (ask(hard_folder, "--queries", 4, "--seed", seed) for seed in (0, 0, 1))
    assert one == again and names(one) != names(other)
    few = ask(hard_folder, "--queries", 9, "--class", "class1")
    assert len(names(few)) == few["searched_queries"] == 5 and {q["class"] for q in few["queries"]} == {"class1"}


def test_the_worst_come_first(ask, hard_folder):
    every = ask(hard_folder, "--queries", 15, "--k", 4)["queries"]
    wrong = {q["name"]: sum(one["class"] != q["class"] for one in q["neighbours"]) for q in every}
    found = names(ask(hard_folder, "--worst", "--queries", 6, "--k", 4))
    assert [wrong[name] for name in found] == sorted(wrong.values(), reverse=True)[:6]


def test_more_images_than_are_searched_are_drawn_from(ask, hard_folder, monkeypatch, capsys):
    monkeypatch.setattr(nearest, "SEARCHED", 7)
    assert ask(hard_folder, "--queries", 15)["searched_queries"] == 7
    assert "7 queries drawn from 15, 24 images searched" in capsys.readouterr().out


def test_pictures_of_ones_own_of_any_format_and_shape(ask, hard_folder, tmp_path):
    """The first is a copy of a training image, which is no neighbour then; TGA and ICO are in no data set."""
    shutil.copy(hard_folder / "train" / "class0" / "0.png", tmp_path / "mine.png")
    Image.new("RGBA", (300, 20), "red").save(tmp_path / "wide.tga")
    Image.new("L", (32, 64), 9).save(tmp_path / "grey.ico")
    own = [str(tmp_path / name) for name in ("mine.png", "wide.tga", "grey.ico")]
    found = ask(hard_folder, *own, "--k", 3)
    assert names(found) == own
    near = [[one["name"] for one in query["neighbours"]] for query in found["queries"]]
    assert [len(one) for one in near] == [3, 3, 3] and str(hard_folder / "train" / "class0" / "0.png") not in near[0]
    assert all("/train/" in name for name in sum(near, []))
    assert found["same_class"] is None and found["queries"][0]["neighbours"][0]["class"].startswith("class")


def test_beside_a_named_set_the_first_file_is_a_picture_too(tmp_path):
    (tmp_path / "own.png").write_text("")
    args = parse_neighbours(["C", "--dataset", "mnist5k", str(tmp_path / "own.png"), "other.png"])
    assert (args.data, args.images) == (None, [str(tmp_path / "own.png"), "other.png"])
    args = parse_neighbours(["C", str(tmp_path), "--k", "3", "one.png", "--seed", "1", "two.png"])
    assert (args.data, args.images, args.queries, args.k) == (str(tmp_path), ["one.png", "two.png"], 2, 3)


# ------------------------------------------------------------------------------------------------------ the files

HOSTILE = ["<img src=x onerror=alert(1)>", os.fsdecode(b"d\xf6g"), "\N{CJK UNIFIED IDEOGRAPH-4E2D}", "$\\frac{x$"]


@pytest.fixture(scope="module")
def hostile(saved, tmp_path_factory):
    """The files of a set whose classes and files are called what pages and figures would obey."""
    root = tmp_path_factory.mktemp("hostile")
    rng = np.random.default_rng(0)
    for name in HOSTILE:
        (root / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (500, 700, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f'"><script>alert({i})<.jpg')
    with pytest.MonkeyPatch.context() as patch:
        for name in set(os.environ) - set(environment()):
            patch.delenv(name)
        words = [saved, str(root / "data"), *FLAGS, "--queries", "5", "--k", "4", "--out", str(root / "out")]
        assert door.main(words) == 0
    return root / "out"


def test_names_of_any_kind_stay_text_and_a_pointer_enlarges_an_image(hostile, browse):
    page = browse(hostile / "neighbours.html")
    assert page.locator("figure").count() == 25
    assert page.locator("figure.query").count() == 5
    assert page.evaluate("document.querySelectorAll('figure script, figure img img, p img').length") == 0
    assert page.locator("body > table tr").count() == 5  # with the head
    box, figure = page.locator("#enlarged"), page.locator("figure").nth(1)
    assert box.is_hidden()
    figure.hover()
    assert re.fullmatch(r"similarity 0\.\d{4}, .*: /.*/\"><script>alert\(\d\)<\.jpg", box.text_content().strip())
    assert box.locator("img").evaluate("image => image.naturalWidth") == grid.ENLARGED
    figure.click()
    page.locator("h1").hover()
    assert box.is_visible()  # a click keeps it
    page.keyboard.press("Escape")
    assert box.is_hidden()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert box.is_visible()


def test_programs_read_the_same_names(hostile):
    found = json.loads((hostile / "neighbours.json").read_text())
    assert {query["class"] for query in found["queries"]} <= set(HOSTILE)
    assert all(os.path.isfile(one["name"]) for query in found["queries"] for one in [query, *query["neighbours"]])


def test_large_images_are_kept_small(hostile):
    with Image.open(hostile / "neighbours.png") as image:
        assert image.size == (2 * grid.MARGIN + 5 * 110 - grid.GAP, image.height)
    assert (hostile / "neighbours.html").stat().st_size < 12 * 100_000  # noise of 700 x 500 pixels, 12 images in all


# ------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["{folder}", "{text}"],
            r"text.png cannot be a query \(begins with the text .* and is no image\); give a picture",
        ),
        (["{folder}", "{gone}"], r"gone.png cannot be a query \(No such file or directory\)"),
        (["{gone}", "--dataset", "mnist5k"], r"gone.png cannot be a query \(No such file or directory\)"),
        (["{folder}", "{folder}"], r"cannot be a query \(Is a directory\)"),
        (["{folder}", "{huge}"], r"huge.png cannot be a query \(300 x 300 pixels are above the limit of 40,000\)"),
        (["{folder}", "{eps}"], r"drawing.eps cannot be a query \(is PostScript, which is not read: convert it\)"),
        (["{folder}", "--class", "class"], r"--class class: .*val has no such class; did you mean class"),
        (["{flat}", "--class", "red"], "--class goes by classes, and .* has none; leave it out"),
        (["{flat}", "--worst"], "--worst goes by classes, and .* has none; leave it out"),
        (["{flat}", "--split", "val"], "--split val: "),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_code_2(
    words, sentence, saved, hard_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(decode, "PIXELS", 40_000)
    (tmp_path / "text.png").write_text("no image")
    Image.new("RGB", (300, 300)).save(tmp_path / "huge.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "drawing.eps")
    paths = {name: tmp_path / f"{name}.png" for name in ("text", "gone", "huge")} | {"eps": tmp_path / "drawing.eps"}
    paths |= {"folder": hard_folder, "flat": hard_folder / "train" / "class0"}
    words = [word.format(**paths) for word in words]
    assert door.main([saved, *words, *FLAGS, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["C"], "give a checkpoint, and an image folder"),
        (["C", "DIR", "--k", "0"], "--k must be at least 1"),
        (["C", "DIR", "a.png", "--worst"], "--worst chooses queries from the data set; leave it out"),
        (["C", "DIR", "a.png", "--queries", "3"], "--queries chooses queries from the data set; leave it out"),
        (["C", "DIR", "--queries", "400"], "400 queries with 10 neighbours each are more than 2,000 images"),
    ],
)
def test_wrong_flags_end_with_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_neighbours(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


# ------------------------------------------------------------------------------------------------ several processes


def command(words: list[str], _: object) -> None:
    neighbours.neighbours_worker(parse_neighbours(words))


@pytest.mark.dist
def test_two_processes_find_what_one_does(ask, saved, hard_folder, tmp_path, start):
    """Of one set, whose queries lie where the process's share of the images does."""
    words = [str(hard_folder), "--split", "train", "--queries", "9", "--class", "class1", "--k", "4"]
    program = start("--nproc", 2, "unused", main=partial(command, [saved, *words, *FLAGS, "--out", str(tmp_path)]))
    one = ask(*words)
    assert program.end() == 0, program.text
    two = json.loads((tmp_path / "neighbours.json").read_text())
    assert names(two) == names(one) and two["same_class"] == one["same_class"] and two["searched_images"] == 24
    for mine, other in zip(one["queries"], two["queries"], strict=True):
        assert [near["name"] for near in mine["neighbours"]] == [near["name"] for near in other["neighbours"]]
