"""Queries and the images whose features are nearest to theirs.

Similarity is the cosine of the encoder's features, before the projection head. An image is not its own neighbour, and
neither is a copy of it: the same file, or of images in memory the same pixels, under another name or number.

Legend: n images that are searched, m queries, q of them that are shown, k neighbours of each.
"""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from moco import distributed
from moco.data import BadImageError, Source, Sources
from moco.data.augment.by_pil import eval_view
from moco.data.sources.base import PictureSource
from moco.data.sources.decode import reading
from moco.errors import UserError, one_line
from moco.eval import embed
from moco.eval.features import Features, gathered
from moco.eval.knn import most_similar
from moco.seeding import numpy_generator

SEARCHED = 10_000  # queries at most: time grows with queries times images
SPARE = 16  # images that are found for a query beside k, as itself and its copies are left out
ALIKE = 0.999  # cosine from which two images may be copies: in another batch a feature is rounded differently


# ---------------------------------------------------------------------------------------------------- the queries


def choose_sets(sources: Sources, split: str | None) -> tuple[Source, Source]:
    """The images that are searched and those that queries are drawn from: training and held-out images, or one and the
    same set where there is no such pair or ``split`` names one. Unlabelled ones get the label -1."""
    asked = embed.choose_source(sources, split)
    searched = sources.train if split is None and asked is sources.val else None
    return searched or asked, asked


def choose_queries(source: Source, name: str | None, worst: bool, seed: int) -> tuple[np.ndarray, int]:
    """Numbers of the images whose neighbours are searched, in the order of the draw and SEARCHED at most, and from how
    many they were drawn.

    Args:
        name: of the class that they are of, None for any.
        worst: whether classes are needed in any case.

    Raises:
        UserError: there is no such class, or there are none.
    """
    classes, flag = list(source.classes or ()), "--worst" if name is None else "--class"
    assert source.labels is not None
    if not classes and (worst or name is not None):
        raise UserError(f"{flag} goes by classes, and {source.name} has none; leave it out.")
    if name is not None and name not in classes:
        close = difflib.get_close_matches(name, classes, 1) or classes[:5]
        raise UserError(f"--class {name}: {source.name} has no such class; did you mean {' or '.join(close)}?")
    rows = np.flatnonzero(source.labels == classes.index(name)) if name is not None else np.arange(len(source))
    if not len(rows):
        raise UserError(f"--class {name}: no image of {source.name} is of it; choose another.")
    return numpy_generator("sample", seed).permutation(rows)[:SEARCHED], len(rows)


def open_pictures(paths: list[str], bank: Source, size: int) -> Source:
    """Pictures of the user's own, each of which can be read as a view of ``size`` pixels, as the images of ``bank`` are
    read.

    Raises:
        UserError: one cannot.
    """
    source = embed.with_labels(PictureSource("pictures of your own", paths, bank.channels))
    source.levels = bank.levels
    for index, path in enumerate(paths):
        try:
            reading(path, lambda index=index: eval_view(source.load(index), size))
        except BadImageError as error:
            raise UserError(f"{path} cannot be a query ({_reason(error)}); give a picture.") from error
    return source


def _reason(error: BadImageError) -> str:
    """Why a picture cannot be read."""
    cause = error.__cause__
    return (isinstance(cause, OSError) and cause.strerror) or one_line(cause or error)


def rows_of(share: Features, rows: np.ndarray) -> Features:
    """Those of this process's images whose numbers in the set are among ``rows``."""
    kept = torch.isin(share.ids, torch.from_numpy(rows))
    return Features(share.x[kept], share.labels[kept], share.ids[kept], share.readable[kept])


# ----------------------------------------------------------------------------------------------------- the search


