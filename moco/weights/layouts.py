"""What a weight file holds, ours or another project's: its tensors by the names of torchvision and timm.

Where the projects keep the encoder that their own evaluations use (names after DataParallel's ``module.``):

    ours, MoCo v1 and v2, SynCo   state_dict  encoder_q.*, of ours with --ema encoder_ema.*
    MoCo v3                       state_dict  base_encoder.*
    SupContrast                   model       encoder.*, the projection of a skip connection is ``shortcut``
    Barlow Twins, VICReg          model       backbone.*, or the backbone alone
    lightly                       state_dict  backbone.*, of a ResNet often by position: 0 conv1, 1 bn1, 4 layer1 ..,
                                              of its own ResNet 2 layer1 ..
    solo-learn                    state_dict  backbone.*, older ones encoder.*
    BEiT-3                        model       beit3.vision_embed.*, beit3.encoder.* with branches A (vision) and B
    DINO, iBOT                    teacher     backbone.*
    DINOv2                        teacher     backbone.*, blocks in chunks (``blocks.1.6``), or the backbone alone
    MAE                           model       all, the decoder beside the encoder
    SwAV, DeepCluster v2          all, or state_dict, the projection head and the prototypes beside the encoder
    BYOL (byol-pytorch)           all         online_encoder.net.*, beside target_encoder.net.*
    torchvision, timm, a probe's  all, or state_dict, or model

Of other names for these dictionaries and prefixes :mod:`moco.weights.nests` decides; what has to be computed from a
file's tensors for the encoder that takes them is in :mod:`moco.weights.translate`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from moco import files, schema
from moco.errors import UserError
from moco.models.encoder import backbone_keys, head_of
from moco.weights.nests import Nest, choose_nest, prefixes

SAFETENSORS = ".safetensors"
CARD = "moco backbone"  # the kind of the card that moco.export writes
FROM_CARD = "card"
PUBLISHED = "torchvision:"  # followed by a name such as IMAGENET1K_V2
# in this order where several fit equally
PARTS = ("encoder_ema", "encoder_q", "base_encoder", "backbone", "encoder", "")
# The flags that lie beside our checkpoints: beside a classifier's, which has an accuracy, and beside a pretraining's.
_SETTINGS = {True: ("lincls_settings.json", "semisup_settings.json"), False: ("log_settings.json",)}
# lightly counts modules, and in its own ResNet ReLU and max-pool are none: where layer1 is, and the entry that tells
OWN_RESNET = "2.0.conv1.weight"
_BY_POSITION = {OWN_RESNET: 2, "4.0.conv1.weight": 4}

# Blocks of the four stages, shape of a block's 3x3 convolution (outputs, inputs a group), whether it is a bottleneck.
RESNETS = {
    ((2, 2, 2, 2), (64, 64), False): "resnet18",
    ((3, 4, 6, 3), (64, 64), False): "resnet34",
    ((3, 4, 6, 3), (64, 64), True): "resnet50",
    ((3, 4, 23, 3), (64, 64), True): "resnet101",
    ((3, 8, 36, 3), (64, 64), True): "resnet152",
    ((3, 4, 6, 3), (128, 128), True): "wide_resnet50_2",
    ((3, 4, 23, 3), (128, 128), True): "wide_resnet101_2",
    ((3, 4, 6, 3), (128, 4), True): "resnext50_32x4d",
    ((3, 4, 23, 3), (256, 8), True): "resnext101_32x8d",
    ((3, 4, 23, 3), (256, 4), True): "resnext101_64x4d",
}
VIT_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large", 1280: "huge"}  # timm's words for a ViT's width
_DINOV2_WIDTHS = {**VIT_WIDTHS, 1536: "giant"}
BEIT3, _BEIT3_PATCHES = "beit3.", "beit3.vision_embed.proj.weight"
_BEIT3_WORDS = {768: "base", 1024: "large", 1408: "giant"}
# Of a ViT of timm and of torchvision: the patches' weights, the positions, and the name by its word and patch.
_VITS = (
    ("patch_embed.proj.weight", "pos_embed", "vit_{0}_patch{1}_224"),
    ("conv_proj.weight", "encoder.pos_embedding", "vit_{0[0]}_{1}"),
)
_REGISTERS = {"register_tokens", "reg_token"}  # in DINOv2's words and in timm's
# what tells where an encoder's names begin, of ResNets by name and by position, and of ViTs
_SIGNS = ("layer1.0.conv1.weight", *_BY_POSITION, "patch_embed.proj.weight", "conv_proj.weight")
_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.(?=(?:norm|attn|mlp|ls))")  # DINOv2 counts on through its chunks
_MOCO_V3_NAMES = {f"vit_{word}": f"vit_{word}_patch{14 if word == 'huge' else 16}_224" for word in VIT_WIDTHS.values()}


class File(NamedTuple):
    """What a weight file holds."""

    path: str
    state: dict  # all of it
    tensors: dict[str, Tensor]  # the weights, wherever it keeps them, without the prefixes of wrappers
    settings: dict[str, Any]  # its card, or the settings of our run that wrote it; empty for other files
    beside: str = ""  # what the latter are called
    nest: str = ""  # the dictionary of the file that they lie in
    others: tuple[str, ...] = ()  # dictionaries of the file with networks of the same kind, which are not read


class Submodule(NamedTuple):
    """The encoder in a file."""

    name: str  # such as encoder_q, empty for a file that is nothing else
    entries: dict[str, Tensor]  # by the names of torchvision and timm, the head included


# --------------------------------------------------------------------------------------------------- the file


def open_file(path: str) -> File:
    """Read a checkpoint or a safetensors file.

    Raises:
        UserError: unreadable, or without tensors.
    """
    if path.endswith(SAFETENSORS) and os.path.isfile(path):
        return _open_safetensors(path)
    return file_of(path, files.read(path))


def file_of(path: str, state: dict) -> File:
    """The same of a checkpoint that was read."""
    nest = _nest(state, path)
    return File(path, state, nest.tensors, *_settings(path, state), nest.name, nest.others)


def _open_safetensors(path: str) -> File:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            card = (opened.metadata() or {}).get("card", "{}")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{path} is no readable safetensors file: truncated, damaged or something else; copy it again."
        ) from error
    return File(path, tensors, tensors_of(tensors, path), _checked_card(card, f"the card in {path}"), FROM_CARD)


def _checked_card(text: str, name: str) -> dict[str, Any]:
    """A card, or the flags of a run, from its JSON text; UserError, which calls it ``name``."""
    try:
        found = files.json_of(text)
    except ValueError as error:
        raise UserError(f"{name} is damaged: it is no JSON; take another copy, or remove it.") from error
    if wrong := schema.card_problem(found):
        raise UserError(f"{name} {wrong}; take another copy, or remove it.")
    return found


def _settings(path: str, state: dict) -> tuple[dict[str, Any], str]:
    """The card that lies beside a file, or the settings of the run that wrote the checkpoint, and what to call them;
    empty for others."""
    names = _SETTINGS["best_acc1" in state] if "run" in state else ()
    beside = [os.path.join(os.path.dirname(path), name) for name in names]
    for name in [os.path.splitext(path)[0] + ".json", *beside]:
        text = _text_of(name)
        if text and (name in beside or f'"{CARD}"' in text):
            found = _checked_card(text, name)
        else:
            found = files.dictionary_of(text)  # may be another program's, of any kind
        if found.get("kind") == CARD:
            return found, FROM_CARD
        if found and found.get("arch") == state.get("arch", ""):
            return found, os.path.basename(name)
    return {}, ""


def _text_of(path: str) -> str:
    """A small text file's content, damaged bytes replaced; empty where there is none."""
    try:
        with files.open_regular(path, 1 << 24) as file:
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def tensors_of(state: dict, path: str) -> dict[str, Tensor]:
    """The dictionary of tensors, wherever the file keeps it, without the prefixes of wrappers (DDP, torch.compile).

    Raises:
        UserError: there is none.
    """
    return _nest(state, path).tensors


