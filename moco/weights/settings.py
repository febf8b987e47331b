"""What an encoder was trained at, and what an evaluation takes: architecture, stem, size, channels, mean, deviation,
levels.

Checkpoints of ours hold it as ``run["images"]``, exported backbones in their card; beside an older checkpoint lie the
flags of its run, where None is the data set's default. A typed flag wins over the file, and the file over the data.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moco.data import Source
from moco.data.registry import MOST_CHANNELS, channel_statistics, dataset_of
from moco.files import run_of
from moco.models.encoder import SMALL, build_encoder
from moco.weights import layouts
from moco.weights.changes import changes_of
from moco.weights.layouts import FROM_CARD, PUBLISHED, File

SETTING_NAMES = ("arch", "stem", "size", "channels", "mean", "std", "levels")
# where a setting is from, beside FROM_CARD and the name of a file of flags
FROM_DATA, FROM_FLAGS, FROM_CHECKPOINT, FROM_TENSORS = "default", "given", "checkpoint", "its tensors"
ARCH = "resnet50"  # upstream's, where neither the flags nor a file name one


class Setting(NamedTuple):
    """One of :data:`SETTING_NAMES`."""

    value: Any
    origin: str  # words


# -------------------------------------------------------------------------------------------------- in a file


def images_of(
    encoder: nn.Module, mean: Any, std: Any, about: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """The entries of a checkpoint's ``run`` that build this encoder anew, say how it sees images and, of one that was
    read from a file, how that pretrained it (:mod:`moco.weights.origin`): plain values.

    Args:
        encoder: from :func:`moco.models.encoder.build_encoder`, which remembers its stem, size and channels; of one
            that was built elsewhere nothing is said.
        mean, std: of the channels, numbers or a tensor.
        about: :func:`moco.train.resume.about_run` of the run, whose images may have levels.
    """
    entries: dict[str, dict[str, Any]] = {"changes": changes_of(encoder)} if changes_of(encoder) else {}
    if built := getattr(encoder, "built", {}):
        levels = ((about or {}).get("data") or {}).get("levels")
        entries["images"] = {**built, "mean": _numbers(mean), "std": _numbers(std)}
        entries["images"] |= {"levels": levels} if levels else {}
    if made := getattr(encoder, "pretraining", {}):
        entries["pretraining"] = made
    return entries


def _numbers(values: Sequence[float] | Tensor) -> list[float]:
    """What was typed: the shortest numbers that are these in float32, in which images are normalised."""
    return [float(str(x)) for x in torch.as_tensor(values, dtype=torch.float32).cpu().numpy()]


def settings_of(file: File, arch: str = "", size: int | None = None) -> dict[str, Setting]:
    """What an encoder in a file was trained at and what says so: the file's own entries or card, else the flags of its
    run beside it, else its tensors. These tell architecture, stem, channels and a ViT's size, and nothing tells the
    rest of a foreign file.

    Args:
        arch, size: where another one is asked for.

    Raises:
        UserError: an architecture that cannot be built.
    """
    found = recorded(file.state, file.settings, file.beside)
    side, name = layouts.vit_size(layouts.known_part(file).entries), layouts.arch_of(file)
    if side and found.get("size", Setting(side, "")).origin != FROM_CHECKPOINT:
        found["size"] = Setting(side, FROM_TENSORS)
    if name:
        here = FROM_CARD if file.beside == FROM_CARD else FROM_CHECKPOINT
        found["arch"] = Setting(name, here if layouts.named_arch(file) else FROM_TENSORS)
    if (arch or name) and not {"stem", "channels"} <= set(found):
        found = _shape_of(file, arch or name, size or found.get("size", Setting(224, "")).value) | found
    return {name: found[name] for name in SETTING_NAMES if name in found}


def _shape_of(file: File, arch: str, size: int) -> dict[str, Setting]:
    """Stem and channels, by the first convolution in the file and in the network as its library has it."""
    with torch.random.fork_rng(devices=[]):  # a run's own first weights stay what they are
        encoder = build_encoder(arch, 1, stem="imagenet", size=size)
    own, theirs = encoder.state_dict().get("conv1.weight"), layouts.part_for(encoder, file).entries
    small = layouts.has_small_stem(theirs) and own is not None and own.shape[2:] != theirs["conv1.weight"].shape[2:]
    first = next((name for name, module in encoder.named_modules() if isinstance(module, nn.Conv2d)), "")
    weight = theirs.get(f"{first}.weight")
    channels = weight.shape[1] if weight is not None and weight.ndim == 4 else 3
    return _told_by_tensors("cifar" if small else "imagenet", channels if channels <= MOST_CHANNELS else 3)


def _told_by_tensors(stem: str, channels: int) -> dict[str, Setting]:
    return {"stem": Setting(stem, FROM_TENSORS), "channels": Setting(channels, FROM_TENSORS)}


def recorded(state: dict, flags: dict[str, Any], name: str) -> dict[str, Setting]:
    """What a file's own entries say, and for the rest its card or the flags of its run, which are called ``name``."""
    run = run_of(state)
    ours = "kind" in flags or name.endswith("_settings.json")  # any file.json beside file.pth may be another program's
    found = _named(_resolved(flags), name) if ours else {}
    tuned = run.get("settings")  # an older fine-tuning's, whose flags name no size where it was the data's
    if isinstance(tuned, dict) and isinstance(tuned.get("--size"), int):
        found["size"] = Setting(tuned["--size"], FROM_CHECKPOINT)
    images = run.get("images")
    return found | _named(images if isinstance(images, dict) else {}, FROM_CHECKPOINT)


