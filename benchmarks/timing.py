"""Times of calls that are to be compared: all in one run, taking turns."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 2  # rounds: allocators, libraries and compilers do their work once


def milliseconds(call: Callable[[], Any], device: str) -> float:
    """Of one call."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    cold_cache().zero_()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


@functools.cache
def cold_cache() -> Tensor:
    """More bytes than any L2 cache holds; writing them drives everything else out."""
    return torch.empty(1 << 28, dtype=torch.uint8, device="cuda")


def turns(calls: dict[str, Callable[[], Any]], repeats: int, device: str, row: int) -> dict[str, list[list[float]]]:
    """Milliseconds of each call; every round makes all of them ``row`` times in a row, in an order of its own."""
    found: dict[str, list[list[float]]] = {name: [] for name in calls}
    order, shuffler = list(calls), random.Random(0)
    for repeat in range(WARM_UP + repeats):
        shuffler.shuffle(order)
        for name in order:
            taken = [milliseconds(calls[name], device) for _ in range(row)]
            if repeat >= WARM_UP:
                found[name].append(taken)
    return found


def rounds(calls: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """``turns`` of one call each."""
    return {name: [first for (first,) in taken] for name, taken in turns(calls, repeats, device, 1).items()}
