"""Folders, lists of paths, arrays, and the labelled pair; every mistake has its sentence."""

import os
import pickle

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from moco.data import ArraySource, FileSource, number_as_in, open_sources
from moco.data.__main__ import main
from moco.data.sources.base import Paths
from moco.data.sources.files import IMAGE_EXTENSIONS
from moco.errors import UserError


def write(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = sum(map(ord, name)) % 256
        Image.new("RGB", (8, 6), (shade, 0, 255 - shade)).save(path)


def names_below(source, folder):
    return [os.path.relpath(source.name_of(i), folder) for i in range(len(source))]


def test_class_folders_as_torchvision(tmp_path):
    write(tmp_path, "dog/2.png", "dog/10.jpg", "dog/n/k.ppm", "Ant/z.webp")
    write(tmp_path, "cat/a/x.JPEG", "cat/b.png", "cat/a-b/y.bmp")
    (tmp_path / "dog" / "notes.csv").write_text("no image")
    theirs = ImageFolder(str(tmp_path))
    source = open_sources(path=str(tmp_path)).pretrain
    assert [source.name_of(i) for i in range(len(source))] == [path for path, _ in theirs.samples]
    assert source.labels.tolist() == theirs.targets
    assert source.labels.dtype == np.int64
    assert source.classes == theirs.classes
    assert (source.channels, source.native_size, len(source)) == (3, None, 7)
    for i in (0, 3, 6):
        assert np.array_equal(np.array(source.load(i)), np.array(theirs[i][0]))


def test_extensions_are_torchvisions_and_more_names_of_the_same_formats():
    assert IMAGE_EXTENSIONS[: len(IMG_EXTENSIONS)] == IMG_EXTENSIONS
    assert set(IMAGE_EXTENSIONS[len(IMG_EXTENSIONS) :]) >= {".jpe", ".jfif", ".gif", ".npy"}


def test_hidden_files_are_left_out_and_links_followed_once(tmp_path):
    write(tmp_path, "data/a/1.png", "data/.thumbnails/1.png", "data/a/._1.png", "else/b/2.png")
    os.symlink(tmp_path / "else" / "b", tmp_path / "data" / "b")
    os.symlink(tmp_path / "data", tmp_path / "data" / "a" / "loop")
    source = open_sources(path=str(tmp_path / "data")).pretrain
    assert source.classes == ["a", "b"]
    assert names_below(source, tmp_path / "data") == ["a/1.png", "a/loop/b/2.png", "b/2.png"]


def test_folder_without_classes(tmp_path):
    write(tmp_path, "3.png", "b/1.png", "a/c/2.png")
    source = open_sources(path=str(tmp_path)).pretrain
    assert source.labels is None
    assert source.classes is None
    assert names_below(source, tmp_path) == ["3.png", "a/c/2.png", "b/1.png"]


def test_upstreams_layout(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "train/c/3.png", "val/c/4.png", "val/a/5.png", "other/6.png")
    sources = open_sources(path=str(tmp_path))
    assert sources.pretrain is sources.train
    assert len(sources.train) == 3
    assert sources.val.classes == ["a", "b", "c"]
    assert sources.val.labels.tolist() == [0, 2]  # by name: c is 1 among val's own classes
    assert names_below(sources.val, tmp_path) == ["val/a/5.png", "val/c/4.png"]


def test_test_folder_stands_in_for_val(tmp_path):
    write(tmp_path, "train/a/1.png", "test/a/2.png")
    assert names_below(open_sources(path=str(tmp_path)).val, tmp_path) == ["test/a/2.png"]


def test_no_pair_says_why(tmp_path):
    write(tmp_path, "one/train/a/1.png", "flat/train/1.png", "flat/val/a/2.png", "bare/a/1.png")
    for name, reason in (("one", "no held-out images"), ("flat", "train has no labels"), ("bare", "no held-out")):
        sources = open_sources(path=str(tmp_path / name))
        assert (sources.train, sources.val) == (None, None)
        assert reason in sources.no_pair


def test_val_path(tmp_path):
    write(tmp_path, "a/1.png", "b/2.png", "x/b/3.png")
    (tmp_path / "train.txt").write_text("a/1.png\ta\nb/2.png\tb\n")
    (tmp_path / "val.lst").write_text("x/b/3.png\tb\n")
    sources = open_sources(path=str(tmp_path / "train.txt"), val_path=str(tmp_path / "val.lst"))
    assert sources.val.labels.tolist() == [1]
    sources = open_sources("folder", str(tmp_path / "train.txt"), val_path=str(tmp_path / "x"))
    assert sources.val.labels.tolist() == [1]


def test_list_of_paths(tmp_path):
    write(tmp_path, "images/two words.png", "images/Ä.png", "abs.png")
    lines = ["\ufeffimages/two words.png\r\n", "\r\n", f"{tmp_path / 'abs.png'}\r\n", "images/Ä.png\r\n", "gone.png"]
    (tmp_path / "list.txt").write_bytes("".join(lines).encode())
    source = open_sources(path=str(tmp_path / "list.txt")).pretrain
    assert source.labels is None
    assert names_below(source, tmp_path) == ["images/two words.png", "abs.png", "images/Ä.png", "gone.png"]
    assert source.load(2).size == (8, 6)


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [(["dog", "ant", "dog"], ["ant", "dog"], [1, 0, 1]), (["10", "9", "10"], ["9", "10"], [1, 0, 1])],
)
def test_list_with_labels(tmp_path, labels, classes, numbers):
    write(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "list.txt").write_text("".join(f"{i + 1}.png\t{name}\n" for i, name in enumerate(labels)))
    source = open_sources(path=str(tmp_path / "list.txt")).pretrain
    assert source.classes == classes
    assert source.labels.tolist() == numbers


