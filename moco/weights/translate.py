"""A file's entries as the encoder that takes them has them, where more than a name differs.

BEiT-3's branches, DINOv2's register tokens, gated layers and positions, layer scale, and what a pretraining keeps
beside its encoder under the same prefix: a decoder, a projection head, prototypes. Each says for the log what it did.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn

from moco.weights.layouts import BEIT3, File, Submodule

Entries = dict[str, Tensor]
# What pretrainings have that no encoder of torchvision or timm computes its features with.
_BESIDE = re.compile(
    r"(mask_token|masked_embed|decoder(_\w+)?|\w+_head|projection|projector|predictor|prototypes\w*|queue\w*|n_averaged)"
    r"(\.|$)"
)
_GATED = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}  # DINOv2's names and timm's
_SCALES = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}  # layer scale, and what it multiplies the output of


def from_beit3(encoder: nn.Module, file: File) -> tuple[File, str]:
    """An official BEiT-3 file by timm's names and for the encoder's size, and words on what it has beside the vision
    branch; other files as they are. A pretraining's file has no norm after the pooling, which then starts anew, and a
    norm of the last tokens, which BEiT-3's own image classification leaves out (its ``normalize_output``)."""
    vision = {name: value for name, value in file.tensors.items() if re.match(r"beit3\.|fc_norm\.|head\.", name)}
    if not any(name.startswith(BEIT3) for name in vision) or not hasattr(encoder, "patch_embed"):
        return file, ""
    from timm.models.vision_transformer import checkpoint_filter_fn

    last = {name for name in vision if name.startswith("beit3.encoder.layer_norm.")}
    vision = {name: value for name, value in vision.items() if name not in last}
    # timm drops the text's embedding, the mask token and branch B, which pairs of images and texts alone use
    found = checkpoint_filter_fn(dict(vision), encoder)  # pyright: ignore[reportArgumentType]
    fresh = {name: value for name, value in encoder.state_dict().items() if name.startswith("fc_norm.")}
    note = "; BEiT-3's vision branch" + ("" if fresh.keys() <= found.keys() else ", its fc_norm is new")
    note += ", the norm of its last tokens is not used, as in BEiT-3's own classification" if last else ""
    return file._replace(tensors={**fresh, **found}), note


def translate(encoder: nn.Module, part: Submodule) -> tuple[Submodule, str]:
    """The part with the encoder's own names and shapes, as far as that can be computed, and words for the log, each
    after a semicolon; a part that the encoder can take stays as it is."""
    own, entries, notes = encoder.state_dict(), part.entries, ""
    steps: tuple[Callable[[Entries, Entries], tuple[Entries, str]], ...] = (
        _registers, _gated, _layer_scale, _positions, _without_beside,
    )  # fmt: skip
    for step in steps:
        entries, note = step(own, entries)
        notes += note
    return part._replace(entries=entries), notes


def _registers(own: Entries, entries: Entries) -> tuple[Entries, str]:
    """DINOv2's register tokens by timm's name; timm adds the class token's position to the token beforehand."""
    if not ({"register_tokens", "cls_token", "pos_embed"} <= entries.keys() and "reg_token" in own):
        return entries, ""
    rest = {name: value for name, value in entries.items() if name != "register_tokens"}
    token, positions = entries["cls_token"], entries["pos_embed"]
    moved = {"cls_token": token + positions[:, :1], "pos_embed": positions[:, 1:]}
    return {**rest, "reg_token": entries["register_tokens"], **moved}, ""


def _gated(own: Entries, entries: Entries) -> tuple[Entries, str]:
    if "blocks.0.mlp.w12.weight" not in entries or "blocks.0.mlp.fc1.weight" not in own:
        return entries, ""
    pattern = re.compile("|".join(map(re.escape, _GATED)))
    return {pattern.sub(lambda found: _GATED[found[0]], name): value for name, value in entries.items()}, ""


def _layer_scale(own: Entries, entries: Entries) -> tuple[Entries, str]:
    """Layer scale (arXiv 2103.17239) by timm's name, or, where the encoder has none, multiplied into the layer before:
    gamma * (W x + b) = (gamma W) x + gamma b."""
    if "blocks.0.gamma_1" not in own:
        entries = {re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name): value for name, value in entries.items()}
    if "blocks.0.ls1.gamma" not in entries or "blocks.0.ls1.gamma" in own:
        return entries, ""
    kept = {name: value for name, value in entries.items() if not name.endswith(tuple(_SCALES))}
    for name in entries.keys() - kept.keys():
        block, scale = name[: -len("ls1.gamma")], name[-len("ls1.gamma") :]
        for entry in (f"{block}{_SCALES[scale]}.weight", f"{block}{_SCALES[scale]}.bias"):
            if entry in kept:
                kept[entry] = kept[entry] * entries[name].reshape(-1, *[1] * (kept[entry].ndim - 1))
    return kept, "; its layer scale is multiplied into the weights of the layers before it"


def _positions(own: Entries, entries: Entries) -> tuple[Entries, str]:
    """DINOv2's positions for another number of patches, as its own evaluation computes them: bicubic, of a grid that
    is .1 of a patch larger, or with registers of the grid itself and antialiased (its hubconf and vision_transformer).
    """
    wanted, found = own.get("pos_embed"), entries.get("pos_embed")
    if wanted is None or found is None or wanted.shape == found.shape or not _is_dinov2(entries):
        return entries, ""
    registers = "reg_token" in entries
    first = 0 if registers else 1  # the class token's, which stays
    before, after = (math.isqrt(positions.shape[1] - first) for positions in (found, wanted))
    if (before**2, after**2) != (found.shape[1] - first, wanted.shape[1] - first):
        return entries, ""
    grid = found[:, first:].float().unflatten(1, (before, before)).permute(0, 3, 1, 2)  # (1, width, side, side)
    size, scale = (after, None) if registers else (None, (after + 0.1) / before)
    grid = nn.functional.interpolate(grid, size, scale, mode="bicubic", antialias=registers)
    positions = torch.cat((found[:, :first], grid.permute(0, 2, 3, 1).flatten(1, 2).to(found.dtype)), 1)
    note = f"; its positions of {before}x{before} patches are interpolated to {after}x{after}, as DINOv2 does"
    return {**entries, "pos_embed": positions}, note


def _is_dinov2(entries: Entries) -> bool:
    return bool({"mask_token", "reg_token"} & entries.keys()) and "blocks.0.ls1.gamma" in entries


def _without_beside(own: Entries, entries: Entries) -> tuple[Entries, str]:
    beside = {name for name in entries if name not in own and _BESIDE.match(name)}
    modules = list(dict.fromkeys(name.partition(".")[0] for name in sorted(beside)))
    kept = {name: value for name, value in entries.items() if name not in beside}
    return kept, f"; its {', '.join(modules)} ({len(beside)} tensors) are not used" if beside else ""
