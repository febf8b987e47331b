"""Read an encoder's weights from the layouts of this field, and refuse, naming the keys, what does not fit.

Where the projects keep the encoder that their own evaluations use (names after DataParallel's ``module.``):

    ours, MoCo v1 and v2, SynCo   state_dict  encoder_q.*, of ours with --ema encoder_ema.*
    MoCo v3                       state_dict  base_encoder.*
    SupContrast                   model       encoder.*, the projection of a skip connection is ``shortcut``
    Barlow Twins, VICReg          model       backbone.*, or the backbone alone
    lightly                       state_dict  backbone.*, of a ResNet often by position: 0 conv1, 1 bn1, 4 layer1 ..,
                                              of its own ResNet 2 layer1 ..
    solo-learn                    state_dict  backbone.*, older ones encoder.*
    BEiT-3                        model       beit3.vision_embed.*, beit3.encoder.* with branches A (vision) and B
    torchvision, timm, a probe's  all, or state_dict, or model

Tensors do not hold everything: MoCo v3's ViT-S has 12 attention heads where timm's has 6, solo-learn pads the 3x3 stem
by two pixels, and of lightly's own ResNet, whose first ReLU is no module, the modules by position compute without it.
Such a file changes the encoder that reads it, and the sentence on what was read says so.
"""

from __future__ import annotations

import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from moco import distributed, files
from moco.errors import UserError
from moco.models.encoder import backbone_keys, build_encoder, head_of, use_heads
from moco.weights import settings
from moco.weights.settings import FROM_TENSORS, Setting, Settled

PUBLISHED = "torchvision:"  # followed by a name such as IMAGENET1K_V2
SAFETENSORS = ".safetensors"
CARD = "moco backbone"  # the kind of the card that moco.export writes
_NESTS = ("state_dict", "model")
# in this order where several fit equally
_PARTS = ("encoder_ema", "encoder_q", "base_encoder", "backbone", "encoder", "")
# The flags that lie beside our checkpoints: beside a classifier's, which has an accuracy, and beside a pretraining's.
_SETTINGS = {True: ("lincls_settings.json", "semisup_settings.json"), False: ("log_settings.json",)}

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
# What no tensor tells, by the names under which cards and checkpoints keep it, see apply_changes.
CHANGES = {
    "num_heads": "{} attention heads as MoCo v3's and solo-learn's ViT has",
    "stem_padding": "conv1 pads by {} as solo-learn's does",
    "bare_stem": "neither ReLU nor max-pool after bn1, as lightly's own ResNet by position has none",
}
_OWN_RESNET = "2.0.conv1.weight"  # where layer1 follows bn1: of lightly's own ResNet, ReLU and max-pool are no modules
MOCO_V3_NAMES = {
    f"vit_{word}": f"vit_{word}_patch{14 if word == 'huge' else 16}_224" for word in VIT_WIDTHS.values()
}  # MoCo v3's


class File(NamedTuple):
    """What a weight file holds."""

    path: str
    state: dict  # all of it
    tensors: dict[str, Tensor]  # the weights, wherever it keeps them, without the prefixes of wrappers
    settings: dict[str, Any]  # its card, or the settings of our run that wrote it; empty for other files
    beside: str = ""  # what the latter are called


class Submodule(NamedTuple):
    """The encoder in a file."""

    name: str  # such as encoder_q, empty for a file that is nothing else
    entries: dict[str, Tensor]  # by the names of torchvision and timm, the head included


class Backbone(NamedTuple):
    """An encoder with a file's weights, in eval mode, and how it was built."""

    encoder: nn.Module  # its head is fresh
    arch: str
    stem: str  # "cifar" or "imagenet"
    size: int  # pixels
    channels: int
    changes: dict[str, int]  # see :func:`apply_changes`
    file: File
    summary: str  # what was read


def load_backbone(encoder: nn.Module, path: str, arch: str = "") -> str:
    """Put a file's weights into the encoder, all but the head; returns a sentence that says what was read.

    Args:
        encoder: from :func:`moco.models.encoder.build_encoder`.
        path: a checkpoint file, or ``torchvision:NAME`` for published weights of ``arch``.
        arch: the encoder's name, for ``torchvision:NAME`` and for messages.

    Raises:
        UserError: unreadable, no such weights, or anything but the head is missing, unknown, of another shape or odd
            (:func:`moco.train.checkpoint.odd_tensors`).
    """
    return load_pretrained(encoder, path, arch)[1]