def test_channels(tmp_path):
    write(tmp_path, "a/1.png")
    assert open_sources(path=str(tmp_path)).pretrain.load(0).mode == "RGB"
    grey = open_sources(path=str(tmp_path), channels=1).pretrain
    assert (grey.channels, grey.load(0).mode) == (1, "L")


def test_arrays():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (4, 5, 5), dtype=np.uint8)
    source = ArraySource("digits", grey, labels=np.array([0, 1, 0, 1]), classes=["a", "b"], rows=np.array([3, 5, 8, 9]))
    assert (len(source), source.channels, source.native_size) == (4, 1, 5)
    assert np.array_equal(np.array(source.load(2)), grey[2])
    assert source.name_of(2) == "digits[8]"
    assert ArraySource("x", grey, channels=3).load(0).mode == "RGB"
    colour = rng.integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    source = ArraySource("photos", colour)
    assert (source.channels, source.native_size, source.name_of(1)) == (3, None, "photos[1]")
    assert np.array_equal(np.array(source.load(1)), colour[1])


def test_paths_hold_any_name():
    names = ["a", "", "Ä/ö.png", os.fsdecode(b"\xff\xfe.jpg"), "x" * 300]
    paths = Paths(names)
    assert list(paths) == names
    assert list(pickle.loads(pickle.dumps(paths))) == names
    assert len(paths) == 5


