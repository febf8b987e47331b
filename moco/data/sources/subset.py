"""Which labelled images a run may train on: a list of names, ImageNet's published lists, or a balanced draw.

A draw is a function of (seed, class): each class has one fixed order of its images. A share takes the first image of
every class, then the second of every class and so on until it is full, so that classes differ by one image at most
while they last, and a smaller share lies inside a larger one. Held-out images come from the end of the same orders.

Legend: N images of the source, C classes, n images chosen.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from moco import files as disk
from moco.data.sources import lists
from moco.data.sources.base import Source
from moco.data.sources.values import Stored
from moco.data.stack import Picture
from moco.errors import UserError, one_line
from moco.seeding import key, numpy_generator

# SimCLR's lists, used by SwAV, Barlow Twins and SynCo: 12 or 13 names a class and 128 or 129; the 1 % lie in the 10 %.
LISTS_URL = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/"
LISTS = {  # percent: (file, lines, sha256)
    1.0: ("1percent.txt", 12_811, "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17"),
    10.0: ("10percent.txt", 128_116, "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091"),
}


class Subset(Source):
    """The images ``rows`` (n,) of a labelled source, with the classes of the whole."""

    def __init__(self, whole: Source, rows: np.ndarray, name: str) -> None:
        assert whole.labels is not None
        super().__init__(name, whole.channels, whole.classes, whole.labels[rows], whole.native_size)
        self.found, self.levels = whole.found, whole.levels
        self.whole, self.rows = whole, rows

    def __len__(self) -> int:
        return len(self.rows)

    def load(self, index: int) -> Picture:
        return self.whole.load(int(self.rows[index]))

    def stored(self, index: int) -> Stored:
        return self.whole.stored(int(self.rows[index]))

    def name_of(self, index: int) -> str:
        return self.whole.name_of(int(self.rows[index]))

    def missing(self, index: int) -> str:
        return self.whole.missing(int(self.rows[index]))

    def identity(self) -> Iterator[bytes]:
        yield np.asarray(self.rows, "<i8").tobytes()
        yield from self.whole.identity()

    def choice(self) -> str:
        """Sixteen characters that differ between two choices of rows, whatever the whole is."""
        return hashlib.sha256(np.asarray(self.rows, "<i8").tobytes()).hexdigest()[:16]


# ------------------------------------------------------------------------------------------------------- a draw


def split(
    labels: np.ndarray, percent: float, val_share: float, seed: int, listed: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(rows to train on, rows to validate on), both sorted int64 and without a row in common.

    Args:
        labels: (N,) int64.
        percent: of N to draw, in (0, 100]; one image a class at least, and never one that is held out.
        val_share: of each class to hold out, rounded, one image at least, whatever ``percent`` is; 0 for none.
        seed: of the orders of the classes.
        listed: rows to train on instead of a draw; held-out images are then taken from the others.

    Raises:
        UserError: a class is too small to hold images out.
    """
    orders = class_orders(labels, seed)
    taken = np.zeros(len(labels), dtype=bool)
    if listed is not None:
        taken[listed] = True
    held_out = [_held_out(order, val_share, taken, keep=int(listed is None)) for order in orders if val_share]
    val = np.sort(np.concatenate(held_out)) if held_out else np.empty(0, dtype=np.int64)
    train = np.sort(listed) if listed is not None else _balanced(labels, orders, percent, seed, val)
    return train, val


def class_orders(labels: np.ndarray, seed: int) -> list[np.ndarray]:
    """The rows of each class that occurs, in the order that belongs to (seed, class)."""
    by_class = np.argsort(labels, kind="stable")  # (N,)
    present, starts = np.unique(labels[by_class], return_index=True)
    parts = np.split(by_class, starts[1:])
    return [numpy_generator("split", seed, c).permutation(rows) for c, rows in zip(present, parts, strict=True)]


