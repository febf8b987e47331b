"""A run that begins from the weights of a file (--pretrained): its settings, and its encoders' first weights.

A file is of any layout that the probes read (:mod:`moco.weights.layouts`). What it was trained at holds where no flag
says otherwise, as in the probes. A run that goes on from a checkpoint of its own keeps what that says it began from.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

import torch
from torch import Tensor, nn

from moco import files
from moco.files import run_of
from moco.models.base import Contrast, Momentum
from moco.models.encoder import build_encoder, head_of, use_heads
from moco.weights.changes import apply_changes, changes_of
from moco.weights.layouts import file_of
from moco.weights.read import Read, fill_backbone, read_backbone
from moco.weights.settings import SETTING_NAMES, settle_from_file

FLAG = "--pretrained"
# the parts of a file whose head is a projection head; others' may be a classifier as wide as one
PROJECTING = ("encoder_q", "encoder_ema", "base_encoder")


def settle_start(args: Namespace, path: str | None, state: dict) -> Namespace:
    """The flags of a run with the settings of the file that it begins from, or has begun from, in the place of those
    that were left open; ``args.notes`` says which.

    Args:
        path, state: the checkpoint that the run goes on from, if any, which then says what the run began from.

    Raises:
        UserError: the file cannot be read.
    """
    args = Namespace(**{**vars(args), "notes": [*args.notes]})
    if path:
        _go_on(args, path, state)
    if not args.pretrained:
        return args
    measured = ("mean", "std") if args.stats else ()  # by --stats auto, which this file's do not replace
    asked = [name for name in SETTING_NAMES if name not in measured]
    given = {name: getattr(args, name) for name in asked if name not in args.left_open}
    found = Namespace(**{**dict.fromkeys(SETTING_NAMES), "stem": "auto", **given})
    settled = settle_from_file(found, path or args.pretrained, opened=file_of(path, state) if path else None)
    for name in measured:
        settled.taken.pop(name, None)
    for name in settled.taken:
        setattr(args, name, getattr(found, name))
    args.arch = found.arch
    args.left_open = [name for name in args.left_open if name not in settled.taken]
    args.notes += [] if path else settled.summary.strip("\n").split("\n")
    return args


def _go_on(args: Namespace, path: str, state: dict) -> None:
    """A run's own checkpoint in the place of the file that was given."""
    began = (run_of(state).get("flags") or {}).get(FLAG) or ""
    if args.pretrained:
        origin = f", of a run that began from {began}" if began not in ("", args.pretrained) else ""
        args.notes.append(f"{FLAG} {args.pretrained} is not read: the run goes on from {path}{origin}")
    args.pretrained, args.begin_with = began, ""


def begin_with(model: Contrast, path: str, arch: str) -> str:
    """Give all encoders of a model the weights in a file, and where it fits its projection head; the sentence on what
    was taken. Every process calls.

    Raises:
        UserError: as :func:`moco.weights.read.load_backbone`.
    """
    built: dict[str, Any] = model.encoder_q.built  # type: ignore[assignment]
    with torch.random.fork_rng(devices=[]):  # what a run draws is what it would draw without
        reader = build_encoder(arch, 1, stem=built["stem"], size=built["size"], in_chans=built["channels"])
    read = read_backbone(reader, path, arch)
    encoders = [model.encoder_q, *([model.encoder_k] if isinstance(model, Momentum) else [])]
    taken = _fitting_head(encoders[0], read)
    for encoder in encoders:
        _be_built_like(encoder, reader)
        fill_backbone(encoder, read.tensors)
        if taken:
            encoder.get_submodule(head_of(encoder)).load_state_dict(taken)
    return _sentence(read, taken, head_of(encoders[0]), path)


def _fitting_head(encoder: nn.Module, read: Read) -> dict[str, Tensor]:
    """The file's projection head where its names and shapes are this encoder's; else empty."""
    own = encoder.get_submodule(head_of(encoder)).state_dict()
    found = read.head if read.part in PROJECTING else {}
    if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in found.items()}:
        return {}
    files.refuse_odd(found, read.file.path, own)
    return found


def _be_built_like(encoder: nn.Module, reader: nn.Module) -> None:
    """Change what no tensor tells of an encoder, such as attention heads, to what it is in another one."""
    for name, module in reader.named_modules():
        own = encoder.get_submodule(name) if hasattr(module, "qkv") and hasattr(module, "num_heads") else module
        if own is not module and own.num_heads != module.num_heads:
            use_heads(own, module.num_heads)  # type: ignore[arg-type]
    apply_changes(encoder, changes_of(reader))
    encoder.changes = changes_of(reader)  # type: ignore[assignment]


def _sentence(read: Read, taken: dict[str, Tensor], head: str, path: str) -> str:
    count, total = len(read.tensors) + len(taken), len(read.tensors) + len(read.head)
    said = f"{FLAG} {path}: {count} of {total} tensors of {read.part or 'the file'}{read.age}"
    if taken:
        return f"{said}, its projection head among them{read.more}"
    names = [f"{head}.{name}" for name in read.head]
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    left = f"not taken: {shown}; " if names else ""
    return f"{said}; {left}the projection head begins anew{read.more}"
