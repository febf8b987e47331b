"""Lists as other programs write them: where paths begin, what is between path and label, headers, comments."""

import os

import numpy as np
import pytest
from PIL import Image

from moco.data import open_sources
from moco.data.sources.subset import choose_subset, find_rows, read_names
from moco.errors import UserError


@pytest.fixture
def folder(tmp_path):
    """Two classes of two images in train/, and images whose names hold spaces and commas."""
    for name in ("train/a/0.png", "train/a/1.png", "train/b/0.png", "odd/two words.png", "odd/a,b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.linear_gradient("L").resize((8, 6)).save(tmp_path / name)
    return tmp_path


def read(folder, text: str, name: str = "list.txt"):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(text.encode())
    return open_sources(path=str(folder / name)).pretrain


def paths(source, folder) -> list[str]:
    return [os.path.relpath(source.name_of(i), folder) for i in range(len(source))]


def mistake(folder, text: str) -> str:
    with pytest.raises(UserError) as caught:
        read(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


ALL = ["train/a/0.png", "train/a/1.png", "train/b/0.png"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train/a/0.png 0\ntrain/a/1.png 0\ntrain/b/0.png 1\n", "a label with a space between"),
        ("train/a/0.png,0\ntrain/a/1.png,0\ntrain/b/0.png,1\n", "a label with a comma between"),
        ("train/a/0.png, cat\ntrain/a/1.png, cat\ntrain/b/0.png, dog\n", "a label with a comma between"),
        ("train/a/0.png;x\ntrain/a/1.png;x\ntrain/b/0.png;y\n", "a label with a semicolon between"),
        ("train/a/0.png\t0\r\ntrain/a/1.png\t0\r\n\r\ntrain/b/0.png\t1\r\n", ""),
        ("\ufefftrain/a/0.png\t0\ntrain/a/1.png\t0\ntrain/b/0.png\t1\t\n", ""),
        ("path\tlabel\ntrain/a/0.png\t0\ntrain/a/1.png\t0\ntrain/b/0.png\t1\n", "line 1 of"),
        ("image,label\ntrain/a/0.png,0\ntrain/a/1.png,0\ntrain/b/0.png,1\n", "(image,label)"),
        ("label,filename\n0,train/a/0.png\n0,train/a/1.png\n1,train/b/0.png\n", "names of its columns"),
        (
            ",image_id,width,class\n0,train/a/0.png,8,u\n1,train/a/1.png,8,u\n2,train/b/0.png,8,v\n",
            "names of its columns",
        ),
        ('"file name","class"\n"train/a/0.png","c, d"\n"train/a/1.png","c, d"\n"train/b/0.png","e"\n', "names of its"),
        (
            "# made by hand\ntrain/a/0.png\t0\n#train/gone.png\t3\ntrain/a/1.png\t0\ntrain/b/0.png\t1\n",
            "2 of the lines",
        ),
        ("./train/a/0.png 0\n./train/a/1.png 0\n./train/b/0.png 1\n", "a space between"),
        ("train\\a\\0.png,0\r\ntrain\\a\\1.png,0\r\ntrain\\b\\0.png,1\r\n", "the backslashes"),
        ("train/a/0.png     0\ntrain/a/1.png   0\ntrain/b/0.png\u20091\n", "a space between"),
    ],
)
def test_a_path_and_a_label_a_line(folder, text, told):
    source = read(folder, text)
    assert paths(source, folder) == ALL
    assert source.labels.tolist() == [0, 0, 1]
    assert source.found.layout == "list"
    assert told in "\n".join(source.found.notes)
    assert bool(source.found.notes) == bool(told)


@pytest.mark.parametrize(
    ("name", "text", "base"),
    [
        ("train/list.txt", "train/a/0.png\ntrain/b/0.png\n", ""),
        ("meta/train.txt", "a/0.png 0\nb/0.png 1\n", "train"),
        ("train.txt", "a/0.png\nb/0.png\n", "train"),
        ("lists/any.lst", "train/a/0.png,x\ntrain/b/0.png,y\n", ""),
        ("l/x.csv", "image,label\ntrain/a/0.png,x\ntrain/b/0.png,y\n", ""),
    ],
)
def test_what_paths_are_relative_to(folder, name, text, base):
    source = read(folder, text, name)
    assert paths(source, folder) == ["train/a/0.png", "train/b/0.png"]
    assert f"are read as relative to {folder / base}".rstrip("/") in "\n".join(source.found.notes)


def test_absolute_paths(folder):
    source = read(folder, f"{folder}/train/a/0.png 5\n{folder}/train/b/0.png 7\n")
    assert paths(source, folder) == ["train/a/0.png", "train/b/0.png"]
    assert source.classes == ["5", "7"]


def test_spaces_and_commas_of_names_stay(folder):
    source = read(folder, "odd/two words.png\nodd/a,b.png\n")
    assert (paths(source, folder), source.labels) == (["odd/two words.png", "odd/a,b.png"], None)
    source = read(folder, "odd/two words.png x\nodd/a,b.png y\n")
    assert (paths(source, folder), source.classes) == (["odd/two words.png", "odd/a,b.png"], ["x", "y"])
    (folder / "#1.png").write_bytes((folder / "odd" / "a,b.png").read_bytes())
    assert paths(read(folder, "#1.png\nodd/a,b.png\n"), folder) == ["#1.png", "odd/a,b.png"]


def test_a_line_that_may_mean_two_files_is_refused_by_its_number(folder):
    Image.new("RGB", (8, 6)).save(folder / "odd" / "two", format="PNG")
    said = mistake(folder, "train/a/0.png x\n\ntrain/b/0.png x\nodd/two words.png\n")
    assert "line 4 of the list" in said
    assert "may mean odd/two words.png or odd/two, as both exist" in said


def test_labels_on_some_lines_name_the_first_without(folder):
    assert "labels on 2 of 3 lines (none on line 3)" in mistake(
        folder, "train/a/0.png,0\n\ntrain/b/0.png,\ntrain/a/1.png,1\n"
    )


@pytest.mark.parametrize("text", ["train/a/0.png\t\ntrain/b/0.png\t\n", "train/a/0.png,\ntrain/b/0.png,\n"])
def test_empty_labels_are_none_and_told(folder, text):
    source = read(folder, text)
    assert (paths(source, folder), source.labels) == (["train/a/0.png", "train/b/0.png"], None)
    assert "the labels of" in "".join(source.found.notes)


def test_a_header_alone_and_comments_alone(folder):
    assert "no file named in" in mistake(folder, "path\tlabel\n")
    assert "nothing but comments" in mistake(folder, "# a\n#b\n")


def test_columns_behind_the_second_are_told(folder):
    source = read(folder, "train/a/0.png\tx\t9\ntrain/b/0.png\ty\t9\n")
    assert source.classes == ["x", "y"]
    assert "the columns of" in "".join(source.found.notes)


# ------------------------------------------------------------------------------------------------- --train-files


@pytest.fixture
def whole(folder):
    return open_sources(path=str(folder / "train")).pretrain


@pytest.mark.parametrize(
    "spelled",
    [
        "b/0.png",
        "./b/0.png",
        "train/b/0.png",
        "./train/b/0.png",
        "b\\0.png",
        "train\\b\\0.png",
        "b/0.png 1",
        "b/0.png,1",
        "b/0.png\t1",
        "b/0.png;dog",
        '"b/0.png","1"',
        "b/0.png, 1",
        "train/b/0.png two",
        "FOLDER/train/b/0.png",
        "FOLDER/train/b/0.png 1",
        '"b/0.png"',
    ],
)
def test_names_of_images_that_are_known(folder, whole, spelled):
    assert find_rows(whole, [spelled.replace("FOLDER", str(folder))], "list.txt").tolist() == [2]


def test_a_header_comments_and_labels_are_left_out_and_told(folder, whole):
    (folder / "list.csv").write_bytes(b"\xef\xbb\xbffilename,class\r\n# mine\r\na/0.png,0\r\nb/0.png,1\r\n")
    files = str(folder / "list.csv")
    assert find_rows(whole, read_names(files), files).tolist() == [0, 2]
    train, _, told = choose_subset(whole, None, files, 0.0, 0, "")
    assert train.rows.tolist() == [0, 2]
    assert told == f"the list {files}; 1 header left out; 1 comments left out; 2 labels left out"


def test_names_with_spaces_and_two_meanings(folder):
    Image.new("RGB", (8, 6)).save(folder / "train" / "a" / "two words.png")
    Image.new("RGB", (8, 6)).save(folder / "train" / "a" / "two.jpg", format="PNG")
    source = open_sources(path=str(folder / "train")).pretrain
    names = [source.name_of(i) for i in range(len(source))]
    assert [names[i][-9:] for i in find_rows(source, ["a/two words.png"], "l")] == ["words.png"]
    Image.new("RGB", (8, 6)).save(folder / "train" / "a" / "two.jpg 1.png", format="PNG")
    source = open_sources(path=str(folder / "train")).pretrain
    with pytest.raises(UserError, match=r"the line a/two.jpg 1.png of l may mean a/two.jpg 1.png or a/two.jpg"):
        find_rows(source, ["a/two.jpg 1.png"], "l")


@pytest.mark.parametrize("name", ["c/0.png", "/elsewhere/b/0.png", "val/b/0.png", "b/0.png.bak", "label"])
def test_what_is_not_there_is_refused(whole, name):
    with pytest.raises(UserError, match=r"1 of the 2 images in l are not in .*, the first "):
        find_rows(whole, ["a/1.png", name], "l")


def test_a_list_for_arrays_is_read_as_before():
    from moco.data import ArraySource

    digits = ArraySource("digits/train", np.zeros((4, 8, 8), np.uint8), labels=np.zeros(4, np.int64))
    assert find_rows(digits, ["train[2] 7", "digits/train[0]"], "l").tolist() == [0, 2]


THREE = [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("id,image,label\n7,train/a/0.png,x\n8,train/a/1.png,x\n9,train/b/0.png,y\n", "path is image, the label label"),
        ("class id,path,size\n0,train/a/0.png,3\n0,train/a/1.png,4\n1,train/b/0.png,5\n", "the label class id"),
        ("foo,bar\ntrain/a/0.png,x\ntrain/a/1.png,x\ntrain/b/0.png,y\n", "line 1 of {} names no image and is left out"),
        ("foo\tbar\ntrain/a/0.png\tx\ntrain/a/1.png\tx\ntrain/b/0.png\ty\n", "and is left out (foo\tbar)"),
        ("id,label\na/0,x\na/1,x\nb/0,y\n", "with .png behind them"),
        ("train/a/0 0\ntrain/a/1 0\ntrain/b/0 1\n", "with .png behind them"),
        ("a/0.png\tx\na/1.png\tx\nb/0.png\ty\n", "relative to {folder}/train"),
    ],
)
def test_columns_headers_and_names_without_extension(folder, text, told):
    source = read(folder, text, "labels.csv")
    assert (paths(source, folder), source.labels.tolist()) == (ALL, THREE)
    assert told.format(folder / "labels.csv", folder=folder) in "\n".join(source.found.notes)


