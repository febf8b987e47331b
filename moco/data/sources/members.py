"""What the members of a tar shard are: which file is the image of a key, and which one says its class.

A key is what webdataset calls so (``base_plus_ext`` of its tariterators.py): a member's path up to the first dot behind
its last slash. The folder belongs to it, dots in folders do not end it, and what follows it is the extension, compared
without case. What can be read in two ways is refused by the member's name; what is missing is counted.

Legend: n images of a shard.
"""

from __future__ import annotations

import codecs
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from moco.data.sources.bands import ARRAY_EXTENSION, without_arrays
from moco.data.sources.files import CLASSES, IMAGE_EXTENSIONS
from moco.data.sources.names import is_clutter
from moco.errors import UserError

END_MARK = 2 * tarfile.BLOCKSIZE  # zero bytes that end a tar file
NUMBER_BYTES = 32  # of a label that is a number at most
LABEL_BYTES = 1024  # of any label's file at most
JSON_BYTES = 1 << 24  # of a file that may hold a label among other things
JSON_NAMES = ("label", "cls")  # of the entries of KEY.json that are taken for a label
_PLAIN = frozenset(extension.lstrip(".") for extension in IMAGE_EXTENSIONS)
_DIGITS = re.compile(rb"\d+")
_METADATA = re.compile(r"__[^/]*__($|/)")  # which webdataset passes over too
Label = int | str | None


@dataclass
class Members:
    """The images of one shard and what else was seen in it.

    images: (n,) in their order in the file, one a key. labels: (n,), None where a key has none. compound: extension of
    images with more than one, by their place among the n. second: how often an image of such an extension lies beside
    the one of its key. passed_over: as :class:`moco.data.sources.base.Found` has it. stray: names of labels without an
    image. odd: files whose "label" is no class. told: what was decided about labels, each sentence once.
    """

    images: list[tarfile.TarInfo]
    labels: list[Label]
    compound: dict[int, str] = field(default_factory=dict)
    second: Counter[str] = field(default_factory=Counter)
    passed_over: Counter[str] = field(default_factory=Counter)
    stray: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    told: set[str] = field(default_factory=set)


def read_members(file: BinaryIO, shard: str) -> Members:
    """What is in an open tar file.

    Raises:
        UserError: two images or two labels of one key, or a label that is no class; the sentence names the member.
        Exception: ValueError, and whatever tarfile raises, unless all of the file is whole.
    """
    found = _Sorted(shard, file)
    end = os.fstat(file.fileno()).st_size
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            if member.size < 0 or member.offset_data + member.size > end or member.issparse():
                raise ValueError(f"{member.name} does not lie in it whole" + " (a sparse file)" * member.issparse())
            if not member.isdir():
                found.take(member)
        _check_end(file, tar.offset)
    return found.members()


def _check_end(file: BinaryIO, place: int) -> None:
    """ValueError unless nothing but zeros is behind the last member: tarfile ends without a word where a header is
    damaged, and where the file ends between two members."""
    file.seek(place)
    rest = file.read(1 << 20)
    if len(rest) < END_MARK:
        raise ValueError(f"cut short: a tar file ends with {END_MARK:,} zero bytes")
    while rest:
        if rest.count(0) < len(rest):
            raise ValueError(f"at byte {place:,} a damaged header, or more behind the end mark")
        rest = file.read(1 << 20)


def split_name(name: str) -> tuple[str, str]:
    """(key, extension in lower case) of a member; the extension is empty where the name has no dot."""
    folder, slash, file = name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


