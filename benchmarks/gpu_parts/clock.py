"""Times on a card, by events and by CUDA graphs, and what the host and the profiler see."""

from __future__ import annotations

import contextlib
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.timing import milliseconds

Call = Callable[[], Any]
ANNOTATIONS = ("Optimizer.", "Profiler")  # spans of several kernels that the profiler lists among them
WAIT = "called a synchronizing CUDA operation"  # torch's warning


def sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def microseconds(call: Call, device: str, repeats: int = 25, warm: int = 5) -> float:
    """Median of one call from an idle card to its last kernel's end, L2 cold: the host's launches count."""
    for _ in range(warm if device == "cuda" else 0):
        call()
    return 1e3 * statistics.median(milliseconds(call, device) for _ in range(repeats if device == "cuda" else 1))


def graph_of(call: Call) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call in a CUDA graph, and what it returned while it was captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    return graph, found


def kernels(call: Call, repeats: int = 5) -> dict[str, tuple[float, float]]:
    """{kernel: (microseconds, launches)} a call, by torch.profiler, L2 as the call before left it."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in seen.events() or ():
        annotation = getattr(event, "is_user_annotation", False) or event.name.startswith(ANNOTATIONS)
        if event.device_type == torch.autograd.DeviceType.CUDA and not annotation:
            entry = found.setdefault(event.name, [0.0, 0.0])
            entry[0] += event.time_range.elapsed_us()
            entry[1] += 1
    return {name: (taken / repeats, count / repeats) for name, (taken, count) in found.items()}


def total(found: dict[str, tuple[float, float]]) -> tuple[float, float]:
    """(microseconds, launches) a call."""
    return sum(taken for taken, _ in found.values()), sum(count for _, count in found.values())


def longest(found: dict[str, tuple[float, float]], most: int = 6) -> str:
    """The kernels that take most, without their templates."""

    def name(kernel: str) -> str:
        return (kernel.replace("void ", "").split("(")[0].split("<")[0].split("::")[-1] or kernel)[:28]

    order = sorted(found.items(), key=lambda entry: -entry[1][0])[:most]
    return ", ".join(f"{name(kernel)} {taken:.0f}" for kernel, (taken, _) in order)


def host_microseconds(call: Call, device: str, repeats: int = 10) -> float:
    """What the host needs to hand a call to the card, which is not waited for."""
    call()
    sync(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    taken = time.perf_counter() - start
    sync(device)
    return 1e6 * taken / repeats


@contextlib.contextmanager
def counted_waits() -> Iterator[list[str]]:
    """The list, filled at the end with a sentence for each time that the host waited for the card."""
    waits: list[str] = []
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield waits
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits += [str(w.message).splitlines()[0] for w in caught if WAIT in str(w.message)]


def poison(device: str) -> None:
    """The memory that the next tensors get is full of NaN, so that what nobody wrote shows."""
    for size in (1 << 28, 1 << 26, 1 << 24, 1 << 20, 1 << 14) if device == "cuda" else ():
        blocks = [torch.full((size // 4,), torch.nan, device=device) for _ in range(2)]
        del blocks
