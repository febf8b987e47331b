"""Average the weights of several checkpoints (SWA): python -m moco.average FILE... | FOLDER --last N | --best N.

Stochastic weight averaging, arXiv 1803.05407: the mean of every weight, after which BatchNorm's running statistics
belong to no network any more and are measured anew on training images.
"""

from __future__ import annotations

import os
import re
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from moco import data, files, schema
from moco.errors import UserError, tell
from moco.files import run_of
from moco.models.encoder import backbone_keys
from moco.models.inputs import normalise
from moco.weights.changes import describe_changes, recorded_changes
from moco.weights.layouts import file_of
from moco.weights.origin import pretraining_of
from moco.weights.read import Backbone, differing, fill_backbone, open_backbone
from moco.weights.settings import Settled, settle_from_file

_CHECKPOINTS = re.compile(r"checkpoint_((?:semisup|lincls)_)?\d{4,}\.pth\.tar$")  # of ends of epochs, of each main
_MIXED = {  # traits that differ, each with a file that has it
    "arch": "{first} says that it is of -a {one!r} and {second} of -a {other!r}: average checkpoints of one network.",
    "lr": "{first} leads with the classifier of --lr {one} and {second} with that of --lr {other}: average "
    "checkpoints of one --lr.",
    "classes": "the outputs of {first} and of {second} are other classes: average checkpoints of one run.",
    "changes": "{first} is of an encoder with {one} and {second} of one with {other}: average checkpoints of one "
    "encoder.",
}
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
    paths = [os.path.join(folder, name) for name in sorted(found)]
    count = last or best or len(paths)
    if best:
        known = _logged(folder)
        scored = sorted((score, path) for path in paths if (score := _score(path, known)) is not None)
        paths = sorted(path for _, path in scored[-count:])
    if not paths or len(paths) < count:
        kind = "with a known accuracy " if best else ""
        raise UserError(f"{folder} holds {len(paths)} checkpoints of epochs {kind}and {count} are asked for: lower it.")
    return paths[-count:]


def _logged(folder: str) -> dict[int, float]:
    """k-NN accuracies of a pretraining's log, by finished epochs."""
    found = {}
    for record in files.records(os.path.join(folder, "log.jsonl")):
        epochs, knn = record.get("finished_epochs", record.get("epoch")), record.get("knn")  # older versions have epoch
        if isinstance(epochs, int) and isinstance(knn, (int, float)):
            found[epochs] = float(knn)
    return found


def _read(path: str) -> dict[str, Any]:
    state = files.read(path)
    if wrong := schema.not_gone_on(state):
        raise UserError(f"{path} {wrong}.")
    return state


def _score(path: str, logged: dict[int, float]) -> float | None:
    state = _read(path)
    return float(state["acc1"]) if "acc1" in state else logged.get(state.get("epoch", -1))


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
    traits, stale = [], False
    for path in paths:
        state = _read(path)
        before, weights = weights, _weights(state, path)
        traits.append(_traits(state))
        sums = sums or {name: torch.zeros_like(value, dtype=torch.float64) for name, value in weights.items()}
        if odd := differing(sums, weights):
            raise UserError(
                f"{path} is of another network than {paths[0]}: {odd[0]} differs ({len(odd)} entries do); give those "
                "of one network."
            )
        for name, value in weights.items():
            sums[name] += value
        measured = (name for name in before if name.endswith(("running_mean", "running_var")))
        stale = stale or any(not torch.equal(before[name], weights[name]) for name in measured)
    for name, sentence in _MIXED.items():
        kinds = {found[name]: path for found, path in zip(traits, paths, strict=True) if found[name] != ()}
        if len(kinds) > 1:
            (one, first), (other, second) = list(kinds.items())[:2]
            raise UserError(sentence.format(one=one, first=first, other=other, second=second))
    mean = {n: (sums[n] / len(paths)).to(v.dtype) if v.is_floating_point() else v for n, v in weights.items()}
    return _packed(mean, state, paths), stale


