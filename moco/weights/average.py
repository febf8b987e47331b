"""Average the weights of several checkpoints (SWA): python -m moco.average FILE... | FOLDER --last N | --best N.

Stochastic weight averaging, arXiv 1803.05407: the mean of every weight, after which BatchNorm's running statistics
belong to no network any more and are measured anew on training images.
"""

from __future__ import annotations

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from moco import data, files
from moco.errors import UserError
from moco.models.encoder import backbone_keys
from moco.models.inputs import normalise
from moco.weights.read import (
    Backbone,
    describe_changes,
    fill_backbone,
    open_backbone,
    recorded_changes,
    settle_from_file,
)
from moco.weights.settings import Settled

_CHECKPOINTS = re.compile(r"checkpoint_((?:semisup|lincls)_)?\d{4,}\.pth\.tar$")  # of ends of epochs, of each main
_PREFIXES = ("module.encoder_ema.", "module.encoder_q.")  # of a pretraining, the first that is there


# ------------------------------------------------------------------------------------------------ which files


def choose_checkpoints(folder: str, last: int | None, best: int | None) -> list[str]:
    """Paths of a run's ``last`` checkpoints, or of its ``best`` by accuracy, oldest first.

    A fine-tuning's and a probe's files hold their own accuracy; of a pretraining's log it is the k-NN accuracy.

    Raises:
        UserError: the folder has fewer of them, or those of several programs.
    """
    found = {name: match.group(1) for name in os.listdir(folder) if (match := _CHECKPOINTS.match(name))}
    if len(set(found.values())) > 1:
        raise UserError(f"{folder} holds checkpoints of several programs: name those to average.")
    names = sorted(found)
    paths = [os.path.join(folder, name) for name in names]
    count = last or best or len(paths)
    if best:
        known = _logged(folder)
        scores = {path: _score(path, known) for path in paths}
        ranked = sorted((path for path in paths if scores[path] is not None), key=lambda path: scores[path] or 0.0)
        paths = sorted(ranked[-count:])
    if not paths or len(paths) < count:
        kind = "with a known accuracy " if best else ""
        raise UserError(f"{folder} holds {len(paths)} checkpoints of epochs {kind}and {count} are asked for: lower it.")
    return paths[-count:]


def _logged(folder: str) -> dict[int, float]:
    """k-NN accuracies of a pretraining's log, by finished epochs."""
    try:
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
    except (OSError, ValueError):
        return {}
    measured = [record for record in records if record.get("knn") is not None]
    # logs of older versions have finished epochs under "epoch"
    return {record.get("finished_epochs", record["epoch"]): record["knn"] for record in measured}


def _score(path: str, logged: dict[int, float]) -> float | None:
    state = files.read(path)
    return state.get("acc1", logged.get(state.get("epoch", -1)))


# --------------------------------------------------------------------------------------------------- averaging


def average(paths: list[str]) -> tuple[dict[str, Any], bool]:
    """A checkpoint whose weights are the mean of those at ``paths``, computed in float64; whether its BatchNorm's
    statistics fit no network, because the files' differ.

    Of a pretraining's files only the query encoder is kept, or its moving average: the mean of two queues is no queue.
    Numbers that are no weights (BatchNorm's counters, the epoch) are the last file's.

    Raises:
        UserError: fewer than two files, a file without weights or with odd ones, or one whose weights have other names
            or shapes, or are of an encoder with other changes, or of a classifier that another rate trained or whose
            outputs are other classes.
    """
    if len(paths) < 2:
        raise UserError("an average needs two checkpoints or more: name them, or a folder with --last N or --best N.")
    sums: dict[str, Tensor] = {}
    state: dict[str, Any] = {}
    weights: dict[str, Tensor] = {}
    statistics: list[Tensor] = []
    rates, changes, classes = {}, {}, {}
    stale = False
    for path in paths:
        state = files.read(path)
        before, weights = statistics, _weights(state, path)
        statistics = [value for name, value in weights.items() if name.endswith(("running_mean", "running_var"))]
        rates[_run_of(state).get("lr")] = path
        classes.update({tuple(names): path for names in [_run_of(state).get("classes")] if names})
        changes[describe_changes(recorded_changes(state) or {}) or "no change"] = path
        sums = sums or {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights.items()}
        odd = [n for n in {**sums, **weights} if n not in sums or n not in weights or sums[n].shape != weights[n].shape]
        if odd:
            raise UserError(f"{path} is of another network than {paths[0]}: {odd[0]} differs ({len(odd)} entries do).")
        for name, value in weights.items():
            sums[name] += value
        stale = stale or any(not torch.equal(*pair) for pair in zip(before, statistics, strict=False))
    if len(rates) > 1:
        first, other = list(rates.items())[:2]
        raise UserError(f"{first[1]} leads with the classifier of --lr {first[0]} and {other[1]} with that of --lr "
                        f"{other[0]}: average checkpoints of one --lr.")  # fmt: skip
    if len(classes) > 1:
        first, other = list(classes.values())[:2]
        raise UserError(f"the outputs of {first} and of {other} are other classes: average checkpoints of one run.")
    if len(changes) > 1:
        first, other = list(changes.items())[:2]
        raise UserError(f"{first[1]} is of an encoder with {first[0]} and {other[1]} of one with {other[0]}: average "
                        "checkpoints of one encoder.")  # fmt: skip
    mean = {n: (sums[n] / len(paths)).to(v.dtype) if v.is_floating_point() else v for n, v in weights.items()}
    kept = {name: state[name] for name in ("epoch", "arch", "best_acc1") if name in state}
    run = {name: value for name, value in _run_of(state).items() if name in ("lr", "classes", "images")}
    kept_changes = recorded_changes(state)
    run |= {} if kept_changes is None else {"changes": kept_changes}
    run["averaged"] = [os.path.basename(path) for path in paths]
    return {**kept, "state_dict": mean, "run": run}, stale


