"""What the functions of :mod:`moco.library.program` return, and what they take in its place. No torch here."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union

from moco import files, run_folder
from moco.errors import OutageError, UserError

if TYPE_CHECKING:
    import numpy as np

_STEP = re.compile(r"checkpoint_(\d+)(?:_step_(\d+))?\.")


@dataclass(frozen=True)
class RunResult:
    """A pretraining that has ended.

    Attributes:
        folder: the run's, with its checkpoints and logs.
        checkpoint: the newest one.
        metrics: the last record of the training in log.jsonl: loss, loss_ratio, top1, lr, ..
        knn: k-NN accuracy in percent as it was last measured; None where it was not.
        stopped: whether the run ended before its last epoch or step, by ``max_minutes`` or a signal; ``resume="auto"``
            goes on.
    """

    folder: Path
    checkpoint: Path
    metrics: dict[str, Any]
    knn: float | None
    stopped: bool


@dataclass(frozen=True, eq=False, repr=False)
class Embedding:
    """Features of n images.

    Attributes:
        features: (n, F) float32, in the order of the data set.
        labels: (n,) int64, numbers of ``classes``; -1 for images without a label.
        paths: n names: of a file its path, of a data set by name its number.
        classes: names of the classes; none for images without labels.
        files: what was written, the features first; nothing where no ``out`` was given.
    """

    features: np.ndarray
    labels: np.ndarray
    paths: list[str]
    classes: list[str]
    files: list[Path]

    def __repr__(self) -> str:
        n, width = self.features.shape
        return f"Embedding({n} x {width} features, {len(self.classes)} classes, files={[*map(str, self.files)]})"


Checkpoint = Union[str, "os.PathLike[str]", RunResult]  # a file, the folder of a run, or a run


def path_of(checkpoint: Checkpoint) -> str:
    """The file that is meant, see :func:`moco.run_folder.encoder_file`. ``torchvision:NAME`` stays what it is.

    Raises:
        UserError: a folder without any.
    """
    if isinstance(checkpoint, RunResult):
        return str(checkpoint.checkpoint)
    if not isinstance(checkpoint, str | os.PathLike):
        raise UserError(f"a checkpoint is a file, a run's folder or what moco.pretrain returned, not {checkpoint!r}.")
    return run_folder.encoder_file(os.fspath(checkpoint))


def result_of(folder: str, epochs: int, steps: int | None) -> RunResult:
    """The run that has ended in a folder, of so many epochs or, where given, steps.

    Raises:
        OutageError: it has saved nothing.
    """
    checkpoint = run_folder.newest(folder)
    if checkpoint is None:
        raise OutageError(f"the run in {folder} was stopped before its first step, and nothing is saved.")
    records = list(files.records(os.path.join(folder, "log.jsonl")))
    training = [record for record in records if "loss" in record]
    knn = [record["knn"] for record in records if record.get("knn") is not None]
    found = _STEP.search(os.path.basename(checkpoint))
    assert found, "run_folder takes no other names"
    done = int(found[1]) + (found[2] is None)
    at = max([int(found[2] or 0), *(record["step"] for record in training)])
    stopped = at < steps if steps else done < epochs
    metrics = training[-1] if training else {}
    return RunResult(Path(folder), Path(checkpoint), metrics, knn[-1] if knn else None, stopped)


def embedding_of(path: str, written: list[Path]) -> Embedding:
    """What :func:`moco.eval.embed.save_features` has written."""
    import numpy as np

    if path.endswith(".npz"):
        with np.load(path) as found:
            names, classes = found["names"].tolist(), found["classes"].tolist()
            return Embedding(found["features"], found["labels"], names, [str(c) for c in classes], written)
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as opened:
        names = opened.get_tensor("names").tobytes().split(b"\0")
        classes = json.loads((opened.metadata() or {}).get("classes", "[]"))
        features, labels = opened.get_tensor("features"), opened.get_tensor("labels")
    return Embedding(features, labels, [os.fsdecode(name) for name in names], classes, written)