class _Sorted:
    """The members of a shard by key, as they come."""

    def __init__(self, shard: str, file: BinaryIO) -> None:
        self.shard, self.handle = shard, file.fileno()
        self.images: dict[str, tarfile.TarInfo] = {}
        self.arrays: list[tuple[str, tarfile.TarInfo]] = []  # images where there are no pictures
        self.several: dict[str, list[tarfile.TarInfo]] = {}  # images of one key
        self.labels: dict[str, tuple[str, str, Label]] = {}  # extension, member, label
        self.jsons: dict[str, tarfile.TarInfo] = {}
        self.passed_over: Counter[str] = Counter()
        self.odd: list[str] = []
        self.told: set[str] = set()

    def take(self, member: tarfile.TarInfo) -> None:
        """Sort one member that is no folder."""
        name = member.name
        if is_clutter(name):
            self.passed_over["hidden"] += 1
        elif not member.isfile():
            self.passed_over["link"] += 1
        elif _METADATA.match(name):
            self.passed_over["metadata"] += 1
        else:
            self._file(member, *split_name(name))

    def _file(self, member: tarfile.TarInfo, key: str, extension: str) -> None:
        last = extension.rpartition(".")[2]
        if f".{last}" == ARRAY_EXTENSION:
            self.arrays.append((key, member))
        elif last in _PLAIN:
            self._image(member, key)
        elif last == "cls":
            self._label(member, key, extension)
        elif extension == "json":
            if key in self.jsons:
                self._refuse_two("labels", key, [self.jsons[key].name, member.name])
            self.jsons[key] = member
        else:
            self.passed_over[f".{last}" if last else "no extension"] += 1

    def _image(self, member: tarfile.TarInfo, key: str) -> None:
        if key in self.images:
            self.several.setdefault(key, [self.images[key]]).append(member)
        self.images[key] = member

    def _label(self, member: tarfile.TarInfo, key: str, extension: str) -> None:
        """Keep the label of a key; of two the one that is called KEY.cls."""
        before = self.labels.get(key)
        if before and (before[0] == extension or "cls" not in (before[0], extension)):
            self._refuse_two("labels", key, [before[1], member.name])
        if before:
            self.passed_over[".cls"] += 1
        if not before or extension == "cls":
            self.labels[key] = extension, member.name, self._read_label(member)

    def _read_label(self, member: tarfile.TarInfo) -> Label:
        data = self._content(member) if member.size <= LABEL_BYTES else b""
        label = label_of(data)
        if label is None:
            said = " ".join(data[:40].decode(errors="backslashreplace").split())
            raise UserError(
                f"{self.shard}: the label {member.name} is no number below {CLASSES:,} and no name of a class "
                f"({said if member.size <= LABEL_BYTES else f'{member.size:,} bytes'}): write 0, 1, 2 or names, and no "
                "file where there is no label"
            )
        return label

    def _content(self, member: tarfile.TarInfo) -> bytes:
        return os.pread(self.handle, member.size, member.offset_data)

    def members(self) -> Members:
        """All of it, once the file is read to its end."""
        if self.arrays:
            self._take_arrays()
        second = self._choose()
        chosen = list(self.images.items())
        if second:
            chosen.sort(key=lambda pair: pair[1].offset_data)
        self._join_jsons()
        extensions = [split_name(member.name)[1] for _, member in chosen]
        return Members(
            images=[member for _, member in chosen],
            labels=[self.labels[key][2] if key in self.labels else None for key, _ in chosen],
            compound={place: extension for place, extension in enumerate(extensions) if "." in extension},
            second=second,
            passed_over=self.passed_over,
            stray=[name for key, (_, name, _) in self.labels.items() if key not in self.images],
            odd=self.odd,
            told=self.told,
        )

    def _take_arrays(self) -> None:
        """Arrays are images, but beside pictures, whose features or masks they hold."""
        names = [member.name for member in self.images.values()] + [member.name for _, member in self.arrays]
        if len(without_arrays(names)) == len(names):
            for key, member in self.arrays:
                self._image(member, key)
        else:
            self.passed_over[ARRAY_EXTENSION] += len(self.arrays)

    def _choose(self) -> Counter[str]:
        """Leave one image to each key that has several: the one that has nothing between key and extension. Returns how
        many others there are by their extensions."""
        second: Counter[str] = Counter()
        for key, members in self.several.items():
            plain = [member for member in members if "." not in split_name(member.name)[1]]
            if len(plain) != 1:
                self._refuse_two("images", key, [member.name for member in plain or members])
            self.images[key] = plain[0]
            second.update(split_name(member.name)[1] for member in members if member is not plain[0])
        return second

    def _refuse_two(self, what: str, key: str, names: list[str]) -> None:
        example = "KEY.jpg beside KEY.mask.png" if what == "images" else "KEY.cls"
        twice = " twice" * (names[0] == names[1])
        both = names[0] + twice if twice else f"{names[0]} and {names[1]}"
        raise UserError(
            f"{self.shard}: the key {key} has two {what}, {both} (a key ends at the first dot of a file's name): give "
            f"each image a key of its own, or call the one that counts as in {example}"
        )

    def _join_jsons(self) -> None:
        """Labels that KEY.json holds, for keys without KEY.cls; where a key has both they must be equal."""
        for key, member in self.jsons.items():
            data = self._content(member) if member.size <= JSON_BYTES else b""
            named = b'"label"' in data or b'"cls"' in data  # most of what lies beside images names neither
            values = values_in(data) if named or member.size <= NUMBER_BYTES else []
            labels = [label for label in map(class_of, values) if label is not None]
            if len(labels) == 2 and labels[0] != labels[1]:
                raise UserError(
                    f'{self.shard}: {member.name} says {labels[0]} as "label" and {labels[1]} as "cls": remove one'
                )
            if values and not labels:
                self.odd.append(f"{member.name}, which has {_short(values[0])}")
            self._join(key, member.name, labels[0] if labels else None)

    def _join(self, key: str, name: str, label: Label) -> None:
        own = self.labels.get(key)
        if label is None:
            self.passed_over[".json"] += 1
        elif own is None:
            self.labels[key] = "json", name, label
            self.told.add('the labels are the entries "label" or "cls" of KEY.json')
        elif type(own[2]) is type(label) and own[2] != label:
            raise UserError(
                f"{self.shard}: {own[1]} says {own[2]} and {name} says {label}, two labels of one key: make them equal "
                "or remove one"
            )
        elif type(own[2]) is not type(label):
            self.told.add("the labels are those of KEY.cls; KEY.json has others, a name for a number or the reverse")


