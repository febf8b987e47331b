"""Put a file's weights into an encoder, and refuse, naming the keys, what does not fit.

Which entries of a file are the encoder's, ours or another project's, says :mod:`moco.weights.layouts`; what its
project builds otherwise, :mod:`moco.weights.changes`; what it was trained at, :mod:`moco.weights.settings`.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

from moco import distributed, files
from moco.errors import UserError, one_line
from moco.models.encoder import backbone_keys, build_encoder, head_of
from moco.weights.changes import adapt, changes_of
from moco.weights.layouts import (
    PARTS,
    PUBLISHED,
    File,
    Submodule,
    foreign_words,
    known_part,
    module_names,
    named_arch,
    open_file,
    part_for,
    submodules,
    tensors_of,
)
from moco.weights.nests import KNOWN
from moco.weights.origin import pretraining_of
from moco.weights.settings import settings_of
from moco.weights.translate import from_beit3, translate


class Backbone(NamedTuple):
    """An encoder with a file's weights, in eval mode, and how it was built."""

    encoder: nn.Module  # its head is fresh
    arch: str
    stem: str  # "cifar" or "imagenet"
    size: int  # pixels
    channels: int
    changes: dict[str, int]  # see :func:`moco.weights.changes.apply_changes`
    file: File
    summary: str  # what was read
    pretraining: dict  # see :mod:`moco.weights.origin`; empty where it is not known


class UnfitWeightsError(UserError):
    """A file's tensors are not those of the encoder; ``what``: which ones."""

    def __init__(self, what: str, hint: str) -> None:
        self.what = what
        super().__init__(f"{what}; {hint}.")


class Read(NamedTuple):
    """What a file has for an encoder."""

    tensors: dict[str, Tensor]  # all but the head's
    head: dict[str, Tensor]  # by names such as ``weight`` and ``0.weight``
    part: str  # such as encoder_q, empty for a file that is nothing else
    file: File
    more: str  # what the log must say besides, each after a semicolon

    @property
    def age(self) -> str:
        """Of the weights, behind a comma; empty where the file does not say it."""
        epoch = self.file.state.get("epoch")
        if not isinstance(epoch, int):
            return ""
        return f", {epoch} epochs done" if "run" in self.file.state else f", epoch {epoch}"  # others may count from 0


def load_backbone(encoder: nn.Module, path: str, arch: str = "") -> tuple[dict[str, Tensor], str]:
    """Put a file's weights into the encoder, all but the head; every process calls, and published weights are fetched
    by one of each node first. What the file's project does unlike torchvision and timm is changed in the encoder.

    Args:
        encoder: from :func:`moco.models.encoder.build_encoder`.
        path: a checkpoint file, or ``torchvision:NAME`` for published weights of ``arch``.
        arch: the encoder's name, for ``torchvision:NAME`` and for messages.

    Returns:
        What was loaded, and a sentence that says what was read.

    Raises:
        UserError: unreadable, no such weights, or anything but the head is missing, unknown, of another shape or odd
            (:func:`moco.files.odd_tensors`).
    """
    return _told(_read_into(encoder, open_or_fetch(path, arch), arch))


def read_backbone(encoder: nn.Module, path: str, arch: str = "") -> Read:
    """The same with the file's head, which is not loaded either."""
    return _read_into(encoder, open_or_fetch(path, arch), arch)


def open_or_fetch(path: str, arch: str) -> File:
    """A file, or published weights of ``arch``, which one process of each node fetches first; every process calls."""
    published = path.startswith(PUBLISHED)
    opening = partial(_published, path, arch) if published else partial(open_file, path)
    return distributed.first_on_node(opening, wait=published)


def open_backbone(
    path: str, arch: str = "", stem: str = "auto", size: int | None = None, fill: bool = True
) -> Backbone:
    """An encoder built for the file, with the file's weights; what is not given is found in the file.

    Args:
        path: a checkpoint file.
        arch: for a file that names none and is neither a ResNet nor a ViT.
        stem, size: as in :func:`moco.models.encoder.build_encoder`; by default the file's, see :func:`settings_of`.
        fill: without, the encoder keeps fresh weights and the file may have odd ones.

    Raises:
        UserError: unreadable, no encoder in it, an architecture that cannot be found, or weights that do not fit it or
            are odd.
    """
    file = open_file(path)
    known = {name: setting.value for name, setting in settings_of(file, arch, size).items()}
    if not (arch or "arch" in known):
        raise UserError(_unknown_architecture(file))
    arch, stem, channels = arch or known["arch"], known["stem"] if stem == "auto" else stem, known["channels"]
    size = int(size or known.get("size") or (32 if stem == "cifar" else 224))
    encoder = build_encoder(arch, 1, stem=stem, size=size, in_chans=channels)
    _, summary = _told(_read_into(encoder, file, arch, fill))
    made: Any = encoder.pretraining
    return Backbone(encoder.eval(), arch, stem, size, channels, changes_of(encoder), file, summary, made)


