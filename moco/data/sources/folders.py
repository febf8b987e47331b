"""Image folders: which folders are classes, which images are read, and what is said of the rest.

The folders directly in a folder are its classes where nearly all of its images lie in them. A folder without images is
no class. Where one folder alone holds the images, beside annotations or around the class folders, it is read itself.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from moco.data.sources.bands import without_arrays
from moco.data.sources.base import FileSource, Found
from moco.data.sources.names import (
    CLUTTER_BEGINS,
    IMAGE_EXTENSIONS,
    UNREAD,
    holds_images,
    is_about_images,
    is_archive,
    is_clutter,
    is_held_out,
    kind_of,
)
from moco.errors import UserError

LOOSE = 4  # times as many images in class folders as beside them, or those beside them count as well
SPLIT_NAMES = ("train", "val", "valid", "test")  # in the place of which there may be ground_truth
NAMED = 3  # things in a sentence


class NoImagesError(UserError):
    """A folder without a single image."""


class Listing(NamedTuple):
    """What lies directly in a folder, by name."""

    images: list[str]  # sorted
    folders: list[str]  # sorted
    others: list[str]  # files
    hidden: int  # files and folders that are no images by their names


def list_directory(directory: str) -> Listing:
    """The things directly in ``directory``; UserError when it cannot be read."""
    images: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    hidden = 0
    try:
        with os.scandir(directory) as entries:
            for entry in entries:
                name = entry.name
                if _is_folder(entry):
                    kind = folders
                elif name.lower().endswith(IMAGE_EXTENSIONS):  # whatever it is: loading tells files from others
                    kind = images
                else:
                    kind = others
                if (kind is not images or name[0] in CLUTTER_BEGINS) and is_clutter(name):
                    hidden += 1
                else:
                    kind.append(name)
    except OSError as error:
        raise UserError(f"cannot read the folder {directory} ({error.strerror}): check its permissions") from error
    kept = sorted(without_arrays(images))
    if len(kept) < len(images):
        others += set(images) - set(kept)
    return Listing(kept, sorted(folders), others, hidden)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be read
        return False


class _Tree(NamedTuple):
    """Every folder at and below one, sorted by its path. twice: some of them can be reached in two ways."""

    folders: list[tuple[str, Listing]]
    twice: bool

    @property
    def paths(self) -> list[str]:
        """Of all images, in the order of torchvision's ImageFolder."""
        return [os.path.join(folder, name) for folder, found in self.folders for name in found.images]


def _walk(directory: str) -> _Tree:
    """The folders at and below ``directory``; links are followed, each folder is visited once."""
    waiting, seen, twice = [directory], set(), False
    found: list[tuple[str, Listing]] = []
    while waiting:
        folder = waiting.pop()
        listing = list_directory(folder)
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            twice = True
            continue
        seen.add((status.st_dev, status.st_ino))
        found.append((folder, listing))
        waiting.extend(os.path.join(folder, name) for name in listing.folders)
    return _Tree(sorted(found), twice)


def _by_folder(directory: str, tree: _Tree) -> dict[str, _Tree]:
    """What lies in each folder directly in ``directory``, which ``tree`` is of."""
    top = next(listing for folder, listing in tree.folders if folder == directory)
    if tree.twice:  # a link may lead into the folder of another class, whose images are of both then
        paths = {name: os.path.join(directory, name) for name in top.folders}
        return {name: _walk(path) for name, path in paths.items() if not _is_around(path, directory)}
    parts: dict[str, list[tuple[str, Listing]]] = {name: [] for name in top.folders}
    start = len(os.path.join(directory, ""))
    for folder, listing in tree.folders:
        if folder != directory:
            parts[folder[start:].split(os.sep, 1)[0]].append((folder, listing))
    return {name: _Tree(folders, False) for name, folders in parts.items()}


def _is_around(path: str, directory: str) -> bool:
    """Whether a link leads to the folder that it lies in, or to one around that: no class, as it holds all of them."""
    outer = os.path.realpath(path)
    return os.path.commonpath([outer, os.path.realpath(directory)]) == outer


# ------------------------------------------------------------------------------------------------------- decisions


