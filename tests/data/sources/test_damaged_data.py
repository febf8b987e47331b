"""Damaged files of a data set: the right image, a bad image, or one sentence; and packing that is cut off."""

import contextlib
import errno
import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from moco.data import BadImageError, TwoViews, get_preset, open_sources
from moco.data.__main__ import main
from moco.data.sources import cache, pack
from moco.data.sources.shards import CLASS_NAMES, INDEX
from moco.errors import UserError
from moco.processes import temporary

KINDS = ("jpg", "png", "bmp", "tif", "webp", "ppm")


@pytest.fixture
def folder(tmp_path):
    """train/ and val/ of two classes, one of them with a name that is not UTF-8; a file of each format in each."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", os.fsdecode(b"d\xf6g")):
            (tmp_path / "in" / split / name).mkdir(parents=True)
            for number, kind in enumerate(KINDS):
                pixels = rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "in" / split / name / f"{number}.{kind}")
    return tmp_path / "in"


@pytest.fixture
def packed(folder, tmp_path):
    assert main(["pack", str(folder), str(tmp_path / "out"), "--shard-mb", "0.002"]) == 0
    return tmp_path / "out"


def sentence(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def opened(path, **more):
    return open_sources(path=str(path), **more).pretrain


def contents(source):
    """{bytes: class} of all images."""
    return {source.load(i).tobytes(): source.classes[source.labels[i]] for i in range(len(source))}


# ------------------------------------------------------------------------------------------------- packing


class Killed(BaseException):
    """Stands for SIGKILL: nothing may be tidied up."""


def pack_with(patched, folder, out, number=0, error=None):
    """The exit code of packing where the disk's call of this number raises, from 1, and how many there were."""
    calls = []

    def counted(work):
        def call(*args, **more):
            calls.append(work)
            if len(calls) == number:
                raise error
            return work(*args, **more)

        return call

    for place, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "makedirs"), (pack, "_add")):
        patched.setattr(place, name, counted(getattr(place, name)))
    return main(["pack", str(folder), str(out), "--shard-mb", "0.002"]), len(calls)


def some_calls(folder, tmp_path, monkeypatch):
    """Numbers of calls to the disk of a packing, the first and the last among them."""
    with monkeypatch.context() as patched:
        code, count = pack_with(patched, folder, tmp_path / "once")
    shutil.rmtree(tmp_path / "once")
    assert (code, count > 60) == (0, True)  # 48 images and labels, the rest are files and folders
    return np.unique(np.linspace(1, count, 16).astype(int)).tolist()


def test_a_full_disk_is_one_sentence_and_nothing_is_left(folder, tmp_path, monkeypatch, capsys):
    for number in some_calls(folder, tmp_path, monkeypatch):
        with monkeypatch.context() as patched:
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            assert pack_with(patched, folder, tmp_path / "out", number, full)[0] == 2
        error = capsys.readouterr().err
        assert "No space left on device" in error
        assert error.count("\n") == 1
        assert os.listdir(tmp_path) == ["in"]