def _held_out(order: np.ndarray, share: float, taken: np.ndarray, keep: int) -> np.ndarray:
    free = order[~taken[order]]
    count = max(1, round(share * len(order)))
    if count > len(free) - keep:
        raise UserError(
            f"--val-share {share:g} takes {count} of the {len(order)} images of a class, of which {len(free) - keep} "
            "can be spared: lower it, or train on fewer images."
        )
    return free[len(free) - count :]


def _balanced(labels: np.ndarray, orders: list[np.ndarray], percent: float, seed: int, val: np.ndarray) -> np.ndarray:
    place = np.empty(len(labels), dtype=np.int64)  # (N,) of an image in its class's order
    for order in orders:
        place[order] = np.arange(len(order))
    # Which classes get one image more than others is drawn too, and is the same at every share.
    turn = np.array([key("split", seed, c, 1) for c in range(int(labels.max()) + 1)], dtype=np.uint64)
    ranked = np.lexsort((turn[labels], place))  # (N,) all first images, all second ones, ...
    ranked = ranked[~np.isin(ranked, val)]
    count = int(len(labels) * percent / 100 + 1e-9)  # 1e-9: 0.1 % of 5,000 is 5
    return np.sort(ranked[: max(count, len(orders))])


# ------------------------------------------------------------------------------------------------------- lists


def read_names(path: str) -> list[str]:
    """The lines of a list: names of files (``n01440764_18.JPEG``), or folder and name (``cat/18.png``)."""
    try:
        with disk.open_text(path) as file:
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"--train-files {path} cannot be read ({error.strerror}): check the path.") from error
    if not names:
        raise UserError(f"--train-files {path} is empty: write one image name a line.")
    return names


def find_rows(source: Source, names: Sequence[str], path: str) -> np.ndarray:
    """Rows (n,) int64 of the images called ``names`` in the list ``path``.

    A name may be the end of a path, or an absolute one, with a label behind it, in the forms of
    :mod:`moco.data.sources.lists`; labels, comments and a header are left out.

    Raises:
        UserError: a name is twice in the list, belongs to no image, or to several.
    """
    return _matched(source, names, path)[0]


def _matched(source: Source, names: Sequence[str], path: str) -> tuple[np.ndarray, list[str]]:
    """:func:`find_rows`, and notes of what was left out."""
    if len(twice := dict.fromkeys(names)) < len(names):
        raise UserError(f"{path} holds {len(names) - len(twice)} names twice: write each image once.")
    meant = _meant(source, names)
    rows: list[int] = []
    lost: list[str] = []
    left = Counter[str]()
    for place, name in enumerate(names):
        spelled = {spelling: meant[spelling] for spelling in lists.spellings(name) if spelling in meant}
        if spelled:
            rows.append(_one_row(spelled, name, path, source.name))
            left["labels"] += next(iter(spelled)) not in lists.whole(name)
        elif kind := _left_out(name, place == 0):
            left[kind] += 1
        else:
            lost.append(name)
    if lost or not rows:
        first = (lost or names)[0]
        raise UserError(
            f"{len(lost)} of the {len(names)} images in {path} are not in {source.name}, the first {first}: "
            "give the images that the list is about, another list, or --train-files balanced for a draw."
        )
    found = np.array(sorted(rows), dtype=np.int64)
    if len(np.unique(found)) < len(found):
        raise UserError(f"{path} names an image twice, with and without its folder: write each image once.")
    return found, [f"{count} {kind} left out" for kind, count in left.items() if count]


def _one_row(spelled: dict[str, list[int]], name: str, path: str, whole: str) -> int:
    """The row that is meant by a line; ``spelled``: those of each way to read it."""
    if several := next((spelling for spelling, found in spelled.items() if len(found) > 1), ""):
        raise UserError(f"{several} of {path} belongs to several images of {whole}: write FOLDER/NAME.")
    if len({found[0] for found in spelled.values()}) > 1:
        both = " or ".join(list(spelled)[:2])
        raise UserError(f"the line {name} of {path} may mean {both}: write the name alone, or rename one.")
    return next(iter(spelled.values()))[0]