def label_of(data: bytes) -> Label:
    """The label in the file KEY.cls: a whole number below ``CLASSES``, or the name of a class, as text or JSON; None
    where it is neither."""
    text = data.removeprefix(codecs.BOM_UTF8).strip()
    if _DIGITS.fullmatch(text):
        return int(text) if len(data) <= NUMBER_BYTES and int(text) < CLASSES else None
    if text[:1] in (b'"', b"{", b"["):
        labels = set(map(class_of, values_in(text)))
        return labels.pop() if len(labels) == 1 else None
    try:
        return _name(text.decode())
    except UnicodeDecodeError:
        return None


def values_in(data: bytes) -> list[Any]:
    """What a JSON text has as a label: its entries of ``JSON_NAMES`` but for null, or a number or text alone."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return []
    if isinstance(value, dict):
        return [value[name] for name in JSON_NAMES if value.get(name) is not None]
    return [value] if type(value) in (int, str) else []


def class_of(value: Any) -> Label:
    """The class that a JSON value is, a whole number below ``CLASSES`` or a name; None for others: lists, -1, 0.5."""
    if isinstance(value, str):
        return _as_number(value) if value.strip().isdigit() else _name(value)
    return value if type(value) is int and 0 <= value < CLASSES else None


def _as_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"\s*[0-9]{1,32}\s*", text) and int(text) < CLASSES else None


def _name(text: str) -> str | None:
    """The name of a class; None for no text, several lines, control characters, and numbers in another way of writing:
    of "0x1f", "-1", "7.0" and "3 5" somebody else would make another class."""
    text = text.strip()
    if not text or not text.isprintable() or re.fullmatch(r"[\d\s.,;:/+_-]+", text):
        return None
    for number in (float, lambda word: int(word, 0)):
        try:
            number(text)
        except ValueError:
            continue
        return None
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def without_masks(shards: Iterable[Members]) -> int:
    """Leave out, in place, images that are called as the second images of other keys: of such a key the image itself
    is missing. Returns how many."""
    shards = list(shards)
    known = {extension for shard in shards for extension in shard.second}
    left_out = 0
    for shard in shards:
        masks = {place for place, extension in shard.compound.items() if extension in known}
        if masks:
            kept = [place for place in range(len(shard.images)) if place not in masks]
            shard.images = [shard.images[place] for place in kept]
            shard.labels = [shard.labels[place] for place in kept]
            left_out += len(masks)
    return left_out
