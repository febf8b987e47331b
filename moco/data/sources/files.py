"""Image folders and lists of image paths, among them BEiT-3's index, which is read and written here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np

from moco.data.sources.away import is_empty
from moco.data.sources.base import FileSource, Found
from moco.data.sources.folders import open_folder
from moco.data.sources.lists import Line, Row, beginning_elsewhere, read_rows, what_is_odd
from moco.data.sources.names import IMAGE_EXTENSIONS as IMAGE_EXTENSIONS
from moco.data.sources.splits import find_splits
from moco.errors import UserError
from moco.files import json_of, open_text, write_text

LIST_EXTENSIONS = (".txt", ".lst", ".jsonl", ".csv", ".tsv")
CLASSES = 1_000_000  # a label that is a number is below this: nobody has more, and for each there is a name in memory
INDEX_NAME = "imagenet.{}.index.jsonl"  # BEiT-3's, whatever the data set is


def _numbered_lines(path: str) -> Iterator[tuple[int, str]]:
    """The lines of a list that are not empty, without their end, and their numbers from 1."""
    try:
        with open_text(path) as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise UserError(f"line {number} of the list {path} holds a zero byte: write text, a path a line")
                if line.strip():
                    yield number, line.rstrip("\n")
    except OSError as error:
        raise UserError(f"cannot read the list {path} ({error.strerror}): check its permissions") from error


def _read_index(path: str, lines: list[Line]) -> list[Row]:
    """The lines of BEiT-3's index as those of a list; a path's leading / is that of the data's folder."""
    rows: list[Row] = []
    for number, line in lines:
        try:
            entry = json_of(line)
            image, label = entry["image_path"], entry["label"]
            os.fsencode(image)  # half of a surrogate pair is in no path
            if not isinstance(image, str) or "\0" in image or type(label) is not int or not 0 <= label < CLASSES:
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f'line {number} of the index {path} is not {{"image_path": "train/cat/1.jpg", "label": 0}}, with '
                f"a label below {CLASSES:,}: make it by python -m moco.data index"
            ) from error
        rows.append(Row(number, image, str(label)))
    if rows and not os.path.isfile(rows[0].path):
        rows = [row._replace(path=row.path.lstrip("/")) for row in rows]
    return rows


def _list_labels(path: str, rows: list[Row]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and (N,) labels of a list's rows; integers sort as numbers. (None, None) without labels."""
    names = [row.label for row in rows if row.label]
    if not names:
        return None, None
    if len(names) < len(rows):
        first = next(row.number for row in rows if not row.label)
        raise UserError(
            f"{path} has labels on {len(names)} of {len(rows)} lines (none on line {first}): label every line or none"
        )
    unique = set(names)
    try:
        classes = sorted(unique, key=lambda name: (int(name), name))  # 1 and 01 too have one order in every process
    except ValueError:
        classes = sorted(unique)
    number = {name: index for index, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names], dtype=np.int64)


def open_list(path: str, channels: int = 3) -> FileSource:
    """A text file with one image a line: its path (relative to the list's folder, or absolute), then TAB and label.

    The label is a class name or an integer, on every line or on none. Other forms are read as
    :mod:`moco.data.sources.lists` has it. A name that ends in .jsonl is BEiT-3's index, see :func:`write_index`. Files
    that do not exist are bad images when they are loaded. Raises UserError for an empty list, one that names no
    existing file, or uneven labels.
    """
    lines = [Line(*line) for line in _numbered_lines(path)]
    if not lines:
        raise UserError(f"the list {path} is empty: write one image path a line")
    folder = os.path.dirname(os.path.abspath(path))
    if path.lower().endswith(".jsonl"):
        rows, notes = [row._replace(path=os.path.join(folder, row.path)) for row in _read_index(path, lines)], []
    else:
        rows, folder, notes = read_rows(lines, path)
    paths = [row.path for row in rows]
    if not any(os.path.isfile(image) for image in paths):
        before, there = beginning_elsewhere(lines[-1].text, path)
        raise UserError(
            f"no file named in {path} exists (first: {paths[0]}): "
            + (
                f"remove {before} from each line, as {there} exists"
                if there
                else "write paths relative to the list's folder, and a TAB before each label"
            )
        )
    classes, labels = _list_labels(path, rows)
    never = frozenset(filter(is_empty, {os.path.dirname(image) for image in paths}))
    source = FileSource(path, paths, channels, classes, labels, never)
    source.found = Found("list", notes=[*notes, *what_is_odd(rows, path)])
    return source


def open_path(path: str, channels: int = 3) -> FileSource:
    """An image folder or a list of paths (.txt, .lst, .jsonl); UserError when it is neither."""
    lists = ", ".join(LIST_EXTENSIONS)
    if not os.path.exists(path):
        raise UserError(f"{path} does not exist: give an image folder or a list of image paths ({lists})")
    if os.path.isdir(path):
        return open_folder(path, channels)
    if not path.lower().endswith(LIST_EXTENSIONS):
        raise UserError(f"{path} is neither a folder nor a list of image paths ({lists}): unpack or rename it")
    return open_list(path, channels)


def write_index(folder: str, out: str | None = None) -> tuple[list[tuple[str, int]], list[str]]:
    """Write BEiT-3's index of every split of an image folder (train, val, test); (path, images) of each, and notes.

    One JSON object a line, ``{"image_path": "train/cat/1.jpg", "label": 0}``: paths are relative to the folder of the
    index, labels are numbers of the sorted class folders.

    Args:
        folder: with class folders in ``train`` and the others.
        out: the folder of the index; by default ``folder`` itself, where BEiT-3 looks for it.

    Raises:
        UserError: no such splits, a split without classes or with others than ``train``, or nothing can be written.
    """
    splits, notes = find_splits(folder)
    sources = {name: open_folder(path) for name, path in splits.items()}
    if not sources:
        raise UserError(f"{folder} has no folder train, val or test to index: give the one that holds them.")
    first = next(iter(sources.values()))
    for source in sources.values():
        if source.labels is None or source.classes != first.classes:
            raise UserError(
                f"{source.name} has no class folders, or others than {first.name}: give every split the same ones."
            )
    out = out or folder
    written = []
    for name, source in sources.items():
        assert source.labels is not None
        paths = (os.path.relpath(path, out).replace(os.sep, "/") for path in source.paths)
        lines = [json.dumps({"image_path": p, "label": int(n)}) for p, n in zip(paths, source.labels, strict=True)]
        path = os.path.join(out, INDEX_NAME.format(name))
        write_text("\n".join(lines) + "\n", path, "--out")
        written.append((path, len(lines)))
    return written, [*notes, *(note for source in sources.values() for note in source.found.notes)]
