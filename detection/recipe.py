"""The settings of a detection run, and what must be there before it starts.

Needs detectron2; ask :func:`detection.needs.check` before importing this module.
"""

from __future__ import annotations

import os
import re
import warnings
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg

from moco.errors import UserError

from . import layout
from .trainer import Trainer

HERE = os.path.dirname(os.path.abspath(__file__))
CONVERT = (
    "convert a checkpoint by python -m moco.export CHECKPOINT --to detectron2 --out OUT.pkl and append "
    "MODEL.WEIGHTS OUT.pkl"
)
SCALED = ("SOLVER.MAX_ITER", "SOLVER.STEPS", "SOLVER.WARMUP_ITERS", "SOLVER.CHECKPOINT_PERIOD", "TEST.EVAL_PERIOD")


def find_config(path: str) -> str:
    """The file, as given or relative to detection/ (upstream's commands are run there).

    Raises:
        UserError: there is none.
    """
    for found in (path, os.path.join(HERE, path)):
        if os.path.isfile(found):
            return found
    raise UserError(f"no config file at {path or '(none given)'}; --config-file takes one of {HERE}/configs/.")


def read_config(path: str, argv: list[str], num_gpus: int, scale: bool = True) -> tuple[CfgNode, list[str]]:
    """The settings of a run and sentences on what was changed in the file's.

    Args:
        path: a YAML file.
        words: ``KEY VALUE`` pairs that override the file.
        num_gpus: 0 trains on the CPU.
        scale: follow a changed SOLVER.IMS_PER_BATCH, see :func:`scale_linearly`.

    Raises:
        UserError: an unknown key, a value of a wrong kind, or more GPUs than there are.
    """
    if num_gpus > torch.cuda.device_count():
        raise UserError(
            f"--num-gpus {num_gpus} is more than the {torch.cuda.device_count()} GPUs here; --num-gpus 0 is the CPU."
        )
    cfg = get_cfg()
    try:
        cfg.merge_from_file(path)
        published = cfg.SOLVER.IMS_PER_BATCH
        cfg.merge_from_list(argv)
    except (KeyError, AssertionError, ValueError) as error:
        raise UserError(f"the settings of {path} and the words behind it do not fit detectron2: {error}.") from error
    said = scale_linearly(cfg, published, set(argv[::2])) if scale else []
    if num_gpus == 0:
        cfg.MODEL.DEVICE = "cpu"
    processes = max(num_gpus, 1)
    if cfg.SOLVER.IMS_PER_BATCH % processes:
        raise UserError(
            f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} does not divide among {processes} GPUs: give a multiple."
        )
    # Statistics of more batches than were trained on cost time and say nothing; 200 batches stay 200 in every recipe.
    cfg.TEST.PRECISE_BN.NUM_ITER = min(cfg.TEST.PRECISE_BN.NUM_ITER, cfg.SOLVER.MAX_ITER)
    cfg.freeze()
    return cfg, said


def scale_linearly(cfg: CfgNode, published: int, explicit: set[str]) -> list[str]:
    """Fit learning rate and schedule to a batch other than the config file's; in place.

    The linear rule (Goyal et al. 2017, arXiv 1706.02677): with f = IMS_PER_BATCH / published the learning rate is
    multiplied and every count of iterations divided by f, so as many images are seen. The number of GPUs does not
    matter: 16 images on 8 GPUs or on 4 are the same recipe. What the user wrote is left as it is.

    Args:
        published: images a step in the config file.
        explicit: keys that the user set.

    Returns:
        Sentences that say what changed.
    """
    factor = cfg.SOLVER.IMS_PER_BATCH / published
    if factor == 1:
        return []
    changed = []
    for key in ("SOLVER.BASE_LR", *SCALED):
        section, name = key.split(".")
        old = cfg[section][name]
        new = old * factor if name == "BASE_LR" else _divided(old, factor)
        if key not in explicit and new != old:
            cfg[section][name] = new
            changed.append(f"{key} {old} -> {new}")
    batch = f"SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} is {factor:g} times the config's {published}"
    return [f"{batch}; linear scaling: {', '.join(changed) or 'all was given'}"]


def _divided(count: int | tuple[int, ...], factor: float) -> int | tuple[int, ...]:
    return tuple(round(c / factor) for c in count) if isinstance(count, tuple) else round(count / factor)


# ------------------------------------------------------------------------------------------- what must be there first


class _Judge(DetectionCheckpointer):
    """Loads a file as the trainer will, and keeps what did not fit."""

    def _load_model(self, checkpoint: Any) -> Any:
        self.incompatible = super()._load_model(checkpoint)
        return self.incompatible

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        """Nothing here: the training's own load lists what the new layers do not find."""


def check_start(cfg: CfgNode, resume: bool, eval_only: bool) -> None:
    """Data sets, weights and, for ``--resume``, the run to be resumed: all asked before the first process starts.

    Raises:
        UserError: something is missing, or the weights are not a whole backbone (to evaluate: a whole detector).
    """
    layout.check(cfg.DATASETS.TEST if eval_only else (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST))
    if not resume:
        check_weights(cfg, whole=eval_only)
    elif not os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")):
        raise UserError(f"--resume finds no last_checkpoint in {cfg.OUTPUT_DIR}; give the OUTPUT_DIR of that run.")


def check_weights(cfg: CfgNode, whole: bool = False) -> None:
    """See that MODEL.WEIGHTS fills the backbone (``whole``: every part); detectron2 trains on without what is missing.

    Raises:
        UserError: no such file, or entries of the backbone are missing, left over or of another shape.
    """
    path = cfg.MODEL.WEIGHTS
    if not path and not whole:  # MODEL.WEIGHTS '' is detectron2's spelling of training from scratch
        return
    if not re.match(r"\w+://", path) and not os.path.isfile(path):
        raise UserError(f"MODEL.WEIGHTS names no file ({path}); {CONVERT}.")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):  # names and shapes are enough
        judge = _Judge(Trainer.build_model(cfg))
    with torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*to a meta parameter.*", UserWarning)
        try:
            judge.load(path)
        except Exception as error:  # the file's content decides what its reader raises
            raise UserError(f"{path} cannot be read by detectron2 ({error}); {CONVERT}.") from error
    _complain(path, judge.incompatible, r"" if whole else r"(stem|res[2-5]\.\d+)\.", cfg.MODEL.RESNETS.DEPTH)


def _complain(path: str, incompatible: Any, part: str, depth: int) -> None:
    missing = [n for n in incompatible.missing_keys if re.search(part, n) and n.endswith((".weight", ".bias"))]
    odd = [n for n in incompatible.unexpected_keys if re.search(r"(^|\.)res[2-5]\.\d+\.", n)]
    faults = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has besides", odd)) if names]
    if faults:
        what = f"{path} does not fit the ResNet-{depth} of this config: it {' and '.join(faults)}"
        raise UserError(f"{what}; {CONVERT}, and give MODEL.RESNETS.DEPTH 101 if it is a ResNet-101.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
