"""Checkpoints that survive a kill at any instant and hold all that a resumed run needs.

A file has upstream's keys (``epoch``, ``arch``, ``state_dict`` with ``module.`` names, ``optimizer``) and two more:
``scaler`` and ``run`` (step, batches done in the epoch, seed and the like, plain numbers and strings). ``epoch`` counts
finished epochs, as upstream's does. Every file can be read with ``weights_only=True``.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import glob
import os
import pickle
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moco.errors import UserError

POINTER = "latest"
# Containers of plain values in other projects' files (SupContrast's flags, Lightning's hyper-parameters), none of which
# runs code when it is filled; Lightning's dictionary becomes a plain one, so that Lightning is not needed.
_CONTAINERS = [
    argparse.Namespace,
    *((dict, f"{name}.AttributeDict") for name in (
        "lightning_fabric.utilities.data", "lightning.fabric.utilities.data", "pytorch_lightning.utilities.parsing",
        "lightning.pytorch.utilities.parsing",
    )),
]  # fmt: skip
_NAME = re.compile(r"checkpoint_(\d{4,})(?:_step_(\d+))?\.pth\.tar$")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# of the entries of a network, those that must be floats
_WEIGHT = re.compile(r"(weight|bias|running_mean|running_var|_token|pos_embed|pos_embedding)$")


# ------------------------------------------------------------------------------------------------- one file


def read(path: str) -> dict:
    """The dictionary in a checkpoint file, tensors on the CPU.

    Raises:
        UserError: no such file, damaged, not a checkpoint, or more than weights (arbitrary code is never run).
    """
    if not os.path.isfile(path):
        raise UserError(f"no checkpoint at {path}.")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_CONTAINERS):
            warnings.simplefilter("ignore")  # a foreign file's oddities are reported below, in one sentence
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        if error.errno == errno.EINVAL:  # torch seeks before the start of a file that is cut very short
            raise UserError(f"{path} {_why_unreadable(error)}") from error
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path} {_why_unreadable(error)}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint dictionary.")
    return state


def _why_unreadable(error: Exception) -> str:
    text = str(error)
    found = re.search(r"(?i)unsupported (?:global: )?(?:global|class) ([\w.]+)", text)
    if isinstance(error, pickle.UnpicklingError) and found:
        return (
            f"needs {found.group(1)} to be loaded, which is more than weights; refused. If you trust the file, re-save "
            "its tensors alone, or allow the name with torch.serialization.add_safe_globals."
        )
    return "is no readable checkpoint: truncated, damaged or another kind of file."


def write(state: dict, path: str) -> None:
    """Write beside, flush to the disk, then replace: a kill at any instant leaves the old file or the new one.

    Raises:
        UserError: the disk is full or the folder cannot be written; an older file of that name is untouched.
    """
    folder = os.path.dirname(path) or "."
    beside = path + ".tmp"
    try:
        os.makedirs(folder, exist_ok=True)
        with open(beside, "wb") as file:
            torch.save(_of_own_size(state), file)
            file.flush()
            os.fsync(file.fileno())
        _replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise _unwritten(path, error) from error


def _of_own_size(value: Any) -> Any:
    """The same, where a view of a larger memory is a tensor of its own: torch would write the whole memory."""
    if isinstance(value, Tensor):
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if type(value) is dict:
        return {name: _of_own_size(item) for name, item in value.items()}
    return type(value)(map(_of_own_size, value)) if type(value) in (list, tuple) else value


def _unwritten(path: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(f"{path} cannot be written ({reason}); make room or choose another --save-dir.")


def write_text(text: str, path: str) -> None:
    """The same care for a small text file."""
    beside = path + ".tmp"
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _replace(beside, path)


def _replace(beside: str, path: str) -> None:
    os.replace(beside, path)
    handle = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(handle)  # the new name itself must reach the disk
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------ tensors that nothing computes with


def odd_tensors(tensors: dict[str, Tensor], like: dict[str, Tensor] | None = None) -> dict[str, str]:
    """What those tensors hold that no network can compute with, by name; empty for sound ones.

    Args:
        like: the network's own entries, which tell weights from counters; by default a weight is known by its name.
    """
    found = {}
    for name, value in tensors.items():
        weight = like[name].is_floating_point() if like and name in like else bool(_WEIGHT.search(name))
        if words := _oddity(name, value, weight):
            found[name] = words
    return found


def _oddity(name: str, value: Tensor, weight: bool) -> str:
    if value.dtype not in _FLOATS or value.layout != torch.strided:
        kind = str(value.dtype).removeprefix("torch.") if value.layout == torch.strided else "sparse"
        return f"{kind} numbers" if weight else ""
    if not torch.isfinite(value.float()).all():  # as float32, in which it will be computed with
        return "NaN or infinity"
    return "a negative variance" if name.endswith("running_var") and bool((value < 0).any()) else ""


def refuse_odd(tensors: dict[str, Tensor], path: str, like: dict[str, Tensor] | None = None) -> None:
    """UserError if a file has :func:`odd_tensors`: any number from them would be meaningless."""
    if odd := odd_tensors(tensors, like):
        first, words = next(iter(odd.items()))
        more = f" ({len(odd)} such tensors)" if len(odd) > 1 else ""
        raise UserError(f"{path} cannot be used: {first} holds {words}{more}; take another checkpoint of that run "
                        "(python -m moco.describe lists what is odd).")  # fmt: skip


# ------------------------------------------------------------------------------------------- a run's folder


def save(state: dict, folder: str, keep: int) -> str:
    """Write a run's checkpoint, point ``latest`` at it, then prune; returns the path.

    At an epoch's end the name is upstream's, ``checkpoint_%04d.pth.tar`` with the epoch's number counted from 0; inside
    an epoch ``_step_%08d`` is added. Pruning: files from inside an epoch go as soon as a newer checkpoint is safe; of
    the others the newest ``keep`` stay (0: all).
    """
    done, run = state["epoch"], state["run"]
    name = f"checkpoint_{done - 1:04d}.pth.tar"
    if run["batch"]:
        name = f"checkpoint_{done:04d}_step_{run['step']:08d}.pth.tar"
    path = os.path.join(folder, name)
    write(state, path)
    pointer = os.path.join(folder, POINTER)
    try:
        write_text(name + "\n", pointer)
    except OSError as error:
        raise _unwritten(pointer, error) from error
    _prune(folder, keep, name)
    return path


def _position(name: str) -> tuple[int, int] | None:
    """(finished epochs, steps of the file's name): orders a folder's checkpoints by progress."""
    match = _NAME.match(name)
    if not match:
        return None
    epoch, step = int(match.group(1)), match.group(2)
    return (epoch + 1, 0) if step is None else (epoch, int(step))


def runs_checkpoints(folder: str) -> list[str]:
    """Names of the checkpoints in a run's folder, oldest first."""
    if not os.path.isdir(folder):
        return []
    return sorted((n for n in os.listdir(folder) if _position(n)), key=lambda n: _position(n) or (0, 0))


def _prune(folder: str, keep: int, newest: str) -> None:
    names = [n for n in runs_checkpoints(folder) if n != newest]
    inside = [n for n in names if "_step_" in n]
    ends = [n for n in names if "_step_" not in n]
    spare = keep - ("_step_" not in newest)
    old = ends[: max(0, len(ends) - spare)] if keep else []
    for name in inside + old:
        os.remove(os.path.join(folder, name))


def newest(folder: str) -> str | None:
    """The checkpoint that ``latest`` names, else the one with most progress, else None."""
    with contextlib.suppress(OSError), open(os.path.join(folder, POINTER), encoding="utf-8") as file:
        path = os.path.join(folder, os.path.basename(file.read().strip()))
        if os.path.isfile(path):
            return path
    names = runs_checkpoints(folder)
    return os.path.join(folder, names[-1]) if names else None


def written(folder: str) -> dict[str, int]:
    """Paths of the checkpoints in a run's folder, oldest first, and when each was written (ns)."""
    paths = (os.path.join(folder, name) for name in runs_checkpoints(folder))
    return {path: os.stat(path).st_mtime_ns for path in paths}


def newest_good(folder: str, before: dict[str, int]) -> str | None:
    """The newest checkpoint that can be read, of those written since ``before`` (:func:`written`), else None."""
    for path, when in reversed(written(folder).items()):
        if before.get(path) != when:
            with contextlib.suppress(UserError):
                read(path)
                return path
    return None


def resolve(resume: str, folder: str) -> str | None:
    """The file that ``--resume`` means: None for a fresh start (nothing given, or ``auto`` and nothing there)."""
    return newest(folder) if resume == "auto" else resume or None


def claim(
    folder: str, resumed: str | None, overwrite: bool, files: Sequence[str] | None = None, results: Sequence[str] = (),
    more: Sequence[str] = (),
) -> None:  # fmt: skip
    """Make a run's folder; refuse one that holds another run's files unless that run goes on.

    Args:
        resumed: the checkpoint that this run continues; one from elsewhere does not make this folder its run's.
        overwrite: remove the other run's files instead.
        files: patterns of the checkpoints that make the folder a run's; None for pretraining's.
        results: patterns of what a finished run leaves under a name that other programs use too.
        more: patterns of what else ``overwrite`` removes.

    Raises:
        UserError: the folder cannot be made, or this run would write over another one.
    """
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UserError(f"--save-dir {folder} cannot be made: {error.strerror}.") from error
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
        with contextlib.suppress(FileNotFoundError):  # every process of the run does this
            os.remove(os.path.join(folder, name))


def _matching(folder: str, patterns: Sequence[str]) -> list[str]:
    found = (glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns)
    return [os.path.basename(path) for paths in found for path in sorted(paths)]


# ------------------------------------------------------------------------------------------ a training state


def pack(model: Any, optimizer: Any, scaler: Any, arch: str, epoch: int, run: dict) -> dict:
    """A training state as a dictionary with upstream's keys."""
    return {
        "epoch": epoch,
        "arch": arch,
        "state_dict": {"module." + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(),
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
        raise UserError(f"{path} is no pretraining checkpoint: it lacks state_dict or optimizer.")
    if state.get("arch") not in (None, arch):
        raise UserError(f"{path} was trained with -a {state['arch']}; this run has -a {arch}.")
    found = {name.removeprefix("module."): value for name, value in state["state_dict"].items()}
    own = model.state_dict()
    if "queue" in found and "queue_ids" not in found:
        found["queue"] = _upstreams_queue(found["queue"], own["queue"])
        found["queue_ids"] = own["queue_ids"]  # upstream has none: nothing is masked until rows are replaced
    _same_entries(found, own, path)
    refuse_odd(found, path, own)
    try:
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):  # empty when the run so far did not scale its loss
            scaler.load_state_dict(state["scaler"])
        model.load_state_dict(found)
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} does not fit this run's optimizer: {' '.join(str(error).split())}") from error
    return {"epoch": int(state.get("epoch", 0)), **(state.get("run") or {})}


def _upstreams_queue(queue: Tensor, own: Tensor) -> Tensor:
    """(K, C) unit rows from MoCo's (C, K), or from SynCo's (K, C) whose first rows are not of unit length."""
    if is_mocos(queue, own.shape[1]):
        queue = queue.T
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
    entries = state.get("state_dict")
    entries = entries if isinstance(entries, dict) else {}
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
        if found[name].shape != value.shape:
            raise UserError(
                f"{path}: {name} has shape {tuple(found[name].shape)}, this run needs {tuple(value.shape)}; check "
                "--moco-k, --moco-dim, --mlp and --stem."
            )
