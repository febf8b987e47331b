"""What a probe found, for readers and for programs: the last line, result.json, and on request what each class got.

Legend: n held-out images, C classes.
"""

from __future__ import annotations

import csv
import io
import os
from typing import Any

import numpy as np
from sklearn.metrics import confusion_matrix

from moco import distributed, files
from moco.data import Source
from moco.eval.classifier import Score
from moco.eval.features import EvalData
from moco.eval.linear import LinearClassifier, leader
from moco.train.metrics import without_top5
from moco.train.runlog import RunLog

NAMED_CLASSES = 40  # the picture has room for so many names


def named(values: dict[str, float], head: LinearClassifier, heads: list[LinearClassifier]) -> dict[str, float]:
    """Names of a record's numbers: plain for one head, with the base rate (``val_acc1/lr30``) for one of several."""
    return values if len(heads) == 1 else {f"{name}/lr{head.name}": value for name, value in values.items()}


def values(heads: list[LinearClassifier]) -> dict[str, float]:
    """The numbers of an epoch's record."""
    found: dict[str, float] = {}
    for head in heads:
        if head.score:
            found |= named({**head.score.values("val"), "best_acc1": head.best}, head, heads)
    return found


def summary(heads: list[LinearClassifier]) -> str:
    """Upstream's line; with several heads that of the leading one, and each one's last top-1; images left out."""
    first, score = _led(heads)
    line = f" * {score} (best Acc@1 {first.best:.3f})"
    if len(heads) > 1:
        found = (f"lr {head.name} {f'{head.score.acc1:.3f}' if head.score else 'diverged'}" for head in heads)
        marked = (text + "*" * (head is first) for text, head in zip(found, heads, strict=True))
        line += f" at lr {first.name}, the best of: {', '.join(marked)}"
    return line + score.left_out


def describe_last(heads: list[LinearClassifier]) -> str:
    """The end of a run: :func:`summary`, after what must be said of a figure that was picked."""
    if len(heads) == 1:
        return summary(heads)
    return (
        f"warning: lr {leader(heads).name} is picked among {len(heads)} by its accuracy on the held-out images, so "
        f"that accuracy is optimistic; measure it on images that took no part in the choice.\n{summary(heads)}"
    )


def result(heads: list[LinearClassifier]) -> dict[str, Any]:
    """The figures of result.json: the leading head's as of a run with its rate alone, then each head's.

    ``acc1`` and ``acc5`` are of the last epoch and ``best_acc1`` is the highest of any epoch; ``lr`` is the rate of
    these three. ``val_images`` were counted, ``unreadable`` more could not be read. Sweeps know these names from
    moco/sweep/figures.py.
    """
    first, score = _led(heads)
    found = {"best_acc1": first.best, "acc1": score.acc1, "acc5": score.acc5, "lr": first.lr,
             "val_images": score.images, "unreadable": score.unread, **without_top5(first.classes)}  # fmt: skip
    if len(heads) == 1:
        return found
    return {**found, "selected_on": "validation", "per_lr": [_row(head, head is first) for head in heads]}


def _row(head: LinearClassifier, leads: bool) -> dict[str, Any]:
    score = head.score
    return {
        "lr": head.lr,
        "acc1": score.acc1 if score else None,
        "acc5": score.acc5 if score else None,
        "val_loss": score.loss if score else None,
        "best_acc1": head.best,
        "diverged": head.diverged,
        "selected": leads,
    }


def _led(heads: list[LinearClassifier]) -> tuple[LinearClassifier, Score]:
    first = leader(heads)
    assert first.score is not None, "validated, and not every head has diverged"
    return first, first.score


