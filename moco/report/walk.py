"""The folders below a run's folder, nearest first and no more than a moment's worth: data sets may lie among them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

DEPTH = 4  # a sweep's trial lies three below a folder of runs
ENTRIES = 20_000  # that are looked at in all: 20 ms on a local disk
OF_ONE = 4_000  # of one folder: a folder with 100,000 images leaves time for the others


class Place(NamedTuple):
    """A folder: its path, the names of its files, and those of its folders, of which a reader may remove some that
    need not be entered."""

    path: str
    files: set[str]
    folders: list[str]

    def leave(self, *names: str) -> None:
        """Do not enter these."""
        self.folders[:] = [name for name in self.folders if name not in names]


class Walk:
    """The places at ``folder`` and ``depth`` levels below it, each level in the order of names. Hidden folders and
    links to folders are not entered. ``left_out``: a sentence where something was not looked at, empty at the end of
    most walks."""

    def __init__(self, folder: str, depth: int = DEPTH) -> None:
        self.folder, self.depth, self.left_out, self._entries = folder, depth, "", 0

    def __iter__(self) -> Iterator[Place]:
        level = [self.folder]
        for _ in range(self.depth + 1):
            below = []
            for path in level:
                place = self._read(path)
                yield place
                below += [os.path.join(path, name) for name in place.folders]
            level = below
        if level and self.depth:
            self.left_out = self.left_out or f"Folders more than {self.depth} levels below are not looked at."

    def _read(self, path: str) -> Place:
        place = Place(path, set(), [])
        if self._entries >= ENTRIES:
            return place
        try:
            with os.scandir(path) as entries:
                for number, entry in enumerate(entries, 1):
                    self._entries += 1
                    if number > OF_ONE or self._entries >= ENTRIES:
                        self.left_out = "Not every file below was looked at, since there are so many: name a subfolder."
                        break
                    if entry.is_dir(follow_symlinks=False):
                        place.folders.append(entry.name)
                    else:
                        place.files.add(entry.name)
        except OSError:  # gone, or not ours to read
            return place
        place.folders[:] = sorted(name for name in place.folders if not name.startswith("."))
        return place
