"""What a checkpoint says of the run that wrote it, and what a run that goes on from it has otherwise.

``run`` of a checkpoint has ``flags`` (:mod:`moco.cli.flag_classes`), ``data`` (``name``, number of ``images``,
``fingerprint``, their ``levels`` if any), ``torch`` (``version``, ``processor``, on a CPU ``threads``) and
``processes``: within one of the last two a resumed run is the uninterrupted one bit for bit. With a queue it has
``head``, what was chosen for the loss.
"""

from __future__ import annotations

import contextlib
import platform
from typing import Any

import torch

from moco import distributed, errors, files, owner, run_folder, schema, seeding
from moco.config import Classes, Flags, typed
from moco.data import Source
from moco.errors import UserError
from moco.kernels import Earlier
from moco.models.key_queue import EMPTY
from moco.train import checkpoint

DONE = (
    "the run is finished: nothing is trained, and other flags change nothing; raise --epochs (or --steps) to train on"
)


def begin_run(
    resume: str, folder: str, seed: int | None, name: str | None = None, kind: str = ""
) -> tuple[str | None, dict, int]:
    """Hold the run's folder; the checkpoint to go on from, if any, what is in it, and the run's seed, on every process
    the same.

    A file that is named is taken, or refused; ``auto`` is :func:`moco.run_folder.newest_good`, and what it passed over
    is told.

    name: of the one checkpoint of a program that has one; None: a pretraining's. kind: as in :func:`moco.owner.hold`.

    Raises:
        UserError: the file cannot be used; for ``auto``: none of the folder's.
    """
    distributed.first_on_node(lambda: owner.hold(folder, kind) if distributed.is_main() else None, wait=True)
    found, problem = run_folder.Found(resume or None), ""
    if resume == "auto" and distributed.is_main():
        try:
            found = run_folder.newest_good(folder, name)
        except UserError as error:
            problem = str(error)
        if found.told:
            errors.tell(*found.told)
    path, problem = distributed.from_main([found.path, problem])
    if problem:
        raise UserError(problem)
    state = found.state or (files.read(path) if path else {})
    if wrong := schema.not_gone_on(state):
        raise UserError(f"{path} {wrong}.")
    return path, state, distributed.from_main(seeding.choose_seed(seed, state))


def about_run(flags: Flags, images: Source, head: Earlier | None = None) -> dict[str, Any]:
    """What a checkpoint says of this run: plain values, those of the main process on every process."""
    about = None
    if distributed.is_main():
        data = {"name": images.name, "images": len(images), "fingerprint": images.fingerprint()}
        data |= {"levels": images.levels.plain()} if images.levels else {}
        about = {"flags": flags, "data": data, "torch": _machine(), "processes": distributed.world_size()}
    about = distributed.from_main(about)
    return about if head is None else {**about, "head": head._asdict()}


def loss_choice_of(state: dict) -> Earlier | None:
    """What the run that wrote a checkpoint had chosen for its loss; None for older files and losses without a queue."""
    head = files.run_of(state).get("head") or {}
    return Earlier(*(head[name] for name in Earlier._fields)) if set(Earlier._fields) <= set(head) else None


def _machine() -> dict[str, Any]:
    """torch, and the GPU, or the CPU with the instructions and the threads that torch uses of it."""
    version = str(torch.__version__)
    if distributed.device().type == "cuda":
        return {"version": version, "processor": torch.cuda.get_device_name()}
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        found = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        name = next(found, name)
    processor = f"{name} ({torch.backends.cpu.get_cpu_capability()})"
    return {"version": version, "processor": processor, "threads": torch.get_num_threads()}


def changes(state: dict, path: str | None, own: dict[str, Any], classes: Classes, seed: int | None) -> list[str]:
    """What this run has otherwise than the one that wrote a checkpoint: a sentence each, for the log.

    Where the images are others, what the checkpoint knows of single images is forgotten, in ``state``.

    Args:
        state: the checkpoint; nothing is compared without its ``path``.
        own: :func:`about_run` of this run.
        seed: that was asked for, if any.

    Raises:
        UserError: what differs cannot change.
    """
    if path is None:
        return []
    run = files.run_of(state)
    before = run.get("flags") or run.get("settings")  # of fine-tuning before there were flags
    said = [_other_flags(path, state, before or {}, own["flags"], classes)]
    said += [_other_images(state, path, run, own["data"], classes), _other_seed(run, seed)]
    said += [*_other_place(run, own), _other_head(state, run), checkpoint.square_queue(state)]
    if not before:
        said.append(f"{path} does not say what its run's settings were: those of this command are used")
    return [sentence for sentence in said if sentence]


