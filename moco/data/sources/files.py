"""Image folders and lists of image paths, among them BEiT-3's index, which is read and written here."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import numpy as np

from moco.data.sources.away import is_empty
from moco.data.sources.base import FileSource
from moco.errors import UserError
from moco.files import json_of, open_text, write_text

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
LIST_EXTENSIONS = (".txt", ".lst", ".jsonl")
CLASSES = 1_000_000  # a label that is a number is below this: nobody has more, and for each there is a name in memory
INDEX_NAME = "imagenet.{}.index.jsonl"  # BEiT-3's, whatever the data set is


def splits(folder: str) -> dict[str, str]:
    """The folders train, val and test in ``folder``, by name, of those that there are."""
    paths = {name: os.path.join(folder, name) for name in ("train", "val", "test")}
    return {name: path for name, path in paths.items() if os.path.isdir(path)}


def _list_directory(directory: str) -> tuple[list[str], list[str]]:
    """Names of the image files and of the folders directly in ``directory``, sorted; hidden ones are left out."""
    images, folders = [], []
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if _is_folder(entry):
                    folders.append(entry.name)
                elif entry.name.lower().endswith(IMAGE_EXTENSIONS):  # whatever it is: loading tells files from others
                    images.append(entry.name)
    except OSError as error:
        raise UserError(f"cannot read the folder {directory} ({error.strerror}): check its permissions") from error
    return sorted(images), sorted(folders)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False


def _walk(directory: str) -> Iterator[tuple[str, list[str]]]:
    """Every folder at and below ``directory`` with its images; links are followed, each folder is visited once."""
    waiting, seen = [directory], set()
    while waiting:
        folder = waiting.pop()
        images, folders = _list_directory(folder)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        yield folder, images
        waiting.extend(os.path.join(folder, name) for name in folders)


def images_below(directory: str) -> list[str]:
    """Paths of all images at and below ``directory``, in the order of torchvision's ImageFolder."""
    return [os.path.join(folder, name) for folder, names in sorted(_walk(directory)) for name in names]


def open_folder(directory: str, channels: int = 3) -> FileSource:
    """A folder of class folders (labelled), or any folder with images of its own (unlabelled, all images below it).

    Raises UserError for a folder without images, an empty class folder, or a folder that cannot be read.
    """
    own, folders = _list_directory(directory)
    if own:
        return FileSource(directory, images_below(directory), channels)
    by_class = {name: images_below(os.path.join(directory, name)) for name in folders}
    paths = [path for name in folders for path in by_class[name]]
    if not paths:
        raise UserError(f"no image ({' '.join(IMAGE_EXTENSIONS)}) in {directory} or below: check the path")
    empty = [name for name in folders if not by_class[name]]
    if empty:
        raise UserError(f"the class folder {os.path.join(directory, empty[0])} holds no image: fill or remove it")
    labels = np.repeat(np.arange(len(folders)), [len(by_class[name]) for name in folders])
    return FileSource(directory, paths, channels, folders, labels)


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


def _read_lines(path: str) -> list[list[str]]:
    return [line.split("\t") for _, line in _numbered_lines(path)]


def _read_index(path: str) -> list[list[str]]:
    """The lines of BEiT-3's index as those of a list; a path's leading / is that of the data's folder."""
    rows: list[list[str]] = []
    for number, line in _numbered_lines(path):
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
        rows.append([image, str(label)])
    if rows and not os.path.isfile(rows[0][0]):
        rows = [[image.lstrip("/"), label] for image, label in rows]
    return rows


def _list_labels(path: str, rows: list[list[str]]) -> tuple[list[str] | None, np.ndarray | None]:
    """Class names and (N,) labels of a list's second column; integers sort as numbers. (None, None) without one."""
    labelled = sum(len(row) > 1 and bool(row[1].strip()) for row in rows)
    if labelled == 0:
        return None, None
    if labelled < len(rows):
        raise UserError(f"{path} has labels on {labelled} of {len(rows)} lines: label every line or none")
    names = [row[1].strip() for row in rows]
    unique = set(names)
    try:
        classes = sorted(unique, key=lambda name: (int(name), name))  # 1 and 01 too have one order in every process
    except ValueError:
        classes = sorted(unique)
    number = {name: index for index, name in enumerate(classes)}
    return classes, np.array([number[name] for name in names], dtype=np.int64)


def open_list(path: str, channels: int = 3) -> FileSource:
    """A text file with one image a line: its path (relative to the list's folder, or absolute), then TAB and label.

    The label is a class name or an integer, on every line or on none. A name that ends in .jsonl is BEiT-3's index,
    see :func:`write_index`. Files that do not exist are bad images when they are loaded. Raises UserError for an empty
    list, one that names no existing file, or uneven labels.
    """
    rows = _read_index(path) if path.lower().endswith(".jsonl") else _read_lines(path)
    if not rows:
        raise UserError(f"the list {path} is empty: write one image path a line")
    folder = os.path.dirname(os.path.abspath(path))
    paths = [os.path.join(folder, row[0].strip()) for row in rows]
    if not any(os.path.isfile(image) for image in paths):
        raise UserError(
            f"no file named in {path} exists (first: {paths[0]}): "
            "write paths relative to the list's folder, and a TAB before each label"
        )
    classes, labels = _list_labels(path, rows)
    never = frozenset(filter(is_empty, {os.path.dirname(image) for image in paths}))
    return FileSource(path, paths, channels, classes, labels, never)


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


def write_index(folder: str, out: str | None = None) -> list[tuple[str, int]]:
    """Write BEiT-3's index of every split of an image folder (train, val, test); returns (path, images) of each.

    One JSON object a line, ``{"image_path": "train/cat/1.jpg", "label": 0}``: paths are relative to the folder of the
    index, labels are numbers of the sorted class folders.

    Args:
        folder: with class folders in ``train`` and the others.
        out: the folder of the index; by default ``folder`` itself, where BEiT-3 looks for it.

    Raises:
        UserError: no such splits, a split without classes or with others than ``train``, or nothing can be written.
    """
    sources = {name: open_folder(path) for name, path in splits(folder).items()}
    if not sources:
        raise UserError(f"{folder} has no folder train, val or test to index: give the one that holds them.")
    first = next(iter(sources.values()))
    for source in sources.values():
        if source.labels is None or source.classes != first.classes:
            raise UserError(f"{source.name} has no class folders, or others than {first.name}.")
    out = out or folder
    written = []
    for name, source in sources.items():
        assert source.labels is not None
        paths = (os.path.relpath(path, out).replace(os.sep, "/") for path in source.paths)
        lines = [json.dumps({"image_path": p, "label": int(n)}) for p, n in zip(paths, source.labels, strict=True)]
        path = os.path.join(out, INDEX_NAME.format(name))
        write_text("\n".join(lines) + "\n", path, "--out")
        written.append((path, len(lines)))
    return written
