"""Few-shot accuracy of frozen features: many small classification problems from classes that were never trained on.

An episode draws ``way`` classes, and of each of them ``queries`` images to classify and ``shot`` labelled ones. On the
l2-normalised features of those a multinomial logistic regression is fitted (C = 1, lbfgs, at most 1000 iterations). The
result is the mean over episodes with its 95 % interval. Usual are 5-way, 1 and 5 shots, 15 queries and 600 episodes.

Legend: n images, F feature width.
"""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from moco import distributed
from moco.config import FewShotConfig
from moco.data import Source, Sources
from moco.data.sources.base import without_labels
from moco.data.stack import Picture
from moco.errors import UserError
from moco.eval.features import FeatureExtractor
from moco.files import open_text
from moco.seeding import numpy_generator

_WORDNET = re.compile(r"n\d{8}$")  # what ImageNet's and miniImageNet's classes are called


# ---------------------------------------------------------------------------------------------- which images


class Pool(Source):
    """Images picked from several sources: ``picks`` holds (source, image, label) of each."""

    def __init__(self, parts: Sequence[Source], picks: Sequence[tuple[int, int, int]], classes: list[str]) -> None:
        labels = np.array([label for _, _, label in picks], dtype=np.int64)
        sizes = {part.native_size for part in parts}
        size = sizes.pop() if len(sizes) == 1 else None
        super().__init__(parts[0].name, parts[0].channels, classes, labels, size)
        self.parts = list(parts)
        self.picks = np.array([(part, row) for part, row, _ in picks], dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.picks)

    def load(self, index: int) -> Picture:
        part, row = self.picks[index]
        return self.parts[part].load(int(row))

    def name_of(self, index: int) -> str:
        part, row = self.picks[index]
        return self.parts[part].name_of(int(row))

    def missing(self, index: int) -> str:
        part, row = self.picks[index]
        return self.parts[part].missing(int(row))


def pool(sources: Sources, path: str = "") -> Source:
    """The images from which episodes are drawn.

    Without ``path`` the held-out images, or all where nothing is held out. With it the training images as well: the
    file chooses by class, as CIFAR-FS and miniImageNet split CIFAR-100 and ImageNet.

    Args:
        path: a text file with one class name a line, or miniImageNet's CSV of ``filename,label``; its images are found
            by name anywhere in the data.

    Raises:
        UserError: no labels, or the file is unreadable or names classes or images that the data lacks.
    """
    pair = [source for source in (sources.train, sources.val) if source is not None]
    if not path:
        source = pair[-1] if pair else sources.pretrain
        if source.labels is None:
            raise UserError(f"{without_labels(source)}: give class folders, or a CSV with --few-shot-classes.")
        return source
    rows = _read_rows(path)
    if [word.strip().lower() for word in rows[0]] == ["filename", "label"]:
        return _by_filename(pair or [sources.pretrain], rows[1:], path)
    return _by_class(pair or [sources.pretrain], [",".join(row).strip() for row in rows], path)


def _read_rows(path: str) -> list[list[str]]:
    try:
        with open_text(path, newline="") as file:
            rows = [row for row in csv.reader(file) if any(word.strip() for word in row)]
        if any("\0" in word for row in rows for word in row):  # Python below 3.11 says so itself
            raise csv.Error("zero bytes")
    except OSError as error:
        raise UserError(f"--few-shot-classes {path} cannot be read: {error.strerror}; check the path.") from error
    except csv.Error as error:
        raise UserError(
            f"--few-shot-classes {path} is neither a list of classes nor a CSV file: {error}; write a class a line."
        ) from error
    if not rows:
        raise UserError(f"--few-shot-classes {path} is empty: write one class a line.")
    return rows


def _by_class(parts: list[Source], names: list[str], path: str) -> Pool:
    number = {name: label for label, name in enumerate(dict.fromkeys(names))}
    picks, known = [], set()
    for part, source in enumerate(parts):
        if source.labels is None or source.classes is None:
            raise UserError(f"{source.name} has no class folders; give a CSV of filename,label instead of {path}.")
        known.update(source.classes)
        labels = [number.get(name) for name in source.classes]
        picks += [(part, row, labels[old]) for row, old in enumerate(source.labels) if labels[old] is not None]
    _complain(path, "class", [name for name in number if name not in known], parts[0].name)
    return Pool(parts, picks, list(number))


def _by_filename(parts: list[Source], rows: list[list[str]], path: str) -> Pool:
    if not rows or min(map(len, rows)) < 2:
        raise UserError(f"--few-shot-classes {path} needs a file name and a label on every line below its first.")
    where: dict[str, list[tuple[int, int]]] = {}
    for part, source in enumerate(parts):
        paths = source.files()
        if len(paths) != len(source):
            raise UserError(f"{source.name} has no image files to find those of {path}; give a list of classes.")
        for row, file in enumerate(paths):
            where.setdefault(os.path.basename(file), []).append((part, row))
    names = sorted({row[1].strip() for row in rows})
    number = {name: label for label, name in enumerate(names)}
    picks, missing = [], []
    for file, label, *_ in rows:
        found = where.get(os.path.basename(file.strip()), [])
        if not found:
            missing.append(file.strip())
        elif len(found) > 1:
            name = os.path.basename(file)
            raise UserError(f"{path}: {len(found)} images are called {name}; give one folder of them.")
        else:
            picks.append((*found[0], number[label.strip()]))
    _complain(path, "image", missing, parts[0].name)
    return Pool(parts, picks, names)