def open_folder(directory: str, channels: int = 3) -> FileSource:
    """A folder of class folders (labelled), or any folder of images (unlabelled, all images below it).

    Raises UserError for a folder without images, a class whose images are all of formats that are not read, or a folder
    that cannot be read.
    """
    tree = _walk(directory)
    own = next(listing for folder, listing in tree.folders if folder == directory)
    if not own.folders:
        return _unlabelled(directory, channels, tree, own)
    parts = _by_folder(directory, tree)
    images = {name: part.paths for name, part in parts.items()}
    full = [name for name in parts if images[name]]
    inside = sum(map(len, images.values()))
    if inside:
        _refuse_unread(directory, {name: parts[name] for name in parts if not images[name]})
    if not own.images and (only := _only(full, parts)):
        return _inner(directory, channels, only, [name for name in parts if name != only])
    if own.images and (len(full) < 2 or LOOSE * len(own.images) > inside):
        source = _unlabelled(directory, channels, tree, own)
        if len(full) > 1:
            source.found.notes.insert(
                0, f"{directory} has no classes: {len(own.images):,} of its {len(source):,} images lie beside its "
                f"{_count(len(full), 'folder')} ({some(full)}); move each into its class folder if there are classes",
            )  # fmt: skip
        return source
    if not inside:
        raise NoImagesError(_no_image(directory, tree))
    parts, masks = _without_masks(parts)
    kept = {name: parts[name].paths if masks else images[name] for name in full}
    source = _labelled(directory, channels, tree, own, parts, kept)
    if masks:
        source.found.notes.append(
            f"{some(sorted(masks))} in the class folders of {directory} ({_count(sum(masks.values()), 'image')}) not "
            "read, as there are images beside"
        )
    return source


def _without_masks(parts: dict[str, _Tree]) -> tuple[dict[str, _Tree], Counter[str]]:
    """Class folders without what lies beside their images (cat/images, cat/masks), and how many images that are by the
    names of the folders."""
    kept, masks = {}, Counter[str]()
    for name, part in parts.items():
        inside = Counter({inner: len(tree.paths) for inner, tree in _inside(part).items()})
        beside = any(inside[inner] for inner in inside if holds_images(inner) or inner.lower() in SPLIT_NAMES)
        about = {inner for inner in inside if is_about_images(inner)} if beside else set()
        start = len(part.folders[0][0]) + 1
        folders = [found for found in part.folders if found[0][start:].split(os.sep, 1)[0] not in about]
        kept[name] = _Tree(folders, part.twice)
        masks.update({inner: inside[inner] for inner in about if inside[inner]})
    return kept, masks


def _inside(part: _Tree) -> dict[str, _Tree]:
    """What lies in each folder directly in a class folder."""
    start, found = len(part.folders[0][0]) + 1, dict[str, _Tree]()
    for folder, listing in part.folders[1:]:
        name = folder[start:].split(os.sep, 1)[0]
        found.setdefault(name, _Tree([], False)).folders.append((folder, listing))
    return found


def _only(full: list[str], parts: dict[str, _Tree]) -> str:
    """The one folder that holds the images, beside annotations or around the class folders; empty where none is."""
    if len(full) == 1 and (len(parts) > 1 or _wraps(parts[full[0]])):
        return full[0]
    named = [name for name in full if holds_images(name)]
    return named[0] if len(named) == 1 and all(name in named or is_about_images(name) for name in full) else ""


def _wraps(part: _Tree) -> bool:
    """Whether a folder, or the one folder in it, has no image of its own and several folders with some."""
    below = [inner for inner in _inside(part).values() if inner.paths]
    if part.folders[0][1].images or not below:
        return False
    return len(below) > 1 or _wraps(below[0])


def _inner(directory: str, channels: int, only: str, beside: list[str]) -> FileSource:
    source = open_folder(os.path.join(directory, only), channels)
    why = f"no images of a class are in {some(beside)}" if beside else "it holds all images"
    source.found.notes.insert(0, f"of {directory} the folder {only} alone is read, as {why}")
    if beside and source.labels is None:
        source.found.unlabelled = f"of the folders of {directory}, {only} alone holds images, which makes no classes"
    return source


def _unlabelled(directory: str, channels: int, tree: _Tree, own: Listing) -> FileSource:
    paths = tree.paths
    if not paths:
        raise NoImagesError(_no_image(directory, tree))
    source = FileSource(directory, paths, channels)
    source.found = Found("folder", _passed_over(tree), _archives(directory, own))
    return source


