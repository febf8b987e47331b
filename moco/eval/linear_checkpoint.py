"""A probe's checkpoints: upstream's dictionary, the rates that one file holds, and going on from it."""

from __future__ import annotations

import glob
import os
from functools import partial
from typing import Any

from torch import Tensor

from moco import distributed, files, run_folder
from moco.errors import UserError
from moco.eval.classifier import Classifier, changed, check_state, fill, filling_optimizer
from moco.eval.linear import LinearClassifier, leader
from moco.models.encoder import head_of
from moco.train import checkpoint
from moco.train.checkpoint import prefixed
from moco.train.optimizer_state import finite, kept
from moco.train.plan import Progress, check_batches
from moco.train.saving import Saver
from moco.weights.settings import images_of

CHECKPOINT, BEST, RESULT = "checkpoint.pth.tar", "model_best.pth.tar", "result.json"
KEPT_PROBE = "checkpoint_lincls_{:04d}.pth.tar"  # of an epoch, counted from 0 as upstream's are
_ALL_KEPT = KEPT_PROBE.replace("{:04d}", "[0-9]*")
# see moco.train.checkpoint.reserve_run_folder
PROBE_FILES = (CHECKPOINT + run_folder.PREVIOUS, CHECKPOINT), (RESULT,), (BEST, _ALL_KEPT)


def save_probe(
    probe: Classifier, heads: list[LinearClassifier], saver: Saver, at: Progress, arch: str, run: dict[str, Any],
    keep_every: int = 0, new_best: LinearClassifier | None = None,
) -> None:  # fmt: skip
    """Write upstream's dictionary as ``checkpoint.pth.tar``, and as ``model_best.pth.tar`` if there is a ``new_best``;
    every ``keep_every`` epochs, if any, once more with its accuracy, without the other heads.

    Both are read by upstream's tools: ``state_dict`` is the network with one classifier, that of the leading head in
    the first file and that of the best so far in the second. With several heads the first file has one more entry,
    ``heads``: all that each of them needs to go on. The first file is written last: a run that was killed before goes
    on from the one that it replaces, and makes the others anew.

    Args:
        at: the position, also inside an epoch.
        run: what a resumed run needs besides, plain values.
    """
    saver.restart()
    distributed.by_main(partial(_save, probe, heads, saver, at, arch, run, keep_every, new_best))


def _save(
    probe: Classifier, heads: list[LinearClassifier], saver: Saver, at: Progress, arch: str, run: dict[str, Any],
    keep_every: int, new_best: LinearClassifier | None,
) -> None:  # fmt: skip
    head = leader(heads)
    state, acc1 = _state_of(probe, head, at, arch, run), None
    if keep_every and not at.batch:
        if at.epoch == 1:  # another run's would be averaged with this one's
            for path in glob.glob(os.path.join(glob.escape(saver.folder), _ALL_KEPT)):
                os.remove(path)
        if at.epoch % keep_every == 0 and head.score is not None:
            acc1 = head.score.acc1
    if len(heads) > 1:
        state["heads"] = [_entries(head) for head in heads]
    saver.write(state, partial(_write, saver, new_best is not None, acc1))


def _write(saver: Saver, best: bool, acc1: float | None, state: dict[str, Any]) -> None:
    """acc1: of the epoch, where its file is kept."""
    network = {name: value for name, value in state.items() if name != "heads"}
    if best:  # the best one leads, so the file differs by the other heads alone
        files.write(network, os.path.join(saver.folder, BEST))
    if acc1 is not None:
        name = KEPT_PROBE.format(state["epoch"] - 1)
        files.write({**network, "acc1": acc1}, os.path.join(saver.folder, name))
    checkpoint.save_one(state, os.path.join(saver.folder, CHECKPOINT), saver.own)


