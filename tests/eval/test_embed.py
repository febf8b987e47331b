"""Features as files, their picture and page; each mistake's sentence."""

import base64
import io
import json
import os
import re
import sys
import types
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import environment, save_pretrained
from PIL import Image
from safetensors import safe_open
from support.browser import data_of

from moco import embed as embed_door
from moco import files
from moco.cli.commands import parse_embed
from moco.data import Labelled, open_sources
from moco.errors import UserError
from moco.eval import embed
from moco.models.encoder import build_encoder, features
from moco.pictures.scatter import scatter

pytestmark = pytest.mark.usefixtures("alone")
TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0"]


@pytest.fixture(scope="module")
def done(saved, image_folder, tmp_path_factory):
    """All 24 training images in files of both kinds, 15 of them in the picture."""
    out = tmp_path_factory.mktemp("out")
    words = [saved, *TINY, str(image_folder), "--split", "train", "--points", "15", "--out", str(out)]
    for kind in ("npz", "safetensors"):
        with pytest.MonkeyPatch.context() as patch:
            for name in set(os.environ) - set(environment()):
                patch.delenv(name)
            assert embed_door.main([*words, "--format", kind, *(["--picture", "none"] if kind == "npz" else [])]) == 0
    return out


# ------------------------------------------------------------------------------------------------------ the files


def test_features_are_the_encoders_and_carry_their_names(done, encoder, image_folder):
    source = open_sources(path=str(image_folder)).train
    assert source is not None
    names = [source.name_of(i) for i in range(24)]
    images = torch.stack([Labelled(source, 16)[0, i]["image"] for i in range(24)]) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = features(encoder, (images - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    with np.load(done / "features.npz") as file:  # without pickle: nothing but arrays
        assert np.allclose(file["features"], expected, atol=1e-5)
        assert file["features"].dtype == np.float32
        assert file["labels"].tolist() == source.labels.tolist()
        assert file["names"].tolist() == names
        assert file["classes"].tolist() == ["blue", "red"]
    with safe_open(done / "features.safetensors", "np") as file, np.load(done / "features.npz") as same:
        assert np.array_equal(file.get_tensor("features"), same["features"])
        assert np.array_equal(file.get_tensor("labels"), same["labels"])
        assert bytes(file.get_tensor("names")).decode().split("\0") == names
        assert json.loads(file.metadata()["classes"]) == ["blue", "red"]
    assert sorted(os.listdir(done)) == ["embedding.html", "embedding.png", "features.npz", "features.safetensors"]


class Page(HTMLParser):
    """What the page holds, and every tag that is not closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.addresses = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "link", "input"):
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, tag, attrs):
        loading = ("src", "href", "srcset")
        self.addresses += [value for name, value in attrs.items() if name in loading and value != "data:,"]


def shown(folder) -> list[dict]:
    """Of each image of a folder's embedding.html its name, class, place, neighbours by name, and the copy of it."""
    text = (folder / "embedding.html").read_text()
    data, (sheet,) = data_of(text), [a for a in Page(text).addresses if a.startswith("data:image")]
    assert sheet.startswith("data:image/jpeg;base64,")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sheet.split(",")[1]))))
    cell, columns, places = data["sheets"]["cell"], data["sheets"]["columns"], data["maps"][0]["points"]
    found = []
    for i, name in enumerate(data["names"]):
        (width, height), x, y = data["sheets"]["sizes"][2 * i :][:2], i % columns * cell, i // columns * cell
        found.append({
            "name": name, "class": data["classes"][data["labels"][i]] if data["classes"] else "",
            "place": places[2 * i : 2 * i + 2], "copy": pixels[y : y + height, x : x + width],
            "nearest": [data["names"][other] for other in data["maps"][0]["neighbours"][i]],
        })  # fmt: skip
    return found


def test_a_picture_of_classes_with_any_name(tmp_path):
    """Bytes that are not UTF-8, and what matplotlib would take for a formula."""
    names = [os.fsdecode(b"d\xf6g"), r"$\frac$", "$", "\x1b[31m"]
    scatter([(names[0], np.zeros((4, 2)), np.arange(4))], names, str(tmp_path / "embedding.png"))
    with Image.open(tmp_path / "embedding.png") as image:
        assert image.width > 100


def test_the_page_holds_every_image_and_loads_nothing(done, image_folder):
    text = (done / "embedding.html").read_text()
    found = Page(text)
    assert found.open == []
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    assert "default-src 'none'" in text
    images = shown(done)
    assert len({image["name"] for image in images}) == 15
    for image in images:
        assert os.path.isfile(image_folder / "train" / image["name"])
        assert image["name"].startswith(image["class"] + "/")
        assert image["copy"].shape == (20, 20, 3)
        assert (image["copy"].mean((0, 1)).argmax() == 0) == (image["class"] == "red")  # the image that it names
        assert all(0 <= at <= 65535 for at in image["place"])
    assert str(image_folder / "train") in text  # what all names begin with
    with Image.open(done / "embedding.png") as image:
        assert image.format == "PNG"


