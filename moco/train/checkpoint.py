"""Checkpoints that survive a kill at any instant and hold all that a resumed run needs.

A file has upstream's keys (``epoch``, ``arch``, ``state_dict`` with ``module.`` names, ``optimizer``) and two more:
``scaler`` and ``run`` (step, batches done in the epoch, seed and the like, plain numbers and strings). ``epoch`` counts
finished epochs, as upstream's does. Every file can be read with ``weights_only=True``.
"""

from __future__ import annotations

import contextlib
import glob
import math
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco import distributed, files
from moco.errors import UserError, one_line
from moco.files import can_be_read, refuse_odd, run_of, write, write_text
from moco.models.key_queue import EMPTY
from moco.run_folder import POINTER, PREVIOUS, runs_checkpoints
from moco.train.optimizer_state import finite, kept

# ------------------------------------------------------------------------------------------- a run's folder


def save(state: dict, folder: str, keep: int | None, own: set[str] | None = None, named: bool = True) -> str:
    """Write a run's checkpoint, point ``latest`` at it, then prune; returns the path.

    At an epoch's end the name is upstream's, ``checkpoint_%04d.pth.tar`` with the epoch's number counted from 0; inside
    an epoch ``_step_%08d`` is added. Pruning, unless ``keep`` is None: files from inside an epoch go as soon as a newer
    checkpoint is safe; of the others the newest ``keep`` that can be read stay (0: all). What lies ahead of this one
    neither counts nor goes: it is damaged, or of a course that the run has left.

    named: an epoch's end has its own name, and not that of a file inside the next epoch, with nothing done of it.
    own: names of the files that this process has written, which need not be read to be known as good.
    """
    done, run = state["epoch"], state["run"]
    name = f"checkpoint_{done - 1:04d}.pth.tar"
    if run["batch"] or not named:
        name = f"checkpoint_{done:04d}_step_{run['step']:08d}.pth.tar"
    path = os.path.join(folder, name)
    write(state, path)
    if not os.path.isdir(pointer := os.path.join(folder, POINTER)):  # which is only for people
        write_text(name + "\n", pointer)
    own = set() if own is None else own
    own.add(name)
    if keep is not None:
        _prune(folder, keep, name, own)
    return path


def _prune(folder: str, keep: int, newest: str, own: set[str]) -> None:
    names = runs_checkpoints(folder)
    names = names[: names.index(newest)][::-1]  # newest first
    gone = [name for name in names if "_step_" in name]
    spare = keep - ("_step_" not in newest)
    for name in names if keep else ():
        if "_step_" in name:
            continue
        if spare <= 0:
            gone.append(name)
        elif name in own or can_be_read(os.path.join(folder, name)):
            own.add(name)
            spare -= 1
    for name in gone:
        os.remove(os.path.join(folder, name))


def save_one(state: dict, path: str, own: set[str]) -> None:
    """Write the checkpoint of a run that has one. The one before it, if it can be read, stays as ``PATH.previous``, as
    this one may be damaged later; a file system without links keeps none. ``own``: see :func:`save`."""
    beside, linked = path + PREVIOUS + ".tmp", False
    if path in own or can_be_read(path):
        with contextlib.suppress(OSError):
            with contextlib.suppress(FileNotFoundError):
                os.remove(beside)
            os.link(path, beside)
            linked = True
    try:
        files.write(state, path)
        own.add(path)
        with contextlib.suppress(OSError):  # the new one is in place
            if linked:
                files.replace(beside, path + PREVIOUS)
    finally:
        with contextlib.suppress(OSError):  # of a full disk
            os.remove(beside)


def reserve_run_folder(
    folder: str, resumed: str | None, overwrite: bool, files: Sequence[str] | None = None, results: Sequence[str] = (),
    more: Sequence[str] = (),
) -> None:  # fmt: skip
    """Make a run's folder, on one process of a node first; refuse one that holds another run's files unless that run
    goes on.

    Args:
        resumed: the checkpoint that this run continues; one from elsewhere does not make this folder its run's.
        overwrite: remove the other run's files instead.
        files: patterns of the checkpoints that make the folder a run's; None for pretraining's.
        results: patterns of what a finished run leaves under a name that other programs use too.
        more: patterns of what else ``overwrite`` removes.

    Raises:
        UserError: the folder cannot be made, or this run would write over another one.
    """

    def reserve() -> None:
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError(f"--save-dir {folder} cannot be made: {error.strerror}; choose another folder.") from error
        names = runs_checkpoints(folder) if files is None else _matching(folder, files)
        ended = _matching(folder, results)
        if not (names or ended) or (resumed and os.path.samefile(os.path.dirname(resumed) or ".", folder)):
            return
        if not overwrite:
            go_on = "continue it with --resume auto, " if names else ""
            raise UserError(
                f"{folder} already holds {(names or ended)[-1]} of another run; {go_on}choose another --save-dir, or "
                "start afresh with --overwrite."
            )
        for name in (*names, *ended, *_matching(folder, more)):
            with contextlib.suppress(FileNotFoundError):  # another node may do this at the same time
                os.remove(os.path.join(folder, name))

    distributed.first_on_node(reserve, wait=True)


def _matching(folder: str, patterns: Sequence[str]) -> list[str]:
    return [name for pattern in patterns for name in sorted(glob.glob(pattern, root_dir=folder))]


