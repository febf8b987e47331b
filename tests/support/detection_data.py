"""Tiny VOC2007, VOC2012 and COCO trees in detectron2's layout: crops of real photographs, boxes made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 64
Box = tuple[int, int, int, int]  # left, top, right, bottom; pixels, right and bottom outside
BOXES: list[Box] = [(2, 4, 28, 30), (34, 2, 60, 28), (4, 34, 30, 62), (36, 32, 62, 58)]


def photographs(count: int) -> list[Image.Image]:
    """Crops of scikit-learn's two photographs."""
    pixels = load_sample_images().images
    corners = np.random.default_rng(0).integers(0, 300, (count, 2))
    crops = [pixels[i % 2][y : y + SIDE, x : x + SIDE] for i, (y, x) in enumerate(corners)]
    return [Image.fromarray(np.ascontiguousarray(crop)) for crop in crops]


def make_voc(root: Path) -> None:
    """VOC2007 with 4 trainval and 5 test images, VOC2012 with 4; the test images show each of the 20 classes once."""
    for year, split, names in (
        (2007, "trainval", [f"{i:06d}" for i in range(4)]),
        (2007, "test", [f"{i:06d}" for i in range(4, 9)]),
        (2012, "trainval", [f"2008_{i:06d}" for i in range(4)]),
    ):
        folder = root / f"VOC{year}"
        for part in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, (name, image) in enumerate(zip(names, photographs(len(names)), strict=True)):
            image.save(folder / "JPEGImages" / f"{name}.jpg")
            objects = zip(CLASS_NAMES[4 * i : 4 * i + 4], BOXES, strict=True)
            (folder / "Annotations" / f"{name}.xml").write_text(_xml("".join(_xml_object(*one) for one in objects)))


def _xml(objects: str) -> str:
    size = f"<size><width>{SIDE}</width><height>{SIDE}</height><depth>3</depth></size>"
    return f"<annotation>{size}{objects}</annotation>"


def _xml_object(name: str, box: Box) -> str:
    left, top, right, bottom = box  # VOC counts pixels from 1 and includes the last
    sides = f"<xmin>{left + 1}</xmin><ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax>"
    rest = "<pose>Left</pose><truncated>0</truncated><difficult>0</difficult>"
    return f"<object><name>{name}</name>{rest}<bndbox>{sides}</bndbox></object>"


def make_coco(root: Path) -> None:
    """COCO 2017 with 3 training and 3 validation images, four objects each, all 80 categories named."""
    categories = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        folder = root / "coco" / f"{split}2017"
        folder.mkdir()
        images, objects = [], []
        for i, image in enumerate(photographs(3), 1):
            name = f"{i:012d}.jpg"
            image.save(folder / name)
            images.append({"id": i, "file_name": name, "height": SIDE, "width": SIDE})
            for j, box in enumerate(BOXES):
                objects.append(_coco_object(4 * i + j, i, categories[j]["id"], box))
        whole = {"info": {}, "images": images, "annotations": objects, "categories": categories}
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(whole))


def _coco_object(number: int, image: int, category: int, box: Box) -> dict:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    outline = [left, top, right, top, right, bottom, left, bottom]
    where = {"bbox": [left, top, width, height], "area": width * height, "segmentation": [outline], "iscrowd": 0}
    return {"id": number, "image_id": image, "category_id": category, **where}
