"""A data set checked: what each mode would take of it, what is refused, what a first run may be given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moco.data.check.look import Looked, look_at_all
from moco.data.check.split import shared_images, split_report
from moco.data.open import open_sources
from moco.data.sources.base import Source, Sources, without_labels
from moco.data.sources.splits import find_splits
from moco.data.summary import WARNING
from moco.errors import UserError


@dataclass
class Asked:
    """What is to be checked and how.

    Args:
        path: a folder, a list or shards; of a known data set its folder.
        dataset: the name of a known data set.
        val_path: held-out images.
        channels: to decode to; None for the data set's own.
        levels: the values that become black and white; None for those of the files' types.
        download: a known data set's files.
        workers: processes that read.
        most_bad: unreadable images that a run accepts.
        settings: what --auto takes in place of defaults, by the number of images and their short side in pixels.
    """

    path: str | None
    dataset: str | None = None
    val_path: str | None = None
    channels: int | None = None
    levels: list[float] | None = None
    download: bool = False
    workers: int = 0
    most_bad: int = 100
    settings: Callable[[int, float], dict[str, Any]] = lambda images, side: {}


@dataclass
class Opened:
    """The splits that could be opened, by name, why others could not, and why there is no labelled pair."""

    splits: dict[str, Source] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    no_pair: str = ""


def check(asked: Asked) -> dict[str, Any]:
    """All that is known of a data set once each of its files was read; plain values, see docs/own_data.md."""
    opened = _open(asked)
    looked = {name: list(look_at_all(source, asked.workers, name)) for name, source in opened.splits.items()}
    reports = {name: split_report(source, looked[name]) for name, source in opened.splits.items()}
    refused = opened.refused + [
        why for name, source in opened.splits.items() if (why := _too_many_bad(source, looked[name], asked.most_bad))
    ]
    shared = []
    if "train" in looked and "val" in looked:
        shared = shared_images(opened.splits["train"], looked["train"], opened.splits["val"], looked["val"])
    return {
        "data": asked.path,
        "dataset": asked.dataset,
        "refused": list(dict.fromkeys(refused)),
        "warnings": _warnings(reports, shared),
        "splits": reports,
        "shared": shared,
        "modes": _modes(opened),
        "suggested": _suggested(reports, asked.settings),
    }


# ------------------------------------------------------------------------------------------------------- opening


def _open(asked: Asked) -> Opened:
    try:
        sources = open_sources(
            asked.dataset, asked.path, download=asked.download, val_path=asked.val_path, channels=asked.channels,
            levels=asked.levels,
        )  # fmt: skip
    except UserError as error:
        parts = _parts(asked) if asked.dataset in (None, "folder") and asked.path else {}
        found = _one_by_one(parts, asked)
        found.refused[:0] = [str(error)]
        found.no_pair = str(error)
        return found
    found = Opened(_named(sources), no_pair=sources.no_pair)
    if sources.train is None and asked.path:  # held-out images without a label are read too
        others = _one_by_one({name: path for name, path in _parts(asked).items() if name == "val"}, asked)
        found.splits.update(others.splits)
        found.refused += others.refused
        found.refused += _other_classes(found)
    return found


def _named(sources: Sources) -> dict[str, Source]:
    """The splits by name: a known data set may pretrain on more than its labelled images."""
    if sources.train is None or sources.val is None or sources.train is sources.pretrain:
        named = {"train": sources.pretrain, "val": sources.val}
    else:
        named = {"pretrain": sources.pretrain, "train": sources.train, "val": sources.val}
    return {name: source for name, source in named.items() if source is not None}


def _parts(asked: Asked) -> dict[str, str]:
    """Where a user's training and held-out images lie."""
    path = asked.path or ""
    there = find_splits(path).paths
    held_out = asked.val_path or ("train" in there and there.get("val", there.get("test")))
    return {"train": there.get("train", path), **({"val": held_out} if held_out else {})}


