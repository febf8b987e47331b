"""Which folders of a data set hold its training, validation and test images, whatever they are called.

``train``, ``val`` and ``test`` are taken as they are. Other spellings (``Train``, ``training``, ``train2017``,
``validation``) are taken where there are no plain ones, in one order of preference, and told.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from typing import NamedTuple

from moco.data.sources.folders import Listing, list_directory, some
from moco.data.sources.names import holds_images, is_about_images
from moco.errors import UserError

SPLITS = ("train", "val", "test")
_WORDS = {  # in the order of preference
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation", "held[-_ ]?out"),
    "test": ("test", "testing"),
}
_MORE = "set|data|dataset|images|imgs|split|mini|small|full|hr"
_FORM = rf"((?:ilsvrc\d*[-_])?(?:img[-_])?){{}}((?:[-_ ]?(?:{_MORE}))?(?:[-_ ]?(?:dev)?\d{{{{2,4}}}})?)"
_FORMS = [
    (split, rank, re.compile(_FORM.format(f"({word})"), re.IGNORECASE))
    for split, words in _WORDS.items()
    for rank, word in enumerate(words)
]
DEEP = 4  # folders around the splits: ILSVRC/Data/CLS-LOC/train has three
CROWD = 2  # times as many folders of images as splits beside them, and train is the name of a class


class Splits(NamedTuple):
    """The folders of a data set by split, of those that there are, and notes of what was guessed."""

    paths: dict[str, str]
    notes: list[str]


class _Claim(NamedTuple):
    """A folder that may be a split; the lowest is the best claim."""

    rank: int
    affix: str  # what is before and behind the word, such as 2017
    other_case: bool
    name: str


def find_splits(folder: str) -> Splits:
    """The splits in ``folder``, or in the one folder of images in it.

    Without ``train`` there are only ``val`` and ``test`` by these names, and nothing beside them; nothing where train
    is a class among others. Raises UserError where two folders have an equal claim to be the training images.
    """
    root, notes = folder, []
    for _ in range(DEEP):
        top = list_directory(root) if os.path.isdir(root) else Listing([], [], [], 0)
        paths, notes = _splits_in(root, top)
        if paths and root != folder:
            notes.insert(0, f"{root} is read, the one folder with splits in {folder}")
        inner = "" if paths or notes else _inner(top)
        if not inner:
            return Splits(paths, notes)
        root = os.path.join(root, inner)
    return Splits({}, [])


def _inner(top: Listing) -> str:
    """The one folder that may hold splits, alone or beside annotations."""
    about = [name for name in top.folders if is_about_images(name)]
    named = [name for name in top.folders if holds_images(name)]
    rest = named or [name for name in top.folders if name not in about]
    return rest[0] if len(rest) == 1 and len(rest) + len(about) == len(top.folders) and not top.images else ""


def _claims(folders: Sequence[str]) -> dict[str, list[_Claim]]:
    """Of each split the folders that may be it, the best first."""
    claims = _claims_by_name(folders)
    if "train" not in claims and any("train" in name.lower() for name in folders):
        claims = _begun_alike(folders) or claims
    return {split: sorted(found) for split, found in claims.items()}


def _claims_by_name(folders: Sequence[str]) -> dict[str, list[_Claim]]:
    claims: dict[str, list[_Claim]] = {}
    for name in folders:
        for split, rank, form in _FORMS:
            if found := form.fullmatch(name):
                claim = _Claim(rank, (found[1] + found[3]).lower(), not name.islower(), name)
                claims.setdefault(split, []).append(claim)
                break
    return claims


def _begun_alike(folders: Sequence[str]) -> dict[str, list[_Claim]]:
    """The claims of ``cars_train`` and ``cars_test``, where one beginning alone has training and other images."""
    groups: dict[str, dict[str, list[_Claim]]] = {}
    for name in folders:
        for at in (found.end() for found in re.finditer("[-_ .]", name)):
            for split, claims in _claims_by_name([name[at:]]).items():
                group = groups.setdefault(name[:at].lower(), {})
                group.setdefault(split, []).append(claims[0]._replace(name=name))
    whole = [found for found in groups.values() if "train" in found and len(found) > 1]
    return whole[0] if len(whole) == 1 else {}


def splits_named(files: Sequence[str]) -> list[str]:
    """The splits that files are of by a word in their names (``imagenet1k-validation-00.tar``), in the order of
    ``SPLITS``."""
    words = {word for file in files for word in re.split(r"[^a-z]+", file.lower())}
    found = {split for word in words for split in _claims_by_name([word])}
    return [split for split in SPLITS if split in found]


def _splits_in(root: str, top: Listing) -> tuple[dict[str, str], list[str]]:
    claims = _claims(top.folders)
    claimed = {claim.name for found in claims.values() for claim in found}
    others = [name for name in top.folders if name not in claimed]
    if "train" not in claims:
        held_out = {split: os.path.join(root, split) for split in SPLITS if split in top.folders}
        return (held_out if not others else {}), []
    chosen, notes = _chosen(root, claims)
    others = [name for name in others if not is_about_images(name) and not _is_of_split(name)]
    others = [name for name in others if _shows_images(os.path.join(root, name))]
    if len(others) >= CROWD * len(chosen) and _is_flat(os.path.join(root, chosen["train"])):
        told = f"{root} is read as class folders, {chosen['train']} among them, as there are {some(others)} beside it"
        return {}, [told]
    if others:
        notes.append(f"{some(others)} in {root} not read, as there is {chosen['train']}")
    if top.images:
        notes.append(f"the images directly in {root} ({len(top.images):,}) not read, as there is {chosen['train']}")
    return {split: os.path.join(root, name) for split, name in chosen.items()}, notes


def _chosen(root: str, claims: dict[str, list[_Claim]]) -> tuple[dict[str, str], list[str]]:
    """The name of each split's folder, and notes of those that are not the plain one."""
    notes: list[str] = []
    chosen: dict[str, str] = {}
    for split in filter(claims.get, SPLITS):
        affix = "" if split == "train" else claims["train"][0].affix
        found = sorted(claims[split], key=lambda claim: (claim.rank, claim.affix != affix, *claim[1:]))
        rivals = [claim.name for claim in found if _is_rival(claim, found[0], affix)]
        if len(rivals) > 1 and split == "train":
            raise UserError(
                f"{root} holds {' and '.join(rivals)}, each of which may be the training images: give one of them "
                "as DIR, and the held-out images by --val-data"
            )
        if len(rivals) > 1:
            notes.append(f"{' and '.join(rivals)} in {root} not read, as each may be {split}: give one by --val-data")
            continue
        chosen[split] = found[0].name
        if found[0].name != split:
            notes.append(f"{found[0].name} in {root} is read as {split}")
        if len(found) > 1:
            notes.append(f"{some([claim.name for claim in found[1:]])} in {root} not read, as there is {found[0].name}")
    return chosen, notes


def _is_rival(claim: _Claim, best: _Claim, affix: str) -> bool:
    """Whether nothing but the year or the case tells a claim from the best; ``affix``: of the training images."""
    mine, theirs = ((c.rank, c.affix == affix, bool(c.affix), c.other_case) for c in (claim, best))
    return mine == theirs


def _is_of_split(name: str) -> bool:
    """``train_masks``, ``test labels``."""
    return bool(re.match(r"(train|val|test)\w*?[-_ .]", name, re.IGNORECASE))


def _shows_images(folder: str) -> bool:
    """Whether there are images in a folder or in the first of its folders."""
    top = list_directory(folder)
    return bool(top.images) or bool(top.folders and list_directory(os.path.join(folder, top.folders[0])).images)


def _is_flat(folder: str) -> bool:
    top = list_directory(folder)
    return bool(top.images) and not any(_shows_images(os.path.join(folder, name)) for name in top.folders)
