"""python -m moco.data check: what it counts, what it refuses, its JSON; the same by any number of processes."""

import io
import json
import os
import shutil
import tarfile

import numpy as np
import pytest
from PIL import Image

from moco.data.__main__ import main
from moco.data.check.look import look
from moco.data.open import open_sources


def picture(seed, width=20, height=16):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (height, width, 3)).astype(np.uint8))


@pytest.fixture
def folder(tmp_path):
    """train/ with 4 cats and 3 dogs, val/ with one of each; 20 x 16 pixels but for one of 30 x 40."""
    for number, (split, name, count) in enumerate(
        [("train", "cat", 4), ("train", "dog", 3), ("val", "cat", 1), ("val", "dog", 1)]
    ):
        (tmp_path / "in" / split / name).mkdir(parents=True)
        for i in range(count):
            size = (30, 40) if (split, name, i) == ("train", "dog", 2) else (20, 16)
            picture(10 * number + i, *size).save(tmp_path / "in" / split / name / f"{i}.png")
    return tmp_path / "in"


def checked(capsys, *words, code=0):
    assert main(["check", *map(str, words), "--workers", "0", "--json", "-"]) == code
    return json.loads(capsys.readouterr().out)


def test_counts_classes_sizes_and_modes_of_a_folder(folder, capsys):
    report = checked(capsys, folder)
    train, val = report["splits"]["train"], report["splits"]["val"]
    assert (train["images"], train["labelled"], val["images"]) == (7, True, 2)
    assert train["classes"] == {
        "count": 2, "empty": 0, "min": 3, "median": 3.5, "max": 4, "images": {"cat": 4, "dog": 3},
    }  # fmt: skip
    sizes = train["sizes"]
    assert (sizes["width"], sizes["height"], sizes["short_side"]) == ([20, 20, 30], [16, 16, 40], [16, 16, 30])
    assert sizes["frequent"][0] == {"width": 20, "height": 16, "images": 6}
    assert train["formats"] == {"PNG": 7}
    assert [(row["mode"], row["bits"], row["images"]) for row in train["modes"]] == [("RGB", 8, 7)]
    assert report["modes"]["pretrain"] == {"images": 7, "labelled": True}
    assert report["modes"]["probe"] == {"train": 7, "val": 2, "classes": 2}
    assert report["modes"]["supcon"] == {"images": 7, "classes": 2}
    assert (report["refused"], report["warnings"], report["shared"], report["exit_code"]) == ([], [], [], 0)


