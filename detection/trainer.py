"""The detector of the MoCo papers in detectron2: its head, its evaluators and its training.

Needs detectron2; ask :func:`detection.needs.check` before importing this module.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_setup
from detectron2.evaluation import COCOEvaluator, DatasetEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils import comm
from torch import nn

from moco.files import write_json

from . import layout

RESULTS = "results.json"


# --------------------------------------------------------------------------------------------------------- the model


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 head with one more BatchNorm after res5 (MoCo, arXiv 1911.05722, appendix).

    Supervised ResNets end in features whose scale their own last layers know; contrastive ones do not, and the norm
    calibrates them for the new box predictor. Its name in detectron2's registry is upstream's, for configs and files.
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode) -> tuple[nn.Sequential, int]:
        res5, channels = super()._build_res5_block(cfg)
        res5.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return res5, channels


# ----------------------------------------------------------------------------------------------- training and measure


class ZeroCOCOEvaluator(COCOEvaluator):
    """COCO's measures, but 0 for a detector that finds nothing, where detectron2 says NaN."""

    def _derive_coco_results(self, coco_eval: Any, iou_type: str, class_names: Any = None) -> dict[str, float]:
        if coco_eval is None:
            return dict.fromkeys(("AP", "AP50", "AP75", "APs", "APm", "APl"), 0.0)
        return super()._derive_coco_results(coco_eval, iou_type, class_names)


class Trainer(DefaultTrainer):
    """detectron2's trainer with the evaluator that belongs to the data set."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> DatasetEvaluator:
        """By what the data set is registered as, not by its name.

        Raises:
            UserError: neither pascal_voc nor coco.
        """
        if layout.evaluator_type(dataset_name) == "pascal_voc":
            return PascalVOCDetectionEvaluator(dataset_name)
        tasks = ("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",)
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        return ZeroCOCOEvaluator(dataset_name, tasks=tasks, output_dir=folder)


def work(cfg: CfgNode, args: argparse.Namespace) -> None:
    """What each process does: train, or only evaluate; the first one writes results.json into OUTPUT_DIR.

    ``args`` is detectron2's own: its default_setup logs it and reads ``eval_only`` and ``config_file``.
    """
    default_setup(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        DetectionCheckpointer(model, save_dir=cfg.OUTPUT_DIR).resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        results = Trainer.test(cfg, model)
    else:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results = getattr(trainer, "_last_eval_results", {})
    if comm.is_main_process():
        write_json(plain(results), os.path.join(cfg.OUTPUT_DIR, RESULTS), "OUTPUT_DIR")


def plain(results: Any) -> Any:
    """Nested results as JSON takes them, without those that are NaN: classes and sizes that the data does not have."""
    if isinstance(results, dict):
        return {name: plain(value) for name, value in results.items() if isinstance(value, dict) or value == value}
    return float(results)