def mistake(**arguments):
    with pytest.raises(UserError) as caught:
        open_sources(**arguments)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_sentences_about_folders(tmp_path, monkeypatch):
    gone = str(tmp_path / "gone")
    assert mistake(path=gone).startswith(f"{gone} does not exist: give an image folder")
    (tmp_path / "void" / "a").mkdir(parents=True)
    assert "no image (.jpg " in mistake(path=str(tmp_path / "void"))
    write(tmp_path, "some/a/1.png")
    (tmp_path / "images.zip").write_bytes(b"")
    assert "nor a list of image paths (.txt, .lst, .jsonl, .csv, .tsv)" in mistake(path=str(tmp_path / "images.zip"))
    assert mistake().startswith("give an image folder, a list of image paths, or --dataset (cifar10,")
    assert mistake(dataset="cifar11").startswith("unknown data set cifar11: choose one of folder, cifar10")

    def refuse(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "cannot read the folder" in mistake(path=str(tmp_path / "some"))


def test_sentences_about_lists(tmp_path):
    write(tmp_path, "1.png")
    path = tmp_path / "list.txt"
    path.write_text("\n \n")
    assert "is empty" in mistake(path=str(path))
    path.write_text("3.png 3\n2.png 4\n")
    assert f"no file named in {path} exists (first: {tmp_path / '3.png 3'})" in mistake(path=str(path))
    path.write_text("1.png\ta\n2.png\n")
    assert "labels on 1 of 2 lines (none on line 2)" in mistake(path=str(path))
    path.write_text("1.png\n\n2\0.png\n")
    assert f"line 3 of the list {path} holds a zero byte" in mistake(path=str(path))
    os.mkfifo(tmp_path / "pipe.txt")
    assert "a pipe, socket or device" in mistake(path=str(tmp_path / "pipe.txt"))
    folder = tmp_path / "folder.txt"
    folder.mkdir()
    assert "no image" in mistake(path=str(folder))


GOOD = '{"image_path": "/1.png", "label": 0}'


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"image_path": ' * 20_000,
        "17",
        '["image_path", "label"]',
        '{"image_path": "1.png"}',
        '{"image_path": 7, "label": 0}',
        '{"image_path": "a\\u0000b", "label": 0}',
        '{"image_path": "\\ud800", "label": 0}',
        *(
            f'{{"image_path": "1.png", "label": {label}}}'
            for label in ("-1", "1e400", "0.5", "true", "9" * 5000, 10**12)
        ),
    ],
)
def test_an_index_with_a_damaged_line(tmp_path, line):
    write(tmp_path, "1.png")
    path = tmp_path / "index.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    assert f"line 3 of the index {path} is not" in mistake(path=str(path))


def test_names_that_are_not_utf8(tmp_path):
    """In folders, lists and BEiT-3's index: one image, one class."""
    name = os.fsdecode(b"c\xe9\xff")
    write(tmp_path, "train/a/1.png")
    os.rename(tmp_path / "train" / "a", tmp_path / "train" / name)
    (tmp_path / "list.txt").write_bytes(b"train/c\xe9\xff/1.png\tc\xe9\xff\n")
    assert main(["index", str(tmp_path)]) == 0
    for path in ("train", "list.txt", "imagenet.train.index.jsonl"):
        source = open_sources(path=str(tmp_path / path)).pretrain
        assert source.load(0).size == (8, 6)
        assert source.classes == ["0" if path.endswith("jsonl") else name]
        assert len(source.fingerprint()) == 16


def test_numbers_that_are_equal_have_one_order(tmp_path):
    """1 and 01 are two classes, in the order of every process."""
    names = ["0" * zeros + "1" for zeros in range(9)]
    write(tmp_path, "1.png")
    (tmp_path / "list.txt").write_text("".join(f"1.png\t{name}\n" for name in names))
    assert open_sources(path=str(tmp_path / "list.txt")).pretrain.classes == sorted(names)