def test_mean_and_std_are_those_of_all_pixels(folder, capsys):
    train = checked(capsys, folder)["splits"]["train"]
    source = open_sources(None, str(folder)).pretrain
    pixels = np.concatenate([np.asarray(source.load(i), float).reshape(-1, 3) for i in range(len(source))]) / 255
    np.testing.assert_allclose(train["mean"], pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(train["std"], pixels.std(0), rtol=1e-12)
    grey = checked(capsys, folder, "--channels", 1)["splits"]["train"]
    assert len(grey["mean"]) == len(grey["std"]) == 1


def test_images_of_one_colour_have_no_deviation(tmp_path, capsys):
    for i in range(3):
        Image.new("RGB", (7 + i, 5), (1, 128, 254)).save(tmp_path / f"{i}.png")
    report = checked(capsys, tmp_path)["splits"]["train"]
    assert report["std"] == [0, 0, 0]
    np.testing.assert_allclose(report["mean"], [1 / 255, 128 / 255, 254 / 255], rtol=1e-15)


def test_floats_that_are_no_numbers_and_reasons_without_addresses(tmp_path, capsys):
    values = np.full((4, 4), np.nan, np.float32)
    Image.fromarray(values).save(tmp_path / "0.tif")
    values[0] = 0.25, 3, np.inf, 1
    Image.fromarray(values).save(tmp_path / "1.tif")
    (tmp_path / "2.png").write_bytes(b"")
    train = checked(capsys, tmp_path)["splits"]["train"]
    assert [(row["mode"], row["low"], row["high"]) for row in train["modes"]] == [("F", 0, 3)]
    assert train["unreadable"] == [{"image": str(tmp_path / "2.png"), "reason": "is empty"}]


def test_equal_images_are_found_within_a_split_and_across(folder, capsys):
    shutil.copy(folder / "train" / "cat" / "1.png", folder / "val" / "cat" / "again.png")
    shutil.copy(folder / "train" / "cat" / "2.png", folder / "train" / "dog" / "as dog.png")
    shutil.copy(folder / "train" / "cat" / "3.png", folder / "train" / "cat" / "twice.png")
    report = checked(capsys, folder)
    assert report["shared"] == [
        {"val": str(folder / "val" / "cat" / "again.png"), "train": str(folder / "train" / "cat" / "1.png")}
    ]
    groups = {os.path.basename(group["images"][1]): group for group in report["splits"]["train"]["duplicates"]}
    assert {name: group["labels_differ"] for name, group in groups.items()} == {"as dog.png": True, "twice.png": False}
    assert sum("repeated" in warning for warning in report["warnings"]) == 2
    assert any("again.png" in warning for warning in report["warnings"])


def test_a_page_names_five_of_many(tmp_path, capsys):
    for i in range(9):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.jpg").write_bytes(b"")
    assert main(["check", str(tmp_path), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert f"= {tmp_path}/4.png and 4 more\n" in said
    assert "5.png" not in said
    assert f"    {tmp_path}/4.jpg (is empty)\n    and 4 more (--json lists all)" in said


def test_unreadable_images_are_named_and_refused_above_what_a_run_accepts(folder, capsys):
    bad = folder / "train" / "dog" / "bad.jpg"
    bad.write_bytes(b"no image")
    report = checked(capsys, folder, "--max-bad-images", 1)
    assert [one["image"] for one in report["splits"]["train"]["unreadable"]] == [str(bad)]
    assert report["splits"]["train"]["sizes"]["frequent"][0]["images"] == 6  # of the readable ones
    assert len(report["warnings"]) == 1
    report = checked(capsys, folder, "--max-bad-images", 0, code=2)
    assert f"1 of the 8 images of {folder}/train cannot be read, the first {bad} (" in report["refused"][0]
    assert report["splits"]["val"]["images"] == 2
    assert report["exit_code"] == 2


def test_what_cannot_be_opened_is_said_and_the_rest_is_checked(folder, capsys):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    with tarfile.open(folder / "val" / "a.tar", "w") as tar:
        for name in ("a.jpg", "a.png"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert main(["check", str(folder), "--workers", "0"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert "a.jpg and a.png" in said.err
    assert "train: 7 images in 2 classes" in said.out
    assert main(["check", str(folder / "nowhere"), "--workers", "0"]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_sixteen_bits_of_which_twelve_are_used(tmp_path, capsys):
    values = np.random.default_rng(0).integers(0, 4096, (9, 9)).astype(np.uint16)
    values[0, :2] = 3, 4095
    for number, kind in enumerate(("png", "tif")):
        Image.fromarray(values + number * 0).save(tmp_path / f"{number}.{kind}")
    Image.fromarray(np.full((9, 9), 200, np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(values[:5] > 99).save(tmp_path / "1.png")
    rows = {row["mode"]: row for row in checked(capsys, tmp_path)["splits"]["train"]["modes"]}
    assert (rows["I;16"]["bits"], rows["I;16"]["bits_used"], rows["I;16"]["high"]) == (16, 12, 4095)
    assert (rows["L"]["bits"], rows["L"]["bits_used"], rows["L"]["high"]) == (8, None, 200)
    assert rows["1"]["bits"] == 1


@pytest.mark.parametrize("kind", ["list", "shards", "folder without classes"])
def test_other_layouts_give_the_same_figures(folder, tmp_path, capsys, kind):
    whole = checked(capsys, folder)["splits"]["train"]
    if kind == "list":
        path = tmp_path / "list.txt"
        path.write_text("".join(f"{file}\n" for file in sorted((folder / "train").glob("*/*.png"))))
    elif kind == "shards":
        path = tmp_path / "packed"
        assert main(["pack", str(folder / "train"), str(path)]) == 0
        capsys.readouterr()
    else:
        path = tmp_path / "flat"
        path.mkdir()
        for number, file in enumerate((folder / "train").glob("*/*.png")):
            shutil.copy(file, path / f"{number}.png")
    found = checked(capsys, path)["splits"]["train"]
    assert {name: found[name] for name in ("mean", "std", "sizes", "formats", "modes")} == {
        name: whole[name] for name in ("mean", "std", "sizes", "formats", "modes")
    }
    assert found["labelled"] == (kind == "shards")


def test_without_labels_no_probe_and_no_supcon(tmp_path, capsys):
    for i in range(3):
        picture(i).save(tmp_path / f"{i}.png")
    modes = checked(capsys, tmp_path)["modes"]
    assert modes["pretrain"] == {"images": 3, "labelled": False}
    assert "has no held-out images" in modes["probe"]["no"]
    assert "has no labels" in modes["supcon"]["no"]


def test_held_out_classes_that_training_lacks_are_refused(folder, capsys):
    (folder / "val" / "dog").rename(folder / "val" / "emu")
    report = checked(capsys, folder, code=2)
    assert "emu" in report["refused"][0]
    assert [split["images"] for split in report["splits"].values()] == [7, 2]
    assert "emu" in report["modes"]["probe"]["no"]


def test_a_data_set_in_memory(capsys):
    report = checked(capsys, "--dataset", "mnist5k")
    assert [split["images"] for split in report["splits"].values()] == [4000, 1000]
    assert report["splits"]["train"]["formats"] == {"memory": 4000}
    assert report["splits"]["train"]["sizes"]["width"] == [28, 28, 28]


def test_processes_change_nothing(folder, tmp_path, capsys):
    for i in range(40):  # more than one chunk
        picture(100 + i).save(folder / "train" / "cat" / f"more{i}.png")
    alone = checked(capsys, folder)
    assert main(["check", str(folder), "--workers", "2", "--json", str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text()) == alone
    said = capsys.readouterr().out
    assert "train: 47 images in 2 classes" in said
    assert "classes: cat 44, dog 3" in said


def test_each_file_is_read_once(folder, monkeypatch):
    source = open_sources(None, str(folder)).pretrain
    reads, contents = [], type(source).contents
    monkeypatch.setattr(type(source), "contents", lambda self, index: reads.append(index) or contents(self, index))
    found = [look(source, index) for index in range(len(source))]
    assert reads == list(range(7))
    assert found[3].sums == tuple(np.asarray(source.load(3), int).reshape(-1, 3).sum(0))


def test_suggested_settings_fit_the_set(folder, capsys):
    suggested = checked(capsys, folder)["suggested"]
    assert (suggested["size"], suggested["aug"]) == (32, "cifar")
    assert (suggested["batch_size"], suggested["moco_k"]) == (2, 2)
    assert len(suggested["mean"]) == 3
