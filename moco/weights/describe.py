"""Say what a checkpoint is and whether it is ok: python -m moco.describe CKPT.

Prints a line for each thing that is known or was checked; a line that starts with "warning:" names something that a
healthy run does not leave behind. Exit codes: 0 ok, 1 there are warnings, 2 the file cannot be read.

Legend: K queue rows, C feature width.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moco import files, schema
from moco.config import typed
from moco.errors import UserError, tell
from moco.files import run_of
from moco.models.key_queue import EMPTY
from moco.train import checkpoint
from moco.train.resume import describe_machine
from moco.weights.layouts import File, arch_of, head_entries, named_arch, open_file
from moco.weights.origin import described, pretraining_of, without_other_methods
from moco.weights.read import differing, open_backbone
from moco.weights.settings import listed, settings_of

UNIT = 1e-3  # a queue row's length may differ so much from 1 (keys of 16-bit encoders do by 4e-4)
FLAT = 1e-8  # a channel whose variance is below carries no signal; BatchNorm's own epsilon is 1e-5
FAR = 1.0  # keys this far from the queries, relative to the queries' norm, no longer follow them
WARNING = "warning: "  # how a line begins that names what a healthy run does not leave behind
PAIRS = (("encoder_q", "encoder_k"), ("base_encoder", "momentum_encoder"), ("backbone", "momentum_backbone"),
         ("backbone", "backbone_momentum"), ("encoder", "momentum_encoder"))  # fmt: skip


def describe_file(path: str) -> list[str]:
    """All that can be told of a file without data, a line each.

    Raises:
        UserError: it cannot be read, or holds no weights.
    """
    file = open_file(path)
    told = (_kind, _architecture, _progress, _run, _online, _keys, _entries, _numbers)
    computed = (_batchnorm, _queue, _momentum, _optimizer)
    sound = file._replace(tensors={name: value for name, value in file.tensors.items() if _is_plain(value)})
    return [line for check in told for line in check(file)] + [line for check in computed for line in check(sound)]


def _is_plain(value: Tensor) -> bool:
    """Whether there is something to compute: what other tensors hold is said of them by :func:`_numbers`."""
    plain = value.layout == torch.strided and not value.is_quantized and not value.is_complex()
    return plain and (value.itemsize > 1 or not value.is_floating_point())


# ------------------------------------------------------------------------------------------------- what it is


def _kind(file: File) -> Iterator[str]:
    first, state = {name.partition(".")[0] for name in file.tensors}, file.state
    kinds = (
        ("encoder_q" in first, f"pretraining checkpoint of {_queue_project(file)}"),
        ("base_encoder" in first, "pretraining checkpoint of MoCo v3"),
        ({"opt", "model"} <= state.keys() or {"encoder", "head"} <= first, "pretraining checkpoint of SupContrast"),
        ("classifier" in first and bool(first & {"backbone", "encoder"}), "checkpoint of solo-learn"),
        ({"student", "teacher"} <= state.keys(), "pretraining checkpoint of DINO or iBOT"),
        ("teacher" in state and "dino_head" in first, "teacher of DINOv2"),
        (bool(first & {"decoder_embed", "decoder_blocks"}), "pretraining checkpoint of MAE"),
        (bool(first & {"prototypes"}), "pretraining checkpoint of SwAV or DeepCluster"),
        ({"online_encoder", "target_encoder"} <= first, "pretraining checkpoint of BYOL"),
        ("beit3" in first, "weights of BEiT-3"),
        ("pytorch-lightning_version" in state, "Lightning checkpoint, by its names of lightly"),
        ({"backbone", "projector"} <= first, "pretraining checkpoint of Barlow Twins or VICReg"),
        ("best_acc1" in state, "classifier's checkpoint, of a probe or fine-tuned"),
        ("source" in file.settings, "exported backbone"),
        (True, "weights alone"),
    )
    yield f"{file.path}: {next(summary for found, summary in kinds if found)}"


def _queue_project(file: File) -> str:
    queue = file.tensors.get("queue")
    if "queue_ids" in file.tensors or (queue is None and "run" in file.state):
        return "this project"
    if queue is not None and not checkpoint.is_mocos(queue, _output_width(file)):
        return "SynCo as released"
    return "MoCo v2" if "encoder_q.fc.2.weight" in file.tensors else "MoCo v1"


def _output_width(file: File) -> int | None:
    """C: outputs of the query encoder's last linear layer."""
    last = [value for name, value in file.tensors.items() if name.startswith("encoder_q.") and name.endswith(".bias")]
    return len(last[-1]) if last and last[-1].ndim else None