def _labelled(
    directory: str, channels: int, tree: _Tree, own: Listing, parts: dict[str, _Tree], images: dict[str, list[str]]
) -> FileSource:  # fmt: skip
    empty = [name for name in parts if name not in images]
    notes = _archives(directory, own)
    if empty:
        notes.append(
            f"{some(empty)} in {directory} {'hold' if len(empty) > 1 else 'holds'} no image: no class is made of that"
        )
    if own.images:
        notes.append(
            f"{_count(len(own.images), 'image')} beside the class folders of {directory} left out "
            f"({some(own.images)}): move them into class folders to use them"
        )
    if same := _same_inside([parts[name] for name in images]):
        notes.append(f"every class folder of {directory} holds {some(same)}: their images are read as one set")
    if held_out := [name for name in images if is_held_out(name)]:
        notes.append(
            f"{some(held_out)} in {directory} read as a class like the others: move the others into train/ if that is "
            "held out"
        )
    if len(images) == 1:
        notes.append(f"{directory} has one class folder, {next(iter(images))}: nothing can be told apart by class")
    labels = np.repeat(np.arange(len(images)), [len(paths) for paths in images.values()])
    paths = [path for group in images.values() for path in group]
    source = FileSource(directory, paths, channels, list(images), labels)
    source.found = Found("folders", _passed_over(tree), notes)
    if own.images:
        source.found.passed_over["loose"] = len(own.images)
    return source


def _same_inside(parts: list[_Tree]) -> list[str]:
    """Names of folders of images that are in every class folder, in the place of around them: splits, or any two."""
    inside = [{name for name, tree in _inside(part).items() if tree.paths} for part in parts]
    same = sorted(set.intersection(*inside))
    splits = [name for name in same if name.lower() in SPLIT_NAMES]
    return splits or same * (len(same) > 1 and len(parts) > 1)


def _refuse_unread(directory: str, empty: dict[str, _Tree]) -> None:
    for name, part in empty.items():
        kinds = Counter({kind: count for kind, count in _passed_over(part).items() if kind in UNREAD})
        if kinds and not is_about_images(name):
            raise UserError(
                f"the class folder {os.path.join(directory, name)} holds no image that can be read, but "
                f"{tally(kinds)}: convert them to PNG or JPEG, or move the folder away"
            )


# ---------------------------------------------------------------------------------------------------------- words


def _passed_over(tree: _Tree) -> dict[str, int]:
    """How many files were not taken, by their extension."""
    counts = Counter(kind_of(name) for _, listing in tree.folders for name in listing.others)
    hidden = sum(listing.hidden for _, listing in tree.folders)
    return dict(counts) | ({"hidden": hidden} if hidden else {})


def _archives(directory: str, own: Listing) -> list[str]:
    """A note of the archives beside images, if any."""
    found = sorted(filter(is_archive, own.others))
    if not found:
        return []
    how = (
        "unpack it, or give its own path, to read what is in it"
        if found[0].lower().endswith(".tar")
        else "unpack it to read what is in it"
    )
    return [f"{some(found)} in {directory} not read, as there are images beside it: {how}"]


def _no_image(directory: str, tree: _Tree) -> str:
    told = f"no image ({' '.join(IMAGE_EXTENSIONS)}) in {directory} or below: "
    archives = [
        os.path.join(folder, name) for folder, listing in tree.folders for name in listing.others if is_archive(name)
    ]
    passed = Counter(_passed_over(tree))
    if archives:
        return f"{told}unpack {some(sorted(archives))}"
    if any(kind in UNREAD or kind in (".npy", ".npz", ".mat") for kind in passed):
        return f"{told}there are {tally(passed)}, convert the images to PNG or JPEG"
    return f"{told}check the path" + f"; there are {tally(passed)}" * bool(passed)


def tally(counts: Mapping[str, int]) -> str:
    """``12 .gif, 3 .txt``, the most frequent first, and what else there is as a number."""
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ranked[NAMED + 1 :])
    first = [f"{count:,} {kind}" for kind, count in ranked[: NAMED + 1]]
    return ", ".join(first) + f", {rest:,} others" * bool(rest)


def some(names: Sequence[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" * (len(names) > NAMED)
    return ", ".join(names[:NAMED]) + more


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" + "s" * (number != 1)