def _one_by_one(parts: dict[str, str], asked: Asked) -> Opened:
    found = Opened()
    for name, path in parts.items():
        try:
            found.splits[name] = open_sources(None, path, channels=asked.channels, levels=asked.levels).pretrain
        except UserError as error:
            found.refused.append(str(error))
    return found


def _other_classes(found: Opened) -> list[str]:
    """That two labelled splits make no pair: it is their classes that differ."""
    both = [found.splits.get(name) for name in ("train", "val")]
    labelled = all(source is not None and source.labels is not None for source in both)
    return [found.no_pair] if labelled and found.no_pair else []


# -------------------------------------------------------------------------------------------------- what is said


def _too_many_bad(source: Source, looked: list[Looked], most: int) -> str:
    bad = [index for index, one in enumerate(looked) if one.bad]
    if len(bad) <= most and len(bad) < len(looked):
        return ""
    first = f"{source.name_of(bad[0])} ({looked[bad[0]].bad})"
    return (
        f"{len(bad):,} of the {len(looked):,} images of {source.name} cannot be read, the first {first}: a run "
        f"stops above --max-bad-images {most}; restore or remove them"
    )


def _warnings(reports: dict[str, Any], shared: list[dict]) -> list[str]:
    """What no run refuses and somebody should know."""
    said = []
    for name, report in reports.items():
        if bad := report["unreadable"]:
            said.append(f"{name}: {images(len(bad))} cannot be read: others would take their places")
        if groups := report["duplicates"]:
            more = sum(len(group["images"]) - 1 for group in groups)
            said.append(f"{name}: {images(more)} repeated, as {' and '.join(groups[0]['images'][:2])}")
        if odd := [group for group in groups if group["labels_differ"]]:
            said.append(
                f"{name}: {images(len(odd))} repeated with another label, as {' and '.join(odd[0]['images'][:2])}"
            )
        said += [note.removeprefix(WARNING) for note in report["notes"] if note.startswith(WARNING)]
        if (classes := report["classes"]) and classes["empty"]:
            said.append(f"{name}: {classes['empty']:,} of {classes['count']:,} classes have no image")
    if shared:
        first = shared[0]
        said.append(
            f"{len(shared):,} of the held-out images equal to training images, as {first['val']} and {first['train']}: "
            "accuracy on them is none on new images"
        )
    return said


def images(count: int) -> str:
    """So many images, in words."""
    return f"{count:,} image" + "s" * (count != 1)


def _modes(opened: Opened) -> dict[str, Any]:
    """What each mode would take; "no" says why it would take nothing."""
    train, val = opened.splits.get("train"), opened.splits.get("val")
    source = opened.splits.get("pretrain", train)
    none = opened.refused[0] if opened.refused else ""
    pretrain: dict[str, Any] = {"no": none or "there is no training image"}
    supcon = dict(pretrain)
    if source is not None:
        pretrain = {"images": len(source), "labelled": source.labels is not None}
        classes = len(source.classes or ())
        supcon = {"images": len(source), "classes": classes}
        if source.labels is None:
            supcon = {"no": without_labels(source)}
    probe: dict[str, Any] = {"no": opened.no_pair or none or "there is no training image"}
    if train is not None and val is not None and not opened.no_pair:
        probe = {"train": len(train), "val": len(val), "classes": len(train.classes or ())}
    return {"pretrain": pretrain, "probe": probe, "supcon": supcon}


def _suggested(reports: dict[str, Any], settings: Callable[[int, float], dict[str, Any]]) -> dict[str, Any] | None:
    """What a first run may be given; None without readable training images."""
    report = reports.get("pretrain", reports.get("train"))
    if report is None or report["sizes"] is None:
        return None
    found = settings(report["images"], report["sizes"]["short_side"][1])
    for name in ("mean", "std"):
        if report["std"] and min(report["std"]) > 0:
            found[name] = [round(number, 4) for number in report[name]]
    return found