_SINCE: Flags = {"--control": None, "--local-crops": 0}  # what the runs had whose files are older than the flag


def _other_flags(path: str, state: dict, before: Flags, now: Flags, classes: Classes) -> str:
    """What differs and is free; UserError where what is fixed does. ``before``: empty for files that do not say it."""
    known = {**_SINCE, **before} if before else _of_groups(state)
    names = [name for name, value in now.items() if name in known and known[name] != value]
    differ = [(name, typed(known[name]), typed(now[name])) for name in names]
    if before and (fixed := [entry for entry in differ if entry[0] in classes.fixed]):
        name, was, is_ = fixed[0]
        others = "".join(f", {name} {was} and {is_}" for name, was, is_ in fixed[1:])
        raise UserError(
            f"{path} is of a run with {name} {was} and this one has {is_}{others}: give the same to continue it, or "
            "begin another --save-dir."
        )
    shown = [f"{name} {is_} (was {was})" for name, was, is_ in differ if name in classes.free]
    return f"resumed with {', '.join(shown)}" if shown else ""


def _of_groups(state: dict) -> Flags:
    """What the optimizer's groups say of the settings, for files that say nothing else."""
    groups = (state.get("optimizer") or {}).get("param_groups") or []
    flags: Flags = {}
    for name, key in (("--wd", "weight_decay"), ("--momentum", "momentum")):
        values = [group[key] for group in groups if type(group.get(key)) in (int, float)]
        flags |= {name: max(values)} if values else {}
    return flags


def _other_images(state: dict, path: str, run: dict, now: dict[str, Any], classes: Classes) -> str:
    """Of other images; what ``state`` knows of single ones is then forgotten."""
    before = run.get("data") or now
    if before["fingerprint"] == now["fingerprint"]:
        return ""
    shown = [f"{data['images']} of {data['name']}" for data in (now, before)]
    if run.get("batch") or not classes.data:
        where = f"inside epoch {state.get('epoch')}" if classes.data else "in a run"
        end = ", or resume one from an epoch's end" if classes.data else ", or begin another --save-dir"
        raise UserError(
            f"{path} was written {where} on other images, {shown[1]} (here {shown[0]}; names, labels or sizes differ): "
            f"give the same{end}."
        )
    entries = state["state_dict"]
    known = [name for name in ("module.queue_ids", "module.queue_labels") if name in entries]
    entries |= {name: torch.full_like(entries[name], EMPTY) for name in known}
    state["run"] = {**run, "bad_images": {"seen": []}}
    summary = "; the queue's rows count as of no image and no class" if known else ""
    return f"resumed on other images, {shown[0]} (was {shown[1]}){summary}"


def _other_seed(run: dict, seed: int | None) -> str:
    kept = run.get("seed")
    return "" if seed is None or kept in (None, seed) else f"--seed {seed} is not used: the file's run has {kept}"


def _other_place(run: dict, own: dict[str, Any]) -> list[str]:
    """Of another torch, processor or number of processes, with which bits are others."""
    said, machine, now = [], run.get("torch"), own["torch"]
    if machine not in (None, now):
        was, is_ = describe_machine(machine), describe_machine(now)
        said.append(f"written by {was}; this is {is_}: the rest is equal to rounding, not bit for bit")
    count, now = run.get("processes") or (run.get("batches") or {}).get("processes"), own["processes"]  # older files'
    if count not in (None, now):
        by = f"written by {count} process{'es' * (count > 1)}; this run has {now}"
        said.append(f"{by}: not bit for bit the uninterrupted run")
    return said


def _other_head(state: dict, run: dict) -> str:
    """Of a file of an earlier version on a GPU, which had another loss and other draws there."""
    queued = any(name.removeprefix("module.") == "queue" for name in state.get("state_dict") or {})
    if "head" in run or not queued or distributed.device().type != "cuda":
        return ""
    return (
        "written before the loss on a GPU was the fused step: the rest is equal to rounding, and its draws are others"
    )


def describe_resume(path: str, epochs: int, steps: int) -> str:
    """Where a run goes on: after so many finished epochs, and steps of the next one."""
    inside = f" and {_count(steps, 'step')} of the next" * bool(steps)
    return f"resumed {path} after {_count(epochs, 'epoch')}{inside}"


def describe_stop(epoch: int, done: int, steps: int) -> str:
    """Where a run was stopped: in an epoch, counted from 0, of so many steps."""
    return f"after {done} of {_count(steps, 'step')} of epoch {epoch}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def describe_machine(machine: dict[str, Any]) -> str:
    """The ``torch`` entry in words."""
    count = machine.get("threads")
    threads = f", {_count(count, 'thread')}" if count else ""
    return f"torch {machine['version']} on {machine['processor']}{threads}"