def test_the_page_has_the_nearest_by_cosine(done):
    """By numpy, of the features in the file."""
    with np.load(done / "features.npz") as file:
        root = os.path.commonpath([*file["names"]])
        x = {os.path.relpath(name, root): row for name, row in zip(file["names"], file["features"], strict=True)}
    images = shown(done)
    for image in images:
        cosine = {
            other["name"]: x[image["name"]] @ x[other["name"]] / np.linalg.norm(x[other["name"]])
            for other in images if other is not image
        }  # fmt: skip
        assert image["nearest"] == sorted(cosine, key=cosine.get, reverse=True)[: embed.NEIGHBOURS]


def test_a_second_checkpoint_has_a_map_of_the_same_images_beside(done, saved, image_folder, tmp_path, browse):
    torch.manual_seed(1)
    other = save_pretrained(tmp_path / "other.pth.tar", build_encoder("test_resnet", 16, size=16).eval())
    words = [*TINY, str(image_folder), "--split", "train", "--points", "15"]
    out = [tmp_path / name for name in ("pair", "alone")]
    assert embed_door.main([saved, *words, "--beside", str(other), "--out", str(out[0])]) == 0
    assert embed_door.main([str(other), *words, "--out", str(out[1])]) == 0
    pair, first, second = (data_of((folder / "embedding.html").read_text()) for folder in (out[0], done, out[1]))
    assert [one["title"] for one in pair["maps"]] == [saved, str(other)]
    assert pair["names"] == first["names"] == second["names"]
    assert pair["maps"][0]["neighbours"] == first["maps"][0]["neighbours"]
    assert pair["maps"][1]["neighbours"] == second["maps"][0]["neighbours"] != first["maps"][0]["neighbours"]
    with np.load(out[0] / "features.npz") as file, np.load(done / "features.npz") as same:
        assert np.array_equal(file["features"], same["features"])  # the first one's
    page = browse(out[0] / "embedding.html")
    assert page.locator("section h2").all_text_contents() == [saved, str(other)]


def test_maps_are_turned_onto_the_first_one():
    rng = np.random.default_rng(0)
    onto = rng.standard_normal((30, 2)) * (3, 1) + 5
    turned = 4 * (onto - 1) @ np.array([[0.6, 0.8], [0.8, -0.6]])  # a reflection, another size and place
    assert np.allclose(embed.aligned(turned, onto), onto)
    noisy = turned + rng.standard_normal((30, 2))
    best = np.sum((embed.aligned(noisy, onto) - onto) ** 2)
    one = noisy - noisy.mean(0)
    for angle in np.linspace(0, 2 * np.pi, 50):  # none of 100 others lies nearer
        c, s = np.cos(angle), np.sin(angle)
        for turn in ([[c, s], [-s, c]], [[c, s], [s, -c]]):
            other = one @ np.array(turn) * np.linalg.norm(onto - onto.mean(0)) / np.linalg.norm(one) + onto.mean(0)
            assert best <= np.sum((other - onto) ** 2) + 1e-9
    assert np.isfinite(embed.aligned(np.zeros((3, 2)), onto[:3])).all()


def test_the_same_seed_chooses_the_same_images(saved, image_folder, tmp_path):
    def points(folder, *words):
        out = tmp_path / folder
        flags = ["--split", "train", "--points", "12", "--out", str(out), *words]
        assert embed_door.main([saved, *TINY, str(image_folder), *flags]) == 0
        return [(image["name"], image["place"]) for image in shown(out)]

    one, again, other = points("a"), points("b"), points("c", "--seed", "1")
    assert one == again
    assert {name for name, *_ in one} != {name for name, *_ in other}


def test_images_without_labels_and_unreadable_ones(saved, image_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[:12]):
        (flat / f"{i:02d}.png").write_bytes(path.read_bytes() if i != 4 else b"no image")
    words = [saved, str(flat), *TINY, "--out", str(tmp_path / "out")]
    assert embed_door.main(words) == 0
    with np.load(tmp_path / "out" / "features.npz") as file:
        assert file["labels"].tolist() == [-1] * 11
        assert [os.path.basename(name) for name in file["names"]] == [f"{i:02d}.png" for i in range(12) if i != 4]
        assert file["classes"].tolist() == []
    assert [(image["name"], image["class"]) for image in shown(tmp_path / "out")] == [
        (f"{i:02d}.png", "") for i in range(12) if i != 4
    ]
    assert "unreadable image left out: " + str(flat / "04.png") in capsys.readouterr().out


def test_held_out_images_come_first_and_one_set_is_taken_whole(image_folder):
    pair, one = open_sources(path=str(image_folder)), open_sources(path=str(image_folder / "val"))
    assert embed.choose_source(pair, None) is embed.choose_source(pair, "val") is pair.val
    assert embed.choose_source(pair, "train") is pair.train
    assert embed.choose_source(one, None) is embed.choose_source(one, "train") is one.pretrain