# ------------------------------------------------------------------------------------------ a training state


def prefixed(entries: dict[str, Any]) -> dict[str, Any]:
    """The same under upstream's names, which are DataParallel's."""
    return {"module." + name: value for name, value in entries.items()}


def pack(model: Any, optimizer: Any, scaler: Any, arch: str, epoch: int, run: dict) -> dict:
    """A training state as a dictionary with upstream's keys."""
    return {
        "epoch": epoch,
        "arch": arch,
        "state_dict": prefixed(model.state_dict()),
        "optimizer": kept(optimizer),
        "scaler": scaler.state_dict(),
        "run": run,
    }


def unpack(state: dict, path: str, model: Any, optimizer: Any, scaler: Any, arch: str) -> dict:
    """Put a checkpoint of ours, MoCo's or SynCo's into the model, optimizer and scaler; returns its ``run`` part.

    Raises:
        UserError: another architecture, or entries that are missing, unknown, of another shape or odd
            (:func:`odd_tensors`); nothing is loaded in part.
    """
    if not isinstance(state.get("state_dict"), dict) or "optimizer" not in state:
        raise UserError(
            f"{path} cannot be resumed: it lacks state_dict or optimizer, as published weights do; to begin "
            "with its encoder give it by --pretrained in the place of --resume, to evaluate it too (main_lincls.py, "
            "main_semisup.py)."
        )
    if state.get("arch") not in (None, arch):
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}: give both the same.")
    found = {str(name).removeprefix("module."): value for name, value in state["state_dict"].items()}
    own = model.state_dict()
    if "queue" in found and "queue_ids" not in found:
        found["queue"] = _upstreams_queue(found["queue"], own["queue"])
        found["queue_ids"] = own["queue_ids"]  # upstream has none: nothing is masked until rows are replaced
    _same_entries(found, own, path)
    refuse_odd(found, path, own)
    _same_kinds(found, own, path)
    try:
        optimizer.load_state_dict(finite(state["optimizer"]))
        if state.get("scaler"):  # empty when the run so far did not scale its loss
            scaler.load_state_dict(state["scaler"])
        model.load_state_dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this run's optimizer: {one_line(error)}") from error
    return {"epoch": int(state.get("epoch", 0)), **run_of(state)}


def _upstreams_queue(queue: Tensor, own: Tensor) -> Tensor:
    """(K, C) unit rows from MoCo's (C, K), or from SynCo's (K, C) whose first rows are not of unit length."""
    queue = queue.T if is_mocos(queue, own.shape[1]) else queue
    if queue.shape != own.shape:
        return queue
    return torch.where(_unit(queue, 1)[:, None], queue, F.normalize(queue, dim=1))


def is_mocos(queue: Tensor, C: int | None) -> bool:
    """Whether another project's queue is MoCo's (C, K), not SynCo's (K, C). Where K equals C the lengths tell: MoCo's
    columns are of unit length, SynCo's rows as soon as keys have taken the place of its first ones."""
    if queue.ndim != 2 or queue.shape[0] != queue.shape[1]:
        return queue.shape[0] == C
    return bool(_unit(queue, 0).all()) and not bool(_unit(queue, 1).all())


def _unit(queue: Tensor, dim: int) -> Tensor:
    return (queue.float().norm(dim=dim) - 1).abs() < 1e-3


def square_queue(state: dict) -> str:
    """How another project's queue with K equal to C is read, a sentence; empty where the shape says it."""
    entries = state["state_dict"] if isinstance(state.get("state_dict"), dict) else {}
    queue = entries.get("module.queue")
    if queue is None or "module.queue_ids" in entries or len(set(queue.shape)) > 1:
        return ""
    whose = "MoCo's, (C, K): its columns" if is_mocos(queue, None) else "SynCo's, (K, C): its rows, not its columns,"
    return f"K equals C, so the shape of the queue does not say whose it is; taken as {whose} are of unit length"


def _same_entries(found: dict, own: dict, path: str) -> None:
    missing = [name for name in own if name not in found]
    unknown = [name for name in found if name not in own]
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has {unknown[0]}, which this run does not know"
        count = len(missing) + len(unknown)
        raise UserError(f"{path} {what} ({count} entries differ); check -a, --mlp, --stem, --method and --ema.")
    for name, value in own.items():
        if not isinstance(found[name], Tensor) or found[name].layout != value.layout:
            raise UserError(f"{path}: {name} is no plain tensor; take another checkpoint of that run.")
        if found[name].shape != value.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, this run needs {tuple(value.shape)}; check "
                "--moco-k, --moco-dim, --mlp and --stem."
            )


def _same_kinds(found: dict, own: dict, path: str) -> None:
    for name, value in own.items():
        if found[name].dtype != value.dtype or (not value.is_floating_point() and not _counts(found, name)):
            raise UserError(f"{path}: {name} holds other numbers than {value.dtype} of a run; take another checkpoint.")


def _counts(found: dict, name: str) -> bool:
    """Whether whole numbers lie in their range: a queue's pointer in its rows, and none below that of an empty row."""
    value = found[name]
    most = len(found["queue"]) if name == "queue_ptr" else math.inf
    least = EMPTY if name in ("queue_ids", "queue_labels") else 0
    return not value.numel() or (int(value.min()) >= least and int(value.max()) < most)
