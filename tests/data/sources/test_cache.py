"""The cache of decoded images: the same views as without, whatever reads them; made anew when it does not fit."""

import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import SYNCO, TINY, differences, load
from PIL import Image

from moco.data import (
    ArraySource,
    BadImageError,
    FileSource,
    Labelled,
    TwoViews,
    get_preset,
    open_sources,
    probe_preset,
    two_views,
)
from moco.data.__main__ import main
from moco.data.loader import EpochSampler
from moco.data.sources import cache
from moco.errors import UserError

FORMATS = [("jpg", "RGB"), ("png", "RGB"), ("png", "L"), ("png", "P"), ("jpg", "L"), ("png", "RGBA")]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """train/ and val/ of two classes: images of many sizes and kinds, one of each class unreadable."""
    root = tmp_path_factory.mktemp("kinds")
    rng = np.random.default_rng(1)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for number, (ending, mode) in enumerate(FORMATS):
                height, width = rng.integers(9, 40, 2).tolist()
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).convert(mode).save(root / split / name / f"{number}.{ending}")
            (root / split / name / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    return root


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "in")  # with the times of its files


def batches(source, crop_only=False, fast=False, workers=0):
    sampler = EpochSampler(len(source), 7, seed=5)
    sampler.set_position(2)
    views = TwoViews(source, get_preset("v2"), 12, 5, crop_only, fast)
    loader = two_views(views, sampler, workers, torch.device("cpu"))
    return [{name: value.clone() for name, value in batch.items()} for batch in loader]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("crop_only", [False, True])
def test_views_are_those_of_the_files(folder, tmp_path, crop_only, channels):
    plain = open_sources(None, str(folder), channels=channels)
    kept = open_sources(None, str(folder), channels=channels, cache=str(tmp_path / "kept"))
    assert kept.pretrain is kept.train
    assert (kept.train.classes, kept.train.native_size) == (plain.train.classes, plain.train.native_size)
    for a, b in ((plain.train, kept.train), (plain.val, kept.val)):
        assert isinstance(b, cache.CachedSource)
        assert np.array_equal(a.labels, b.labels)
        assert [a.name_of(i) for i in range(len(a))] == [b.name_of(i) for i in range(len(b))]
    exact = batches(plain.train, crop_only)
    assert sum(int((batch["bad"] >= 0).sum()) for batch in exact) == 2
    for fast in (False, True):  # a cache holds exact pixels
        assert differences(exact, batches(kept.train, crop_only, fast)) == []
    probe = [
        [Labelled(source.val, 12, 5, preset)[(1, i)] for i in range(14)]
        for source in (plain, kept)
        for preset in (probe_preset(True), None)
    ]
    assert differences(probe[:2], probe[2:]) == []


def test_workers_and_other_processes_map_it(folder, tmp_path):
    plain, kept = (open_sources(None, str(folder), cache=x).train for x in (None, str(tmp_path / "kept")))
    assert differences(batches(plain), batches(kept, workers=2)) == []
    copy = pickle.loads(pickle.dumps(kept))
    assert len(pickle.dumps(kept)) < 10_000  # a path, no pixels
    assert copy.load(3).tobytes() == plain.load(3).tobytes()


def test_nothing_is_decoded_twice(folder, tmp_path, monkeypatch):
    plain = open_sources(None, str(folder)).train
    expected = [plain.load(i).tobytes() for i in range(6)]
    first = open_sources(None, str(folder), cache=str(tmp_path / "kept"))
    monkeypatch.setattr("moco.data.sources.base.decode_bytes", None)
    again = open_sources(None, str(folder), cache=str(tmp_path / "kept"))
    for source in (first.train, again.train):
        assert source.fingerprint() == plain.fingerprint()
        assert [source.load(i).tobytes() for i in range(6)] == expected
        with pytest.raises(BadImageError, match="broken.jpg"):
            source.load(6)


def test_shards_keep_their_order(folder, tmp_path):
    for name in ("cat", "dog"):
        (folder / "train" / name / "broken.jpg").unlink()
    assert main(["pack", str(folder / "train"), str(tmp_path / "shards"), "--shard-mb", "0.004"]) == 0
    plain, kept = (
        open_sources(None, str(tmp_path / "shards"), cache=x).pretrain for x in (None, str(tmp_path / "kept"))
    )
    assert len(plain.starts) > 2
    assert np.array_equal(plain.starts, kept.starts)
    assert differences(batches(plain), batches(kept)) == []


def test_images_in_memory_stay_there(tmp_path):
    source = ArraySource("toys", np.zeros((3, 4, 4), np.uint8))
    assert cache.cached(source, str(tmp_path / "kept")) is source
    assert not (tmp_path / "kept").exists()


# --------------------------------------------------------------------------------------------- when it does not fit


def other_pixels(path):
    Image.new("RGB", (8, 9), (1, 2, 3)).save(path)


def touched(path):
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("change", [other_pixels, touched, os.remove])
def test_a_cache_of_other_files_is_made_anew(change, folder, tmp_path, capsys):
    kept = str(tmp_path / "kept")
    path = open_sources(None, str(folder / "train"), cache=kept).pretrain.path
    said = f"decoded 14 images of {folder / 'train'} into {path}: 0 MB, 2 could not be decoded\n"
    assert capsys.readouterr().err == said
    change(folder / "train" / "dog" / "1.png")
    source = open_sources(None, str(folder / "train"), cache=kept).pretrain
    assert capsys.readouterr().err.count("images of") == 1
    assert differences(batches(open_sources(None, str(folder / "train")).pretrain), batches(source)) == []
    assert len(os.listdir(kept)) == 1  # in the place of the old one
    open_sources(None, str(folder / "train"), cache=kept)
    assert "images of" not in capsys.readouterr().err