def describe_run(mode: str, train: Source, val: Source, images: EvalData, cached: bool) -> str:
    """What a run reads, by what processes, and where the features come from that it trains on, for its log; one source
    twice where a measure needs no more."""
    if mode == "evaluate":
        what = f"{len(val)} images held out"
    elif val is not train:
        what = f"{len(train)} training and {len(val)} held-out images"
    else:
        how = "from which episodes are drawn" if mode == "few_shot" else "each classified by the others"
        what = f"{len(val)} images, {how}"
    once, anew = "computed once from whole images, without augmentation", "from new random crops in every epoch"
    views = f"; features {once if cached else anew}" if mode in ("lincls", "lr_find") else ""
    return (
        f"{what}, {len(train.classes or ())} classes; {distributed.processes()}, batch {images.batch}, "
        f"{images.workers} loader workers each{views}"
    )


def begin_result(mode: str, arch: str, pretrained: str, train: Source, val: Source, images: EvalData) -> dict[str, Any]:
    """What every result file says of its run."""
    return {"mode": mode, "arch": arch, "pretrained": pretrained, "size": images.size, "seed": images.seed,
            "classes": len(train.classes or ()), "train_images": len(train), "val_images": len(val)}  # fmt: skip


# ------------------------------------------------------------------------------------------------- classes


def write_details(
    heads: list[LinearClassifier], classes: list[str], per_class: str | None, confusion: str | None, log: RunLog
) -> None:
    """Write what was asked for of the leading head's predictions, and say in the log where.

    Args:
        classes: C names, by label.
        per_class: path of the table of classes.
        confusion: folder of confusion.csv and confusion.png.

    Raises:
        UserError: a path cannot be written.
    """
    if not (per_class or confusion) or not distributed.is_main():
        return
    first, score = _led(heads)
    assert score.predictions is not None, "validated with predictions"
    labels, predicted, hit5 = score.predictions.numpy().T
    matrix = confusion_matrix(labels, predicted, labels=np.arange(len(classes)))  # (C, C): rows are true classes
    if per_class:
        among5 = None if score.acc5 is None else np.bincount(labels, weights=hit5, minlength=len(classes))
        write_csv(per_class, class_rows(matrix, among5, classes))
        log.line(f"each class at lr {first.name}, last epoch: {per_class}")
    if confusion:
        table = [["true / predicted", *classes], *([name, *row] for name, row in zip(classes, matrix, strict=True))]
        path = write_csv(os.path.join(confusion, "confusion.csv"), table)
        draw_confusion(matrix, classes, os.path.join(confusion, "confusion.png"))
        log.line(f"confusion at lr {first.name}, last epoch: {path} and confusion.png beside it")


def class_rows(matrix: np.ndarray, among5: np.ndarray | None, classes: list[str]) -> list[list]:
    """A table with a header and a row for each class, the percentages empty where there is no image of it.

    Args:
        matrix: (C, C) int counts, rows are true classes.
        among5: (C,) images of each class whose label was among the first five; None leaves the percentage empty.
    """
    table: list[list] = [["class", "images", "top-1", "top-5", "most confused with"]]
    for label, name in enumerate(classes):
        row = matrix[label]
        images, wrong = int(row.sum()), np.where(np.arange(len(row)) == label, 0, row)
        mistaken = classes[int(wrong.argmax())] if wrong.any() else ""
        hit = (row[label], None if among5 is None else among5[label])
        shares = [f"{100 * hits / images:.3f}" if images and hits is not None else "" for hits in hit]
        table.append([name, images, *shares, mistaken])
    return table


def draw_confusion(matrix: np.ndarray, classes: list[str], path: str) -> None:
    """A picture of the matrix, each row as shares of its class."""
    from matplotlib.figure import Figure  # not pyplot's: no screen is needed

    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = 5 + 0.2 * min(len(classes), NAMED_CLASSES)
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    picture = axis.imshow(shares, vmin=0, vmax=1, cmap="Blues", interpolation="nearest")
    figure.colorbar(picture, label="share of the true class")
    axis.set(xlabel="predicted", ylabel="true")
    if len(classes) <= NAMED_CLASSES:
        axis.set_xticks(range(len(classes)), classes, rotation=90)
        axis.set_yticks(range(len(classes)), classes)
    files.write_figure(figure, path, "path")


def write_csv(path: str, rows: list[list]) -> str:
    """A table whose first row is its header; returns the path."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    files.write_text(text.getvalue(), path, "path")
    return path