def load_pretrained(encoder: nn.Module, path: str, arch: str) -> tuple[dict[str, Tensor], str]:
    """:func:`load_backbone` by every process; published weights are fetched by one of each node first. Also returns
    what was loaded."""
    reading = partial(read_backbone, encoder, path, arch)
    tensors, sentence = distributed.first_on_node(reading, wait=path.startswith(PUBLISHED))
    fill_backbone(encoder, tensors)
    return tensors, sentence


def read_backbone(encoder: nn.Module, path: str, arch: str = "") -> tuple[dict[str, Tensor], str]:
    """The file's tensors for everything but the head, checked against the encoder, and a sentence on what was read.

    What the file's project does unlike torchvision and timm, and no tensor tells, is changed in the encoder.
    """
    if path.startswith(PUBLISHED):
        state = _published(arch, path.removeprefix(PUBLISHED))
        file = File(path, state, _tensors(state, path), {})
    else:
        file = open_file(path)
    tensors, summary = _fitting(encoder, file, arch)
    files.refuse_odd(tensors, path, encoder.state_dict())
    return tensors, summary


def fill_backbone(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load checked tensors; only the head is left as it was."""
    missing, unexpected = encoder.load_state_dict(tensors, strict=False)
    allowed = set(encoder.state_dict()) - backbone_keys(encoder)
    assert not unexpected
    assert {name for name in missing if not _is_counter(name)} == allowed, "more than the head is missing"


def fill_network(encoder: nn.Module, state_dict: dict[str, Tensor], path: str) -> None:
    """Load every tensor, the classifier's too, of a file whose names begin with ``module.``.

    Raises:
        UserError: other names or shapes, or odd tensors.
    """
    found = {name.removeprefix("module."): value for name, value in state_dict.items()}
    own = encoder.state_dict()
    odd = [n for n in {**own, **found} if n not in own or n not in found or own[n].shape != found[n].shape]
    if odd:
        raise UserError(
            f"{path} does not fit: {odd[0]} differs ({len(odd)} entries do); check --stem, --size and that the data "
            "has the classes it was trained on."
        )
    files.refuse_odd(found, path, own)
    encoder.load_state_dict(found)


def open_backbone(path: str, arch: str = "", stem: str = "auto", size: int | None = None) -> Backbone:
    """An encoder built for the file, with the file's weights; what is not given is found in the file.

    Args:
        path: a checkpoint file.
        arch: for a file that names none and is neither a ResNet nor a ViT.
        stem, size: as in :func:`moco.models.encoder.build_encoder`; by default the file's, see :func:`settings_of`.

    Raises:
        UserError: unreadable, no encoder in it, an architecture that cannot be found, or weights that do not fit it or
            are odd.
    """
    backbone, tensors = outline(path, arch, stem, size)
    files.refuse_odd(tensors, path, backbone.encoder.state_dict())
    fill_backbone(backbone.encoder, tensors)
    return backbone


def outline(
    path: str, arch: str = "", stem: str = "auto", size: int | None = None
) -> tuple[Backbone, dict[str, Tensor]]:
    """The encoder of :func:`open_backbone` before the file's tensors are in it, and these tensors, odd ones too."""
    file = open_file(path)
    known = {name: setting.value for name, setting in settings_of(file, arch, size).items()}
    if not (arch or "arch" in known):
        raise UserError(f"{path} does not name its architecture and its tensors are of no known one; give it by -a.")
    arch, stem, channels = arch or known["arch"], known["stem"] if stem == "auto" else stem, known["channels"]
    size = int(size or known.get("size") or (32 if stem == "cifar" else 224))
    encoder = build_encoder(arch, 1, stem=stem, size=size, in_chans=channels)
    tensors, summary = _fitting(encoder, file, arch)
    return Backbone(encoder.eval(), arch, stem, size, channels, _changes(encoder, file), file, summary), tensors


def settle_from_file(args: Namespace, path: str, dataset: str | None = None) -> Settled:
    """Complete the flags of an evaluation from the file that it evaluates, see :func:`moco.weights.settings.settle`.

    Args:
        path: a checkpoint file, ``torchvision:NAME``, or empty for none.
        dataset: whose statistics were asked for by name.

    Raises:
        UserError: the file cannot be read.
    """
    known: dict[str, Setting] = {}
    if path.startswith(PUBLISHED):
        known = {"stem": Setting("imagenet", FROM_TENSORS), "channels": Setting(3, FROM_TENSORS)}
    elif path:
        known = settings_of(open_file(path), args.arch or "", args.size)
    return settings.settle(args, path, known, dataset)


def settings_of(file: File, arch: str = "", size: int | None = None) -> dict[str, Setting]:
    """What an encoder in a file was trained at and what says so: the file's own entries or card, else the flags of its
    run beside it, else its tensors. These tell architecture, stem, channels and a ViT's size, and nothing tells the
    rest of a foreign file.

    Args:
        arch, size: where another one is asked for.

    Raises:
        UserError: an architecture that cannot be built.
    """
    found = settings.recorded(file.state, file.settings, file.beside)
    side, name = _size_of(_first_part(file).entries), arch_of(file)
    if side and found.get("size", Setting(side, "")).origin != settings.FROM_CHECKPOINT:
        found["size"] = Setting(side, FROM_TENSORS)
    if name:
        here = settings.FROM_CARD if file.beside == settings.FROM_CARD else settings.FROM_CHECKPOINT
        found["arch"] = Setting(name, here if named_arch(file) else FROM_TENSORS)
    if (arch or name) and not {"stem", "channels"} <= set(found):
        found = _shape_of(file, arch or name, size or found.get("size", Setting(224, "")).value) | found
    return {name: found[name] for name in settings.SETTING_NAMES if name in found}


def _shape_of(file: File, arch: str, size: int) -> dict[str, Setting]:
    """Stem and channels, by the first convolution in the file and in the network as its library has it."""
    with torch.random.fork_rng(devices=[]):  # a run's own first weights stay what they are
        encoder = build_encoder(arch, 1, stem="imagenet", size=size)
    own, theirs = encoder.state_dict().get("conv1.weight"), _part_for(encoder, file).entries
    small = _has_small_stem(theirs) and own is not None and own.shape[2:] != theirs["conv1.weight"].shape[2:]
    values = {"stem": "cifar" if small else "imagenet", "channels": _channels_of(encoder, file)}
    return {name: Setting(value, FROM_TENSORS) for name, value in values.items()}


# ------------------------------------------------------------------------------------------------ what a file holds


def open_file(path: str) -> File:
    """Read a checkpoint or a safetensors file.

    Raises:
        UserError: unreadable, or without tensors.
    """
    if path.endswith(SAFETENSORS) and os.path.isfile(path):
        return _open_safetensors(path)
    state = files.read(path)
    return File(path, state, _tensors(state, path), *_settings(path, state))


def _open_safetensors(path: str) -> File:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            card = json.loads((opened.metadata() or {}).get("card", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is no readable safetensors file: truncated, damaged or something else.") from error
    return File(path, tensors, _tensors(tensors, path), card, settings.FROM_CARD)


def _settings(path: str, state: dict) -> tuple[dict[str, Any], str]:
    """The card that lies beside a file, or the settings of the run that wrote the checkpoint, and what to call them;
    empty for others."""
    names = _SETTINGS["best_acc1" in state] if "run" in state else ()
    beside = [os.path.join(os.path.dirname(path), name) for name in names]
    for name in [os.path.splitext(path)[0] + ".json", *beside]:
        try:
            with open(name, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            continue
        if isinstance(found, dict) and (found.get("kind") == CARD or found.get("arch") == state.get("arch", "")):
            return found, settings.FROM_CARD if found.get("kind") == CARD else os.path.basename(name)
    return {}, ""


def _tensors(state: dict, path: str) -> dict[str, Tensor]:
    """The dictionary of tensors, wherever the file keeps it, without the prefixes of wrappers (DDP, torch.compile)."""
    for nest in _NESTS:
        if isinstance(state.get(nest), dict):
            state = state[nest]
            break
    wrapper = re.compile(r"(?:(?<=\.)|^)(?:module|_orig_mod)\.")
    named = ((name, value) for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor))
    found = {wrapper.sub("", name): value for name, value in named}
    if not found:
        raise UserError(f"{path} holds no weights: neither tensors nor a state_dict with tensors.")
    return found


def submodules(file: File) -> Iterator[Submodule]:
    """All that may be the encoder in a file, the most specific first."""
    for name in _PARTS:
        prefix = f"{name}." if name else ""
        chosen = {n.removeprefix(prefix): value for n, value in file.tensors.items() if n.startswith(prefix)}
        if chosen:
            yield Submodule(name, _library_names(chosen))


def _library_names(entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of torchvision's ResNets for those that count modules (lightly) and for ``shortcut`` (SupContrast)."""
    positions: dict[str, str] = {}
    if _OWN_RESNET in entries:
        positions = {"0": "conv1", "1": "bn1", **{str(i + 1): f"layer{i}" for i in range(1, 5)}}
    elif "4.0.conv1.weight" in entries:
        positions = {"0": "conv1", "1": "bn1", **{str(i + 3): f"layer{i}" for i in range(1, 5)}}
    renamed = {}
    for name, value in entries.items():
        first, _, rest = name.partition(".")
        name = f"{positions[first]}.{rest}" if first in positions else name
        renamed[re.sub(r"^(layer\d+\.\d+)\.shortcut\.", r"\1.downsample.", name)] = value
    return renamed


def arch_of(file: File) -> str:
    """The architecture that a file names, else the one its tensors have; empty for an unknown one."""
    named = named_arch(file)
    return named or next(filter(None, (_deduced(part.entries) for part in submodules(file))), "")


def named_arch(file: File) -> str:
    """What the file itself calls its architecture, in the words of torchvision and timm; empty if it does not."""
    named = file.settings.get("arch") or file.state.get("arch")
    if not isinstance(named, str):
        named = getattr(file.state.get("opt"), "model", "")  # SupContrast keeps its flags
    return MOCO_V3_NAMES.get(named, named)


def _deduced(entries: dict[str, Tensor]) -> str:
    blocks = [0, 0, 0, 0]
    for name in entries:
        if found := re.match(r"layer([1-4])\.\d+\.conv1\.weight$", name):
            blocks[int(found.group(1)) - 1] += 1
    if all(blocks):
        wide, shape = "layer1.0.conv3.weight" in entries, entries["layer1.0.conv1.weight"].shape
        if "layer1.0.conv2.weight" in entries:
            shape = entries["layer1.0.conv2.weight"].shape
        return RESNETS.get((tuple(blocks), tuple(shape[:2]), wide), "")  # type: ignore[arg-type]
    for patches, prefix in (("patch_embed.proj.weight", "timm"), ("conv_proj.weight", "torchvision")):
        weight = entries.get(patches)
        if weight is not None and weight.ndim == 4 and weight.shape[0] in VIT_WIDTHS:
            word, pixels = VIT_WIDTHS[weight.shape[0]], weight.shape[-1]
            return f"vit_{word}_patch{pixels}_224" if prefix == "timm" else f"vit_{word[0]}_{pixels}"
    return ""


def _first_part(file: File) -> Submodule:
    """The part whose tensors are of a known architecture, else the most specific."""
    found = list(submodules(file))
    return next((part for part in found if _deduced(part.entries)), found[0])


def _has_small_stem(entries: dict[str, Tensor]) -> bool:
    weight = entries.get("conv1.weight")
    return weight is not None and weight.ndim == 4 and weight.shape[-1] == 3


def _channels_of(encoder: nn.Module, file: File) -> int:
    """Channels of the images: what the encoder's first convolution takes in the file."""
    first = next((name for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)), "")
    weight = _part_for(encoder, file).entries.get(f"{first}.weight")
    return 1 if weight is not None and weight.shape[1:2] == (1,) else 3


def _size_of(entries: dict[str, Tensor]) -> int | None:
    """A ViT's image side from its positions, one for each patch and one for the class token."""
    for positions, patches in (("pos_embed", "patch_embed.proj.weight"), ("encoder.pos_embedding", "conv_proj.weight")):
        if positions in entries and patches in entries:
            return math.isqrt(entries[positions].shape[1]) * entries[patches].shape[-1]
    return None


# ----------------------------------------------------------------------------------------------- file and encoder


def _fitting(encoder: nn.Module, file: File, arch: str) -> tuple[dict[str, Tensor], str]:
    file, note = _from_beit3(encoder, file)
    part = _part_for(encoder, file)
    head = head_of(encoder) + "."
    found = {name: value for name, value in part.entries.items() if not name.startswith(head)}
    _check(encoder, found, file.path, _hint(file, arch))
    changes = apply_changes(encoder, _changes(encoder, file)) or _guess(encoder, file)
    what = f"{part.name} of {file.path}" if part.name else file.path
    epoch = file.state.get("epoch")
    ours = "run" in file.state  # others may count from 0
    age = (f", {epoch} epochs done" if ours else f", epoch {epoch}") if isinstance(epoch, int) else ""
    unused = len(part.entries) - len(found)
    return found, f"read {len(found)} tensors from {what}{age}; its head ({unused} tensors) is not used{changes}{note}"


def _from_beit3(encoder: nn.Module, file: File) -> tuple[File, str]:
    """An official BEiT-3 file by timm's names and for the encoder's size, and words on what it has beside the vision
    branch; other files as they are. A pretraining's file has no norm after the pooling, which then starts anew."""
    vision = {name: value for name, value in file.tensors.items() if re.match(r"beit3\.|fc_norm\.|head\.", name)}
    if not any(name.startswith("beit3.") for name in vision) or not hasattr(encoder, "patch_embed"):
        return file, ""
    from timm.models.vision_transformer import checkpoint_filter_fn

    # timm drops the text's embedding, the mask token and branch B, which pairs of images and texts alone use
    found = checkpoint_filter_fn(dict(vision), encoder)  # pyright: ignore[reportArgumentType]
    fresh = {name: value for name, value in encoder.state_dict().items() if name.startswith("fc_norm.")}
    note = "; BEiT-3's vision branch" + ("" if fresh.keys() <= found.keys() else ", its fc_norm is new")
    return file._replace(tensors={**fresh, **found}), note


def head_entries(encoder: nn.Module, file: File) -> dict[str, Tensor]:
    """What the file has for the encoder's head, by names such as ``weight`` and ``0.weight``."""
    head = head_of(encoder) + "."
    entries = _part_for(encoder, file).entries
    return {name.removeprefix(head): value for name, value in entries.items() if name.startswith(head)}


def sound_head_entries(encoder: nn.Module, file: File) -> dict[str, Tensor]:
    """:func:`head_entries`; UserError where they are odd."""
    entries, head = head_entries(encoder, file), head_of(encoder)
    files.refuse_odd({f"{head}.{name}": value for name, value in entries.items()}, file.path)
    return entries


def _part_for(encoder: nn.Module, file: File) -> Submodule:
    """The part with most of the encoder's names; the most specific where several have as many."""
    wanted = backbone_keys(encoder)
    return max(submodules(file), key=lambda part: len(wanted & part.entries.keys()))


def _changes(encoder: nn.Module, file: File) -> dict[str, int]:
    """What the project that wrote the file builds unlike torchvision and timm, see :func:`apply_changes`."""
    kept = recorded_changes(file.state, file.settings)
    if kept is not None:
        return kept
    part = _part_for(encoder, file)
    # every solo-learn model has an online classifier of this name
    solo_learns = "classifier.weight" in file.tensors and part.name in ("backbone", "encoder")
    if f"{part.name}.{_OWN_RESNET}".removeprefix(".") in file.tensors:
        return {"bare_stem": 1}
    # MoCo v3's ViTs and solo-learn's two with fixed positions (of MoCo v3 and MAE) have 12 heads of every such width
    if _has_fixed_positions(part) and (
        part.name == "base_encoder" or solo_learns or _rows_first(part.entries["pos_embed"])
    ):
        return {"num_heads": 12}
    return {"stem_padding": 2} if solo_learns and _has_small_stem(part.entries) else {}  # its base.py, for CIFAR


def recorded_changes(state: dict, card: dict[str, Any] | None = None) -> dict[str, int] | None:
    """The changes that a card, a probe's or a fine-tuning's checkpoint names; None for files that name none.

    A checkpoint of ours without the entry is of an unchanged encoder.
    """
    run = state.get("run")
    for kept in (card, run):
        if isinstance(kept, dict) and "changes" in kept:
            return dict(kept["changes"])
    return {} if isinstance(run, dict) and "seed" in run else None


def _has_fixed_positions(part: Submodule) -> bool:
    """Whether a ViT narrow enough for timm's heads to differ from MoCo v3's has MoCo v3's or MAE's sines and cosines
    as positions: both leave the class token's row at zero."""
    positions = part.entries.get("pos_embed")
    return (
        positions is not None and positions.ndim == 3 and positions.shape[-1] in (192, 384)
        and not positions[0, 0].any()
    )  # fmt: skip


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


def _guess(encoder: nn.Module, file: File) -> str:
    """Words for a log where a file's fixed positions leave open how many attention heads it was trained with."""
    heads = next((m.num_heads for m in encoder.modules() if hasattr(m, "num_heads") and hasattr(m, "qkv")), None)
    told = recorded_changes(file.state, file.settings) is not None
    if told or heads is None or not _has_fixed_positions(_part_for(encoder, file)):
        return ""
    return f"; {heads} attention heads as timm's ViT has, a guess: its fixed positions are not ordered as MoCo v3's are"


def apply_changes(encoder: nn.Module, changes: dict[str, int]) -> str:
    """Change what no tensor tells: ``num_heads`` of a timm ViT's attention, ``stem_padding`` of a ResNet's conv1,
    ``bare_stem``, a ResNet without ReLU and max-pool between bn1 and layer1.

    The encoder remembers them, see :func:`changes_of`. Returns words for a log, empty without changes.

    Raises:
        UserError: a change of this name is not known.
    """
    summary = describe_changes(changes)
    if changes:
        encoder.changes = changes  # type: ignore[assignment]
    if "stem_padding" in changes:
        conv = encoder.get_submodule("conv1")
        assert isinstance(conv, nn.Conv2d)
        conv.padding = (changes["stem_padding"],) * 2
    if "num_heads" in changes:
        use_heads(encoder, changes["num_heads"])
    if "bare_stem" in changes:
        for name in bare_names(encoder):
            encoder.set_submodule(name, nn.Identity())
    return f"; {summary}" if summary else ""


def describe_changes(changes: dict[str, int]) -> str:
    """What a change means, for people; empty without changes."""
    unknown = [name for name in changes if name not in CHANGES]
    if unknown:
        raise UserError(f"the file's encoder has the change {unknown[0]}, which this version does not know: update it.")
    return ", ".join(CHANGES[name].format(value) for name, value in changes.items())


def bare_names(encoder: nn.Module) -> list[str]:
    """The modules of a ResNet between bn1 and layer1: ``act1`` is timm's name for torchvision's ``relu``."""
    return [name for name in ("relu", "act1", "maxpool") if hasattr(encoder, name)]


def restore_changes(encoder: nn.Module, state: dict, path: str) -> None:
    """Change an encoder as that of a classifier's checkpoint is.

    Raises:
        UserError: ``--pretrained`` has changed it otherwise.
    """
    kept = _changes(encoder, File(path, state, _tensors(state, path), {}))
    had = changes_of(encoder).get("changes", kept)
    if had != kept:
        raise UserError(
            f"{path} was trained on an encoder with {describe_changes(kept) or 'no change'}, --pretrained gives one "
            f"with {describe_changes(had)}; leave --pretrained out to go on with the checkpoint's, or begin another "
            "--save-dir."
        )
    apply_changes(encoder, kept)


def changes_of(encoder: nn.Module) -> dict[str, dict[str, int]]:
    """The entry of a checkpoint's ``run`` that builds this encoder anew; none for one without changes."""
    return {"changes": encoder.changes} if hasattr(encoder, "changes") else {}  # type: ignore[dict-item]


def _is_counter(name: str) -> bool:
    # Files from before torch 0.4.1 (torchvision's first ResNets) lack BatchNorm's step counter, and nothing reads it.
    return name.endswith("num_batches_tracked")


def _check(encoder: nn.Module, found: dict[str, Tensor], path: str, hint: str) -> None:
    own = encoder.state_dict()
    wanted = backbone_keys(encoder)
    missing = [name for name in own if name in wanted and name not in found and not _is_counter(name)]
    odd = [name for name in found if name not in wanted]
    if missing or odd:
        submodules = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", odd)) if names]
        raise UserError(f"{path} does not fit the encoder: it {' and '.join(submodules)}; {hint}.")
    shapes = [n for n in found if found[n].shape != own[n].shape]
    if shapes:
        name = shapes[0]
        there, here = tuple(found[name].shape), tuple(own[name].shape)
        more = f" ({len(shapes)} such entries)" if len(shapes) > 1 else ""
        raise UserError(f"{path} does not fit the encoder: {name} is {there} there and {here} here{more}; {hint}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more entries" if len(names) > 3 else "")


def _hint(file: File, arch: str) -> str:
    theirs = named_arch(file)
    if theirs and theirs != arch:
        return f"the file was trained with -a {theirs}, give that"
    return "give the -a, --stem and --size it was trained with, and images with as many channels"


def _published(arch: str, name: str) -> dict:
    """Published weights of a torchvision network, from its cache or the network."""
    try:
        weights = torchvision.models.get_model_weights(arch)
    except ValueError as error:
        raise UserError(f"torchvision publishes no weights for -a {arch}; give --pretrained a file.") from error
    known = list(weights.__members__)
    if name not in known:
        raise UserError(f"torchvision has no weights {name} for -a {arch}; it has {', '.join(known) or 'none'}.")
    url = weights[name].url
    try:
        return dict(torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be fetched from {url} ({reason}); download it and give its path.") from error
