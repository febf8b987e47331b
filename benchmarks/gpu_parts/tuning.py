"""Other sizes of the fused step's programs: microseconds of the whole loss and of the launch that they change.

A size is tried alone, beside those that are set; what it computes is compared with theirs. Which are kept is decided by
whoever reads the table, for one card's best is not another's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from moco.kernels import by_triton

from . import clock
from .findings import Findings
from .problems import Case, both_passes, make

SIZES = (32, 256)
PRECISIONS = ("tf32x3",)


@dataclass(frozen=True)
class Trial:
    """``sizes`` of by_triton.py, and ``options`` of how the program of a launch is compiled."""

    launch: str
    sizes: dict[str, int] = field(default_factory=dict)
    options: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in (*self.sizes.items(), *self.options.items()))


TRIALS = (
    *(Trial("score", {"SCORE_K": 128}, {"num_warps": warps, "num_stages": 2}) for warps in (4, 8)),
    Trial("score", {"BLOCK_C": 64}),
    Trial("score", {}, {"num_warps": 4}),
    Trial("score", {}, {"num_stages": 3}),
    Trial("score", {"QUERIES": 128}, {"num_warps": 8}),
    Trial("compact", {"ROUNDS": 4}),
    Trial("compact", {"COMPACT_K": 4096}),
    Trial("compact", {}, {"num_warps": 4}),
    Trial("compact", {}, {"num_warps": 16}),
    Trial("draws", {"DRAWS_TILE": 2048}, {"num_warps": 4}),
    Trial("draws", {"DRAWS_TILE": 8192}),
    Trial("draws", {}, {"num_warps": 4}),
    Trial("pull", {"PULL_K": 64}),
    Trial("pull", {}, {"num_warps": 4}),
    Trial("pull", {}, {"num_stages": 4}),
    Trial("pull", {"PULL_C": 256}),
)


@contextlib.contextmanager
def tried(trial: Trial) -> Iterator[None]:
    """The fused step with other sizes."""
    usual = by_triton.GridPlan.constants

    def constants(plan: by_triton.GridPlan, *given: Any, **named: Any) -> dict[str, dict]:
        found = usual(plan, *given, **named)
        found[trial.launch].update(trial.options)
        return found

    with contextlib.ExitStack() as stack:
        for name, size in trial.sizes.items():
            stack.enter_context(mock.patch.object(by_triton, name, size))
        stack.enter_context(mock.patch.object(by_triton.GridPlan, "constants", constants))
        by_triton.planned.cache_clear()
        try:
            yield
        finally:
            by_triton.planned.cache_clear()


def run(found: Findings) -> None:
    for n in (2,) if found.dry else SIZES:
        case = Case("", n)
        p = make(case.tiny() if found.dry else case, found.device)
        for precision in ("fp32",) if found.dry else PRECISIONS:
            call = functools.partial(both_passes, p, "triton", precision)
            usual = call()
            base = times(call, found)
            found.note(f"N {n}, {precision}, as set", base[0], f"us; {base[1]}")
            for trial in TRIALS[::5] if found.dry else TRIALS:
                with found.guarded(f"N {n}, {precision}, {trial.launch} {trial}"), tried(trial):
                    compared(found, f"N {n}, {precision}, {trial.launch} {trial}", call, usual, base[0])


def compared(found: Findings, name: str, call: Callable[[], Any], usual: Any, base: float) -> None:
    """A row: the loss's time, that of the launches, and whether its numbers are the usual ones'."""
    apart = float((call()[1] - usual[1]).norm() / usual[1].norm())
    taken, told = times(call, found)
    # another order of a sum may exchange rows at the edge of a set of a few queries
    found.note(name, taken, f"us, {taken / base:.3f} of as set; {told}; {apart:.1e} apart", apart < 5e-2)


def times(call: Callable[[], Any], found: Findings) -> tuple[float, str]:
    """Microseconds of a replayed CUDA graph, and of the kernels in words."""
    if found.dry:
        return clock.microseconds(call, found.device), "not timed"
    replayed, _ = clock.graph_of(call)
    return clock.microseconds(replayed.replay, found.device, 15, 3), clock.longest(clock.kernels(call))