def _traits(state: dict) -> dict[str, Any]:
    """What files that are averaged have in common."""
    run = run_of(state)
    changes = describe_changes(recorded_changes(state) or {}) or "no change"
    arch = () if state.get("arch") is None else state["arch"]
    return {"arch": arch, "lr": run.get("lr"), "classes": tuple(run.get("classes") or ()), "changes": changes}


def _packed(mean: dict[str, Tensor], last: dict, paths: list[str]) -> dict[str, Any]:
    """A checkpoint of the mean with the last file's other entries."""
    kept = {name: last[name] for name in ("epoch", "arch", "best_acc1") if name in last}
    run = {name: value for name, value in run_of(last).items() if name in ("lr", "classes", "images", "pretraining")}
    changes = recorded_changes(last)
    run |= {} if changes is None else {"changes": changes}
    if made := pretraining_of(file_of(paths[-1], last), {}).value:
        run.setdefault("pretraining", made)
    return {**kept, "state_dict": mean, "run": {**run, "averaged": [os.path.basename(path) for path in paths]}}


def _weights(state: dict, path: str) -> dict[str, Tensor]:
    found = state.get("state_dict")
    if not isinstance(found, dict):
        raise UserError(
            f"{path} is no checkpoint of this project: it has no state_dict; give one that a run has saved."
        )
    chosen = ({name: value for name, value in found.items() if name.startswith(prefix)} for prefix in _PREFIXES)
    weights = next(filter(None, chosen), found)
    files.refuse_odd(weights, path)
    return weights


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
    own = {"channels": like.channels, "levels": args.levels}
    source = data.open_sources(dataset, args.data, download=args.download, **own).pretrain
    mean, std = settled.statistics(like.channels, like.size)
    aug = args.aug or known.get("aug") or ("v2" if known.get("aug_plus") else None)
    preset = data.get_preset(aug) if aug else data.probe_preset(data.dataset_of(dataset).mirrored)
    batch = min(args.batch_size, len(source))
    sampler = data.EpochSampler(len(source), batch, seed=0)  # a short last batch would weigh as much as the others
    loader = data.make_loader(data.TwoViews(source, preset, like.size, seed=0), sampler, args.workers)
    images = f"{len(sampler) * batch} images of {source.name}, augmentation {aug or 'crop and flip'}"
    summary = f"BatchNorm statistics recomputed on {images}{settled.summary}"
    return (normalise(found["q"], mean, std) for found in loader), summary


def run_average(args: Namespace) -> None:
    paths = args.checkpoints
    folder = paths[0] if len(paths) == 1 and os.path.isdir(paths[0]) else ""
    if folder:
        paths = choose_checkpoints(folder, args.last, args.best)
    state, stale = average(paths)
    summary = "no BatchNorm statistics to recompute"
    if not stale and any(name.endswith("running_mean") for name in state["state_dict"]):
        summary = "BatchNorm statistics are equal in all files"
    elif stale and args.refresh:
        if args.data is None and args.dataset is None:
            raise UserError("BatchNorm's statistics must be recomputed: give training images by --data or "
                            "--dataset, or --no-refresh to keep the mean of the old ones.")  # fmt: skip
        settled = settle_from_file(args, paths[-1])
        like = open_backbone(paths[-1], args.arch, args.stem, args.size)
        batches, summary = _batches(args, like, settled)
        refresh(state["state_dict"], like, batches, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    elif stale:
        summary = "BatchNorm's statistics are the mean of the old ones, which fit no network"
    out = args.out or os.path.join(folder or os.path.dirname(paths[-1]), "averaged.pth.tar")
    files.write(state, out, "--out")
    tell(f"averaged {len(paths)} checkpoints: {' '.join(os.path.basename(path) for path in paths)}")
    tell(summary)
    tell(f"wrote {out}")
