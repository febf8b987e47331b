"""Reads the result files of probes, fine-tunings and the measures without training: rows, each with its table."""

from __future__ import annotations

from collections.abc import Iterator

from moco.report.gather import KNN, MEASURES, PROBE, RANGE, RATES, RETRIEVAL, SHOTS, TUNED, Entries, Row

Rows = Iterator[tuple[str, Row]]


def of_result(found: Entries) -> Rows:
    """result.json and evaluate.json of a probe or a fine-tuning."""
    if found.get("mode") not in ("lincls", "evaluate", "semisup"):
        return
    if "settings" in found:
        yield TUNED, _tuned(found)
        return
    how = "the held-out images" if found.word("selected_on") == "validation" else found.word("selected_on")
    yield PROBE, {
        **_accuracies(found), "lr": found.cell("lr"), "epochs": found.count("epochs"),
        "features": found.word("features"), "chosen on": how, "training images": found.count("train_images"),
        "held-out images": found.count("val_images"), "unreadable": found.count("unreadable"),
    }  # fmt: skip
    for row in found.each("per_lr"):
        outcome = "diverged" if row.get("diverged") else "chosen" * bool(row.get("selected"))
        yield RATES, {**_accuracies(row), "lr": row.cell("lr"), "held-out loss": row.cell("val_loss", "{:.4g}"),
                      "outcome": outcome}  # fmt: skip


def _accuracies(found: Entries) -> Row:
    names = {"top-1, %": "acc1", "top-5, %": "acc5", "best top-1, %": "best_acc1"}
    return {column: found.percent(name) for column, name in names.items()}


def _tuned(found: Entries) -> Row:
    asked = found.inside("settings")
    share = "a list" if asked.get("train_files") and not asked.get("train_percent") else asked.cell("train_percent")
    percents = {"test top-1, %": "acc1", "test top-5, %": "acc5", "best test top-1, %": "best_acc1",
                "validation top-1, %": "val_acc1", "best validation top-1, %": "best_val_acc1"}  # fmt: skip
    return {
        "labels, %": share or "100", "training images": found.count("train_images"),
        "weights": asked.word("weights"), "lr encoder": asked.cell("lr_backbone"),
        "lr classifier": asked.cell("lr_classifier"), "epochs": found.count("epochs"),
        "seed": found.cell("seed", "{:.0f}"), "best epoch": found.count("best_epoch"),
        **{column: found.percent(name) for column, name in percents.items()},
        "few-shot, %": ", ".join(f"{shot}-shot {accuracy}" for shot, accuracy in _shots(found)),
    }  # fmt: skip


def _shots(found: Entries) -> Iterator[tuple[str, str]]:
    """Numbers of shots, each with the accuracy and its interval."""
    for name in found:
        shot = name.removeprefix("acc_").removesuffix("shot")
        if name == f"acc_{shot}shot":
            interval = found.percent(f"ci95_{shot}shot")
            yield shot, found.percent(name) + (f" ± {interval}" if interval else "")


def of_knn(found: Entries) -> Rows:
    """knn.json: a row for each k."""
    if found.get("mode") != "knn":
        return
    alone = "yes" * bool(found.get("leave_one_out"))
    for name in [name for name in found if name[:4] == "knn_" and name[4:].isdigit()] or ["knn"]:
        yield KNN, {
            "k": name[4:] or found.count("k"), "T": found.cell("T"), "top-1, %": found.percent(name),
            "queries": found.count("val_images"), "each image against the others": alone,
            "unreadable": found.count("unreadable"),
        }  # fmt: skip


def of_few_shot(found: Entries) -> Rows:
    """few_shot.json: a row for each number of shots."""
    for shot, accuracy in _shots(found) if found.get("mode") == "few_shot" else ():
        yield SHOTS, {
            "ways": found.count("way"), "shots": shot, "accuracy, %": accuracy, "episodes": found.count("episodes"),
            "queries a class": found.count("queries"), "images": found.count("val_images"),
            "warning": found.word("warning"),
        }  # fmt: skip


def of_retrieval(found: Entries) -> Rows:
    """retrieval.json: the features before the head and behind it."""
    for where, told in (("features", "the encoder's features"), ("head", "the projection head's output")):
        if values := found.inside(where):
            cells = {column: values.percent(name) for name, column in MEASURES.items()}
            yield RETRIEVAL, {"of": told, **cells, "images": found.count("images")}


def of_lr_find(found: Entries) -> Rows:
    """lr_find.json."""
    if found.get("mode") == "lr_find":
        edge = found.word("edge")
        yield RANGE, {
            "suggested lr": found.cell("suggestion"), "steps": found.count("steps"), "warning": found.word("warning"),
            "diverged at": found.cell("diverged_at", "{:.2g}"),
            "lowest loss at": f"close to the {edge} rate" if edge else "a rate between",
        }  # fmt: skip
