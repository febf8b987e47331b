"""numpy's numbers and arrays, paths and default dictionaries beside weights are plain data; nothing else is let in."""

import argparse
import collections
import pathlib
import pickle

import numpy as np
import pytest
import torch

from moco import files, plain
from moco.archive import Damaged
from moco.errors import UserError
from moco.weights.layouts import open_file

NUMBERS = {
    "float64": (np.float64(71.2), 71.2),
    "float32": (np.float32(1.5), 1.5),
    "float16": (np.float16(-2), -2.0),
    "int64": (np.int64(-7), -7),
    "uint8": (np.uint8(255), 255),
    "bool": (np.bool_(True), True),
    "complex64": (np.complex64(1 + 2j), 1 + 2j),
    "text": (np.str_("abc"), "abc"),
    "bytes": (np.bytes_(b"xy"), b"xy"),
    "path": (pathlib.PurePosixPath("/a/b.pth"), "/a/b.pth"),
    "relative path": (pathlib.Path("a/b"), "a/b"),
    "default dictionary": (collections.defaultdict(list, a=[1]), {"a": [1]}),
    "flags": (argparse.Namespace(lr=np.float64(0.1), out=pathlib.Path("x")), argparse.Namespace(lr=0.1, out="x")),
}  # fmt: skip


@pytest.mark.parametrize("old", [False, True])
def test_numbers_and_text_become_pythons_own(tmp_path, old):
    values = {name: given for name, (given, _) in NUMBERS.items()}
    torch.save({**values, "w": torch.ones(2)}, tmp_path / "x.pth", _use_new_zipfile_serialization=not old)
    found = files.read(str(tmp_path / "x.pth"))
    for name, (_, wanted) in NUMBERS.items():
        assert found[name] == wanted and type(found[name]) is type(wanted), name


@pytest.mark.parametrize(
    "array",
    [np.arange(6.0).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.arange(3, dtype=">i4"),
     np.zeros((0, 3)), np.array(3.5), np.array(["a", "bcd"]), np.array([True, False]), np.arange(4, dtype=np.uint8)],
    ids=str,
)  # fmt: skip
def test_arrays_keep_their_shape_and_numbers(tmp_path, array):
    torch.save({"x": array, "w": torch.ones(2)}, tmp_path / "x.pth")
    found = files.read(str(tmp_path / "x.pth"))["x"]
    assert np.array_equal(found, array) and found.shape == array.shape and found.dtype.kind == array.dtype.kind


@pytest.mark.parametrize(
    ("value", "words"),
    [(np.array([object()]), "numpy values of type 'O8'"), (np.zeros(2, [("a", "i4"), ("b", "f4")]), "values of type"),
     (np.datetime64("2020-01-01"), "numpy values of type 'M8'")],
    ids=["objects", "fields", "a date"],
)  # fmt: skip
def test_other_numpy_values_are_refused_by_name(tmp_path, value, words):
    torch.save({"x": value, "w": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=words + ".*more than numbers and text; refused. Save its tensors alone"):
        files.read(str(tmp_path / "x.pth"))


class Reduced:
    """Is pickled as a call of any function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [(print, ("ran",)), (np.load, ("x.npy",)), (np.frombuffer, (b"12345678",)), (eval, ("1",)),
     (np.dtype, ("f8", False, True), (3, "<", None, ("a",), {"a": (np.dtype("f8"), 100)}, 8, 1, 0)),
     (np.dtype, ("O", False, True), (3, "|", None, None, None, -1, -1, 0)),
     (np.ndarray, ((1,), "O", b"AAAAAAAA")), (np.ndarray, ((16,), "f4", b"abcdefgh", -64))],
    ids=lambda call: call[0].__name__ + str(len(call)),
)  # fmt: skip
def test_nothing_is_called_and_no_layout_of_memory_is_taken(tmp_path, capsys, call):
    torch.save({"x": Reduced(*call), "w": torch.ones(2)}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="refused"):
        files.read(str(tmp_path / "x.pth"))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [1 << 40, [object()], None])
def test_an_arrays_content_is_bytes(content):
    array = np.empty(0, np.uint8).view(plain.PlainArray)
    with pytest.raises(Damaged, match="a numpy array of objects"):
        array.__setstate__((1, (2,), plain.PlainDtype("f8"), False, content))


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 62,), (-1,), (2.0,), [1], np.zeros(3, int)], ids=str)
@pytest.mark.parametrize("kind", ["f8", "S0"])
def test_an_array_that_does_not_fit_its_bytes_is_none(shape, kind):
    array = np.empty(0, np.uint8).view(plain.PlainArray)
    with pytest.raises(Damaged, match="does not fit its bytes"):
        array.__setstate__((1, shape, plain.PlainDtype(kind), False, b"12345678"))


def test_an_array_is_filled_once():
    """A second time would free what a tensor may share."""
    array = np.empty(0, np.uint8).view(plain.PlainArray)
    array.__setstate__((1, (1,), plain.PlainDtype("u1"), False, b"7"))
    with pytest.raises(Damaged, match="does not fit its bytes"):
        array.__setstate__((1, (1,), plain.PlainDtype("u1"), False, b"8"))
    assert array.tolist() == [ord("7")]


def test_a_network_of_arrays_is_read_as_tensors(tmp_path):
    torch.save({"state_dict": {"layer1.weight": np.arange(6, dtype=np.float32).reshape(2, 3)}}, tmp_path / "x.pth")
    (found,) = open_file(str(tmp_path / "x.pth")).tensors.values()
    assert torch.equal(found, torch.arange(6.0).reshape(2, 3))


def test_arrays_of_the_other_byte_order_are_weights_too_and_one_of_two_names_is_copied_once(tmp_path):
    array = np.arange(3, dtype=">f4")
    torch.save({"state_dict": {"a": array, "b": array}}, tmp_path / "x.pth")
    found = open_file(str(tmp_path / "x.pth")).tensors
    assert found["a"].tolist() == [0.0, 1.0, 2.0]
    assert found["a"].data_ptr() == found["b"].data_ptr()


def test_what_is_read_can_be_written_again(tmp_path):
    torch.save({"x": np.arange(3.0), "w": torch.ones(2)}, tmp_path / "x.pth")
    found = files.read(str(tmp_path / "x.pth"))
    again = pickle.loads(pickle.dumps(found["x"]))
    assert type(again) is np.ndarray and again.tolist() == [0.0, 1.0, 2.0]
    files.write(found, str(tmp_path / "y.pth"))
    assert files.read(str(tmp_path / "y.pth"))["x"].tolist() == [0.0, 1.0, 2.0]