# ------------------------------------------------------------------------------------------------ two dimensions


@pytest.mark.parametrize("x", [np.zeros((12, 5)), np.full((12, 5), 0.3, np.float32)], ids=["zero", "equal"])
def test_a_collapsed_encoder_is_said(x, capsys):
    assert not embed.project(x).any()
    assert "a collapse" in capsys.readouterr().out


def test_tsne_keeps_classes_together_and_repeats_itself():
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = 4 * np.eye(8)[labels] + rng.standard_normal((60, 8)) * rng.uniform(0.1, 1)
    points = embed.project(x * rng.uniform(0.5, 2, (60, 1)), seed=1)  # lengths do not matter
    apart = np.linalg.norm(points[:, None] - points[None], axis=2) + 1e9 * np.eye(60)
    assert (labels[apart.argmin(1)] == labels).all()
    assert np.array_equal(embed.project(x, seed=1), embed.project(3.0 * x, seed=1))


@pytest.mark.parametrize(("method", "module", "maker"), [("umap", "umap", "UMAP"), ("pacmap", "pacmap", "PaCMAP")])
def test_an_extra_gets_unit_rows_and_the_seed(method, module, maker, monkeypatch):
    """A stand-in with the package's interface; the packages themselves take minutes to install and compile."""
    seen = {}

    class Reducer:
        def __init__(self, **settings):
            seen.update(settings)

        def fit_transform(self, x):
            assert np.allclose(np.linalg.norm(x, axis=1), 1)
            return x[:, :2]

    fake = types.ModuleType(module)
    setattr(fake, maker, Reducer)
    monkeypatch.setitem(sys.modules, module, fake)
    x = np.random.default_rng(0).standard_normal((12, 5))
    assert embed.project(x, method, 7).shape == (12, 2)
    assert seen["random_state"] == 7
    assert 0 < seen["n_neighbors"] < 12


# ---------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--picture", "umap"], "needs the package umap-learn: run `pip install '.\\[umap\\]'`"),
        (["--picture", "pacmap"], "needs the package pacmap: run `pip install '.\\[pacmap\\]'`"),
        (["-a", "resnet18"], "does not fit the encoder"),
        (["--beside", "{file}"], "file is no readable checkpoint"),
        (["--out", "{file}/x"], "cannot be made .* choose another"),
        ([], "a picture needs 10 images, not 8; --picture none writes features alone"),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_code_2(words, sentence, saved, image_folder, tmp_path, monkeypatch,
                                                      capsys):  # fmt: skip
    for name in ("umap", "pacmap"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    (tmp_path / "file").write_text("")
    train = ["--split", "train"] if words else []  # the 8 held-out images are too few for a picture
    words = [word.format(file=tmp_path / "file") for word in ["--out", str(tmp_path / "out"), *words]]
    assert embed_door.main([saved, str(image_folder), *TINY, *train, *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(sentence, line)


def test_a_full_disk_leaves_the_older_file(tmp_path):
    path = tmp_path / "features.npz"
    path.write_text("older")

    def full():
        with files.replacing(str(path), "--out") as beside, open(beside, "w") as file:
            file.write("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left on device.*choose another --out"):
        full()
    assert [p.name for p in tmp_path.iterdir()] == ["features.npz"]
    assert path.read_text() == "older"


def test_one_set_has_no_held_out_images(saved, image_folder, tmp_path, capsys):
    words = [saved, str(image_folder / "val"), *TINY, "--split", "val", "--out", str(tmp_path)]
    assert embed_door.main(words) == 2
    assert "--split val: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give a checkpoint, and an image folder"),
        (["x.pth"], "give a checkpoint, and an image folder"),
        (["x.pth", "DIR", "--picture", "none", "--beside", "y.pth"], "--beside draws a second map"),
        (["x.pth", "DIR", "--points", "3"], "--points must be at least 10"),
        (["x.pth", "DIR", "--size", "1"], "--size must be at least 8"),
        (["x.pth", "DIR", "--picture", "pca"], "--picture: invalid choice"),
    ],
)
def test_wrong_flags_end_with_exit_code_2(words, sentence, capsys):
    with pytest.raises(SystemExit) as ended:
        parse_embed(words)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert sentence in line


@pytest.mark.parametrize(
    "words",
    [
        ["C", "DIR", "-a", "resnet18", "--mean", ".5"],
        ["C", "-a", "resnet18", "DIR", "--mean", ".5"],
        ["-a", "resnet18", "C", "--mean", ".5", "DIR"],
        ["--mean", ".5", "C", "-a", "resnet18", "DIR"],
    ],
)
def test_flags_may_stand_anywhere(words):
    args = parse_embed(words)
    assert (args.checkpoint, args.data, args.arch, args.mean) == ("C", "DIR", "resnet18", [0.5])
