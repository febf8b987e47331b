"""Microseconds and memory of the loss, forward and backward: the variants of contrastive_loss.py and lightly's MoCo."""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.speed import contrastive_loss as bench

from . import clock
from .findings import Findings

SIZES = ((32, 65536), (256, 65536), (1024, 65536), (32, 262144), (256, 262144), (256, 4096))
LIGHTLY = "lightly's MoCo"
SLOW = (bench.NAIVE, bench.REFERENCE)  # thousands of launches: at one size
EVENTS, GRAPH, MEMORY = "us by events", "us by graph", "MiB"


def row(n: int, total: int, variant: str, what: str) -> str:
    """The name of a number, for the verdicts too."""
    return f"N {n}, K {total}, {variant}, {what}"


def run(found: Findings) -> None:
    for n, total in ((2, 70),) if found.dry else SIZES:
        p = bench.make_problem(settings(found), (n, total))
        for name, call in calls(p, (n, total)).items():
            with found.guarded(f"N {n}, K {total}, {name}"):
                why = bench.refusal(call)
                if why:
                    found.note(f"N {n}, K {total}, {name}", f"not measured: {why}"[:160])
                else:
                    measured(found, (n, total), name, call)


def settings(found: Findings) -> argparse.Namespace:
    argv = ["--dim", "20", "--hard", "9", "--counts", *["2"] * 6] if found.dry else []
    args = bench.parse(argv)
    args.device = found.device
    return args


def calls(p: bench.Problem, size: tuple[int, int]) -> dict[str, Callable[[], Any]]:
    """A step of each variant."""
    made: dict[str, Callable[[], Any]] = {
        name: functools.partial(bench.step, variant, p)
        for name, variant in bench.VARIANTS.items()
        if name not in SLOW or size == (256, 65536) or not p.q.is_cuda
    }
    if importlib.util.find_spec("lightly"):
        made[LIGHTLY] = lightly(p)
    return made


def lightly(p: bench.Problem) -> Callable[[], Any]:
    """Its loss with a queue, which it also writes into."""
    memory = (len(p.queue), p.q.shape[1])
    criterion = importlib.import_module("lightly.loss").NTXentLoss(temperature=p.temperature, memory_bank_size=memory)
    criterion.to(p.q.device)

    def step() -> torch.Tensor:
        p.q.grad = None
        loss = criterion(p.q, p.k)
        loss.backward()
        return loss.detach()

    return step


def measured(found: Findings, size: tuple[int, int], name: str, call: Callable[[], Any]) -> None:
    slow = name in SLOW
    found.note(row(*size, name, EVENTS), clock.microseconds(call, found.device, 5 if slow else 25, 2), "us")
    if found.dry:
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    found.note(row(*size, name, MEMORY), (torch.cuda.max_memory_allocated() - before) / 2**20, "MiB")
    if slow or not (name == bench.BASE or name.startswith("triton")):
        return
    seen = clock.kernels(call)
    taken, launches = clock.total(seen)
    found.note(row(*size, name, "kernels"), taken, f"us in {launches:.0f}: {clock.longest(seen)}")
    replayed, _ = clock.graph_of(call)
    found.note(row(*size, name, GRAPH), clock.microseconds(replayed.replay, found.device), "us")