def _complain(path: str, what: str, missing: list[str], name: str) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{path} names the {what} {missing[0]}{more}, which {name} lacks; check that they belong together."
        )


# ------------------------------------------------------------------------------------------------- episodes


def episode(by_class: list[np.ndarray], setting: FewShotConfig, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Images of one episode: to classify (way, queries) and to learn from (way, largest of the shots), a class a row.

    A function of (seed, number) and the way alone: fewer shots are the first columns of more.
    """
    rng = numpy_generator("episode", setting.seed, number)
    classes = rng.choice(len(by_class), setting.way, replace=False)
    order = np.stack([rng.permutation(by_class[label])[: setting.queries + max(setting.shots)] for label in classes])
    return order[:, : setting.queries], order[:, setting.queries :]


def episode_accuracy(x: np.ndarray, queries: np.ndarray, support: np.ndarray) -> float:
    """Percent of ``queries`` (way, Q) that a classifier of ``support`` (way, shot) gets right; x (n, F), unit rows."""
    from sklearn.linear_model import LogisticRegression  # a second of imports that no other run needs

    asked, labels = (np.arange(len(support)).repeat(rows.shape[1]) for rows in (queries, support))
    model = LogisticRegression(C=1.0, max_iter=1000)  # lbfgs; multinomial from three classes on
    return 100.0 * model.fit(x[support.ravel()], labels).score(x[queries.ravel()], asked)


def check_episodes(images: Sequence[int], classes: Sequence[str], setting: FewShotConfig, how: str = "") -> None:
    """UserError for too few of the C classes, or too few ``images`` (C,) of one; ``how``: what they are."""
    if len(classes) < setting.way:
        raise UserError(f"{len(classes)} classes are fewer than --few-shot-way {setting.way}; lower it.")
    needed, least = setting.queries + max(setting.shots), min(range(len(classes)), key=lambda c: images[c])
    if images[least] < needed:
        raise UserError(
            f"the class {classes[least]} has {images[least]} images{how}, and {max(setting.shots)} shots with "
            f"{setting.queries} queries take {needed}; lower --few-shot-queries or leave it out by --few-shot-classes."
        )


def few_shot(
    x: np.ndarray, labels: np.ndarray, classes: Sequence[str], setting: FewShotConfig
) -> dict[int, np.ndarray]:
    """Accuracy in percent of every episode, (episodes,) for each number of shots.

    Every process takes a share of the episodes; all of them must call, with the same features, and all get the result.

    Args:
        x: (n, F) features. labels: (n,) below C. classes: their C names, for messages.

    Raises:
        UserError: too few classes, or too few images of one.
    """
    by_class = [np.flatnonzero(labels == label) for label in range(len(classes))]
    check_episodes([len(rows) for rows in by_class], classes, setting)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    found = torch.zeros(len(setting.shots), setting.episodes, dtype=torch.float64)
    for number in range(distributed.rank(), setting.episodes, distributed.world_size()):
        queries, support = episode(by_class, setting, number)
        for i, shot in enumerate(setting.shots):
            found[i, number] = episode_accuracy(x, queries, support[:, :shot])
    found = distributed.sum_over_ranks(found.to(distributed.device())).cpu()  # each episode is 0 on all but one
    return {shot: row.numpy() for shot, row in zip(setting.shots, found, strict=True)}


def interval95(accuracies: np.ndarray) -> float:
    """Half the width of the 95 % interval of the mean: 1.96 standard errors.

    Over episodes from these images: those that share images err alike, so another set of images may lie outside.
    """
    return float(1.96 * accuracies.std(ddof=1) / math.sqrt(len(accuracies)))


def leak(classes: Sequence[str]) -> str:
    """A warning when the classes are ImageNet's; empty otherwise."""
    warning = (
        "these classes are ImageNet's (miniImageNet lies inside it): an encoder pretrained on ImageNet has seen these "
        "images, so for it this is no accuracy on new classes"
    )
    return warning if any(_WORDNET.match(name) for name in classes) else ""


def measure_few_shot(
    encoder: nn.Module, source: Source, extractor: FeatureExtractor, setting: FewShotConfig
) -> tuple[dict[str, float], dict[str, Any], str]:
    """Few-shot accuracy on ``source`` as numbers for a log, settings for a result file, and lines to read."""
    assert source.labels is not None
    classes = source.classes or [str(label) for label in range(int(source.labels.max()) + 1)]
    check_episodes(np.bincount(source.labels, minlength=len(classes)).tolist(), classes, setting)  # before the features
    share = extractor.whole(encoder, source)
    read = torch.bincount(share.labels, minlength=len(classes)).tolist()
    check_episodes(read, classes, setting, " that can be read")
    found = few_shot(share.x.numpy(), share.labels.numpy(), classes, setting)
    values, summary = {}, []
    for shot, accuracies in found.items():
        mean, half = float(accuracies.mean()), interval95(accuracies)
        values.update({f"acc_{shot}shot": mean, f"ci95_{shot}shot": half})
        summary.append(f" * {setting.way}-way {shot}-shot {mean:.2f} +- {half:.2f}")
    warning = leak(classes)
    asked = {"way": setting.way, "shots": list(setting.shots), "queries": setting.queries, "episodes": setting.episodes,
             "warning": warning, "val_images": len(share.ids), "unreadable": share.unread}  # fmt: skip
    tail = f" ({setting.episodes} episodes, {setting.queries} queries a class, encoder features)"
    tail += share.left_out
    return values, asked, f"warning: {warning}\n" * bool(warning) + "\n".join(line + tail for line in summary)