def _architecture(file: File) -> Iterator[str]:
    arch = arch_of(file)
    if not arch:
        yield "architecture: not named, and the tensors are of no known one"
        return
    how = "named in the file" if named_arch(file) else "found by the shapes of the tensors"
    try:
        source = open_backbone(file.path, fill=False)
    except UserError as error:
        yield WARNING + f"architecture: {arch}, {how}, but {error}"
        return
    entries = head_entries(source.encoder, file, sound=False)
    head = [tuple(value.shape) for value in entries.values() if value.ndim > 1]
    summary = "head " + "-".join(map(str, [head[0][1], *(shape[0] for shape in head)])) if head else "no head"
    built = f"{source.stem} stem, {source.channels} channels, {source.size} px, {summary}"
    yield f"architecture: {arch}, {how}; {built}"
    yield source.summary
    yield f"settings: {listed(settings_of(file))}"
    if (made := pretraining_of(file, entries)).value:
        yield f"pretrained by {described(made.value)} ({made.origin})"


def _progress(file: File) -> Iterator[str]:
    run, beside = run_of(file.state), file.settings
    entries: dict[str, Any] = {"epoch": file.state.get("epoch", "not recorded")}
    entries |= {name: run[name] for name in ("step", "batch", "seed") if name in run}
    if "best_acc1" in file.state and not schema.not_gone_on({"best_acc1": file.state["best_acc1"]}):
        entries["best top-1"] = f"{float(file.state['best_acc1']):.2f}"
    entries["method"] = pretraining_of(file, {}).value.get("method") or "not recorded"
    entries |= {name: beside[name] for name in ("dataset", "data") if beside.get(name)}
    yield ", ".join(f"{name} {value}" for name, value in entries.items())


def _run(file: File) -> Iterator[str]:
    """The settings that are not off, the images and the machine of the run that wrote it, where the file says them."""
    run = run_of(file.state)
    if flags := run.get("flags") or run.get("settings"):
        flags = without_other_methods(flags, pretraining_of(file, {}).value.get("recipe", {}))
        shown = ((name, typed(value)) for name, value in flags.items())
        yield "flags of its run: " + ", ".join(f"{n} {text}" for n, text in shown if text not in ("none", "off"))
    if "data" in run:
        data = run["data"]
        yield f"data: {data['images']} images of {data['name']}, fingerprint {data['fingerprint']}"
    if "torch" in run:
        yield f"written by {describe_machine(run['torch'])}"


def _online(file: File) -> Iterator[str]:
    probe = file.state.get("online_probe")
    weight = probe["layer"].get("weight") if isinstance(probe, dict) and isinstance(probe.get("layer"), dict) else None
    if isinstance(weight, Tensor) and weight.ndim == 2:
        yield f"online probe: {weight.shape[0]} classes on {weight.shape[1]} features, beside the training"


def _keys(file: File) -> Iterator[str]:
    counts = Counter(name.partition(".")[0] for name in file.tensors)
    shown = [f"{name} ({count})" for name, count in counts.most_common(12)]
    more = f" and {len(counts) - 12} more" if len(counts) > 12 else ""
    yield f"{len(file.tensors)} tensors: {', '.join(shown)}{more}"
    others = [str(name) for name in file.state if name not in file.tensors and not isinstance(name, int)]
    if others and len(others) < len(file.tensors):
        yield f"entries of the file: {', '.join(others)}"


# --------------------------------------------------------------------------------------------- whether it is ok


def _entries(file: File) -> Iterator[str]:
    if said := files.checksums(file.path):
        yield said
    if file.state is not file.tensors and (wrong := schema.not_gone_on(file.state)):
        yield WARNING + f"no run can go on from it: it {wrong}"


def _numbers(file: File) -> Iterator[str]:
    odd = files.odd_tensors(file.tensors)
    for summary in dict.fromkeys(odd.values()):
        names = [name for name, found in odd.items() if found == summary]
        yield WARNING + f"{len(names)} tensors hold {summary}, the first is {names[0]}"
    if not odd:
        yield "all weights are finite"


def _batchnorm(file: File) -> Iterator[str]:
    found = ((name, value) for name, value in file.tensors.items() if value.is_floating_point())
    variances = {n.removesuffix(".running_var"): v for n, v in found if n.endswith(".running_var")}
    if not variances:
        return
    flat = [name for name, value in variances.items() if bool((value < FLAT).all())]
    channels = sum(int((value < FLAT).sum()) for value in variances.values())
    yield f"{len(variances)} BatchNorm layers, {channels} channels without variance"
    if flat:
        yield WARNING + f"BatchNorm {flat[0]} has no channel with variance ({len(flat)} layers): collapsed"
    means = {name: file.tensors.get(f"{name}.running_mean") for name in variances}
    born = [n for n, mean in means.items() if mean is not None and not mean.any() and (variances[n] == 1).all()]
    if born and file.state.get("epoch"):
        yield WARNING + f"BatchNorm {born[0]} never saw a batch ({len(born)} layers) though training went on"