def _nest(state: dict, path: str) -> Nest:
    nest = choose_nest(state, lambda tensors: any(_deduced(part) for _, part in _parts(tensors, _SIGNS)))
    found = nest.tensors
    if not found:
        raise UserError(f"{path} holds no weights: neither tensors nor a state_dict with tensors: give a checkpoint.")
    pointers = (name.removesuffix("queue_ptr") for name in found if name.endswith(".queue_ptr"))
    outer = next((prefix for prefix in pointers if any(n.startswith(f"{prefix}encoder_q.") for n in found)), "")
    found = {name.removeprefix(outer): value for name, value in found.items()}  # a LightningModule's ``model.``
    return Nest(nest.name, found, () if "run" in state else nest.others)


# ------------------------------------------------------------------------------------------------ the encoder in it


def submodules(file: File, encoder: nn.Module | None = None) -> Iterator[Submodule]:
    """All that may be the encoder in a file, the most specific first and then what only its names tell.

    Args:
        encoder: that is looked for; by default any that is known.
    """
    own = () if encoder is None else (next(name for name in encoder.state_dict() if name in backbone_keys(encoder)),)
    return (Submodule(*part) for part in _parts(file.tensors, (*_SIGNS, *own)))


def _parts(tensors: dict[str, Tensor], signs: tuple[str, ...]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for name in (*PARTS, *prefixes(tensors, signs, PARTS)):
        prefix = f"{name}." if name else ""
        chosen = {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}
        if chosen:
            yield name, _library_names(chosen)


def _library_names(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's ResNets for those that count modules (lightly) and for ``shortcut`` (SupContrast)."""
    positions: dict[str, str] = {}
    if first := next((place for name, place in _BY_POSITION.items() if name in entries), 0):
        positions = {"0": "conv1", "1": "bn1", **{str(first + i): f"layer{i + 1}" for i in range(4)}}
    renamed = {}
    for name, value in entries.items():
        module, _, rest = name.partition(".")
        name = f"{positions[module]}.{rest}" if module in positions else name
        name = re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)
        renamed[_CHUNKED.sub(r"blocks.\1.", name) if "cls_token" in entries else name] = value
    return renamed


def part_for(encoder: nn.Module, file: File) -> Submodule:
    """The part with most of the encoder's names; the most specific where several have as many."""
    wanted = backbone_keys(encoder)
    return max(submodules(file, encoder), key=lambda part: len(wanted & part.entries.keys()))


def known_part(file: File) -> Submodule:
    """The part whose tensors are of a known architecture, else the most specific."""
    found = list(submodules(file))
    return next((part for part in found if _deduced(part.entries)), found[0])


def head_entries(encoder: nn.Module, file: File, sound: bool = True) -> dict[str, Tensor]:
    """What the file has for the encoder's head, by names such as ``weight`` and ``0.weight``.

    Raises:
        UserError: with ``sound``, where they are odd (:func:`moco.files.odd_tensors`).
    """
    head = head_of(encoder) + "."
    entries = {name: value for name, value in part_for(encoder, file).entries.items() if name.startswith(head)}
    if sound:
        files.refuse_odd(entries, file.path)
    return {name.removeprefix(head): value for name, value in entries.items()}


# ------------------------------------------------------------------------------------------ which encoder it is


def arch_of(file: File) -> str:
    """The architecture that a file names, else the one its tensors have; empty for an unknown one."""
    return named_arch(file) or _deduced(known_part(file).entries)


def named_arch(file: File) -> str:
    """What the file itself calls its architecture, in the words of torchvision and timm; empty if it does not."""
    named = file.settings.get("arch") or file.state.get("arch")
    if not isinstance(named, str):
        named = getattr(file.state.get("opt"), "model", "")  # SupContrast keeps its flags
    if not isinstance(named, str):
        return ""
    return _MOCO_V3_NAMES.get(named, named)


def _deduced(entries: dict[str, Tensor]) -> str:
    stages = [rf"layer{i}\.\d+\.conv1\.weight" for i in range(1, 5)]
    blocks = tuple(sum(bool(re.fullmatch(stage, name)) for name in entries) for stage in stages)
    conv = entries.get("layer1.0.conv2.weight", entries.get("layer1.0.conv1.weight"))
    if all(blocks) and conv is not None:
        return RESNETS.get((blocks, tuple(conv.shape[:2]), "layer1.0.conv3.weight" in entries), "")  # type: ignore
    width, side = _patches(entries, _BEIT3_PATCHES) or (0, 0)
    if width in _BEIT3_WORDS:
        return f"beit3_{_BEIT3_WORDS[width]}_patch{side}_224"
    for patches, _, name in _VITS:
        width, side = _patches(entries, patches) or (0, 0)
        if side == 14 and "blocks.0.ls1.gamma" in entries and width in _DINOV2_WIDTHS:
            return f"vit_{_DINOV2_WIDTHS[width]}_patch14_{'reg4_' if _REGISTERS & entries.keys() else ''}dinov2"
        if width in VIT_WIDTHS:
            return name.format(VIT_WIDTHS[width], side)
    return ""


def foreign_words(entries: dict[str, Tensor]) -> str:
    """What a network is that neither torchvision nor timm builds, as far as its tensors tell, and a step; else empty:
    the end of a sentence that begins with the file."""
    conv = entries.get("conv1.weight")
    if conv is not None and "layer1.0.conv1.weight" in entries and conv.shape[0] != 64:
        blocks = "-".join(
            str(len({n.split(".")[1] for n in entries if n.startswith(f"layer{i}.")})) for i in range(1, 5)
        )
        return (
            f"holds a ResNet of {blocks} blocks that begins with {conv.shape[0]} channels, which neither torchvision "
            "nor timm builds (they begin with 64); give a file of the usual width"
        )
    if "storage_tokens" in entries:
        return "holds DINOv3's ViT by its own project's names; give the weights that timm publishes for it"
    return ""


def module_names(tensors: dict[str, Tensor]) -> str:
    """The outermost modules of a file's tensors, for a sentence."""
    names = list(dict.fromkeys(name.partition(".")[0] for name in tensors))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _patches(entries: dict[str, Tensor], name: str) -> tuple[int, int] | None:
    """Width and side of a ViT's patches."""
    weight = entries.get(name)
    return (weight.shape[0], weight.shape[-1]) if weight is not None and weight.ndim == 4 else None


def has_small_stem(entries: dict[str, Tensor]) -> bool:
    """Whether a ResNet's first convolution is 3x3."""
    weight = entries.get("conv1.weight")
    return weight is not None and weight.ndim == 4 and weight.shape[-1] == 3


def vit_size(entries: dict[str, Tensor]) -> int | None:
    """A ViT's image side from its positions, one for each patch and one for the class token; None for others."""
    for patches, positions, _ in _VITS:
        if positions in entries and patches in entries and entries[positions].ndim == 3 and entries[patches].ndim:
            return math.isqrt(entries[positions].shape[1]) * entries[patches].shape[-1]
    return None
