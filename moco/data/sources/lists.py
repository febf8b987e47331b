"""Lists of images as other programs write them: separators, headers, comments, and what paths are relative to.

What a line means is decided by the files that exist, once for a list, and told where it is a guess. A line that may
mean two files is refused.
"""

from __future__ import annotations

import csv
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from moco.data.sources.base import spread_indices
from moco.data.sources.names import IMAGE_EXTENSIONS
from moco.errors import UserError

TRIED = 50  # lines, spread over a list, whose files are looked for
ENDS = (".jpg", ".png", ".jpeg", ".JPEG", ".JPG", ".tif")  # that lists of names leave out
_PATHS = re.compile(
    r"#?\s*(image|img|file|id|name|path|sample|picture|photo)s?[ _-]?(image|file|name|path|id|uri|url)?s?",
    re.IGNORECASE,
)
_LABELS = re.compile(
    r"(class|label|target|category|categories|species|y|breed|diagnosis)(es|s)?[ _-]?(id|idx|index|name|label)?s?",
    re.IGNORECASE,
)
SEPARATORS = {"\t": "a TAB", ",": "a comma", ";": "a semicolon", " ": "a space"}


class Line(NamedTuple):
    """A line of a list that is not empty, and its number from 1."""

    number: int
    text: str


class Row(NamedTuple):
    """An image of a list; label: empty for none."""

    number: int
    path: str
    label: str


def cells(text: str, separator: str) -> list[str]:
    """The parts of a line, without blanks around them; at a space there are two, the last one a single word."""
    if separator == " ":
        return [part.strip() for part in text.strip().rsplit(None, 1)]
    if separator in (",", ";") and '"' in text:
        return [part.strip() for part in next(csv.reader([text], delimiter=separator, skipinitialspace=True))]
    return [unquoted(part.strip()) for part in text.split(separator)] if separator else [text.strip()]


def unquoted(text: str) -> str:
    """``"a/0.png"`` without its quotation marks."""
    return text[1:-1] if len(text) > 2 and text[0] == text[-1] == '"' else text


def columns(first: Sequence[str]) -> list[tuple[int, int | None]]:
    """Which columns of a header may hold the path and which one the label; none for a line that is no header."""
    if any(cell.lower().endswith(IMAGE_EXTENSIONS) for cell in first):
        return []
    labels = [index for index, cell in enumerate(first) if _LABELS.fullmatch(cell)]
    paths = [index for index, cell in enumerate(first) if _PATHS.fullmatch(cell) and index not in labels]
    return [(path, labels[0] if labels else None) for path in paths]


def is_comment(text: str) -> bool:
    """Whether a line begins with #, as long as nobody knows a file of this name."""
    return text.lstrip().startswith("#")


class Reading(NamedTuple):
    """How the lines of a list are read."""

    separator: str  # empty: a line is a path
    windows: bool  # backslashes are separators of folders
    base: str  # what paths are relative to
    end: str = ""  # the extension that the names leave out

    def path(self, text: str) -> str:
        """The file that is meant by the path in a line."""
        text = unquoted(text)
        return os.path.join(self.base, text.replace("\\", "/") if self.windows else text) + self.end


def read_rows(lines: Sequence[Line], path: str) -> tuple[list[Row], str, list[str]]:
    """The images of the list ``path``, the folder that their paths are relative to, and notes of what was guessed.

    Raises UserError for a list of comments, and a line that may mean two files.
    """
    kept, notes = _without_comments(lines, path)
    if not kept:
        raise UserError(f"the list {path} holds nothing but comments: write one image path a line")
    separators = "\t" if any("\t" in line.text for line in kept) else ("", ",", ";", " ")
    header, reading = _chosen(kept, path, separators)
    rows = list(_rows(kept[header is not None :], reading, header or (0, 1), path))
    notes += _guessed(kept[0], rows, header, reading, path)
    return rows, reading.base, notes