def _queue(file: File) -> Iterator[str]:
    queue, ids, pointer = (file.tensors.get(name) for name in ("queue", "queue_ids", "queue_ptr"))
    if queue is None or queue.ndim != 2 or not queue.numel():
        return
    C = _output_width(file)
    rows = queue.T if ids is None and checkpoint.is_mocos(queue, C) else queue  # (K, C); MoCo's own is (C, K)
    K = len(rows)
    lengths = rows.float().norm(dim=1)  # (K,)
    odd = int((~((lengths - 1).abs() < UNIT)).sum())  # NaN is odd too
    fill = "not recorded" if ids is None else f"{int((ids != EMPTY).sum())} rows"
    yield f"queue: K = {K}, C = {rows.shape[1]}, filled by images: {fill}, {K - odd} rows of unit length"
    if odd:
        span = f"from {float(lengths.min()):.3g} to {float(lengths.max()):.3g}"
        yield WARNING + f"{odd} of {K} queue rows are not of unit length ({span})"
    if C is not None and rows.shape[1] != C:
        yield WARNING + f"the queue's width {rows.shape[1]} is not the encoder's {C}"
    if pointer is not None and pointer.numel() == 1 and not 0 <= int(pointer) < K:
        yield WARNING + f"the queue's pointer {int(pointer)} lies outside its {K} rows"


def _momentum(file: File) -> Iterator[str]:
    present = {name.partition(".")[0] for name in file.tensors}
    q, k = next((pair for pair in PAIRS if present.issuperset(pair)), ("", ""))
    own = _parameters(file, q)
    if not own:
        return
    keys = {name: file.tensors[f"{k}.{name}"] for name in own if f"{k}.{name}" in file.tensors}
    if lost := differing(own, keys):
        yield WARNING + f"{k} lacks {lost[0]} of {q} ({len(lost)} tensors differ)"
        return
    square = sum(float((own[name].double() - keys[name].double()).square().sum()) for name in own)
    norm = sum(float(value.double().square().sum()) for value in own.values())
    distance = (square / max(norm, 1e-300)) ** 0.5
    yield f"{k} is {distance:.3g} from {q}, relative to its norm"
    if distance >= FAR:
        yield WARNING + f"{k} no longer follows {q}"
    if distance == 0 and (file.state.get("epoch") or run_of(file.state).get("step")):
        yield WARNING + f"{k} equals {q} after training: there is no momentum between them"


def _parameters(file: File, q: str) -> dict[str, Tensor]:
    """What momentum moves, by name; nothing where there is no such encoder."""
    own = {n.removeprefix(f"{q}."): v for n, v in file.tensors.items() if q and n.startswith(f"{q}.")}
    statistics = (".running_mean", ".running_var")
    return {n: v for n, v in own.items() if v.is_floating_point() and not n.endswith(statistics)}


def _optimizer(file: File) -> Iterator[str]:
    found = file.state.get("optimizer") or file.state.get("optimizer_states")
    states = [s for s in (found if isinstance(found, list) else [found]) if isinstance(s, dict)]
    if not states or not states[0].get("param_groups"):
        yield "no optimizer: it cannot be resumed"
        return
    groups, states = states[0]["param_groups"], [s.get("state") for s in states]
    if not isinstance(groups, list) or not all(isinstance(part, dict) for part in (*groups, *states)):
        yield WARNING + "no optimizer has such a state"
        return
    entries = [entry for s in states if s for entry in s.values() if isinstance(entry, dict)]
    kept = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    lr = groups[0].get("lr", "not recorded")
    yield f"optimizer: {len(groups)} groups, lr {lr}, {len(kept)} tensors of state"
    if bad := files.odd_tensors({str(place): value for place, value in enumerate(kept)}):
        yield WARNING + f"{len(bad)} tensors of the optimizer hold {next(iter(bad.values()))}"


def run_describe(args: Namespace) -> int:
    """Print what a file is; the exit code, 1 where there is a warning."""
    lines = describe_file(args.checkpoint)
    count = sum(line.startswith(WARNING) for line in lines)
    tell(*lines, f"{count} warnings" if count else "ok")
    return 1 if count else 0
