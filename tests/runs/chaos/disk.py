"""A full disk: from the k-th write to the scene's folder on, or at that write alone, there is no room."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.runs.chaos.scenes import Scene, differ
from tests.runs.chaos.verdicts import RIGHT, SENTENCE, WRONG, Verdict, ill_mannered

NEVER = 10**9
# scenes that replace their files
OVER_OLD = (
    "average", "export timm", "export safetensors", "embed", "retrieval", "neighbours CKPT", "negatives", "index",
)  # fmt: skip


class FullDisk:
    """Counts writes below ``folder`` in this process and those it forks later; the ``first``-th fails, or all from it
    on. The last number is left in ``count``, a file elsewhere."""

    def __init__(self, folder: Path, first: int, lasting: bool, code: int, count: Path) -> None:
        self.folder, self.first, self.lasting, self.code, self.count = str(folder), first, lasting, code, count
        self.writes = 0

    def begin(self) -> None:
        """Take the place of what writes."""
        opened = builtins.open

        def open_(file: Any, mode: str = "r", buffering: int = -1, *more: Any, **named: Any) -> Any:
            if not self.ours(file) or not set(mode) & set("wax+"):
                return opened(file, mode, buffering, *more, **named)
            return self.stream(file, mode, buffering, *more, **named)

        builtins.open = io.open = tarfile.bltn_open = open_  # type: ignore[assignment,attr-defined]
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]
        for name in ("mkdir", "replace", "fsync"):
            setattr(os, name, self.counted(getattr(os, name)))

    def ours(self, file: Any) -> bool:
        return isinstance(file, (str, bytes, os.PathLike)) and os.fsdecode(file).startswith(self.folder)

    def counted(self, work: Callable) -> Callable:
        def call(target: Any, *more: Any, **named: Any) -> Any:
            if isinstance(target, int) or self.ours(target):
                self.write()
            return work(target, *more, **named)

        return call

    def write(self) -> None:
        """One more; OSError where there is no room."""
        self.writes += 1
        with os.fdopen(os.open(self.count, os.O_WRONLY | os.O_CREAT, 0o644), "w") as file:
            file.write(f"{self.writes:9}")
        if self.writes == self.first or (self.lasting and self.writes > self.first):
            raise OSError(self.code, os.strerror(self.code))

    def stream(
        self, file: Any, mode: str, buffering: int, encoding: str | None = None, errors: str | None = None,
        newline: str | None = None, closefd: bool = True, opener: Any = None,
    ) -> Any:  # fmt: skip
        """What open returns, over a file whose writes are counted."""
        disk = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                disk.write()
                return super().write(data)

        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline, line_buffering=buffering == 1)


def case(scenes: list[Scene], base: Path, here: Path, seed: int, number: int) -> Verdict:
    """One command whose disk is full once, and then the same command with room."""
    rng = random.Random(f"{seed} disk {number}")
    scene = rng.choices(scenes, [scene.weight for scene in scenes])[0]
    wanted, normal = scene.undisturbed(base, here)
    writes = count(scene, base, here)
    first, lasting, old = rng.randint(1, writes), rng.random() < 0.6, scene.name in OVER_OLD and rng.random() < 0.5
    code = rng.choices((errno.ENOSPC, errno.EDQUOT, errno.EIO), (8, 1, 1))[0]
    scene.set_up(base, here)
    if old:
        scene.run(here)
    ended = scene.run(here, FullDisk(here, first, lasting, code, here.with_suffix(".count")).begin)
    why = ill_mannered(ended, normal.peak, (*scene.codes, 75))
    strays = [path.name for path in here.rglob("*") if path.name.endswith((".tmp", ".part"))]
    why = why or ("left " + strays[0] if strays else "")
    if not why and old and (damaged := differ(wanted, scene.value(here, normal))):
        why = f"the old file is not whole: {damaged}"
    if not why and ended.code:
        again = scene.run(here)
        why = f"with room again, exit code {again.code}: {again.text[-300:]}" if again.code else ""
    made = scene.value(here, normal) if not why else wanted
    if "are lost" in ended.text:  # records of a log that could not be written, which was said
        wanted, made = ({k: v for k, v in of.items() if not k.endswith(".jsonl")} for of in (wanted, made))
    why = why or differ(wanted, made)
    verdict = WRONG if why else SENTENCE if ended.code else RIGHT
    how = f"{errno.errorcode[code]} {'from' if lasting else 'at'} write {first} of {writes}"
    how += " on" * lasting + ", over old files" * old
    return Verdict("disk", number, scene.name, f"{scene.name}: {how}", verdict, why)


def count(scene: Scene, base: Path, here: Path) -> int:
    """How many writes a command makes."""
    noted = here.with_name(f"{here.name} {scene.name}.writes")
    if not noted.exists():
        scene.set_up(base, here)
        ended = scene.run(here, FullDisk(here, NEVER, False, errno.ENOSPC, noted).begin)
        assert ended.code == 0, f"{scene.name} fails with counted writes: {ended.text}"
    return int(noted.read_text())
