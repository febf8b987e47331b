"""Who works in a folder: one run of a kind at a time, also where two machines share it over NFS.

The run's main process holds ``owner.json`` there, which names it, and changes the file's time every BEAT_SECONDS. A
file that is left behind is taken over: at once where this machine can see that the process is gone, else after its time
has stood still for WATCH_SECONDS. That the time *changes* is all that is asked of it, so no two clocks are compared.
Over NFS the server makes the file for one process alone, and every look opens it, which asks the server.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, fields

from moco import signals
from moco.errors import UserError, tell
from moco.processes import ALIVE, GONE, UNKNOWN, Process, remove_stale, temporary, this_process

BEAT_SECONDS, WATCH_SECONDS = 10.0, 60.0  # a client that caches what it knows of a file asks again after 60 s at most


@dataclass(frozen=True)
class Owner:
    """What owner.json says. since: for people, no program reads it."""

    host: str
    machine: str
    pid: int
    started: int
    since: str
    id: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def process(self) -> Process:
        """The one that holds the folder."""
        return Process(self.machine, self.pid, self.started)

    def __str__(self) -> str:
        host, since = (" ".join(text.split())[:100] for text in (self.host, self.since))  # a file can say anything
        return f"process {self.pid} on {host}, begun {since}"


class _Lock:
    """A folder that this process holds."""

    def __init__(self, folder: str, path: str, content: bytes, made: list[str]):
        self.folder, self.path, self.content, self.made = os.path.abspath(folder), path, content, made
        self.process, self.released, self.lost = os.getpid(), threading.Event(), ""
        signals.unfinished.add(path)
        threading.Thread(target=self._beat, daemon=True).start()

    def _beat(self) -> None:
        while not (self.lost or self.released.wait(BEAT_SECONDS)):
            with contextlib.suppress(OSError):  # the next beat may reach the disk, and a save will say what is wrong
                self.look(beat=True)
                if self.lost:
                    tell(f"warning: {self.lost}", error=True)

    def look(self, beat: bool = False) -> None:
        """Find out whether the folder is still held; ``lost`` says who has it else.

        Raises:
            OSError: the folder is gone, or cannot be read.
        """
        content = None
        with contextlib.suppress(FileNotFoundError):
            content, _ = _read(self.path, self.content if beat else None)
        if content == self.content or self.released.is_set():
            return
        if not os.path.isdir(self.folder):
            raise OSError(errno.ESTALE, "the folder is gone")
        owner = _parse(content) if content else None
        who = f"{owner} took it over" if owner else f"{self.path} was removed or written over"
        signals.unfinished.discard(self.path)
        self.lost = f"{self.folder} is no longer this run's: {who}. Nothing more is saved there."

    def release(self) -> None:
        """Give the folder back, and remove it where it was made for nothing."""
        self.released.set()
        signals.unfinished.discard(self.path)
        with contextlib.suppress(OSError):
            if _read(self.path)[0] == self.content:
                os.remove(self.path)
            for folder in self.made:
                os.rmdir(folder)


_lock: _Lock | None = None


def _held() -> _Lock | None:
    """This process's; a forked one has its parent's in memory, but does not hold it."""
    return _lock if _lock and _lock.process == os.getpid() else None


def hold(folder: str, kind: str = "", choose: str = "--save-dir") -> None:
    """Make a folder and keep other runs of this kind out of it until :func:`release`. A process holds one at a time.

    Args:
        kind: of runs that write the same names there; runs of different kinds may share a folder.
        choose: the flag that says where files go, for the sentence.

    Raises:
        UserError: another run is at work there, or the folder cannot be made or written.
    """
    global _lock
    path = _path(folder, kind)
    lock = _held()
    if lock and lock.path == path and not lock.lost:
        return
    release()
    me = this_process()
    begun = time.strftime("%Y-%m-%d %H:%M:%S %z")
    content = json.dumps(asdict(Owner(socket.gethostname(), me.machine, me.pid, me.started, begun))).encode() + b"\n"
    try:
        made = _make(folder)
    except OSError as error:
        raise UserError(f"{choose} {folder} cannot be made: {error.strerror}.") from error
    try:
        while not _create(path, content):
            with contextlib.suppress(FileNotFoundError):  # it was given back meanwhile
                if _take_over(folder, path, content, choose):
                    break
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); choose another {choose}.") from error
    remove_stale(folder)
    _lock = _Lock(folder, path, content, made)


def release() -> None:
    """Give back what this process holds, if anything."""
    global _lock
    if lock := _held():
        lock.release()
    _lock = None


def look_at(folder: str, kind: str = "") -> tuple[str, str, float]:
    """Whether a run of this kind is at work in a folder, which stays as it is: its state as of
    :meth:`moco.processes.Process.state`, who it is, and when it last gave a sign of life (the time of its file). GONE
    and an empty name where nobody holds the folder."""
    try:
        content, beat = _read(_path(folder, kind))
    except OSError:
        return GONE, "", 0.0
    owner = _parse(content)
    return (owner.process.state(), str(owner), beat / 1e9) if owner else (UNKNOWN, "an unnamed process", beat / 1e9)


def lost() -> bool:
    """Whether the folder that this process held is known to be another's; asks no disk."""
    lock = _held()
    return bool(lock and lock.lost)


