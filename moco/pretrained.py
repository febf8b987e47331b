"""Read an encoder's weights from the layouts of this field, and refuse, naming the keys, what does not fit.

Layouts: ours, official MoCo v1 and v2 and the released SynCo (``state_dict`` with ``module.encoder_q.*``), a linear
classifier's (``module.*``), torchvision's and any plain dictionary of an encoder's tensors.
"""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor, nn

from moco import checkpoint
from moco.encoder import backbone_keys, head_of
from moco.errors import UserError

PUBLISHED = "torchvision:"  # followed by a name such as IMAGENET1K_V2
_NESTS = ("state_dict", "model")


def load_backbone(encoder: nn.Module, path: str, arch: str = "") -> str:
    """Put a file's weights into the encoder, all but the head; returns a sentence that says what was read.

    Args:
        encoder: from :func:`moco.encoder.build_encoder`.
        path: a checkpoint file, or ``torchvision:NAME`` for published weights of ``arch``.
        arch: the encoder's name, for ``torchvision:NAME`` and for messages.

    Raises:
        UserError: unreadable, no such weights, or anything but the head is missing, unknown or of another shape.
    """
    tensors, sentence = read_backbone(encoder, path, arch)
    fill_backbone(encoder, tensors)
    return sentence


def read_backbone(encoder: nn.Module, path: str, arch: str = "") -> tuple[dict[str, Tensor], str]:
    """The file's tensors for everything but the head, checked against the encoder, and a sentence on what was read."""
    state = _published(arch, path.removeprefix(PUBLISHED)) if path.startswith(PUBLISHED) else checkpoint.read(path)
    part, entries = _encoder_entries(_tensors(state, path))
    head = head_of(encoder) + "."
    found = {name: value for name, value in entries.items() if not name.startswith(head)}
    _check(encoder, found, path, _hint(state, arch))
    what = f"{part} of {path}" if part else path
    epoch = state.get("epoch")
    age = f", epoch {epoch}" if isinstance(epoch, int) else ""
    unused = len(entries) - len(found)
    return found, f"read {len(found)} tensors from {what}{age}; its head ({unused} tensors) is not used"


def fill_backbone(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load checked tensors; only the head is left as it was."""
    missing, unexpected = encoder.load_state_dict(tensors, strict=False)
    allowed = set(encoder.state_dict()) - backbone_keys(encoder)
    assert not unexpected
    assert {name for name in missing if not _is_counter(name)} == allowed, "more than the head is missing"


def _tensors(state: dict, path: str) -> dict[str, Tensor]:
    """The dictionary of tensors, wherever the file keeps it, without the prefixes of wrappers (DDP, torch.compile)."""
    for nest in _NESTS:
        if isinstance(state.get(nest), dict):
            state = state[nest]
            break
    found = {}
    for name, value in state.items():
        if isinstance(name, str) and isinstance(value, Tensor):
            found[name.removeprefix("module.").replace("_orig_mod.", "")] = value
    if not found:
        raise UserError(f"{path} holds no weights: neither tensors nor a state_dict with tensors.")
    return found


def _encoder_entries(tensors: dict[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """The query encoder of a contrastive checkpoint, else all entries."""
    prefix = "encoder_q."
    chosen = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return ("encoder_q", chosen) if chosen else ("", tensors)


def _is_counter(name: str) -> bool:
    # Files from before torch 0.4.1 (torchvision's first ResNets) lack BatchNorm's step counter, and nothing reads it.
    return name.endswith("num_batches_tracked")


def _check(encoder: nn.Module, found: dict[str, Tensor], path: str, hint: str) -> None:
    own = encoder.state_dict()
    wanted = backbone_keys(encoder)
    missing = [name for name in own if name in wanted and name not in found and not _is_counter(name)]
    odd = [name for name in found if name not in wanted]
    if missing or odd:
        parts = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", odd)) if names]
        raise UserError(f"{path} does not fit the encoder: it {' and '.join(parts)}; {hint}.")
    shapes = [n for n in found if found[n].shape != own[n].shape]
    if shapes:
        name = shapes[0]
        there, here = tuple(found[name].shape), tuple(own[name].shape)
        more = f" ({len(shapes)} such entries)" if len(shapes) > 1 else ""
        raise UserError(f"{path} does not fit the encoder: {name} is {there} there and {here} here{more}; {hint}.")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more entries" if len(names) > 3 else "")


def _hint(state: dict, arch: str) -> str:
    theirs = state.get("arch")
    if isinstance(theirs, str) and theirs != arch:
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