def test_a_header_without_a_label_is_told(folder):
    source = read(folder, "image,cat,dog\ntrain/a/0.png,1,0\ntrain/b/0.png,0,1\n")
    assert source.labels is None
    assert "the path is image, the label none" in source.found.notes[0]


def test_files_that_are_not_there_are_told(folder):
    source = read(folder, "train/a/0.png\nnope/1.png\ntrain/b/0.png\nnope/2.png\n")
    said = f"2 of the 4 lines of {folder}/list.txt that were looked at name no file, the first {folder}/nope/1.png"
    assert f"{said} (line 2)" in "\n".join(source.found.notes)


@pytest.mark.parametrize(
    ("last", "told"),
    [
        ("train/a/0.png\tx", "1 line of {} name an image again: it counts as often as it is named"),
        ("train/a/0.png\ty", "1 line of {} name an image again, 1 with another label, the first"),
    ],
)
def test_images_that_are_named_twice_are_told(folder, last, told):
    source = read(folder, f"train/a/0.png\tx\ntrain/b/0.png\ty\n{last}\n")
    assert len(source) == 3
    assert told.format(folder / "list.txt") in "\n".join(source.found.notes)


@pytest.mark.parametrize(
    ("line", "before"),
    [
        ("/home/b/set/train/a/0.png", "/home/b/set/"), ("/home/b/set/train/a/0.png 3", "/home/b/set/"),
        ("C:\\set\\train\\a\\0.png\tx", "C:\\set\\"), ("s3://bucket/train/a/0.png,x", "s3://bucket/"),
    ],
)  # fmt: skip
def test_paths_of_another_machine_say_what_to_remove(folder, line, before):
    assert f"remove {before} from each line, as {folder}/train/a/0.png exists" in mistake(folder, f"{line}\n{line}\n")
