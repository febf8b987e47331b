"""Progress bars: on the main process's terminal alone, nothing on a pipe; lines that are told stand above them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

from moco import distributed, errors

X = TypeVar("X")
tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a process that is killed leaves behind
errors.aside = tqdm.external_write_mode


# a terminal cuts a bar at its right end: of one with figures these come first
FIGURES = "{desc}: {n_fmt}/{total_fmt}{postfix} |{bar}| {elapsed}<{remaining}"


def bar(total: int, initial: int = 0, desc: str = "", hidden: bool = False, layout: str | None = None) -> tqdm:
    """A bar of so many steps to use in ``with``; it is gone behind it. layout: tqdm's ``bar_format``."""
    hidden = hidden or not (distributed.is_main() and sys.stderr is not None and sys.stderr.isatty())
    return tqdm(
        total=total, initial=initial, desc=desc, disable=hidden, leave=False, dynamic_ncols=True, bar_format=layout
    )


def counted(items: Iterable[X], total: int, desc: str) -> Iterator[X]:
    """The items, under a bar."""
    with bar(total, desc=desc) as shown:
        for item in items:
            yield item
            shown.update()