def _named(values: dict[str, Any], origin: str) -> dict[str, Setting]:
    return {name: Setting(values[name], origin) for name in SETTING_NAMES if values.get(name) is not None}


def _resolved(flags: dict[str, Any]) -> dict[str, Any]:
    """A card, or a run's flags with its data set's own values for those that were left out; without architecture and
    stem, which the file and its tensors tell."""
    if "kind" in flags:
        return flags
    own = dataset_of(flags.get("dataset"))
    channels = flags.get("channels") or own.channels
    mean, std = channel_statistics(flags.get("dataset"), channels, flags.get("mean"), flags.get("std"))
    size, levels = flags.get("size") or own.size, flags.get("levels")
    return {"size": size, "channels": channels, "mean": mean, "std": std, "levels": levels}


# --------------------------------------------------------------------------------------------- in an evaluation


class Settled(NamedTuple):
    """The settings of an evaluation: its flags, completed from a file; see :func:`settle_from_file`."""

    args: Namespace
    path: str  # of the file, empty for none
    taken: dict[str, Setting]
    warnings: list[str]

    def of(self, source: Source) -> tuple[int, list[float], list[float]]:
        """The side of the views in pixels, mean and deviation of the channels; the data's own where none is known.

        Raises:
            UserError: --mean or --std has not one number a channel.
        """
        small = self.taken.get("stem") == Setting("cifar", FROM_TENSORS)
        size = self.args.size or source.native_size or (SMALL // 2 if small else 224)
        return size, *self.statistics(source.channels, size)

    def statistics(self, channels: int, size: int) -> tuple[list[float], list[float]]:
        """Mean and deviation of the channels, as :meth:`of` has them."""
        mean, std = channel_statistics(self.args.dataset, channels, self.args.mean, self.args.std)
        for name, value in zip(SETTING_NAMES[2:6], (size, channels, mean, std), strict=True):
            self.taken.setdefault(name, Setting(value, FROM_DATA))
        return mean, std

    @property
    def summary(self) -> str:
        """For the end of a log line, after :meth:`of`: a line with the settings and where they are from, and one for
        each flag that differs from what the file was trained with. Empty without a file."""
        lines = [f"settings of {self.path}: {listed(self.taken)}", *self.warnings] if self.path else []
        return "".join("\n" + line for line in lines)


def settle_from_file(
    args: Namespace, path: str, dataset: str | None = None, opened: File | None = None
) -> Settled:  # fmt: skip
    """Put a file's settings into the flags that were not typed; what neither has stays None (``arch``: resnet50).

    Args:
        args: with the flags of :data:`SETTING_NAMES`, of which None, an empty word and ``auto`` mean that none was
            typed.
        path: a checkpoint file, ``torchvision:NAME``, or empty for none.
        dataset: whose statistics were asked for by name.
        opened: the file, where it is open already.

    Raises:
        UserError: the file cannot be read.
    """
    known = _known(args, path, opened)
    taken: dict[str, Setting] = {}
    warnings = []
    for name in SETTING_NAMES:
        asked = getattr(args, name, None)
        if asked is None and dataset and name in ("mean", "std"):
            channels = taken.get("channels", Setting(3, FROM_DATA)).value
            asked = channel_statistics(dataset, channels)[name == "std"]
            setattr(args, name, asked)
        if asked not in (None, "", "auto"):
            taken[name] = Setting(asked, FROM_FLAGS)
            if name in known and _differ(known[name], asked):
                warnings.append(_warning(name, asked, known[name].value, path))
        elif _fits(name, known, taken):
            taken[name] = known[name]
            setattr(args, name, known[name].value)
    if args.arch is None:
        args.arch, taken["arch"] = ARCH, Setting(ARCH, FROM_DATA)
    return Settled(args, path, {name: taken[name] for name in SETTING_NAMES if name in taken}, warnings)


def _known(args: Namespace, path: str, opened: File | None) -> dict[str, Setting]:
    if path.startswith(PUBLISHED):
        return _told_by_tensors("imagenet", 3)
    return settings_of(opened or layouts.open_file(path), args.arch or "", args.size) if path else {}


def _fits(name: str, known: dict[str, Setting], taken: dict[str, Setting]) -> bool:
    """Whether the file has the setting; statistics of colours are none of images that --channels 1 made grey."""
    if name not in known:
        return False
    return name not in ("mean", "std") or "channels" not in taken or len(known[name].value) == taken["channels"].value


def _differ(known: Setting, asked: Any) -> bool:
    """Whether a typed value is another; what the tensors tell is checked when they are loaded."""
    if known.origin == FROM_TENSORS:
        return False
    if isinstance(asked, str):
        return known.value.removeprefix("timm/") != asked.removeprefix("timm/")
    one, other = (list(x) if isinstance(x, Sequence) else [x] for x in (known.value, asked))
    close = (math.isclose(x, y, rel_tol=1e-6, abs_tol=1e-9) for x, y in zip(one, other, strict=False))
    return len(one) != len(other) or not all(close)  # up to float32's rounding


def _warning(name: str, asked: Any, value: Any, path: str) -> str:
    had = f"{_text(value)} px that {path} was trained at" if name == "size" else f"{_text(value)} that {path} has"
    return f"{_flag(name)} {_text(asked)} differs from the {had}; {_text(asked)} is used"


def listed(settings: dict[str, Setting]) -> str:
    """As flags, grouped by where they are from."""
    groups: dict[str, list[str]] = {}
    for name, (value, origin) in settings.items():
        groups.setdefault(origin, []).append(f"{_flag(name)} {_text(value)}")
    return "; ".join(f"{' '.join(flags)} ({origin})" for origin, flags in groups.items())


def _flag(name: str) -> str:
    return "-a" if name == "arch" else f"--{name}"


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        *numbers, last = value
        more = last if isinstance(last, str) else f"{last:.6g}"  # of levels: of float images alone
        return " ".join([*(f"{x:.6g}" for x in numbers), more])
    return str(value)