def check(path: str) -> None:
    """To be called before a file gets its name.

    Raises:
        UserError: it is in the folder that this process held, and no longer does.
        OSError: that cannot be found out.
    """
    lock = _held()
    if lock and os.path.dirname(os.path.abspath(path)) == lock.folder:
        lock.look()
        if lock.lost:
            raise UserError(lock.lost)


def _path(folder: str, kind: str) -> str:
    return os.path.join(folder, f"owner_{kind}.json" if kind else "owner.json")


def _make(folder: str) -> list[str]:
    """Make a folder; those that were made, the innermost first."""
    made, missing = [], os.path.abspath(folder)
    while not os.path.isdir(missing) and missing != os.path.dirname(missing):
        made.append(missing)
        missing = os.path.dirname(missing)
    os.makedirs(folder, exist_ok=True)
    return made


def _create(path: str, content: bytes) -> bool:
    """Make the file, which the file system lets one process do."""
    try:
        with open(path, "xb") as file:
            file.write(content)
    except FileExistsError:
        return False
    except OSError:  # a full disk: an empty file would have to be watched by who comes next
        with contextlib.suppress(OSError):
            os.remove(path)
        raise
    return True


def _read(path: str, expected: bytes | None = None) -> tuple[bytes, int]:
    """What an owner's file holds and its time; a beat of it where it holds what is ``expected``."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # it may be anything, also a pipe
    try:
        content = os.read(handle, 10_000)
        if content == expected:
            os.utime(handle)
        return content, os.fstat(handle).st_mtime_ns
    finally:
        os.close(handle)


def _parse(content: bytes) -> Owner | None:
    try:
        owner = Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return None
    typed = all(type(getattr(owner, entry.name)).__name__ == entry.type for entry in fields(owner))
    return owner if typed and 0 < owner.pid < 2**31 else None


def _take_over(folder: str, path: str, mine: bytes, choose: str) -> bool:
    """Put this process's file in the place of one whose owner is gone; False where another's came first.

    Raises:
        UserError: it is at work.
        FileNotFoundError: it has ended meanwhile.
    """
    content, beat = _read(path)
    owner = _parse(content)
    who, state = str(owner or f"a process that {path} does not name"), owner.process.state() if owner else UNKNOWN
    if state == UNKNOWN:
        tell(f"{folder} is held by {who}: watching for {WATCH_SECONDS:g} s whether it lives", error=True)
        state = _watch(path, content, beat)
    if state == ALIVE:
        raise UserError(f"{folder} is in use by {who}; wait for its end, end it, or choose another {choose}.")
    if state != GONE or not _replace(path, content, mine):
        return False
    remove_stale(folder, of=owner.process if owner else None)
    tell(f"{folder} is taken over from {who}, which is gone", error=True)
    return True


def _watch(path: str, content: bytes, beat: int) -> str:
    """ALIVE as soon as the file's time changes, GONE if it does not; UNKNOWN where another file took its place."""
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(min(0.5, WATCH_SECONDS / 10))
        found, now = _read(path)
        if found != content:
            return UNKNOWN
        if now != beat:
            return ALIVE
    return GONE


def _replace(path: str, content: bytes, mine: bytes) -> bool:
    """Write over the file if it still holds this; of several that try, one does, and at no instant is there no file.

    They take turns by a lock on the file that is there, which the kernel drops with a process that dies. Where the file
    system has no locks, the last one has the folder, and another finds that out here or at its next beat or save.
    """
    writable = os.path.isfile(path) and os.access(path, os.W_OK)  # not a pipe, nor another user's in a shared folder
    handle = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK)  # NFS locks what is open to write
    fresh = temporary(path)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        if not os.path.samestat(os.fstat(handle), os.stat(path)) or _read(path)[0] != content:
            return False
        with open(fresh, "xb") as file:
            file.write(mine)
        os.replace(fresh, path)
        return _read(path)[0] == mine
    finally:
        os.close(handle)
        with contextlib.suppress(FileNotFoundError):
            os.remove(fresh)
