"""A query's hard negatives, shown as images and counted: python -m moco.negatives CKPT DIR.

    python -m moco.negatives CKPT DIR [flags]        --help lists the flags

CKPT is a checkpoint of a pretraining with a queue, or the folder of a run; DIR its images. In --out: negatives.html
(one file that loads nothing), negatives.png and negatives.json. Exit codes: 0 done; 2 input that cannot be used.

Features are those of training: the views of the epoch that comes next, BatchNorm by the batch, the key of the key
encoder, the draws of the batch that comes next.
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import torch

from moco import data, distributed, files, run_folder
from moco.data import Source
from moco.errors import UserError, tell
from moco.eval.embed import make_folder
from moco.eval.mined import page, picture
from moco.eval.mined.images import Gallery, Sample, chosen, number_of
from moco.eval.mined.measure import Mined, look, measure
from moco.eval.mined.queue_run import QueueRun, open_queue

HARDEST = 12  # rows of a query that are shown


def run_negatives(args: Namespace) -> int:
    """The command; returns the exit code."""
    runs = [open_queue(path) for path in checkpoints(args)]
    runs.sort(key=lambda run: (run.epoch, run.draw))
    last = runs[-1]
    own = {name: last.settings.get(name) for name in ("channels", "levels")}
    sources = data.open_sources(args.dataset, args.data, download=args.download, cache=args.cache, **own)
    source = sources.pretrain
    tell(*data.describe(source, sources.val))
    warnings = _warnings(runs, source, args.other_images)
    for warning in warnings:
        tell(f"warning: {warning}")
    make_folder(args.out)
    views, words = last.views(source)
    named = [number_of(source, name) for name in args.image]
    sample = Sample(views, last.epoch, chosen(len(source), args.sample, args.seed, named), named)
    gallery = Gallery(last, source, views, sample)
    result: dict[str, Any] = {
        "checkpoint": last.path, "method": last.method, "images": source.name, "image_count": len(source),
        "sample_seed": args.seed, "views": words, "warnings": [*warnings, *sample.notes(source)],
        "classes": source.labels is not None, "unreadable": len(sample.unread),
    }  # fmt: skip
    developed = []
    for run in runs:
        mined = compared(run, sample, source, args)
        measured = measure(mined)
        developed.append({"checkpoint": run.path, "epoch": run.epoch, **without_histograms(measured)})
        tell(f"{run.path}: {sentence(measured, run.supervised)}")
    result |= {**about(last, mined), **measured, "shown": look(mined, len(named) or args.queries, HARDEST)}
    result["checkpoints"] = developed
    write(result, gallery, args.out)
    return 0


def checkpoints(args: Namespace) -> list[str]:
    """Paths of the checkpoints that are meant: those that were given, or all of the run."""
    if not args.over_checkpoints:
        return [run_folder.encoder_file(path) for path in args.checkpoints]
    if len(args.checkpoints) > 1:
        raise UserError("--over-checkpoints takes all checkpoints of one run; give its folder or one of its files.")
    path = args.checkpoints[0]
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    found = [*run_folder.written(folder)]
    if not found:
        raise UserError(f"{folder or '.'} holds no checkpoint of a pretraining; leave --over-checkpoints out.")
    return found


def _warnings(runs: Sequence[QueueRun], source: Source, others_too: bool) -> list[str]:
    """Of images that are not the run's, where ``others_too`` admits them.

    Raises:
        UserError: other images, or checkpoints that are not of one run.
    """
    last = runs[-1]
    found = []
    for run in runs:
        if run.settings.get("size") != last.settings.get("size") or len(run.queue) != len(last.queue):
            raise UserError(f"{run.path} and {last.path} differ in --size or --moco-k; give checkpoints of one run.")
        if odd := run.other_images(source):
            if not others_too:
                raise UserError(f"{odd}: queue rows would be shown as images that they are not of; give the images of "
                                "the run, or --other-images to go on nevertheless.")  # fmt: skip
            found.append(f"{odd}: the images, names and classes of queue rows may be wrong")
    return found


def compared(run: QueueRun, sample: Sample, source: Source, args: Namespace) -> Mined:
    """The features of the sample by a checkpoint's encoders, beside its queue."""
    device = distributed.device()
    q, k = run.encode(sample.queries, sample.keys, device)
    classes = None if source.labels is None else torch.from_numpy(source.labels)
    _, recipe, hard = run.negatives(args.recipe, args.n_hard)
    return Mined(run, sample.ids, q, k, classes, recipe, hard, run.masks(len(source)), run.seed, run.draw)


# ----------------------------------------------------------------------------------------------- what is written


def about(run: QueueRun, mined: Mined) -> dict[str, Any]:
    """Of the queue and the draws, for the page and the JSON."""
    own = run.negatives(None, None)[0]
    return {
        "epoch": run.epoch, "T": run.T, "K": len(run.queue), "seed": mined.seed, "call": mined.call,
        "no_image": int((run.ids < 0).sum()), "masked": mined.masked, "supervised": run.supervised,
        "own_recipe": bool(own) and mined.recipe == run.negatives(own, None)[1], "seen_together": run.seen_together,
        "start_epoch": run.recipe.get("--hard-start-epoch") if own else None,
    }  # fmt: skip


def sentence(measured: dict[str, Any], supervised: bool) -> str:
    """One line for the log; ``supervised``: of a queue with labels."""
    hard = next(row for row in measured["by_hard"] if row["hard"] == measured["hard"])
    start = (
        f"{measured['queries']} queries, mean similarity {hard['similarity']:.3f} of the {hard['hard']} hardest rows"
    )
    if supervised:
        return f"{start}; rows of the query's class are positives of this run"
    if measured["base_rate"] is None or hard["false"] is None:
        return f"{start}; no labels of queue rows, so false negatives cannot be counted"
    return (
        f"{start}, of which {100 * hard['false']:.1f} % are of the query's class "
        f"({100 * measured['base_rate']:.1f} % of all rows)"
    )


def without_histograms(measured: dict[str, Any]) -> dict[str, Any]:
    """The same, smaller."""
    kinds = {kind: {n: v for n, v in row.items() if "histogram" not in n} for kind, row in measured["kinds"].items()}
    return {**measured, "kinds": kinds}


def write(result: dict[str, Any], gallery: Gallery, folder: str) -> None:
    """negatives.json, negatives.png and negatives.html."""
    paths = [os.path.join(folder, f"negatives.{kind}") for kind in ("json", "png", "html")]
    gallery.name_all(result)
    files.write_json(result, paths[0], "--out")
    picture.draw(result, gallery, paths[1])
    files.write_text(page.page_of(result, gallery), paths[2], "--out")
    tell(f"written: {', '.join(paths)}")