def _guessed(
    first: Line, rows: list[Row], header: tuple[int, int | None] | None, reading: Reading, path: str
) -> Iterator[str]:  # fmt: skip
    """Notes of how a list is read."""
    if header is not None:
        yield _of_header(first, header, reading, path)
    if reading.separator not in ("", "\t"):
        yield f"the lines of {path} are read as a path and a label with {SEPARATORS[reading.separator]} between"
    if reading.windows:
        yield f"the backslashes in {path} are read as /"
    if reading.end:
        yield f"the names in {path} are read with {reading.end} behind them"
    if reading.base != _folder_of(path):
        yield f"the paths in {path} are read as relative to {reading.base}"
    if reading.separator and header is None and not any(row.label for row in rows):
        yield f"the labels of {path} are empty: it is read without labels"
    if header is None and reading.separator and len(cells(first.text, reading.separator)) > 2:
        yield f"the columns of {path} behind the second are not read"


def _of_header(line: Line, header: tuple[int, int | None], reading: Reading, path: str) -> str:
    first = cells(line.text, reading.separator)
    if header not in columns(first):
        return f"line {line.number} of {path} names no image and is left out ({line.text.strip()})"
    column, label = header
    label_name = "none" if label is None else first[label]
    return (
        f"line {line.number} of {path} is read as the names of its columns ({line.text.strip()}): the path is "
        f"{first[column]}, the label {label_name}"
    )


def _folder_of(path: str) -> str:
    return os.path.dirname(os.path.abspath(path))


def _without_comments(lines: Sequence[Line], path: str) -> tuple[list[Line], list[str]]:
    folder, notes = _folder_of(path), []
    comments = {
        line.number for line in lines
        if is_comment(line.text) and not os.path.isfile(os.path.join(folder, re.split(r"[\t,]", line.text)[0].strip()))
    }  # fmt: skip
    kept = [line for line in lines if line.number not in comments]
    if comments:
        notes.append(f"{len(comments):,} of the lines of {path} begin with # and are left out")
    return kept, notes


def _chosen(kept: list[Line], path: str, separators: Sequence[str]) -> tuple[tuple[int, int | None] | None, Reading]:
    """The columns that a header names, if there is one, and the reading under which most of some lines name files."""
    folder = _folder_of(path)
    stem = os.path.splitext(os.path.basename(path))[0]
    parent = os.path.dirname(folder)
    bases = [folder, parent, os.path.join(folder, stem), os.path.join(parent, stem), os.getcwd()]
    pictures = [os.path.join(base, name) for base in (folder, parent) for name in ("train", "images", "train_images")]
    some = [kept[index] for index in spread_indices(len(kept), TRIED)]
    best, most = (None, Reading(separators[0], False, folder)), 0
    for places, ends in ((bases, [""]), (pictures, [""]), (bases + pictures, ENDS)):
        tried = (Reading("", False, base, end) for end, base in itertools.product(ends, dict.fromkeys(places)))
        best, most = _best(kept[0], some, tried, separators) or (best, most)
        if most:
            break
    header, reading = best
    if header is None and 0 < most == len(some) - 1 and not reading.end and _is_no_image(kept[0], reading):
        header = (0, 1)
    return header, reading


def _best(
    first: Line, some: list[Line], tried: Iterable[Reading], separators: Sequence[str]
) -> tuple[tuple[tuple[int, int | None] | None, Reading], int] | None:  # fmt: skip
    """Under which header and reading most of some lines name files, and how many; None where none does."""
    best, most = None, 0
    for place in tried:
        for header, reading, texts in _readings(first, some, place, separators):
            exist = sum(os.path.isfile(reading.path(text)) for text in texts)
            if exist > most:
                best, most = ((header, reading), exist), exist
        if best and most >= len(some) - (best[0][0] is not None):
            break
    return best


def _readings(
    first: Line, some: list[Line], place: Reading, separators: Sequence[str]
) -> Iterator[tuple[tuple[int, int | None] | None, Reading, list[str]]]:  # fmt: skip
    """What the lines may be, and what would be the paths then."""
    for separator in separators:
        parts = cells(first.text, separator)
        headers = columns(parts) if not os.path.isfile(place.path(parts[0])) else []
        for header in headers or [None]:
            asked = [line for line in some if line is not first or header is None]
            column = (header or (0, 1))[0]
            texts = [parts[column] for line in asked if len(parts := cells(line.text, separator)) > column]
            for windows in (False, True)[: 1 + any("\\" in text for text in texts)]:
                yield header, place._replace(separator=separator, windows=windows), texts


