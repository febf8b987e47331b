"""Compressed tar files, in which no image can be read alone: what to type instead, and which of them may lie there."""

from __future__ import annotations

import os

from moco.data.sources.base import Found
from moco.data.sources.files import IMAGE_EXTENSIONS
from moco.data.sources.names import is_clutter
from moco.errors import UserError
from moco.files import open_regular

UNPACK = {  # what gives the tar file back, by the end of its name
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tbz2": "bunzip2", ".tbz": "bunzip2",
    ".tar.xz": "unxz", ".txz": "unxz", ".tar.zst": "unzstd", ".tar.zstd": "unzstd", ".tzst": "unzstd",
    ".tar.lz4": "unlz4", ".tar.z": "uncompress",
}  # fmt: skip
MAGIC = {  # the first bytes of compressed files, whatever they are called
    b"\x1f\x8b": ".tar.gz", b"BZh": ".tar.bz2", b"\xfd7zXZ": ".tar.xz", b"(\xb5/\xfd": ".tar.zst",
    b"\x04\x22\x4d\x18": ".tar.lz4", b"\x1f\x9d": ".tar.z",
}  # fmt: skip


def listed(folder: str, ends: tuple[str, ...]) -> list[str]:
    """Names in a folder with one of these ends in any case, sorted, but for what systems leave there."""
    try:
        return sorted(n for n in os.listdir(folder) if n.lower().endswith(ends) and not is_clutter(n))
    except OSError:  # no folder, or one that may not be read: whoever opens images says so
        return []


def refuse_compressed(path: str) -> None:
    """UserError that says what to type for a compressed tar file, and for a folder that holds such files and no tar
    file, no image and no folder."""
    if not os.path.isdir(path):
        if end_of(path):
            _refuse([path])
    elif names := listed(path, tuple(UNPACK)):
        others = listed(path, (".tar", *IMAGE_EXTENSIONS))
        if not others and not _has_folder(path):
            _refuse([os.path.join(path, name) for name in names])


def end_of(name: str) -> str | None:
    """The end of a compressed tar file's name."""
    return next((end for end in UNPACK if name.lower().endswith(end)), None)


def _refuse(paths: list[str]) -> None:
    end = end_of(paths[0]) or ""
    more = f" (and {len(paths) - 1} more)" * (len(paths) > 1)
    raise UserError(
        f"{paths[0]}{more} is a compressed tar file, in which no image can be read alone: type `{UNPACK[end]} "
        f"{paths[0]}`, which leaves {os.path.basename(paths[0])[: -len(end)]}.tar"
    )


def pass_over_compressed(folder: str, shards: list[str], found: Found) -> None:
    """Count the compressed files of which the tar file lies beside; UserError for one of which it does not."""
    there = {os.path.basename(shard).lower() for shard in shards}
    packed = {name: end for name in listed(folder, tuple(UNPACK)) if (end := end_of(name))}
    if alone := [name for name, end in packed.items() if f"{name[: -len(end)]}.tar".lower() not in there]:
        _refuse([os.path.join(folder, name) for name in alone])
    for end in packed.values():
        found.passed_over[end] = found.passed_over.get(end, 0) + 1


def end_by_content(shard: str) -> str:
    """The end that the name of a compressed file should have; empty for one that is not compressed."""
    try:
        with open_regular(shard) as file:
            start = file.read(8)
    except OSError:
        return ""
    return next((end for magic, end in MAGIC.items() if start.startswith(magic)), "")


def _has_folder(path: str) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() for entry in entries)
