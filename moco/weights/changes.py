"""What no tensor tells of an encoder: how its project builds it unlike torchvision and timm.

MoCo v3's ViT-S has 12 attention heads where timm's has 6, solo-learn pads the 3x3 stem by two pixels, and of lightly's
own ResNet, whose first ReLU is no module, the modules by position compute without it. A file of theirs changes the
encoder that reads it, the sentence on what was read says so, and our checkpoints and cards keep it as ``changes``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from moco.errors import UserError
from moco.files import run_of
from moco.models.encoder import use_heads
from moco.weights.layouts import OWN_RESNET, File, Submodule, has_small_stem, part_for, tensors_of

SUMMARIES = {
    "num_heads": "{} attention heads as MoCo v3's and solo-learn's ViT has",
    "stem_padding": "conv1 pads by {} as solo-learn's does",
    "bare_stem": "neither ReLU nor max-pool after bn1, as lightly's own ResNet by position has none",
}


# -------------------------------------------------------------------------------------------------- in a file


def changes_in(encoder: nn.Module, file: File) -> dict[str, int]:
    """What the project that wrote the file builds unlike torchvision and timm, see :func:`apply_changes`."""
    kept = recorded_changes(file.state, file.settings)
    if kept is not None:
        return kept
    part = part_for(encoder, file)
    # every solo-learn model has an online classifier of this name
    solo_learns = "classifier.weight" in file.tensors and part.name in ("backbone", "encoder")
    if f"{part.name}.{OWN_RESNET}".removeprefix(".") in file.tensors:
        return {"bare_stem": 1}
    # MoCo v3's ViTs and solo-learn's two with fixed positions (of MoCo v3 and MAE) have 12 heads of every such width
    if has_fixed_positions(part) and (
        part.name == "base_encoder" or solo_learns or _rows_first(part.entries["pos_embed"])
    ):
        return {"num_heads": 12}
    return {"stem_padding": 2} if solo_learns and has_small_stem(part.entries) else {}  # its base.py, for CIFAR


def recorded_changes(state: dict, card: dict[str, Any] | None = None) -> dict[str, int] | None:
    """The changes that a card, a probe's or a fine-tuning's checkpoint names; None for files that name none.

    A checkpoint of ours without the entry is of an unchanged encoder.
    """
    run = run_of(state)
    for kept in (card or {}, run):
        if "changes" in kept:
            return dict(kept["changes"] or {})
    return {} if "seed" in run else None


def has_fixed_positions(part: Submodule) -> bool:
    """Whether a ViT narrow enough for timm's heads to differ from MoCo v3's has MoCo v3's or MAE's sines and cosines
    as positions: both leave the class token's row at zero."""
    positions = part.entries.get("pos_embed")
    if positions is None or positions.ndim != 3 or positions.shape[-1] not in (192, 384):
        return False
    return not positions[0, 0].any()


def _rows_first(positions: Tensor) -> bool:
    """Whether the first half of the width counts the patches' rows and the second their columns, as MoCo v3's does
    (its vits.py); MAE's counts columns first. Also true of positions resized to another grid.

    Args:
        positions: (1, 1 + side * side, width).
    """
    side = math.isqrt(positions.shape[1] - 1)
    if positions.shape[1] != 1 + side * side:
        return False
    rows, columns = positions[0, 1:].float().unflatten(0, (side, side)).chunk(2, -1)  # (side, side, width / 2)
    constant = torch.allclose(rows, rows[:, :1], atol=1e-4) and torch.allclose(columns, columns[:1], atol=1e-4)
    return constant and not torch.allclose(rows, rows[:1], atol=1e-4)


# ------------------------------------------------------------------------------------------------ in an encoder


def adapt(encoder: nn.Module, file: File) -> str:
    """Build an encoder as the project that wrote the file does. Returns words for a log, empty without changes; they
    say too where fixed positions leave open how many attention heads there were."""
    changes = changes_in(encoder, file)
    apply_changes(encoder, changes)
    if changes:
        return f"; {describe_changes(changes)}"
    heads = next((m.num_heads for m in encoder.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")), None)
    told = recorded_changes(file.state, file.settings) is not None
    if told or heads is None or not has_fixed_positions(part_for(encoder, file)):
        return ""
    return f"; {heads} attention heads as timm's ViT has, a guess: its fixed positions are not ordered as MoCo v3's are"


def apply_changes(encoder: nn.Module, changes: dict[str, int]) -> None:
    """Change what no tensor tells: ``num_heads`` of a timm ViT's attention, ``stem_padding`` of a ResNet's conv1,
    ``bare_stem``, a ResNet without ReLU and max-pool between bn1 and layer1. The encoder remembers them.

    Raises:
        UserError: a change of this name is not known, or not possible here.
    """
    describe_changes(changes)
    if changes:
        encoder.changes = changes  # type: ignore[assignment]
    if "stem_padding" in changes:
        conv = getattr(encoder, "conv1", None)
        if not isinstance(conv, nn.Conv2d):
            raise UserError("the file's entry changes pads a stem of a network that has none; take another copy.")
        conv.padding = (changes["stem_padding"],) * 2
    if "num_heads" in changes:
        use_heads(encoder, changes["num_heads"])
    if "bare_stem" in changes:
        for name in bare_names(encoder):
            encoder.set_submodule(name, nn.Identity())


def changes_of(encoder: nn.Module) -> dict[str, int]:
    """The changes that an encoder remembers; empty for torchvision's or timm's own network."""
    return getattr(encoder, "changes", {})


def describe_changes(changes: dict[str, int]) -> str:
    """What a change means, for people; empty without changes."""
    unknown = [name for name in changes if name not in SUMMARIES]
    if unknown:
        raise UserError(f"the file's encoder has the change {unknown[0]}, which this version does not know: update it.")
    return ", ".join(SUMMARIES[name].format(value) for name, value in changes.items())


def bare_names(encoder: nn.Module) -> list[str]:
    """The modules of a ResNet between bn1 and layer1: ``act1`` is timm's name for torchvision's ``relu``."""
    return [name for name in ("relu", "act1", "maxpool") if hasattr(encoder, name)]


def restore_changes(encoder: nn.Module, state: dict, path: str) -> None:
    """Change an encoder as that of a classifier's checkpoint is.

    Raises:
        UserError: ``--pretrained`` has changed it otherwise.
    """
    kept = changes_in(encoder, File(path, state, tensors_of(state, path), {}))
    had = changes_of(encoder) or kept
    if had != kept:
        raise UserError(
            f"{path} was trained on an encoder with {describe_changes(kept) or 'no change'}, --pretrained gives one "
            f"with {describe_changes(had)}; leave --pretrained out to go on with the checkpoint's, or begin another "
            "--save-dir."
        )
    apply_changes(encoder, kept)