def _run_of(state: dict) -> dict[str, Any]:
    run = state.get("run")
    return run if isinstance(run, dict) else {}


def _weights(state: dict, path: str) -> dict[str, Tensor]:
    found = state.get("state_dict")
    if not isinstance(found, dict):
        raise UserError(f"{path} is no checkpoint of this project: it has no state_dict.")
    chosen = ({name: value for name, value in found.items() if name.startswith(prefix)} for prefix in _PREFIXES)
    weights = next(filter(None, chosen), found)
    files.refuse_odd(weights, path)
    return weights


def has_running_statistics(weights: dict[str, Tensor]) -> bool:
    """Whether there are running statistics to measure anew."""
    return any(name.endswith("running_mean") for name in weights)


def refresh(weights: dict[str, Tensor], like: Backbone, batches: Iterator[Tensor], device: torch.device) -> None:
    """Measure BatchNorm's running statistics anew, in place: the mean over all batches, as torch's update_bn has it.

    Args:
        weights: of :func:`average`.
        like: an encoder of their shape.
        batches: (N, channels, h, w) normalised training images.
        device: where to compute.
    """
    prefix = next((known for known in _PREFIXES if all(name.startswith(known) for name in weights)), "module.")
    own = {name.removeprefix(prefix): value for name, value in weights.items()}
    keys = backbone_keys(like.encoder)
    fill_backbone(like.encoder, {name: value for name, value in own.items() if name in keys})
    encoder: nn.Module = like.encoder.to(device)
    with torch.no_grad():
        update_bn(batches, encoder, device)
    for name, value in encoder.state_dict().items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            weights[prefix + name] = value.cpu()


# ------------------------------------------------------------------------------------------------- the command


def _batches(args: Namespace, like: Backbone, settled: Settled) -> tuple[Iterator[Tensor], str]:
    """Normalised views of the training images, and words on them."""
    known = like.file.settings
    dataset = args.dataset or known.get("dataset")
    sources = data.open_sources(dataset, args.data, channels=like.channels, download=args.download)
    source = sources.pretrain
    mean, std = settled.statistics(like.channels, like.size)
    aug = args.aug or known.get("aug") or ("v2" if known.get("aug_plus") else None)
    preset = data.get_preset(aug) if aug else data.probe_preset(data.dataset_of(dataset).mirrored)
    batch = min(args.batch_size, len(source))
    sampler = data.EpochSampler(len(source), batch, seed=0)  # a short last batch would weigh as much as the others
    loader = data.make_loader(data.TwoViews(source, preset, like.size, seed=0), sampler, args.workers)
    images = len(sampler) * batch
    summary = f"BatchNorm measured anew on {images} images of {source.name}, views {aug or 'crop and flip'}"
    summary += settled.summary
    return (normalise(found["q"], mean, std) for found in loader), summary


def run_average(args: Namespace) -> None:
    paths = args.checkpoints
    folder = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else ""
    if folder:
        paths = choose_checkpoints(folder, args.last, args.best)
    state, stale = average(paths)
    summary = "no BatchNorm to measure anew"
    if not stale and has_running_statistics(state["state_dict"]):
        summary = "BatchNorm's statistics are those of every file"
    elif stale and args.refresh:
        if args.data is None and args.dataset is None:
            raise UserError("BatchNorm's statistics are to be measured anew: give training images by --data or "
                            "--dataset, or --no-refresh to keep the mean of the old ones.")  # fmt: skip
        settled = settle_from_file(args, paths[-1])
        like = open_backbone(paths[-1], args.arch, args.stem, args.size)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        batches, summary = _batches(args, like, settled)
        refresh(state["state_dict"], like, batches, device)
    elif stale:
        summary = "BatchNorm's statistics are the mean of the old ones, which fit no network"
    out = args.out or os.path.join(folder or os.path.dirname(paths[-1]), "averaged.pth.tar")
    files.write(state, out, "--out")
    print(f"averaged {len(paths)} checkpoints: {' '.join(os.path.basename(path) for path in paths)}")
    print(summary)
    print(f"wrote {out}")
