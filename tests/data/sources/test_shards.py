"""Tar shards: packed and read back, foreign ones, the order over ranks, resume, faults."""

import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from moco.data import EpochSampler, TwoViews, get_preset, make_loader, open_sources
from moco.data.__main__ import main
from moco.data.loader import WINDOW
from moco.data.sources.decode import BadImageError
from moco.data.sources.files import open_path
from moco.data.sources.pack import pack
from moco.data.sources.shards import INDEX, open_shards
from moco.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """train/ with 2 x 9 images, val/ with 2 x 2; every image has a colour of its own."""
    for split, count in (("train", 9), ("val", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for number in range(count):
                colour = (number * 20, label * 200, 40 if split == "val" else 90)
                Image.new("RGB", (16, 12), colour).save(tmp_path / "in" / split / name / f"{number}.png")
    return tmp_path / "in"


@pytest.fixture
def shards(folder, tmp_path):
    """The same in shards of at most 4 images."""
    size = (folder / "train" / "cat" / "1.png").stat().st_size
    assert main(["pack", str(folder), str(tmp_path / "out"), "--shard-mb", str(4.5e-6 * size)]) == 0
    return tmp_path / "out"


def content(source):
    """{colour: class name} of all images."""
    return {source.load(i).getpixel((3, 3)): source.classes[source.labels[i]] for i in range(len(source))}


def test_packed_shards_hold_the_same_images_and_labels(folder, shards):
    files, packed = open_sources(None, str(folder)), open_sources(None, str(shards))
    for ours, theirs in ((packed.train, files.train), (packed.val, files.val)):
        assert content(ours) == content(theirs)
        assert ours.classes == theirs.classes
    assert len(packed.train.starts) >= 4
    assert len(sorted((shards / "train").glob("*.tar"))) == len(packed.train.starts)
    colours = [packed.train.load(i).getpixel((0, 0)) for i in range(18)]
    assert colours != sorted(colours)  # in random order


def test_a_fingerprint_of_shards_is_theirs_wherever_they_lie(folder, shards, tmp_path):
    first = open_shards(str(shards / "train")).fingerprint()
    shutil.copytree(shards / "train", tmp_path / "moved")
    assert open_shards(str(tmp_path / "moved")).fingerprint() == first
    (tmp_path / "moved" / INDEX).unlink()
    assert open_shards(str(tmp_path / "moved")).fingerprint() == first  # found by a scan
    pack({"": open_path(str(folder / "train"))}, str(tmp_path / "other order"), seed=9)
    assert open_shards(str(tmp_path / "other order")).fingerprint() != first


def test_the_index_says_what_a_scan_finds(shards):
    indexed = open_shards(str(shards / "train"))
    (shards / "train" / INDEX).unlink()
    scanned = open_shards(str(shards / "train"))
    assert [indexed.name_of(i) for i in range(18)] == [scanned.name_of(i) for i in range(18)]
    assert [indexed.read(i) for i in range(18)] == [scanned.read(i) for i in range(18)]
    assert np.array_equal(indexed.labels, scanned.labels)
    assert np.array_equal(indexed.starts, scanned.starts)


def add(tar, name, data):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def test_shards_of_others(tmp_path):
    """webdataset's layout with other files between; folders inside; labels without names."""
    file = io.BytesIO()
    Image.new("RGB", (5, 4), (1, 2, 3)).save(file, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for key, label in (("x/001", b"3"), ("x/002", b"0\n")):
            add(tar, f"{key}.cls", label)
            add(tar, f"{key}.json", b"{}")
            add(tar, f"{key}.png", file.getvalue())
    source = open_sources(None, str(tmp_path / "a.tar")).pretrain
    assert (len(source), source.labels.tolist(), source.classes) == (2, [3, 0], ["0", "1", "2", "3"])
    assert source.load(1).size == (5, 4)
    assert source.name_of(1).endswith("a.tar:x/002.png")
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        add(tar, "no-label.png", file.getvalue())
    assert open_sources(None, str(tmp_path)).pretrain.labels is None


def test_shards_go_to_workers(shards):
    source = open_shards(str(shards / "train"))
    source.load(0)
    assert pickle.loads(pickle.dumps(source)).load(5).tobytes() == source.load(5).tobytes()
    batches = []
    for workers in (0, 2):
        sampler = EpochSampler(18, 6, 1).in_shards(source.starts)
        batches.append(list(make_loader(TwoViews(source, get_preset("v2"), 8, 1), sampler, workers)))
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


STARTS = np.arange(24) * 2500 + np.arange(24) % 5 * 300  # 24 shards, not of one length, of 60,000 images


def epoch_of(world, batch=600, epoch=3, first=0, drop_last=True, n=60_000):
    """[rank][step] -> numbers of images."""
    ranks = []
    for rank in range(world):
        sampler = EpochSampler(n, batch, 5, world, rank, drop_last).in_shards(STARTS)
        sampler.set_position(epoch, first)
        ranks.append([[index for _, index in keys] for keys in sampler])
    return ranks


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [60_000, 59_777])
def test_ranks_share_the_images_and_keep_to_their_shards(world, n):
    ranks = epoch_of(world, n=n, drop_last=False)
    seen = [index for rank in ranks for keys in rank for index in keys]
    assert set(seen) == set(range(n))
    assert len(seen) - n < world  # the last step is filled up to one length
    assert all(len(rank) == 100 for rank in ranks)
    for rank in ranks:
        for keys in rank[:-1]:
            shards = set(np.searchsorted(STARTS, keys, side="right").tolist())
            assert len(shards) <= 12  # two windows at most, six shards each
    if world == 3:  # a third of the images, and what a window at either end adds
        assert max(len(set(np.searchsorted(STARTS, sum(rank[:-1], []), side="right").tolist())) for rank in ranks) <= 18


def test_order_is_new_each_epoch_and_resumes_exactly():
    whole = epoch_of(2)
    assert epoch_of(2) == whole
    assert epoch_of(2, first=37) == [rank[37:] for rank in whole]
    assert epoch_of(2, epoch=4) != whole
    assert WINDOW < 60_000


def test_images_of_a_window_are_mixed():
    first = epoch_of(1)[0][0]
    assert len({index // 600 for index in first}) > 5


def error_of(call):
    with pytest.raises(UserError) as caught:
        call()
    return str(caught.value)


def test_faults(folder, shards, tmp_path, capsys):
    assert "is not empty: give" in error_of(lambda: pack({"": open_path(str(folder / "val"))}, str(shards / "val")))
    with tarfile.open(tmp_path / "none.tar", "w") as tar:
        add(tar, "readme.md", b"nothing")
    assert "hold no image" in error_of(lambda: open_shards(str(tmp_path / "none.tar")))
    (tmp_path / "broken.tar").write_bytes(b"no tar at all" * 100)
    assert "cannot be read as an uncompressed tar" in error_of(lambda: open_shards(str(tmp_path / "broken.tar")))
    train = shards / "train"
    first = sorted(train.glob("*.tar"))[0]
    whole = first.read_bytes()
    source = open_shards(str(train))
    first.write_bytes(whole[: len(whole) // 4])
    assert "is missing or has not its" in error_of(lambda: open_shards(str(train)))
    last = int(source.starts[1]) - 1
    with pytest.raises(BadImageError, match="the shard ends"):
        source.load(last)
    item = TwoViews(source, get_preset("v2"), 8, 1)[(0, last)]
    assert item["bad"] == last
    (train / INDEX).write_bytes(b"PK nonsense")
    assert "cannot be read" in error_of(lambda: open_shards(str(train)))
    assert main(["pack", str(tmp_path / "nowhere"), str(tmp_path / "o")]) == 2
    assert "does not exist" in capsys.readouterr().err
    (folder / "train" / "cat" / "gone.png").symlink_to(tmp_path / "nothing")
    assert main(["pack", str(folder / "train"), str(tmp_path / "o")]) == 2
    assert "cannot be packed" in capsys.readouterr().err
