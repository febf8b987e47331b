"""Which number of channels is taken for a folder: the files' own, told in a sentence; nothing is dropped unsaid."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.many_channels import write_bands, write_pages

from moco.data import open_sources
from moco.data.registry import channel_statistics
from moco.data.sources.cache import CachedSource
from moco.data.sources.files import open_folder
from moco.data.sources.pack import pack
from moco.data.stack import Stack
from moco.errors import UserError


def values(channels, seed=0, size=(24, 20)):
    return np.random.default_rng(seed).integers(0, 256, (*size, channels), dtype=np.uint8)


def save(path, channels, seed=0):
    """By the extension; the pages of NAME.pages.tif are the channels."""
    array = values(channels, seed)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.name.endswith(".pages.tif"):
        write_pages(path, array)
    elif path.suffix == ".tif":
        write_bands(path, array, photometric=2 if channels in (3, 4) else 1)
    else:
        Image.fromarray(array).save(path)


def folder(tmp_path, *files):
    place = tmp_path / "set"
    for number, (name, channels) in enumerate(files):
        path = place / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save(path, channels, number)
    return str(place)


@pytest.mark.parametrize("ending", [".npy", ".tif", ".pages.tif"])
@pytest.mark.parametrize("channels", [2, 4, 5, 16])
def test_the_files_own_number_is_taken_and_told(tmp_path, ending, channels):
    place = folder(tmp_path, *((f"{number}{ending}", channels) for number in range(6)))
    for asked in (None, channels):
        source = open_sources(path=place, channels=asked).pretrain
        assert source.channels == channels
        image = source.load(2)
        assert isinstance(image, Stack)
        assert np.array_equal(image.levels(), values(channels, int(source.name_of(2).split("/")[-1].split(".")[0])))
        told = any(f"read as {channels} channels" in note for note in source.found.notes)
        assert told == (asked is None)


def test_the_cache_and_shards_hold_the_same_images(tmp_path):
    place = folder(tmp_path, *((f"{number}.npy", 5) for number in range(4)), ("4.tif", 5), ("5.pages.tif", 5))
    plain = open_sources(path=place).pretrain
    for _ in range(2):  # made, then read
        cached = open_sources(path=place, cache=str(tmp_path / "cache")).pretrain
        assert isinstance(cached, CachedSource)
        for index in range(6):
            assert cached.load(index).tobytes() == plain.load(index).tobytes()
    pack({"": open_folder(place)}, str(tmp_path / "shards"))
    shards = open_sources(path=str(tmp_path / "shards")).pretrain
    assert shards.channels == 5
    assert sorted(shards.load(i).tobytes() for i in range(6)) == sorted(plain.load(i).tobytes() for i in range(6))


def test_held_out_images_are_read_as_those_of_training(tmp_path):
    for split in ("train", "val"):
        folder(tmp_path / split, *((f"{number}.npy", 5) for number in range(4)))
        (tmp_path / split / "set").rename(tmp_path / f"{split}_")
        (tmp_path / split).rmdir()
        (tmp_path / f"{split}_").rename(tmp_path / split)
    sources = open_sources(path=str(tmp_path))
    assert sources.val is not None
    assert (sources.pretrain.channels, sources.val.channels) == (5, 5)


@pytest.mark.parametrize("ending", [".png", ".tif", ".npy"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_images_are_read_as_ever(tmp_path, ending, channels):
    place = tmp_path / "set"
    place.mkdir()
    array = values(channels)[..., 0] if channels == 1 else values(3)
    np.save(place / "a.npy", array) if ending == ".npy" else Image.fromarray(array).save(place / f"a{ending}")
    source = open_sources(path=str(place)).pretrain
    assert source.channels == 3
    assert source.found.notes == []
    assert np.array_equal(source.load(0), np.asarray(Image.fromarray(array).convert("RGB")))


def test_files_of_several_numbers_are_refused_by_their_names(tmp_path):
    place = folder(tmp_path, ("0.npy", 5), ("1.npy", 4))
    with pytest.raises(UserError, match=r"different channels, .*\.npy \d and .*\.npy \d: .*--channels"):
        open_sources(path=place)
    source = open_sources(path=place, channels=4).pretrain
    assert isinstance(source.load(1), Stack)


@pytest.mark.parametrize(
    ("files", "asked", "told"),
    [
        ([("0.tif", 4), ("1.tif", 4)], 3, "4 bands, of which the colours alone"),
        ([("0.pages.tif", 5), ("1.pages.tif", 5)], 3, "5 pages, of which the first page alone"),
        ([("0.pages.tif", 5), ("1.pages.tif", 2)], None, "5 pages, of which the first page alone"),
        ([("0.pages.tif", 17), ("1.pages.tif", 17)], None, "several pages, of which the first is read"),
        ([("0.png", 3), ("1.pages.tif", 5)], None, "5 pages, of which the first page alone"),
    ],
)
def test_what_is_left_out_is_told(tmp_path, files, asked, told):
    source = open_sources(path=folder(tmp_path, *files), channels=asked).pretrain
    assert source.channels == 3
    assert any(told in note for note in source.found.notes)


@pytest.mark.parametrize(
    ("files", "asked", "said"),
    [
        ([("0.npy", 5), ("1.npy", 5)], 3, "has 5 channels, but --channels or the checkpoint is of 3"),
        ([("0.tif", 6), ("1.tif", 6)], 1, "has 6 bands, but --channels or the checkpoint is of 1"),
        ([("0.npy", 5), ("1.npy", 5)], 7, "has 5 channels, but --channels or the checkpoint is of 7"),
        ([("0.png", 3), ("1.png", 3)], 5, "is grey or colour, but --channels or the checkpoint is of 5"),
    ],
)
def test_images_of_none_of_the_channels_asked_for_are_refused(tmp_path, files, asked, said):
    with pytest.raises(UserError, match=said):
        open_sources(path=folder(tmp_path, *files), channels=asked)


def test_arrays_of_two_readings_are_refused_by_name_until_one_is_typed(tmp_path):
    (tmp_path / "set").mkdir()
    array = np.zeros((8, 9, 5), np.uint8)
    np.save(tmp_path / "set" / "a.npy", array)
    with pytest.raises(UserError, match=r"a\.npy .*say which by --channels 8 or 5"):
        open_sources(path=str(tmp_path / "set"))
    sizes = [open_sources(path=str(tmp_path / "set"), channels=n).pretrain.load(0).size for n in (5, 8)]
    assert sizes == [(9, 8), (5, 9)]


def test_arrays_beside_pictures_are_no_images(tmp_path):
    place = folder(tmp_path, ("0.png", 3), ("1.png", 3), ("2.npy", 5), ("3.npy", 5))
    source = open_sources(path=place).pretrain
    assert [name.rsplit("/", 1)[1] for name in source.files()] == ["0.png", "1.png"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.png", "x.npy"):
            file = io.BytesIO()
            np.save(file, values(5)) if name == "x.npy" else Image.fromarray(values(3)).save(file, "PNG")
            member = tarfile.TarInfo(name)
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    assert len(open_sources(path=str(tmp_path / "a.tar")).pretrain) == 1


def test_known_data_sets_are_grey_or_colour():
    with pytest.raises(UserError, match="cifar10 has grey or colour images: --channels is 1 or 3"):
        open_sources("cifar10", "/nowhere", channels=5)


@pytest.mark.parametrize("channels", [2, 4, 5, 16])
def test_statistics_of_other_channels_are_not_imagenets(channels):
    assert channel_statistics(None, channels) == ([0.5] * channels, [0.25] * channels)
    assert channel_statistics(None, channels, mean=[0.1] * channels)[0] == [0.1] * channels
    with pytest.raises(UserError, match=f"these images have {channels}"):
        channel_statistics(None, channels, std=[0.1] * 3)
