"""What a probe found, for readers and for programs: the last line, and result.json."""

from __future__ import annotations

from typing import Any

from moco import data, distributed
from moco.data import Source
from moco.eval.classifier import Score
from moco.eval.details import Counts, Details, counts_of
from moco.eval.features import EvalData
from moco.eval.linear import LinearClassifier, leader
from moco.train.metrics import without_top5


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
    these three. ``val_images`` were counted, ``unreadable`` more could not be read. Sweeps know these names, and
    ``train_unreadable`` of :attr:`moco.eval.linear_fit.ProbeRun.left`, from moco/sweep/figures.py.
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
    read = "\n".join(data.describe(train, None if val is train else val))
    return (
        f"{read}\n{what}, {len(train.classes or ())} classes; {distributed.processes()}, batch {images.batch}, "
        f"{images.workers} loader workers each{views}"
    )


def begin_result(mode: str, arch: str, pretrained: str, train: Source, val: Source, images: EvalData) -> dict[str, Any]:
    """What every result file says of its run."""
    return {"mode": mode, "arch": arch, "pretrained": pretrained, "size": images.size, "seed": images.seed,
            "classes": len(train.classes or ()), "train_images": len(train), "val_images": len(val)}  # fmt: skip


def counts(heads: list[LinearClassifier]) -> tuple[Counts, str]:
    """The leading head's predictions of the last epoch, and what they are."""
    first, score = _led(heads)
    return counts_of(score, first.classes), f"linear probe at lr {first.name}, {score.images:,} held-out images"


def write_details(heads: list[LinearClassifier], details: Details) -> None:
    """What is asked for of the leading head's predictions."""
    if details:
        details.write(*counts(heads))


def _led(heads: list[LinearClassifier]) -> tuple[LinearClassifier, Score]:
    first = leader(heads)
    assert first.score is not None, "validated, and not every head has diverged"
    return first, first.score