def fill_backbone(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load checked tensors; only the head is left as it was."""
    missing, unexpected = encoder.load_state_dict(tensors, strict=False)
    lost = {name for name in missing if not _is_counter(name)}
    assert not unexpected
    assert not lost & backbone_keys(encoder), "more than the head is missing"


def fill_network(encoder: nn.Module, state_dict: dict[str, Tensor], path: str) -> None:
    """Load every tensor, the classifier's too, of a file whose names begin with ``module.``.

    Raises:
        UserError: other names or shapes, or odd tensors.
    """
    found = {str(name).removeprefix("module."): value for name, value in state_dict.items()}
    if odd := [name for name, value in found.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{path} does not fit: its entry {odd[0]!r} is no tensor; take another copy.")
    own = encoder.state_dict()
    if other := differing(own, found):
        raise UserError(
            f"{path} does not fit: {other[0]} differs ({len(other)} entries do); check --stem, --size and that the "
            "data has the classes it was trained on."
        )
    files.refuse_odd(found, path, own)
    encoder.load_state_dict(found)


def differing(own: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """Names of the entries that one of two networks lacks or has in another shape."""
    return [n for n in {**own, **found} if n not in own or n not in found or own[n].shape != found[n].shape]


def _published(path: str, arch: str) -> File:
    """Published weights of a torchvision network, from its cache or the network."""
    name = path.removeprefix(PUBLISHED)
    try:
        weights = torchvision.models.get_model_weights(arch)
    except ValueError as error:
        raise UserError(f"torchvision publishes no weights for -a {arch}; give --pretrained a file.") from error
    known = list(weights.__members__)
    if name not in known:
        raise UserError(f"torchvision has no weights {name} for -a {arch}; it has {', '.join(known) or 'none'}.")
    url = weights[name].url
    try:
        state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        reason = one_line(error)
        raise UserError(f"{name} cannot be fetched from {url} ({reason}); download it and give its path.") from error
    return File(path, dict(state), tensors_of(dict(state), path), {})


def _read_into(encoder: nn.Module, file: File, arch: str, fill: bool = True) -> Read:
    """The file's tensors, those for everything but the head checked against the encoder and with ``fill`` put into
    it."""
    file, note = from_beit3(encoder, file)
    part = part_for(encoder, file)
    others = _other_encoders(encoder, file, part)
    part, more = translate(encoder, part)
    head = head_of(encoder) + "."
    found = {name: value for name, value in part.entries.items() if not name.startswith(head)}
    _check(encoder, found, file, arch)
    changes = adapt(encoder, file)
    own_head = {name.removeprefix(head): value for name, value in part.entries.items() if name not in found}
    encoder.pretraining = pretraining_of(file, own_head).value  # type: ignore[assignment]
    if fill:
        files.refuse_odd(found, file.path, encoder.state_dict())
        fill_backbone(encoder, found)
    name = ".".join(filter(None, ("" if file.nest in KNOWN else file.nest, part.name)))
    return Read(found, own_head, name, file, changes + note + more + others)


def _other_encoders(encoder: nn.Module, file: File, part: Submodule) -> str:
    """What else a file has that would fit, where no project's own layout says which one it is."""
    named, others = file.nest, [*file.others]
    if not others and part.name not in PARTS:
        wanted, named = backbone_keys(encoder), part.name
        fit = [other for other in submodules(file, encoder) if wanted & other.entries.keys()]
        others = [o.name for o in fit if o.name != named and _alike(wanted, o.entries, part.entries)]
    if not others:
        return ""
    return (f"; a guess: {named} is read, and {', '.join(others)} in the file is not "
            "(docs/evaluation.md, whose checkpoints, says how to take another)")  # fmt: skip


def _alike(wanted: set[str], other: dict[str, Tensor], chosen: dict[str, Tensor]) -> bool:
    """Whether the same entries are there with other numbers."""
    names = [name for name in wanted & chosen.keys() if name in other]
    return 2 * len(names) > len(wanted & chosen.keys()) and any(
        other[n].shape != chosen[n].shape or not torch.equal(other[n], chosen[n]) for n in names
    )


def _told(read: Read) -> tuple[dict[str, Tensor], str]:
    """The tensors and a sentence on what was read."""
    what = f"{read.part} of {read.file.path}" if read.part else read.file.path
    said = f"read {len(read.tensors)} tensors from {what}{read.age}"
    return read.tensors, f"{said}; its head ({len(read.head)} tensors) is not used{read.more}"


def _check(encoder: nn.Module, found: dict[str, Tensor], file: File, arch: str) -> None:
    theirs = named_arch(file)
    hint = "give the -a, --stem and --size it was trained with, and images with as many channels"
    hint = f"the file was trained with -a {theirs}, give that" if theirs and theirs != arch else hint
    own, wanted = encoder.state_dict(), backbone_keys(encoder)
    if foreign := foreign_words(found):
        hint = f"it {foreign}"
    elif not wanted & found.keys():
        held = module_names(file.tensors)
        hint = f"it holds {held} and no such encoder; give the file that the encoder lies in, or its -a"
    missing = [name for name in own if name in wanted and name not in found and not _is_counter(name)]
    unknown = [name for name in found if name not in wanted]
    if missing or unknown:
        said = [f"{word} {_some(names)}" for word, names in (("lacks", missing), ("has unknown", unknown)) if names]
        raise UnfitWeightsError(f"{file.path} does not fit the encoder: it {' and '.join(said)}", hint)
    shapes = [name for name in found if found[name].shape != own[name].shape]
    if shapes:
        there, here = tuple(found[shapes[0]].shape), tuple(own[shapes[0]].shape)
        more = f" ({len(shapes)} such entries)" if len(shapes) > 1 else ""
        raise UnfitWeightsError(
            f"{file.path} does not fit the encoder: {shapes[0]} is {there} there and {here} here{more}", hint
        )


def _unknown_architecture(file: File) -> str:
    held = known_part(file).entries
    if foreign := foreign_words(held):
        return f"{file.path} {foreign}."
    return (
        f"{file.path} does not name its architecture and its {len(held)} tensors ({module_names(held)}) are of no "
        "known one; give it by -a, or, where they are a head's alone, the file that the encoder lies in."
    )


def _is_counter(name: str) -> bool:
    # Files from before torch 0.4.1 (torchvision's first ResNets) lack BatchNorm's step counter, and nothing reads it.
    return name.endswith("num_batches_tracked")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more entries" if len(names) > 3 else "")