def _state_of(
    probe: Classifier, head: LinearClassifier, at: Progress, arch: str, run: dict[str, Any]
) -> dict[str, Any]:
    layer = {f"{head_of(probe.encoder)}.{name}": value for name, value in head.layer.state_dict().items()}
    network, images = probe.encoder.state_dict() | layer, images_of(probe.encoder, probe.mean, probe.std, run)
    return {
        "epoch": at.epoch,
        "arch": arch,
        "state_dict": prefixed(network),
        "best_acc1": head.best,
        "optimizer": kept(head.optimizer),
        "run": {**run, "lr": head.lr, "batch": at.batch, **images},
    }


def _entries(head: LinearClassifier) -> dict[str, Any]:
    return {
        "lr": head.lr,
        "layer": head.layer.state_dict(),
        "optimizer": kept(head.optimizer),
        "best_acc1": head.best,
        "diverged": head.diverged,
    }


def rates_of(state: dict) -> list[float]:
    """The base rates of a checkpoint's classifiers; empty where the file does not say them (upstream's)."""
    heads = state.get("heads")
    entries = heads if isinstance(heads, list) else [files.run_of(state)]
    return [entry["lr"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("lr"), float)]


def rates(state: dict, asked: list[float], epochs: int, training: bool) -> list[float]:
    """The base rates of a run: the file's where nothing is trained any more, which its result is then of.

    Args:
        asked: by --lr.
        epochs: after which the run ends.
        training: whether the program trains until then; a file of several rates is then compared with ``asked``.
    """
    held = rates_of(state)
    if training and (len(held) > 1 or len(asked) > 1 or state.get("epoch", 0) < epochs):
        return asked
    return held or asked


def load_probe(
    probe: Classifier, heads: list[LinearClassifier], state: dict, path: str, arch: str, weights: dict[str, Tensor],
    run: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Put a classifier's checkpoint, ours or upstream's, back.

    Args:
        weights: of ``--pretrained``, which the checkpoint's encoder must have; empty for any.
        run: what this run saves; None where nothing will be trained, so that an average (:mod:`moco.weights.average`),
            which has no optimizer, will do.

    Raises:
        UserError: another kind of file, other rates, another architecture or encoder, entries that do not fit, or
            other batches than those of the epoch inside which the file was written.
    """
    known = files.run_of(state)
    averaged = "averaged" in known
    if averaged and run is not None:
        raise UserError(f"{path} is an average, which no training goes on from: give it with --evaluate.")
    check_state(state, path, arch, *([] if averaged else ["optimizer"]))
    _check_rates(heads, state, path)
    fill(probe.encoder, state, path)
    with filling_optimizer(path):
        _load_heads(heads, state, path)
    if changed(probe.encoder, weights):
        raise UserError(f"{path} was trained on another encoder than --pretrained; leave one of the two out.")
    if run is not None and known.get("batch"):
        check_batches(path, state.get("epoch", 0), known.get("batches", {}), run.get("batches", {}))


def _check_rates(heads: list[LinearClassifier], state: dict, path: str) -> None:
    held, asked = rates_of(state), [head.lr for head in heads]
    if len(held) < 2 and len(asked) > 1:
        raise UserError(f"{path} holds one classifier; resume it with one --lr, or start the others in a new run.")
    if len(held) > 1 and sorted(held) != sorted(asked):
        typed = " ".join(f"{lr:.12g}" for lr in held)
        raise UserError(f"{path} was trained with --lr {typed}; resume it with the same rates.")


def _load_heads(heads: list[LinearClassifier], state: dict, path: str) -> None:
    """A single head's layer is the encoder's own, which is already loaded."""
    if len(heads) == 1:
        if "optimizer" in state:
            heads[0].optimizer.load_state_dict(finite(state["optimizer"]))
        heads[0].best = float(state["best_acc1"])
        return
    by_rate = {entries["lr"]: entries for entries in state["heads"]}
    for head in heads:
        entries = by_rate[head.lr]
        if not entries["diverged"]:  # the weights of one that has, which is trained no more, may be anything
            files.refuse_odd(entries["layer"], path)
        head.layer.load_state_dict(entries["layer"])
        head.optimizer.load_state_dict(entries["optimizer"] if entries["diverged"] else finite(entries["optimizer"]))
        head.best, head.diverged = float(entries["best_acc1"]), bool(entries["diverged"])