@pytest.mark.parametrize("left", [0, 30, 500, -1])
def test_a_cache_cut_short_is_made_anew(left, folder, tmp_path):
    source = open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept")).pretrain
    with open(source.path, "rb") as file:
        whole = file.read()
    with open(source.path, "wb") as file:
        file.write(whole[:left])
    open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept"))
    with open(source.path, "rb") as file:
        assert file.read() == whole


def test_one_that_was_replaced_is_not_read(folder, tmp_path):
    source = open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept")).pretrain
    waiting = pickle.loads(pickle.dumps(source))
    touched(folder / "train" / "dog" / "1.png")
    open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept"))
    with pytest.raises(UserError, match="was replaced while"):
        waiting.load(0)
    assert source.load(0).size  # what is mapped stays


def test_an_interrupted_making_leaves_what_was_there(folder, tmp_path, monkeypatch):
    source = open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept")).pretrain
    with open(source.path, "rb") as file:
        whole = file.read()
    touched(folder / "train" / "dog" / "1.png")
    monkeypatch.setattr("moco.data.sources.cache.os.fsync", lambda number: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept"))
    assert os.listdir(tmp_path / "kept") == [os.path.basename(source.path)]
    with open(source.path, "rb") as file:
        assert file.read() == whole


def test_the_first_of_two_runs_keeps_its_file(folder, tmp_path, monkeypatch):
    """Over NFS a file that is replaced is gone for the other nodes that have mapped it."""
    kept, write, first = str(tmp_path / "kept"), cache._write, []

    def overtaken(*words):
        monkeypatch.setattr(cache, "_write", write)
        first.append(os.stat(open_sources(None, str(folder / "train"), cache=kept).pretrain.path).st_ino)
        return write(*words)

    monkeypatch.setattr(cache, "_write", overtaken)
    late = open_sources(None, str(folder / "train"), cache=kept).pretrain
    assert [os.stat(late.path).st_ino] == first
    assert os.listdir(kept) == [os.path.basename(late.path)]


def test_how_large_the_images_are_is_known_before(folder, monkeypatch):
    source = open_sources(None, str(folder / "train"), channels=3).pretrain
    read = [i for i in range(len(source)) if not source.name_of(i).endswith("broken.jpg")]
    assert len(read) == 12
    sizes = [np.prod(source.load(i).size) * 3 for i in read]
    for limit, fits in ((np.mean(sizes) * 14 - 1, False), (np.mean(sizes) * 14 + 1, True)):
        monkeypatch.setattr(cache, "LIMIT", limit)
        assert cache.fits(source) == fits
    assert not cache.fits(ArraySource("toys", np.zeros((3, 4, 4), np.uint8)))


def test_the_whole_file_is_on_the_disk_before_it_gets_its_name(folder, tmp_path, monkeypatch):
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(
        "moco.data.sources.cache.os.fsync", lambda file: flushed.append(os.fstat(file).st_size) or fsync(file)
    )
    source = open_sources(None, str(folder / "train"), cache=str(tmp_path / "kept")).pretrain
    assert flushed[0] == os.path.getsize(source.path)


def test_faults(folder, tmp_path, monkeypatch, in_process, capsys):
    (tmp_path / "file").write_text("")
    run = [*TINY, "--steps", 1, "--save-dir", tmp_path / "run"]
    assert in_process(*run, "--cache", tmp_path / "file", folder) == 2
    assert "cannot be written (File exists): choose another folder" in capsys.readouterr().err
    monkeypatch.setattr(cache, "LIMIT", 1000)
    assert in_process(*run, "--cache", tmp_path / "kept", folder) == 2
    assert "--cache is for small images, and those of" in capsys.readouterr().err
    assert not (tmp_path / "kept").exists()


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_run_and_its_resume_are_those_without(folder, tmp_path, in_process):
    words = [*TINY, *SYNCO, "-b", 6, "--keep", 1, folder]
    assert in_process(*words, "--epochs", 2, "--save-dir", tmp_path / "plain") == 0
    kept = ["--cache", tmp_path / "kept", "--save-dir", tmp_path / "cached"]
    assert in_process(*words, *kept, "--steps", 1, "--epochs", 2) == 0
    assert in_process(*words, *kept, "--epochs", 2, "--resume", "auto", "-j", 2) == 0
    assert differences(load(tmp_path / "plain"), load(tmp_path / "cached")) == []


@pytest.mark.dist
def test_one_process_of_a_node_makes_it(folder, tmp_path, start):
    words = [*TINY, "-b", 6, "--nproc", 2, "--steps", 1, "--cache", tmp_path / "kept", "--save-dir", tmp_path / "run"]
    program = start(*words, folder)
    assert program.end() == 0, program.text
    assert program.text.count("decoded 14 images of") == 2  # train and val
    assert len(os.listdir(tmp_path / "kept")) == 2


def test_a_known_sets_cache_belongs_to_where_its_images_are(folder, tmp_path, monkeypatch):
    """Its name is no path: neither the working folder nor another copy of the set may replace the file."""
    paths = sorted(str(path) for path in (folder / "train" / "cat").iterdir())
    copies = [str(shutil.copy2(path, tmp_path)) for path in paths]
    first = cache.cached(FileSource("named/train", paths), str(tmp_path / "kept"))
    monkeypatch.chdir(tmp_path)
    again = cache.cached(FileSource("named/train", paths), str(tmp_path / "kept"))
    other = cache.cached(FileSource("named/train", copies), str(tmp_path / "kept"))
    assert first.path == again.path != other.path