def _left_out(name: str, first: bool) -> str:
    """What a line is that names no image; empty for an image that is not there."""
    if first and lists.is_header(name):
        return "header"
    return "comments" if lists.is_comment(name) else ""


def _meant(source: Source, names: Sequence[str]) -> dict[str, list[int]]:
    """The rows whose names end in each spelling of ``names``: two at most, of those that there are."""
    by_end: dict[str, list[str]] = {}
    for spelling in {spelling for name in names for spelling in lists.spellings(name)}:
        by_end.setdefault("/".join(spelling.rsplit("/", 2)[-2:]), []).append(spelling)
    meant: dict[str, list[int]] = {}
    for row in range(len(source)):
        name = source.name_of(row).replace(os.sep, "/")
        parts = name.rsplit("/", 2)
        for end in dict.fromkeys((parts[-1], "/".join(parts[-2:]))):
            for spelling in by_end.get(end, ()):
                if _is_end(spelling, end, name) and len(meant.setdefault(spelling, [])) < 2:
                    meant[spelling].append(row)
    return meant


def _is_end(spelling: str, end: str, name: str) -> bool:
    """Whether a path that is spelled so, and ends so, is the file ``name`` or its end."""
    if spelling == end:
        return True
    whole = os.path.abspath(name)
    return whole == os.path.normpath(spelling) or whole.endswith("/" + spelling.lstrip("/")) and spelling[0] != "/"


def is_imagenet(source: Source) -> bool:
    """Whether the classes are ImageNet-1k's: a thousand WordNet numbers."""
    classes = source.classes or []
    return len(classes) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in classes)


def published_list(percent: float, cache: str) -> str:
    """The path of ImageNet's list for 1 or 10 percent, fetched into the folder ``cache`` when it is not there.

    Raises:
        UserError: it cannot be fetched or kept, or what came is not the published list.
    """
    name, lines, sha256 = LISTS[percent]
    path = os.path.join(cache, name)
    if os.path.isfile(path):
        with open(path, "rb") as file:
            if hashlib.sha256(file.read()).hexdigest() == sha256:
                return path
    url = LISTS_URL + name
    by_hand = "fetch it by hand and give it by --train-files PATH, or --train-files balanced for a draw of our own"
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            content = answer.read(1 << 24)  # the longer list has 2 MB
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"{url} cannot be fetched ({one_line(error)}): {by_hand}.") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(f"{url} gave something else than the published {lines:,} names: {by_hand}.")
    try:
        disk.write_text(content.decode("ascii"), path)
    except UserError as error:
        raise UserError(f"{path} cannot be written ({error.__cause__}): {by_hand}.") from error
    return path


# ---------------------------------------------------------------------------------------------------- together


def choose_subset(
    whole: Source, percent: float | None, files: str, val_share: float, seed: int, cache: str
) -> tuple[Subset, Subset | None, str]:
    """What to train on, what to validate on (None without a share), and where the choice comes from, in words.

    Args:
        whole: labelled training images.
        percent: of them to train on; None for a list alone.
        files: path of a list; "balanced" for a draw; empty for ImageNet's lists at 1 and 10 percent and a draw else.
        val_share: of each class to hold out.
        seed: of draws.
        cache: folder that keeps fetched lists.
    """
    assert whole.labels is not None
    if not files and percent in LISTS and is_imagenet(whole):
        files = published_list(percent, cache)
    drawn = files in ("", "balanced")
    listed, left = (None, []) if drawn else _matched(whole, read_names(files), files)
    train_rows, val_rows = split(whole.labels, percent or 100.0, val_share, seed, listed)
    train = Subset(whole, train_rows, f"{whole.name} (training part)")
    val = Subset(whole, val_rows, f"{whole.name} (validation part)") if val_share else None
    summary = (
        "; ".join([f"the list {files}", *left])
        if not drawn
        else "all images"
        if percent == 100
        else f"a balanced draw, seed {seed}"
    )
    without = len(whole.classes or ()) - len(np.unique(whole.labels[train_rows]))
    return train, val, summary + f"; {without} classes have no image in it" * bool(without)
