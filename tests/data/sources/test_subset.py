"""Which images a share of the labels means: balanced draws, lists of names, validation parts."""

import hashlib
import io
import urllib.error
import urllib.request

import numpy as np
import pytest
from PIL import Image

from moco.data import ArraySource, FileSource, Labelled
from moco.data.sources import subset
from moco.data.sources.decode import BadImageError
from moco.errors import UserError

UNEVEN = np.array([3] * 40 + [0] * 5 + [1] * 17 + [2] * 1)  # class sizes 5, 17, 1, 40; not in order


def counts(labels, rows) -> list[int]:
    return np.bincount(labels[rows], minlength=labels.max() + 1).tolist()


def in_rounds(labels, percent, seed) -> set[int]:
    """The draw as a child would do it: each class gives one image in turn until there are enough."""
    orders = {int(labels[rows[0]]): list(rows) for rows in subset.class_orders(labels, seed)}
    wanted = max(int(len(labels) * percent / 100 + 1e-9), len(orders))
    turn = sorted(orders, key=lambda c: subset.key("split", seed, c, 1))
    drawn: list[int] = []
    while len(drawn) < wanted:
        for c in turn:
            if orders[c] and len(drawn) < wanted:
                drawn.append(int(orders[c].pop(0)))
    return set(drawn)


# -------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("percent", [0.1, 1, 7, 20, 33.3, 50, 99, 100])
def test_a_draw_goes_round_the_classes(percent):
    rows, val = subset.split(UNEVEN, percent, 0.0, seed=4)
    assert set(rows.tolist()) == in_rounds(UNEVEN, percent, 4)
    assert len(rows) == len(set(rows.tolist())) == max(4, int(0.63 * percent))
    assert (np.diff(rows) > 0).all()
    assert len(val) == 0


def test_classes_differ_by_one_image_while_they_last():
    for percent in range(1, 101):
        own = counts(UNEVEN, subset.split(UNEVEN, percent, 0.0, seed=1)[0])
        most = max(own)
        assert all(n >= max(1, min(size, most - 1)) for n, size in zip(own, (5, 17, 1, 40), strict=True))


def test_a_smaller_share_lies_inside_a_larger_one():
    three = UNEVEN[UNEVEN != 2]
    rows = [set(subset.split(three, percent, 0.1, seed=0)[0].tolist()) for percent in (1, 8, 15, 30, 80, 100)]
    assert all(a < b for a, b in zip(rows, rows[1:], strict=False))


def test_a_draw_is_a_function_of_seed_and_class():
    one, again, other = (subset.split(UNEVEN, 30, 0.0, seed)[0].tolist() for seed in (0, 0, 1))
    assert one == again != other
    # What other classes hold does not matter: the same places of the class are taken in the same order.
    more = np.concatenate([UNEVEN, [0, 2, 4, 4]])
    before, after = (subset.class_orders(labels, 0) for labels in (UNEVEN, more))
    assert before[1].tolist() == after[1].tolist()
    assert before[3].tolist() == after[3].tolist()


def test_imagenets_shares_are_as_large_as_the_published_lists():
    sizes = np.full(1000, 1281)
    sizes[:167] += 1
    labels = np.repeat(np.arange(1000), sizes)
    assert len(labels) == 1_281_167
    for percent, lines, low, more in ((1, 12_811, 12, 811), (10, 128_116, 128, 116)):
        own = np.bincount(labels[subset.split(labels, percent, 0.0, seed=0)[0]])
        assert own.sum() == lines == subset.LISTS[percent][1]
        assert np.bincount(own - low).tolist() == [1000 - more, more]


# --------------------------------------------------------------------------------------------------- validation


def test_a_validation_part_is_stratified_and_shared_by_all_shares():
    three = UNEVEN[UNEVEN != 2]
    parts = [subset.split(three, percent, 0.2, seed=0) for percent in (1, 50, 100)]
    for train, val in parts:
        assert counts(three, val) == [1, 3, 0, 8]
        assert not set(train.tolist()) & set(val.tolist())
        assert val.tolist() == parts[0][1].tolist()
    train, val = parts[-1]
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(len(three)))
    assert len(parts[1][0]) == len(three) // 2


def test_a_validation_part_leaves_a_list_alone():
    listed = np.flatnonzero(UNEVEN == 3)[:30]
    train, val = subset.split(UNEVEN, 100, 0.2, seed=0, listed=listed)
    assert train.tolist() == listed.tolist()
    assert not set(train.tolist()) & set(val.tolist())
    assert counts(UNEVEN, val) == [1, 3, 1, 8]


def test_a_class_too_small_to_hold_out_is_a_sentence():
    with pytest.raises(UserError, match="--val-share 0.2 takes 1 of the 1 images of a class, of which 0 can be spared"):
        subset.split(UNEVEN, 10, 0.2, seed=0)
    with pytest.raises(UserError, match="takes 8 of the 40 images of a class, of which 5 can be spared"):
        subset.split(UNEVEN, 10, 0.2, seed=0, listed=np.flatnonzero(UNEVEN == 3)[:35])


# -------------------------------------------------------------------------------------------------------- lists


@pytest.fixture
def photographs() -> FileSource:
    paths = [f"/x/train/{c}/{c}_{i}.JPEG" for c in ("n01", "n02") for i in range(3)]
    paths += ["/x/train/n01/0.png", "/x/train/n02/0.png"]
    return FileSource("/x/train", paths, 3, ["n01", "n02"], np.array([0, 0, 0, 1, 1, 1, 0, 1]))


def find(source, names):
    return subset.find_rows(source, names, "list.txt").tolist()


