"""Results that lie in and below a run's folder, as tables: what the evaluations, sweeps and detections wrote there.

Nothing is measured here. A file that is damaged is a row of a table of its own; one that is not ours is passed over.
"""

from __future__ import annotations

import os

from moco.report import of_evaluations, of_trials
from moco.report.gather import CHECKPOINT, DAMAGED, FILE, Entries, Finds, relative
from moco.report.table import Table
from moco.report.walk import DEPTH, Place, Walk

EVALUATIONS = {
    "result.json": of_evaluations.of_result, "evaluate.json": of_evaluations.of_result,
    "knn.json": of_evaluations.of_knn, "few_shot.json": of_evaluations.of_few_shot,
    "retrieval.json": of_evaluations.of_retrieval, "lr_find.json": of_evaluations.of_lr_find,
}  # fmt: skip
TRIALS = {
    "results.csv": of_trials.of_sweep, "summary.json": of_trials.of_detection, "results.json": of_trials.of_detector,
    "metrics.json": of_trials.of_training,
}  # fmt: skip
PICTURES = {
    "confusion.png": "Confusion matrix", "knn_confusion.png": "Confusion matrix of k-NN", "results.png": "Sweep",
    "lr_find.png": "Learning-rate range test", "embedding.png": "Embedding",
    "neighbours.png": "Neighbours", "negatives.png": "Hard negatives",
}  # fmt: skip


def tables(folder: str, depth: int = DEPTH) -> list[Table]:
    """Every result in ``folder`` and so many levels below it, a table for each measure and each sweep; empty for none.

    Each row names the checkpoint that was measured, as the result does. At most a moment is spent on looking
    (:mod:`moco.report.walk`); what was not looked at is the note of the last table.
    """
    finds, walk = Finds(folder), Walk(folder, depth)
    for place in walk:
        for name in (*EVALUATIONS, *TRIALS):
            if name in place.files:
                _read(finds, place, name)
    return finds.tables(walk.left_out)


def _read(finds: Finds, place: Place, name: str) -> None:
    path = os.path.join(place.path, name)
    try:
        if name in TRIALS:
            TRIALS[name](finds, place, path)
            return
        found = Entries.read(path)
        measured = finds.checkpoint(found.get("checkpoint", found.get("pretrained")), path)
        if found.get("mode") == "evaluate" and not found.get("pretrained"):
            measured = "the one that --resume named"
        shared = {CHECKPOINT: measured, FILE: relative(path, finds.folder)}
        for title, row in list(EVALUATIONS[name](found)):  # all of a file or nothing
            finds.add(title, {**shared, **row})
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        finds.add(DAMAGED, {FILE: relative(path, finds.folder), "what is wrong": why})
    except Exception:  # values of other kinds than this program writes can fail anywhere, and no result ends a report
        why = "values of a kind that this program does not write"
        finds.add(DAMAGED, {FILE: relative(path, finds.folder), "what is wrong": why})


def pictures(folder: str, depth: int = DEPTH) -> list[tuple[str, str]]:
    """Title and path of each picture that evaluations and sweeps have drawn in ``folder`` and so many levels below."""
    found = []
    for place in Walk(folder, depth):
        swept = "results.csv" in place.files and "trials" in place.folders
        if swept:
            place.leave("trials")
        for name, title in PICTURES.items():
            if name in place.files and (swept or name != "results.png"):
                where = relative(place.path, folder)
                found.append((f"{title}: {where}" if where != "." else title, os.path.join(place.path, name)))
    return found