def test_unreadable_list(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    path.write_text("1.png\n")

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.open", refuse)
    sentence = mistake(path=str(path))
    monkeypatch.undo()
    assert "cannot read the list" in sentence


def test_sentence_about_classes_that_differ(tmp_path):
    write(tmp_path, "train/a/1.png", "val/a/2.png", "val/b/3.png")
    sentence = mistake(path=str(tmp_path / "train"), val_path=str(tmp_path / "val"))
    assert f"{tmp_path / 'val'} has classes that {tmp_path / 'train'} lacks (b)" in sentence


def named(classes: str, labels: list[int]) -> ArraySource:
    return ArraySource("mine", np.zeros((len(labels), 4, 4), np.uint8), classes=list(classes), labels=np.array(labels))


def test_labels_are_numbered_as_a_files_classifier_by_name():
    state = {"run": {"classes": ["cat", "dog", "fox"]}}
    words = ["cat", "dog", "fox"]
    for classes, training, numbers in ((["fox", "cat", "dog"], True, [2, 0, 1]), (["dog", "fox"], False, [1, 2])):
        train, val = (named("", list(range(len(classes)))) for _ in range(2))
        train.classes, val.classes = classes, classes
        said = number_as_in(state, "FILE", training, train, None, val)
        assert said == f"classes numbered as in that file, by name ({len(classes)} of its 3)"
        for source in (train, val):
            assert (source.labels.tolist(), source.classes) == (numbers, words)
        assert number_as_in(state, "FILE", training, train, val) == ""  # they are, now
    assert number_as_in({}, "FILE", True, named("ab", [0])) == ""
    unlabelled = ArraySource("none", np.zeros((1, 4, 4), np.uint8))
    assert number_as_in(state, "FILE", True, unlabelled) == ""
    old = named("ba", [0, 1])
    assert "the names of its classes are not in the file" in number_as_in({"run": {}}, "FILE", True, old)
    assert (old.labels.tolist(), old.classes) == ([0, 1], ["b", "a"])


def test_classes_that_a_file_does_not_know_are_refused_and_missing_ones_where_it_is_trained_on():
    state = {"run": {"classes": list("abcdefg")}}
    source = named("axb", [0, 1, 2])
    with pytest.raises(UserError, match=r"has the class x, .* in FILE .*knows a, b, c, d, e and more\)"):
        number_as_in(state, "FILE", False, source)
    assert source.labels.tolist() == [0, 1, 2]
    with pytest.raises(UserError, match=r"mine lacks the class c of FILE: training goes on with the same classes"):
        number_as_in(state, "FILE", True, named("ab", [0, 1]))


def test_file_sources_travel_to_workers(tmp_path):
    write(tmp_path, "a/1.png")
    source = pickle.loads(pickle.dumps(open_sources(path=str(tmp_path)).pretrain))
    assert isinstance(source, FileSource)
    assert source.load(0).size == (8, 6)


# ---------------------------------------------------------------------------------------------- the same images?


def test_a_fingerprint_is_of_names_below_the_root_labels_and_sizes(tmp_path):
    write(tmp_path / "one", "cat/1.png", "cat/2.png", "dog/1.png")
    write(tmp_path / "else" / "where", "cat/1.png", "cat/2.png", "dog/1.png")
    write(tmp_path / "renamed", "cat/1.png", "cat/3.png", "dog/1.png")
    write(tmp_path / "moved class", "cat/1.png", "dog/2.png", "dog/1.png")
    one, moved, *others = (
        open_sources(path=str(tmp_path / name)).pretrain.fingerprint()
        for name in ("one", "else/where", "renamed", "moved class")
    )
    assert one == moved
    assert len({one, *others}) == 3
    names = ["cat/1.png", "cat/2.png", "dog/1.png"]
    for labels, same in (("AAB", True), ("ABB", False)):
        (tmp_path / "one" / "list.txt").write_text("".join(f"{n}\t{x}\n" for n, x in zip(names, labels, strict=True)))
        assert (open_sources(path=str(tmp_path / "one" / "list.txt")).pretrain.fingerprint() == one) is same
    with open(tmp_path / "else" / "where" / "dog" / "1.png", "ab") as file:
        file.write(b"\0")
    assert open_sources(path=str(tmp_path / "else" / "where")).pretrain.fingerprint() != one


def test_a_fingerprint_of_arrays_is_of_their_pixels_and_order():
    images, labels = np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8), np.array([0, 1, 0, 1, 0])
    one = ArraySource("a", images, labels=labels).fingerprint()
    assert one == ArraySource("other name", images.copy(), labels=labels.copy()).fingerprint()
    pixel = images.copy()
    pixel[3, 4, 5] += 1
    others = [ArraySource("a", pixel, labels=labels), ArraySource("a", images[::-1], labels=labels),
              ArraySource("a", images, labels=1 - labels), ArraySource("a", images),
              ArraySource("a", images.reshape(5, 4, 16), labels=labels)]  # fmt: skip
    assert len({one, *(source.fingerprint() for source in others)}) == 6


def test_a_million_files_are_asked_for_a_thousand_sizes(monkeypatch):
    asked = []
    monkeypatch.setattr(os, "stat", lambda path: asked.append(path) or os.stat_result([0] * 6 + [7] + [0] * 3))
    source = FileSource("many", [f"/data/{n % 7}/{n}.png" for n in range(50_000)])
    first = source.fingerprint()
    assert len(asked) == 1000
    assert asked[-1] == "/data/5/49999.png"
    assert FileSource("many", [f"/elsewhere/{n % 7}/{n}.png" for n in range(50_000)]).fingerprint() == first
