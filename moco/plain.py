"""Plain data beside the weights of other projects' files that torch refuses by itself: numpy's numbers and arrays,
paths, default dictionaries, Lightning's. Each becomes a value of Python or an array of numbers, and none runs code.

numpy's own functions are not let in: a dtype's state can name any memory layout, and with it any memory. The ones here
take a byte order and nothing else, of booleans, integers, floats, complex numbers and text.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from moco.archive import Damaged

_KINDS = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c(8|16)|[SU]\d{1,6})")  # as numpy names them in a pickle


class PlainDtype:
    """numpy.dtype as a pickle makes it: of a name, and then of a state whose second entry is the byte order."""

    def __init__(self, name: Any, *flags: Any) -> None:
        if not isinstance(name, str) or not _KINDS.fullmatch(name):
            raise _refusal(f"numpy values of type {name!r}"[:60])
        self.dtype = np.dtype(name)

    def __setstate__(self, state: Any) -> None:
        order, *layout = state[1:5]
        if order not in ("<", ">", "=", "|") or any(entry is not None for entry in layout):
            raise _refusal("numpy values of several fields")
        self.dtype = self.dtype.newbyteorder(order)


class PlainArray(np.ndarray):
    """numpy.ndarray as a pickle makes it: empty, by ``_array``, and then once of a state with shape, type, order and
    bytes. Written again it is numpy's own."""

    def __new__(cls, *given: Any, **named: Any) -> Any:
        """Refused: a pickle that calls numpy's own constructor may name objects, foreign memory and any size."""
        raise _refusal("a numpy array that numpy did not save")

    def __reduce__(self) -> Any:
        return self.view(np.ndarray).__reduce__()

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, fortran, content = state
        content = content.encode("latin-1") if isinstance(content, str) else content
        if not isinstance(content, bytes) or not isinstance(kind, PlainDtype):
            raise _refusal("a numpy array of objects")
        sizes = type(shape) is tuple and all(type(n) is int and n >= 0 for n in shape)
        # A second state would free the memory that a tensor may share.
        if not sizes or math.prod(shape) > len(content) or getattr(self, "_filled", False):
            raise _refusal("a numpy array that does not fit its bytes")
        self._filled = True
        super().__setstate__((1, tuple(shape), kind.dtype, bool(fortran), content))  # pyright: ignore[reportArgumentType]


def _array(kind: Any, shape: Any, code: Any) -> PlainArray:
    """numpy's _reconstruct: the array that is filled afterwards."""
    if kind is not PlainArray:
        raise _refusal("an array of another class than numpy's own")
    return np.empty(0, np.uint8).view(PlainArray)


def _scalar(kind: PlainDtype, content: Any = b"") -> Any:
    """A number, or text, of Python."""
    content = content.encode("latin-1") if isinstance(content, str) else content
    if not kind.dtype.itemsize:  # of empty text
        return kind.dtype.type().item()
    return np.frombuffer(content, kind.dtype, 1)[0].item()


def _refusal(what: str) -> Damaged:
    return Damaged(f"holds {what}, which is more than numbers and text; refused. Save its tensors alone, with no more.")


def _path(*parts: Any) -> str:
    return re.sub("^/+", "/", "/".join(map(str, parts)))


def _default_dictionary(*arguments: Any) -> dict:
    """Without its factory: a key that is missing stays missing."""
    return {}


def _no_bytes() -> bytes:
    """What a pickle of torch.save has for empty bytes, an empty array's among them."""
    return b""


def _factory() -> None:
    """What a default dictionary's factory is read as; nothing calls it."""


_LIGHTNINGS = (
    "lightning_fabric.utilities.data", "lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing",
    "lightning.pytorch.utilities.parsing",
)  # fmt: skip
# What torch's unpickler may call, each with the name that a pickle has for it where it is not its own. Lightning's
# dictionary becomes a plain one, so that Lightning is not needed.
SAFE: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    *((dict, f"{name}.AttributeDict") for name in _LIGHTNINGS),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    (PlainDtype, "numpy.dtype"),
    (PlainArray, "numpy.ndarray"),
    *((_path, f"pathlib.{kind}") for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
    *((_path, f"pathlib._local.{kind}") for kind in ("PosixPath", "WindowsPath")),
    (_default_dictionary, "collections.defaultdict"),
    (_no_bytes, "builtins.bytes"),
    *((_factory, f"builtins.{kind}") for kind in ("dict", "list", "int", "float")),
]