def search(bank: Features, queries: Features, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of all processes' queries (m,), ascending, and of each the similarities and numbers of its k nearest
    images (m, k) each, the nearest first; where the set is smaller, similarities of minus infinity at the end.

    Every process has to call, with its share of the images and of the queries.
    """
    device = distributed.device()
    s, near = torch.empty(len(queries.ids), k), torch.empty(len(queries.ids), k, dtype=torch.int64)
    for rows, nearest, ids in most_similar(bank.x, bank.ids, queries.x, k, device):
        here = len(queries.x[rows])
        s[rows], near[rows] = nearest[:here].cpu(), ids[:here].cpu()
    everyone = gathered(Features(s, queries.labels, queries.ids, queries.readable, near), device)
    assert everyone.z is not None
    return everyone.ids.numpy(), everyone.x.numpy(), everyone.z.numpy()


@dataclass
class Nearest:
    """What was found.

    bank: the images that were searched, ``read`` of which can be read. asked: the set of the queries. rows: (m,) their
    numbers in it. s, near: (m, k) similarities and numbers in the bank, the nearest first; -inf: none any more. images:
    (C,) of each class of the bank that can be read, None for all.
    """

    bank: Source
    asked: Source
    read: int
    rows: np.ndarray
    s: np.ndarray
    near: np.ndarray
    images: np.ndarray | None = None

    def leave_out(self, k: int) -> int:
        """Take each query and its copies out of its neighbours, and keep k; returns how many copies that were."""
        own = (self.near == self.rows[:, None]) & (self.asked is self.bank)
        copies, known = np.zeros(self.near.shape, bool), ({}, {})
        for row, column in np.argwhere((self.s > ALIKE) & ~own):
            of_query = _digest(self.asked, known[0], int(self.rows[row]))
            copies[row, column] = of_query == _digest(self.bank, known[1], int(self.near[row, column]))
        self.s[own | copies] = -np.inf
        most = int(self.there.sum(1).max(initial=1))
        order = np.argsort(-self.s, axis=1, kind="stable")[:, : min(k, most)]
        self.s, self.near = (np.take_along_axis(x, order, 1) for x in (self.s, self.near))
        return int(copies.sum())

    @property
    def there(self) -> np.ndarray:
        """(m, k) where there is a neighbour at all."""
        return np.isfinite(self.s)

    @property
    def labelled(self) -> bool:
        """Whether queries and neighbours have classes to compare."""
        return bool(self.bank.classes) and bool(self.asked.classes)

    @property
    def right(self) -> np.ndarray:
        """(m, k) where a neighbour is of the query's class."""
        assert self.bank.labels is not None and self.asked.labels is not None
        return self.there & (self.bank.labels[self.near] == self.asked.labels[self.rows][:, None])

    def share(self, rows: np.ndarray | slice = slice(None)) -> float:
        """The percentage of the neighbours of some queries, by default of all, that are of the query's class."""
        return float(100 * self.right[rows].sum() / max(1, self.there[rows].sum()))

    def by_chance(self) -> float:
        """The percentage of the query's class among all images that are searched but the query, mean over queries."""
        assert self.bank.labels is not None and self.asked.labels is not None and self.bank.classes is not None
        whole = np.bincount(self.bank.labels, minlength=len(self.bank.classes))
        counts = whole if self.images is None else self.images
        own = int(self.asked is self.bank)
        others = max(1, int(counts.sum()) - own)
        return float(100 * (counts[self.asked.labels[self.rows]] - own).mean() / others)

    def drawn(self, order: np.ndarray, most: int) -> np.ndarray:
        """(q,) rows of the first queries in this order that could be read, in the order of the set."""
        place = {int(number): row for row, number in enumerate(self.rows)}
        return np.sort([place[number] for number in order.tolist() if number in place][:most])

    def worst(self, most: int) -> np.ndarray:
        """(q,) rows of the queries with the largest share of neighbours of another class, of equals those first whose
        wrong neighbours are the most similar."""
        wrong = self.there & ~self.right
        share = wrong.sum(1) / np.maximum(1, self.there.sum(1))
        return np.lexsort((-np.where(wrong, self.s, 0).sum(1), -share))[:most]


def _digest(source: Source, known: dict[int, bytes], index: int) -> bytes:
    """The same for the same file or, of images in memory, the same pixels."""
    if index not in known:
        content = source.read(index) or np.asarray(source.load(index)).tobytes()
        known[index] = hashlib.blake2b(content, digest_size=16).digest()
    return known[index]
