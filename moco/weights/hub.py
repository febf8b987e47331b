"""The folder of a model on the Hugging Face Hub, for timm: config.json, model.safetensors and README.md.

timm 1.0.26 and later load it by ``timm.create_model("local-dir:FOLDER", pretrained=True)``; with earlier versions the
entries of config.json are given as ``pretrained_cfg_overlay``. config.json has what timm's own exports have
(timm/models/_hub.py, ``save_config_for_hf``), and its ``pretrained_cfg`` the fields of timm's ``PretrainedCfg``.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moco import files
from moco.errors import UserError
from moco.weights.changes import describe_changes

CONFIG, WEIGHTS, README = "config.json", "model.safetensors", "README.md"
SMALL = 64  # below, evaluations take images whole (moco/data/augment/by_pil.py, eval_view)


def check_folder(out: str) -> None:
    """UserError where the folder holds something else than an earlier export."""
    if os.path.isfile(out):
        raise UserError(f"--out {out} is a file; --to hub writes a folder.")
    if os.path.isdir(out) and os.listdir(out) and "architecture" not in files.read_json(os.path.join(out, CONFIG)):
        raise UserError(f"--out {out} holds something else than an exported model; choose another folder.")


def check_timm_builds(stem: str, changes: dict[str, int], path: str) -> None:
    """UserError where no arguments of ``timm.create_model`` build the network."""
    odd = {name: value for name, value in changes.items() if name != "num_heads"}
    what = "a 3x3 first convolution and no max-pool" if stem == "cifar" else describe_changes(odd)
    if what:
        raise UserError(
            f"{path} is of a network with {what}, which timm.create_model cannot build: take --to timm, which prints "
            "the lines of Python that change timm's network, or --to safetensors."
        )


def model_args(network: Any, card: dict[str, Any]) -> dict[str, Any]:
    """The arguments, besides the architecture, with which timm builds a network.

    Args:
        network: of timm, as it is to be built.
        card: of :func:`moco.weights.export.make_card`.
    """
    args: dict[str, Any] = {}
    if network.pretrained_cfg.get("fixed_input_size"):
        args["img_size"] = card["size"]
    if card["channels"] != 3:
        args["in_chans"] = card["channels"]
    return args | {name: value for name, value in card["changes"].items() if name == "num_heads"}


def config_of(network: Any, arch: str, card: dict[str, Any], classes: int) -> dict[str, Any]:
    """The entries of config.json.

    Args:
        network, card: see :func:`model_args`.
        arch: timm's name.
        classes: outputs of the classifier that is kept, 0 for features.
    """
    known, size, whole = network.pretrained_cfg, card["size"], card["size"] < SMALL
    pretrained = {
        "custom_load": False,
        "input_size": [card["channels"], size, size],
        "fixed_input_size": bool(known.get("fixed_input_size")),
        "interpolation": "bilinear",
        "crop_pct": 1.0 if whole else 224 / 256,
        "crop_mode": "center",
        "mean": card["mean"],
        "std": card["std"],
        "num_classes": classes,
        "pool_size": None,
        "first_conv": known.get("first_conv"),
        "classifier": known.get("classifier"),
    }
    config = {"architecture": arch, "num_classes": classes, "num_features": network.num_features}
    config |= {"global_pool": network.global_pool} if isinstance(getattr(network, "global_pool", None), str) else {}
    config |= {"label_names": card["classes"]} if classes and len(card.get("classes", ())) == classes else {}
    return {**config, "model_args": model_args(network, card), "pretrained_cfg": pretrained}


def built_by_timm(config: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """What timm makes of the folder, before there is one; it loads the tensors strictly."""
    import timm

    known = {**config["pretrained_cfg"], "state_dict": tensors}
    return timm.create_model(
        config["architecture"], pretrained=True, pretrained_cfg=known, **config["model_args"]
    ).eval()


def write_folder(out: str, config: dict[str, Any], tensors: dict[str, Tensor], card: dict[str, Any], text: str) -> None:
    """Write the three files. None of an earlier export goes before all are written.

    text: of README.md.
    """
    from safetensors.torch import save

    with contextlib.ExitStack() as opened:
        beside = {name: opened.enter_context(files.replacing(os.path.join(out, name), "--out")) for name in
                  (README, CONFIG, WEIGHTS)}  # fmt: skip
        Path(beside[WEIGHTS]).write_bytes(save(tensors, {"format": "pt", "card": json.dumps(card)}))
        Path(beside[CONFIG]).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        Path(beside[README]).write_text(text, encoding="utf-8")
