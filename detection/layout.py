"""Are the data sets where detectron2 looks for them? Asked before a model is built, not after an hour of training.

detectron2 takes its built-in data sets from the folder DETECTRON2_DATASETS (by default ./datasets):

    VOC2007/, VOC2012/                 Annotations/ID.xml  ImageSets/Main/SPLIT.txt  JPEGImages/ID.jpg
    coco/                              annotations/instances_SPLIT2017.json  train2017/  val2017/
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from detectron2.data import DatasetCatalog, MetadataCatalog

from moco.errors import UserError

HELP = {
    "pascal_voc": "unpack the VOC devkit's folders VOC2007 (trainval and test) and VOC2012 (trainval) there",
    "coco": "put coco/annotations, coco/train2017 and coco/val2017 there",
}


def check(names: Iterable[str]) -> None:
    """See that each data set's lists, annotations and images are there.

    Args:
        names: as in DATASETS.TRAIN and DATASETS.TEST; built-in ones or registered by the caller.

    Raises:
        UserError: an unknown name, or something is missing; the sentence names the first path and how to arrange it.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise UserError(f"detectron2 knows no data set {name}; register it, or name a built-in one.")
        kind = evaluator_type(name)
        missing = next(_missing(name, kind), None)
        if missing:
            root = os.getenv("DETECTRON2_DATASETS", "datasets")
            raise UserError(
                f"data set {name} is not whole: {missing} is missing; {HELP[kind]}, or set DETECTRON2_DATASETS "
                f"(now {root}) to the folder that holds them."
            )


def evaluator_type(name: str) -> str:
    """``pascal_voc`` or ``coco``; other kinds are refused."""
    kind = MetadataCatalog.get(name).get("evaluator_type", "")
    if kind not in HELP:
        raise UserError(
            f"data set {name} is evaluated as {kind or 'nothing'}; only pascal_voc and coco are known here."
        )
    return kind


def _missing(name: str, kind: str) -> Iterator[str]:
    """Paths that are not there, the most telling first."""
    meta = MetadataCatalog.get(name)
    if kind == "coco":
        # the images are not compared one by one: the list is the annotation file, 450 MB that detectron2 reads anyway
        return (path for path in (meta.json_file, meta.image_root) if not _holds_something(path))
    return _missing_of_voc(meta.dirname, meta.split)


def _missing_of_voc(folder: str, split: str) -> Iterator[str]:
    listed = os.path.join(folder, "ImageSets", "Main", f"{split}.txt")
    if not _holds_something(listed):
        yield listed
        return
    with open(listed, encoding="utf-8") as file:
        wanted = [line.split()[0] for line in file if line.strip()]
    for part, suffix in (("Annotations", ".xml"), ("JPEGImages", ".jpg")):
        path = os.path.join(folder, part)
        there = set(os.listdir(path)) if os.path.isdir(path) else set()  # one listing, not 16,551 questions
        yield from (os.path.join(path, one + suffix) for one in wanted if one + suffix not in there)


def _holds_something(path: str) -> bool:
    if os.path.isdir(path):
        with os.scandir(path) as entries:
            return any(entries)
    return os.path.isfile(path) and os.path.getsize(path) > 0
