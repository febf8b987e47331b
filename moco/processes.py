"""Who a process is, so that others can tell later whether it lives; and names of files in the making."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
from dataclasses import dataclass

ALIVE, GONE, UNKNOWN = "alive", "gone", "unknown"
_TEMPORARY = re.compile(r"\.([0-9a-f]*)-(\d{1,9})-(\d{1,19})-[0-9a-f]{8}\.tmp$")


@dataclass(frozen=True)
class Process:
    """A process for ever: a later one with its number has another start.

    machine: the boot of a machine and the numbering of processes there, which containers have of their own; empty where
    they cannot be told. started: in ticks after the boot.
    """

    machine: str
    pid: int
    started: int

    def state(self) -> str:
        """ALIVE, GONE or, on another machine or hidden from this user, UNKNOWN."""
        if not self.machine or self.machine != _machine():
            return UNKNOWN
        try:
            return ALIVE if _started(self.pid) == self.started else GONE
        except OSError:
            with contextlib.suppress(PermissionError):  # of another user, of whom /proc may show nothing
                return UNKNOWN if _exists(self.pid) else GONE
            return UNKNOWN


def this_process() -> Process:
    """The one that asks."""
    try:
        return Process(_machine(), os.getpid(), _started(os.getpid()) or 0)
    except OSError:  # no /proc
        return Process("", os.getpid(), 0)


@functools.cache
def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            names = file.read() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(names.encode()).hexdigest()[:12]


def _started(pid: int) -> int | None:
    """When a process began; None of one that has ended and whose parent has not yet asked for its exit code."""
    with open(f"/proc/{pid}/stat", "rb") as file:
        entries = file.read().rpartition(b")")[2].split()  # behind its name, which may hold anything
    return None if entries[0] in (b"Z", b"X") else int(entries[19])


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def temporary(path: str) -> str:
    """A name beside ``path`` that no other process and no other call has, and that says who writes there."""
    me = this_process()
    return f"{path}.{me.machine}-{me.pid}-{me.started}-{secrets.token_hex(4)}.tmp"


def remove_stale(folder: str, prefix: str = "", of: Process | None = None) -> None:
    """Remove the :func:`temporary` files in a folder whose names begin so and whose writer is gone.

    of: a process that is known to be gone, of another machine too.
    """
    with contextlib.suppress(OSError):  # no such folder, or somebody else removes them
        for name in os.listdir(folder or "."):
            found = _TEMPORARY.search(name) if name.startswith(prefix) else None
            writer = Process(found[1], int(found[2]), int(found[3])) if found else None
            if writer and (writer == of or writer.state() == GONE):
                os.remove(os.path.join(folder, name))
