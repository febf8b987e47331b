"""What depends on several words of another project's line: a folder's name, MoCHi's three numbers, a YAML file.

One function a project, for the rows of projects.txt that are marked by * there. No torch here.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from moco import doors
from moco.cli.projects import Program
from moco.data.registry import DATASETS
from moco.errors import UserError, tell
from moco.files import read_yaml

_IMAGES = ("data", "train_folder", "data_path")  # where the parsers have DIR
_PUBLISHED = re.compile(r"(train|swa|lr_finder)_supcon_resnet18_(cifar100?)_?(stage[12])\.yml$")


@dataclass
class Words:
    """Ours: what a user has typed, and what holds where nothing is typed, an entry a flag."""

    typed: list[str] = field(default_factory=list[str])
    defaults: list[list[str]] = field(default_factory=list[list[str]])


def of(program: Program, special: Mapping[str, str], args: Namespace, typed: Mapping[str, Any]) -> Words:
    """The words of the marked rows of a program.

    Args:
        special: values of those that were typed, by their first spelling, with hyphens.
        args: the settings without them. typed: those of the command line.
    """
    if program.project == "supcontrast":
        return Words(defaults=_supcontrast(program, special, args, typed))
    if program.project == "mochi":
        return _mochi(program, special, typed)
    return Words(defaults=_framework(program, special, typed)) if program.project == "supcon-framework" else Words()


def _is_typed(typed: Mapping[str, Any], *names: str) -> bool:
    return any(name in typed for name in names)


# ---------------------------------------------------------------------------------------------------- SupContrast


def _supcontrast(
    program: Program, special: Mapping[str, str], args: Namespace, typed: Mapping[str, Any]
) -> list[list[str]]:
    defaults: list[list[str]] = []
    dataset: str = args.dataset
    if args.val_data is not None and "dataset" not in typed:
        dataset = "folder"
        defaults.append(["--dataset", dataset])
    if dataset != "folder":
        defaults.append(["--download"])
        if not _is_typed(typed, *_IMAGES):
            defaults.append(["./datasets/"])
    elif not _is_typed(typed, *_IMAGES):
        raise UserError(f"{program.name} with images of a folder needs --data_folder, the folder; or give --dataset.")
    if args.cos and "min_lr" not in typed:
        defaults.append(["--min-lr", f"{_rate(args) * args.lr_decay_rate**3:g}"])
    name = _run_name(program, args, "path" if dataset == "folder" else dataset, special.get("--trial", "0"))
    return [*defaults, ["--save-dir", name]]


def _run_name(program: Program, args: Namespace, dataset: str, trial: str) -> str:
    """./save/SupCon/..., as util.py of SupContrast names the folder of a run."""
    network = args.arch or program.default("--model")
    name = f"{dataset}_{network}_lr_{_rate(args)}_decay_{args.weight_decay}_bsz_{args.batch_size}"
    kind = "linear" if program.main == "lincls" else "models"
    if program.main == "pretrain":
        method = {"supcon": "SupCon", "simclr": "SimCLR"}.get(args.method, args.method)
        name = f"{method}_{name}_temp_{args.moco_t}"
    elif program.main == "semisup":
        name = f"SupCE_{name}"
    name += f"_trial_{trial}" * (kind == "models") + "_cosine" * args.cos
    warm = args.warm or (args.warm is None and args.batch_size > 256 and kind == "models")
    return f"./save/SupCon/{dataset}_{kind}/{name}{'_warm' * warm}"


def _rate(args: Namespace) -> float:
    lr: Any = args.lr
    return min(cast("list[float]", lr)) if isinstance(lr, list) else lr


# ---------------------------------------------------------------------------------------------------------- MoCHi

_MIXING = {"--n-hard": "N", "--s1-hard": "S", "--s2-hard": "S2", "--start1-hard": "mixup",
           "--start2-hard": "interpolation"}  # fmt: skip


def _mochi(program: Program, special: Mapping[str, str], typed: Mapping[str, Any]) -> Words:
    network = special.get("--arch", program.default("--arch")).removeprefix("timm/")
    groups = {
        ("--dir-data",): [[special.get("--dir-data", program.default("--dir_data"))]],
        ("--steps",): _steps(special.get("--steps", program.default("--steps"))),
        ("--clip-grad",): _clip(special.get("--clip-grad", program.default("--clip_grad"))),
        ("--arch",): [["--arch", f"timm/{network}"]],
        tuple(_MIXING): _mixing({name: special.get(name, program.default(name)) for name in _MIXING}),
    }
    instead = {"--dir-data": _IMAGES, "--steps": ("epochs",)}  # ours, which say the same
    words = Words()
    for names, entries in groups.items():
        if _is_typed(special, *names):
            words.typed += [word for entry in entries for word in entry]
        elif not _is_typed(typed, *instead.get(names[0], ())):
            words.defaults += entries
    return words


def _steps(text: str) -> list[list[str]]:
    tenth = _whole("--steps", text) // 10
    return [["--steps", text], *([["--warm-steps", str(tenth)]] if tenth else [])]


def _clip(text: str) -> list[list[str]]:
    return [["--clip-grad", text]] if text.strip("0.") else []  # 0 is off there


def _mixing(values: dict[str, str]) -> list[list[str]]:
    """A type begins one step after theirs, and is off where its start is 0, as theirs is."""
    n, s, s2, *starts = (_whole(name, text) for name, text in values.items())
    counts = [count if start else 0 for count, start in zip((s, s2), starts, strict=True)]
    kinds = zip(("mixup", "interpolation"), counts, starts, strict=True)
    begin = [f"{kind}={start + 1}steps" for kind, count, start in kinds if count]
    return [["--mochi", *map(str, (n, *counts))], *([["--type-starts", *begin]] if begin else [])]


def _whole(name: str, text: str) -> int:
    if not text.isdecimal():
        raise UserError(f"{name.replace('-hard', '_hard')} takes a whole number, not {text}.")
    return int(text)


# ----------------------------------------------------------------------------------------------- SupCon-Framework


def _framework(program: Program, special: Mapping[str, str], typed: Mapping[str, Any]) -> list[list[str]]:
    path = special.get("--config-name", program.default("--config_name"))
    entries = _entries(program, path)
    _check_stage(program, path, entries)
    words = _plain(program, path, entries)
    words += _of_images(str(entries["dataset"])) if not _is_typed(typed, *_IMAGES) else []
    words += _of_network(program, entries, "arch" in typed)
    words.append(["--save-dir", f"weights/{entries['train.logging_name']}"] if "train.logging_name" in entries else [])
    words += _of_schedule(entries)
    words.append(["--amp", "fp16" if entries.get("train.amp") else "off"])
    if program.main != "lincls" and entries.get("train.ema"):
        words.append(["--ema-epoch", str(entries.get("train.ema_decay_per_epoch", 0.3))])
    if program.main == "lincls" and "train.stage" not in entries:
        words += [["--lr-find"], ["--lr-find-steps", "300"], ["--features", "views"]]
    return [entry for entry in words if entry]


def _entries(program: Program, path: str) -> dict[str, Any]:
    """The keys of a file, with dots between them; the published ones of its name where there is no such file."""
    if os.path.isfile(path):
        tree = read_yaml(path, f"--config_name {path}")
        found = _flat(tree) if isinstance(tree, dict) else {}
        if "dataset" not in found or not any(key.startswith("model.") for key in found):
            raise UserError(f"--config_name {path} has no model and dataset, as the files of SupCon-Framework have; "
                            "a file of this project's flags is given by --config.")  # fmt: skip
        return found
    named = _PUBLISHED.search(path)
    if named is None:
        raise UserError(f"--config_name {path}: no such file; give the path of a YAML file of SupCon-Framework.")
    tell(f"{path}: no such file here, so the values that SupCon-Framework publishes are taken", error=True)
    return _published(program, *named.groups())


def _published(program: Program, kind: str, dataset: str, stage: str) -> dict[str, Any]:
    word = "first" if stage == "stage1" else "second"
    if kind == "swa":
        return {"model.top_k_checkoints": 3, "train.weights_dir": f"weights/supcon_{word}_stage_{dataset}"}
    rows = [row for row in program.options if row.key and row.default != "none"]
    found: dict[str, Any] = {row.theirs: row.default.replace("cifar10", dataset) for row in rows}
    found |= {"train.amp": True, "train.ema": True, "train.stage": word}
    if "model.num_classes" in found:
        found["model.num_classes"] = dataset.removeprefix("cifar")
    if kind == "lr_finder":
        kept = ("model.backbone", "model.num_classes", "dataset", "dataloaders.num_workers", "optimizer.name")
        found = {key: found[key] for key in kept if key in found}
        found |= {"dataloaders.train_batch_size": 200, "optimizer.params.lr": 0.001}
    return found


def _flat(tree: Any, before: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in cast("dict[Any, Any]", tree).items():
        found |= _flat(value, f"{before}{key}.") if isinstance(value, dict) else {f"{before}{key}": value}
    return {key: value for key, value in found.items() if value is not None}


def _check_stage(program: Program, path: str, entries: Mapping[str, Any]) -> None:
    """UserError with the line to type where a file is of another program."""
    if "model.top_k_checkoints" in entries:
        folder, best = entries.get("train.weights_dir", "weights/NAME"), entries["model.top_k_checkoints"]
        raise UserError(f"{path} is of swa.py: type `moco average {folder} --best {best} --out {folder}/swa`.")
    stage = entries.get("train.stage", "second")
    main = "pretrain" if stage == "first" else "lincls"
    if (program.main == "pretrain") != (main == "pretrain"):
        line = doors.beside(main, ["--compat", program.project, "--config_name", path])
        raise UserError(f"{path} is of the {stage} stage: type `{line}`.")


def _plain(program: Program, path: str, entries: Mapping[str, Any]) -> list[list[str]]:
    """The keys that are a flag each; what is no key of theirs is told."""
    words: list[list[str]] = []
    for key, value in entries.items():
        row = program.find(key)
        if row is None or (not row.here and not row.special and str(value) != row.default):
            why = f": {row.remark}" if row else ", as it has no counterpart here"
            tell(f"{path}: {key} is passed over{why}", error=True)
        elif row.here and not row.special:
            values = cast("list[Any]", value) if isinstance(value, list) else [value]
            words.append([row.here, *(str(x).lower() if row.here == "--opt" else str(x) for x in values)])
    absent = {"criterion.params.temperature": ["--temp", "0.07"],
              "criterion.params.smoothing": ["--label-smoothing", "0"]}  # fmt: skip
    return words + [own for key, own in absent.items() if program.find(key) and key not in entries]


def _of_images(path: str) -> list[list[str]]:
    name = os.path.basename(os.path.normpath(path))
    return [["--dataset", name], ["--download"], [path]] if name in DATASETS else [[path]]


def _of_network(program: Program, entries: Mapping[str, Any], another: bool) -> list[list[str]]:
    """``another``: another network is typed, which ImageNet's weights of the file's would not fit."""
    name = str(entries.get("model.backbone", program.default("model.backbone")))
    given = entries.get("model.ckpt_pretrained")
    words = [["--arch", name.replace("timm_", "timm/", 1)]]
    if not given and not another and not name.startswith("timm_"):
        given = "torchvision:IMAGENET1K_V1"  # what pretrained=True is
    return [*words, *([["--pretrained", str(given)]] if given else [])]


def _of_schedule(entries: Mapping[str, Any]) -> list[list[str]]:
    if entries.get("scheduler.name") == "ReduceLROnPlateau":
        return [["--plateau", str(entries.get("scheduler.params.patience", 10))]]
    least = str(entries.get("scheduler.params.eta_min", 0))
    return [["--cos"], ["--min-lr", least]] if "scheduler.name" in entries else []
