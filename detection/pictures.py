"""A few test images with the boxes that a trained detector predicts."""

from __future__ import annotations

import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from detectron2.structures import Instances
from detectron2.utils.visualizer import Visualizer
from PIL import Image

from moco import files

SURE = 0.5  # score from which a prediction is drawn
LEAST = 3  # the best ones are drawn even when none is sure


def draw(cfg: CfgNode, folder: str, count: int) -> list[str]:
    """Draw predictions for images spread evenly over the first test set; the paths written, named by the images.

    Args:
        cfg: a finished run's, MODEL.WEIGHTS its detector.
        count: pictures at most.
    """
    name = cfg.DATASETS.TEST[0]
    images = DatasetCatalog.get(name)
    chosen = images[:: max(1, len(images) // max(1, count))][:count]
    os.makedirs(folder, exist_ok=True)
    predict = DefaultPredictor(cfg)
    written = []
    for one in chosen:
        pixels = read_image(one["file_name"], "BGR")  # (height, width, 3), what DefaultPredictor takes
        found = worth_drawing(predict(pixels)["instances"].to("cpu"))
        drawn = Visualizer(pixels[:, :, ::-1], MetadataCatalog.get(name)).draw_instance_predictions(found).get_image()
        path = os.path.join(folder, os.path.splitext(os.path.basename(one["file_name"]))[0] + ".png")
        with files.replacing(path, "--out") as beside:
            Image.fromarray(drawn).save(beside, "PNG")
        written.append(path)
    return written


def worth_drawing(found: Instances) -> Instances:
    """The predictions that are sure, or the few best, by falling score."""
    order = found.scores.argsort(descending=True)
    sure = int((found.scores > SURE).sum())
    return found[order[: max(sure, LEAST)]]
