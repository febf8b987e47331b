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

from moco import embed as embed_door
from moco import files
from moco.cli.commands import parse_embed
from moco.data import Labelled, open_sources
from moco.errors import UserError
from moco.eval import embed
from moco.models.encoder import build_encoder, features
from moco.pictures.scatter import scatter
from moco.pictures.thumbnails import thumbnail

pytestmark = pytest.mark.usefixtures("alone")
TINY = ["-a", "test_resnet", "--size", "16", "-b", "8", "-j", "0"]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return build_encoder("test_resnet", 16, size=16).eval()


@pytest.fixture(scope="module")
def pretrained(encoder, tmp_path_factory):
    return save_pretrained(tmp_path_factory.mktemp("pretrained") / "checkpoint_0001.pth.tar", encoder)


@pytest.fixture(scope="module")
def done(pretrained, image_folder, tmp_path_factory):
    """All 24 training images in files of both kinds, 15 of them in the picture."""
    out = tmp_path_factory.mktemp("out")
    words = [str(pretrained), *TINY, str(image_folder), "--split", "train", "--points", "15", "--out", str(out)]
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
        self.open, self.points, self.addresses = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag, attrs):
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def _note(self, tag, attrs):
        loading = ("src", "href", "data-image", "srcset")
        self.addresses += [value for name, value in attrs.items() if name in loading and value != "data:,"]
        if tag == "circle":
            self.points.append(attrs)


def test_a_picture_of_classes_with_any_name(tmp_path):
    """Bytes that are not UTF-8, and what matplotlib would take for a formula."""
    names = [os.fsdecode(b"d\xf6g"), r"$\frac$", "$", "\x1b[31m"]
    scatter([(names[0], np.zeros((4, 2)), np.arange(4))], names, str(tmp_path / "embedding.png"))
    with Image.open(tmp_path / "embedding.png") as image:
        assert image.width > 100


def test_the_page_holds_every_point_and_loads_nothing(done, image_folder):
    text = (done / "embedding.html").read_text()
    found = Page(text)
    assert found.open == []
    assert len(found.points) == 15
    assert all(address.startswith("data:image/jpeg;base64,") for address in found.addresses)
    assert not re.search(r"https?:|url\(|@import|fetch\(", text)
    assert "default-src 'none'" in text
    for point in found.points:
        label, name = point["data-text"].split(": ", 1)
        assert f"/{label}/" in name and os.path.isfile(name)
        image = Image.open(io.BytesIO(base64.b64decode(point["data-image"].split(",")[1])))
        assert (image.format, image.size) == ("JPEG", (20, 20))
        assert (np.asarray(image).mean((0, 1)).argmax() == 0) == (label == "red")  # the image that it names
        assert 0 < float(point["cx"]) < 1000 and 0 < float(point["cy"]) < 1000
    assert len({point["data-text"] for point in found.points}) == 15
    colours = {(point["data-text"].split(":")[0], point["fill"]) for point in found.points}
    assert len(colours) == 2  # a colour a class
    with Image.open(done / "embedding.png") as image:
        assert image.format == "PNG"


def test_the_page_shows_the_image_under_the_pointer(done, browse):
    page = browse(done / "embedding.html")
    point = page.locator("circle").first
    assert page.locator("#tip").is_hidden()
    point.hover()
    assert page.locator("#tip").text_content().strip() == point.get_attribute("data-text")
    assert page.evaluate("document.images[0].naturalWidth") == 20


def test_large_images_become_small_and_odd_names_are_text():
    uri = thumbnail(Image.new("L", (300, 150), 7))
    with Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))) as image:
        assert image.size == (64, 32)
    odd = ['"><script>alert(1)</script>', "a&b'c"]
    found = Page(embed.embedding_page("<t>", np.eye(2), np.array([0, 1]), odd, odd, [uri, uri]))
    assert [p["data-text"] for p in found.points] == [f"{name}: {name}" for name in odd]
    assert [(p["cx"], p["cy"]) for p in found.points] == [("980.0", "980.0"), ("20.0", "20.0")]  # y points up
    assert found.open == []


def test_the_same_seed_chooses_the_same_images(pretrained, image_folder, tmp_path):
    def points(folder, *words):
        out = tmp_path / folder
        flags = ["--split", "train", "--points", "12", "--out", str(out), *words]
        assert embed_door.main([str(pretrained), *TINY, str(image_folder), *flags]) == 0
        return [(p["data-text"], p["cx"], p["cy"]) for p in Page((out / "embedding.html").read_text()).points]

    one, again, other = points("a"), points("b"), points("c", "--seed", "1")
    assert one == again
    assert {name for name, *_ in one} != {name for name, *_ in other}


def test_images_without_labels_and_unreadable_ones(pretrained, image_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(image_folder.rglob("*.png"))[:12]):
        (flat / f"{i:02d}.png").write_bytes(path.read_bytes() if i != 4 else b"no image")
    words = [str(pretrained), str(flat), *TINY, "--out", str(tmp_path / "out")]
    assert embed_door.main(words) == 0
    with np.load(tmp_path / "out" / "features.npz") as file:
        assert file["labels"].tolist() == [-1] * 11
        assert [os.path.basename(name) for name in file["names"]] == [f"{i:02d}.png" for i in range(12) if i != 4]
        assert file["classes"].tolist() == []
    assert len(Page((tmp_path / "out" / "embedding.html").read_text()).points) == 11
    assert "unreadable image left out: " + str(flat / "04.png") in capsys.readouterr().out


def test_held_out_images_come_first_and_one_set_is_taken_whole(image_folder):
    pair, one = open_sources(path=str(image_folder)), open_sources(path=str(image_folder / "val"))
    assert embed.choose_source(pair, None) is embed.choose_source(pair, "val") is pair.val
    assert embed.choose_source(pair, "train") is pair.train
    assert embed.choose_source(one, None) is embed.choose_source(one, "train") is one.pretrain


# ------------------------------------------------------------------------------------------------ two dimensions


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
        (["--out", "{file}/x"], "cannot be made .* choose another"),
        ([], "a picture needs 10 images, not 8; --picture none writes features alone"),
    ],
)
def test_each_mistake_is_one_sentence_and_exit_code_2(words, sentence, pretrained, image_folder, tmp_path, monkeypatch,
                                                      capsys):  # fmt: skip
    for name in ("umap", "pacmap"):
        monkeypatch.setitem(sys.modules, name, None)  # not installed
    (tmp_path / "file").write_text("")
    train = ["--split", "train"] if words else []  # the 8 held-out images are too few for a picture
    words = [word.format(file=tmp_path / "file") for word in ["--out", str(tmp_path / "out"), *words]]
    assert embed_door.main([str(pretrained), str(image_folder), *TINY, *train, *words]) == 2
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


def test_one_set_has_no_held_out_images(pretrained, image_folder, tmp_path, capsys):
    words = [str(pretrained), str(image_folder / "val"), *TINY, "--split", "val", "--out", str(tmp_path)]
    assert embed_door.main(words) == 2
    assert "--split val: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "give a checkpoint, and an image folder"),
        (["x.pth"], "give a checkpoint, and an image folder"),
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