def _is_no_image(line: Line, reading: Reading) -> bool:
    """Whether the first line of a list is a header in words that nobody knows."""
    name = cells(line.text, reading.separator)[0]
    return not name.lower().endswith(IMAGE_EXTENSIONS) and not os.path.exists(reading.path(name))


def beginning_elsewhere(text: str, path: str) -> tuple[str, str]:
    """Of a path of another machine in a line of the list ``path``: its beginning that is to be removed, and the file
    that is meant then; both empty where there is none."""
    folder = _folder_of(path)
    turned = text.replace("\\", "/")
    for name in spellings(text):
        parts = name.split("/")
        for end in ("/".join(parts[first:]) for first in range(1, len(parts))):
            for base in (folder, os.path.dirname(folder)):
                if end and os.path.isfile(os.path.join(base, end)):
                    return text[: turned.index(end)].strip(), os.path.join(base, end)
    return "", ""


def what_is_odd(rows: Sequence[Row], path: str) -> list[str]:
    """Notes of files that are not there, and of images that are named twice."""
    notes = []
    tried = [rows[index] for index in spread_indices(len(rows), TRIED)]
    gone = [row for row in tried if not os.path.isfile(row.path)]
    if gone:
        notes.append(
            f"warning: {len(gone):,} of the {len(tried):,} lines of {path} that were looked at name no file, the first "
            f"{gone[0].path} (line {gone[0].number}): their images cannot be read"
        )
    if len({row.path for row in rows}) < len(rows):
        notes.append(_repeated(rows, path))
    return notes


def _repeated(rows: Sequence[Row], path: str) -> str:
    labels: dict[str, str] = {}
    again = [row for row in rows if labels.setdefault(row.path, row.label) != row.label]
    number = len(rows) - len(labels)
    told = f"{number:,} line{'s' * (number != 1)} of {path} name an image again"
    if again:
        return f"warning: {told}, {len(again):,} with another label, the first {again[0].path} (line {again[0].number})"
    return f"{told}: it counts as often as it is named"


def _rows(
    kept: Sequence[Line], reading: Reading, at: tuple[int, int | None], path: str
) -> Iterator[Row]:  # fmt: skip
    column, label_column = at
    for line in kept:
        parts = cells(line.text, reading.separator)
        if reading.separator not in ("", "\t"):
            parts = _checked(line, parts, reading, path)
        if column >= len(parts):
            raise UserError(
                f"line {line.number} of the list {path} has no column {column + 1}: write a path on each line"
            )
        label = parts[label_column] if label_column is not None and label_column < len(parts) else ""
        yield Row(line.number, reading.path(parts[column]), label)


def _checked(line: Line, parts: list[str], reading: Reading, path: str) -> list[str]:
    """The parts of a line, or the whole of it where that is the file; UserError where both may be meant."""
    if not parts[-1].lower().endswith(IMAGE_EXTENSIONS):
        return parts
    whole, first = (os.path.isfile(reading.path(text)) for text in (line.text.strip(), parts[0]))
    if whole and first and len(parts) > 1:
        raise UserError(
            f"line {line.number} of the list {path} may mean {line.text.strip()} or {parts[0]}, as both exist: write a "
            "TAB between path and label, or rename one"
        )
    return [line.text.strip()] if whole else parts


# -------------------------------------------------------------------------------------------- names of known images


def spellings(text: str) -> list[str]:
    """What the line of a list may call an image, the likeliest first: all of it, or its first column."""
    found = [text.strip()]
    for separator in SEPARATORS:
        parts = cells(text, separator)
        if len(parts) > 1:
            found.append(parts[0])
    plain = [*found, *map(unquoted, found)]
    turned = [name.replace("\\", "/") for name in plain if "\\" in name]
    return list(dict.fromkeys(_simple(name) for name in [*plain, *turned] if name))


def whole(text: str) -> list[str]:
    """Those of :func:`spellings` that leave nothing of the line out."""
    plain = [text.strip(), unquoted(text.strip())]
    turned = [name.replace("\\", "/") for name in plain if "\\" in name]
    return list(dict.fromkeys(_simple(name) for name in [*plain, *turned] if name))


def _simple(name: str) -> str:
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def is_header(text: str) -> bool:
    """Whether a line names columns, whatever is between them."""
    return any(columns(cells(text, separator)) for separator in ("", *SEPARATORS))