def test_a_kill_leaves_nothing_that_is_trained_on_and_the_next_packing_works(folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    for number in some_calls(folder, tmp_path, monkeypatch):  # each finds what the one before has left
        with monkeypatch.context() as patched:
            patched.setattr(shutil, "rmtree", lambda *_, **__: None)
            with pytest.raises(Killed):
                pack_with(patched, folder, out, number, Killed())
        assert "does not exist" in sentence(lambda: opened(out))
    assert main(["pack", str(folder), str(out), "--shard-mb", "0.002"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    whole, files = open_sources(path=str(out)), open_sources(path=str(folder))
    assert contents(whole.pretrain) == contents(files.pretrain)
    assert contents(whole.val) == contents(files.val)


@pytest.mark.parametrize("name", [INDEX, CLASS_NAMES])
def test_a_file_that_a_kill_has_left_beside_its_place_is_removed(name, folder, tmp_path):
    left = tmp_path / "out.part" / "train" / name
    left.parent.mkdir(parents=True)
    with open(temporary(str(left)), "xb"):
        pass
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_packing_touches_no_other_files(folder, tmp_path, monkeypatch, capsys):
    beside = tmp_path / "out.part"
    (beside / "train").mkdir(parents=True)
    (beside / "train" / "shard-000000.tar").write_bytes(b"left by a kill")
    (beside / "train" / "notes.txt").write_text("mine")
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 2
    assert "notes.txt is not of a packing that was killed" in capsys.readouterr().err
    assert sorted(os.listdir(beside / "train")) == ["notes.txt", "shard-000000.tar"]
    (beside / "train" / "notes.txt").unlink()
    lock = os.open(beside, os.O_RDONLY)
    pack.fcntl.flock(lock, pack.fcntl.LOCK_EX)
    assert main(["pack", str(folder), str(tmp_path / "out")]) == 2
    assert "is being written by another packing" in capsys.readouterr().err
    os.close(lock)
    (tmp_path / "out").mkdir()
    os.symlink("out", tmp_path / "link")
    assert main(["pack", str(folder), str(tmp_path / "link")]) == 0
    assert contents(opened(tmp_path / "out")) == contents(opened(folder))
    monkeypatch.setattr(os.path, "ismount", lambda _: True)
    assert main(["pack", str(folder), str(tmp_path / "other")]) == 2
    assert "is a mount point" in capsys.readouterr().err


def test_names_of_files_and_classes_that_no_shard_can_hold(folder, tmp_path, capsys):
    cat = folder / "train" / "cat"
    (folder / "list.txt").write_bytes(b"a.jp\xff\nb\n")
    for name in (b"a.jp\xff", b"b"):
        shutil.copy(cat / "0.jpg", os.path.join(os.fsencode(folder), name))
    assert main(["pack", str(folder / "list.txt"), str(tmp_path / "out")]) == 0
    (tmp_path / "out" / INDEX).unlink()
    assert len(opened(tmp_path / "out")) == 2
    os.rename(cat, folder / "train" / "c\nt")
    assert main(["pack", str(folder / "train"), str(tmp_path / "two")]) == 2
    assert "has a class folder with a line break" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- shards


@pytest.mark.parametrize("indexed", [True, False])
def test_a_shard_that_is_cut_anywhere_is_refused_by_name(packed, indexed):
    if not indexed:
        (packed / "train" / INDEX).unlink()
    shard = sorted((packed / "train").glob("*.tar"))[1]
    whole = shard.read_bytes()
    with tarfile.open(shard) as tar:
        members = tar.getmembers()
        end = tar.offset
    starts = [member.offset for member in members]
    inside = members[0].offset_data + 700
    for cut in (0, *starts, inside, inside + 1, members[-1].offset_data + 1, end, end + 512, end + 1023):
        shard.write_bytes(whole[:cut])
        assert str(shard) in sentence(lambda: opened(packed))
    if not indexed:
        shard.write_bytes(whole[: end + 1024])  # as little as a tar file may end with
        assert len(opened(packed)) == 12
        shard.write_bytes(whole + bytes(1 << 21))
        assert len(opened(packed)) == 12
        for damaged in (
            whole[: starts[1]] + bytes(512) + whole[starts[1] + 512 :],  # a header that the disk lost
            whole[: starts[1]] + b"\1" + whole[starts[1] + 1 :],
            whole + whole,
        ):
            shard.write_bytes(damaged)
            assert str(shard) in sentence(lambda: opened(packed))
    shard.unlink()
    if indexed:
        assert f"{shard} is missing" in sentence(lambda: opened(packed))


def test_a_shard_that_its_index_does_not_know_is_refused(packed):
    shutil.copy(next((packed / "train").glob("*.tar")), packed / "train" / "more.tar")
    assert "does not know more.tar" in sentence(lambda: opened(packed))


def write_shard(path, label):
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    with tarfile.open(path, "w") as tar:
        for name, data in (("1.png", image.getvalue()), ("1.cls", label)):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize(
    "label",
    [
        b"",
        b"-1",
        b"1_0",
        b"1000000",
        b"1" * 13,
        b"\xd9\xa3",
        b"7.0",
        b"0x1f",
        b"3 5",
        b"nan",
        b"c\nd",
        b" " * 32 + b"7",
        bytes(200_000),
    ],
)
def test_labels_that_are_no_class(tmp_path, label):
    write_shard(tmp_path / "a.tar", label)
    assert "the label 1.cls is no number below 1,000,000" in sentence(lambda: opened(tmp_path / "a.tar"))


def test_the_largest_label(tmp_path):
    write_shard(tmp_path / "a.tar", b" 999999\n")
    assert len(opened(tmp_path / "a.tar").classes) == 1_000_000


def change_index(folder, **changes):
    with np.load(folder / INDEX) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    for name, change in changes.items():
        found[name] = change(found[name])
    np.savez(folder / INDEX, **{name: value for name, value in found.items() if value is not None})


def with_value(value):
    def change(array):
        array = array.copy()
        array[1] = value
        return array

    return change


@pytest.mark.parametrize(
    "changes",
    [
        {"offset": with_value(-1)},
        {"offset": with_value(1 << 62)},
        {"size": with_value(1 << 40)},
        {"size": with_value(-5)},
        {"shard": with_value(1000)},
        {"shard": with_value(-1)},
        {"shard": lambda array: array[::-1]},
        {"label": with_value(-2)},
        {"label": with_value(10**12)},
        {"label": lambda array: array[:-1]},
        {"label": lambda array: array.astype(float)},
        {"label": lambda array: array[:, None]},
        {"offset": lambda array: array.astype(str)},
        {"keys": lambda array: array[:-14]},
        {"keys": lambda array: array.astype(np.int64)},
        {"names": lambda array: array[:-3]},
        {"bytes": lambda array: array[:-1]},
        {"bytes": lambda array: array.astype(float)},
        {"crc": lambda array: array[1:]},
        {"classes": lambda array: array[:-1]},
        {"label": lambda array: None},
    ],
)
def test_an_index_that_cannot_be_true(packed, changes):
    change_index(packed / "train", **changes)
    told = sentence(lambda: opened(packed))
    assert str(packed / "train") in told


def test_an_index_that_would_fill_the_memory(packed):
    file = packed / "train" / INDEX
    with zipfile.ZipFile(file) as entries:
        contents = {name: entries.read(name) for name in entries.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as entries:
        for name, content in contents.items():
            entries.writestr(name, content)
    assert "(compressed)" in sentence(lambda: opened(packed))
    header = contents["label.npy"]
    contents["label.npy"] = header.replace(b"(12,), }" + b" " * 12, b"(1" + b"0" * 12 + b"2,), }")
    with zipfile.ZipFile(file, "w") as entries:
        for name, content in contents.items():
            entries.writestr(name, content)
    assert "cannot be read" in sentence(lambda: opened(packed))


def test_names_of_classes_are_those_that_were_packed(packed, folder):
    names = packed / "train" / CLASS_NAMES
    content = names.read_bytes()
    assert content == b"cat\nd\xf6g\n"
    names.write_bytes(content.replace(b"cat", b"cow"))
    assert f"{names} is not what was packed" in sentence(lambda: opened(packed))
    names.write_bytes(content[:-1])  # an editor's doing: every name is as it was packed
    assert contents(opened(packed)) == contents(opened(folder))
    names.write_bytes(content[:-2])
    assert f"{names} is not what was packed" in sentence(lambda: opened(packed))
    names.unlink()
    assert contents(opened(packed)) == contents(opened(folder))
    (packed / "train" / INDEX).unlink()
    assert opened(packed / "train").classes == ["0", "1"]
    for damaged in (b"", b"cat\ncat\n", b"cat\n\n", b"\n"):
        names.write_bytes(damaged)
        assert f"{names} has an empty line" in sentence(lambda: opened(packed))
    names.unlink()
    os.mkfifo(names)
    assert f"{names} cannot be read" in sentence(lambda: opened(packed))


# ------------------------------------------------------------------------------------------------- any damage


def damaged(content, rng):
    """The bytes with a bit flipped, cut short, with zeros in them, a part twice, or one number at its largest."""
    place = int(rng.integers(len(content)))
    kind = int(rng.integers(5))
    if kind == 0:
        return content[:place] + bytes([content[place] ^ 1 << int(rng.integers(8))]) + content[place + 1 :]
    if kind == 1:
        return content[:place]
    middle = {2: bytes(4), 3: content[place : place + 40] * 2, 4: b"\xff" * 4}[kind]
    return content[:place] + middle + content[place + len(middle) :]


def outcomes(whole, path, exact, **how):
    """What became of the images at ``path``: right, wrong, bad, fewer, or the set refused. ``whole``: what is right."""
    try:
        source = opened(path, **how)
    except UserError as error:
        return ["refused" if "\n" not in str(error) else "a stack trace"]
    found = []
    for index in range(len(source)):
        try:
            label = source.classes[source.labels[index]] if source.classes else None
            found.append("right" if whole.get(source.load(index).tobytes(), 0) == label else "wrong")
        except BadImageError:
            found.append("bad")
            with contextlib.suppress(UserError):  # not one can be read
                assert TwoViews(source, get_preset("v2"), 8, 1)[(0, index)]["bad"] == index
    return found if not exact or len(source) == len(whole) else ["fewer"]


TARGETS = {  # file, and whether damage never gives another image than the right one
    "image": ("in/train/cat/{}", False),
    "list": ("in/list.txt", False),
    "index": ("in/imagenet.train.index.jsonl", False),
    "shard": ("out/train/shard-000001.tar", True),
    "bare shard": ("bare/shard-000001.tar", False),
    "shards' index": ("out/train/index.npz", True),
    "classes": ("out/train/classes.txt", True),
    "cache": ("kept", True),
}


@pytest.mark.parametrize("target", TARGETS)
def test_damage_of_every_kind_of_file(folder, packed, tmp_path, target):
    """Flipped bits, cuts and zeros at random places, seeded."""
    name, exact = TARGETS[target]
    rng = np.random.default_rng([*target.encode()])
    train = folder / "train"
    images = [(path, label) for label in sorted(os.listdir(train)) for path in sorted((train / label).iterdir())]
    lines = [os.fsencode(os.path.relpath(path, folder)) + b"\t" + os.fsencode(label) for path, label in images]
    (folder / "list.txt").write_bytes(b"\n".join(lines) + b"\n")
    assert main(["index", str(folder)]) == 0
    shutil.copytree(packed / "train", tmp_path / "bare", ignore=lambda *_: [INDEX, CLASS_NAMES])
    right = contents(opened(train))
    how = {}
    where = {
        "list": folder / "list.txt",
        "index": folder / "imagenet.train.index.jsonl",
        "bare shard": tmp_path / "bare",
    }
    path = where.get(target, packed / "train" if name.startswith("out") else train)
    if target == "cache":
        how = {"cache": str(tmp_path / "kept")}
        opened(train, **how)
        name = f"kept/{next(iter(os.listdir(tmp_path / 'kept')))}"
    seen = set()
    for round in range(90 if exact else 60):
        file = tmp_path / name.format(f"{round % 6}.{KINDS[round % 6]}")
        content = file.read_bytes()
        file.write_bytes(damaged(content, rng))
        seen.update(outcomes(right, path, exact, **how))
        file.write_bytes(content)
    if exact:
        assert set(outcomes(right, path, exact, **how)) == {"right"}
    assert not exact or seen <= {"right", "bad", "refused"}
    assert len(seen) > 1 or target in ("cache", "classes")


def test_a_damaged_cache_gives_the_images_of_the_files(folder, tmp_path, monkeypatch):
    kept = {"cache": str(tmp_path / "kept")}
    source = opened(folder / "train", **kept)
    right = [source.load(i).tobytes() for i in range(12)]
    path = tmp_path / "kept" / os.listdir(tmp_path / "kept")[0]
    content = bytearray(path.read_bytes())
    for place in (cache.HEADER + 1, cache.HEADER + cache.ROW + 9, len(content) - 1):
        content[place] ^= 4
    path.write_bytes(content)
    again = opened(folder / "train", **kept)
    assert [again.load(i).tobytes() for i in range(12)] == right
    os.truncate(path, 700)  # under a process that reads it
    assert [again.load(i).tobytes() for i in range(12)] == right