def test_a_list_names_files_with_or_without_their_folder(photographs):
    assert find(photographs, ["n02_0.JPEG", "n01_2.JPEG"]) == [2, 3]
    assert find(photographs, ["n02/0.png", "n01/n01_0.JPEG"]) == [0, 7]
    digits = ArraySource("digits/train", np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    assert find(digits, ["train[2]", "digits/train[0]"]) == [0, 2]


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["n01_1.JPEG", "n09_7.JPEG", "n09_8.JPEG"], "2 of the 3 images in list.txt are not in .*the first n09_7.JPEG"),
        (["0.png"], "0.png of list.txt belongs to several images of .*: write FOLDER/NAME"),
        (["n01_1.JPEG", "n01_1.JPEG"], "holds 1 names twice"),
        (["n01_1.JPEG", "n01/n01_1.JPEG"], "names an image twice"),
    ],
)
def test_a_list_that_does_not_fit_is_a_sentence(names, sentence, photographs):
    with pytest.raises(UserError, match=sentence):
        find(photographs, names)


def test_reading_a_list(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa.JPEG\r\n\n  b c.JPEG \n")
    assert subset.read_names(str(path)) == ["a.JPEG", "b c.JPEG"]
    path.write_text("\n")
    with pytest.raises(UserError, match="is empty"):
        subset.read_names(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        subset.read_names(str(tmp_path))


# -------------------------------------------------------------------------------------------- published lists


class Server:
    """Stands for the network: answers with ``content`` and counts; None cuts the line."""

    def __init__(self, content: bytes | None):
        self.content, self.asked = content, []

    def __call__(self, url, timeout):
        self.asked.append(url)
        if self.content is None:
            raise urllib.error.URLError("no route to host")
        return io.BytesIO(self.content)


@pytest.fixture
def server(monkeypatch):
    content = b"n01_0.JPEG\nn02_2.JPEG\n"
    monkeypatch.setitem(subset.LISTS, 1.0, ("1percent.txt", 2, hashlib.sha256(content).hexdigest()))
    made = Server(content)
    monkeypatch.setattr(urllib.request, "urlopen", made)
    return made


def test_a_published_list_is_fetched_once(server, tmp_path):
    cache = tmp_path / "cache"
    path = subset.published_list(1.0, str(cache))
    assert subset.read_names(path) == ["n01_0.JPEG", "n02_2.JPEG"]
    assert subset.published_list(1, str(cache)) == path
    assert server.asked == [subset.LISTS_URL + "1percent.txt"]
    (cache / "1percent.txt").write_text("n01_0.JPEG\n")  # cut short: fetched anew
    subset.published_list(1.0, str(cache))
    assert len(server.asked) == 2
    assert subset.read_names(path) == ["n01_0.JPEG", "n02_2.JPEG"]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(None, r"cannot be fetched \(.*no route to host"), (b"<html>", "something else than the published 2 names")],
)
def test_a_list_that_does_not_come_is_a_sentence(content, sentence, server, tmp_path):
    server.content = content
    with pytest.raises(UserError, match=f"{sentence}.*--train-files PATH.*balanced"):
        subset.published_list(1.0, str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_written_is_a_sentence(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        subset.published_list(1.0, str(tmp_path / "file"))


def test_only_imagenet_takes_the_published_lists(photographs, server, tmp_path):
    def origin(source, percent, files="") -> str:
        return subset.choose_subset(source, percent, files, 0.0, 0, str(tmp_path))[2]

    assert origin(photographs, 1.0) == "a balanced draw, seed 0"
    assert origin(photographs, 100.0) == "all images"
    classes = [f"n{i:08d}" for i in range(998)] + ["n01", "n02"]
    photographs.classes = classes
    assert origin(photographs, 1.0).startswith("a balanced draw, seed 0; 998 classes have no image in it")
    photographs.classes = [f"n{i:08d}" for i in range(1000)]
    assert origin(photographs, 1.0).startswith(f"the list {tmp_path / '1percent.txt'}")
    assert origin(photographs, 1.0, "balanced").startswith("a balanced draw")
    assert origin(photographs, 5.0).startswith("a balanced draw")
    assert len(server.asked) == 1


# --------------------------------------------------------------------------------------------------- the subset


def test_a_subset_shows_its_rows_of_the_whole():
    images = np.arange(6, dtype=np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
    whole = ArraySource("whole", images, classes=["a", "b"], labels=np.array([0, 1, 0, 1, 0, 1]))
    part = subset.Subset(whole, np.array([1, 4]), "part")
    assert (len(part), part.classes, part.channels, part.native_size) == (2, ["a", "b"], 1, 8)
    assert part.labels is not None
    assert part.labels.tolist() == [1, 0]
    assert [np.asarray(part.load(i)).max() for i in range(2)] == [1, 4]
    assert part.name_of(1) == "whole[4]"
    same, other = (subset.Subset(whole, np.array(rows), "x").fingerprint() for rows in ([1, 4], [1, 5]))
    assert part.fingerprint() == same != other


def test_an_unreadable_image_is_replaced_from_within_the_subset():
    """Another image of the whole would be a label more than the share."""

    class Broken(ArraySource):
        def load(self, index: int) -> Image.Image:
            if index == 1:
                raise BadImageError("broken")
            return super().load(index)

    whole = Broken("whole", np.zeros((9, 8, 8), np.uint8), labels=np.arange(9))
    item = Labelled(subset.Subset(whole, np.array([1, 4]), "part"), 8)[(0, 0)]
    assert (item["label"], item["index"], item["bad"]) == (4, 1, 0)
