"""Shares of a step side by side, each on a core of its own.

Threads that divide every operator wait for each other after every operator, and for operators of microseconds that
costs more than they do: one core at a time over its own queries took half as long on two cores.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")

_pools: dict[int, ThreadPoolExecutor] = {}  # by number of workers
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # a forked loader process has none of their threads


class Team:
    """As many workers as torch has threads in the calling one, on a CPU; elsewhere the calling thread alone."""

    def __init__(self, device: torch.device) -> None:
        self.size = torch.get_num_threads() if device.type == "cpu" else 1

    def shares(self, total: int, most: int | None = None) -> list[slice]:
        """range(total) in slices whose lengths differ by one at most, as many for each worker, none above ``most``."""
        each = -(-total // (self.size * max(1, most))) if most else 1
        count = min(total, self.size * each)
        ends = [i * total // count for i in range(count + 1)]
        return [slice(a, b) for a, b in zip(ends, ends[1:], strict=False)]

    def run(self, function: Callable[[slice], Result], jobs: Sequence[slice]) -> list[Result]:
        """[function(job) for job in jobs], in any order of execution and without autograd."""
        function = torch.no_grad()(function)
        if self.size == 1 or len(jobs) == 1:
            return [function(job) for job in jobs]
        return list(_pool(self.size).map(function, jobs))


def _pool(size: int) -> ThreadPoolExecutor:
    if size not in _pools:
        pool = _pools[size] = ThreadPoolExecutor(size, "head", torch.set_num_threads, (1,))
        started = threading.Barrier(size)
        list(pool.map(lambda _: started.wait(), range(size)))
        # Each has set its own number and the default of threads to come, which is not theirs to choose.
        torch.set_num_threads(size)
    return _pools[size]
