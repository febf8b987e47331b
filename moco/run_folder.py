"""Which checkpoints a run's folder holds, and from which of them a run goes on."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from moco.errors import UserError
from moco.files import read, run_of

POINTER = "latest"
PREVIOUS = ".previous"  # behind the name of a run's one checkpoint: the one before it
# of folders that hold one checkpoint, the encoder that is handed on first
_ONE = (
    "model_best_semisup.pth.tar", "checkpoint_semisup.pth.tar", "model_best.pth.tar", "checkpoint.pth.tar",
    "model.safetensors",  # the Hub's layout
)  # fmt: skip
_NAME = re.compile(r"checkpoint_(\d{4,})(?:_step_(\d+))?\.pth\.tar$")


def runs_checkpoints(folder: str) -> list[str]:
    """Names of the checkpoints in a run's folder, oldest first: by finished epochs, then by steps."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = [match for match in map(_NAME.match, names) if match]
    found.sort(key=lambda match: (int(match[1]) + (match[2] is None), int(match[2] or 0)))
    return [match.string for match in found]


def resume_order(folder: str) -> tuple[list[str], str]:
    """Names of the checkpoints in a run's folder, the one to go on from first, and what there is to say of ``latest``.

    The one with most progress is the first. Those that lie ahead of the one that ``latest`` names and were written
    before it come last: the run went back (``--resume FILE`` of an earlier epoch) and took another course.
    """
    names = runs_checkpoints(folder)[::-1]
    name, odd = _pointed(folder)
    if name not in names:
        path = os.path.join(folder, POINTER)
        return names, f"{path} {odd}; the checkpoint with most progress is taken" if odd and names else ""
    when = {found: _written_at(os.path.join(folder, found)) for found in names}
    ahead = names[: names.index(name)]
    left = [found for found in ahead if when[found] < when[name]]
    newer = [found for found in ahead if found not in left]
    said = f"{POINTER} names {name}, but {newer[0]} is newer" if newer else ""
    said = said or (f"{name}, which {POINTER} names, was written after {left[0]}" if left else "")
    return newer + names[len(ahead) :] + left, said


def _pointed(folder: str) -> tuple[str, str]:
    """The checkpoint that ``latest`` names, or what is wrong with ``latest``; neither where it is missing."""
    path = os.path.join(folder, POINTER)
    if not os.path.lexists(path):
        return "", ""
    if not os.path.isfile(path):  # a pipe would be waited at for ever
        return "", "is no file"
    try:
        with open(path, "rb") as file:
            name = file.read(200).decode().strip()
    except (OSError, UnicodeDecodeError):
        return "", "cannot be read"
    if not _NAME.match(name):
        return "", "names no checkpoint of this folder"
    return (name, "") if os.path.lexists(os.path.join(folder, name)) else ("", f"names {name}, which is missing")


def newest(folder: str) -> str | None:
    """The checkpoint of a run's folder to go on from, by name and time alone."""
    names, _ = resume_order(folder)
    return os.path.join(folder, names[0]) if names else None


def encoder_file(path: str) -> str:
    """The file that is meant: itself; of a run's folder the newest checkpoint of a pretraining, else the best one of a
    fine-tuning or a probe.

    Raises:
        UserError: a folder without any.
    """
    if not os.path.isdir(path):
        return path
    one = (os.path.join(path, name) for name in _ONE)
    found = newest(path) or next(filter(os.path.exists, one), None)
    if found is None:
        raise UserError(f"{path} holds no checkpoint of a run; give a file, or the folder of another run.")
    return found


def written(folder: str) -> dict[str, int]:
    """Paths of the checkpoints in a run's folder, oldest first, and when each was written (ns)."""
    paths = (os.path.join(folder, name) for name in runs_checkpoints(folder))
    return {path: _written_at(path) for path in paths}


def _written_at(path: str) -> int:
    try:
        return os.stat(path).st_mtime_ns
    except OSError:  # just removed
        return 0


class Found(NamedTuple):
    """What a run goes on from: the file and what is in it; ``told``: sentences about what was passed over for it."""

    path: str | None = None
    state: dict[str, Any] = {}
    told: Sequence[str] = ()


def newest_good(folder: str, one: str | None = None) -> Found:
    """What ``--resume auto`` means: the newest checkpoint of a run's folder that can be read; nothing where there is
    none at all.

    one: the name that a program gives to its one checkpoint, beside which is the one before;
        None: a pretraining's.

    Raises:
        UserError: there are checkpoints, and none can be read.
    """
    names, said = resume_order(folder) if one is None else (_one_and_previous(folder, one), "")
    told, bad = [said] if said else [], []
    for name in names:
        path = os.path.join(folder, name)
        try:
            state = read(path)
        except UserError as error:
            bad.append(name)
            told.append(f"passed over: {error}")
            continue
        if bad or name == f"{one}{PREVIOUS}":
            why = f"{len(bad)} newer ones cannot be read: {', '.join(bad)}" if bad else f"{one} is missing"
            told.append(f"--resume auto goes back to {path}, which is at {_place(state)}; {why}")
        return Found(path, state, told)
    if bad:
        raise UserError(f"--resume auto: {folder} holds {len(bad)} checkpoints, none of which can be read: "
                        f"{told[-len(bad)].removeprefix('passed over: ')} Put a good copy there, or leave --resume out "
                        "and start afresh with --overwrite.")  # fmt: skip
    return Found(told=told)


def _one_and_previous(folder: str, one: str) -> list[str]:
    return [name for name in (one, one + PREVIOUS) if os.path.lexists(os.path.join(folder, name))]


def _place(state: dict[str, Any]) -> str:
    run = run_of(state)
    inside = f"step {run['step']}" if "step" in run else f"batch {run.get('batch', 0)}"
    return f"epoch {state.get('epoch')}, {inside}"
